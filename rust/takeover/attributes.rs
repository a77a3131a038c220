// SPDX-License-Identifier: GPL-2.0-only

//! Taking over the files of `/sys/kernel/mm/ksm`.
//!
//! The `show` and `store` pointers of the built-in attributes are swapped in place, so that
//! descriptors which were opened before go on working. [`Attrs`] also closes the two gaps which
//! that leaves: calls of the built-in functions that began before the swap, and calls of ours that
//! began before the swap back.
//!
//! # Phases
//!
//! ```text
//!            hold()             open()              close()
//!   built-in ──────► Held ─────────────────► Open ───────────► Held
//!                     │                                          │
//!                     └────────────── drop ──────────────────────┴──► Forward ──► built-in
//! ```
//!
//! While *held*, callers wait. When *open*, our [`Files`] answer. In *forward*, which begins when
//! the pointers are the built-in's again, those who still come or have waited get what the
//! built-in answers. So a user sees neither an error nor a wrong answer at `insmod` and `rmmod`,
//! at worst a delay.

use crate::{
    bindings::raw,
    kernel_ext::{
        symbols::Symbols,
        wait::{
            new_wait_queue, //
            WaitQueue,
        }, //
    },
    takeover::builtin::ThreadMutex, //
};
use core::{
    ops::Deref,
    ptr,
    slice, //
};
use kernel::{
    error::to_result,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full,
            Relaxed,
            Release, //
        },
        barrier::smp_mb,
        Arc,
        SetOnce, //
    }, //
};

/// What answers the files.
///
/// Called in process context, in several threads at once, and may sleep. Interruptible waits are
/// fine: the error gets to the caller. `file` is the index in the list given to [`Attrs::hold`].
pub(crate) trait Files: Send + Sync + 'static {
    /// Reads a file: fills `text`, which has [`PAGE_SIZE`] zeroed bytes, and returns how many.
    ///
    /// # Errors
    ///
    /// Any errno is what `read()` returns.
    fn show(&self, file: usize, text: &mut [u8]) -> Result<usize>;

    /// Writes a file. `data` is what was written, at most a page, as it was; it may contain
    /// anything.
    ///
    /// # Errors
    ///
    /// Any errno is what `write()` returns. On success that is the length of `data`.
    fn store(&self, file: usize, data: &[u8]) -> Result;
}

/// `Held`, `Open` or `Forward`, see above.
type Phase = i32;
const HELD: Phase = 0;
const OPEN: Phase = 1;
const FORWARD: Phase = 2;

/// The one [`Inner`] that `show` and `store` use, or null.
static INSTANCE: Atomic<*mut c_void> = Atomic::new(ptr::null_mut());

/// A built-in attribute, and what it was.
struct File {
    attr: *mut raw::kobj_attribute,
    show: raw::rksm_show_t,
    store: raw::rksm_store_t,
    /// The file's node, with a reference.
    node: *mut raw::kernfs_node,
    /// Threads in our functions for this file.
    inside: Atomic<i32>,
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: The reference is ours.
        unsafe { raw::kernfs_put(self.node) };
    }
}

#[pin_data]
struct Inner<F: Files> {
    kobj: *mut raw::kobject,
    files: KVec<File>,
    phase: Atomic<Phase>,
    /// Threads that our functions answer, as opposed to those that wait.
    running: Atomic<i32>,
    handler: SetOnce<Arc<F>>,
    /// For changes of `phase`, and for `running` and `inside` coming down.
    #[pin]
    changed: WaitQueue,
}

/// The files of the built-in KSM, in our hands until this is dropped.
///
/// # Invariants
///
/// `INSTANCE` is `inner`. The attributes in `inner.files` have `show::<F>` and `store::<F>`.
pub(crate) struct Attrs<F: Files> {
    inner: Pin<KBox<Inner<F>>>,
    symbols: Symbols,
}

// SAFETY: The attributes and nodes are the kernel's, live as long as `mm_kobj`, which is for ever,
// and their pointers may be used in every thread. The handler is `Send` and `Sync`.
unsafe impl<F: Files> Send for Inner<F> {}
// SAFETY: As above; all that changes is atomic or has a lock of its own.
unsafe impl<F: Files> Sync for Inner<F> {}

/// What a built-in file says.
pub(crate) struct Text {
    page: KBox<PageBuffer>,
    len: usize,
}

/// As sysfs gives to `show`: a whole aligned page.
#[repr(C, align(4096))]
#[derive(Zeroable)]
struct PageBuffer([u8; PAGE_SIZE]);

impl PageBuffer {
    /// A page of zeroes, which never is on the stack.
    fn new() -> Result<KBox<Self>> {
        KBox::init(pin_init::init_zeroed(), GFP_KERNEL)
    }
}

