// SPDX-License-Identifier: GPL-2.0-only

//! Collecting pages: one page table walk for a batch.
//!
//! A walk clears the accessed bit of each page that it collects or that the filter wants cleared,
//! in the page tables and in secondary MMUs. TLBs are flushed once, when the scan has gone through
//! the mm. A page whose bit is still clear at the next walk has not been accessed through an
//! address space since that flush. This is a hint only: reclaim and DAMON clear the bit, too, and
//! secondary MMUs are not flushed.

use crate::engine::backend::{
    WalkAction,
    WalkStep, //
};
use crate::{
    bindings::raw,
    kernel_ext::mm::LiveMm,
    ksm::{
        batch::Batch,
        page::{
            candidate_folio,
            mergeable_from,
            Mapped,
            NextVma, //
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

/// Decides how far a walk goes, and what becomes of each page that it reaches; see
/// [`WalkFilter`](crate::engine::backend::WalkFilter).
pub(crate) trait MappedFilter {
    /// Returns whether the walk may take this step.
    ///
    /// # Context
    ///
    /// May sleep.
    fn step(&mut self, step: WalkStep) -> bool;

    /// Returns what the walk does with what is mapped at `addr`.
    ///
    /// # Context
    ///
    /// Atomic: called with a page table lock held.
    fn filter(&mut self, addr: usize, mapped: &Mapped<'_>) -> WalkAction;
}

/// What an entry of a page upper directory maps, in bytes.
const PUD_SIZE: usize = 512 * raw::RKSM_PMD_SIZE;

/// What [`collect`] hands to its callbacks.
struct Walk<'a, F> {
    batch: &'a mut Batch,
    filter: &'a mut F,
    live: LiveMm<'a>,
    /// Where to continue after a walk that has ended early.
    next: usize,
    /// `filter` has ended the walk, or another task waits for the mmap lock.
    stopped: bool,
    /// Whether a vma or a page table has been passed.
    progress: bool,
}

impl<F: MappedFilter> Walk<'_, F> {
    /// Collects the page if the filter wants it. Returns whether its accessed bit is to be cleared.
    fn offer(&mut self, addr: usize, mut mapped: Mapped<'_>) -> bool {
        if self.batch.huge.contains(&addr) {
            mapped.set_accessed();
        }
        match self.filter.filter(addr, &mapped) {
            WalkAction::Collect => {
                self.batch.push(addr, &mapped);
                return true;
            }
            WalkAction::CollectUntouched => self.batch.push(addr, &mapped),
            WalkAction::SkipClearAccessed => return true,
            WalkAction::Skip => {}
            WalkAction::Stop => self.stopped = true,
        }
        false
    }

    /// Returns whether the walk goes on with this step. It does not where another task waits to
    /// change the address space, but for its first steps.
    fn step(&mut self, step: WalkStep) -> bool {
        // SAFETY: May sleep: between pages a walk holds the mmap lock alone.
        unsafe { raw::rksm_cond_resched() };
        let contended = self.progress && self.live.mm().mmap_lock_is_contended();
        !contended && self.filter.step(step)
    }

    /// Counts a page table that is to be entered at `addr`, for so many entries. Returns whether
    /// the walk ends there.
    fn ends_before_table(&mut self, addr: usize, entries: usize) -> bool {
        self.stopped = !self.step(WalkStep::Table(entries));
        self.next = addr;
        self.stopped
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
    filter: &mut impl MappedFilter,
) -> Option<usize> {
    let start = within.start;
    let mut walk = Walk {
        batch,
        filter,
        live: mm,
        next: start,
        stopped: false,
        progress: false,
    };
    let mut at = start;
    loop {
        let mut passed = false;
        let step = || {
            walk.progress |= core::mem::replace(&mut passed, true);
            walk.step(WalkStep::Vma)
        };
        let vma = match mergeable_from(mm, at, within.end, step) {
            NextVma::Found(vma) => vma,
            NextVma::Stopped(next) => return Some(next),
            NextVma::End => return None,
        };
        at = at.max(vma.start());
        if at >= within.end {
            return Some(at);
        }
        let end = vma.end().min(within.end);
        match collect_vma(&mut walk, vma, at, end) {
            Some(next) => return Some(next),
            None => at = end,
        }
        walk.progress = true;
        if walk.batch.full() || at >= within.end {
            return Some(at);
        }
    }
}

/// Walks one vma; returns where the walk ended, if it was early.
fn collect_vma<F: MappedFilter>(
    walk: &mut Walk<'_, F>,
    vma: &VmaRef,
    start: usize,
    end: usize,
) -> Option<usize> {
    // SAFETY: The vma is valid and its mm's lock is held for reading; a range that does not lie in
    // it is refused. The callbacks get `walk`, which outlives the call, as their private data, and
    // expect its type.
    let stopped = unsafe {
        raw::rksm_walk_page_range_vma(
            vma.as_ptr().cast(),
            start,
            end,
            Some(collect_table::<F, raw::p4d_t, PUD_SIZE>),
            Some(collect_table::<F, raw::pud_t, { raw::RKSM_PMD_SIZE }>),
            Some(collect_pmd::<F>),
            (&raw mut *walk).cast::<c_void>(),
        )
    };
    (stopped > 0).then_some(walk.next)
}

/// Counts the page table that an entry of an upper level, of type `T`, refers to. Each of its
/// entries maps `SIZE` bytes.
///
/// # Safety
///
/// Called by the page walk of [`collect_vma`] alone.
unsafe extern "C" fn collect_table<F: MappedFilter, T, const SIZE: usize>(
    _entry: *mut T,
    addr: c_ulong,
    end: c_ulong,
    mm_walk: *mut raw::mm_walk,
) -> c_int {
    // SAFETY: The private data is the `Walk` of `collect_vma`, which nothing else uses during the
    // call.
    let walk = unsafe { &mut *raw::rksm_walk_private(mm_walk).cast::<Walk<'_, F>>() };
    c_int::from(walk.ends_before_table(addr, (end - addr).div_ceil(SIZE)))
}

/// Collects what one page middle directory entry maps.
///
/// # Safety
///
/// Called by the page walk of [`collect_vma`] alone.
unsafe extern "C" fn collect_pmd<F: MappedFilter>(
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

    if walk.ends_before_table(addr, (end - addr) / PAGE_SIZE) {
        return 1;
    }
    walk.progress = true;

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
                if walk.offer(addr, Mapped::new(&mut mapped)) && mapped.accessed {
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
                walk.filter.filter(addr, &Mapped::new(&mut mapped));
            } else {
                // As many calls as there are pages, not entries.
                let none = raw::rksm_none_ptes(ptep, ((end - addr) / PAGE_SIZE) as c_ulong);
                addr += none.saturating_sub(1) as usize * PAGE_SIZE;
                ptep = ptep.wrapping_add(none.saturating_sub(1) as usize);
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
unsafe fn collect_huge<F: MappedFilter>(
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
        // SAFETY: By the contract `pmd` maps the page and its folio, and its lock is held.
        if walk.offer(addr, unsafe { Mapped::new(&mut mapped) }) && !old {
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
