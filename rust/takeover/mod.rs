// SPDX-License-Identifier: GPL-2.0-only

//! Taking over from the built-in KSM, and handing back.
//!
//! [`Takeover`] has the built-in's files, has made it unmerge everything, and keeps its scanner
//! stopped. Its registry goes on as it is: mms come and go there as before. With the scanner
//! stopped and its cursor at the head of the list, an mm that exits leaves at once.

pub(crate) mod attributes;
pub(crate) mod btf;

use crate::{
    kernel_ext::symbols::Symbols,
    takeover::attributes::{
        Attrs,
        Files,
        Text, //
    }, //
};
use core::{
    ptr,
    str, //
};
use kernel::{
    bindings,
    mm::Mm,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
    task::might_sleep, //
};

/// `KSM_RUN_STOP`, `KSM_RUN_MERGE`, `KSM_RUN_UNMERGE` and `KSM_RUN_OFFLINE`: values of `run`.
const RUN_STOP: u8 = 0;
const RUN_UNMERGE: u8 = 2;
const RUN_OFFLINE: c_ulong = 4;

/// How often and how long (ms) the built-in is given time to get rid of its last merged pages,
/// which may belong to processes that are just exiting.
const DRAIN_TRIES: u32 = 100;
const DRAIN_PAUSE: c_uint = 100;

/// How many mms are pinned in one go.
const BATCH: usize = 128;

/// What of the built-in KSM can be used beside its files, from anywhere.
#[derive(Clone, Copy)]
pub(crate) struct Builtin(Symbols);

/// `ksm_thread_mutex`, held.
pub(crate) struct ThreadMutex(Symbols);

impl ThreadMutex {
    /// Takes it. Sleeps, for as long as a batch of the built-in takes.
    pub(crate) fn lock(symbols: Symbols) -> Self {
        // SAFETY: The kernel's own mutex; may sleep here.
        unsafe { bindings::mutex_lock(symbols.ksm_thread_mutex()) };
        Self(symbols)
    }
}

impl Drop for ThreadMutex {
    fn drop(&mut self) {
        // SAFETY: Taken in `lock()`.
        unsafe { bindings::mutex_unlock(self.0.ksm_thread_mutex()) };
    }
}

/// `ksm_mmlist_lock`, held.
struct MmlistLock(Symbols);

impl MmlistLock {
    fn lock(symbols: Symbols) -> Self {
        // SAFETY: The kernel's own spinlock, initialised at build time.
        unsafe { bindings::spin_lock(symbols.ksm_mmlist_lock()) };
        Self(symbols)
    }

    /// The mms on the built-in's list, in its order.
    fn mms(&self) -> impl Iterator<Item = &Mm> {
        let head = self.0.ksm_mm_head();
        // SAFETY: `head` is the built-in's, whose layout has been checked.
        let head = unsafe { &raw mut (*head).slot.mm_node };
        // SAFETY: The list does not change while the lock is held, and its end is the head.
        let mut node = unsafe { (*head).next };
        core::iter::from_fn(move || {
            if node == head {
                return None;
            }
            // SAFETY: Every other node is in an `mm_slot`. Its mm has been grabbed, or is about to
            // be by its user, who keeps it meanwhile; whoever drops it takes the slot off before.
            unsafe {
                let slot = kernel::container_of!(node, crate::bindings::layout::mm_slot, mm_node);
                node = (*node).next;
                Some(Mm::from_raw((*slot).mm))
            }
        })
    }
}

impl Drop for MmlistLock {
    fn drop(&mut self) {
        // SAFETY: Taken in `lock()`.
        unsafe { bindings::spin_unlock(self.0.ksm_mmlist_lock()) };
    }
}

impl Builtin {
    /// For which the layouts must have been checked.
    pub(crate) fn new(symbols: Symbols) -> Self {
        Self(symbols)
    }

