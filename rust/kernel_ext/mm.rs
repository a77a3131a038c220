// SPDX-License-Identifier: GPL-2.0-only

//! Pinned mms, the mmap read lock, and the proof that an mm is not exiting.
//!
//! A registered mm is pinned by `mm_count` ([`PinnedMm`], `mmgrab`), never by `mm_users`, so that
//! the memory of a dying process is freed at once. Its maple tree may then be gone: vmas are
//! reached only through a [`LiveMm`], which only [`MmapReadGuard::live`] hands out, after
//! `ksm_test_exit` under the mmap lock.
//!
//! C headers: [`include/linux/sched/mm.h`](srctree/include/linux/sched/mm.h),
//! [`include/linux/mmap_lock.h`](srctree/include/linux/mmap_lock.h)

use crate::{
    bindings::raw,
    kernel_ext::symbols::Symbols, //
};
use core::ops::Range;
use kernel::{
    error::to_result,
    mm::{
        virt::VmaRef,
        Mm, //
    },
    prelude::*,
    sync::aref::ARef,
    time::{
        delay::fsleep,
        Delta, //
    },
    types::NotThreadSafe,
};

/// How often the mmap lock is tried again before it is given up.
const LOCK_RETRIES: u32 = 5;

/// Microseconds before each of these tries.
const LOCK_USECS: i64 = 50;

/// An mm pinned by `mm_count`. A clone is another pin; dropping it is `mmdrop`.
///
/// # Context
///
/// Cloning: any. Dropping may sleep where it is the last pin: never under a spinlock.
#[derive(Clone)]
pub(crate) struct PinnedMm(ARef<Mm>);

impl PinnedMm {
    /// Pins a borrowed mm (`mmgrab`).
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn mmgrab(mm: &Mm) -> Self {
        Self(mm.into())
    }

    /// The mm itself.
    #[inline]
    pub(crate) fn as_ptr(&self) -> *mut raw::mm_struct {
        self.0.as_raw().cast()
    }

    /// The mm, borrowed.
    pub(crate) fn as_mm(&self) -> &Mm {
        &self.0
    }

    /// Whether all users are gone (`mm_users` is 0): the page tables are being freed, or have been.
    ///
    /// # Context
    ///
    /// Any. Only under the mmap lock does "no" hold for longer than this call.
    #[inline]
    pub(crate) fn ksm_test_exit(&self) -> bool {
        // SAFETY: The mm is pinned.
        unsafe { raw::rksm_mm_users(self.as_ptr()) == 0 }
    }

    /// Returns the anonymous pages that are mapped (`get_mm_counter`), but for a few for each CPU.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn anon_pages(&self) -> usize {
        // SAFETY: The mm is pinned, and with it its counters.
        unsafe { raw::rksm_mm_anon_pages(self.as_ptr()) as usize }
    }

    /// Takes the mmap lock for reading, if it can be had at once or within [`LOCK_RETRIES`] more
    /// tries: a process can keep its lock for as long as it likes.
    ///
    /// # Context
    ///
    /// May sleep, about [`LOCK_RETRIES`] times [`LOCK_USECS`]. Takes the mmap lock.
    pub(crate) fn mmap_read_lock_briefly(&self) -> Option<MmapReadGuard<'_>> {
        (0..=LOCK_RETRIES).find_map(|retry| {
            if retry > 0 {
                fsleep(Delta::from_micros(LOCK_USECS));
            }
            self.mmap_read_trylock()
        })
    }

    /// Takes the mmap lock for reading, unless a signal comes first.
    ///
    /// # Context
    ///
    /// May sleep. Takes the mmap lock.
    ///
    /// # Errors
    ///
    /// `ERESTARTSYS` when a signal came.
    pub(crate) fn mmap_read_lock_interruptible(&self) -> Result<MmapReadGuard<'_>> {
        // SAFETY: The mm is pinned.
        let interrupted = unsafe { raw::rksm_mmap_read_lock_interruptible(self.as_ptr()) };
        to_result(interrupted).map_err(|_| ERESTARTSYS)?;
        Ok(MmapReadGuard {
            mm: self,
            _nts: NotThreadSafe,
        })
    }

    /// Takes the mmap lock for reading, if that needs no wait.
    ///
    /// # Context
    ///
    /// Any that may take a lock. Takes the mmap lock.
    pub(crate) fn mmap_read_trylock(&self) -> Option<MmapReadGuard<'_>> {
        // SAFETY: The mm is pinned.
        let locked = unsafe { raw::mmap_read_trylock(self.0.as_raw()) };
        // A guard unlocks when it is dropped, so there must be none where the lock is not held.
        locked.then(|| MmapReadGuard {
            mm: self,
            _nts: NotThreadSafe,
        })
    }

    /// Whether another task waits for the mmap lock.
    ///
    /// # Context
    ///
    /// Any. The caller holds the lock.
    pub(crate) fn mmap_lock_is_contended(&self) -> bool {
        // SAFETY: The mm is pinned.
        unsafe { raw::rksm_mmap_lock_is_contended(self.as_ptr()) }
    }

    /// Pins the mm's users for as long as the result lives; `None` once they are gone.
    ///
    /// Dropping the result is `mmput_async`: `mmput` could run `exit_mmap` here and now, under
    /// whatever locks the caller holds.
    ///
    /// # Context
    ///
    /// Any, as for dropping the result.
    pub(crate) fn mmget_not_zero(&self) -> Option<MmUser<'_>> {
        // SAFETY: The mm is pinned.
        unsafe { raw::mmget_not_zero(self.0.as_raw()) }.then(|| MmUser(self))
    }
}

