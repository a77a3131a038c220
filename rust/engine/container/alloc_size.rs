// SPDX-License-Identifier: GPL-2.0-only

//! What an allocation really costs, and vectors that give memory back.

use kernel::{
    alloc::{
        Allocator,
        Flags,
        Vec, //
    },
    prelude::*, //
};

/// Flags for a smaller copy of something: it saves memory, but is not worth a wait for reclaim.
pub(crate) const GFP_SHRINK: Flags = GFP_NOWAIT;

/// Returns the memory that the kernel gives out for an allocation of `size` bytes: the object size
/// of the `kmalloc` cache, or a power of two of pages.
pub(crate) const fn allocated_bytes(size: usize) -> usize {
    match size {
        0 => 0,
        1..=8 => 8,
        65..=96 => 96,
        129..=192 => 192,
        _ => size.next_power_of_two(),
    }
}

/// Returns the memory that the buffer of a vector takes, in bytes.
pub(crate) fn vec_bytes<T, A: Allocator>(v: &Vec<T, A>) -> usize {
    allocated_bytes(v.capacity() * size_of::<T>())
}

/// Moves the elements to a buffer of half the size if that leaves room to grow.
///
/// Does nothing if there is no memory for the new buffer.
pub(crate) fn shrink<T: Copy, A: Allocator>(v: &mut Vec<T, A>, min_capacity: usize) {
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
