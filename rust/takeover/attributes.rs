// SPDX-License-Identifier: GPL-2.0-only

//! Taking over the files of `/sys/kernel/mm/ksm`.
//!
//! The `show` and `store` pointers of the built-in attributes are swapped in place, so that
//! descriptors which were opened before go on working. [`BuiltinAttributes`] also closes the two
//! gaps which that leaves: calls of the built-in functions that began before the swap, and calls of
//! ours that began before the swap back.
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
//! While *held*, callers wait. When *open*, our [`AttributeHandler`] answers. In *forward*, which
//! begins when the pointers are the built-in's again, those that still come or have waited get what
//! the built-in answers. So a user sees neither an error nor a wrong answer at `insmod` and
//! `rmmod`, at worst a delay.

use crate::{
    bindings::raw,
    kernel_ext::{
        compat,
        symbols::Symbols,
        sysfs::{
            to_errno,
            AttributeHandler, //
        },
        wait::{
            new_wait_queue, //
            WaitQueue,
        }, //
    },
    takeover::builtin::ThreadMutex, //
};
use core::{
    ops::Deref,
    ptr::{
        self,
        NonNull, //
    },
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
        Arc,
        SetOnce, //
    }, //
};

/// `HELD`, `OPEN` or `FORWARD`; see "Phases" in the module's documentation.
type Phase = i32;
const HELD: Phase = 0;
const OPEN: Phase = 1;
const FORWARD: Phase = 2;

/// The one [`Inner`] that `show` and `store` use, or null.
static INSTANCE: Atomic<*mut c_void> = Atomic::new(ptr::null_mut());

/// A node of sysfs. Dropping it gives up its reference.
///
/// # Invariants
///
/// Owns one reference.
struct KernfsNode(NonNull<raw::kernfs_node>);

impl KernfsNode {
    /// Finds a node by its name.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Safety
    ///
    /// `parent` is a directory that is there during the call, and `name` a C string.
    unsafe fn find(parent: *mut raw::kernfs_node, name: *const c_char) -> Option<Self> {
        // SAFETY: By the contract.
        // INVARIANT: It comes with a reference.
        NonNull::new(unsafe { raw::rksm_kernfs_find_and_get(parent, name) }).map(Self)
    }

    /// How many threads are in functions of the file.
    fn active(&self) -> c_int {
        // SAFETY: By the invariant the node is there.
        unsafe { raw::rksm_kernfs_active(self.0.as_ptr()) }
    }
}

impl Drop for KernfsNode {
    fn drop(&mut self) {
        // SAFETY: By the invariant there is a reference to give up.
        unsafe { raw::kernfs_put(self.0.as_ptr()) };
    }
}

/// A built-in attribute, and its original functions.
struct BuiltinAttribute<A> {
    /// The handler's name for it.
    id: A,
    name: &'static CStr,
    attr: *mut raw::kobj_attribute,
    show: raw::rksm_show_t,
    store: raw::rksm_store_t,
    node: KernfsNode,
    /// Threads in our functions for this file.
    inside: Atomic<i32>,
}

#[pin_data]
struct Inner<A, H> {
    kobj: *mut raw::kobject,
    attributes: KVec<BuiltinAttribute<A>>,
    phase: Atomic<Phase>,
    /// Threads that our functions answer, as opposed to those that wait.
    running: Atomic<i32>,
    handler: SetOnce<Arc<H>>,
    /// For changes of `phase`, and for `running` and `inside` coming down.
    #[pin]
    changed: WaitQueue,
}

/// The files of the built-in KSM, in our hands until this is dropped.
///
/// # Invariants
///
/// `INSTANCE` is `inner`. The attributes in `inner.attributes` have `show::<A, H>` and
/// `store::<A, H>`.
pub(crate) struct BuiltinAttributes<A: Copy + Send + Sync + 'static, H: AttributeHandler<A>> {
    inner: Pin<KBox<Inner<A, H>>>,
    symbols: Symbols,
}

// SAFETY: The attributes and nodes are the kernel's, live as long as `mm_kobj`, which is for ever,
// and their pointers may be used in every thread. What else there is, is `Send`.
unsafe impl<A: Send, H: Send + Sync> Send for Inner<A, H> {}
// SAFETY: The pointers may be used in every thread. All that changes is atomic or has a lock of its
// own.
unsafe impl<A: Sync, H: Send + Sync> Sync for Inner<A, H> {}

