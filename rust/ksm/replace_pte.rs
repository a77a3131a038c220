// SPDX-License-Identifier: GPL-2.0-only

//! Changing what a page table entry maps.
//!
//! One page is shared in one critical section: between `mmu_notifier_invalidate_range_start` and
//! `_end`, under the folio lock and the page table lock, the entry is cleared and flushed from the
//! TLB. Then nobody can write to the page through it, `get_user_pages_fast` cannot take a new
//! reference, and references that exist are counted. Only then the contents are compared, and the
//! entry either gets its new value or its old one back. So a refusal at any point leaves the
//! process as it was, and an entry is flushed once, not twice.
//!
//! # Locks
//!
//! `mmap_lock` (read) of one mm, then the folio lock (trylock), then mmu notifiers (may sleep),
//! then the page table lock.

use crate::engine::{
    backend::{
        HugeFolioRefs,
        HugeId, //
    },
    types::Refusal, //
};
use crate::{
    bindings::raw,
    kernel_ext::{
        folio::{
            FolioRef,
            PageRef, //
        },
        mm::{
            LiveMm,
            MmUser,
            MmapReadGuard, //
        },
        pte::{
            Invalidate,
            PteGuard, //
        },
        race_window, //
    },
    ksm::{
        node::NodeRef,
        page::{
            self,
            Search,
            MAX_TABLES, //
        },
        split::HugeMappings, //
    },
};
use core::ops::Range;
use kernel::{
    mm::virt::VmaRef,
    page::PAGE_SIZE,
    prelude::*, //
};

/// A vma of a live mm whose mmap lock is held.
#[derive(Clone, Copy)]
pub(super) struct MappedVma<'a> {
    pub(super) live: LiveMm<'a>,
    pub(super) vma: &'a VmaRef,
}

/// How the huge page that a page is part of is split, where it has to be.
///
/// The caller holds one reference to the page: one of `huge` if `guards` is 0, else another.
pub(super) struct Split<'a, H> {
    /// References that are given up before a split, but for that of the page.
    pub(super) huge: &'a mut H,
    /// References of the caller besides those of `huge`.
    pub(super) guards: usize,
    /// Whether a page of zeroes may be given away.
    pub(super) use_zero_pages: bool,
}

impl<H: HugeFolioRefs> Split<'_, H> {
    /// The same for a page that a guard of the caller references.
    pub(super) fn guarded(&mut self) -> Split<'_, H> {
        Split {
            huge: self.huge,
            guards: 1,
            use_zero_pages: self.use_zero_pages,
        }
    }

    /// Returns whether a reference that cannot be given up keeps the large folio of a page from
    /// being split.
    pub(super) fn is_blocked(&self, page: PageRef<'_>) -> bool {
        let folio = page.folio();
        let ours = self.huge.count(HugeId(folio as usize)) + self.guards;
        // SAFETY: The page is referenced.
        unsafe { raw::rksm_folio_held_beyond(folio, ours as c_int) }
    }
}

/// What a page is to be replaced by.
pub(crate) enum PteReplacement<'a> {
    /// The merged page that another folio is.
    KsmPage(&'a FolioRef),
    /// The zero page.
    ZeroPage,
    /// Itself, as the merged page of a node that no folio names yet.
    InPlace(NodeRef<'a>),
}

/// Returns whether two pages have the same contents, now.
pub(super) fn pages_identical(a: PageRef<'_>, b: PageRef<'_>) -> bool {
    // SAFETY: Both pages are referenced. They may change meanwhile, which the shim's `memcmp`
    // allows for.
    unsafe { raw::rksm_pages_identical(a.as_ptr(), b.as_ptr()) }
}

/// Returns whether a page has the contents that it is to be replaced by, now.
fn matches_target(page: PageRef<'_>, target: &PteReplacement<'_>) -> bool {
    match target {
        PteReplacement::InPlace(_) => true,
        PteReplacement::KsmPage(kfolio) => pages_identical(page, kfolio.page()),
        // SAFETY: The page is referenced.
        PteReplacement::ZeroPage => unsafe { raw::rksm_page_is_zero(page.as_ptr()) },
    }
}

/// Returns whether memory has failed under a page, or under its replacement.
fn is_poisoned(page: PageRef<'_>, target: &PteReplacement<'_>) -> bool {
    // SAFETY: The page is referenced, and so is its folio.
    let own = unsafe { raw::rksm_folio_poisoned(page.folio()) };
    own || match target {
        // SAFETY: The replacement holds a reference.
        PteReplacement::KsmPage(kfolio) => unsafe { raw::rksm_folio_poisoned(kfolio.as_ptr()) },
        PteReplacement::ZeroPage | PteReplacement::InPlace(_) => false,
    }
}

/// A page whose folio this holds the lock of. Dropping it unlocks the folio that the page is part
/// of then: where a huge folio is split, the lock passes to the small folio of the page.
///
/// # Invariants
///
/// This holds the lock of the page's folio.
struct LockedPage<'a>(PageRef<'a>);