impl Text {
    /// The text `text`, of a page at most.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it is longer, `ENOMEM`.
    pub(crate) fn new(text: &[u8]) -> Result<Self> {
        let mut page = PageBuffer::new()?;
        page.0
            .get_mut(..text.len())
            .ok_or(EINVAL)?
            .copy_from_slice(text);
        Ok(Self {
            page,
            len: text.len(),
        })
    }
}

impl Deref for Text {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.page.0.get(..self.len).unwrap_or_default()
    }
}

impl<F: Files> Attrs<F> {
    /// Takes the files named in `names`, and lets their users wait.
    ///
    /// When this returns, nobody is in a function of a built-in file any more. May sleep for as
    /// long as somebody is in one, such as in the store of `run` while it unmerges.
    ///
    /// # Errors
    ///
    /// After one line in the log: `ENODEV` if the kernel does not have these very files, `EBUSY` if
    /// they are in the hands of another module already. `EINTR` if a signal came.
    pub(crate) fn hold(symbols: Symbols, names: &[&CStr]) -> Result<Self> {
        let kobj = symbols.mm_kobj();
        let files = find(symbols, kobj, names)?;
        let inner = KBox::pin_init(
            pin_init!(Inner::<F> {
                kobj,
                files,
                phase: Atomic::new(HELD),
                running: Atomic::new(0),
                handler: SetOnce::new(),
                changed <- new_wait_queue!(c"rksm_attrs"),
            }),
            GFP_KERNEL,
        )?;

        let pointer = (&raw const *inner).cast_mut().cast();
        if INSTANCE.cmpxchg(ptr::null_mut(), pointer, Full).is_err() {
            return Err(EBUSY);
        }
        // INVARIANT: Holds from after this loop on; from here on `drop` undoes it.
        let attrs = Self { inner, symbols };
        let our_store: raw::rksm_store_t = Some(store::<F>);
        for file in &attrs.inner.files {
            let store = file.store.and(our_store);
            // SAFETY: The attribute is there for ever, and is not constant.
            unsafe { raw::rksm_kobj_attribute_set(file.attr, Some(show::<F>), store) };
        }
        attrs.wait_for_builtin()?;
        Ok(attrs)
    }

    /// Waits until nobody is in a function of the built-in files.
    fn wait_for_builtin(&self) -> Result {
        // Orders the new pointers before the counts. Who is not counted yet will see them.
        smp_mb(Full);
        for file in &self.inner.files {
            loop {
                // All that come to us stay inside until `phase` changes, so if there are no more
                // active ones than those, no active one is elsewhere. This must be read first:
                // who comes in between is then only counted below.
                let inside = file.inside.load(Acquire);
                // SAFETY: `file` has a reference to the node.
                let active = unsafe { raw::rksm_kernfs_active(file.node) };
                if active == inside {
                    break;
                }
                // SAFETY: May sleep here. Returns what is left when a signal came.
                if unsafe { raw::msleep_interruptible(1) } != 0 {
                    return Err(EINTR);
                }
            }
        }
        Ok(())
    }

    /// Lets `handler` answer the files from now on, also for those who wait.
    ///
    /// The first handler stays: after [`Self::close`] this opens the files for it again.
    pub(crate) fn open(&self, handler: Arc<F>) {
        let _ = self.inner.handler.populate(handler);
        self.inner.set_phase(OPEN);
    }

    /// Lets users of the files wait again. When this returns, nobody is in the handler. Sleeps.
    ///
    /// What the handler may be waiting for, such as the scanner, must go on until then.
    pub(crate) fn close(&self) {
        self.inner.set_phase(HELD);
        let inner = &self.inner;
        inner.changed.wait_idle(|| inner.running.load(Acquire) == 0);
    }

    /// What the built-in says in `file`.
    ///
    /// # Errors
    ///
    /// `EINVAL` for an index that is none or a file that cannot be read, `ENOMEM`, or what the
    /// built-in returns.
    pub(crate) fn builtin_show(&self, file: usize) -> Result<Text> {
        let mut page = PageBuffer::new()?;
        let file = self.inner.files.get(file).ok_or(EINVAL)?;
        let len = self.inner.forward_show(file, page.0.as_mut_ptr().cast());
        to_result(len as c_int)?;
        Ok(Text {
            page,
            len: len as usize,
        })
    }

    /// Writes to the built-in's `file`.
    ///
    /// # Errors
    ///
    /// `EINVAL` for an index that is none, a file that cannot be written, or more than 63 bytes;
    /// or what the built-in returns.
    pub(crate) fn builtin_store(&self, file: usize, data: &[u8]) -> Result {
        let file = self.inner.files.get(file).ok_or(EINVAL)?;
        // sysfs adds a NUL, on which the built-in relies.
        let mut text = [0u8; 64];
        let (_, head) = text.split_last_mut().ok_or(EINVAL)?;
        head.get_mut(..data.len())
            .ok_or(EINVAL)?
            .copy_from_slice(data);
        let written = self
            .inner
            .forward_store(file, text.as_ptr().cast(), data.len());
        to_result(written as c_int)
    }
}