/// What a built-in file shows.
pub(crate) struct AttributeText {
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

impl AttributeText {
    /// The text `text`, of a page at most.
    ///
    /// # Context
    ///
    /// May sleep.
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

impl Deref for AttributeText {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.page.0.get(..self.len).unwrap_or_default()
    }
}

impl<A: Copy + Send + Sync + 'static, H: AttributeHandler<A>> BuiltinAttributes<A, H> {
    /// Takes over the files of `ours`, and lets their users wait. The handler gets the value that
    /// stands beside a file's name.
    ///
    /// When this returns, no thread is in a function of a built-in file any more.
    ///
    /// # Context
    ///
    /// Sleeps for as long as a thread is in a built-in function, such as the store of `run` while
    /// it unmerges.
    ///
    /// # Errors
    ///
    /// After one line in the log: `ENODEV` if the kernel does not have these very files, `EBUSY` if
    /// they are in the hands of another module already. `EINTR` if a signal came.
    pub(crate) fn hold(
        symbols: Symbols,
        ours: impl Iterator<Item = (&'static CStr, A)>,
    ) -> Result<Self> {
        let kobj = symbols.mm_kobj();
        let attributes = find(symbols, ours)?;
        let inner = KBox::pin_init(
            pin_init!(Inner::<A, H> {
                kobj,
                attributes,
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
        let held = Self { inner, symbols };
        let our_store: raw::rksm_store_t = Some(store::<A, H>);
        for file in &held.inner.attributes {
            let store = file.store.and(our_store);
            // SAFETY: The attribute is there for ever, and is not constant.
            unsafe { raw::rksm_kobj_attribute_set(file.attr, Some(show::<A, H>), store) };
        }
        held.wait_for_builtin()?;
        Ok(held)
    }

    /// Waits until no thread is in a function of the built-in files.
    ///
    /// # Context
    ///
    /// Sleeps.
    fn wait_for_builtin(&self) -> Result {
        // Orders the new pointers before the counts: a thread that is not counted yet will see
        // them.
        compat::smp_mb();
        for file in &self.inner.attributes {
            loop {
                // All that come to us stay inside until `phase` changes, so if there are no more
                // active ones than those, no active one is elsewhere. `inside` must be read first:
                // a thread that comes in between is then counted in `active` only.
                let inside = file.inside.load(Acquire);
                if file.node.active() == inside {
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

    /// Lets `handler` answer the files from now on, also for threads that wait.
    ///
    /// The first handler stays: after [`Self::close`] this opens the files for it again.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn open(&self, handler: Arc<H>) {
        let _ = self.inner.handler.populate(handler);
        self.inner.set_phase(OPEN);
    }

    /// Lets users of the files wait again. When this returns, no thread is in the handler.
    ///
    /// What the handler may be waiting for, such as the scanner, must go on until then.
    ///
    /// # Context
    ///
    /// Sleeps. What the handler may be waiting for, such as the scanner, must go on meanwhile.
    pub(crate) fn close(&self) {
        self.inner.set_phase(HELD);
        let inner = &self.inner;
        inner.changed.wait_idle(|| inner.running.load(Acquire) == 0);
    }

    /// Returns what the built-in's file `name` shows.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a name that is none of its files or a file that cannot be read, `ENOMEM`, or
    /// what the built-in returns.
    pub(crate) fn builtin_show(&self, name: &CStr) -> Result<AttributeText> {
        let mut page = PageBuffer::new()?;
        let file = self.inner.named(name)?;
        // SAFETY: The text is a zeroed page, which is ours.
        let len = unsafe { self.inner.forward_show(file, page.0.as_mut_ptr().cast()) };
        to_result(len as c_int)?;
        Ok(AttributeText {
            page,
            len: len as usize,
        })
    }

    /// Writes to the built-in's file `name`.
    ///
    /// # Context
    ///
    /// May sleep for as long as the built-in's function does.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a name that is none of its files, a file that cannot be written, or more than
    /// 63 bytes; or what the built-in returns.
    pub(crate) fn builtin_store(&self, name: &CStr, data: &[u8]) -> Result {
        let file = self.inner.named(name)?;
        // sysfs adds a NUL, on which the built-in relies.
        let mut text = [0u8; 64];
        let (_, head) = text.split_last_mut().ok_or(EINVAL)?;
        head.get_mut(..data.len())
            .ok_or(EINVAL)?
            .copy_from_slice(data);
        let text = text.as_ptr().cast();
        // SAFETY: A NUL follows the data in `text`, which is longer.
        let written = unsafe { self.inner.forward_store(file, text, data.len()) };
        to_result(written as c_int)
    }
}

impl<A: Copy + Send + Sync + 'static, H: AttributeHandler<A>> Drop for BuiltinAttributes<A, H> {
    fn drop(&mut self) {
        if self.inner.phase.load(Relaxed) == OPEN {
            self.close();
        }
        for file in &self.inner.attributes {
            // SAFETY: The attribute is there for ever; these are its own functions.
            unsafe { raw::rksm_kobj_attribute_set(file.attr, file.show, file.store) };
        }
        self.inner.set_phase(FORWARD);

        // After this every task that read our pointers is counted as inside: one that has not slept
        // since is waited for, and one that sleeps in our functions is counted.
        synchronize_rcu_tasks(self.symbols);
        let inner = &self.inner;
        let empty = || {
            inner
                .attributes
                .iter()
                .all(|file| file.inside.load(Acquire) == 0)
        };
        inner.changed.wait_idle(empty);
        // Waits for tasks that are no longer counted, but have not returned yet.
        synchronize_rcu_tasks(self.symbols);
        INSTANCE.store(ptr::null_mut(), Release);
    }
}

/// Waits until each task has slept since now, or been in user space.
///
/// With `sleep_millisecs` = 0 the built-in's thread sleeps only to get its mutex.
///
/// # Context
///
/// Sleeps. Takes `ksm_thread_mutex`.
fn synchronize_rcu_tasks(symbols: Symbols) {
    let _mutex = ThreadMutex::lock(symbols);
    // SAFETY: May sleep here.
    unsafe { raw::synchronize_rcu_tasks() };
}

impl<A: Copy, H: AttributeHandler<A>> Inner<A, H> {
    /// The built-in's file `name`.
    fn named(&self, name: &CStr) -> Result<&BuiltinAttribute<A>> {
        let mut attributes = self.attributes.iter();
        attributes.find(|file| file.name == name).ok_or(EINVAL)
    }

    fn set_phase(&self, phase: Phase) {
        self.phase.xchg(phase, Full);
        self.changed.wake_up_all();
    }

    /// Calls `answer` with the handler, or `forward` when the built-in is to answer, for a thread
    /// that came with `attr`. Waits while the files are held; a fatal signal ends the wait with
    /// `EINTR`.
    ///
    /// # Context
    ///
    /// Sleeps while the files are held.
    fn enter(
        &self,
        attr: *mut raw::kobj_attribute,
        answer: impl FnOnce(&H, A) -> isize,
        forward: impl FnOnce(&BuiltinAttribute<A>) -> isize,
    ) -> isize {
        let Some(file) = self.attributes.iter().find(|file| file.attr == attr) else {
            return to_errno(EIO);
        };
        file.inside.fetch_add(1, Full);
        let phase = loop {
            // Pairs with `set_phase()` and the look at `running` after it in `close()`: of this
            // thread and that one, at least one sees what the other wrote.
            self.running.fetch_add(1, Full);
            let phase = self.phase.load(Relaxed);
            if phase != HELD {
                break Some(phase);
            }
            self.leave();
            let changed = || self.phase.load(Relaxed) != HELD;
            if self.changed.wait_killable(changed).is_err() {
                break None;
            }
        };
        let result = match (phase, self.handler.as_ref()) {
            // A fatal signal came, and the thread no longer counts as running.
            (None, _) => to_errno(EINTR),
            (Some(OPEN), Some(handler)) => answer(handler, file.id),
            _ => forward(file),
        };
        if phase.is_some() {
            self.leave();
        }
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

    /// Has the built-in fill `text`.
    ///
    /// # Safety
    ///
    /// `text` is a zeroed page, which nobody else uses during the call.
    unsafe fn forward_show(&self, file: &BuiltinAttribute<A>, text: *mut c_char) -> isize {
        match file.show {
            // SAFETY: The built-in's own function with its own arguments; the rest is the contract.
            Some(show) => unsafe { show(self.kobj, file.attr, text) },
            None => to_errno(EIO),
        }
    }

    /// Has the built-in read `data`.
    ///
    /// # Safety
    ///
    /// `data` has `len` bytes and a NUL, which nobody changes during the call.
    unsafe fn forward_store(
        &self,
        file: &BuiltinAttribute<A>,
        data: *const c_char,
        len: usize,
    ) -> isize {
        match file.store {
            // SAFETY: The built-in's own function with its own arguments; the rest is the contract.
            Some(store) => unsafe { store(self.kobj, file.attr, data, len) },
            None => to_errno(EIO),
        }
    }
}

/// Finds the built-in's attributes of the names in `ours`, in that order.
fn find<A>(
    symbols: Symbols,
    ours: impl Iterator<Item = (&'static CStr, A)>,
) -> Result<KVec<BuiltinAttribute<A>>> {
    let (kobj, group) = (symbols.mm_kobj(), symbols.ksm_attr_group());
    // SAFETY: The group and the kobject are the kernel's and constant; the name is a string.
    let Some(dir) = (unsafe { KernfsNode::find((*kobj).sd, (*group).name) }) else {
        pr_err!("cannot load: no /sys/kernel/mm/ksm\n");
        return Err(ENODEV);
    };
    let mut found: KVec<BuiltinAttribute<A>> = KVec::new();
    for (name, id) in ours {
        let Some(attr) = attributes(symbols).find(|&(_, there)| there == name) else {
            pr_err!(
                "cannot load: this kernel has no /sys/kernel/mm/ksm/{}\n",
                name
            );
            return Err(ENODEV);
        };
        // SAFETY: Every attribute of this group is in a `kobj_attribute`.
        let (attr, show, store) = unsafe {
            let attr = raw::rksm_kobj_attribute(attr.0);
            (
                attr,
                raw::rksm_kobj_attribute_show(attr),
                raw::rksm_kobj_attribute_store(attr),
            )
        };
        let shown = show.map_or(0, |show| show as usize);
        let stored = store.map_or(shown, |store| store as usize);
        // SAFETY: The function only compares the address.
        let foreign = |&text: &usize| unsafe { raw::core_kernel_text(text) } == 0;
        if [shown, stored].iter().any(foreign) {
            pr_err!("cannot load: another module has taken over /sys/kernel/mm/ksm\n");
            return Err(EBUSY);
        }
        // SAFETY: `dir` has a reference, and the name is a string.
        let Some(node) = (unsafe { KernfsNode::find(dir.0.as_ptr(), name.as_char_ptr()) }) else {
            pr_err!("cannot load: no /sys/kernel/mm/ksm/{}\n", name);
            return Err(ENODEV);
        };
        let file = BuiltinAttribute {
            id,
            name,
            attr,
            show,
            store,
            node,
            inside: Atomic::new(0),
        };
        found.push(file, GFP_KERNEL)?;
    }
    let known = |there: &CStr| found.iter().any(|file| file.name == there);
    if let Some((_, name)) = attributes(symbols).find(|&(_, there)| !known(there)) {
        pr_err!("cannot load: /sys/kernel/mm/ksm/{} is unknown here\n", name);
        return Err(ENODEV);
    }
    Ok(found)
}

/// The attributes of the built-in, with their names.
fn attributes(symbols: Symbols) -> impl Iterator<Item = (*mut raw::attribute, &'static CStr)> {
    // SAFETY: The kernel's group is constant; of the union this is the member it was made with.
    let mut next = unsafe { (*symbols.ksm_attr_group()).__bindgen_anon_2.attrs };
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

/// The `Inner` of the current [`BuiltinAttributes`].
///
/// # Safety
///
/// To be called from `show` and `store` of the same `A` and `H` only.
unsafe fn instance<'a, A, H>() -> &'a Inner<A, H> {
    // SAFETY: The caller was called through a pointer to `show::<A, H>` or `store::<A, H>` in an
    // attribute. Those are there only while there is a `BuiltinAttributes<A, H>`, whose `drop`
    // waits for every thread that has read one.
    unsafe { &*INSTANCE.load(Acquire).cast::<Inner<A, H>>() }
}

/// Answers a read of a file of the built-in.
///
/// # Safety
///
/// To be called by sysfs only, as `show` of an attribute of the current
/// `BuiltinAttributes<A, H>`.
unsafe extern "C" fn show<A: Copy, H: AttributeHandler<A>>(
    _kobj: *mut raw::kobject,
    attr: *mut raw::kobj_attribute,
    text: *mut c_char,
) -> isize {
    // SAFETY: This is `show` of `A` and `H`.
    let inner = unsafe { instance::<A, H>() };
    inner.enter(
        attr,
        |handler, id| {
            // SAFETY: sysfs gives a zeroed page, for us alone.
            let page = unsafe { slice::from_raw_parts_mut(text.cast::<u8>(), PAGE_SIZE) };
            handler
                .show(id, page)
                .map_or_else(to_errno, |len| len as isize)
        },
        // SAFETY: As above.
        |file| unsafe { inner.forward_show(file, text) },
    )
}

/// Answers a write to a file of the built-in.
///
/// # Safety
///
/// To be called by sysfs only, as `store` of an attribute of the current
/// `BuiltinAttributes<A, H>`.
unsafe extern "C" fn store<A: Copy, H: AttributeHandler<A>>(
    _kobj: *mut raw::kobject,
    attr: *mut raw::kobj_attribute,
    data: *const c_char,
    len: usize,
) -> isize {
    // SAFETY: This is `store` of `A` and `H`.
    let inner = unsafe { instance::<A, H>() };
    inner.enter(
        attr,
        |handler, id| {
            // SAFETY: sysfs gives that many bytes, which nobody changes during the call.
            let data = unsafe { slice::from_raw_parts(data.cast::<u8>(), len) };
            handler
                .store(id, data)
                .map_or_else(to_errno, |()| len as isize)
        },
        // SAFETY: As above; sysfs adds a NUL.
        |file| unsafe { inner.forward_store(file, data, len) },
    )
}
