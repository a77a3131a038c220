// SPDX-License-Identifier: GPL-2.0-only

//! Page table entries, and the bracket in which secondary MMUs learn that one changes.
//!
//! C headers: [`include/linux/pgtable.h`](srctree/include/linux/pgtable.h),
//! [`include/linux/mmu_notifier.h`](srctree/include/linux/mmu_notifier.h)

use crate::{
    bindings::raw,
    kernel_ext::mm::LiveMm, //
};
use core::marker::PhantomData;
use kernel::mm::virt::VmaRef;

/// A page table entry, locked. Dropping it unlocks the page table.
///
/// # Context
///
/// Atomic as long as it lives.
///
/// # Invariants
///
/// `ptep` is the entry of `addr` in `vma`'s page table, whose lock `ptl` is held.
pub(crate) struct PteGuard<'v> {
    vma: &'v VmaRef,
    addr: usize,
    ptep: *mut raw::pte_t,
    ptl: *mut raw::spinlock_t,
}

impl<'v> PteGuard<'v> {
    /// Locks the entry of `addr`; `None` where there is no page table of small pages, and outside
    /// of `vma`.
    ///
    /// # Context
    ///
    /// Any. The mmap lock is held, as a [`VmaRef`] shows. Takes the page table lock.
    pub(crate) fn lock(vma: &'v VmaRef, addr: usize) -> Option<Self> {
        if !(vma.start()..vma.end()).contains(&addr) {
            return None;
        }
        let mut ptl = core::ptr::null_mut();
        // SAFETY: The vma is valid and its mm's lock is held, as for every `VmaRef`; `addr` lies in
        // it.
        let ptep = unsafe { raw::rksm_lock_pte(vma.as_ptr().cast(), addr, &mut ptl) };
        // INVARIANT: The shim has locked the entry if it returns one.
        (!ptep.is_null()).then(|| Self {
            vma,
            addr,
            ptep,
            ptl,
        })
    }

    /// The vma that the entry belongs to.
    pub(crate) fn vma(&self) -> *mut raw::vm_area_struct {
        self.vma.as_ptr().cast()
    }

    /// The entry.
    pub(crate) fn get(&self) -> raw::pte_t {
        // SAFETY: The entry is locked by the invariant.
        unsafe { raw::rksm_ptep_get(self.ptep) }
    }

    /// Clears the entry and flushes its translation on all CPUs.
    pub(crate) fn clear_flush(&self) -> raw::pte_t {
        // SAFETY: The entry is locked by the invariant.
        unsafe { raw::rksm_ptep_clear_flush(self.vma(), self.addr, self.ptep) }
    }

    /// Sets the entry.
    ///
    /// # Safety
    ///
    /// The entry is clear. `pte` is what it held before, or maps a page with a reference and a
    /// mapping count for this entry.
    pub(crate) unsafe fn set(&self, pte: raw::pte_t) {
        // SAFETY: The entry is locked by the invariant; the rest is the contract.
        unsafe { raw::rksm_set_pte_at(self.vma(), self.addr, self.ptep, pte) };
    }
}

impl Drop for PteGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: By the invariant the lock is held.
        unsafe { raw::rksm_pte_unmap_unlock(self.ptep, self.ptl) };
    }
}

/// The bracket in which secondary MMUs may not use the mapping of one page. Dropping it ends it,
/// and may sleep.
pub(crate) struct Invalidate<'g>(raw::mmu_notifier_range, PhantomData<LiveMm<'g>>);

impl<'g> Invalidate<'g> {
    /// Begins the bracket of one page: calls the mmu notifiers.
    ///
    /// # Context
    ///
    /// May sleep. The mmap lock is held, as a [`LiveMm`] shows.
    pub(crate) fn new(mm: LiveMm<'g>, addr: usize) -> Self {
        let mut range = raw::mmu_notifier_range::default();
        // SAFETY: The mm is live, and `range` is ours.
        unsafe {
            raw::rksm_mmu_notifier_invalidate_page_start(&mut range, mm.mm().as_ptr(), addr);
        }
        Self(range, PhantomData)
    }
}

impl Drop for Invalidate<'_> {
    fn drop(&mut self) {
        // SAFETY: Begun in `new`; the mm is live for as long as the mmap lock is held, and this
        // borrows the proof of that.
        unsafe { raw::rksm_mmu_notifier_invalidate_page_end(&mut self.0) };
    }
}