impl<F: Files> Drop for Attrs<F> {
    fn drop(&mut self) {
        if self.inner.phase.load(Relaxed) == OPEN {
            self.close();
        }
        for file in &self.inner.files {
            // SAFETY: The attribute is there for ever; these are its own functions.
            unsafe { raw::rksm_kobj_attribute_set(file.attr, file.show, file.store) };
        }
        self.inner.set_phase(FORWARD);

        // Whoever read our pointers is counted as inside after this: a task that has not slept
        // since then is waited for, and one that sleeps in our functions is counted.
        synchronize_rcu_tasks(self.symbols);
        let inner = &self.inner;
        let empty = || {
            inner
                .files
                .iter()
                .all(|file| file.inside.load(Acquire) == 0)
        };
        inner.changed.wait_idle(empty);
        // And those who are not counted any more, but have not returned yet.
        synchronize_rcu_tasks(self.symbols);
        INSTANCE.store(ptr::null_mut(), Release);
    }
}

/// Waits until each task has slept since now, or been in user space.
///
/// With `sleep_millisecs` = 0 the built-in's thread never sleeps, but to get its mutex.
fn synchronize_rcu_tasks(symbols: Symbols) {
    let _mutex = ThreadMutex::lock(symbols);
    // SAFETY: May sleep here.
    unsafe { raw::synchronize_rcu_tasks() };
}

impl<F: Files> Inner<F> {
    fn set_phase(&self, phase: Phase) {
        self.phase.xchg(phase, Full);
        self.changed.wake_up_all();
    }

    /// Calls `answer` with the handler, or `forward` when the built-in is to answer, for a thread
    /// that came with `attr`. Waits while the files are held.
    fn enter(
        &self,
        attr: *mut raw::kobj_attribute,
        answer: impl FnOnce(&F, usize) -> isize,
        forward: impl FnOnce(&File) -> isize,
    ) -> isize {
        let Some((index, file)) = self
            .files
            .iter()
            .enumerate()
            .find(|(_, file)| file.attr == attr)
        else {
            return to_errno(EIO);
        };
        file.inside.fetch_add(1, Full);
        let phase = loop {
            // Pairs with `set_phase()` and the look at `running` after it in `close()`: of this
            // thread and that one, at least one sees what the other wrote.
            self.running.fetch_add(1, Full);
            let phase = self.phase.load(Relaxed);
            if phase != HELD {
                break phase;
            }
            self.leave();
            self.changed.wait_idle(|| self.phase.load(Relaxed) != HELD);
        };
        let result = match self.handler.as_ref() {
            Some(handler) if phase == OPEN => answer(handler, index),
            _ => forward(file),
        };
        self.leave();
        if file.inside.fetch_sub(1, Full) == 1 && self.phase.load(Relaxed) == FORWARD {
            self.changed.wake_up_all();
        }
        result
    }

    fn leave(&self) {
        if self.running.fetch_sub(1, Full) == 1 && self.phase.load(Relaxed) == HELD {
            self.changed.wake_up_all();
        }
    }

    fn forward_show(&self, file: &File, text: *mut c_char) -> isize {
        match file.show {
            // SAFETY: The built-in's own function with its own arguments; `text` has a page.
            Some(show) => unsafe { show(self.kobj, file.attr, text) },
            None => to_errno(EIO),
        }
    }

    fn forward_store(&self, file: &File, data: *const c_char, len: usize) -> isize {
        match file.store {
            // SAFETY: The built-in's own function with its own arguments; a NUL follows the data.
            Some(store) => unsafe { store(self.kobj, file.attr, data, len) },
            None => to_errno(EIO),
        }
    }
}

/// The errno that a function of a file returns.
pub(crate) fn to_errno(error: Error) -> isize {
    error.to_errno() as isize
}

/// Finds the attributes `names` of the built-in, in that order.
fn find(symbols: Symbols, kobj: *mut raw::kobject, names: &[&CStr]) -> Result<KVec<File>> {
    let group = symbols.ksm_attr_group();
    // SAFETY: The group and the kobject are the kernel's and constant; the name is a string.
    let dir = unsafe { raw::rksm_kernfs_find_and_get((*kobj).sd, (*group).name) };
    if dir.is_null() {
        pr_err!("cannot load: no /sys/kernel/mm/ksm\n");
        return Err(ENODEV);
    }
    let found = find_in(group, dir, names);
    // SAFETY: The reference is ours.
    unsafe { raw::kernfs_put(dir) };
    found
}

