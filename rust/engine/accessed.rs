// SPDX-License-Identifier: GPL-2.0-only

//! When a clear accessed bit counts as unchanged contents.

use super::policy::Policy;
use kernel::page::PAGE_SIZE;

/// Number of full scans after which an unaccessed page is read again: devices write without leaving
/// a trace in page tables.
const REREAD_INTERVAL: usize = 16;

/// Decides for which pages a clear accessed bit counts as unchanged contents.
///
/// A hint only: devices write without setting the bit, and reclaim clears it.
#[derive(Clone, Copy)]
pub(super) struct AccessedHint {
    enabled: bool,
    /// Number of the full scan.
    full_scan: usize,
    /// `merge_across_nodes` as it was last.
    across_nodes: bool,
    /// Full scans to come before fingerprints are again what they were made under other knobs.
    disabled_for_full_scans: u8,
}

impl AccessedHint {
    /// Creates a hint that says nothing until [`AccessedHint::update`] is called.
    pub(super) const fn new() -> Self {
        Self {
            enabled: false,
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

    /// Returns whether the page at `addr` has the contents it had, given that its accessed bit is
    /// clear.
    #[inline]
    pub(super) const fn unchanged(&self, addr: usize) -> bool {
        self.enabled && (addr / PAGE_SIZE).wrapping_add(self.full_scan) % REREAD_INTERVAL != 0
    }

    /// Follows the knobs: a page may migrate to another NUMA node unaccessed, so the hint is
    /// disabled where fingerprints depend on the node.
    pub(super) fn update(&mut self, policy: &Policy) {
        if self.across_nodes != policy.merge_across_nodes {
            self.across_nodes = policy.merge_across_nodes;
            // The full scan that is under way may have gone past some pages already.
            self.disabled_for_full_scans = 2;
        }
        self.enabled = policy.merge_across_nodes && self.disabled_for_full_scans == 0;
    }

    /// Begins the next full scan.
    pub(super) fn end_full_scan(&mut self) {
        self.full_scan = self.full_scan.wrapping_add(1);
        self.disabled_for_full_scans = self.disabled_for_full_scans.saturating_sub(1);
    }
}
