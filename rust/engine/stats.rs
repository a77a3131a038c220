// SPDX-License-Identifier: GPL-2.0-only

//! The counters behind the read-only files, and what is derived from them.

use super::types::Refusals;

use kernel::page::PAGE_SIZE;

/// What the scanner counts, in pages unless said otherwise.
///
/// Lives under the lock that protects the engine. Readers of the files take a copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Pages looked at, ever.
    pub pages_scanned: u64,
    /// Merged pages in use.
    pub pages_shared: u64,
    /// Mappings of merged pages beyond the first of each: the pages saved.
    pub pages_sharing: u64,
    /// Candidates: unchanged since the last full scan, and no other page like them found.
    pub pages_unshared: u64,
    /// Pages passed over by smart scan, ever.
    pub pages_skipped: u64,
    /// Full scans completed since the last unmerge.
    pub full_scans: u64,
    /// Contents that are held by more than one merged page, for want of room in the first.
    pub stable_node_chains: u64,
    /// Merged pages that hold such contents.
    pub stable_node_dups: u64,
    /// Pages that there is state for, merged ones included.
    pub tracked: u64,
    /// What merges have done, ever.
    pub merges: Merges,
}

/// What merges have done, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Merges {
    /// Pages that have become mappings of a merged page.
    pub merged: u64,
    /// Pages that have become mappings of the zero page.
    pub zeroed: u64,
    /// Page frames that this has saved. A merged page that has two mappings saves one.
    pub saved: u64,
}

impl Merges {
    /// Returns what has been done since `before`.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            merged: self.merged.wrapping_sub(before.merged),
            zeroed: self.zeroed.wrapping_sub(before.zeroed),
            saved: self.saved.wrapping_sub(before.saved),
        }
    }

    /// Counts a page that has become a mapping of the zero page.
    pub(super) fn count_zero_page(&mut self) {
        self.zeroed += 1;
        self.saved += 1;
    }

    /// Counts a merge of this many pages, which saves one.
    pub(super) fn count(&mut self, pages: u64) {
        self.merged += pages;
        self.saved += 1;
    }
}

impl Counters {
    /// One more mapping of a merged page; `first` if it had none.
    pub fn mapping_added(&mut self, first: bool) {
        let counter = self.mappings(first);
        *counter = counter.wrapping_add(1);
    }

    /// One mapping less of a merged page; `last` if it has none now.
    pub fn mapping_removed(&mut self, last: bool) {
        let counter = self.mappings(last);
        debug_assert!(*counter != 0);
        *counter = counter.wrapping_sub(1);
    }

    fn mappings(&mut self, only: bool) -> &mut u64 {
        if only {
            &mut self.pages_shared
        } else {
            &mut self.pages_sharing
        }
    }
}

/// Everything that the read-only files show, at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The engine's counters.
    pub counters: Counters,
    /// How often each reason kept a page from being merged, since the load.
    pub refusals: Refusals,
    /// Mappings of the zero page that KSM placed. The core of mm counts them down, so that a
    /// reader may find a value below zero.
    pub zero_pages: i64,
    /// Bytes of memory that page state, index, nodes and rmap items take.
    pub metadata_bytes: u64,
    /// Longest hold of the scan lock by the scanner since the load, in microseconds.
    pub longest_hold_usecs: u64,
    /// How often the scanner has slept and gone on, since the load.
    pub wakeups: u64,
    /// CPU time of the scanner and the threads that help it, since the load, in microseconds.
    pub cpu_microsecs: u64,
    /// Registered mms.
    pub processes: u64,
    /// The governor finds memory short.
    pub memory_pressure: bool,
}

impl Snapshot {
    /// Tracked pages that change too often to be candidates.
    ///
    /// The counters may have been read while they changed: a difference below zero counts as 0.
    pub fn pages_volatile(&self) -> u64 {
        let counters = &self.counters;
        let volatile = counters
            .tracked
            .wrapping_sub(counters.pages_shared)
            .wrapping_sub(counters.pages_sharing)
            .wrapping_sub(counters.pages_unshared);
        (volatile as i64).max(0) as u64
    }

    /// Bytes saved less the bytes of our own metadata; negative if KSM costs more than it saves.
    pub fn general_profit(&self) -> i64 {
        (self.counters.pages_sharing as i64)
            .wrapping_add(self.zero_pages)
            .wrapping_mul(PAGE_SIZE as i64)
            .wrapping_sub(self.metadata_bytes as i64)
    }
}
