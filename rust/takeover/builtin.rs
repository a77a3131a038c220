// SPDX-License-Identifier: GPL-2.0-only

//! The parts of the built-in KSM that rksm uses at any time: its locks, its list of mms and
//! `ksm_run`; and the check that it has no merged page left, after a drain.

use crate::{
    bindings::raw,
    kernel_ext::{
        gfp::GFP_METADATA,
        symbols::Symbols, //
    },
    takeover::btf::Layouts, //
};
use core::ptr::{
    self,
    NonNull, //
};
use kernel::{
    mm::Mm,
    prelude::*,
    sync::aref::ARef,
    task::might_sleep,
    types::NotThreadSafe, //
};

/// `KSM_RUN_STOP`, `KSM_RUN_MERGE`, `KSM_RUN_UNMERGE` and `KSM_RUN_OFFLINE`: values of `run`.
pub(super) const RUN_STOP: u8 = 0;
pub(super) const RUN_UNMERGE: u8 = 2;
pub(crate) const RUN_OFFLINE: u8 = 4;

/// The number of mms that are pinned at a time.
const BATCH: usize = 128;

/// The parts of the built-in KSM that can be used beside its files, from anywhere.
#[derive(Clone, Copy)]
pub(crate) struct Builtin {
    symbols: Symbols,
    _layouts: Layouts,
}

/// `ksm_thread_mutex`, held.
pub(crate) struct ThreadMutex(Symbols, NotThreadSafe);

impl ThreadMutex {
    /// Takes the mutex.
    ///
    /// # Context
    ///
    /// Sleeps for as long as a batch of the built-in takes. Takes `ksm_thread_mutex`.
    pub(crate) fn lock(symbols: Symbols) -> Self {
        // SAFETY: The kernel's own mutex; may sleep here.
        unsafe { raw::mutex_lock(symbols.ksm_thread_mutex()) };
        Self(symbols, NotThreadSafe)
    }
}

impl Drop for ThreadMutex {
    fn drop(&mut self) {
        // SAFETY: Taken in `lock()`.
        unsafe { raw::mutex_unlock(self.0.ksm_thread_mutex()) };
    }
}

/// `ksm_mmlist_lock`, held.
pub(super) struct MmlistLock(Builtin, NotThreadSafe);

impl MmlistLock {
    /// Takes the lock.
    ///
    /// # Context
    ///
    /// Atomic until it is dropped.
    pub(super) fn lock(builtin: Builtin) -> Self {
        // SAFETY: The kernel's own spinlock, initialised at build time.
        unsafe { raw::spin_lock(builtin.symbols.ksm_mmlist_lock()) };
        Self(builtin, NotThreadSafe)
    }

    /// Iterates over the slots on the built-in's list, in its order. A slot is there while the lock
    /// is held, and one that has rmap items for as long as its scanner is kept out.
    pub(super) fn slots(&self) -> impl Iterator<Item = NonNull<raw::layout::ksm_mm_slot>> + '_ {
        self.slots_after(None)
    }

    /// Iterates over the slots behind `after`, which is on the list; over all for `None`.
    pub(super) fn slots_after(
        &self,
        after: Option<NonNull<raw::layout::ksm_mm_slot>>,
    ) -> impl Iterator<Item = NonNull<raw::layout::ksm_mm_slot>> + '_ {
        let head = self.0.symbols.ksm_mm_head();
        let after = after.map_or(head, NonNull::as_ptr);
        // SAFETY: Both are slots of the built-in, whose layout has been checked, as `Builtin`
        // shows.
        let (head, after) = unsafe {
            (
                &raw mut (*head).slot.mm_node,
                &raw mut (*after).slot.mm_node,
            )
        };
        // SAFETY: The list does not change while the lock is held, and its end is the head.
        let mut node = unsafe { (*after).next };
        core::iter::from_fn(move || {
            if node == head {
                return None;
            }
            // SAFETY: Every other node is in a `ksm_mm_slot`.
            unsafe {
                let slot = kernel::container_of!(node, raw::layout::ksm_mm_slot, slot.mm_node);
                node = (*node).next;
                NonNull::new(slot)
            }
        })
    }

    /// Iterates over the mms on the built-in's list, in its order.
    fn mms(&self) -> impl Iterator<Item = &Mm> {
        self.slots().map(|slot| {
            // SAFETY: The slot is on the list. Its mm has been grabbed, or is about to be by its
            // user, which keeps it meanwhile; a slot is removed before its mm is dropped.
            unsafe { Mm::from_raw((*slot.as_ptr()).slot.mm) }
        })
    }
}

