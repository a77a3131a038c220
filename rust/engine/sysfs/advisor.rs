// SPDX-License-Identifier: GPL-2.0-only

//! The scan-time advisor: it sets `pages_to_scan` after each full scan, so that the next one
//! takes `advisor_target_scan_time` seconds, within limits on CPU and pages.
//!
//! The knobs accept any number, and the built-in computes in C integers of several widths. Where
//! that wraps around, so does this: a value that shows in `pages_to_scan` has to be the same.

/// CPU share, in percent, that the advisor does not go below.
const MIN_CPU: u64 = 10;

/// Weight, in percent, of the newest value in the moving average.
const EWMA_WEIGHT: u64 = 30;

/// Nanoseconds of a second.
const NSEC_PER_SEC: i64 = 1_000_000_000;

/// Nanoseconds of a millisecond.
const NSEC_PER_MSEC: u64 = 1_000_000;

/// What the advisor remembers from one full scan to the next. All zero when it is switched on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// When the full scan began: monotonic clock, ns. Zero, as in the built-in, if that was
    /// before the advisor was switched on.
    pub start_ns: i64,
    /// How long the last full scan took, s.
    scan_time: u64,
    /// Moving average of the change from one full scan to the next, percent.
    change: u64,
    /// CPU time of the scanner at the end of the last full scan, ns.
    cpu_ns: u64,
}

/// The knobs that the advisor goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// `advisor_target_scan_time`: seconds, at least 1.
    pub target_scan_time: u64,
    /// `advisor_max_cpu`: percent.
    pub max_cpu: u32,
    /// `advisor_max_pages_to_scan`.
    pub max_pages_to_scan: u64,
}

/// What the advisor decided, as the `ksm_advisor` trace event reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advice {
    /// How long the full scan took, s, at least 1.
    pub scan_time: u64,
    /// Pages to scan per batch from now on. The knob takes the lower 32 bits.
    pub pages_to_scan: u64,
    /// CPU share that the scanner had, percent, at least 1.
    pub cpu_percent: u32,
}

impl Context {
    /// What it is when the advisor is switched on.
    pub const fn new() -> Self {
        Self {
            start_ns: 0,
            scan_time: 0,
            change: 0,
            cpu_ns: 0,
        }
    }

    /// Decides at the end of a full scan that was done with `pages_to_scan` pages per batch.
    ///
    /// `now_ns` is the monotonic clock, `cpu_ns` the CPU time of the scanner since it started.
    pub fn advise(
        &mut self,
        now_ns: i64,
        cpu_ns: u64,
        pages_to_scan: u32,
        limits: &Limits,
    ) -> Advice {
        let scan_time = (now_ns.wrapping_sub(self.start_ns) / NSEC_PER_SEC) as u64;
        let scan_time = scan_time.max(1);

        let cpu_ms = cpu_ns.wrapping_sub(self.cpu_ns) / NSEC_PER_MSEC;
        let cpu_percent = quotient(cpu_ms.wrapping_mul(100), scan_time.wrapping_mul(1000)) as u32;
        let cpu_percent = cpu_percent.max(1);

        // How far the full scan was from its target, and how much longer it took than the last.
        let factor = quotient(limits.target_scan_time.wrapping_mul(100), scan_time).max(1);
        let last = if self.scan_time == 0 {
            scan_time
        } else {
            self.scan_time
        };
        let change = quotient(scan_time.wrapping_mul(100), last).max(1);
        let change = ewma(self.change, change);

        let wanted = quotient(u64::from(pages_to_scan.wrapping_mul(100)), factor);
        let wanted = wanted.wrapping_mul(change) / 100;

        let per_percent = (u64::from(pages_to_scan) / u64::from(cpu_percent)).max(1);
        let pages_to_scan = wanted
            .min(per_percent.wrapping_mul(u64::from(limits.max_cpu)))
            .max(per_percent.wrapping_mul(MIN_CPU))
            .min(limits.max_pages_to_scan);

        self.scan_time = scan_time;
        self.change = change;
        self.cpu_ns = cpu_ns;
        Advice {
            scan_time,
            pages_to_scan,
            cpu_percent,
        }
    }
}

/// `a / b`, where no clock that can be read makes `b` zero.
fn quotient(a: u64, b: u64) -> u64 {
    a.checked_div(b).unwrap_or(0)
}

/// Exponentially weighted moving average.
fn ewma(average: u64, newest: u64) -> u64 {
    let old = average.wrapping_mul(100 - EWMA_WEIGHT);
    let new = newest.wrapping_mul(EWMA_WEIGHT);
    old.wrapping_add(new) / 100
}
