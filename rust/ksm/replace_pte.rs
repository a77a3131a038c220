// SPDX-License-Identifier: GPL-2.0-only

//! Changing what a page table entry maps.
//!
//! One page is shared in one critical section: between `mmu_notifier_invalidate_range_start` and `_end`, under the
//! folio lock and the page table lock, the entry is cleared and flushed from the TLB. Then nobody can write to the
//! page through it, `get_user_pages_fast` cannot take a new reference, and references that exist are counted. Only
//! then the contents are compared, and the entry either gets its new value or its old one back. So a refusal at
//! any point leaves the process as it was, and an entry is flushed once, not twice.
//!
//! # Locks
//!
//! `mmap_lock` (read) of one mm, then the folio lock (trylock), then mmu notifiers (may sleep), then the page table
//! lock.

use crate::engine::memory::Refusal;
use crate::{
    bindings::raw,
    kernel_ext::{
        folio::FolioRef,
        mm::{
            LiveMm,
            MmapReadGuard, //
        },
        race_window, //
    },
    ksm::{
        backend::StableNode,
        collect, //
    },
};
use core::ptr::NonNull;
use kernel::{
    mm::virt::VmaRef,
    page::PAGE_SIZE, //
};

/// What a page is to be replaced by.
pub(crate) enum Target<'a> {
    /// Itself, as the merged page of this node.
    Itself(NonNull<StableNode>),
    /// The merged page that another folio is.
    Page(&'a FolioRef),
    /// The zero page.
    Zero,
}

/// A page table entry, locked.
///
/// # Invariants
///
/// `ptep` is the entry of `addr` in `vma`'s page table, whose lock `ptl` is held.
struct PteGuard<'v> {
    vma: &'v VmaRef,
    addr: usize,
    ptep: *mut raw::pte_t,
    ptl: *mut raw::spinlock_t,
}

impl<'v> PteGuard<'v> {
    /// Locks the entry of `addr`; `None` where there is no page table of small pages.
    fn lock(vma: &'v VmaRef, addr: usize) -> Option<Self> {
        let mut ptl = core::ptr::null_mut();
        // SAFETY: The vma is valid and its mm's lock is held, as for every `VmaRef`; `addr` lies in it.
        let ptep = unsafe { raw::rksm_lock_pte(vma.as_ptr().cast(), addr, &mut ptl) };
        // INVARIANT: The shim has locked the entry if it returns one.
        (!ptep.is_null()).then(|| Self {
            vma,
            addr,
            ptep,
            ptl,
        })
    }

    fn vma(&self) -> *mut raw::vm_area_struct {
        self.vma.as_ptr().cast()
    }

    fn get(&self) -> raw::pte_t {
        // SAFETY: The entry is locked by the invariant.
        unsafe { raw::rksm_ptep_get(self.ptep) }
    }

    /// Clears the entry and flushes its translation on all CPUs.
    fn clear_flush(&self) -> raw::pte_t {
        // SAFETY: The entry is locked by the invariant.
        unsafe { raw::rksm_ptep_clear_flush(self.vma(), self.addr, self.ptep) }
    }

    /// Sets an entry that is clear.
    fn set(&self, pte: raw::pte_t) {
        // SAFETY: The entry is locked by the invariant.
        unsafe { raw::rksm_set_pte_at(self.vma(), self.addr, self.ptep, pte) };
    }
}

impl Drop for PteGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: By the invariant the lock is held.
        unsafe { raw::rksm_pte_unmap_unlock(self.ptep, self.ptl) };
    }
}

/// The bracket in which secondary MMUs may not use the mapping of one page.
struct Invalidate(raw::mmu_notifier_range);

impl Invalidate {
    /// Calls the mmu notifiers. May sleep.
    fn new(mm: LiveMm<'_>, addr: usize) -> Self {
        let mut range = raw::mmu_notifier_range::default();
        // SAFETY: The mm is live, and `range` is ours.
        unsafe {
            raw::rksm_mmu_notifier_invalidate_page_start(&mut range, mm.mm().as_ptr(), addr);
        }
        Self(range)
    }
}

impl Drop for Invalidate {
    fn drop(&mut self) {
        // SAFETY: Begun in `new`; the mm is live for as long as the mmap lock is held, which outlives this.
        unsafe { raw::rksm_mmu_notifier_invalidate_page_end(&mut self.0) };
    }
}