    /// Calls `visit` for every mm on the built-in's list; those that come or go meanwhile may be
    /// visited or not, and an mm may be visited twice.
    ///
    /// The mm is pinned by `mm_count` during the call; it may be exiting. Neither the list's lock
    /// nor any other is held then. Sleeps.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, and whatever `visit` returns, which ends it.
    pub(crate) fn for_each_mm(self, mut visit: impl FnMut(&Mm) -> Result) -> Result {
        might_sleep();
        let mut batch: KVec<ARef<Mm>> = KVec::with_capacity(BATCH, GFP_KERNEL | __GFP_NOWARN)?;
        let mut last: Option<ARef<Mm>> = None;
        loop {
            self.pin_batch(last.as_deref(), &mut batch);
            for mm in &batch {
                visit(mm)?;
            }
            let more = batch.len() == BATCH;
            last = batch.pop();
            // Drops the pins outside of the lock: the last one may sleep.
            batch.clear();
            if !more {
                return Ok(());
            }
        }
    }

    /// Fills `batch` with the mms that come after `last`, or with the first ones if that has left.
    fn pin_batch(self, last: Option<&Mm>, batch: &mut KVec<ARef<Mm>>) {
        let list = MmlistLock::lock(self.0);
        let known = last.is_some_and(|last| list.mms().any(|mm| ptr::eq(mm, last)));
        let mut mms = list.mms();
        if known {
            mms.by_ref()
                .find(|mm| last.is_some_and(|last| ptr::eq(*mm, last)));
        }
        for mm in mms {
            // The capacity is that of a batch: nothing is allocated under the lock.
            if batch.push_within_capacity(mm.into()).is_err() {
                break;
            }
        }
    }

    /// Lets the built-in's `ksm_run` show that memory is being unmerged, or that it is stopped.
    ///
    /// The core of mm then copies a KSM page that it swaps in, instead of mapping it. Must be on
    /// from before the first page is unmerged until the user ends that state. Sleeps.
    pub(crate) fn set_unmerging(self, unmerging: bool) {
        let _mutex = ThreadMutex::lock(self.0);
        let run = if unmerging { RUN_UNMERGE } else { RUN_STOP };
        let ksm_run = self.0.ksm_run();
        // Its memory notifier keeps a bit there, which stays. The bit that lets its scanner run is
        // never set.
        // SAFETY: Only written under the mutex. Others read it with no lock, so whole.
        unsafe {
            let offline = ptr::read_volatile(ksm_run) & RUN_OFFLINE;
            ptr::write_volatile(ksm_run, offline | c_ulong::from(run));
        }
    }

    /// Whether the built-in has neither merged pages nor rmap items.
    ///
    /// Its cursor is at rest once it has unmerged, whether that succeeded or not. (Nor could it be looked at
    /// everywhere: Clang makes several objects of `ksm_scan`.)
    fn is_drained(self) -> bool {
        let _mutex = ThreadMutex::lock(self.0);
        let symbols = self.0;
        // SAFETY: The objects do not change while the mutex is held, and are initialised.
        unsafe {
            let nodes = symbols.migrate_nodes();
            let roots = ptr::read(symbols.root_stable_tree());
            let nids = symbols.ksm_nr_node_ids();
            let nids = if nids.is_null() {
                1
            } else {
                ptr::read(nids) as usize
            };
            ptr::read(symbols.ksm_pages_shared()) == 0
                && ptr::read(symbols.ksm_rmap_items()) == 0
                && ptr::eq((*nodes).next, nodes)
                && (0..nids).all(|nid| (*roots.add(nid)).rb_node.is_null())
        }
    }
}

/// The built-in KSM, drained and stopped, with its files in our hands.
///
/// Dropping it gives all back: the built-in's `run` is set to [`Self::set_final_run`], and then its
/// files answer again. Whatever else was changed must have been put back before, with
/// [`Self::builtin_store`].
pub(crate) struct Takeover<F: Files> {
    builtin: Builtin,
    run_file: usize,
    final_run: Atomic<i32>,
    attrs: Attrs<F>,
}

