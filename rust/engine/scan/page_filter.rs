// SPDX-License-Identifier: GPL-2.0-only

//! Which pages a walk collects.

use super::super::{
    accessed::AccessedHint,
    backend::{
        Backend,
        PageKind,
        WalkAction,
        WalkFilter,
        WalkStep, //
    },
    pace::MAX_FORGOTTEN,
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
        SlotId,
        RANGE_PAGES, //
    },
};
use super::context::ScanContext;
use core::ops::Range;
use kernel::{
    alloc::Flags,
    page::PAGE_SIZE,
    prelude::*, //
};

/// Most pages that one walk reaches, whether it collects them or not. Bounds what is done under one
/// mmap lock.
pub(super) const MAX_PAGES_PER_WALK: usize = 1024;

/// Most of what one walk does between pages, in units of [`cost`]: 256 page tables.
const MAX_STEPS: u32 = 256 * cost(WALK_TABLE);

/// Least of it: a vma, and a page table of each level.
const MIN_STEPS: u32 = cost(WalkStep::Vma) + 3 * cost(WALK_TABLE);

/// Going through a whole page table.
const WALK_TABLE: WalkStep = WalkStep::Table(RANGE_PAGES);

/// What takes about as long as a page of the budget, in units of [`cost`].
const STEPS_PER_PAGE: u32 = 32;

/// Runs of unmapped pages that the only walk of a pass can record.
pub(super) const MAX_GAPS: usize = 8;

/// Most bytes of unmapped pages that a walk passes: what is tracked there is forgotten in one go.
const MAX_GAP: usize = MAX_FORGOTTEN * PAGE_SIZE;

/// Runs of untracked pages that one walk can record.
const MAX_RUNS: usize = 16;

/// Returns what a step costs, measured in the time that it takes to pass a vma.
const fn cost(step: WalkStep) -> u32 {
    match step {
        WalkStep::Vma => 1,
        // 512 empty entries take about as long as three pages that are hashed.
        WalkStep::Table(entries) => 8 + entries as u32 * 3 / 16,
    }
}

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
#[derive(Default)]
pub(super) struct WalkSummary {
    /// End of the addresses that the walk has passed.
    pub(super) from: usize,
    /// Pages of the budget that were collected or found unchanged.
    pub(super) budget_used: u32,
    /// The walk has cleared an accessed bit.
    pub(super) cleared: bool,
    /// What was done between pages, in units of [`cost`].
    steps: u32,
    /// Pages that smart scan skipped.
    pub(super) skipped: u64,
    /// Pages that were left as they are, other than by smart scan.
    pub(super) unchanged: u64,
    /// Mappings of the zero page that KSM has placed.
    pub(super) zero_pages: usize,
    /// Addresses between mapped pages, of which some are tracked.
    pub(super) unmapped_gaps: KVec<Range<usize>>,
    /// Their length in bytes.
    gap_bytes: usize,
    /// Addresses of untracked pages that were not collected. They are tracked from now on: the next
    /// scan shows whether they have changed, and many pages are gone by then.
    pub(super) untracked_runs: [Range<usize>; MAX_RUNS],
    pub(super) nr_runs: usize,
    /// The filter has ended the walk.
    pub(super) stopped: bool,
}

impl WalkSummary {
    /// Creates the summary of a walk, with room for a number of gaps.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn new(gaps: usize, flags: Flags) -> Result<Self> {
        Ok(Self {
            unmapped_gaps: KVec::with_capacity(gaps, flags)?,
            ..Self::default()
        })
    }

    /// Begins another walk at this address.
    pub(super) fn begin(&mut self, from: usize) {
        let mut unmapped_gaps = core::mem::take(&mut self.unmapped_gaps);
        unmapped_gaps.clear();
        *self = Self {
            from,
            unmapped_gaps,
            ..Self::default()
        };
    }

    /// Returns what the walk takes of the budget: at least the pages that it scanned.
    pub(super) fn cost(&self) -> u32 {
        self.budget_used.max(self.steps / STEPS_PER_PAGE)
    }
}

/// Decides how far a walk goes, and for each page that it reaches whether it is collected.
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
    /// What is done with a page that is collected.
    collect: WalkAction,
    /// Pages that the walk may scan; those that smart scan skips do not count.
    budget: u32,
    /// Pages that the walk may still reach.
    pages_left: usize,
    /// What the walk may do between pages, in units of [`cost`].
    max_steps: u32,
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
            collect: match ctx.policy.vouched {
                true => WalkAction::CollectUntouched,
                false => WalkAction::Collect,
            },
            budget,
            pages_left: MAX_PAGES_PER_WALK,
            max_steps: budget
                .saturating_mul(STEPS_PER_PAGE)
                .clamp(MIN_STEPS, MAX_STEPS),
            summary,
        }
    }

    /// Returns whether smart scan skips the page this time, as `should_skip_rmap_item()`.
    fn skips(&mut self, page: PageId, state: PageState) -> bool {
        let PageState::Tracked(tracked) = state else {
            return false;
        };
        let mut history = tracked.history();
        let skip = history.should_skip();
        let looked_at = PageState::Tracked(tracked.with_history(history));
        self.states.set(page, looked_at) && skip
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
        let zero = || tracked.fingerprint() == Fingerprint::new(self.backend.zero_hash(), 0);
        tracked.is_indexed()
            && tracked.is_settled()
            && self.hint.unchanged(addr, tracked.history().age)
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
    fn step(&mut self, step: WalkStep) -> bool {
        let steps = self.summary.steps + cost(step);
        if steps > self.max_steps {
            self.summary.stopped = true;
            return false;
        }
        self.summary.steps = steps;
        true
    }

    fn filter(&mut self, addr: usize, kind: PageKind, nid: u32, accessed: bool) -> WalkAction {
        if self.summary.budget_used == self.budget || self.pages_left == 0 {
            self.summary.stopped = true;
            return WalkAction::Stop;
        }
        self.pages_left -= 1;
        let from = self.summary.from;
        if addr > from && self.states.any_in(self.slot, from..addr) {
            let summary = &mut *self.summary;
            let bytes = summary.gap_bytes.saturating_add(addr - from);
            let gaps = &mut summary.unmapped_gaps;
            if bytes > MAX_GAP || gaps.push_within_capacity(from..addr).is_err() {
                summary.stopped = true;
                return WalkAction::Stop;
            }
            summary.gap_bytes = bytes;
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
            _ => self.collect,
        };
        self.summary.budget_used += 1;
        if accessed && matches!(action, WalkAction::Collect | WalkAction::SkipClearAccessed) {
            self.summary.cleared = true;
        }
        action
    }

    fn ksm_zero_page(&mut self) {
        self.summary.zero_pages += 1;
    }
}
