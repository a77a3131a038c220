// SPDX-License-Identifier: GPL-2.0-only

//! When a range of 2 MiB is looked at again, by what looking at it has brought.
//!
//! A range is looked at a few times at once: pages that hold still are merged by then. From then on
//! the pause doubles with each look that merges little, and halves with each that merges much.
//! Where pages change or merges break soon, the pause is as long as a merge is to last at least: a
//! page that has not changed for so long is worth it.

/// A time in ticks of 1/16 s since the load, which wraps after eight years.
pub type Tick = u32;

/// Ticks in a second.
pub const TICKS_PER_SEC: u32 = 16;

/// Nanoseconds in a tick.
pub const TICK_NSECS: i64 = 1_000_000_000 / TICKS_PER_SEC as i64;

/// Pause after a look at a range that is new, as a power of two in ticks: 250 ms.
pub const FIRST_STEP: u8 = 2;

/// Looks at a range that is new, each after the shortest pause.
const SETTLE_LOOKS: u8 = 4;

/// The heat of a range that changes as a whole with each tick, were there no limit.
const HEAT_UNIT: u64 = 4096;

/// Ticks within which what was known of the heat counts for half.
const HEAT_MEMORY: u64 = TICKS_PER_SEC as u64;

/// [`RangePause::looks`] goes on with this after 255: the same, as far as a page is read again at
/// one of 16 looks.
const LOOKS_AGAIN: u8 = 16;

/// Returns the tick of a time in nanoseconds.
pub const fn tick_at(ns: i64) -> Tick {
    (ns / TICK_NSECS) as Tick
}

/// Returns whether a time has come.
pub const fn is_past(due: Tick, now: Tick) -> bool {
    now.wrapping_sub(due) <= Tick::MAX / 2
}

/// Returns the earlier of two times.
pub const fn earlier(a: Tick, b: Tick) -> Tick {
    if is_past(a, b) {
        a
    } else {
        b
    }
}

/// Whether memory is short.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pressure {
    /// There is enough.
    #[default]
    None,
    /// Little is available, or pages are swapped.
    Some,
}

impl Pressure {
    /// Returns the longest pause, as a power of two in ticks: 64 s, or 16 s.
    pub const fn last_step(self) -> u8 {
        match self {
            Self::None => 10,
            Self::Some => 8,
        }
    }

    /// Returns for how many ticks a merge is to last: 10 s, or 2 s. A merge and the fault that
    /// breaks it cost a few microseconds.
    pub const fn least_life(self) -> Tick {
        match self {
            Self::None => 10 * TICKS_PER_SEC,
            Self::Some => 2 * TICKS_PER_SEC,
        }
    }
}

/// The tracked pages of a range after a look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// All of them.
    pub pages: u16,
    /// Merged pages.
    pub merged: u16,
    /// Pages that were seen for the first time, or whose merge was found broken.
    pub fresh: u16,
}

/// The pause of one range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangePause {
    /// When the last look was.
    seen: Tick,
    /// Merged pages then.
    merged: u16,
    /// Pages that have been found changed since then, and merges that have been found broken.
    changed: u16,
    /// The pause as a power of two in ticks, without what spreads the looks at ranges.
    step: u8,
    /// How much changes in a tick: [`HEAT_UNIT`] times the part of the pages, at most 255.
    heat: u8,
    /// Number of looks, as far as anybody needs it.
    looks: u8,
}

impl RangePause {
    /// A range that has not been looked at.
    pub const NEW: Self = Self {
        seen: 0,
        merged: 0,
        changed: 0,
        step: FIRST_STEP,
        heat: 0,
        looks: 0,
    };

    /// Returns the number of the next look, for what is to happen at one of some looks in a row.
    pub const fn look(&self) -> u8 {
        self.looks
    }

    /// Returns when the last look was, `None` if there was none.
    pub const fn seen(&self) -> Option<Tick> {
        match self.looks {
            0 => None,
            _ => Some(self.seen),
        }
    }

    /// Returns when the next look is due, `None` if there was none yet: at once. `number` is that
    /// of the range: the looks at neighbours are spread, unless they are soon.
    pub fn due(&self, pressure: Pressure, number: usize) -> Option<Tick> {
        let step = self.step.min(pressure.last_step());
        let pause = (1 << step) + spread(number, step);
        Some(self.seen()?.wrapping_add(pause))
    }

    /// Counts a page that a look has found changed, or replaced by a page of its own.
    #[inline]
    pub fn count_change(&mut self) {
        self.changed = self.changed.saturating_add(1);
    }

    /// Returns whether merges in this range would not last.
    pub const fn is_volatile(&self, pressure: Pressure) -> bool {
        self.heat as u64 * pressure.least_life() as u64 > HEAT_UNIT
    }

    /// Records a look.
    pub fn looked(&mut self, now: Tick, found: &Found, pressure: Pressure) {
        let pages = u64::from(found.pages).max(1);
        let mut changed = u64::from(core::mem::take(&mut self.changed));
        if self.looks >= SETTLE_LOOKS {
            // Memory that is unmapped and mapped again and again does not show as changed.
            changed += u64::from(found.fresh) / 4;
        }
        if let Some(seen) = self.seen() {
            let elapsed = u64::from(now.wrapping_sub(seen).max(1));
            // What has changed may have done so many times: the less is left, the more often.
            let left = pages.saturating_sub(changed) + 1;
            let heat = (changed * HEAT_UNIT / left).min(elapsed * u64::from(u8::MAX));
            let before = u64::from(self.heat) * HEAT_MEMORY;
            self.heat = ((before + heat) / (HEAT_MEMORY + elapsed)) as u8;
        }
        self.looks = self.looks.checked_add(1).unwrap_or(LOOKS_AGAIN);
        let merged = u64::from(found.merged.saturating_sub(self.merged));
        let last = pressure.last_step();
        self.step = if self.looks < SETTLE_LOOKS {
            FIRST_STEP
        } else if self.is_volatile(pressure) {
            let rare = pressure.least_life().next_power_of_two().ilog2() as u8;
            (self.step + 1).clamp(rare.min(last), last)
        } else if u64::from(found.fresh) * 16 > pages {
            FIRST_STEP
        } else if merged * 16 > pages {
            self.step.saturating_sub(1).clamp(FIRST_STEP, last)
        } else {
            (self.step + 1).clamp(FIRST_STEP, last)
        };
        self.merged = found.merged;
        self.seen = now;
    }
}

/// Returns up to an eighth of a pause, by the number of the range.
fn spread(number: usize, step: u8) -> Tick {
    let hash = (number as u64).wrapping_mul(0x61c8_8646_80b5_83eb) >> 32;
    (hash as Tick) & ((1 << step) / 8 as Tick).saturating_sub(1)
}