impl<F: Files> Takeover<F> {
    /// Takes the files named in `names`, which must have `run`, and drains the built-in.
    ///
    /// Users of the files wait from here on until [`Self::open`]. Sleeps, for as long as the
    /// built-in takes to unmerge everything.
    ///
    /// # Errors
    ///
    /// After one line in the log, with everything as it was (but unmerged): see [`Attrs::hold`];
    /// `EBUSY` if merged memory remains, `ENOMEM` or `EINTR` if unmerging failed with that.
    pub(crate) fn new(symbols: Symbols, names: &[&CStr]) -> Result<Self> {
        let run_file = names
            .iter()
            .position(|name| *name == c"run")
            .ok_or(EINVAL)?;
        let attrs = Attrs::hold(symbols, names)?;
        let before = attrs.builtin_show(run_file)?;
        let before = str::from_utf8(&before)
            .ok()
            .and_then(|text| text.trim_end().parse::<u8>().ok())
            .ok_or(EINVAL)?;
        let takeover = Self {
            builtin: Builtin::new(symbols),
            run_file,
            final_run: Atomic::new(i32::from(before & !(RUN_OFFLINE as u8))),
            attrs,
        };
        takeover.drain()?;
        Ok(takeover)
    }

    fn drain(&self) -> Result {
        for _ in 0..DRAIN_TRIES {
            // To write the value it has already would do nothing.
            self.set_run(RUN_STOP)
                .and_then(|()| self.set_run(RUN_UNMERGE))
                .and_then(|()| self.set_run(RUN_STOP))
                .inspect_err(|error| pr_err!("cannot load: unmerging failed: {error:?}\n"))?;
            if self.builtin.is_drained() {
                return Ok(());
            }
            // SAFETY: May sleep here.
            if unsafe { bindings::msleep_interruptible(DRAIN_PAUSE) } != 0 {
                return Err(EINTR);
            }
        }
        pr_err!("cannot load: memory stays merged by the built-in KSM\n");
        Err(EBUSY)
    }

    fn set_run(&self, run: u8) -> Result {
        self.attrs.builtin_store(self.run_file, &[b'0' + run])
    }

    /// Chooses what `run` the built-in gets when this is dropped.
    pub(crate) fn set_final_run(&self, run: u8) {
        self.final_run
            .store(i32::from(run.min(RUN_UNMERGE)), Relaxed);
    }

    /// See [`Builtin`].
    pub(crate) fn builtin(&self) -> Builtin {
        self.builtin
    }

    /// What the built-in says in `file`; see [`Attrs::builtin_show`]. In `run` that is what it said
    /// before it was stopped, unless [`Self::set_final_run`] has chosen another value.
    pub(crate) fn builtin_show(&self, file: usize) -> Result<Text> {
        if file == self.run_file {
            return Text::new(&[b'0' + self.final_run.load(Relaxed) as u8, b'\n']);
        }
        self.attrs.builtin_show(file)
    }

    /// Writes to the built-in's `file`; see [`Attrs::builtin_store`]. Not for `run`.
    pub(crate) fn builtin_store(&self, file: usize, data: &[u8]) -> Result {
        if file == self.run_file {
            return Err(EINVAL);
        }
        self.attrs.builtin_store(file, data)
    }

    /// Lets `handler` answer the files; see [`Attrs::open`].
    pub(crate) fn open(&self, handler: Arc<F>) {
        self.attrs.open(handler);
    }

    /// Lets users of the files wait; see [`Attrs::close`].
    pub(crate) fn close(&self) {
        self.attrs.close();
    }
}

impl<F: Files> Drop for Takeover<F> {
    fn drop(&mut self) {
        self.attrs.close();
        let run = self.final_run.load(Relaxed) as u8;
        // It may show that it is unmerging, which would make it ignore that value.
        let given = self.set_run(RUN_STOP).and_then(|()| self.set_run(run));
        if let Err(error) = given {
            pr_warn!("cannot set the built-in's run to {run}: {error:?}\n");
        }
    }
}
