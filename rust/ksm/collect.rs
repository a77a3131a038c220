// SPDX-License-Identifier: GPL-2.0-only

//! Collecting pages: one page table walk for a batch.
//!
//! A walk takes the mark away from the pages it collects or notes that they were touched (the accessed bits, and what secondary
//! MMUs know), and flushes the TLBs before it ends: a page that is not marked when the next walk comes by has not been
//! touched through an address space since. Reclaim and DAMON take marks away, too; so this is a hint.

use crate::engine::memory::Interest;
use crate::{
    bindings::raw,
    kernel_ext::{
        mm::LiveMm,
        symbols::Symbols, //
    }, //
};
use core::{
    ops::Range,
    ptr::NonNull, //
};
use kernel::{
    ffi::{
        c_int,
        c_ulong,
        c_void, //
    },
    mm::virt::VmaRef,
    page::PAGE_SIZE,
    prelude::*, //
};

/// Folios that are freed at a time.
const FOLIOS: usize = 64;

/// Most bytes of address space that one walk covers, so that the mmap lock is not held across a huge hole.
const SPAN: usize = 1 << 30;

#[derive(Clone, Copy)]
struct Collected {
    addr: usize,
    /// `None` once it has been given up.
    page: Option<NonNull<raw::page>>,
    /// This entry owns a reference to the page's folio.
    owns: bool,
    /// The page was given up for a huge page to be split.
    lost: bool,
    /// The page may have been touched since a walk last took it.
    touched: bool,
}

/// A huge page of which the mark that it was touched has been taken away, for all of its pages but before all were
/// collected. The others count as touched until the next walk that comes from below.
struct Huge {
    mm: usize,
    pages: Range<usize>,
}

/// Pages found by a walk, in ascending order of their addresses.
///
/// # Invariants
///
/// For every entry that has a page, the batch owns a reference to its folio: the entry itself owns it, or the next entry
/// after it that has a page and owns one, and that is of the same folio. So a huge page costs one reference a batch.
pub(crate) struct Batch {
    entries: KVec<Collected>,
    /// The batch is full with so many entries.
    limit: usize,
    /// Entries before this one have no page any more.
    released: usize,
    /// Addresses where nobody collects pages of the same mm beside this batch.
    own: Range<usize>,
    huge: Option<Huge>,
    /// References to folios that nobody else refers to, to be given up together.
    last_refs: KVec<*mut raw::folio>,
}

// SAFETY: References to folios may be given up on any CPU.
unsafe impl Send for Batch {}
// SAFETY: With a shared reference pages are only looked at.
unsafe impl Sync for Batch {}

