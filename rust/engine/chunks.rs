// SPDX-License-Identifier: GPL-2.0-only

//! Memory in pieces of a page: arrays that grow without ever being copied as a whole, and what they cost.

use kernel::{
    alloc::{
        AllocError,
        Allocator,
        Flags,
        Vec, //
    },
    page::PAGE_SIZE,
    prelude::*, //
};

/// For memory that makes something smaller: worth having, but not worth waiting for.
pub(super) const GFP_SHRINK: Flags = GFP_NOWAIT;

/// Returns how many bytes the kernel really gives out for an allocation of `size` bytes: the object size of the
/// `kmalloc` cache, or pages in powers of two.
pub(super) const fn allocated_bytes(size: usize) -> usize {
    match size {
        0 => 0,
        1..=8 => 8,
        65..=96 => 96,
        129..=192 => 192,
        _ => size.next_power_of_two(),
    }
}

/// Returns how many bytes the buffer of a vector takes.
pub(super) const fn vec_bytes<T, A: Allocator>(v: &Vec<T, A>) -> usize {
    allocated_bytes(v.capacity() * size_of::<T>())
}

/// Moves the elements to a buffer half the size if that leaves room to grow. Does nothing if there is no memory for it.
pub(super) fn shrink<T: Copy, A: Allocator>(v: &mut Vec<T, A>, min_capacity: usize) {
    let half = v.capacity() / 2;
    if v.len() > half / 2 || half < min_capacity {
        return;
    }
    if let Ok(mut smaller) = Vec::with_capacity(half, GFP_SHRINK) {
        if smaller.extend_from_slice(v, GFP_SHRINK).is_ok() {
            *v = smaller;
        }
    }
}

/// An array that grows and shrinks at its end, a page of memory at a time.
///
/// # Invariants
///
/// 1. Element `i` is the `i % PER_CHUNK`th of chunk `i / PER_CHUNK`; chunks after the last element are empty.
/// 2. Every chunk has capacity for `PER_CHUNK` elements.
/// 3. `len` is the number of elements in all chunks.
pub(super) struct Chunks<T> {
    chunks: KVVec<KVec<T>>,
    len: usize,
}

impl<T> Chunks<T> {
    const SHIFT: u32 = (PAGE_SIZE / size_of::<T>()).ilog2();

    /// Number of elements in a chunk.
    pub(super) const PER_CHUNK: usize = 1 << Self::SHIFT;

    /// Creates an empty array, without allocating.
    pub(super) const fn new() -> Self {
        // INVARIANT: 1. to 3. hold for no chunks.
        Self {
            chunks: KVVec::new(),
            len: 0,
        }
    }

    /// Returns the number of elements.
    #[inline]
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// Returns element `i`.
    #[inline]
    pub(super) fn get(&self, i: usize) -> Option<&T> {
        self.chunks
            .get(i >> Self::SHIFT)?
            .get(i & (Self::PER_CHUNK - 1))
    }

    /// Returns element `i` for writing.
    #[inline]
    pub(super) fn get_mut(&mut self, i: usize) -> Option<&mut T> {
        self.chunks
            .get_mut(i >> Self::SHIFT)?
            .get_mut(i & (Self::PER_CHUNK - 1))
    }

    /// Makes the next `additional` calls of [`Chunks::push`] succeed.
    ///
    /// # Errors
    ///
    /// `AllocError` if there is no memory for that.
    #[inline]
    pub(super) fn reserve(&mut self, additional: usize, flags: Flags) -> Result<(), AllocError> {
        while self.chunks.len() << Self::SHIFT < self.len + additional {
            // INVARIANT: 1. The new chunk is empty. 2. It has that capacity.
            let chunk = KVec::with_capacity(Self::PER_CHUNK, flags)?;
            self.chunks.push(chunk, flags)?;
        }
        Ok(())
    }

    /// Appends an element.
    ///
    /// # Errors
    ///
    /// `AllocError` if there is no memory for it.
    #[inline]
    pub(super) fn push(&mut self, value: T, flags: Flags) -> Result<(), AllocError> {
        self.reserve(1, flags)?;
        let chunk = self.chunks.get_mut(self.len >> Self::SHIFT);
        let Some(chunk) = chunk else {
            return Err(AllocError);
        };
        // INVARIANT: 1. The chunk holds `len % PER_CHUNK` elements so far. 3. One element more.
        chunk.push(value, flags)?;
        self.len += 1;
        Ok(())
    }

    /// Removes the last element. Keeps at most one chunk of memory that is not needed.
    pub(super) fn pop(&mut self) -> Option<T> {
        let last = self.len.checked_sub(1)?;
        let value = self.chunks.get_mut(last >> Self::SHIFT)?.pop();
        // INVARIANT: 1. Only an empty chunk is dropped, and from the end. 3. One element fewer.
        self.len = last;
        if self.chunks.len() > last.div_ceil(Self::PER_CHUNK) + 1 {
            self.chunks.pop();
        }
        value
    }

    /// Returns how many bytes of memory the array takes.
    pub(super) fn bytes(&self) -> usize {
        vec_bytes(&self.chunks)
            + self.chunks.len() * allocated_bytes(Self::PER_CHUNK * size_of::<T>())
    }
}
