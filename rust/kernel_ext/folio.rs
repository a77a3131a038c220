// SPDX-License-Identifier: GPL-2.0-only

//! References to folios and their lock.

use crate::bindings::raw;
use core::ptr::NonNull;

/// A counted reference to a folio.
///
/// # Invariants
///
/// Owns one reference.
pub(crate) struct FolioRef(NonNull<raw::folio>);

impl FolioRef {
    /// Takes over a reference.
    ///
    /// # Safety
    ///
    /// The caller owns a reference to `folio`, which passes to the result.
    pub(crate) unsafe fn from_raw(folio: NonNull<raw::folio>) -> Self {
        // INVARIANT: By the contract.
        Self(folio)
    }

    /// Takes a reference to a folio unless it is being freed (`folio_try_get`).
    ///
    /// # Safety
    ///
    /// `folio` is a `struct page` of the memory map.
    pub(crate) unsafe fn try_get(folio: NonNull<raw::folio>) -> Option<Self> {
        // SAFETY: By the contract.
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
    pub(crate) fn page(&self) -> NonNull<raw::page> {
        self.0.cast()
    }

    /// The raw `mapping` word: pointer and `FOLIO_MAPPING_*` bits.
    pub(crate) fn mapping(&self) -> usize {
        mapping(self.0)
    }

    /// Whether a page table maps the folio.
    pub(crate) fn mapped(&self) -> bool {
        // SAFETY: The folio is referenced.
        unsafe { raw::rksm_folio_mapped(self.as_ptr()) }
    }

    /// Locks the folio. May sleep.
    pub(crate) fn lock(&self) -> FolioLock<'_> {
        // SAFETY: The folio is referenced.
        unsafe { raw::rksm_folio_lock(self.as_ptr()) };
        // INVARIANT: The lock has been taken.
        FolioLock(self)
    }

    /// Locks the folio if nobody else has.
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

/// The lock of a folio.
///
/// # Invariants
///
/// The folio is locked by this.
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

/// The `mapping` word of a folio that need not be referenced: it may change any time.
#[inline]
pub(crate) fn mapping(folio: NonNull<raw::folio>) -> usize {
    // SAFETY: The memory map is always readable; this is `READ_ONCE`.
    unsafe { raw::rksm_folio_mapping(folio.as_ptr()) }
}