/// Whether two referenced pages have the same contents, now.
pub(crate) fn pages_identical(a: NonNull<raw::page>, b: NonNull<raw::page>) -> bool {
    // SAFETY: Both pages are referenced. They may change meanwhile, which the shim's `memcmp` allows for.
    unsafe { raw::rksm_pages_identical(a.as_ptr(), b.as_ptr()) }
}

/// Whether a referenced page has the contents that it is to be replaced by, now.
fn matches_target(page: NonNull<raw::page>, target: &Target<'_>) -> bool {
    match target {
        Target::Itself(_) => true,
        Target::Page(kfolio) => pages_identical(page, kfolio.page()),
        // SAFETY: The page is referenced.
        Target::Zero => unsafe { raw::rksm_page_is_zero(page.as_ptr()) },
    }
}

/// Shares the page at `addr` of `vma`: see the module's documentation.
///
/// The caller holds one reference to `page`. Before a huge page is split, which needs that this reference be the
/// only one beside its mappings, `before_split` is called.
///
/// Returns whether the page may have been touched since a walk collected it.
///
/// # Errors
///
/// The mapping is what it was.
pub(crate) fn share(
    mm: LiveMm<'_>,
    vma: &VmaRef,
    addr: usize,
    page: NonNull<raw::page>,
    target: &Target<'_>,
    before_split: impl FnOnce(),
) -> Result<bool, Refusal> {
    // SAFETY: The page is referenced.
    let folio = unsafe { raw::rksm_page_folio(page.as_ptr()) };
    // SAFETY: As above.
    if !unsafe { raw::rksm_folio_mergeable(folio) && !raw::rksm_folio_test_ksm(folio) } {
        return Err(Refusal::Gone);
    }
    // SAFETY: As above.
    if !unsafe { raw::rksm_folio_trylock(folio) } {
        return Err(Refusal::Locked);
    }
    // SAFETY: The folio is referenced and locked.
    let result = if unsafe { raw::rksm_folio_test_large(folio) } {
        // A huge page is worth more whole: split it only for contents that match.
        if !matches_target(page, target) {
            // SAFETY: Locked above.
            unsafe { raw::rksm_folio_unlock(folio) };
            return Err(Refusal::Differs);
        }
        before_split();
        // SAFETY: As above. On success the lock and the reference pass to the small folio of `page`.
        if unsafe { raw::rksm_split_huge_page(page.as_ptr()) } == 0 {
            share_locked(mm, vma, addr, page, target)
        } else {
            Err(Refusal::Unsplit)
        }
    } else {
        share_locked(mm, vma, addr, page, target)
    };
    // SAFETY: The folio of `page` is locked by us, before and after a split.
    unsafe { raw::rksm_folio_unlock(raw::rksm_page_folio(page.as_ptr())) };
    result
}

