// SPDX-License-Identifier: GPL-2.0-only

//! The tracked pages of one aligned piece of an address space.
//!
//! A compressed array: a bitmap of the pages that are tracked and a vector of their words without
//! gaps. The word of a page is found by its rank, the number of bits set before its own (G.
//! Jacobson, "Space-efficient Static Trees and Graphs", FOCS 1989): a count per 64-bit word of the
//! bitmap is stored, and one `popcnt` does the rest.

use super::super::{
    container::alloc_size::{
        shrink,
        vec_bytes, //
    },
    governor::pause::{
        Found,
        Pressure,
        RangePause,
        Tick, //
    },
    types::{
        SlotId,
        RANGE_PAGES, //
    },
};
use super::counts::RangeCounts;

use kernel::{
    alloc::{
        AllocError,
        Flags, //
    },
    prelude::*, //
};

/// Number of words in the bitmap.
const WORDS: usize = RANGE_PAGES / 64;

/// Number of bits in one field of [`Range::ranks`].
const RANK_BITS: usize = 9;

/// One in each field of [`Range::ranks`].
const RANK_ONES: u64 = {
    let mut ones = 0;
    let mut field = 0;
    while field < WORDS - 1 {
        ones |= 1 << (field * RANK_BITS);
        field += 1;
    }
    ones
};

/// Capacity of the first buffer for values: one `kmalloc-32` object.
const MIN_VALUES: usize = 4;

/// One word for each tracked page among [`RANGE_PAGES`], and none for the others.
///
/// Takes two cache lines. If every page is tracked, only the second one is read.
///
/// # Invariants
///
/// 1. `values` has one element for each bit set in `present`, in the same order.
/// 2. Field `w - 1` of `ranks` is the number of bits set in `present[..w]`.
/// 3. `counts` are those of `values`.
#[repr(C, align(64))]
pub(super) struct Range {
    present: [u64; WORDS],
    ranks: u64,
    values: KVec<u64>,
    number: usize,
    slot: SlotId,
    counts: RangeCounts,
    pause: RangePause,
}

static_assert!(size_of::<Range>() == 128);

impl Range {
    /// Returns a range without tracked pages, with memory for the first one.
    ///
    /// `number` is its address in units of ranges, `slot` the mm that it belongs to.
    ///
    /// # Errors
    ///
    /// `AllocError` if there is no memory.
    pub(super) fn new(slot: SlotId, number: usize, flags: Flags) -> Result<Self, AllocError> {
        // INVARIANT: 1. to 3. hold for a range without pages.
        Ok(Self {
            values: KVec::with_capacity(MIN_VALUES, flags)?,
            number,
            slot,
            ..Self::VACANT
        })
    }

    /// Placeholder for a range that is not in use. Owns no memory.
    pub(super) const VACANT: Self = Self {
        present: [0; WORDS],
        ranks: 0,
        values: KVec::new(),
        number: usize::MAX,
        slot: SlotId(u32::MAX),
        counts: RangeCounts::NONE,
        pause: RangePause::NEW,
    };

    /// Returns the address in units of ranges.
    #[inline]
    pub(super) const fn number(&self) -> usize {
        self.number
    }

    /// Returns the mm that the pages belong to.
    #[inline]
    pub(super) const fn slot(&self) -> SlotId {
        self.slot
    }