impl<'a> LockedPage<'a> {
    /// Locks the folio of a page if it is not locked.
    fn trylock(page: PageRef<'a>) -> Option<Self> {
        // SAFETY: The page is referenced, and so is its folio.
        // INVARIANT: The lock has been taken.
        unsafe { raw::rksm_folio_trylock(page.folio()) }.then(|| Self(page))
    }
}

impl Drop for LockedPage<'_> {
    fn drop(&mut self) {
        // SAFETY: By the invariant the lock is held here.
        unsafe { raw::rksm_folio_unlock(self.0.folio()) };
    }
}

/// Shares the page at `addr` of `vma`: see the module's documentation.
///
/// A huge page is split first, which needs that the caller's reference to `page` be the only one
/// beside its mappings.
///
/// A merged page can be replaced by another one only.
///
/// # Context
///
/// May sleep. The mmap lock of the mm is held for reading. Tries the folio lock, calls mmu
/// notifiers and takes the page table lock.
///
/// # Errors
///
/// The mapping is what it was.
pub(super) fn share(
    place: MappedVma<'_>,
    addr: usize,
    page: PageRef<'_>,
    target: &PteReplacement<'_>,
    split: &mut Split<'_, impl HugeFolioRefs>,
) -> Result<(), Refusal> {
    with_folio_locked(page, target, |locked, mappings| {
        if page.is_large() {
            // A huge page is worth more whole: split it only for contents that match.
            if !matches_target(page, target) {
                return Err(Refusal::Differs);
            }
            *mappings = Some(split_locked(place, addr, locked, split)?);
        }
        // SAFETY: The folio is small, or has been split, and locked meanwhile.
        unsafe { share_locked(place.live, place.vma, addr, locked, target) }
    })
}

/// Splits the huge page that a page is part of, whose contents match: see [`share`].
///
/// # Context
///
/// May sleep. The mmap lock of the mm is held for reading. Tries the folio lock.
///
/// # Errors
///
/// The page is not mapped any more, or part of the huge page still.
pub(super) fn split(
    place: MappedVma<'_>,
    addr: usize,
    page: PageRef<'_>,
    split: &mut Split<'_, impl HugeFolioRefs>,
) -> Result<(), Refusal> {
    let any = PteReplacement::ZeroPage;
    with_folio_locked(page, &any, |locked, mappings| {
        *mappings = Some(split_locked(place, addr, locked, split)?);
        Ok(())
    })?;
    // A split replaces pages of zeroes.
    match page::page_at(place.vma, addr) {
        Some(held) if held.page() == page => Ok(()),
        _ => Err(Refusal::Gone),
    }
}

/// Calls `f` with the folio of a page locked. `f` may split the folio, and then says where that was
/// mapped: the pages of zeroes are taken back.
fn with_folio_locked<'g>(
    page: PageRef<'_>,
    target: &PteReplacement<'_>,
    f: impl FnOnce(&LockedPage<'_>, &mut Option<HugeMappings<'g>>) -> Result<(), Refusal>,
) -> Result<(), Refusal> {
    // SAFETY: The folio is referenced through its page.
    if !unsafe { raw::rksm_folio_mergeable(page.folio()) } || is_merged(page, target) {
        return Err(Refusal::Gone);
    }
    let locked = LockedPage::trylock(page).ok_or(Refusal::Locked)?;
    if is_poisoned(page, target) {
        return Err(Refusal::Busy);
    }
    let mut mappings = None;
    let result = f(&locked, &mut mappings);
    drop(locked);
    if let Some(mappings) = mappings {
        mappings.take_back_zero_pages();
    }
    result
}

/// Returns whether a page is a merged page that cannot be replaced by `target`.
fn is_merged(page: PageRef<'_>, target: &PteReplacement<'_>) -> bool {
    page.is_ksm() && !matches!(target, PteReplacement::KsmPage(_))
}

/// [`split`] for a folio that is locked.
///
/// Looks at everything that can be known before references are given up.
fn split_locked<'g>(
    place: MappedVma<'g>,
    addr: usize,
    &LockedPage(page): &LockedPage<'_>,
    split: &mut Split<'_, impl HugeFolioRefs>,
) -> Result<HugeMappings<'g>, Refusal> {
    let held = page::page_at(place.vma, addr).ok_or(Refusal::Gone)?;
    if held.page() != page {
        return Err(Refusal::Gone);
    }
    if held.uffd() {
        return Err(Refusal::Userfault);
    }
    drop(held);
    if split.is_blocked(page) {
        return Err(Refusal::Unsplit);
    }
    let mappings = HugeMappings::find(place.live, addr, page, split.use_zero_pages)?;
    split.huge.release(HugeId(page.folio() as usize));
    // SAFETY: The folio of `page` is referenced and locked. On success the lock and the reference
    // pass to the small folio of `page`.
    match unsafe { raw::rksm_split_huge_page(page.as_ptr()) } {
        0 => Ok(mappings),
        _ => Err(Refusal::Unsplit),
    }
}

