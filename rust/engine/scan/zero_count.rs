// SPDX-License-Identifier: GPL-2.0-only

//! Counting the zero pages that an mm maps.
//!
//! The core of mm counts the mappings of the zero page that KSM has placed, for each mm, and goes
//! wrong: a fork copies the count, but not each mapping; `UFFDIO_MOVE` loses mappings without
//! counting. A scan passes all of them, as they are in mergeable vmas alone, and corrects the count
//! at the end of its visit to the mm. None escapes it: `mremap` unmerges what it moves.

use super::super::{
    backend::Backend,
    types::SlotId, //
};

/// The zero pages of the mm that is visited.
///
/// While the visit lasts, the count goes up where the visit itself places a zero page, and goes
/// down where one is written to or unmapped. One that is gone may have been seen before that or
/// not: this is what bounds the count at the end. If none is gone the bounds are equal.
#[derive(Clone, Copy)]
pub(super) struct ZeroPageCount {
    slot: SlotId,
    /// Where the visit goes on.
    next: usize,
    /// What the core's count was when the visit began.
    before: isize,
    /// Mappings that have been seen.
    seen: isize,
    /// Mappings that have been placed where none had been seen.
    placed: isize,
}

impl ZeroPageCount {
    /// Begins the visit, or goes on with it. Returns `None` where it has begun without counting.
    pub(super) fn resume<B: Backend>(
        count: Option<Self>,
        backend: &B,
        slot: SlotId,
        mm: &B::Mm,
        start: usize,
    ) -> Option<Self> {
        if start == 0 {
            return Some(Self {
                slot,
                next: 0,
                before: backend.zero_pages(mm),
                seen: 0,
                placed: 0,
            });
        }
        count.filter(|count| count.slot == slot && count.next == start)
    }

    /// Adds the mappings that walks have passed, up to `next`, and those placed there since.
    pub(super) fn passed(&mut self, seen: usize, placed: usize, next: usize) {
        self.seen += seen as isize;
        self.placed += placed as isize;
        self.next = next;
    }

    /// Ends the visit, and corrects the core's count.
    pub(super) fn finish<B: Backend>(self, backend: &B, mm: &B::Mm) {
        let now = backend.zero_pages(mm);
        let gone = self.before + self.placed - now;
        if gone < 0 {
            // A split has placed some, which may have been seen or not: the next visit will tell.
            return;
        }
        let most = self.seen + self.placed;
        let least = (most - gone).max(0);
        let correction = now.clamp(least, most) - now;
        if correction != 0 {
            backend.correct_zero_pages(mm, correction);
        }
    }
}
