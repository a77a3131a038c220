// SPDX-License-Identifier: GPL-2.0-only

//! When a clear accessed bit counts as unchanged contents.
//!
//! A walk clears the bits of the pages that it collects, and flushes no TLB: that would cost a busy
//! process more than the scan. A CPU that still has a translation uses it without setting the bit.
//! So the TLBs are flushed once in a full scan, after the last page of the mm, if any bit was
//! cleared. Where a page is accessed after that, its next look finds the bit set. Between its look
//! and the flush it can be accessed without a trace, through a translation from before the look, if
//! that look has found it accessed. So a page that is read then is read at its next look, too
//! ([`Tracked::is_settled`](super::page_state::Tracked::is_settled)).
//!
//! Devices write without leaving a trace in page tables, and reclaim clears bits. A stale hint
//! delays a merge, or has one tried in vain. It never merges what differs: contents are compared
//! with the page table entry cleared and flushed. And it ends: one *look* of [`REREAD_INTERVAL`]
//! reads the page in any case. A look is a full scan that does not skip the page.

use super::{
    policy::Policy,
    smart_scan::{
        MAX_SKIPS,
        OLD_AGE, //
    }, //
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// Number of looks within which an unaccessed page is read again.
pub const REREAD_INTERVAL: usize = 16;

/// Full scans from one look at an old page to the next, with smart scan.
const OLD_STRIDE: usize = MAX_SKIPS as usize + 1;

// Looks at an old page have all remainders, one after the other.
static_assert!(OLD_STRIDE * OLD_STRIDE % REREAD_INTERVAL == 1);

/// Age from which on a look is the last one before a page is old, and full scans until the next.
const LAST_YOUNG_AGE: u8 = 6;
const LAST_YOUNG_STRIDE: usize = 5;

/// Looks at a page from its first hash to that one, at most, where the knob is not changed.
const YOUNG_LOOKS: usize = 4;

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

impl Default for AccessedHint {
    fn default() -> Self {
        Self::new()
    }
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
    /// `age` is that of the page before smart scan counts this look.
    ///
    /// False at one of [`REREAD_INTERVAL`] looks in a row at least. The number of the full scan
    /// decides: all of them look, or, with smart scan and at an old page, each ninth, which has no
    /// common divisor with the interval. A page that grows old is read at its last look before, if
    /// it would have to wait for too long afterwards, and not at others.
    #[inline]
    pub const fn unchanged(&self, addr: usize, age: u8) -> bool {
        let turn = (addr / PAGE_SIZE).wrapping_add(self.full_scan);
        let changed = if !self.smart_scan || age >= OLD_AGE {
            turn % REREAD_INTERVAL == 0
        } else if age >= LAST_YOUNG_AGE {
            // Looks at the old page until the one at which it is read: the inverse of the stride,
            // which is the stride itself, times what is missing from a multiple of the interval.
            let missing = turn.wrapping_add(LAST_YOUNG_STRIDE).wrapping_neg();
            missing.wrapping_mul(OLD_STRIDE) % REREAD_INTERVAL >= REREAD_INTERVAL - YOUNG_LOOKS
        } else {
            false
        };
        self.enabled && !changed
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

    /// Returns the hint for pages at whose look with this number it is decided which are read,
    /// where full scans are not what counts their looks.
    pub(super) fn at_look(self, look: u8) -> Self {
        Self {
            full_scan: usize::from(look),
            ..self
        }
    }

    /// Begins the next full scan.
    pub fn end_full_scan(&mut self) {
        self.full_scan = self.full_scan.wrapping_add(1);
        self.disabled_for_full_scans = self.disabled_for_full_scans.saturating_sub(1);
    }
}
