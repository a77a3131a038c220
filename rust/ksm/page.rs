// SPDX-License-Identifier: GPL-2.0-only

//! One page: what is mapped at an address, and where a merged page is mapped.

use crate::engine::{
    content_hash::ContentKey,
    types::MmPin, //
};
use crate::{
    bindings::raw,
    kernel_ext::{
        folio::{
            FolioMapping,
            PageRef, //
        },
        mm::{
            anon_vma,
            LiveMm,
            PinnedMm, //
        },
        wait::signal_pending, //
    }, //
};
use core::ptr::NonNull;
use kernel::{
    mm::virt::{
        flags as vm,
        VmaRef, //
    },
    page::PAGE_SIZE,
    prelude::*, //
};

impl MmPin for PinnedMm {
    fn key(&self) -> usize {
        self.as_ptr() as usize
    }

    fn exiting(&self) -> bool {
        self.ksm_test_exit()
    }

    fn clone_pin(&self) -> Self {
        self.clone()
    }
}

/// What [`mergeable_from`] finds.
pub(super) enum NextVma<'g> {
    /// A vma.
    Found(&'g VmaRef),
    /// None that begins below this address, where the search has ended early.
    Stopped(usize),
    /// None at all.
    End,
}

/// Looks for the first vma that ends above `addr` and may hold mergeable pages: `VM_MERGEABLE`,
/// with an `anon_vma`. `step` is asked before each vma whether the search goes on; behind `end` it
/// does not.
///
/// # Context
///
/// May sleep if `step` does. The mmap lock is held, as `mm` shows.
pub(super) fn mergeable_from(
    mm: LiveMm<'_>,
    addr: usize,
    end: usize,
    mut step: impl FnMut() -> bool,
) -> NextVma<'_> {
    let mut at = addr;
    loop {
        if !step() {
            return NextVma::Stopped(at);
        }
        let Some(vma) = mm.find_vma(at) else {
            return NextVma::End;
        };
        if mergeable(vma) {
            return NextVma::Found(vma);
        }
        at = vma.end();
        if at >= end {
            return NextVma::Stopped(at);
        }
    }
}

/// Returns the mergeable vma at `addr`.
///
/// # Context
///
/// The mmap lock is held, as `mm` shows.
pub(super) fn mergeable_at(mm: LiveMm<'_>, addr: usize) -> Option<&VmaRef> {
    mm.find_vma(addr)
        .filter(|vma| vma.start() <= addr && mergeable(vma))
}

/// Returns whether a vma may hold mergeable pages.
///
/// # Context
///
/// The mmap lock is held, as a [`VmaRef`] shows.
pub(super) fn mergeable(vma: &VmaRef) -> bool {
    vma.flags() & vm::MERGEABLE != 0 && !anon_vma(vma).is_null()
}

/// Returns the folio of a mapped page if its kind can be merged: anonymous, not of a device.
///
/// # Context
///
/// Any.
///
/// # Safety
///
/// The page is mapped by a page table whose lock the caller holds, or referenced.
pub(super) unsafe fn candidate_folio(page: NonNull<raw::page>) -> Option<NonNull<raw::folio>> {
    // SAFETY: The page is mapped by the contract, so its folio does not change.
    let folio = NonNull::new(unsafe { raw::rksm_page_folio(page.as_ptr()) })?;
    // SAFETY: By the contract the page is mapped or referenced, so its folio is valid.
    unsafe { raw::rksm_folio_mergeable(folio.as_ptr()) }.then_some(folio)
}

/// What an entry of a page table maps.
///
/// # Invariants
///
/// Where there is a page, a page table that is locked for `'l` maps it and its folio, and so the
/// folio whose word `mapping` is.
pub(crate) struct Mapped<'l>(&'l mut raw::rksm_mapped);

impl<'l> Mapped<'l> {
    /// Wraps what has been read of an entry.
    ///
    /// # Safety
    ///
    /// If `raw` has a page, a page table that is locked for as long as the result is used maps it
    /// and its folio, and so the folio whose word `mapping` is.
    pub(super) unsafe fn new(raw: &'l mut raw::rksm_mapped) -> Self {
        // INVARIANT: By the contract.
        Self(raw)
    }

    /// The page, and the folio that it is part of.
    pub(super) fn page(&self) -> Option<(NonNull<raw::page>, NonNull<raw::folio>)> {
        Some((NonNull::new(self.0.page)?, NonNull::new(self.0.folio)?))
    }

    /// The `mapping` word of the folio.
    pub(super) fn mapping(&self) -> FolioMapping {
        FolioMapping::from_raw(self.0.mapping)
    }

    /// The NUMA node of the page.
    pub(super) fn nid(&self) -> u32 {
        self.0.nid as u32
    }

    /// Whether the page may have been accessed since a walk last cleared its accessed bit.
    pub(super) fn accessed(&self) -> bool {
        self.0.accessed
    }

    /// Counts the page as accessed.
    pub(super) fn set_accessed(&mut self) {
        self.0.accessed = true;
    }

    /// Whether it is a zero page that KSM has placed, instead of a page.
    pub(super) fn ksm_zero(&self) -> bool {
        self.0.ksm_zero
    }
}

/// A page with a reference to the folio that it is part of.
///
/// The guard follows the page: when a huge folio is split, its reference passes to the small folio
/// of the page for which it was split.
///
/// # Invariants
///
/// Owns one reference to the page's folio.
pub(crate) struct PageGuard {
    page: NonNull<raw::page>,
    uffd: bool,
}

