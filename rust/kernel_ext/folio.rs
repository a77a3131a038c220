// SPDX-License-Identifier: GPL-2.0-only

//! References to folios and their pages, their lock, and their `mapping` word.
//!
//! C headers: [`include/linux/mm.h`](srctree/include/linux/mm.h),
//! [`include/linux/pagemap.h`](srctree/include/linux/pagemap.h)

use crate::{
    bindings::raw,
    kernel_ext::symbols::Symbols, //
};
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};

const FOLIO_MAPPING_ANON: usize = raw::FOLIO_MAPPING_ANON as usize;

/// Both bits are set for a merged page.
const FOLIO_MAPPING_KSM: usize = FOLIO_MAPPING_ANON | raw::FOLIO_MAPPING_ANON_KSM as usize;

/// The `mapping` word of a folio: a pointer and the `FOLIO_MAPPING_*` bits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct FolioMapping(usize);

impl FolioMapping {
    /// The word of a merged page that belongs to no stable node.
    pub(crate) const KSM_WITHOUT_NODE: Self = Self::ksm(0);

    /// A word that was read from a folio.
    pub(crate) const fn from_raw(word: usize) -> Self {
        Self(word)
    }

    /// The word of the merged page of the `struct ksm_stable_node` at this address.
    pub(crate) const fn ksm(stable_node: usize) -> Self {
        Self(stable_node | FOLIO_MAPPING_KSM)
    }

    /// The word as the folio has it.
    pub(crate) const fn as_raw(self) -> usize {
        self.0
    }

    /// Whether the page is anonymous, and not merged.
    pub(crate) const fn is_plain_anon(self) -> bool {
        self.0 & FOLIO_MAPPING_KSM == FOLIO_MAPPING_ANON
    }

    /// The address of the stable node of a merged page: 0 for [`Self::KSM_WITHOUT_NODE`],
    /// `None` for other pages.
    pub(crate) fn stable_node(self) -> Option<usize> {
        (self.0 & FOLIO_MAPPING_KSM == FOLIO_MAPPING_KSM).then_some(self.0 & !FOLIO_MAPPING_KSM)
    }
}

/// A page whose folio somebody holds a reference to.
///
/// # Invariants
///
/// For `'a` there is a reference to the folio that the page is part of, or the page is reserved.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageRef<'a>(NonNull<raw::page>, PhantomData<&'a FolioRef>);

impl PageRef<'_> {
    /// Borrows somebody's reference.
    ///
    /// # Safety
    ///
    /// For as long as the result is used there is a reference to the folio that the page is part
    /// of, also if that is split meanwhile; or the page is reserved.
    #[inline]
    pub(crate) unsafe fn new(page: NonNull<raw::page>) -> Self {
        // INVARIANT: By the contract.
        Self(page, PhantomData)
    }

    /// The page.
    #[inline]
    pub(crate) fn as_non_null(self) -> NonNull<raw::page> {
        self.0
    }

    /// The page.
    #[inline]
    pub(crate) fn as_ptr(self) -> *mut raw::page {
        self.0.as_ptr()
    }

    /// The folio that the page is part of, which changes when a huge folio is split.
    #[inline]
    pub(crate) fn folio(self) -> *mut raw::folio {
        // SAFETY: By the invariant the folio is there.
        unsafe { raw::rksm_page_folio(self.as_ptr()) }
    }

    /// The page frame number.
    pub(crate) fn pfn(self) -> usize {
        // SAFETY: By the invariant the page is there.
        unsafe { raw::rksm_page_to_pfn(self.as_ptr()) }
    }

    /// The NUMA node.
    pub(crate) fn nid(self) -> u32 {
        // SAFETY: By the invariant the page is there.
        unsafe { raw::rksm_page_to_nid(self.as_ptr()) as u32 }
    }

    /// Whether the page is part of a large folio.
    ///
    /// # Context
    ///
    /// Any. Only the folio lock keeps a large folio from being split.
    pub(crate) fn is_large(self) -> bool {
        // SAFETY: By the invariant the folio is there.
        unsafe { raw::rksm_folio_test_large(self.folio()) }
    }

    /// Whether the page is a merged page.
    ///
    /// # Context
    ///
    /// Any. Only the folio lock keeps the answer from changing.
    pub(crate) fn is_ksm(self) -> bool {
        // SAFETY: By the invariant the folio is there.
        unsafe { raw::rksm_folio_test_ksm(self.folio()) }
    }

    /// The `mapping` word of the folio, as it is now.
    pub(crate) fn mapping(self) -> FolioMapping {
        // SAFETY: By the invariant the folio is there.
        FolioMapping(unsafe { raw::rksm_folio_mapping(self.folio()) })
    }

    /// Takes a reference to the folio.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn get(self) -> FolioRef {
        let folio = self.folio();
        // SAFETY: By the invariant there is a reference already; a page has a folio.
        // INVARIANT: A reference has been taken.
        unsafe {
            raw::rksm_folio_get(folio);
            FolioRef(NonNull::new_unchecked(folio))
        }
    }
}

