// SPDX-License-Identifier: GPL-2.0

//! Collecting pages: one page table walk for a batch.

use super::{
    pin::LiveMm,
    raw,
    symbols::Symbols, //
};
use crate::engine::memory::Interest;
use core::ptr::NonNull;
use kernel::{
    ffi::{
        c_int,
        c_ulong,
        c_void, //
    },
    mm::virt::VmaRef,
    page::PAGE_SIZE, //
};

/// Most pages of a batch. Bounds how long a page table lock is held, and how many references.
pub(crate) const BATCH: usize = 64;

/// Most bytes of address space that one walk covers, so that the mmap lock is not held across a huge hole.
const SPAN: usize = 1 << 30;

#[derive(Clone, Copy)]
struct Collected {
    addr: usize,
    page: NonNull<raw::page>,
    /// This entry owns a reference to the page's folio.
    owns: bool,
}

/// Pages found by a walk, in ascending order of their addresses.
///
/// # Invariants
///
/// For every entry that has not been released, the batch owns a reference to its page's folio: the entry itself
/// owns it, or the next entry at or after it that `owns` one, and that is of the same folio. So a huge page costs
/// one reference a batch, and can be split once the entries after it are dropped.
pub(crate) struct Batch {
    entries: [Option<Collected>; BATCH],
    len: usize,
    limit: usize,
    /// Entries before this one have been released.
    released: usize,
}

// SAFETY: References to folios may be given up on any CPU.
unsafe impl Send for Batch {}

impl Batch {
    /// An empty batch.
    pub(crate) const fn new() -> Self {
        Self {
            entries: [None; BATCH],
            len: 0,
            limit: BATCH,
            released: 0,
        }
    }

    /// Has the batch be full with `limit` pages, at least 1.
    pub(crate) fn set_limit(&mut self, limit: usize) {
        self.limit = limit.clamp(1, BATCH);
    }

    /// Pages in the batch.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn full(&self) -> bool {
        self.len >= self.limit
    }

    /// Address of the `i`th page.
    pub(crate) fn addr(&self, i: usize) -> usize {
        self.entry(i).map_or(0, |e| e.addr)
    }

    fn entry(&self, i: usize) -> Option<&Collected> {
        self.entries[..self.len].get(i)?.as_ref()
    }

    /// The `i`th page, if it has not been released.
    pub(crate) fn page(&self, i: usize) -> Option<NonNull<raw::page>> {
        if i < self.released {
            return None;
        }
        self.entry(i).map(|e| e.page)
    }

    /// Adds a page that the caller holds the page table lock for.
    ///
    /// # Safety
    ///
    /// `page` is a page of `folio`, which is mapped by a page table whose lock the caller holds.
    unsafe fn push(&mut self, addr: usize, page: NonNull<raw::page>, folio: NonNull<raw::folio>) {
        let last = self
            .len
            .checked_sub(1)
            .and_then(|i| self.entries[i].as_mut());
        // SAFETY: The page in `last` is referenced by the invariant.
        let same = |last: &Collected| unsafe { raw::rksm_page_folio(last.page.as_ptr()) } == folio.as_ptr();
        let shares = match last {
            Some(last) if last.owns && same(last) => {
                last.owns = false;
                true
            }
            _ => false,
        };
        if !shares {
            // SAFETY: The folio is mapped by the contract, so its count is not zero.
            unsafe { raw::rksm_folio_get(folio.as_ptr()) };
        }
        // INVARIANT: The new entry owns the reference just taken, or the one the entry before it had.
        self.entries[self.len] = Some(Collected {
            addr,
            page,
            owns: true,
        });
        self.len += 1;
    }

    /// Gives up the `i`th page and all before it.
    pub(crate) fn release(&mut self, i: usize) {
        while self.released <= i && self.released < self.len {
            let entry = self.entries[self.released].take();
            self.released += 1;
            if let Some(entry) = entry.filter(|entry| entry.owns) {
                put(entry.page);
            }
        }
    }

    /// Forgets all pages after the `i`th, so that the batch holds one reference to the `i`th page's folio.
    pub(crate) fn truncate_after(&mut self, i: usize) {
        for later in i + 1..self.len {
            let Some(entry) = self.entries[later].take() else {
                continue;
            };
            let ours = self.entries[i].as_mut().filter(|e| !e.owns);
            match ours {
                // INVARIANT: Between the `i`th entry and the first owner after it all entries are of one folio.
                Some(ours) if entry.owns => ours.owns = true,
                _ if entry.owns => put(entry.page),
                _ => {}
            }
        }
        self.len = self.len.min(i + 1);
    }

    /// Gives up all pages.
    pub(crate) fn clear(&mut self) {
        if let Some(last) = self.len.checked_sub(1) {
            self.release(last);
        }
        self.len = 0;
        self.released = 0;
    }
}

