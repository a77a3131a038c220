// SPDX-License-Identifier: GPL-2.0-only

//! Collecting pages: one page table walk for a batch.
//!
//! A walk clears the accessed bit of each page that it collects or that the filter wants cleared,
//! in the page tables and in secondary MMUs. TLBs are flushed once, when the scan has gone through
//! the mm. A page whose bit is still clear at the next walk has not been accessed through an
//! address space since that flush. This is a hint only: reclaim and DAMON clear the bit, too, and
//! secondary MMUs are not flushed.

use crate::engine::backend::WalkAction;
use crate::{
    bindings::raw,
    kernel_ext::mm::LiveMm,
    ksm::{
        batch::Batch,
        page::{
            candidate_folio,
            mergeable_from,
            WALK_SPAN, //
        }, //
    }, //
};
use core::{
    ops::Range,
    ptr::NonNull, //
};
use kernel::{
    mm::virt::VmaRef,
    page::PAGE_SIZE,
    prelude::*, //
};

/// What [`collect`] hands to its callback.
struct Walk<'a, F> {
    batch: &'a mut Batch,
    filter: &'a mut F,
    live: LiveMm<'a>,
    /// Where to continue after a walk that has ended early.
    next: usize,
    /// `filter` has ended the walk, or another task waits for the mmap lock.
    stopped: bool,
    /// Whether a page table has been walked.
    begun: bool,
}

impl<F: FnMut(usize, &raw::rksm_mapped) -> WalkAction> Walk<'_, F> {
    /// Collects the page if the filter wants it. Returns whether its accessed bit is to be cleared.
    ///
    /// # Safety
    ///
    /// `mapped` is what a page table maps whose lock the caller holds.
    unsafe fn offer(&mut self, addr: usize, mapped: &mut raw::rksm_mapped) -> bool {
        mapped.accessed |= self.batch.huge.contains(&addr);
        match (self.filter)(addr, mapped) {
            WalkAction::Collect => {
                // SAFETY: By the contract.
                unsafe { self.batch.push(addr, mapped) };
                return true;
            }
            WalkAction::SkipClearAccessed => return true,
            WalkAction::Skip => {}
            WalkAction::Stop => self.stopped = true,
        }
        false
    }

    fn over(&self) -> bool {
        self.stopped || self.batch.full()
    }
}

/// Collects the pages of mergeable vmas in `within` that `filter` selects by address and mapping.
/// Returns where to continue, or `None` at the end.
///
/// `filter` is called with a page table lock held. It is told of zero pages that KSM has placed,
/// too (`ksm_zero`), which are not collected. The caller holds the mmap lock, as `mm` shows.
pub(crate) fn collect(
    mm: LiveMm<'_>,
    within: Range<usize>,
    batch: &mut Batch,
    filter: &mut impl FnMut(usize, &raw::rksm_mapped) -> WalkAction,
) -> Option<usize> {
    let start = within.start;
    let bound = start.saturating_add(WALK_SPAN).min(within.end);
    let mut at = start;
    while let Some(vma) = mergeable_from(mm, at) {
        at = at.max(vma.start());
        if at >= bound {
            return Some(at);
        }
        let end = vma.end().min(bound);
        match collect_vma(mm, vma, at, end, batch, filter) {
            Some(next) => return Some(next),
            None => at = end,
        }
        if batch.full() || at >= bound {
            return Some(at);
        }
    }
    None
}

/// Walks one vma; returns where the walk ended, if it was early.
fn collect_vma<F: FnMut(usize, &raw::rksm_mapped) -> WalkAction>(
    mm: LiveMm<'_>,
    vma: &VmaRef,
    start: usize,
    end: usize,
    batch: &mut Batch,
    filter: &mut F,
) -> Option<usize> {
    let mut walk = Walk {
        batch,
        filter,
        live: mm,
        next: end,
        stopped: false,
        begun: false,
    };
    // SAFETY: The vma is valid and its mm's lock is held for reading; `start..end` lies within it;
    // the callback gets `walk`, which outlives the call, as its private data, and has its type.
    let stopped = unsafe {
        raw::rksm_walk_page_range_vma(
            vma.as_ptr().cast(),
            start,
            end,
            Some(collect_pmd::<F>),
            (&raw mut walk).cast::<c_void>(),
        )
    };
    (stopped > 0).then_some(walk.next)
}

