// SPDX-License-Identifier: GPL-2.0-only

//! The governor: which mm is visited next, and whether the CPU time for it is there.
//!
//! With `governor=auto` there are no batches. Each range of an mm has a pause of its own
//! ([`pause`]), each mm a [`Watch`] that says when a visit is due. CPU time is a token bucket:
//! `cpu_percent` flow in, and no more than `cpu_burst_millisecs` are kept. So in any time the
//! scanner uses at most the burst, this part of the time, and what it does between two looks at the
//! clock.
//!
//! Young mms come first, then those that grow, and half of the burst is kept for them. In return a
//! quarter of what flows in is left to those that grow, and a quarter to all others. Within a
//! class, the mm that has waited longest comes first, and a visit ends after some thousand pages:
//! an mm is visited, whatever others do, when those have been that were due before it.
//!
//! Once a second all mms are gone through for those that are due, and four times a second while
//! there are young ones. In between the scanner sleeps, unless there is something left to do.
//!
//! Plain data: time, CPU time and what is known of memory are arguments.

mod budget;
pub mod nap;
pub mod pause;
mod queue;
pub mod watch;

use super::types::SlotId;

use budget::Budget;
use pause::{
    is_past,
    tick_at,
    Pressure,
    Tick, //
};
use queue::Queue;
use watch::{
    Class,
    Watch, //
};

pub use budget::Limits;

/// Nanoseconds from one sweep over all mms to the next.
const BEAT_NSECS: i64 = 1_000_000_000;

/// Nanoseconds from one sweep to the next while there are young mms.
pub const YOUNG_NSECS: i64 = BEAT_NSECS / 4;

/// Nanoseconds for which memory counts as short after it was.
const PRESSURE_NSECS: i64 = 10_000_000_000;

/// Most pages of a visit before others get their turn.
pub const VISIT_PAGES: u32 = 16 * 1024;

/// Memory is short below this part of all, in percent.
const LOW_PERCENT: usize = 15;

/// What is known of the machine's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// All pages.
    pub total: usize,
    /// Pages that are available for processes.
    pub available: usize,
    /// Pages that have been swapped in or out, ever.
    pub swapped: usize,
}

/// An mm to visit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit {
    /// Its slot, unless it has left.
    pub slot: SlotId,
    /// Why.
    pub class: Class,
    /// Pages that may be scanned before others get their turn.
    pub pages_left: u32,
}

/// See the module's description.
pub struct Governor {
    budget: Budget,
    pressure: Pressure,
    /// When memory was last found short, ns.
    short_at: Option<i64>,
    /// Pages that had been swapped then.
    swapped: Option<usize>,
    /// When the next sweep is due, ns: of all mms, and for young ones.
    beat: i64,
    young: Option<i64>,
    /// What the sweep has found.
    queues: [Queue; 3],
    /// Visits that their hold has ended, or one of a class that goes before.
    unfinished: [Option<Visit>; 3],
    /// When the full scan began that is under way.
    round: Tick,
    /// The sweep has found an mm that was not looked at since then.
    uncovered: bool,
    /// Mms were registered before it.
    any_covered: bool,
}

impl Governor {
    /// Creates a governor, which begins with [`Governor::begin`].
    pub const fn new() -> Self {
        Self {
            budget: Budget::new(),
            pressure: Pressure::None,
            short_at: None,
            swapped: None,
            beat: 0,
            young: None,
            queues: [Queue::EMPTY; 3],
            unfinished: [None; 3],
            round: 0,
            uncovered: false,
            any_covered: false,
        }
    }

    /// Begins to govern, with a whole burst, or with what was left of it and has come in since.
    /// `cpu` is the CPU time of the scanner until now, in nanoseconds.
    pub fn begin(&mut self, now: i64, cpu: u64, limits: Limits) {
        let mut budget = core::mem::take(&mut self.budget);
        budget.begin(now, cpu, limits);
        *self = Self {
            budget,
            beat: now,
            round: tick_at(now),
            ..Self::new()
        };
    }

    /// Returns whether memory is short.
    pub const fn pressure(&self) -> Pressure {
        self.pressure
    }

    /// Counts the CPU time that has come in and been used, to be called before each
    /// [`Governor::pick`].
    pub fn count(&mut self, now: i64, cpu: u64, limits: Limits) {
        self.budget.count(now, cpu, limits, self.pressure);
    }

    /// Returns whether there is no CPU time.
    pub const fn is_spent(&self) -> bool {
        !self.budget.is_left()
    }

    /// Returns whether all mms are to be gone through now.
    pub fn sweep_is_due(&self, now: i64) -> bool {
        // Where sweeps take most of the CPU time, what one has found is visited before the next.
        let young = self.young.is_some_and(|young| young <= now) && !self.is_waiting(Class::Young);
        self.budget.is_left() && (self.beat_is_due(now) || young || self.is_dry())
    }

    /// Returns whether a second has passed since the last time, for what is to be done as often.
    pub fn beat_is_due(&self, now: i64) -> bool {
        self.beat <= now
    }

