// SPDX-License-Identifier: GPL-2.0-only

//! Handles by which the parts of the engine name each other's objects.
//!
//! A handle is plain data and keeps nothing alive. One that outlives its object names nothing, or a
//! later object in the same place.

use kernel::page::PAGE_SHIFT;

/// Pages in one range: 2 MiB of address space where pages have 4 KiB.
pub const RANGE_PAGES: usize = 512;

/// Binary logarithm of the bytes of address space in one range.
pub const RANGE_SHIFT: usize = PAGE_SHIFT + 9;

/// A registered mm: the number of its slot in the registry.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SlotId(pub u32);

/// A stable node: one merged page and the mappings that share it.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct NodeId(pub u32);

/// An rmap item on a stable node: one mapping of a merged page.
///
/// # Invariants
///
/// 1. The number has at most [`ItemId::BITS`] bits.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ItemId(u64);

impl ItemId {
    /// Number of bits that [`ItemId::get`] uses: enough for an address of the kernel, whose highest
    /// bit is set.
    pub const BITS: u32 = u64::BITS - 1;

    /// Returns the handle with this number. Ignores higher bits.
    #[inline]
    pub const fn new(number: u64) -> Self {
        // INVARIANT: 1. The higher bits are cleared.
        Self(number & (u64::MAX >> (u64::BITS - Self::BITS)))
    }

    /// Returns the number.
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// A range: the tracked pages among [`RANGE_PAGES`] naturally aligned pages of one mm.
///
/// # Invariants
///
/// 1. The number is below [`RangeId::LIMIT`].
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct RangeId(u32);

impl RangeId {
    /// Number of ranges that can be named. It makes a [`PageId`] fit into [`PageId::BITS`] bits.
    pub const LIMIT: u32 = 1 << 31;

    /// Returns the handle with this number, or `None` if the number is too large.
    #[inline]
    pub const fn new(number: u32) -> Option<Self> {
        if number < Self::LIMIT {
            // INVARIANT: 1. was just checked.
            Some(Self(number))
        } else {
            None
        }
    }

    /// Returns the number.
    #[inline]
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// A tracked page: its range and its offset in that range.
///
/// # Invariants
///
/// 1. `offset` is below [`RANGE_PAGES`].
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PageId {
    range: RangeId,
    offset: u16,
}

impl PageId {
    /// Number of bits that [`PageId::to_bits`] uses.
    pub const BITS: u32 = 40;

    /// Returns the handle of page `offset % RANGE_PAGES` of a range.
    #[inline]
    pub const fn new(range: RangeId, offset: usize) -> Self {
        // INVARIANT: 1. holds for a remainder by `RANGE_PAGES`.
        Self {
            range,
            offset: (offset % RANGE_PAGES) as u16,
        }
    }

    /// Returns the range.
    #[inline]
    pub const fn range(self) -> RangeId {
        self.range
    }

    /// Returns the page's offset in its range, in pages.
    #[inline]
    pub const fn offset(self) -> usize {
        self.offset as usize
    }

    /// Packs the handle into the low [`PageId::BITS`] bits.
    #[inline]
    pub const fn to_bits(self) -> u64 {
        (self.range.0 as u64) << 9 | self.offset as u64
    }

    /// Unpacks what [`PageId::to_bits`] packed. Ignores higher bits.
    #[inline]
    pub const fn from_bits(bits: u64) -> Self {
        // INVARIANT: The mask keeps 1. of `RangeId`, and `new()` keeps 1. of `PageId`.
        Self::new(
            RangeId((bits >> 9) as u32 & (RangeId::LIMIT - 1)),
            bits as usize,
        )
    }
}