impl PinnedMm {
    /// Flushes the mm's translations on all CPUs that use it.
    ///
    /// # Context
    ///
    /// Any with interrupts enabled. Takes no lock.
    pub(crate) fn flush_tlb(&self) {
        // SAFETY: The mm is pinned, and with it what a flush reads of it.
        unsafe { raw::rksm_flush_tlb_mm(self.as_ptr()) };
    }
}

impl PinnedMm {
    /// Whether all memory of the mm is mergeable (`MMF_VM_MERGE_ANY`), as after
    /// `prctl(PR_SET_MEMORY_MERGE)`.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn merges_any(&self) -> bool {
        merges_any(&self.0)
    }

    /// The process that the mm belongs to, in the pid namespace of the current task; 0 if there is
    /// none.
    ///
    /// # Context
    ///
    /// Any, in a task.
    pub(crate) fn pid(&self) -> i32 {
        // SAFETY: The mm is pinned.
        unsafe { raw::rksm_mm_pid(self.as_ptr()) }
    }
}

/// As [`PinnedMm::merges_any`].
///
/// # Context
///
/// Any.
pub(crate) fn merges_any(mm: &Mm) -> bool {
    // SAFETY: A reference to an mm is to a valid one.
    unsafe { raw::rksm_mm_merge_any(mm.as_raw().cast()) }
}

/// An mm held by `mm_users`: its address space stays.
///
/// # Invariants
///
/// Owns one `mm_users` reference.
pub(crate) struct MmUser<'a>(&'a PinnedMm);

impl<'a> MmUser<'a> {
    /// The mm.
    pub(crate) fn mm(&self) -> &'a PinnedMm {
        self.0
    }
}

impl<'a> MmUser<'a> {
    /// Takes the mmap lock for writing, unless a fatal signal comes first.
    ///
    /// # Context
    ///
    /// May sleep. Takes the mmap lock.
    ///
    /// # Errors
    ///
    /// `EINTR` when a fatal signal came.
    pub(crate) fn mmap_write_lock_killable(&self) -> Result<MmapWriteGuard<'_>> {
        // SAFETY: The mm is pinned.
        to_result(unsafe { raw::rksm_mmap_write_lock_killable(self.0.as_ptr()) })?;
        Ok(MmapWriteGuard {
            user: self,
            _nts: NotThreadSafe,
        })
    }

    /// Takes the mmap lock for writing, if that needs no wait.
    ///
    /// # Context
    ///
    /// Any that may take a lock. Takes the mmap lock.
    pub(crate) fn mmap_write_trylock(&self) -> Option<MmapWriteGuard<'_>> {
        // SAFETY: The mm is pinned.
        let locked = unsafe { raw::rksm_mmap_write_trylock(self.0.as_ptr()) };
        locked.then(|| MmapWriteGuard {
            user: self,
            _nts: NotThreadSafe,
        })
    }
}

/// The mmap lock of an mm that has users, held for writing.
pub(crate) struct MmapWriteGuard<'a> {
    user: &'a MmUser<'a>,
    _nts: NotThreadSafe,
}

