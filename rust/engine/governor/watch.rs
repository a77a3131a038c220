// SPDX-License-Identifier: GPL-2.0-only

//! When an mm is visited, and how far the visit has come.

use super::pause::{
    earlier,
    is_past,
    Pressure,
    Tick,
    FIRST_STEP,
    TICKS_PER_SEC, //
};

/// Ticks for which an mm is young.
const YOUNG: Tick = 10 * TICKS_PER_SEC;

/// Ticks for which new memory is looked at soon: until the pages that hold still are merged.
const FRESH: Tick = 2 * TICKS_PER_SEC;

/// Fewest pages by which an mm grows.
const MIN_GROWTH: u32 = 64;

/// Ranges that a visit can pass in a tick at a thousandth of a CPU, if none of them is due: about
/// 100 ns each.
const PASSED_PER_TICK: u32 = 512;

/// Why an mm is visited; the first comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It came not long ago.
    Young,
    /// It has more memory than it had.
    Grown,
    /// Ranges of it are due.
    Old,
}

/// What is remembered of an mm. A *visit* takes the ranges that are due, from the lowest address
/// on. One that is *open* also looks for memory of which nothing is known: between the ranges, and
/// in those with room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Watch {
    /// The governor has seen the mm.
    known: bool,
    /// The visit that is under way is open.
    open: bool,
    /// A visit is under way, and has come to `at`.
    walking: bool,
    /// Accessed bits have been cleared in it.
    cleared: bool,
    /// The mm has grown, and no open visit has begun since.
    grown: bool,
    /// Shortest pause between two open visits, as a power of two in ticks.
    step: u8,
    /// When the governor first saw the mm.
    born: Tick,
    /// When the next visit is due.
    due: Tick,
    /// When the last open visit began.
    opened: Tick,
    /// All of its memory has been looked at since then.
    covered: Tick,
    /// Of the visit that is under way: the earliest next look at a range that it has passed.
    next: Tick,
    /// Of the visit that is under way: the earliest last look.
    oldest: Tick,
    /// There is new memory until then.
    fresh_until: Tick,
    /// Anonymous pages when the last open visit began, or fewer.
    anon: u32,
    /// Most anonymous pages that an open visit has begun with, since one that began for no growth.
    peak: u32,
    /// Ranges that the visit has passed.
    passed: u32,
    /// Address at which the visit goes on.
    at: usize,
}

impl Watch {
    /// Returns whether the mm came not long ago.
    pub const fn is_young(&self, now: Tick) -> bool {
        now.wrapping_sub(self.born) < YOUNG
    }

    /// Returns whether memory of the mm is new, so that looks at it follow one another soon.
    pub const fn is_fresh(&self, now: Tick) -> bool {
        self.is_young(now) || !is_past(self.fresh_until, now)
    }

    /// Returns when the governor first saw the mm.
    pub const fn born(&self) -> Tick {
        self.born
    }

    /// Returns when all memory of the mm had been looked at since.
    pub const fn covered(&self) -> Tick {
        self.covered
    }

    /// Returns when the next visit is due.
    pub const fn due(&self) -> Tick {
        self.due
    }

    /// Returns why the mm, which has so many anonymous pages, is to be visited now, if it is.
    pub fn class(&mut self, now: Tick, anon: u32) -> Option<Class> {
        if !self.known {
            *self = Self {
                known: true,
                grown: true,
                step: FIRST_STEP,
                born: now,
                due: now.wrapping_add(1 << FIRST_STEP),
                opened: now,
                covered: now,
                fresh_until: now,
                ..Self::default()
            };
        }
        let class = |grown: bool| match (self.is_young(now), grown || self.is_fresh(now)) {
            (true, _) => Class::Young,
            (false, true) => Class::Grown,
            (false, false) => Class::Old,
        };
        let (grown, other) = (class(true), class(self.walking && self.open));
        if self.walking {
            return is_past(self.due, now).then_some(other);
        }
        self.anon = self.anon.min(anon);
        self.grown |= anon - self.anon > MIN_GROWTH.max(self.anon / 64);
        if self.grown && is_past(self.opened.wrapping_add(1 << self.step), now) {
            self.due = earlier(self.due, now);
            return Some(grown);
        }
        is_past(self.due, now).then_some(other)
    }

    /// Begins a visit, or goes on with it. Returns the address and whether the visit is open.
    pub fn begin(&mut self, now: Tick, anon: u32, pressure: Pressure) -> (usize, bool) {
        if !self.walking {
            // It may offer memory that it has had before, which is no growth.
            let pause = match self.is_young(now) {
                true => TICKS_PER_SEC,
                false => 1 << pressure.last_step(),
            };
            let grown = core::mem::take(&mut self.grown);
            self.open = grown || is_past(self.opened.wrapping_add(pause), now);
            if self.open {
                // What shrinks and grows again is not worth more visits than others.
                let new = grown && anon > self.peak;
                self.step = match self.is_young(now) || !grown || new {
                    true => FIRST_STEP,
                    false => (self.step + 1).min(pressure.last_step()),
                };
                if new {
                    self.fresh_until = now.wrapping_add(FRESH);
                }
                self.peak = if grown { self.peak.max(anon) } else { anon };
                (self.opened, self.anon) = (now, anon);
            }
            self.walking = true;
            (self.cleared, self.passed, self.at) = (false, 0, 0);
            self.next = self.opened.wrapping_add(pause);
            self.oldest = self.opened;
        }
        (self.at, self.open)
    }

    /// Records ranges that the visit has passed: how many, the earliest last look at them and the
    /// earliest next one.
    pub fn pass(&mut self, ranges: u32, oldest: Tick, next: Tick) {
        self.passed += ranges;
        self.oldest = earlier(self.oldest, oldest);
        self.next = earlier(self.next, next);
    }

    /// Records that the visit has come to this address, and whether accessed bits were cleared.
    pub fn move_to(&mut self, at: usize, cleared: bool) {
        self.at = at;
        self.cleared |= cleared;
    }

    /// Has the visit go on not before the next tick.
    pub fn postpone(&mut self, now: Tick, ticks: Tick) {
        self.due = now.wrapping_add(ticks);
    }

    /// Ends a visit. Returns whether accessed bits were cleared in it.
    pub fn end(&mut self, now: Tick) -> bool {
        let soonest = now.wrapping_add(1 + self.passed / PASSED_PER_TICK);
        self.due = match is_past(self.next, soonest) {
            true => soonest,
            false => self.next,
        };
        self.covered = self.oldest;
        self.walking = false;
        self.cleared
    }

    /// Has an open visit follow soon: what was known of the memory has been forgotten.
    pub fn forget(&mut self) {
        self.walking = false;
        self.grown = true;
    }

    /// Counts the mm as looked at, although it is passed over, and what it has as new afterwards.
    pub fn pass_over(&mut self, now: Tick) {
        self.forget();
        self.covered = now;
        self.due = now.wrapping_add(TICKS_PER_SEC);
    }
}
