// SPDX-License-Identifier: GPL-2.0-only

//! How many pages are tracked, by what is known of them.

use super::{
    super::{
        governor::pause::Found,
        types::Fingerprint, //
    },
    state::{
        FINGERPRINT_MASK,
        INDEXED,
        MERGED, //
    },
};

/// What a page is counted as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Merged,
    Unique,
    Changing,
    Fresh,
}

impl Class {
    /// The bits of a page's word that its class depends on.
    const MASK: u64 = MERGED | INDEXED | FINGERPRINT_MASK;

    /// Returns the class of a page by its word.
    #[inline]
    const fn of(bits: u64) -> Self {
        if bits & MERGED != 0 {
            Self::Merged
        } else if bits & INDEXED != 0 {
            Self::Unique
        } else if Fingerprint::from_bits(bits).to_bits() != Fingerprint::NONE.to_bits() {
            Self::Changing
        } else {
            Self::Fresh
        }
    }
}

/// The tracked pages of a range, by class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RangeCounts([u16; 4]);

impl RangeCounts {
    /// The counts of a range without pages.
    pub(super) const NONE: Self = Self([0; 4]);

    /// Counts more pages with this word.
    #[inline]
    pub(super) fn add(&mut self, bits: u64, pages: usize) {
        let count = self.of(bits);
        *count = count.wrapping_add(pages as u16);
    }

    /// Counts one page less with this word.
    #[inline]
    pub(super) fn remove(&mut self, bits: u64) {
        let count = self.of(bits);
        *count = count.wrapping_sub(1);
    }

    /// Counts that a page has another word now. Returns whether the page itself has changed: it
    /// had other contents before, which were known, or a merged page.
    #[inline]
    pub(super) fn change(&mut self, from: u64, to: u64) -> bool {
        // Most changes are of history alone.
        if (from ^ to) & Class::MASK == 0 {
            return false;
        }
        self.remove(from);
        self.add(to, 1);
        let contents = |bits: u64| match Class::of(bits) {
            Class::Merged => None,
            _ => Some(bits & FINGERPRINT_MASK),
        };
        let unknown = Some(Fingerprint::NONE.to_bits());
        match (contents(from), contents(to)) {
            (None, to) => to.is_some(),
            (from, to) => from != to && from != unknown && to.is_some() && to != unknown,
        }
    }

    /// Returns what the last look at the range has found.
    pub(super) const fn found(&self) -> Found {
        let [merged, unique, changing, fresh] = self.0;
        Found {
            pages: merged + unique + changing + fresh,
            merged,
            fresh,
        }
    }

    #[inline]
    fn of(&mut self, bits: u64) -> &mut u16 {
        let [merged, unique, changing, fresh] = &mut self.0;
        match Class::of(bits) {
            Class::Merged => merged,
            Class::Unique => unique,
            Class::Changing => changing,
            Class::Fresh => fresh,
        }
    }
}

/// The tracked pages of an mm, each counted once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Mapped to a merged page.
    pub merged: u64,
    /// Candidates: unchanged, and no equal page has been found.
    pub unique: u64,
    /// Changed between the last two looks, or looked at once.
    pub changing: u64,
    /// Of unknown contents.
    pub fresh: u64,
}

impl PageCounts {
    /// Adds the pages of a range.
    pub(super) fn add(&mut self, range: &RangeCounts) {
        let [merged, unique, changing, fresh] = range.0;
        self.merged += u64::from(merged);
        self.unique += u64::from(unique);
        self.changing += u64::from(changing);
        self.fresh += u64::from(fresh);
    }

    /// Returns the number of pages.
    pub const fn total(&self) -> u64 {
        self.merged + self.unique + self.changing + self.fresh
    }
}
