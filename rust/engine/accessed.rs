// SPDX-License-Identifier: GPL-2.0-only

//! When a clear accessed bit counts as unchanged contents.
//!
//! A walk clears the bits of the pages that it collects, and flushes no TLB: that would cost a busy
//! process more than the scan. A CPU that still has a translation uses it without setting the bit.
//! So the TLBs are flushed once in a full scan, after the last page of the mm. Where a page is
//! accessed after that, its next look finds the bit set. What is missed is a page that was accessed
//! between its look and the flush, through a translation from before the look, and not since.
//!
//! A stale hint delays a merge, or has one tried in vain. It never merges what differs: contents
//! are compared with the page table entry cleared and flushed. And it ends: one *look* of
//! [`REREAD_INTERVAL`] reads the page in any case. A look is a full scan that does not skip the
//! page.

use super::{
    policy::Policy,
    smart_scan::{
        History,
        MAX_SKIPS, //
    }, //
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// Number of looks within which an unaccessed page is read again: devices write without leaving a
/// trace in page tables.
pub const REREAD_INTERVAL: usize = 16;

// The full scans that look at an old page have all remainders, one after the other.
static_assert!(REREAD_INTERVAL.is_power_of_two() && (MAX_SKIPS + 1) % 2 == 1);

/// Decides for which pages a clear accessed bit counts as unchanged contents.
///
/// A hint only: devices write without setting the bit, and reclaim clears it.
#[derive(Clone, Copy)]
pub struct AccessedHint {
    enabled: bool,
    smart_scan: bool,
    /// Number of the full scan.
    full_scan: usize,
    /// `merge_across_nodes` as it was last.
    across_nodes: bool,
    /// Full scans to come before fingerprints are again what they were made under other knobs.
    disabled_for_full_scans: u8,
}

impl AccessedHint {
    /// Creates a hint that says nothing until [`AccessedHint::update`] is called.
    pub const fn new() -> Self {
        Self {
            enabled: false,
            smart_scan: false,
            full_scan: 0,
            across_nodes: true,
            disabled_for_full_scans: 0,
        }
    }

    /// Returns whether the accessed bits are used at all.
    #[inline]
    pub(super) const fn enabled(&self) -> bool {
        self.enabled
    }

    /// Returns whether the page at `addr` counts as unchanged at this look, given that its accessed
    /// bit is clear.
    ///
    /// False at one of [`REREAD_INTERVAL`] looks in a row at least: the full scans count, and those
    /// that look are all of them, or, for an old page and with smart scan, each ninth, which has no
    /// common divisor with the interval. A page that grows old meanwhile is read then.
    #[inline]
    pub const fn unchanged(&self, addr: usize, history: History) -> bool {
        self.enabled
            && (addr / PAGE_SIZE).wrapping_add(self.full_scan) % REREAD_INTERVAL != 0
            && !(self.smart_scan && history.grows_old())
    }

    /// Follows the knobs: a page may migrate to another NUMA node unaccessed, so the hint is
    /// disabled where fingerprints depend on the node.
    pub fn update(&mut self, policy: &Policy) {
        self.smart_scan = policy.smart_scan;
        if self.across_nodes != policy.merge_across_nodes {
            self.across_nodes = policy.merge_across_nodes;
            // The full scan that is under way may have gone past some pages already.
            self.disabled_for_full_scans = 2;
        }
        self.enabled = policy.merge_across_nodes && self.disabled_for_full_scans == 0;
    }

    /// Begins the next full scan.
    pub fn end_full_scan(&mut self) {
        self.full_scan = self.full_scan.wrapping_add(1);
        self.disabled_for_full_scans = self.disabled_for_full_scans.saturating_sub(1);
    }
}
