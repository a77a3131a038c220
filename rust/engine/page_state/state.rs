// SPDX-License-Identifier: GPL-2.0-only

//! The word that is kept of each page.

use super::super::{
    smart_scan::{
        History,
        MAX_AGE, //
    },
    types::{
        Fingerprint,
        ItemId, //
    },
};

use kernel::prelude::*;

/// What is known of one page.
///
/// A page is `Tracked` from when it is first seen, becomes `Merged` when its mapping is replaced by
/// one of a merged page, and `Tracked` again when that mapping was broken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PageState {
    /// Not merged.
    Tracked(Tracked),
    /// Mapped to a merged page, by this rmap item.
    Merged(ItemId),
}

pub(super) const FINGERPRINT_MASK: u64 = Fingerprint::from_bits(u64::MAX).to_bits();
const AGE_SHIFT: u32 = Fingerprint::BITS;
const SKIPS_SHIFT: u32 = AGE_SHIFT + 4;
const HISTORY_MASK: u64 = 0xff << AGE_SHIFT;
const SETTLED: u64 = 1 << (SKIPS_SHIFT + 4);
pub(super) const INDEXED: u64 = SETTLED << 1;
pub(super) const MERGED: u64 = 1 << 63;

/// The bits of what something else refers to.
pub(super) const LINKED: u64 = MERGED | INDEXED;

static_assert!(INDEXED < MERGED && MERGED == 1 << ItemId::BITS);

impl PageState {
    /// State of a page that was never looked at.
    pub const NEW: Self = Self::Tracked(Tracked::NEW);

    /// State of a page whose merged page has been freed. What is there now was never looked at.
    pub const ORPHANED: Self = Self::Tracked(Tracked::ORPHANED);

    #[inline]
    pub(super) fn to_bits(self) -> u64 {
        match self {
            Self::Tracked(Tracked(bits)) => bits,
            Self::Merged(item) => MERGED | item.get(),
        }
    }

    #[inline]
    pub(super) fn from_bits(bits: u64) -> Self {
        match bits & MERGED {
            0 => Self::Tracked(Tracked(bits)),
            _ => Self::Merged(ItemId::new(bits)),
        }
    }
}

/// What is known of a page that is not merged, as it is stored.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Tracked(u64);

impl Tracked {
    /// A page that was never looked at.
    pub const NEW: Self = Self(Fingerprint::NONE.to_bits());

    /// The same, of an address that was merged when the merged page was freed. No content is
    /// settled that is not known, so this is no state of a page that was looked at.
    pub const ORPHANED: Self = Self::NEW.with_settled(true);

    /// Returns the fingerprint of the content when it was last read.
    #[inline]
    pub const fn fingerprint(self) -> Fingerprint {
        Fingerprint::from_bits(self.0)
    }

    /// Returns what smart scan remembers.
    #[inline]
    pub const fn history(self) -> History {
        History {
            age: (self.0 >> AGE_SHIFT) as u8 & MAX_AGE,
            skips: (self.0 >> SKIPS_SHIFT) as u8 & MAX_AGE,
        }
    }

    /// Returns whether the accessed bit was clear when the content was read: an access since then
    /// has set it.
    #[inline]
    pub const fn is_settled(self) -> bool {
        self.0 & SETTLED != 0
    }

    /// Returns whether the page was merged and has not been looked at since its merged page was
    /// freed.
    #[inline]
    pub const fn is_orphaned(self) -> bool {
        self.is_settled() && self.0 & FINGERPRINT_MASK == Fingerprint::NONE.to_bits()
    }

    /// Returns whether the index has a candidate entry for the page, under its fingerprint.
    #[inline]
    pub const fn is_indexed(self) -> bool {
        self.0 & INDEXED != 0
    }

    /// Returns the same page with another content, which is not in the index.
    #[inline]
    pub const fn with_fingerprint(self, fingerprint: Fingerprint) -> Self {
        let rest = self.0 & !(FINGERPRINT_MASK | INDEXED);
        Self(rest | fingerprint.to_bits())
    }

    /// Returns the same page with another history. Ages and skips above [`MAX_AGE`] are stored as
    /// that.
    #[inline]
    pub fn with_history(self, history: History) -> Self {
        let age = u64::from(history.age.min(MAX_AGE)) << AGE_SHIFT;
        let skips = u64::from(history.skips.min(MAX_AGE)) << SKIPS_SHIFT;
        Self(self.0 & !HISTORY_MASK | age | skips)
    }

    /// Returns the same page with its content settled, or not.
    #[inline]
    pub const fn with_settled(self, settled: bool) -> Self {
        Self(self.0 & !SETTLED | if settled { SETTLED } else { 0 })
    }

    /// Returns the same page in the index, or not.
    #[inline]
    pub const fn with_indexed(self, indexed: bool) -> Self {
        Self(self.0 & !INDEXED | if indexed { INDEXED } else { 0 })
    }
}