impl Drop for MmlistLock {
    fn drop(&mut self) {
        // SAFETY: Taken in `lock()`.
        unsafe { raw::spin_unlock(self.0.symbols.ksm_mmlist_lock()) };
    }
}

impl Builtin {
    /// Creates it.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn new(symbols: Symbols, layouts: Layouts) -> Self {
        Self {
            symbols,
            _layouts: layouts,
        }
    }

    /// The kernel's symbols.
    pub(super) fn symbols(self) -> Symbols {
        self.symbols
    }

    /// Whether memory is going offline.
    pub(super) fn offlining(self, _mutex: &ThreadMutex) -> bool {
        // SAFETY: Only written under the mutex.
        let run = unsafe { ptr::read_volatile(self.symbols.ksm_run()) };
        run & c_ulong::from(RUN_OFFLINE) != 0
    }

    /// The number of stable trees, and of unstable ones.
    pub(super) fn nids(self, _mutex: &ThreadMutex) -> usize {
        let nids = self.symbols.ksm_nr_node_ids();
        if nids.is_null() {
            return 1;
        }
        // SAFETY: Protected by the mutex.
        unsafe { ptr::read(nids) as usize }
    }

    /// Calls `visit` for every mm on the built-in's list; those that come or go meanwhile may be
    /// visited or not, and an mm may be visited twice.
    ///
    /// The mm is pinned by `mm_count` during the call; it may be exiting. Neither the list's lock
    /// nor any other is held then.
    ///
    /// # Context
    ///
    /// May sleep. Takes `ksm_mmlist_lock` to pin a batch of mms; `visit` is called without it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, and whatever `visit` returns, which ends the walk.
    pub(crate) fn for_each_mm(self, mut visit: impl FnMut(&Mm) -> Result) -> Result {
        might_sleep();
        let mut batch: KVec<ARef<Mm>> = KVec::with_capacity(BATCH, GFP_METADATA)?;
        let mut last: Option<ARef<Mm>> = None;
        loop {
            self.pin_batch(last.as_deref(), &mut batch);
            for mm in &batch {
                visit(mm)?;
            }
            let more = batch.len() == BATCH;
            last = batch.pop();
            // Drops the pins without the lock: dropping the last one may sleep.
            batch.clear();
            if !more {
                return Ok(());
            }
        }
    }

    /// Fills `batch` with the mms that come after `last`, or with the first ones if that has left.
    ///
    /// # Context
    ///
    /// Atomic while it holds `ksm_mmlist_lock`, which it takes.
    fn pin_batch(self, last: Option<&Mm>, batch: &mut KVec<ARef<Mm>>) {
        let list = MmlistLock::lock(self);
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
    /// The core of mm then copies a KSM page that it swaps in, instead of mapping it. It must show
    /// unmerging from before the first page is unmerged until the user ends that state.
    ///
    /// # Context
    ///
    /// Sleeps. Takes `ksm_thread_mutex`.
    pub(crate) fn set_unmerging(self, unmerging: bool) {
        let _mutex = ThreadMutex::lock(self.symbols);
        let run = if unmerging { RUN_UNMERGE } else { RUN_STOP };
        let ksm_run = self.symbols.ksm_run();
        // Its memory notifier keeps a bit there, which stays. The bit that lets its scanner run is
        // never set.
        // SAFETY: Only written under the mutex. Others read it with no lock, so whole.
        unsafe {
            let offline = ptr::read_volatile(ksm_run) & c_ulong::from(RUN_OFFLINE);
            ptr::write_volatile(ksm_run, offline | c_ulong::from(run));
        }
    }

    /// Returns whether the built-in has neither merged pages nor rmap items.
    ///
    /// Its cursor is at rest once it has unmerged, whether that succeeded or not.
    ///
    /// # Context
    ///
    /// Sleeps. Takes `ksm_thread_mutex`.
    pub(crate) fn is_drained(self) -> bool {
        let symbols = self.symbols;
        let mutex = ThreadMutex::lock(symbols);
        let nids = self.nids(&mutex);
        // SAFETY: The objects do not change while the mutex is held, and are initialised.
        unsafe {
            let nodes = symbols.migrate_nodes();
            let roots = ptr::read(symbols.root_stable_tree());
            ptr::read(symbols.ksm_pages_shared()) == 0
                && ptr::read(symbols.ksm_rmap_items()) == 0
                && ptr::eq((*nodes).next, nodes)
                && (0..nids).all(|nid| (*roots.add(nid)).rb_node.is_null())
        }
    }
}