/// Collects what one page middle directory entry maps.
///
/// # Safety
///
/// Called by the page walk of [`collect_vma`] alone.
unsafe extern "C" fn collect_pmd<F: FnMut(usize, &raw::rksm_mapped) -> WalkAction>(
    pmd: *mut raw::pmd_t,
    addr: c_ulong,
    end: c_ulong,
    mm_walk: *mut raw::mm_walk,
) -> c_int {
    // SAFETY: The private data is the `Walk` of `collect_vma`, which nothing else uses during the
    // call.
    let walk = unsafe { &mut *raw::rksm_walk_private(mm_walk).cast::<Walk<'_, F>>() };
    // SAFETY: The walk names the vma it walks.
    let vma = unsafe { raw::rksm_walk_vma(mm_walk) };
    let mut addr = addr;

    // SAFETY: May sleep: a walk under the mmap lock holds no spinlock.
    unsafe { raw::rksm_cond_resched() };
    // A task that changes the address space waits for one page table at most.
    if walk.begun && walk.live.mm().mmap_lock_is_contended() {
        walk.stopped = true;
        walk.next = addr;
        return 1;
    }
    walk.begun = true;

    let mut ptl = core::ptr::null_mut();
    // SAFETY: `pmd` belongs to the walked mm. A huge mapping is answered with its lock held.
    let huge = unsafe { raw::rksm_pmd_page_locked(vma, pmd, addr, &mut ptl) };
    if !ptl.is_null() {
        if let Some(first) = NonNull::new(huge) {
            // SAFETY: The page is mapped, and the page table lock is held.
            if let Some(folio) = unsafe { candidate_folio(first) } {
                // SAFETY: `pmd` maps `folio`, and at `addr` its page `first`; the lock is held. The
                // walk gives addresses within one mapping of this level.
                addr = unsafe { collect_huge(walk, vma, pmd, addr..end, first, folio) };
            }
        }
        // SAFETY: The shim has taken the lock.
        unsafe { raw::spin_unlock(ptl) };
        walk.next = addr;
        return c_int::from(walk.over());
    }

    // SAFETY: `pmd` belongs to the walked mm.
    let first = unsafe { raw::rksm_pte_offset_map_lock(vma, pmd, addr, &mut ptl) };
    if first.is_null() {
        return 0;
    }
    let mut ptep = first;
    let mut mapped = raw::rksm_mapped::default();
    // Pages in a row whose accessed bits are cleared.
    let mut old = addr..addr;
    while addr < end && !walk.batch.full() {
        // SAFETY: `ptep` points to the entry of `addr`, within this page table, whose lock is held;
        // so what is mapped stays mapped.
        unsafe {
            if raw::rksm_pte_mapped(vma, addr, ptep, &mut mapped) {
                if walk.offer(addr, &mut mapped) && mapped.accessed {
                    raw::rksm_pte_mkold(vma, addr, ptep, mapped.folio);
                    if old.end != addr {
                        raw::rksm_secondary_mkold(vma, old.start, old.end);
                        old.start = addr;
                    }
                    old.end = addr + PAGE_SIZE;
                }
                if walk.stopped {
                    break;
                }
            } else if mapped.ksm_zero {
                (walk.filter)(addr, &mapped);
            }
        }
        addr += PAGE_SIZE;
        ptep = ptep.wrapping_add(1);
    }
    // SAFETY: The pages lie in the vma, and their page table is locked. It was taken above; `first`
    // and the entries after it lie in one page.
    unsafe {
        raw::rksm_secondary_mkold(vma, old.start, old.end);
        raw::rksm_pte_unmap_unlock(first, ptl);
    }
    walk.next = addr;
    c_int::from(walk.over())
}

/// Collects pages of a huge mapping. Returns where to continue.
///
/// # Safety
///
/// `pmd` maps `folio`, and at `range.start` its page `first`; its lock is held. `range` lies within
/// the mapping.
unsafe fn collect_huge<F: FnMut(usize, &raw::rksm_mapped) -> WalkAction>(
    walk: &mut Walk<'_, F>,
    vma: *mut raw::vm_area_struct,
    pmd: *mut raw::pmd_t,
    range: Range<usize>,
    first: NonNull<raw::page>,
    folio: NonNull<raw::folio>,
) -> usize {
    // SAFETY: By the contract.
    let (mapping, nid, young) = unsafe {
        (
            raw::rksm_folio_mapping(folio.as_ptr()),
            raw::rksm_page_to_nid(first.as_ptr()),
            raw::rksm_pmd_young(vma, range.start, pmd),
        )
    };
    let mut addr = range.start;
    let all = addr & !(raw::RKSM_PMD_SIZE - 1)..(addr | (raw::RKSM_PMD_SIZE - 1)) + 1;
    let own = walk.batch.own.start <= all.start && all.end <= walk.batch.own.end;
    let mut old = !young || !own;
    while addr < range.end && !walk.batch.full() {
        let n = (addr - range.start) / PAGE_SIZE;
        let mut mapped = raw::rksm_mapped {
            // SAFETY: The pages of a huge page follow one another.
            page: unsafe { raw::rksm_nth_page(first.as_ptr(), n) },
            folio: folio.as_ptr(),
            mapping,
            nid,
            // A walk of another part of the mapping may clear the bit first.
            accessed: young || !own,
            ksm_zero: false,
        };
        // SAFETY: By the contract.
        if unsafe { walk.offer(addr, &mut mapped) } && !old {
            // SAFETY: By the contract `pmd` maps `folio` around `addr`, and its lock is held.
            unsafe { raw::rksm_pmd_mkold(vma, addr, pmd, folio.as_ptr()) };
            walk.batch.huge = all.clone();
            old = true;
        }
        if walk.stopped {
            break;
        }
        addr += PAGE_SIZE;
    }
    addr
}
