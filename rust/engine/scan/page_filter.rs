// SPDX-License-Identifier: GPL-2.0-only

//! Which pages a walk collects.

use super::super::{
    accessed::AccessedHint,
    backend::{
        Backend,
        PageKind,
        WalkAction,
        WalkFilter, //
    },
    page_state::{
        PageState,
        PageStates,
        Reader, //
    },
    policy::Policy,
    types::{
        Fingerprint,
        ItemId,
        NodeId,
        PageId,
        SlotId, //
    },
};
use super::context::ScanContext;
use core::ops::Range;
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// Most pages that one walk reaches, whether it collects them or not. Bounds what is done under one
/// mmap lock.
pub(super) const MAX_PAGES_PER_WALK: usize = 1024;

/// Runs of unmapped pages that one walk can record.
const MAX_GAPS: usize = 8;

/// Runs of untracked pages that one walk can record.
const MAX_RUNS: usize = 16;

/// The page states, as a walk uses them.
pub(super) trait States {
    /// [`PageStates::at`].
    fn at(&mut self, slot: SlotId, addr: usize) -> Option<(PageId, PageState)>;

    /// Returns whether a page of these addresses is tracked.
    fn any_in(&mut self, slot: SlotId, within: Range<usize>) -> bool;

    /// Changes the state of a page. Returns whether that was possible.
    fn set(&mut self, page: PageId, state: PageState) -> bool;
}

/// For the only walk of a pass.
impl States for &mut PageStates {
    fn at(&mut self, slot: SlotId, addr: usize) -> Option<(PageId, PageState)> {
        PageStates::at(self, slot, addr)
    }

    fn any_in(&mut self, slot: SlotId, within: Range<usize>) -> bool {
        self.first_in(slot, within).is_some()
    }

    fn set(&mut self, page: PageId, state: PageState) -> bool {
        PageStates::set(self, page, state).is_some()
    }
}

/// For walks that run at the same time: changes are kept until all have ended.
pub(super) struct Deferred<'a> {
    pub(super) reader: Reader<'a>,
    pub(super) changes: &'a mut KVec<(PageId, PageState)>,
}

impl States for Deferred<'_> {
    fn at(&mut self, slot: SlotId, addr: usize) -> Option<(PageId, PageState)> {
        self.reader.at(slot, addr)
    }

    fn any_in(&mut self, slot: SlotId, within: Range<usize>) -> bool {
        self.reader.first_in(slot, within).is_some()
    }

    fn set(&mut self, page: PageId, state: PageState) -> bool {
        self.changes.push_within_capacity((page, state)).is_ok()
    }
}

/// What a walk has found besides the pages it collected.
#[derive(Clone, Default)]
pub(super) struct WalkSummary {
    /// End of the addresses that the walk has passed.
    pub(super) from: usize,
    /// Pages of the budget that were collected or found unchanged.
    pub(super) budget_used: u32,
    /// Pages that smart scan skipped.
    pub(super) skipped: u64,
    /// Pages that were left as they are, other than by smart scan.
    pub(super) unchanged: u64,
    /// Mappings of the zero page that KSM has placed.
    pub(super) zero_pages: usize,
    /// Addresses between mapped pages, of which some are tracked.
    pub(super) unmapped_gaps: [Range<usize>; MAX_GAPS],
    pub(super) nr_gaps: usize,
    /// Addresses of untracked pages that were not collected. They are tracked from now on: the next
    /// scan shows whether they have changed, and many pages are gone by then.
    pub(super) untracked_runs: [Range<usize>; MAX_RUNS],
    pub(super) nr_runs: usize,
    /// The filter has ended the walk.
    pub(super) stopped: bool,
}

/// Decides for each page that a walk reaches whether it is collected.
///
/// One per walk; called under a page table lock.
pub(super) struct PageFilter<'a, B, S> {
    backend: &'a B,
    states: S,
    policy: &'a Policy,
    hint: AccessedHint,
    cleared_ahead: Range<usize>,
    slot: SlotId,
    moves: bool,
    /// Pages that the walk may scan; those that smart scan skips do not count.
    budget: u32,
    /// Pages that the walk may still reach.
    pages_left: usize,
    pub(super) summary: &'a mut WalkSummary,
}