impl Batch {
    /// An empty batch with room for so many pages.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(pages: usize) -> Result<Self> {
        Ok(Self {
            entries: KVec::with_capacity(pages, GFP_KERNEL)?,
            limit: 0,
            released: 0,
            own: 0..0,
            huge: None,
            last_refs: KVec::with_capacity(pages, GFP_KERNEL)?,
        })
    }

    /// Has the batch be full with `limit` pages more, of an mm that other threads walk too, but not at the addresses of
    /// its `own`.
    pub(crate) fn set_limit(&mut self, limit: usize, own: &Range<usize>) {
        self.limit = (self.len() + limit).min(self.entries.capacity());
        self.own = own.clone();
    }

    /// Pages in the batch.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    fn full(&self) -> bool {
        self.len() >= self.limit
    }

    /// Address of the `i`th page.
    pub(crate) fn addr(&self, i: usize) -> usize {
        self.entry(i).map_or(0, |e| e.addr)
    }

    /// Whether the `i`th page may have been touched since a walk last took it.
    pub(crate) fn touched(&self, i: usize) -> bool {
        self.entry(i).is_none_or(|e| e.touched)
    }

    fn entry(&self, i: usize) -> Option<&Collected> {
        self.entries.get(i)
    }

    /// The `i`th page, if it has not been given up.
    pub(crate) fn page(&self, i: usize) -> Option<NonNull<raw::page>> {
        self.entry(i)?.page
    }

    /// The folio of the `i`th page, if that is a huge page.
    pub(crate) fn huge_folio(&self, i: usize) -> Option<*mut raw::folio> {
        let page = self.page(i)?;
        // SAFETY: The page is referenced by the invariant.
        unsafe {
            let folio = raw::rksm_page_folio(page.as_ptr());
            raw::rksm_folio_test_large(folio).then_some(folio)
        }
    }

    /// Adds a page that the caller holds the page table lock for.
    ///
    /// # Safety
    ///
    /// `mapped` is what a page table maps whose lock the caller holds.
    unsafe fn push(&mut self, addr: usize, mapped: &raw::rksm_mapped) {
        let (Some(page), Some(folio)) = (NonNull::new(mapped.page), NonNull::new(mapped.folio))
        else {
            return;
        };
        let last = self.entries.last_mut();
        // SAFETY: The page in `last` is referenced by the invariant.
        let same = |last: &Collected| unsafe {
            last.page
                .is_some_and(|page| raw::rksm_page_folio(page.as_ptr()) == folio.as_ptr())
        };
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
        // There is room, as the batch is not full.
        let _ = self.entries.push_within_capacity(Collected {
            addr,
            page: Some(page),
            owns: true,
            lost: false,
            touched: mapped.touched,
        });
    }

    /// Gives up the `i`th page.
    pub(crate) fn release(&mut self, i: usize) {
        let Some(entry) = self.entries.get_mut(i) else {
            return;
        };
        let (page, owns) = (entry.page.take(), core::mem::take(&mut entry.owns));
        if let (Some(page), true) = (page, owns) {
            let mut before = self.entries[self.released.min(i)..i].iter_mut().rev();
            match before.find(|entry| entry.page.is_some()) {
                // INVARIANT: It has relied on this entry, and is of the same folio.
                Some(before) if !before.owns => before.owns = true,
                _ => self.put(page),
            }
        }
        if self.released == i {
            self.released += 1;
        }
    }

    /// Gives up a reference to the folio that a page is part of now: at once, or if it is the last one, when the batch
    /// is cleared. Freeing many folios at a time takes the locks of LRU lists and of free lists once.
    ///
    /// The caller owns the reference.
    fn put(&mut self, page: NonNull<raw::page>) {
        // SAFETY: The page is referenced, so its folio does not change meanwhile.
        let (folio, last) = unsafe {
            let folio = raw::rksm_page_folio(page.as_ptr());
            (folio, raw::rksm_folio_last_ref(folio))
        };
        if !last || self.last_refs.push_within_capacity(folio).is_err() {
            // SAFETY: The reference is the caller's to give.
            unsafe { raw::rksm_folio_put(folio) };
        }
    }

    /// Gives up all references to a huge page, but one for the page `keep`.
    pub(crate) fn make_way(&mut self, huge: *mut raw::folio, keep: Option<usize>) {
        let mut references = 0;
        for (i, entry) in self.entries.iter_mut().enumerate() {
            let Some(page) = entry.page else { continue };
            // SAFETY: The page is referenced by the invariant: references are given up below only.
            if unsafe { raw::rksm_page_folio(page.as_ptr()) } != huge {
                continue;
            }
            references += usize::from(core::mem::take(&mut entry.owns));
            if Some(i) == keep {
                // INVARIANT: The page had a reference, of this entry or of one after it.
                entry.owns = true;
            } else {
                (entry.page, entry.lost) = (None, true);
            }
        }
        let kept = keep.is_some_and(|i| self.page(i).is_some());
        for _ in usize::from(kept)..references {
            // SAFETY: No entry owns these references any more.
            unsafe { raw::rksm_folio_put(huge) };
        }
    }

    /// Whether the `i`th page was given up by [`Batch::make_way`].
    pub(crate) fn lost(&self, i: usize) -> bool {
        self.entry(i).is_some_and(|entry| entry.lost)
    }

    /// Has the batch have an `i`th page again.
    pub(crate) fn regain(&mut self, i: usize, held: HeldPage) {
        if let Some(entry) = self.entries.get_mut(i) {
            // INVARIANT: The entry takes over the reference.
            (entry.page, entry.owns, entry.lost) = (Some(held.page), true, false);
            core::mem::forget(held);
            self.released = self.released.min(i);
        }
    }

    /// Gives up all pages.
    pub(crate) fn clear(&mut self) {
        for i in self.released..self.len() {
            self.release(i);
        }
        for folios in self.last_refs.chunks_mut(FOLIOS) {
            // SAFETY: Each is a folio of which a reference is ours to give.
            unsafe { raw::rksm_folios_put(folios.as_mut_ptr(), folios.len() as c_int) };
        }
        self.last_refs.clear();
        self.entries.clear();
        self.released = 0;
    }
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

