// SPDX-License-Identifier: GPL-2.0-only

//! How long the scanner works before it lets others in.

/// Nanoseconds after which a hold of the scan lock ends with the next pass.
const HOLD_NSECS: i64 = 2_000_000;

/// Nanoseconds that a pass may take. A hold takes [`HOLD_NSECS`] and one pass: 4 ms.
const PASS_NSECS: i64 = 2_000_000;

/// Most tracked pages that are forgotten in one go, since that takes long where they are merged.
pub const MAX_FORGOTTEN: usize = 1024;

/// Fewest pages of a visit.
const MIN_PAGES: u32 = 128;

/// A hold of the scan lock.
#[derive(Clone, Copy, Debug)]
pub struct Hold {
    since: i64,
}

impl Hold {
    /// Begins a hold at this time, in nanoseconds.
    pub const fn begin(now: i64) -> Self {
        Self { since: now }
    }

    /// Returns whether the scanner is to release the lock: it has had it for long, or another task
    /// waits for it.
    pub const fn is_over(self, now: i64, waiting: bool) -> bool {
        waiting || now - self.since >= HOLD_NSECS
    }

    /// Returns how long the hold has lasted, in nanoseconds.
    pub const fn nsecs(self, now: i64) -> i64 {
        now - self.since
    }
}

/// The number of pages of a visit by several threads, whose passes are as large as they may be.
///
/// Pages take different times: a merge takes longer than a look at a page. The number follows the
/// time that the last visit took.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pages: u32,
}

impl Pace {
    /// Begins with the fewest pages.
    pub const fn new() -> Self {
        Self { pages: MIN_PAGES }
    }

    /// Returns the number of pages for the next visit.
    pub const fn pages(self) -> u32 {
        self.pages
    }

    /// Records that a visit of `pages` pages took `nsecs` nanoseconds.
    pub fn visited(&mut self, pages: u32, nsecs: i64) {
        if nsecs > PASS_NSECS {
            self.pages = (self.pages / 2).max(MIN_PAGES);
        } else if pages >= self.pages && nsecs < PASS_NSECS / 2 {
            self.pages = self.pages.saturating_mul(2);
        }
    }

    /// Takes care that the next visit has `most` pages at most.
    pub fn limit(&mut self, most: u32) {
        self.pages = self.pages.min(most).max(1);
    }
}

impl Default for Pace {
    fn default() -> Self {
        Self::new()
    }
}
