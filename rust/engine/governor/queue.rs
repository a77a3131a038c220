// SPDX-License-Identifier: GPL-2.0-only

//! The mms of a class that are due.

use super::{
    super::types::SlotId,
    pause::{
        is_past,
        Tick, //
    },
};

/// Most mms of a class that a sweep finds.
const QUEUE: usize = 64;

/// Some mms of a class that are due, the one that is due longest last.
#[derive(Clone, Copy)]
pub(super) struct Queue {
    entries: [(Tick, SlotId); QUEUE],
    len: usize,
    /// There are more.
    pub(super) more: bool,
}

impl Queue {
    pub(super) const EMPTY: Self = Self {
        entries: [(0, SlotId(0)); QUEUE],
        len: 0,
        more: false,
    };

    /// Returns whether there is none.
    pub(super) const fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn entries(&self) -> &[(Tick, SlotId)] {
        self.entries.get(..self.len).unwrap_or_default()
    }

    /// Adds an mm, if those that are there have not waited longer.
    pub(super) fn push(&mut self, due: Tick, slot: SlotId) {
        // What is before it is due later.
        let mut place = self
            .entries()
            .partition_point(|&(other, _)| !is_past(other, due));
        if self.len == QUEUE {
            self.more = true;
            let Some(later) = place.checked_sub(1) else {
                return;
            };
            // The one that is due last goes.
            self.entries.copy_within(1.., 0);
            self.len -= 1;
            place = later;
        }
        self.entries.copy_within(place..self.len, place + 1);
        if let Some(entry) = self.entries.get_mut(place) {
            *entry = (due, slot);
        }
        self.len += 1;
    }

    /// Takes the mm that is due longest.
    pub(super) fn pop(&mut self) -> Option<SlotId> {
        let &(_, slot) = self.entries().last()?;
        self.len -= 1;
        Some(slot)
    }
}