/// What [`collect`] hands to its callback.
struct Walk<'a, F> {
    batch: &'a mut Batch,
    look: &'a mut F,
    live: LiveMm<'a>,
    /// Where to go on after a walk that has ended early.
    next: usize,
    /// `look` has ended the walk, or somebody waits for the mmap lock.
    stopped: bool,
    /// Whether a page table has been walked.
    begun: bool,
    /// From the first to the last page whose mark has been taken away.
    cleared: Range<usize>,
}

impl<F: FnMut(usize, &raw::rksm_mapped) -> Interest> Walk<'_, F> {
    /// Collects a page if it is wanted. Returns whether the mark that it was touched is to be taken away.
    ///
    /// # Safety
    ///
    /// `mapped` is what a page table maps whose lock the caller holds.
    unsafe fn offer(&mut self, addr: usize, mapped: &mut raw::rksm_mapped) -> bool {
        if let Some(huge) = &self.batch.huge {
            mapped.touched |= huge.mm == self.mm() && huge.pages.contains(&addr);
        }
        match (self.look)(addr, mapped) {
            Interest::Take => {
                // SAFETY: By the contract.
                unsafe { self.batch.push(addr, mapped) };
                return true;
            }
            Interest::Note => return true,
            Interest::Pass => {}
            Interest::Stop => self.stopped = true,
        }
        false
    }

    /// Takes note that a page's mark has been taken away.
    fn cleared(&mut self, addr: usize) {
        if self.cleared.is_empty() {
            self.cleared.start = addr;
        }
        self.cleared.end = addr + PAGE_SIZE;
    }

    /// Names the mm.
    fn mm(&self) -> usize {
        self.live.mm().as_ptr() as usize
    }

    fn over(&self) -> bool {
        self.stopped || self.batch.full()
    }
}