impl PageGuard {
    /// The page.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn page(&self) -> PageRef<'_> {
        // SAFETY: By the invariant, and the result borrows the guard.
        unsafe { PageRef::new(self.page) }
    }

    /// Returns the page, and passes its reference to the caller.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn into_page(self) -> NonNull<raw::page> {
        core::mem::ManuallyDrop::new(self).page
    }

    /// Returns whether the entry that maps the page was protected for a userfaultfd.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn uffd(&self) -> bool {
        self.uffd
    }
}

impl Drop for PageGuard {
    fn drop(&mut self) {
        // SAFETY: The page is referenced, so its folio does not change meanwhile; the guard owns
        // the reference.
        unsafe { raw::rksm_folio_put(self.page().folio()) };
    }
}

/// Returns the page that is mapped at `addr` of `vma`, if its kind can be merged.
///
/// # Context
///
/// May sleep. The mmap lock is held. Takes the page table lock, and releases it.
pub(crate) fn page_at(vma: &VmaRef, addr: usize) -> Option<PageGuard> {
    let (mut page, mut uffd) = (core::ptr::null_mut(), false);
    // SAFETY: The vma is valid, and its mm's lock is held. An address outside of it is refused.
    let folio =
        unsafe { raw::rksm_folio_walk_get(vma.as_ptr().cast(), addr, &mut page, &mut uffd) };
    if folio.is_null() {
        return None;
    }
    // INVARIANT: The shim has taken a reference to the folio of the page.
    NonNull::new(page).map(|page| PageGuard { page, uffd })
}

/// What [`find_merged`] finds.
pub(crate) enum Search {
    /// A merged page or a KSM-placed zero page is mapped at this address.
    Found(usize),
    /// None below this address, where the search has ended early.
    Stopped(usize),
    /// None at all.
    End,
}

/// Most page tables, of any level, that searches enter under one mmap lock.
pub(super) const MAX_TABLES: usize = 512;

/// What [`find_merged`] hands to its callbacks.
struct Finder<'a> {
    /// Page tables that may still be entered.
    tables: &'a mut usize,
    result: Search,
}

impl Finder<'_> {
    /// Counts a page table that is to be entered at `addr`. Returns what the walk's callback is to
    /// return, which is not 0 if the walk ends there.
    fn enter(&mut self, addr: usize) -> c_int {
        // SAFETY: May sleep: a walk under the mmap lock holds no spinlock.
        unsafe { raw::rksm_cond_resched() };
        if signal_pending() {
            return -(raw::ERESTARTSYS as c_int);
        }
        if *self.tables == 0 {
            self.result = Search::Stopped(addr);
            return 1;
        }
        *self.tables -= 1;
        0
    }
}

/// Looks for the first address in `start..end` of `vma` where a merged page or a KSM-placed zero
/// page is mapped. Enters up to `tables` page tables, and subtracts them.
///
/// # Context
///
/// May sleep. The mmap lock is held. Takes one page table lock at a time.
///
/// # Errors
///
/// `ERESTARTSYS` where a signal is pending.
pub(crate) fn find_merged(
    vma: &VmaRef,
    start: usize,
    end: usize,
    tables: &mut usize,
) -> kernel::error::Result<Search> {
    let mut finder = Finder {
        tables,
        result: Search::End,
    };
    // SAFETY: The vma is valid, as its mm's lock is held for reading; a range that does not lie in
    // it is refused. The callbacks get `finder`, which outlives the call, as their private data,
    // and expect that type.
    let ret = unsafe {
        raw::rksm_walk_page_range_vma(
            vma.as_ptr().cast(),
            start,
            end,
            Some(find_table::<raw::p4d_t>),
            Some(find_table::<raw::pud_t>),
            Some(find_pmd),
            (&raw mut finder).cast::<c_void>(),
        )
    };
    kernel::error::to_result(ret)?;
    Ok(finder.result)
}

/// Counts the page table that an entry of an upper level, of type `T`, refers to.
///
/// # Safety
///
/// Called by the page walk of [`find_merged`] alone.
unsafe extern "C" fn find_table<T>(
    _entry: *mut T,
    addr: c_ulong,
    _end: c_ulong,
    mm_walk: *mut raw::mm_walk,
) -> c_int {
    // SAFETY: The private data is the `Finder` of `find_merged`, which nothing else uses during the
    // call.
    unsafe { &mut *raw::rksm_walk_private(mm_walk).cast::<Finder<'_>>() }.enter(addr)
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
    // SAFETY: The private data is the `Finder` of `find_merged`, which nothing else uses during the
    // call.
    let finder = unsafe { &mut *raw::rksm_walk_private(mm_walk).cast::<Finder<'_>>() };
    let stop = finder.enter(addr);
    if stop != 0 {
        return stop;
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
        // SAFETY: `ptep` and the entries after it, up to `end`, lie in this page table, whose lock
        // is held.
        let none = unsafe { raw::rksm_none_ptes(ptep, ((end - at) / PAGE_SIZE) as c_ulong) };
        at += none as usize * PAGE_SIZE;
        ptep = ptep.wrapping_add(none as usize);
        if at >= end {
            break;
        }
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
        finder.result = Search::Found(at);
    }
    c_int::from(hit)
}

/// Returns the hash of the current contents of a page, which may change during the call.
///
/// # Context
///
/// Any.
pub(super) fn content_hash(key: &ContentKey, page: PageRef<'_>) -> u64 {
    // SAFETY: A `PageRef` is of a page that is there.
    let words = unsafe { raw::rksm_kmap_local_page(page.as_ptr()) }.cast::<u64>();
    // SAFETY: The page is mapped until below, and `hash` asks for words that lie in it. A
    // concurrent write can only make the hash useless.
    let hash = key.hash(|i| unsafe { words.add(i).read_volatile() });
    // SAFETY: Mapped above.
    unsafe { raw::rksm_kunmap_local(words.cast()) };
    hash
}