    /// Returns the number of tracked pages.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.values.len()
    }

    /// Returns the memory that the values take, in bytes.
    #[inline]
    pub(super) fn value_bytes(&self) -> usize {
        vec_bytes(&self.values)
    }

    /// Returns a word of the bitmap.
    #[inline]
    fn word(&self, w: usize) -> u64 {
        self.present.get(w).copied().unwrap_or(0)
    }

    /// Returns the number of tracked pages before `offset`.
    #[inline]
    fn rank(&self, offset: usize) -> usize {
        let w = offset / 64;
        let below = self.word(w) & ((1 << (offset % 64)) - 1);
        let before = match w {
            0 => 0,
            _ => self.ranks >> ((w - 1) * RANK_BITS) & ((1 << RANK_BITS) - 1),
        };
        before as usize + below.count_ones() as usize
    }

    /// Returns whether the page at `offset` is tracked.
    #[inline]
    pub(super) fn contains(&self, offset: usize) -> bool {
        self.len() == RANGE_PAGES || self.word(offset / 64) >> (offset % 64) & 1 != 0
    }

    /// Returns the place of the page at `offset` in `values`, if it is tracked.
    #[inline]
    fn place(&self, offset: usize) -> Option<usize> {
        if self.len() == RANGE_PAGES {
            Some(offset)
        } else if self.contains(offset) {
            Some(self.rank(offset))
        } else {
            None
        }
    }

    /// Returns the word of the page at `offset`, if it is tracked.
    #[inline]
    pub(super) fn get(&self, offset: usize) -> Option<u64> {
        self.values.get(self.place(offset)?).copied()
    }

    /// Returns how many pages are tracked, by what is known of them.
    pub(super) const fn counts(&self) -> &RangeCounts {
        &self.counts
    }

    /// Returns when the range is looked at again.
    pub(super) const fn pause(&self) -> &RangePause {
        &self.pause
    }

    /// Records a look at all pages of the range.
    pub(super) fn looked(&mut self, now: Tick, pressure: Pressure) {
        let found: Found = self.counts.found();
        self.pause.looked(now, &found, pressure);
    }

    /// Changes the word of the page at `offset`, if it is tracked. Returns the previous word.
    #[inline]
    pub(super) fn replace(&mut self, offset: usize, value: u64) -> Option<u64> {
        let place = self.place(offset)?;
        let before = core::mem::replace(self.values.get_mut(place)?, value);
        // INVARIANT: 3.
        if self.counts.change(before, value) {
            self.pause.count_change();
        }
        Some(before)
    }

    /// Starts to track the page at `offset`, if it is not tracked yet.
    ///
    /// # Errors
    ///
    /// `AllocError` if there is no memory; nothing has changed then.
    #[inline]
    pub(super) fn insert(
        &mut self,
        offset: usize,
        value: u64,
        flags: Flags,
    ) -> Result<(), AllocError> {
        let (w, bit) = (offset / 64, 1 << (offset % 64));
        let rank = self.rank(offset);
        let Some(word) = self.present.get_mut(w) else {
            return Ok(());
        };
        if *word & bit != 0 {
            return Ok(());
        }
        self.values.reserve(1, flags)?;
        if self.values.insert_within_capacity(rank, value).is_err() {
            return Err(AllocError);
        }
        // INVARIANT: 1. The value comes after those of the lower bits. 2. The ranks of all higher
        // words increase by one.
        *word |= bit;
        self.ranks += RANK_ONES & u64::MAX << (w * RANK_BITS);
        // INVARIANT: 3.
        self.counts.add(value, 1);
        Ok(())
    }

    /// Starts to track the pages at `offsets`, in one step if they come after all others.
    ///
    /// # Errors
    ///
    /// `AllocError` if there is no memory for all of them. Some may be tracked then.
    pub(super) fn insert_all(
        &mut self,
        offsets: core::ops::Range<usize>,
        value: u64,
        flags: Flags,
    ) -> Result<(), AllocError> {
        let last = self.next(offsets.start).is_none();
        let more = offsets.len() > 1 && offsets.end <= RANGE_PAGES;
        if more && last && self.values.extend_with(offsets.len(), value, flags).is_ok() {
            // INVARIANT: 1. The values come after those of the lower bits.
            for (w, word) in self.present.iter_mut().enumerate() {
                let below = |end: usize| match end.saturating_sub(w * 64) {
                    bits @ 0..64 => (1 << bits) - 1,
                    _ => u64::MAX,
                };
                let new = below(offsets.end) & !below(offsets.start);
                *word |= new;
                // INVARIANT: 2. The ranks of all higher words increase by the new bits.
                let ones = RANK_ONES & u64::MAX << (w * RANK_BITS);
                self.ranks += ones * u64::from(new.count_ones());
            }
            // INVARIANT: 3.
            self.counts.add(value, offsets.len());
            return Ok(());
        }
        for offset in offsets {
            self.insert(offset, value, flags)?;
        }
        Ok(())
    }

    /// Stops tracking the page at `offset`. Returns its word.
    #[inline]
    pub(super) fn remove(&mut self, offset: usize) -> Option<u64> {
        let place = self.place(offset)?;
        let (w, bit) = (offset / 64, 1 << (offset % 64));
        // INVARIANT: 1. Bit and value are removed together. 2. The ranks of all higher words
        // decrease by one.
        *self.present.get_mut(w)? &= !bit;
        self.ranks -= RANK_ONES & u64::MAX << (w * RANK_BITS);
        let value = self.values.remove(place).ok()?;
        // INVARIANT: 3.
        self.counts.remove(value);
        shrink(&mut self.values, MIN_VALUES);
        Some(value)
    }

    /// Returns the offset of the first tracked page at or after `offset`.
    #[inline]
    pub(super) fn next(&self, offset: usize) -> Option<usize> {
        let mut mask = u64::MAX << (offset % 64);
        for w in offset / 64..WORDS {
            let word = self.word(w) & mask;
            if word != 0 {
                return Some(w * 64 + word.trailing_zeros() as usize);
            }
            mask = u64::MAX;
        }
        None
    }

    /// Returns the first tracked page at or after `offset` whose word has a bit of `mask`, with
    /// that word.
    pub(super) fn next_with(&self, offset: usize, mask: u64) -> Option<(usize, u64)> {
        let mut at = self.next(offset)?;
        for &value in self.values.get(self.rank(at)..)? {
            if value & mask != 0 {
                return Some((at, value));
            }
            at = self.next(at + 1)?;
        }
        None
    }

    /// Returns the offset of the last tracked page at or before `offset`.
    #[inline]
    pub(super) fn prev(&self, offset: usize) -> Option<usize> {
        let mut mask = u64::MAX >> (63 - offset % 64);
        for w in (0..=offset / 64).rev() {
            let word = self.word(w) & mask;
            if word != 0 {
                return Some(w * 64 + 63 - word.leading_zeros() as usize);
            }
            mask = u64::MAX;
        }
        None
    }

    /// Checks the invariants, for tests and debugging.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        let mut count = 0;
        for (w, word) in self.present.iter().enumerate() {
            if self.rank(w * 64) != count {
                return Err("page state: a rank is not the number of bits below it");
            }
            count += word.count_ones() as usize;
        }
        if count != self.values.len() {
            return Err("page state: as many values as tracked pages are not there");
        }
        let mut counts = RangeCounts::NONE;
        for &value in &self.values {
            counts.add(value, 1);
        }
        if counts != self.counts {
            return Err("page state: the pages of a range are counted wrongly");
        }
        Ok(())
    }
}

static_assert!(size_of::<Range>() == 128);