    /// Returns whether there is more to do than the last sweep had room for, and that is done.
    fn is_dry(&self) -> bool {
        let mut classes = self.queues.iter().zip(&self.unfinished);
        classes.any(|(queue, visit)| queue.more && queue.is_empty() && visit.is_none())
    }

    /// Learns what is known of memory, once a beat.
    pub fn see_memory(&mut self, now: i64, memory: &Memory) {
        let swapping = self.swapped.is_some_and(|before| memory.swapped > before);
        self.swapped = Some(memory.swapped);
        if swapping || memory.available < memory.total / 100 * LOW_PERCENT {
            self.short_at = Some(now);
        }
        self.pressure = match self.short_at {
            Some(at) if now - at < PRESSURE_NSECS => Pressure::Some,
            _ => Pressure::None,
        };
    }

    /// A new mm has come: it is looked at soon.
    pub fn newcomer(&mut self, now: i64) {
        let soon = now + YOUNG_NSECS;
        self.young = Some(self.young.map_or(soon, |young| young.min(soon)));
    }

    /// Begins a sweep. [`Governor::consider`] is called for each mm.
    pub fn begin_sweep(&mut self) {
        self.queues = [Queue::EMPTY; 3];
        self.young = None;
        (self.uncovered, self.any_covered) = (false, false);
    }

    /// Looks whether an mm is due, which has so many anonymous pages.
    pub fn consider(&mut self, now: i64, slot: SlotId, watch: &mut Watch, anon: usize) {
        let tick = tick_at(now);
        let anon = u32::try_from(anon).unwrap_or(u32::MAX);
        let mut unfinished = self.unfinished.iter().flatten();
        let unfinished = unfinished.any(|visit| visit.slot == slot);
        if let Some(class) = watch.class(tick, anon).filter(|_| !unfinished) {
            if let Some(queue) = self.queues.get_mut(class as usize) {
                queue.push(watch.due(), slot);
            }
        }
        if watch.is_fresh(tick) {
            self.newcomer(now);
        }
        if is_past(watch.born(), self.round) {
            self.any_covered = true;
            self.uncovered |= !is_past(self.round, watch.covered());
        }
    }

    /// Ends a sweep. Returns whether all memory of all mms has been looked at since the last time
    /// that this was so, without those that came since: the end of a full scan.
    pub fn end_sweep(&mut self, now: i64) -> bool {
        if self.beat_is_due(now) {
            self.beat = now + BEAT_NSECS;
        }
        let ended = self.any_covered && !self.uncovered;
        if ended || !self.any_covered {
            self.round = tick_at(now);
        }
        ended
    }

    /// Returns the mm to visit now, if there is one and CPU time for it.
    pub fn pick(&mut self) -> Option<Visit> {
        let owed = |class| self.budget.has_share(class);
        let owed = [Class::Old, Class::Grown].map(|class| (class, owed(class)));
        let any = [Class::Young, Class::Grown, Class::Old].map(|class| (class, true));
        let visit = owed.into_iter().chain(any).find_map(|(class, is_next)| {
            if !is_next || !self.budget.may(class) {
                return None;
            }
            let unfinished = self.unfinished.get_mut(class as usize)?.take();
            unfinished.or_else(|| {
                Some(Visit {
                    slot: self.queues.get_mut(class as usize)?.pop()?,
                    class,
                    pages_left: VISIT_PAGES,
                })
            })
        })?;
        self.budget.run(visit.class);
        Some(visit)
    }

    /// Has a visit that its hold has ended go on, or others get their turn: then the caller makes
    /// the mm due now.
    pub fn put_back(&mut self, visit: Visit) {
        let class = visit.class as usize;
        if visit.pages_left == 0 {
            if let Some(queue) = self.queues.get_mut(class) {
                queue.more = true;
            }
        } else if let Some(unfinished) = self.unfinished.get_mut(class) {
            *unfinished = Some(visit);
        }
    }

    /// Returns whether the last sweep has found mms of a class that have not been visited.
    fn is_waiting(&self, class: Class) -> bool {
        let queue = self.queues.get(class as usize);
        let unfinished = self.unfinished.get(class as usize);
        queue.is_some_and(|queue| !queue.is_empty()) || unfinished.is_some_and(Option::is_some)
    }

    /// Returns when there is something to do, after [`Governor::pick`] has returned nothing.
    pub fn wake_at(&self, now: i64) -> i64 {
        let sweep = self.young.map_or(self.beat, |young| young.min(self.beat));
        let waiting = |class: Class| {
            let queue = self.queues.get(class as usize);
            self.is_waiting(class) || queue.is_some_and(|queue| queue.more)
        };
        let at = if waiting(Class::Young) || waiting(Class::Grown) {
            now
        } else if waiting(Class::Old) {
            now + self.budget.wait_old()
        } else {
            sweep
        };
        at.min(sweep).max(now + self.budget.wait())
    }
}

impl Default for Governor {
    fn default() -> Self {
        Self::new()
    }
}
