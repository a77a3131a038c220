// SPDX-License-Identifier: GPL-2.0-only

//! The fingerprint, by which pages are compared first.

/// A hash of a page's contents and of the domain in which it may be merged.
///
/// Pages with different fingerprints have different contents or lie in different domains. Pages
/// with equal fingerprints are compared byte for byte before they are merged.
///
/// # Invariants
///
/// 1. Only the low [`Fingerprint::BITS`] bits are used.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Fingerprint(u64);

impl Fingerprint {
    /// Number of significant bits.
    pub const BITS: u32 = 53;

    /// The fingerprint of a page that has not been hashed yet.
    pub const NONE: Self = Self(0);

    /// Mixes a hash of the contents with the domain in which pages may be merged: the NUMA node if
    /// `merge_across_nodes` is off, else 0.
    #[inline]
    pub const fn new(hash: u64, domain: u32) -> Self {
        // A multiplication by an odd number between two xorshifts is a bijection: hashes of one
        // domain collide only in the bits that are cut off. The high bits of the product depend on
        // all of its input, so those are kept.
        let seeded = hash ^ (domain as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (seeded ^ seeded >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
        Self::from_bits((mixed ^ mixed >> 32) >> (u64::BITS - Self::BITS))
    }

    /// Returns the significant bits.
    #[inline]
    pub const fn to_bits(self) -> u64 {
        self.0
    }

    /// Returns the fingerprint with these significant bits. Ignores higher bits.
    #[inline]
    pub const fn from_bits(bits: u64) -> Self {
        // INVARIANT: The mask keeps 1.
        Self(bits & ((1 << Self::BITS) - 1))
    }
}