/// Gives up a reference to the folio that a page is part of now.
///
/// The caller owns the reference.
fn put(page: NonNull<raw::page>) {
    // SAFETY: The page is referenced, so its folio does not change meanwhile; the reference is the caller's to give.
    unsafe { raw::rksm_folio_put(raw::rksm_page_folio(page.as_ptr())) };
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Has all CPUs put the pages of their LRU caches on the lists, where they no longer hold a reference.
///
/// Sleeps.
pub(crate) fn lru_add_drain_all(_symbols: Symbols) {
    // SAFETY: May sleep here; the function has been resolved.
    unsafe { raw::rksm_lru_add_drain_all() };
}

/// Says what is to become of a page, by its address and its folio's `mapping` word.
///
/// Called with the page table lock held, so that the page stays mapped.
pub(crate) type Look<'a> = dyn FnMut(usize, NonNull<raw::page>, usize) -> Interest + 'a;

/// What [`collect`] hands to its callback.
struct Walk<'a, 'b> {
    batch: &'a mut Batch,
    look: &'a mut Look<'b>,
    /// Where to go on after a walk that has ended early.
    next: usize,
    /// `look` has ended the walk.
    stopped: bool,
}

impl Walk<'_, '_> {
    /// Collects a page if it is wanted. Returns whether the walk goes on behind it.
    ///
    /// # Safety
    ///
    /// `page` is a page of `folio`, which is mapped by a page table whose lock the caller holds.
    unsafe fn offer(
        &mut self,
        addr: usize,
        page: NonNull<raw::page>,
        folio: NonNull<raw::folio>,
    ) -> bool {
        // SAFETY: The folio is mapped by the contract.
        let mapping = unsafe { raw::rksm_folio_mapping(folio.as_ptr()) };
        match (self.look)(addr, page, mapping) {
            // SAFETY: By the contract.
            Interest::Take => unsafe { self.batch.push(addr, page, folio) },
            Interest::Pass => {}
            Interest::Stop => self.stopped = true,
        }
        !self.stopped
    }

    fn over(&self) -> bool {
        self.stopped || self.batch.full()
    }
}

/// Collects the pages of mergeable vmas from `start` on that `look` takes. Returns where to go on, or `None` at the
/// end.
///
/// The caller holds the mmap lock, as `mm` shows.
pub(crate) fn collect(
    mm: LiveMm<'_>,
    start: usize,
    batch: &mut Batch,
    look: &mut Look<'_>,
) -> Option<usize> {
    let bound = start.saturating_add(SPAN);
    let mut at = start;
    while let Some(vma) = mm.mergeable_from(at) {
        at = at.max(vma.start());
        if at >= bound {
            return Some(at);
        }
        let end = vma.end().min(bound);
        match collect_vma(vma, at, end, batch, look) {
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
fn collect_vma(
    vma: &VmaRef,
    start: usize,
    end: usize,
    batch: &mut Batch,
    look: &mut Look<'_>,
) -> Option<usize> {
    let mut walk = Walk {
        batch,
        look,
        next: end,
        stopped: false,
    };
    // SAFETY: The vma is valid and its mm's lock is held for reading; `start..end` lies within it; the callback
    // gets `walk`, which outlives the call, as its private data.
    let stopped = unsafe {
        raw::rksm_walk_page_range_vma(
            vma.as_ptr().cast(),
            start,
            end,
            Some(collect_pmd),
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
unsafe extern "C" fn collect_pmd(
    pmd: *mut raw::pmd_t,
    addr: c_ulong,
    end: c_ulong,
    mm_walk: *mut raw::mm_walk,
) -> c_int {
    // SAFETY: `collect_vma` has put its `Walk` there, which nobody else uses during the call.
    let walk = unsafe { &mut *raw::rksm_walk_private(mm_walk).cast::<Walk<'_, '_>>() };
    // SAFETY: The walk names the vma it walks.
    let vma = unsafe { raw::rksm_walk_vma(mm_walk) };
    let mut addr = addr;

    // SAFETY: May sleep: a walk under the mmap lock holds no spinlock.
    unsafe { raw::rksm_cond_resched() };

    let mut ptl = core::ptr::null_mut();
    // SAFETY: `pmd` belongs to the walked mm. A huge mapping is answered with its lock held.
    let huge = unsafe { raw::rksm_pmd_page_locked(vma, pmd, addr, &mut ptl) };
    if !ptl.is_null() {
        if let Some(first) = NonNull::new(huge) {
            // SAFETY: The page is mapped, and the page table lock is held.
            let folio = unsafe { candidate_folio(first) };
            let start = addr;
            while let Some(folio) = folio.filter(|_| addr < end && !walk.batch.full()) {
                let n = (addr - start) / PAGE_SIZE;
                // SAFETY: `end` lies within the huge page, whose pages follow one another.
                let page = unsafe { NonNull::new_unchecked(raw::rksm_nth_page(first.as_ptr(), n)) };
                // SAFETY: As above.
                if !unsafe { walk.offer(addr, page, folio) } {
                    break;
                }
                addr += PAGE_SIZE;
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
    while addr < end && !walk.batch.full() {
        // SAFETY: `ptep` points to the entry of `addr`, within this page table, whose lock is held.
        let page = unsafe { raw::rksm_pte_normal_page(vma, addr, raw::rksm_ptep_get(ptep)) };
        if let Some(page) = NonNull::new(page) {
            // SAFETY: The page is mapped, and the page table lock is held.
            if let Some(folio) = unsafe { candidate_folio(page) } {
                // SAFETY: As above.
                if !unsafe { walk.offer(addr, page, folio) } {
                    break;
                }
            }
        }
        addr += PAGE_SIZE;
        ptep = ptep.wrapping_add(1);
    }
    // SAFETY: Taken above. `first` and the entries after it lie in one page.
    unsafe { raw::rksm_pte_unmap_unlock(first, ptl) };
    walk.next = addr;
    c_int::from(walk.over())
}

/// The folio of a mapped page if its kind can be merged: anonymous, not of a device.
///
/// # Safety
///
/// The page is mapped by a page table whose lock the caller holds, or referenced.
unsafe fn candidate_folio(page: NonNull<raw::page>) -> Option<NonNull<raw::folio>> {
    // SAFETY: The page is mapped by the contract, so its folio does not change.
    let folio = NonNull::new(unsafe { raw::rksm_page_folio(page.as_ptr()) })?;
    // SAFETY: As above.
    unsafe { raw::rksm_folio_mergeable(folio.as_ptr()) }.then_some(folio)
}

/// A page with a reference to the folio that it is part of.
///
/// It is the page that is held on to: when a huge folio is split, its reference passes to the small folio of the
/// page for which it was split.
///
/// # Invariants
///
/// Owns one reference to the page's folio.
pub(crate) struct HeldPage(NonNull<raw::page>);

impl HeldPage {
    /// The page.
    pub(crate) fn page(&self) -> NonNull<raw::page> {
        self.0
    }

    /// Whether it is a merged page.
    pub(crate) fn is_ksm(&self) -> bool {
        // SAFETY: By the invariant the page's folio is referenced.
        unsafe { raw::rksm_folio_test_ksm(raw::rksm_page_folio(self.0.as_ptr())) }
    }

    /// Whether somebody else holds a reference to it, if it is a small page: it cannot be replaced then.
    pub(crate) fn is_pinned(&self) -> bool {
        // SAFETY: By the invariant the page's folio is referenced.
        unsafe {
            let folio = raw::rksm_page_folio(self.0.as_ptr());
            !raw::rksm_folio_test_large(folio) && raw::rksm_folio_pinned_beyond(folio, 1)
        }
    }
}

impl Drop for HeldPage {
    fn drop(&mut self) {
        put(self.0);
    }
}

/// The page that is mapped at `addr`, if its kind can be merged.
pub(crate) fn page_at(vma: &VmaRef, addr: usize) -> Option<HeldPage> {
    let mut page = core::ptr::null_mut();
    // SAFETY: The vma is valid, its mm's lock is held, and `addr` lies in it.
    let folio = unsafe { raw::rksm_folio_walk_get(vma.as_ptr().cast(), addr, &mut page) };
    if folio.is_null() {
        return None;
    }
    // INVARIANT: The shim has taken a reference to the folio of the page.
    NonNull::new(page).map(HeldPage)
}

/// The first address in `start..end` of `vma` where a merged page or a KSM-placed zero page is mapped.
///
/// # Errors
///
/// `ERESTARTSYS` where a signal is pending.
pub(crate) fn find_merged(
    vma: &VmaRef,
    start: usize,
    end: usize,
) -> kernel::error::Result<Option<usize>> {
    let mut found: usize = 0;
    // SAFETY: As in `collect_vma`, with `found` as the private data.
    let ret = unsafe {
        raw::rksm_walk_page_range_vma(
            vma.as_ptr().cast(),
            start,
            end,
            Some(find_pmd),
            (&raw mut found).cast::<c_void>(),
        )
    };
    kernel::error::to_result(ret)?;
    Ok((ret > 0).then_some(found))
}

/// Looks for a merged page below one page middle directory entry.
///
/// # Safety
///
/// Called by the page walk of [`find_merged`] alone.
unsafe extern "C" fn find_pmd(
    pmd: *mut raw::pmd_t,
    addr: c_ulong,
    end: c_ulong,
    mm_walk: *mut raw::mm_walk,
) -> c_int {
    // SAFETY: The walk is valid, and belongs to the current thread.
    let vma = unsafe { raw::rksm_walk_vma(mm_walk) };
    // SAFETY: No spinlock is held.
    unsafe { raw::rksm_cond_resched() };
    // SAFETY: Reads the current task's state.
    if unsafe { raw::rksm_signal_pending() } {
        return -(raw::ERESTARTSYS as c_int);
    }
    let mut ptl = core::ptr::null_mut();
    // SAFETY: `pmd` belongs to the walked mm.
    let first = unsafe { raw::rksm_pte_offset_map_lock(vma, pmd, addr, &mut ptl) };
    if first.is_null() {
        return 0;
    }
    let mut ptep = first;
    let mut hit = false;
    let mut at = addr;
    while at < end {
        // SAFETY: `ptep` points to the entry of `at`, within this page table, whose lock is held.
        if unsafe { raw::rksm_pte_is_ksm(vma, at, raw::rksm_ptep_get(ptep)) } {
            hit = true;
            break;
        }
        at += PAGE_SIZE;
        ptep = ptep.wrapping_add(1);
    }
    // SAFETY: Taken above.
    unsafe { raw::rksm_pte_unmap_unlock(first, ptl) };
    if hit {
        // SAFETY: `find_merged` has put its variable there.
        unsafe { *raw::rksm_walk_private(mm_walk).cast::<usize>() = at };
    }
    c_int::from(hit)
}
