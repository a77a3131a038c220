// SPDX-License-Identifier: GPL-2.0-only

//! Page geometry, as on x86-64.

/// Binary logarithm of [`PAGE_SIZE`].
pub const PAGE_SHIFT: usize = 12;

/// The number of bytes in a page.
pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;

/// A bitmask that gives the page containing a given address.
pub const PAGE_MASK: usize = !(PAGE_SIZE - 1);