/// Collects the pages of mergeable vmas `within` that `look` takes, by their address and what is mapped there.
/// Returns where to go on, or `None` at the end.
///
/// `look` is called with a page table lock held. The caller holds the mmap lock, as `mm` shows.
pub(crate) fn collect(
    mm: LiveMm<'_>,
    within: Range<usize>,
    batch: &mut Batch,
    look: &mut impl FnMut(usize, &raw::rksm_mapped) -> Interest,
) -> Option<usize> {
    let start = within.start;
    let bound = start.saturating_add(SPAN).min(within.end);
    if batch
        .huge
        .as_ref()
        .is_some_and(|huge| start <= huge.pages.start)
    {
        batch.huge = None;
    }
    let mut at = start;
    while let Some(vma) = mm.mergeable_from(at) {
        at = at.max(vma.start());
        if at >= bound {
            return Some(at);
        }
        let end = vma.end().min(bound);
        match collect_vma(mm, vma, at, end, batch, look) {
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
fn collect_vma<F: FnMut(usize, &raw::rksm_mapped) -> Interest>(
    mm: LiveMm<'_>,
    vma: &VmaRef,
    start: usize,
    end: usize,
    batch: &mut Batch,
    look: &mut F,
) -> Option<usize> {
    let mut walk = Walk {
        batch,
        look,
        live: mm,
        next: end,
        stopped: false,
        begun: false,
        cleared: 0..0,
    };
    // SAFETY: The vma is valid and its mm's lock is held for reading; `start..end` lies within it; the callback
    // gets `walk`, which outlives the call, as its private data, and has its type.
    let stopped = unsafe {
        raw::rksm_walk_page_range_vma(
            vma.as_ptr().cast(),
            start,
            end,
            Some(collect_pmd::<F>),
            (&raw mut walk).cast::<c_void>(),
        )
    };
    if !walk.cleared.is_empty() {
        // Before the contents are read: a write from now on sets the mark again.
        // SAFETY: The vma is valid.
        unsafe {
            raw::rksm_flush_tlb_range(vma.as_ptr().cast(), walk.cleared.start, walk.cleared.end)
        };
    }
    (stopped > 0).then_some(walk.next)
}

/// Collects what one page middle directory entry maps.
///
/// # Safety
///
/// Called by the page walk of [`collect_vma`] alone.
unsafe extern "C" fn collect_pmd<F: FnMut(usize, &raw::rksm_mapped) -> Interest>(
    pmd: *mut raw::pmd_t,
    addr: c_ulong,
    end: c_ulong,
    mm_walk: *mut raw::mm_walk,
) -> c_int {
    // SAFETY: `collect_vma` has put its `Walk` there, which nobody else uses during the call.
    let walk = unsafe { &mut *raw::rksm_walk_private(mm_walk).cast::<Walk<'_, F>>() };
    // SAFETY: The walk names the vma it walks.
    let vma = unsafe { raw::rksm_walk_vma(mm_walk) };
    let mut addr = addr;

    // SAFETY: May sleep: a walk under the mmap lock holds no spinlock.
    unsafe { raw::rksm_cond_resched() };
    // Whoever changes the address space waits for one page table at most.
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
                // SAFETY: As above.
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
    while addr < end && !walk.batch.full() {
        // SAFETY: `ptep` points to the entry of `addr`, within this page table, whose lock is held; so what is mapped
        // stays mapped.
        unsafe {
            if raw::rksm_pte_mapped(vma, addr, ptep, &mut mapped) {
                if walk.offer(addr, &mut mapped) && mapped.touched {
                    raw::rksm_pte_mkold(vma, addr, ptep, mapped.folio);
                    walk.cleared(addr);
                }
                if walk.stopped {
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

/// Collects pages of a huge mapping. Returns where to go on.
///
/// # Safety
///
/// `pmd` maps `folio`, and at `range.start` its page `first`; its lock is held. `range` lies within the mapping.
unsafe fn collect_huge<F: FnMut(usize, &raw::rksm_mapped) -> Interest>(
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
            // Who walks another part of it may come by first, and take the mark away.
            touched: young || !own,
        };
        // SAFETY: By the contract.
        if unsafe { walk.offer(addr, &mut mapped) } && !old {
            // SAFETY: As above.
            unsafe { raw::rksm_pmd_mkold(vma, addr, pmd, folio.as_ptr()) };
            walk.cleared(addr);
            walk.batch.huge = Some(Huge {
                mm: walk.mm(),
                pages: range.start..range.end,
            });
            old = true;
        }
        if walk.stopped {
            break;
        }
        addr += PAGE_SIZE;
    }
    addr
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
pub(crate) struct HeldPage {
    page: NonNull<raw::page>,
    touched: bool,
}

impl HeldPage {
    /// The page.
    pub(crate) fn page(&self) -> NonNull<raw::page> {
        self.page
    }

    /// Whether it may have been touched since a walk last took it.
    pub(crate) fn touched(&self) -> bool {
        self.touched
    }

    /// Whether it is a merged page.
    pub(crate) fn is_ksm(&self) -> bool {
        // SAFETY: By the invariant the page's folio is referenced.
        unsafe { raw::rksm_folio_test_ksm(raw::rksm_page_folio(self.page.as_ptr())) }
    }

    /// Whether somebody else holds a reference to it, if it is a small page: it cannot be replaced then.
    pub(crate) fn is_pinned(&self) -> bool {
        // SAFETY: By the invariant the page's folio is referenced.
        unsafe {
            let folio = raw::rksm_page_folio(self.page.as_ptr());
            !raw::rksm_folio_test_large(folio) && raw::rksm_folio_pinned_beyond(folio, 1)
        }
    }
}

impl Drop for HeldPage {
    fn drop(&mut self) {
        // SAFETY: The page is referenced, so its folio does not change meanwhile; the reference is ours to give.
        unsafe { raw::rksm_folio_put(raw::rksm_page_folio(self.page.as_ptr())) };
    }
}

/// The page that is mapped at `addr`, if its kind can be merged.
pub(crate) fn page_at(vma: &VmaRef, addr: usize) -> Option<HeldPage> {
    let (mut page, mut touched) = (core::ptr::null_mut(), true);
    // SAFETY: The vma is valid, its mm's lock is held, and `addr` lies in it.
    let folio =
        unsafe { raw::rksm_folio_walk_get(vma.as_ptr().cast(), addr, &mut page, &mut touched) };
    if folio.is_null() {
        return None;
    }
    // INVARIANT: The shim has taken a reference to the folio of the page.
    NonNull::new(page).map(|page| HeldPage { page, touched })
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
