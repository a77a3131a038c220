// SPDX-License-Identifier: GPL-2.0-only

//! Which ranges of an mm are to be looked at now, for the governor.

use super::{
    super::{
        accessed::REREAD_INTERVAL,
        governor::{
            pause::{
                is_past,
                Pressure,
                Tick, //
            },
            watch::Watch, //
        },
        types::{
            RangeId,
            RANGE_PAGES,
            RANGE_SHIFT, //
        },
    },
    directory::{
        Directory,
        Position, //
    },
    range::Range,
    range_arena::RangeArena, //
};
use core::ops;

/// Most ranges that one search passes. Bounds how long it takes.
const MAX_PASSED: u32 = 4096;

/// What a search for ranges goes by.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// The time.
    pub now: Tick,
    /// Whether memory is short.
    pub pressure: Pressure,
    /// Addresses between ranges, and ranges with room, are looked at, too.
    pub open: bool,
    /// Most ranges of a run.
    pub most: usize,
}

/// Addresses to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The addresses; none where the search has passed many ranges and is to be continued here.
    pub within: ops::Range<usize>,
    /// Number of the look at these ranges, see [`RangePause::look`].
    ///
    /// [`RangePause::look`]: super::super::governor::pause::RangePause::look
    pub look: u8,
}

impl View {
    /// Returns when the next look at a range is due, `None` if it is to be looked at now.
    fn due(&self, range: &Range) -> Option<Tick> {
        let has_room = self.open && range.len() < RANGE_PAGES;
        let due = range.pause().due(self.pressure, range.number())?;
        let wanted =
            is_past(due, self.now) || has_room && !range.pause().is_volatile(self.pressure);
        (!wanted).then_some(due)
    }
}

/// Returns the address at which a range starts.
const fn start_of(range: &Range) -> usize {
    range.number() << RANGE_SHIFT
}

/// The ranges of one mm.
#[derive(Clone, Copy)]
pub(super) struct Ranges<'a> {
    pub(super) arena: &'a RangeArena,
    pub(super) directory: &'a Directory,
}

impl<'a> Ranges<'a> {
    /// [`PageStates::next_run`](super::PageStates::next_run).
    pub(super) fn next_run(self, from: usize, view: &View, watch: &mut Watch) -> Option<Run> {
        let gap = |start: usize, end: usize| Run {
            within: start..end,
            look: 0,
        };
        let mut start = from;
        let mut at = self.first_from(from);
        let mut passed = 0;
        while let Some((place, range)) = at {
            let address = start_of(range);
            if view.open && start < address {
                return Some(gap(start, address));
            }
            let (Some(seen), Some(due)) = (range.pause().seen(), view.due(range)) else {
                return Some(self.run_at(place, start.max(address), view));
            };
            watch.pass(1, seen, due);
            start = address + (1 << RANGE_SHIFT);
            passed += 1;
            if passed == MAX_PASSED {
                return Some(gap(start, start));
            }
            at = self.at(self.directory.after(place));
        }
        (view.open && start < usize::MAX).then(|| gap(start, usize::MAX))
    }

    /// Returns the run that begins in the range at `place`.
    fn run_at(self, place: Position, start: usize, view: &View) -> Run {
        let mut look = None;
        let mut end = start;
        let mut at = self.at(place);
        for _ in 0..view.most.max(1) {
            let Some((place, range)) = at else { break };
            // Those with the same remainder are read again at the same look.
            let number = range.pause().look() % REREAD_INTERVAL as u8;
            let follows = look.is_none_or(|look| look == number && start_of(range) == end);
            if !follows || view.due(range).is_some() {
                break;
            }
            look = Some(number);
            end = start_of(range) + (1 << RANGE_SHIFT);
            at = self.at(self.directory.after(place));
        }
        Run {
            within: start..end,
            look: look.unwrap_or(0),
        }
    }

    /// Returns the first range that ends after `from`.
    fn first_from(self, from: usize) -> Option<(Position, &'a Range)> {
        let number = from >> RANGE_SHIFT;
        let place = match self.directory.floor(self.arena, number) {
            None => Directory::FIRST,
            Some(floor) => match self.at(floor) {
                Some((_, range)) if range.number() == number => floor,
                _ => self.directory.after(floor),
            },
        };
        self.at(place)
    }

    fn at(self, place: Position) -> Option<(Position, &'a Range)> {
        Some((place, self.arena.get(self.directory.get(place)?)?))
    }

    /// Returns the range that comes first in `within`, and where the next may be.
    pub(super) fn next_in(self, within: ops::Range<usize>) -> Option<(RangeId, usize)> {
        let (place, range) = self.first_from(within.start)?;
        let next = start_of(range) + (1 << RANGE_SHIFT);
        (start_of(range) < within.end).then_some((self.directory.get(place)?, next))
    }
}