/// A counted reference to a folio.
///
/// # Invariants
///
/// Owns one reference.
pub(crate) struct FolioRef(NonNull<raw::folio>);

impl FolioRef {
    /// Takes a reference to a folio unless it is being freed (`folio_try_get`).
    ///
    /// # Context
    ///
    /// Any.
    ///
    /// # Safety
    ///
    /// `folio` is a `struct page` of the memory map.
    pub(crate) unsafe fn try_get(folio: NonNull<raw::folio>) -> Option<Self> {
        // SAFETY: By the contract the memory map has a `struct page` there, so its count can be
        // read, whatever has become of the page.
        // INVARIANT: A reference has been taken.
        unsafe { raw::rksm_folio_try_get(folio.as_ptr()) }.then(|| Self(folio))
    }

    /// The folio.
    #[inline]
    pub(crate) fn as_ptr(&self) -> *mut raw::folio {
        self.0.as_ptr()
    }

    /// The first page.
    #[inline]
    pub(crate) fn page(&self) -> PageRef<'_> {
        // INVARIANT: The result borrows this reference.
        PageRef(self.0.cast(), PhantomData)
    }

    /// The `mapping` word, as it is now.
    pub(crate) fn mapping(&self) -> FolioMapping {
        // SAFETY: The folio is referenced.
        unsafe { mapping(self.0) }
    }

    /// Whether a page table maps the folio.
    ///
    /// # Context
    ///
    /// Any. The answer can change at any time unless the folio is locked.
    pub(crate) fn mapped(&self) -> bool {
        // SAFETY: The folio is referenced.
        unsafe { raw::rksm_folio_mapped(self.as_ptr()) }
    }

    /// Locks the folio.
    ///
    /// # Context
    ///
    /// May sleep. Takes the folio lock, which nests inside the mmap lock.
    pub(crate) fn lock(&self) -> FolioLock<'_> {
        // SAFETY: By the invariant of `FolioRef` the folio is referenced.
        unsafe { raw::rksm_folio_lock(self.as_ptr()) };
        // INVARIANT: The lock has been taken.
        FolioLock(self)
    }

    /// Locks the folio if it is not locked.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn trylock(&self) -> Option<FolioLock<'_>> {
        // SAFETY: The folio is referenced.
        // INVARIANT: The lock has been taken.
        unsafe { raw::rksm_folio_trylock(self.as_ptr()) }.then(|| FolioLock(self))
    }
}

impl Drop for FolioRef {
    fn drop(&mut self) {
        // SAFETY: By the invariant there is a reference to give up.
        unsafe { raw::rksm_folio_put(self.as_ptr()) };
    }
}

/// The lock of a folio. Dropping it unlocks the folio, in any context.
///
/// # Invariants
///
/// This holds the folio's lock.
pub(crate) struct FolioLock<'a>(&'a FolioRef);

impl FolioLock<'_> {
    /// The locked folio.
    pub(crate) fn folio(&self) -> &FolioRef {
        self.0
    }
}

impl Drop for FolioLock<'_> {
    fn drop(&mut self) {
        // SAFETY: By the invariant the lock is held here.
        unsafe { raw::rksm_folio_unlock(self.0.as_ptr()) };
    }
}

/// Returns the `mapping` word of a folio that need not be referenced: it may change at any time.
///
/// # Context
///
/// Any.
///
/// # Safety
///
/// `folio` is a `struct page` of the memory map.
#[inline]
pub(crate) unsafe fn mapping(folio: NonNull<raw::folio>) -> FolioMapping {
    // SAFETY: By the contract it is readable; this is `READ_ONCE`.
    FolioMapping(unsafe { raw::rksm_folio_mapping(folio.as_ptr()) })
}

/// Moves the pages in the LRU caches of all CPUs to the lists, where they hold no reference.
///
/// # Context
///
/// Sleeps until a work item has run on each CPU.
pub(crate) fn lru_add_drain_all(_symbols: Symbols) {
    // SAFETY: The caller may sleep; the function has been resolved, as `Symbols` shows.
    unsafe { raw::rksm_lru_add_drain_all() };
}