/// [`share`] for a small folio that is locked.
fn share_locked(
    mm: LiveMm<'_>,
    vma: &VmaRef,
    addr: usize,
    page: NonNull<raw::page>,
    target: &Target<'_>,
) -> Result<bool, Refusal> {
    // SAFETY: The page is referenced, and small.
    let folio = unsafe { raw::rksm_page_folio(page.as_ptr()) };
    // SAFETY: The folio is referenced; it may have become a merged page while it was not locked.
    if unsafe { raw::rksm_folio_test_ksm(folio) } {
        return Err(Refusal::Gone);
    }
    race_window::sleep();
    let _bracket = Invalidate::new(mm, addr);
    let pte = PteGuard::lock(vma, addr).ok_or(Refusal::Gone)?;
    let entry = pte.get();
    // SAFETY: Looks at the entry's bits.
    if !unsafe { raw::rksm_pte_maps(entry, page.as_ptr()) } {
        return Err(Refusal::Gone);
    }
    // SAFETY: As above.
    if unsafe { raw::rksm_pte_uffd(entry) } {
        return Err(Refusal::Userfault);
    }
    // SAFETY: The page is referenced and its folio locked.
    let exclusive = unsafe { raw::rksm_page_anon_exclusive(page.as_ptr()) };
    // SAFETY: The mm is live, and the page table lock is held.
    let writable = unsafe {
        raw::rksm_pte_write(entry)
            || raw::rksm_pte_dirty(entry)
            || exclusive
            || raw::rksm_mm_tlb_flush_pending(mm.mm().as_ptr())
    };

    let entry = pte.clear_flush();
    race_window::spin();
    // From here on nobody can reach the page through this entry: undo by setting it again.
    // SAFETY: The folio is referenced and locked.
    if writable && unsafe { raw::rksm_folio_pinned_beyond(folio, 1) } {
        pte.set(entry);
        return Err(Refusal::Pinned);
    }
    if !matches_target(page, target) {
        pte.set(entry);
        return Err(Refusal::Differs);
    }
    // SAFETY: The page table lock is held, the entry cleared and flushed, as the function demands.
    if exclusive && unsafe { raw::rksm_folio_try_share_anon_rmap_pte(folio, page.as_ptr()) } != 0 {
        pte.set(entry);
        return Err(Refusal::Pinned);
    }
    // SAFETY: The folio is referenced and locked; the entry is clear.
    unsafe {
        if raw::rksm_pte_dirty(entry) {
            raw::rksm_folio_mark_dirty(folio);
        }
        match target {
            Target::Itself(node) => {
                pte.set(raw::rksm_pte_wrprotect_clean(entry));
                raw::rksm_folio_set_mapping(folio, StableNode::mapping(*node));
                raw::rksm_folio_mark_accessed(folio);
                // Reclaim frees a clean folio without writing it out: this one must reach swap.
                raw::rksm_folio_mark_dirty(folio);
            }
            Target::Page(kfolio) => {
                raw::rksm_folio_get(kfolio.as_ptr());
                let new = raw::rksm_map_ksm_page(kfolio.as_ptr(), pte.vma(), addr);
                pte.set(new);
                raw::rksm_unmap_anon_page(folio, page.as_ptr(), pte.vma());
            }
            Target::Zero => {
                let new = raw::rksm_map_ksm_zero_page(pte.vma(), addr);
                pte.set(new);
                raw::rksm_unmap_anon_page(folio, page.as_ptr(), pte.vma());
            }
        }
    }
    // SAFETY: Looks at the entry's bits, and asks secondary MMUs.
    Ok(unsafe { raw::rksm_touched(pte.vma(), addr, entry) })
}

/// Unshares merged pages in `start..end` of a vma, at most `faults` of them.
///
/// Returns where to go on, or `None` when nothing merged is left. The caller pins the mm by `mm_users`: a fault can
/// put a page back into an address space that is being torn down.
///
/// # Errors
///
/// `ENOMEM` where a fault could not be served; `ERESTARTSYS` where a signal is pending.
pub(crate) fn break_ksm(
    vma: &VmaRef,
    start: usize,
    end: usize,
    faults: usize,
) -> kernel::error::Result<Option<usize>> {
    let mut at = start;
    for _ in 0..faults {
        if at >= end {
            return Ok(None);
        }
        let Some(addr) = collect::find_merged(vma, at, end)? else {
            return Ok(None);
        };
        // SAFETY: The vma is valid and its mm's lock is held.
        let fault = unsafe { raw::rksm_unshare_fault(vma.as_ptr().cast(), addr) };
        if fault & raw::vm_fault_reason_VM_FAULT_OOM != 0 {
            return Err(kernel::error::code::ENOMEM);
        }
        let hopeless = raw::vm_fault_reason_VM_FAULT_SIGBUS
            | raw::vm_fault_reason_VM_FAULT_SIGSEGV
            | raw::vm_fault_reason_VM_FAULT_HWPOISON;
        if fault & hopeless != 0 {
            // Truncation of the backing file has unmapped the page, or nobody can use it.
            at = addr + PAGE_SIZE;
        } else {
            // A fault may back out; look at the same address again.
            at = addr;
        }
    }
    Ok(Some(at))
}

/// Takes back the sharing of a page whose partner could not be merged: unshares what is at `addr`.
///
/// Best effort: what cannot be unshared now stays a merged page with one mapping.
pub(crate) fn break_one(guard: &MmapReadGuard<'_>, addr: usize) {
    let Some(vma) = guard.live().and_then(|live| live.mergeable_at(addr)) else {
        return;
    };
    let end = addr + PAGE_SIZE;
    let mut at = addr;
    while let Ok(Some(next)) = break_ksm(vma, at, end, 4) {
        if next >= end {
            break;
        }
        at = next;
    }
}