fn find_in(
    group: *const raw::attribute_group,
    dir: *mut raw::kernfs_node,
    names: &[&CStr],
) -> Result<KVec<File>> {
    let mut files = KVec::with_capacity(names.len(), GFP_KERNEL)?;
    for name in names {
        let Some(attr) = attributes(group).find(|&(_, there)| there == *name) else {
            pr_err!(
                "cannot load: this kernel has no /sys/kernel/mm/ksm/{}\n",
                name
            );
            return Err(ENODEV);
        };
        // SAFETY: `dir` has a reference, and the name is a string.
        let node = unsafe { raw::rksm_kernfs_find_and_get(dir, name.as_char_ptr()) };
        // SAFETY: Every attribute of this group is in a `kobj_attribute`.
        let file = unsafe {
            let attr = raw::rksm_kobj_attribute(attr.0);
            File {
                attr,
                show: raw::rksm_kobj_attribute_show(attr),
                store: raw::rksm_kobj_attribute_store(attr),
                node,
                inside: Atomic::new(0),
            }
        };
        let show = file.show.map_or(0, |show| show as usize);
        let store = file.store.map_or(show, |store| store as usize);
        // SAFETY: Only looks at the number.
        let foreign = |&text: &usize| unsafe { raw::core_kernel_text(text) } == 0;
        if [show, store].iter().any(foreign) {
            pr_err!("cannot load: another module has taken over /sys/kernel/mm/ksm\n");
            return Err(EBUSY);
        }
        if file.node.is_null() {
            pr_err!("cannot load: no /sys/kernel/mm/ksm/{}\n", name);
            return Err(ENODEV);
        }
        files.push(file, GFP_KERNEL)?;
    }
    if let Some((_, name)) = attributes(group).find(|(_, there)| !names.contains(there)) {
        pr_err!("cannot load: /sys/kernel/mm/ksm/{} is unknown here\n", name);
        return Err(ENODEV);
    }
    Ok(files)
}

/// The attributes of the group, with their names.
fn attributes(
    group: *const raw::attribute_group,
) -> impl Iterator<Item = (*mut raw::attribute, &'static CStr)> {
    // SAFETY: The kernel's group is constant; of the union this is the member it was made with.
    let mut next = unsafe { (*group).__bindgen_anon_2.attrs };
    core::iter::from_fn(move || {
        // SAFETY: The array ends with a null pointer, after which this does not go on. Each
        // attribute has a name, which is constant.
        unsafe {
            let attr = *next;
            if attr.is_null() {
                return None;
            }
            next = next.add(1);
            Some((attr, CStr::from_char_ptr((*attr).name)))
        }
    })
}

/// The `Inner` of the current [`Attrs`].
///
/// # Safety
///
/// To be called from `show` and `store` of the same `F` only.
unsafe fn instance<'a, F: Files>() -> &'a Inner<F> {
    // SAFETY: Who is here got the pointer to `show::<F>` or `store::<F>` out of an attribute, which
    // has them while there is an `Attrs<F>`; its `drop` waits for whoever did.
    unsafe { &*INSTANCE.load(Acquire).cast::<Inner<F>>() }
}

/// Answers a read of a file of the built-in.
///
/// # Safety
///
/// To be called by sysfs only, as `show` of an attribute of the current `Attrs<F>`.
unsafe extern "C" fn show<F: Files>(
    _kobj: *mut raw::kobject,
    attr: *mut raw::kobj_attribute,
    text: *mut c_char,
) -> isize {
    // SAFETY: This is `show` of `F`.
    let inner = unsafe { instance::<F>() };
    inner.enter(
        attr,
        |handler, file| {
            // SAFETY: sysfs gives a zeroed page, for us alone.
            let page = unsafe { slice::from_raw_parts_mut(text.cast::<u8>(), PAGE_SIZE) };
            handler
                .show(file, page)
                .map_or_else(to_errno, |len| len as isize)
        },
        |file| inner.forward_show(file, text),
    )
}

/// Answers a write to a file of the built-in.
///
/// # Safety
///
/// To be called by sysfs only, as `store` of an attribute of the current `Attrs<F>`.
unsafe extern "C" fn store<F: Files>(
    _kobj: *mut raw::kobject,
    attr: *mut raw::kobj_attribute,
    data: *const c_char,
    len: usize,
) -> isize {
    // SAFETY: This is `store` of `F`.
    let inner = unsafe { instance::<F>() };
    inner.enter(
        attr,
        |handler, file| {
            // SAFETY: sysfs gives that many bytes, which nobody changes during the call.
            let data = unsafe { slice::from_raw_parts(data.cast::<u8>(), len) };
            handler
                .store(file, data)
                .map_or_else(to_errno, |()| len as isize)
        },
        |file| inner.forward_store(file, data, len),
    )
}
