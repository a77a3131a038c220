// SPDX-License-Identifier: GPL-2.0-only

//! Small handles by which the parts of the engine name each other's objects, and the fingerprint by which pages
//! are compared first.
//!
//! A handle is plain data: it keeps nothing alive, and one that outlives its object names nothing, or a later object
//! in the same place.

use kernel::page::PAGE_SHIFT;

/// Pages in one range: 2 MiB of address space where pages have 4 KiB.
pub const RANGE_PAGES: usize = 512;

/// Binary logarithm of the bytes of address space in one range.
pub const RANGE_SHIFT: usize = PAGE_SHIFT + 9;

/// A registered mm: the number of its slot in the registry.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SlotId(pub u32);

/// A stable node: one merged page, and the mappings that share it.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct NodeId(pub u32);

/// A stable rmap item: one mapping of a merged page.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ItemId(pub u32);

/// A range: the tracked pages in one naturally aligned piece of [`RANGE_PAGES`] pages of one mm.
///
/// # Invariants
///
/// 1. The number is below [`RangeId::LIMIT`].
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct RangeId(u32);

impl RangeId {
    /// Number of ranges that can be named; with it, a [`PageRef`] takes 40 bits.
    pub const LIMIT: u32 = 1 << 31;

    /// Returns the handle with this number, `None` if it is too large.
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

/// A tracked page: its range, and its place in there.
///
/// # Invariants
///
/// 1. `offset` is below [`RANGE_PAGES`].
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PageRef {
    range: RangeId,
    offset: u16,
}

impl PageRef {
    /// Number of bits that [`PageRef::to_bits`] uses.
    pub const BITS: u32 = 40;

    /// Names page `offset % RANGE_PAGES` of a range.
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

    /// Returns the page's place in its range, in pages.
    #[inline]
    pub const fn offset(self) -> usize {
        self.offset as usize
    }

    /// Packs the handle into the low [`PageRef::BITS`] bits.
    #[inline]
    pub const fn to_bits(self) -> u64 {
        (self.range.0 as u64) << 9 | self.offset as u64
    }

    /// Unpacks what [`PageRef::to_bits`] packed; higher bits are ignored.
    #[inline]
    pub const fn from_bits(bits: u64) -> Self {
        // INVARIANT: The mask keeps 1. of `RangeId`, and `new()` keeps 1. of `PageRef`.
        Self::new(
            RangeId((bits >> 9) as u32 & (RangeId::LIMIT - 1)),
            bits as usize,
        )
    }
}

/// What remains of a page's content for a first comparison.
///
/// Pages of different fingerprints differ, or lie in different domains; pages of equal fingerprints still have to be
/// compared byte for byte.
///
/// # Invariants
///
/// 1. Only the low [`Fingerprint::BITS`] bits are used.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Fingerprint(u64);

impl Fingerprint {
    /// Number of significant bits.
    pub const BITS: u32 = 54;

    /// The fingerprint that a page has before it was first looked at.
    pub const NONE: Self = Self(0);

    /// Mixes a hash of the content with the domain in which pages may be merged (the NUMA node where
    /// `merge_across_nodes` is off, else 0).
    #[inline]
    pub const fn new(hash: u64, domain: u32) -> Self {
        // One odd multiplication between two xorshifts is a bijection: no two hashes of one domain meet here, only in the
        // bits cut off. The product's high bits depend on all of its input, so those are kept.
        let seeded = hash ^ (domain as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (seeded ^ seeded >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
        Self::from_bits((mixed ^ mixed >> 32) >> (u64::BITS - Self::BITS))
    }

    /// Returns the significant bits.
    #[inline]
    pub const fn to_bits(self) -> u64 {
        self.0
    }

    /// Makes a fingerprint of its significant bits; higher ones are ignored.
    #[inline]
    pub const fn from_bits(bits: u64) -> Self {
        // INVARIANT: The mask keeps 1.
        Self(bits & ((1 << Self::BITS) - 1))
    }
}
