// SPDX-License-Identifier: GPL-2.0-only

//! What is counted for each mm.

use super::super::{
    container::paged_vec::PagedVec,
    page_state::PageCounts,
    types::{
        Refusal,
        Refusals,
        SlotId, //
    },
};
use kernel::{
    alloc::Flags,
    prelude::*, //
};

/// What is known of the pages of one mm, and what has happened to them since it came, or since all
/// of them were forgotten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MmStats {
    /// Its tracked pages.
    pub pages: PageCounts,
    /// Why its pages were not merged.
    pub refusals: Refusals,
    /// Merged pages that the scanner has found replaced by a page of their own: by a write, most
    /// likely. What is unmapped, or written to between two scans and then unmapped or merged
    /// again, is not counted.
    pub broken: u32,
}

/// What has happened to the pages of one mm. The counters stay at their greatest.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Events {
    refused: [u32; Refusal::ALL.len()],
    broken: u32,
}

static_assert!(size_of::<Events>() <= 64);

/// What has happened to the pages of each mm, by slot.
///
/// # Invariants
///
/// Something has been counted for `counting` slots. Where there are none there is no memory.
pub(super) struct MmEvents {
    events: PagedVec<Events>,
    counting: usize,
}

impl MmEvents {
    /// Creates counters that have counted nothing, without allocating.
    pub(super) const fn new() -> Self {
        Self {
            events: PagedVec::new(),
            counting: 0,
        }
    }

    /// Returns the memory that they take, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.events.bytes()
    }

    /// Returns whether something has been counted for a slot.
    pub(super) fn any(&self, slot: SlotId) -> bool {
        let events = self.events.get(slot.0 as usize);
        events.is_some_and(|events| *events != Events::default())
    }

    /// Returns what is counted for a slot, whose tracked pages are given.
    pub(super) fn stats(&self, slot: SlotId, pages: PageCounts) -> MmStats {
        let events = self.events.get(slot.0 as usize).copied();
        let events = events.unwrap_or_default();
        MmStats {
            pages,
            refusals: Refusals::from(events.refused),
            broken: events.broken,
        }
    }

    /// Counts that a page was not merged.
    pub(super) fn refuse(&mut self, slot: SlotId, refusal: Refusal, flags: Flags) {
        self.count(slot, flags, |events| {
            events.refused.get_mut(refusal as usize)
        });
    }

    /// Counts that the mapping of a merged page was found broken.
    pub(super) fn break_one(&mut self, slot: SlotId, flags: Flags) {
        self.count(slot, flags, |events| Some(&mut events.broken));
    }

    /// Counts something for a slot. Without memory it is not counted.
    fn count(
        &mut self,
        slot: SlotId,
        flags: Flags,
        of: impl FnOnce(&mut Events) -> Option<&mut u32>,
    ) {
        while self.events.len() <= slot.0 as usize {
            if self.events.push(Events::default(), flags).is_err() {
                if self.counting == 0 {
                    self.events = PagedVec::new();
                }
                return;
            }
        }
        let Some(events) = self.events.get_mut(slot.0 as usize) else {
            return;
        };
        let first = *events == Events::default();
        if let Some(count) = of(events) {
            *count = count.saturating_add(1);
            // INVARIANT: It is counted once.
            self.counting += usize::from(first);
        }
    }

    /// Forgets what has been counted for a slot, which is going to be another mm's.
    pub(super) fn forget(&mut self, slot: SlotId) {
        if let Some(events) = self.events.get_mut(slot.0 as usize) {
            if core::mem::take(events) != Events::default() {
                self.counting -= 1;
            }
            if self.counting == 0 {
                self.events = PagedVec::new();
            }
        }
    }

    /// Checks that no more has been counted than that of all mms that ever were.
    pub(super) fn check(&self, refusals: &Refusals) -> Result<(), &'static str> {
        let slots = || (0..self.events.len()).filter_map(|slot| self.events.get(slot));
        for &refusal in Refusal::ALL {
            let of_mms = slots().filter_map(|events| events.refused.get(refusal as usize));
            if of_mms.map(|&count| u64::from(count)).sum::<u64>() > refusals.get(refusal) {
                return Err("engine: more is refused to the mms than to all");
            }
        }
        let counting = slots().filter(|events| **events != Events::default());
        if counting.count() != self.counting || (self.counting == 0 && self.bytes() != 0) {
            return Err("engine: mms with counters are counted wrongly");
        }
        Ok(())
    }
}