impl MmapWriteGuard<'_> {
    /// Makes all memory of the mm mergeable, as `prctl(PR_SET_MEMORY_MERGE, 1)` by its process.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn ksm_enable_merge_any(&self, _symbols: Symbols) -> Result {
        // SAFETY: The mmap lock is held for writing. The mm has users, so its exit from KSM is yet
        // to come. The symbol has been resolved.
        to_result(unsafe { raw::rksm_ksm_enable_merge_any(self.user.0.as_ptr()) })
    }

    /// Makes none of its memory mergeable, by whatever means it became so. Unmerges what is merged
    /// meanwhile, without a pause.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, `ERESTARTSYS` when a signal came. Nothing has changed then but that pages are
    /// unmerged.
    pub(crate) fn ksm_disable(&self, _symbols: Symbols) -> Result {
        // SAFETY: As above.
        to_result(unsafe { raw::rksm_ksm_disable(self.user.0.as_ptr()) })
    }
}

impl Drop for MmapWriteGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: The guard holds the lock.
        unsafe { raw::rksm_mmap_write_unlock(self.user.0.as_ptr()) };
    }
}

impl Drop for MmUser<'_> {
    fn drop(&mut self) {
        // SAFETY: By the invariant there is a reference to give up.
        unsafe { raw::mmput_async(self.0 .0.as_raw()) };
    }
}

/// The mmap lock of a pinned mm, held for reading.
pub(crate) struct MmapReadGuard<'a> {
    mm: &'a PinnedMm,
    _nts: NotThreadSafe,
}

impl MmapReadGuard<'_> {
    /// The proof that the mm is not exiting, without which no vma can be reached.
    ///
    /// `exit_mmap` begins after `mm_users` has become 0, and needs the mmap lock for writing before
    /// it frees page tables and vmas. So what is alive now stays until this guard goes.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn live(&self) -> Option<LiveMm<'_>> {
        // INVARIANT: `mm_users` was not zero under the mmap lock, which the result borrows.
        (!self.mm.ksm_test_exit()).then_some(LiveMm { mm: self.mm })
    }
}

impl Drop for MmapReadGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: The guard holds the lock.
        unsafe { raw::mmap_read_unlock(self.mm.0.as_raw()) };
    }
}

/// An mm whose vmas may be walked.
///
/// # Invariants
///
/// Since the mmap lock, which outlives `'g`, was taken, `mm_users` has been seen to be non-zero.
#[derive(Clone, Copy)]
pub(crate) struct LiveMm<'g> {
    mm: &'g PinnedMm,
}

impl<'g> LiveMm<'g> {
    /// The pinned mm.
    pub(crate) fn mm(self) -> &'g PinnedMm {
        self.mm
    }

    /// The first vma that ends above `addr`.
    ///
    /// # Context
    ///
    /// Any. The mmap lock is held, as the type shows.
    pub(crate) fn find_vma(self, addr: usize) -> Option<&'g VmaRef> {
        // SAFETY: The mmap lock is held and the maple tree exists by the type's invariant.
        let vma = unsafe { raw::find_vma(self.mm.0.as_raw(), addr) };
        // SAFETY: A vma found under the mmap lock stays as long as the lock is held.
        (!vma.is_null()).then(|| unsafe { VmaRef::from_raw(vma) })
    }

    /// The vmas that overlap these addresses, each with what it has of them.
    ///
    /// # Context
    ///
    /// As for [`LiveMm::find_vma`].
    pub(crate) fn vmas(
        self,
        within: Range<usize>,
    ) -> impl Iterator<Item = (&'g VmaRef, Range<usize>)> {
        let Range { mut start, end } = within;
        core::iter::from_fn(move || {
            let vma = (start < end).then(|| self.find_vma(start)).flatten()?;
            let part = start.max(vma.start())..vma.end().min(end);
            start = part.end;
            (part.start < part.end).then_some((vma, part))
        })
    }
}

/// The vma's `anon_vma`; null before its first anonymous page.
///
/// # Context
///
/// Any. The mmap lock is held, as a [`VmaRef`] shows, and keeps the answer true.
pub(crate) fn anon_vma(vma: &VmaRef) -> *mut raw::anon_vma {
    // SAFETY: A `VmaRef` is valid, and its mm's lock is held.
    unsafe { raw::rksm_vma_anon_vma(vma.as_ptr().cast()) }
}
