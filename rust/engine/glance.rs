// SPDX-License-Identifier: GPL-2.0-only

//! What the engine thinks of the pages that a walk comes by, without touching them.

use super::{
    accessed::AccessedHint,
    memory::{
        Interest,
        Look,
        Memory,
        PageKind, //
    },
    page_state::{
        PageState,
        PageStates,
        Reader, //
    },
    policy::Policy,
    scan::Walk,
    smart_scan::History,
    types::{
        Fingerprint,
        ItemId,
        NodeId,
        PageId,
        SlotId, //
    },
};
use core::ops::Range;
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// Most pages that one walk comes by, whether it takes them or not. Bounds, too, what is done under one mmap lock.
pub(super) const LOOKS: usize = 1024;

/// Runs of pages that are mapped no more which one walk can note.
const GAPS: usize = 8;

/// Runs of pages that are new which one walk can note.
const RUNS: usize = 16;

/// The page states, as a walk uses them.
pub(super) trait States {
    /// [`PageStates::at`].
    fn at(&mut self, slot: SlotId, addr: usize) -> Option<(PageId, PageState)>;

    /// Whether a page of these addresses is tracked.
    fn any_in(&mut self, slot: SlotId, within: Range<usize>) -> bool;

    /// Changes the state of a page. Returns whether that was possible.
    fn set(&mut self, page: PageId, state: PageState) -> bool;
}

/// For a walk that nobody else walks beside.
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

/// For walks beside each other: each keeps its changes until all are done.
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

/// What a walk has come by, besides the pages it took.
#[derive(Clone, Default)]
pub(super) struct Seen {
    /// All before this address has been looked at.
    pub(super) from: usize,
    /// Pages that were looked at, or taken, of those that were to be.
    pub(super) used: u32,
    /// Pages that smart scan passed over.
    pub(super) skipped: u64,
    /// Pages that were left as they are, without smart scan.
    pub(super) passed: u64,
    /// Addresses between pages in which pages are tracked that are not mapped.
    pub(super) gaps: [Range<usize>; GAPS],
    pub(super) nr_gaps: usize,
    /// Addresses of pages that are to be tracked from now on, and were left as they are: whether a page holds still will show
    /// next time, and many a page is gone by then.
    pub(super) new: [Range<usize>; RUNS],
    pub(super) nr_new: usize,
    /// The walk has been ended.
    pub(super) stopped: bool,
}

/// The eyes of one walk.
pub(super) struct Glance<'a, M, S> {
    memory: &'a M,
    states: S,
    policy: &'a Policy,
    trust: AccessedHint,
    slot: SlotId,
    /// Pages that are to be scanned; those that smart scan skips do not count.
    budget: u32,
    /// Pages that may still be looked at.
    looks: usize,
    pub(super) seen: &'a mut Seen,
}

impl<'a, M: Memory, S: States> Glance<'a, M, S> {
    /// The eyes of a walk that is to come by `budget` pages at most.
    pub(super) fn new(
        memory: &'a M,
        states: S,
        walk: &Walk<'a, M::Mm>,
        budget: u32,
        seen: &'a mut Seen,
    ) -> Self {
        Self {
            memory,
            states,
            policy: walk.policy,
            trust: walk.trust,
            slot: walk.slot,
            budget,
            looks: LOOKS,
            seen,
        }
    }

    /// Smart scan: whether the page is passed over this time.
    fn skips(&mut self, page: PageId, state: PageState) -> bool {
        let PageState::Tracked {
            fingerprint,
            age,
            skips,
            indexed,
        } = state
        else {
            return false;
        };
        let mut history = History { age, skips };
        let skip = history.should_skip();
        let state = PageState::Tracked {
            fingerprint,
            age: history.age,
            skips: history.skips,
            indexed,
        };
        self.states.set(page, state) && skip
    }

    /// Takes note of a page that is not tracked. Returns whether there was room.
    fn is_new(&mut self, addr: usize) -> bool {
        let seen = &mut *self.seen;
        let last = seen.nr_new.checked_sub(1).and_then(|i| seen.new.get_mut(i));
        if let Some(last) = last.filter(|last| last.end == addr) {
            last.end += PAGE_SIZE;
            return true;
        }
        let Some(run) = seen.new.get_mut(seen.nr_new) else {
            return false;
        };
        *run = addr..addr + PAGE_SIZE;
        seen.nr_new += 1;
        true
    }

    /// Whether a page that nothing has touched is where everybody finds it who has the same contents.
    fn waits(&self, addr: usize, state: PageState) -> bool {
        let PageState::Tracked {
            fingerprint,
            indexed: true,
            ..
        } = state
        else {
            return false;
        };
        let zero = || fingerprint == Fingerprint::new(self.memory.zero_hash(), 0);
        self.trust.unchanged(addr) && !(self.policy.use_zero_pages && zero())
    }

    /// Whether a merged page is what it was when its item was made.
    fn settled(&self, item: ItemId, node: NodeId, nid: u32) -> bool {
        self.memory.node_of(item) == Some(node)
            && (self.policy.merge_across_nodes || self.memory.node_nid(node) == nid)
    }
}

impl<M: Memory, S: States> Look for Glance<'_, M, S> {
    fn look(&mut self, addr: usize, kind: PageKind, nid: u32, touched: bool) -> Interest {
        if self.seen.used == self.budget || self.looks == 0 {
            self.seen.stopped = true;
            return Interest::Stop;
        }
        self.looks -= 1;
        let from = self.seen.from;
        if addr > from && self.states.any_in(self.slot, from..addr) {
            let Some(gap) = self.seen.gaps.get_mut(self.seen.nr_gaps) else {
                self.seen.stopped = true;
                return Interest::Stop;
            };
            *gap = from..addr;
            self.seen.nr_gaps += 1;
        }
        self.seen.from = addr + PAGE_SIZE;
        let interest = match (kind, self.states.at(self.slot, addr)) {
            (PageKind::Ksm(node), Some((_, PageState::Merged(item))))
                if self.settled(item, node, nid) =>
            {
                self.seen.passed += 1;
                Interest::Pass
            }
            (PageKind::Plain, Some((page, state)))
                if self.policy.smart_scan && self.skips(page, state) =>
            {
                self.seen.skipped += 1;
                return Interest::Pass;
            }
            (PageKind::Plain, Some((_, state))) if !touched && self.waits(addr, state) => {
                self.seen.passed += 1;
                Interest::Pass
            }
            (PageKind::Plain, None) if self.trust.enabled() && self.is_new(addr) => {
                self.seen.passed += 1;
                Interest::Note
            }
            _ => Interest::Take,
        };
        self.seen.used += 1;
        interest
    }
}
