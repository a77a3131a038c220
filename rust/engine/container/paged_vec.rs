// SPDX-License-Identifier: GPL-2.0-only

//! A vector that never has to be copied to grow.

use super::alloc_size::{
    allocated_bytes,
    vec_bytes, //
};

use kernel::{
    alloc::{
        AllocError,
        Flags, //
    },
    page::PAGE_SIZE,
    prelude::*, //
};

/// A vector in pages of memory, which grows and shrinks at its end without moving an element.
///
/// Like the kernel's `genradix`, but it shrinks as well, and has an array of pages instead of a
/// tree.
///
/// # Invariants
///
/// 1. Element `i` is the `i % PER_PAGE`th of page `i / PER_PAGE`; pages after the last element are
///    empty.
/// 2. Every page has capacity for `PER_PAGE` elements.
/// 3. `len` is the number of elements in all pages.
pub(crate) struct PagedVec<T> {
    pages: KVVec<KVec<T>>,
    len: usize,
}

impl<T> PagedVec<T> {
    const SHIFT: u32 = (PAGE_SIZE / size_of::<T>()).ilog2();

    /// Number of elements in a page.
    pub(crate) const PER_PAGE: usize = 1 << Self::SHIFT;

    /// Returns an empty vector, without allocating.
    pub(crate) const fn new() -> Self {
        // INVARIANT: 1. to 3. hold without pages.
        Self {
            pages: KVVec::new(),
            len: 0,
        }
    }

    /// Returns the number of elements.
    #[inline]
    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// Returns element `i`.
    #[inline]
    pub(crate) fn get(&self, i: usize) -> Option<&T> {
        self.pages
            .get(i >> Self::SHIFT)?
            .get(i & (Self::PER_PAGE - 1))
    }

    /// Returns element `i` for writing.
    #[inline]
    pub(crate) fn get_mut(&mut self, i: usize) -> Option<&mut T> {
        self.pages
            .get_mut(i >> Self::SHIFT)?
            .get_mut(i & (Self::PER_PAGE - 1))
    }

    /// Reserves memory, so that the next `additional` calls of [`PagedVec::push`] succeed.
    ///
    /// # Errors
    ///
    /// `AllocError` if there is no memory for them.
    #[inline]
    pub(crate) fn reserve(&mut self, additional: usize, flags: Flags) -> Result<(), AllocError> {
        while self.pages.len() << Self::SHIFT < self.len + additional {
            // INVARIANT: 1. The new page is empty. 2. It has that capacity.
            let page = KVec::with_capacity(Self::PER_PAGE, flags)?;
            self.pages.push(page, flags)?;
        }
        Ok(())
    }

    /// Appends an element.
    ///
    /// # Errors
    ///
    /// `AllocError` if there is no memory for it.
    #[inline]
    pub(crate) fn push(&mut self, value: T, flags: Flags) -> Result<(), AllocError> {
        self.reserve(1, flags)?;
        let page = self.pages.get_mut(self.len >> Self::SHIFT);
        let Some(page) = page else {
            return Err(AllocError);
        };
        // INVARIANT: 1. The page holds `len % PER_PAGE` elements so far. 3. One element more.
        page.push(value, flags)?;
        self.len += 1;
        Ok(())
    }

    /// Removes the last element. Keeps at most one page that is not needed.
    pub(crate) fn pop(&mut self) -> Option<T> {
        let last = self.len.checked_sub(1)?;
        let value = self.pages.get_mut(last >> Self::SHIFT)?.pop();
        // INVARIANT: 1. Only an empty page is dropped, and from the end. 3. One element fewer.
        self.len = last;
        if self.pages.len() > last.div_ceil(Self::PER_PAGE) + 1 {
            self.pages.pop();
        }
        value
    }

    /// Returns the memory that the vector takes, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        vec_bytes(&self.pages) + self.pages.len() * allocated_bytes(Self::PER_PAGE * size_of::<T>())
    }
}