impl<'a, B: Backend, S: States> PageFilter<'a, B, S> {
    /// Creates the filter of a walk that scans `budget` pages at most.
    pub(super) fn new(
        backend: &'a B,
        states: S,
        ctx: &ScanContext<'a, B::Mm>,
        budget: u32,
        summary: &'a mut WalkSummary,
    ) -> Self {
        Self {
            backend,
            states,
            policy: ctx.policy,
            hint: ctx.hint,
            cleared_ahead: ctx.cleared_ahead.clone(),
            slot: ctx.slot,
            moves: ctx.moves,
            budget,
            pages_left: MAX_PAGES_PER_WALK,
            summary,
        }
    }

    /// Returns whether smart scan skips the page this time, as `should_skip_rmap_item()`.
    fn skips(&mut self, page: PageId, state: PageState) -> bool {
        let PageState::Tracked(mut tracked) = state else {
            return false;
        };
        let skip = tracked.history.should_skip();
        self.states.set(page, PageState::Tracked(tracked)) && skip
    }

    /// Records a page that is not tracked. Returns whether there was room.
    fn record_untracked(&mut self, addr: usize) -> bool {
        let summary = &mut *self.summary;
        let last = summary
            .nr_runs
            .checked_sub(1)
            .and_then(|i| summary.untracked_runs.get_mut(i));
        if let Some(last) = last.filter(|last| last.end == addr) {
            last.end += PAGE_SIZE;
            return true;
        }
        let Some(run) = summary.untracked_runs.get_mut(summary.nr_runs) else {
            return false;
        };
        *run = addr..addr + PAGE_SIZE;
        summary.nr_runs += 1;
        true
    }

    /// Returns whether an unaccessed page is already a candidate, so that an equal page will find
    /// it and nothing has to be done now.
    fn is_unaccessed_candidate(&self, addr: usize, state: PageState) -> bool {
        let PageState::Tracked(tracked) = state else {
            return false;
        };
        let zero = || tracked.fingerprint == Fingerprint::new(self.backend.zero_hash(), 0);
        tracked.indexed
            && self.hint.unchanged(addr, tracked.history.age)
            && !self.cleared_ahead.contains(&addr)
            && !(self.policy.use_zero_pages && zero())
    }

    /// Returns whether a page still maps the KSM page of its rmap item's node, and stays there.
    fn still_maps_node(&self, item: ItemId, node: NodeId, nid: u32) -> bool {
        self.backend.node_of(item) == Some(node)
            && (self.policy.merge_across_nodes || self.backend.nid(node) == nid)
            && !(self.moves && self.backend.meta(node).is_some_and(|meta| meta.retiring))
    }
}

impl<B: Backend, S: States> WalkFilter for PageFilter<'_, B, S> {
    fn filter(&mut self, addr: usize, kind: PageKind, nid: u32, accessed: bool) -> WalkAction {
        if self.summary.budget_used == self.budget || self.pages_left == 0 {
            self.summary.stopped = true;
            return WalkAction::Stop;
        }
        self.pages_left -= 1;
        let from = self.summary.from;
        if addr > from && self.states.any_in(self.slot, from..addr) {
            let Some(gap) = self.summary.unmapped_gaps.get_mut(self.summary.nr_gaps) else {
                self.summary.stopped = true;
                return WalkAction::Stop;
            };
            *gap = from..addr;
            self.summary.nr_gaps += 1;
        }
        self.summary.from = addr + PAGE_SIZE;
        let action = match (kind, self.states.at(self.slot, addr)) {
            (PageKind::Ksm(node), Some((_, PageState::Merged(item))))
                if self.still_maps_node(item, node, nid) =>
            {
                self.summary.unchanged += 1;
                WalkAction::Skip
            }
            (PageKind::Plain, Some((page, state)))
                if self.policy.smart_scan && self.skips(page, state) =>
            {
                self.summary.skipped += 1;
                return WalkAction::Skip;
            }
            (PageKind::Plain, Some((_, state)))
                if !accessed && self.is_unaccessed_candidate(addr, state) =>
            {
                self.summary.unchanged += 1;
                WalkAction::Skip
            }
            (PageKind::Plain, None) if self.hint.enabled() && self.record_untracked(addr) => {
                self.summary.unchanged += 1;
                WalkAction::SkipClearAccessed
            }
            _ => WalkAction::Collect,
        };
        self.summary.budget_used += 1;
        action
    }

    fn ksm_zero_page(&mut self) {
        self.summary.zero_pages += 1;
    }
}
