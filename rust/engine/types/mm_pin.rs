// SPDX-License-Identifier: GPL-2.0-only

//! A reference that keeps an `mm_struct` allocated.

/// An owned reference that keeps an `mm_struct` allocated, but not its memory: `mm_count`.
///
/// Dropping it is `mmdrop()`, which the registry leaves to its callers.
pub trait MmPin: Sized {
    /// Returns the address of the `mm_struct`, which no other mm can have while it is pinned.
    fn key(&self) -> usize;

    /// Returns whether the last user of the address space is gone (`mm_users` is zero).
    ///
    /// # Context
    ///
    /// Atomic: called under the registry's lock.
    fn exiting(&self) -> bool;

    /// Takes another reference to the same mm.
    ///
    /// # Context
    ///
    /// Atomic: called under the registry's lock.
    fn clone_pin(&self) -> Self;
}