/// [`share`] for a folio that is locked.
///
/// # Safety
///
/// The folio is a small one.
unsafe fn share_locked(
    mm: LiveMm<'_>,
    vma: &VmaRef,
    addr: usize,
    &LockedPage(page): &LockedPage<'_>,
    target: &PteReplacement<'_>,
) -> Result<(), Refusal> {
    let folio = page.folio();
    // It may have become a merged page while it was not locked.
    if is_merged(page, target) {
        return Err(Refusal::Gone);
    }
    // SAFETY: The page is referenced and its folio locked.
    if unsafe {
        raw::rksm_page_anon_exclusive(page.as_ptr()) && raw::rksm_folio_pinned_beyond(folio, 1)
    } {
        // Counted again below, where it is final: this spares users of a page that is pinned for
        // long the bracket.
        return Err(Refusal::Pinned);
    }
    race_window::sleep();
    let _bracket = Invalidate::new(mm, addr);
    let pte = PteGuard::lock(vma, addr).ok_or(Refusal::Gone)?;
    let entry = pte.get();
    // SAFETY: Looks at the entry's bits.
    if !unsafe { raw::rksm_pte_maps(entry, page.as_ptr()) } {
        return Err(Refusal::Gone);
    }
    // SAFETY: Looks at the entry's bits.
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
        // SAFETY: What has been cleared.
        unsafe { pte.set(entry) };
        return Err(Refusal::Pinned);
    }
    if !matches_target(page, target) {
        // SAFETY: What has been cleared.
        unsafe { pte.set(entry) };
        return Err(Refusal::Differs);
    }
    // SAFETY: The page table lock is held, the entry cleared and flushed, as the function demands.
    if exclusive && unsafe { raw::rksm_folio_try_share_anon_rmap_pte(folio, page.as_ptr()) } != 0 {
        // SAFETY: What has been cleared.
        unsafe { pte.set(entry) };
        return Err(Refusal::Pinned);
    }
    // SAFETY: The folio is referenced, locked and by the contract small; the entry is clear. It
    // gets the page that it had, or one that a reference and a mapping count have been taken for. A
    // node is freed only when no folio names it.
    unsafe {
        if raw::rksm_pte_dirty(entry) {
            raw::rksm_folio_mark_dirty(folio);
        }
        match target {
            PteReplacement::InPlace(node) => {
                pte.set(raw::rksm_pte_wrprotect_clean(entry));
                raw::rksm_folio_set_mapping(folio, node.mapping().as_raw());
                raw::rksm_folio_mark_accessed(folio);
                raw::rksm_folio_keep(folio);
            }
            PteReplacement::KsmPage(kfolio) => {
                raw::rksm_folio_keep(kfolio.as_ptr());
                raw::rksm_folio_get(kfolio.as_ptr());
                let new = raw::rksm_map_ksm_page(kfolio.as_ptr(), pte.vma(), addr, entry);
                pte.set(new);
                raw::rksm_unmap_anon_page(folio, page.as_ptr(), pte.vma());
            }
            PteReplacement::ZeroPage => {
                let new = raw::rksm_map_ksm_zero_page(pte.vma(), addr, entry);
                pte.set(new);
                raw::rksm_unmap_anon_page(folio, page.as_ptr(), pte.vma());
            }
        }
    }
    Ok(())
}

/// Unshares merged pages in a part of a vma, at most `faults` of them, and adds their number to
/// `pages`.
///
/// Returns where to go on, or `None` when nothing merged is left. `_user` pins the vma's mm: a
/// fault can put a page back into an address space that is being torn down.
///
/// # Errors
///
/// `ENOMEM` where a fault could not be served; `ERESTARTSYS` where a signal is pending.
pub(crate) fn break_ksm(
    _user: &MmUser<'_>,
    vma: &VmaRef,
    part: Range<usize>,
    faults: usize,
    pages: &mut u64,
) -> kernel::error::Result<Option<usize>> {
    let Range { start: mut at, end } = part;
    let mut tables = MAX_TABLES;
    let mut last = None;
    for _ in 0..faults {
        if at >= end {
            return Ok(None);
        }
        let addr = match page::find_merged(vma, at, end, &mut tables)? {
            Search::Found(addr) => addr,
            Search::Stopped(next) => return Ok(Some(next)),
            Search::End => return Ok(None),
        };
        // A fault may have backed out.
        *pages += u64::from(last.replace(addr) != Some(addr));
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
pub(crate) fn unmerge_one(user: &MmUser<'_>, addr: usize) {
    let guard = user.mm().mmap_read_lock_briefly();
    let live = guard.as_ref().and_then(MmapReadGuard::live);
    let Some(vma) = live.and_then(|live| page::mergeable_at(live, addr)) else {
        return;
    };
    let end = addr + PAGE_SIZE;
    let mut at = addr;
    while let Ok(Some(next)) = break_ksm(user, vma, at..end, 4, &mut 0) {
        if next >= end {
            break;
        }
        at = next;
    }
}
