// SPDX-License-Identifier: GPL-2.0-only

//! Fallible allocation.

pub mod allocator;
pub mod kbox;
pub mod kvec;

pub use self::kbox::{
    Box,
    KBox,
    KVBox,
    VBox, //
};
pub use self::kvec::{
    KVVec,
    KVec,
    VVec,
    Vec, //
};

pub use self::allocator::Allocator;

/// Indicates an allocation error.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct AllocError;

/// Flags to be used when allocating memory.
#[derive(Clone, Copy, PartialEq)]
pub struct Flags(u32);

impl Flags {
    /// Check whether `flags` is contained in `self`.
    pub fn contains(self, flags: Flags) -> bool {
        (self & flags) == flags
    }
}

impl core::ops::BitOr for Flags {
    type Output = Self;
    fn bitor(self, rhs: Self) -> Self::Output {
        Self(self.0 | rhs.0)
    }
}

impl core::ops::BitAnd for Flags {
    type Output = Self;
    fn bitand(self, rhs: Self) -> Self::Output {
        Self(self.0 & rhs.0)
    }
}

impl core::ops::Not for Flags {
    type Output = Self;
    fn not(self) -> Self::Output {
        Self(!self.0)
    }
}

/// Allocation flags.
pub mod flags {
    use super::Flags;

    /// Zeroes out the allocated memory.
    pub const __GFP_ZERO: Flags = Flags(1 << 0);

    /// Suppresses allocation failure reports.
    pub const __GFP_NOWARN: Flags = Flags(1 << 1);

    /// May not sleep, may use the reserves.
    pub const GFP_ATOMIC: Flags = Flags(1 << 2);

    /// May sleep and reclaim.
    pub const GFP_KERNEL: Flags = Flags(1 << 3);

    /// [`GFP_KERNEL`], charged to the memory cgroup.
    pub const GFP_KERNEL_ACCOUNT: Flags = Flags((1 << 3) | (1 << 4));

    /// May neither sleep nor use the reserves.
    pub const GFP_NOWAIT: Flags = Flags(1 << 5);
}
