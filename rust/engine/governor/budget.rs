// SPDX-License-Identifier: GPL-2.0-only

//! The CPU time that the scanner may use: a token bucket, with shares for the classes.
//!
//! Tokens flow in all the time and are kept up to the burst. Whoever uses more than is there
//! leaves a debt. So in any time the scanner uses at most the burst, what has flowed in, and what
//! it does between two calls of [`Budget::count`].

use super::{
    pause::Pressure,
    watch::Class, //
};

/// CPU time for which it is worth it to wake up, ns.
const SLICE_NSECS: i64 = 4_000_000;

/// Of what flows in, one of so many parts is left to each class but the first.
const SHARES: i64 = 4;

/// The CPU time that the scanner may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Percent of one CPU.
    pub percent: u32,
    /// The same while memory is short.
    pub pressure_percent: u32,
    /// Milliseconds that can be saved up. While memory is short they grow as the percent do.
    pub burst_msecs: u32,
}

impl Limits {
    /// Returns the limits on a machine with so many CPUs: 5 % of one, or 0.5 % of all if that is
    /// more, twice that while memory is short, and two seconds.
    pub const fn for_cpus(cpus: u32) -> Self {
        let percent = if cpus / 2 > 5 { cpus / 2 } else { 5 };
        Self {
            percent,
            pressure_percent: 2 * percent,
            burst_msecs: 2000,
        }
    }

    /// Returns the nanoseconds of CPU time that come in so many nanoseconds.
    fn flow(&self, nsecs: i64, pressure: Pressure) -> i64 {
        nsecs.max(0).saturating_mul(self.percent(pressure)) / 100
    }

    /// Returns the nanoseconds until so many nanoseconds of CPU time have come.
    fn time_for(&self, nsecs: i64, pressure: Pressure) -> i64 {
        nsecs.max(0).saturating_mul(100) / self.percent(pressure)
    }

    fn burst(&self, pressure: Pressure) -> i64 {
        let burst = i64::from(self.burst_msecs) * 1_000_000;
        match pressure {
            Pressure::None => burst,
            Pressure::Some => {
                burst.saturating_mul(self.percent(pressure)) / self.percent(Pressure::None)
            }
        }
    }

    fn percent(&self, pressure: Pressure) -> i64 {
        let percent = match pressure {
            Pressure::None => self.percent,
            Pressure::Some => self.pressure_percent.max(self.percent),
        };
        i64::from(percent).max(1)
    }
}

/// See the module's description.
pub(super) struct Budget {
    limits: Limits,
    /// Whether memory was short when tokens were last counted.
    pressure: Pressure,
    /// CPU time that may be used, ns; below 0 when more was used.
    tokens: i64,
    /// Of that, what is left to each class although there are others that come first.
    shares: [i64; 3],
    /// The class that uses CPU time now.
    running: Option<Class>,
    /// When tokens were last counted, ns, and the CPU time then.
    counted: (i64, u64),
}

impl Budget {
    /// Creates a budget of a whole burst, whatever that will be.
    pub(super) const fn new() -> Self {
        Self {
            limits: Limits::for_cpus(1),
            pressure: Pressure::None,
            tokens: i64::MAX,
            shares: [0; 3],
            running: None,
            counted: (0, 0),
        }
    }

    /// Begins to count. `cpu` is the CPU time of the scanner until now, in nanoseconds.
    pub(super) fn begin(&mut self, now: i64, cpu: u64, limits: Limits) {
        self.counted.1 = cpu;
        self.running = None;
        self.count(now, cpu, limits, Pressure::None);
        self.shares = [0; 3];
    }

    /// Counts what has flowed in, and what has been used by the class that was running.
    pub(super) fn count(&mut self, now: i64, cpu: u64, limits: Limits, pressure: Pressure) {
        let (then, before) = core::mem::replace(&mut self.counted, (now, cpu));
        let flow = self.limits.flow(now - then, self.pressure);
        (self.limits, self.pressure) = (limits, pressure);
        let used = i64::try_from(cpu.saturating_sub(before)).unwrap_or(i64::MAX);
        let burst = limits.burst(pressure);
        self.tokens = self
            .tokens
            .saturating_add(flow)
            .min(burst)
            .saturating_sub(used);
        let running = self.running.take();
        for class in [Class::Grown, Class::Old] {
            if let Some(share) = self.shares.get_mut(class as usize) {
                let used = if running == Some(class) { used } else { 0 };
                let left = share.saturating_add(flow / SHARES).saturating_sub(used);
                *share = left.clamp(-SLICE_NSECS, SLICE_NSECS);
            }
        }
    }

    /// Has the next count be that of this class.
    pub(super) fn run(&mut self, class: Class) {
        self.running = Some(class);
    }

    /// Returns whether there is any CPU time.
    pub(super) const fn is_left(&self) -> bool {
        self.tokens > 0
    }

    /// Returns whether there is CPU time for a class.
    pub(super) fn may(&self, class: Class) -> bool {
        let kept = match class {
            Class::Old if !self.has_share(class) => self.reserve(),
            _ => 0,
        };
        self.tokens > kept
    }

    /// Returns whether a class has used less than what is left to it.
    pub(super) fn has_share(&self, class: Class) -> bool {
        self.shares
            .get(class as usize)
            .is_some_and(|&share| share > 0)
    }

    /// Returns the nanoseconds until there is CPU time worth waking up for.
    pub(super) fn wait(&self) -> i64 {
        match self.tokens {
            1.. => 0,
            tokens => self.limits.time_for(SLICE_NSECS - tokens, self.pressure),
        }
    }

    /// Returns the same for old mms.
    pub(super) fn wait_old(&self) -> i64 {
        let missing = self.reserve() + SLICE_NSECS - self.tokens;
        let enough = self.limits.time_for(missing, self.pressure);
        let share = self.shares.get(Class::Old as usize).copied().unwrap_or(0);
        let share = SHARES * self.limits.time_for(SLICE_NSECS - share, self.pressure);
        enough.min(share).max(self.wait())
    }

    /// Returns what is kept for new memory.
    fn reserve(&self) -> i64 {
        match self.pressure {
            Pressure::None => self.limits.burst(Pressure::None) / 2,
            Pressure::Some => 0,
        }
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self::new()
    }
}
