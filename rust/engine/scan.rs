// SPDX-License-Identifier: GPL-2.0-only

//! The engine: what becomes of each page that the scanner comes by.
//!
//! A page is merged after its contents have held still from one full scan to the next, with a merged page of the
//! same contents if there is one, else with another page that has held still, a *candidate*. Both are looked up in
//! one content index by a fingerprint; the [`Memory`] compares the contents themselves once nobody can write to
//! the page any more, so that no answer of the index can do harm.
//!
//! A merged page is mapped at most `max_page_sharing` times. So one content may have several merged pages, whose
//! stable nodes form a ring. The newest is the ring's head and the only one in the index; nodes that have got room
//! again are moved next to it. A search looks at no more than [`RING_LOOK`] of them.
//!
//! Contents are not read again while nothing has touched the page ([`AccessedHint`]). What is remembered of them may then be
//! out of date, which costs a merge tried in vain, or one that comes some scans late.
//!
//! # Locks
//!
//! The engine is a plain value under the `thread_mutex`, which the scanner holds for a batch, and a write to `run`
//! while it unmerges.

use super::{
    accessed::AccessedHint,
    index::{
        Entry,
        Index, //
    },
    lane::{
        Chunk,
        Crew,
        Lane,
        Lanes,
        Leader,
        Slice,
        Step,
        Work, //
    },
    memory::{
        Collected,
        Memory,
        Merge,
        Merged,
        NodeMeta,
        NodeState,
        PageKind,
        Pair,
        Partner,
        Place, //
    },
    page_state::{
        PageState,
        PageStates, //
    },
    policy::Policy,
    stats::Counters,
    types::{
        Fingerprint,
        ItemId,
        NodeId,
        PageId,
        Progress,
        Refusal,
        Refusals,
        SlotId, //
    },
};
use core::{
    cell::Cell,
    ops::Range, //
};
use kernel::{
    alloc::flags::*,
    page::PAGE_SIZE,
    prelude::*, //
};

/// Most pages of one walk. Bounds what is done under one mmap lock.
pub const BATCH: usize = 64;

/// Nodes of a ring that a search for room looks at.
const RING_LOOK: usize = 3;

/// Candidates of the same contents: so many are tried, and kept.
const CANDIDATE_TRIES: u8 = 4;

/// Finds the mm of a slot whose pages are tracked.
pub trait Pins<Mm> {
    /// Pins the mm of a slot; `None` once it has left.
    ///
    /// May take the registry's lock.
    fn pin(&self, slot: SlotId) -> Option<Mm>;
}

/// An mm that is scanned, and how.
pub(super) struct Walk<'a, Mm> {
    pub(super) policy: &'a Policy,
    pub(super) trust: AccessedHint,
    pub(super) slot: SlotId,
    pub(super) mm: &'a Mm,
}

impl<Mm> Walk<'_, Mm> {
    /// Takes note of whether the `i`th page of a batch, whose fingerprint was that of `work`, seems not to have been touched,
    /// and of whether its contents are to be read.
    pub(super) fn read<M: Memory<Mm = Mm>>(
        &self,
        memory: &M,
        batch: &M::Batch,
        i: usize,
        work: &mut Work,
    ) {
        work.still = self.trust.enabled() && !memory.touched(batch, i);
        let known = work.fingerprint != Fingerprint::NONE;
        work.fresh = !(known && work.still && self.trust.unchanged(work.addr));
        if !self.policy.merge_across_nodes {
            work.domain = memory.nid(batch, i);
        }
    }
}

/// What a page is being merged with.
#[derive(Clone, Copy)]
enum With {
    Zero,
    Node(NodeId),
    Candidate(PageId),
}

/// A merge that is ready, of a page of a batch.
pub(super) struct Pending<M: Memory> {
    lane: usize,
    i: usize,
    fingerprint: Fingerprint,
    with: With,
    merge: M::Merge,
}

/// What is to be done about a page.
enum Next {
    /// Nothing more.
    Done,
    /// The merge that has been added to the chunk.
    Merge,
    /// That merge, at once, before others are begun: its page is part of a huge page.
    Split,
    /// What the merges under way leave.
    Later,
    /// A merge, when all before it are done: its page is part of a huge page.
    Alone,
}

/// What is known of all pages, and the merging of them.
///
/// # Invariants
///
/// 1. A page is in the index as a candidate if and only if its state is tracked and `indexed`, under its state's
///    fingerprint.
/// 2. A page's state is `Merged(item)` if and only if `item` exists and names the page.
/// 3. Nodes with one fingerprint form rings, each with exactly one head, which is in the index under that
///    fingerprint. (A node for which the index had no memory is a ring of its own without a head.)
/// 4. `counters` count what is there.
/// 5. No content has more than [`CANDIDATE_TRIES`] candidates, so that a search for it ends soon.
pub struct Engine<M: Memory> {
    memory: M,
    states: PageStates,
    index: Index,
    /// What the files show.
    pub counters: Counters,
    /// Why pages were not merged.
    pub refusals: Refusals,
    swept: Option<NodeId>,
    trust: AccessedHint,
}

impl<M: Memory> Engine<M> {
    /// An engine that knows no page. Allocates nothing.
    pub fn new(memory: M) -> Self {
        Self {
            memory,
            states: PageStates::new(),
            index: Index::new(),
            counters: Counters::default(),
            refusals: Refusals::default(),
            swept: None,
            trust: AccessedHint::new(),
        }
    }

    /// Bytes of memory that page states, index, nodes and rmap items take.
    pub fn bytes(&self) -> usize {
        self.states.bytes() + self.index.bytes() + self.memory.bytes()
    }

    /// Whether a page of this mm is tracked.
    pub fn tracks(&self, slot: SlotId) -> bool {
        self.states.tracked(slot) != 0
    }

    /// Stable nodes in existence, those without mappings included.
    pub fn nodes(&self) -> usize {
        self.memory.nodes()
    }

    /// Scans an mm from `start` on until it ends or `budget` pages have been scanned, with all threads of the crew.
    ///
    /// Pages that smart scan skips cost no budget. May sleep.
    pub fn scan_mm<P: Pins<M::Mm>>(
        &mut self,
        policy: &Policy,
        pins: &P,
        (slot, mm): (SlotId, &M::Mm),
        start: usize,
        (crew, lanes): (&impl Crew, &mut Lanes<M>),
        budget: &mut u32,
    ) -> Progress {
        self.trust.update(policy);
        let walk = Walk {
            policy,
            trust: self.trust,
            slot,
            mm,
        };
        let mut at = start;
        while *budget > 0 {
            let opened = lanes.open(at, *budget);
            self.collect(&walk, crew, lanes.first(opened));
            let exiting = |lane: &Lane<M>| lane.found == Collected::Exiting;
            if lanes.first(opened).iter().any(exiting) {
                for lane in lanes.first(opened) {
                    lane.changes.clear();
                    self.memory.discard(&mut lane.batch);
                }
                self.clear(crew, lanes);
                self.forget_mm(slot, mm);
                return Progress::Exiting;
            }
            // Where a lane has more than fits into its batch, those after it are for the next pass.
            let stopped = lanes.first(opened).iter().position(Lane::stopped);
            let n = stopped.map_or(opened, |l| l + 1);
            for lane in lanes.first(opened).iter_mut().skip(n) {
                lane.changes.clear();
                self.memory.discard(&mut lane.batch);
                lane.within = 0..0;
            }

            for lane in lanes.first(n) {
                *budget -= lane.seen.used;
                self.take_note(&walk, lane);
            }
            lanes.fit(n, n < opened);
            if self.begin(&walk, crew, lanes.first(n)) {
                self.merge_all(&walk, pins, crew, lanes, n);
            }
            let mut end = Collected::End;
            for lane in lanes.first(n) {
                end = lane.found;
                let to = match end {
                    Collected::More(next) => next.min(lane.within.end),
                    _ => lane.within.end,
                };
                self.forget(slot, mm, lane.seen.from..to);
            }
            match end {
                Collected::More(next) => at = next,
                _ => {
                    self.clear(crew, lanes);
                    return Progress::Done;
                }
            }
            if self.memory.breathe() {
                break;
            }
        }
        self.clear(crew, lanes);
        Progress::At(at)
    }

    /// Walks the lanes' parts of the address space.
    fn collect(&mut self, walk: &Walk<'_, M::Mm>, crew: &impl Crew, lanes: &mut [Lane<M>]) {
        if let [lane] = lanes {
            lane.walk_alone(&self.memory, &mut self.states, walk);
            return;
        }
        let (memory, states) = (&self.memory, &self.states);
        crew.each(lanes, |lane| lane.walk(memory, states, walk));
    }

    /// Gives up what is left of the batches.
    fn clear(&self, crew: &impl Crew, lanes: &mut Lanes<M>) {
        crew.each(lanes.all(), |lane| self.memory.clear(&mut lane.batch));
    }

    /// Takes note of what a walk has come by, besides the pages it took.
    fn take_note(&mut self, walk: &Walk<'_, M::Mm>, lane: &mut Lane<M>) {
        let Counters {
            pages_scanned,
            pages_skipped,
            ..
        } = &mut self.counters;
        *pages_scanned = pages_scanned.wrapping_add(lane.seen.passed);
        *pages_skipped = pages_skipped.wrapping_add(lane.seen.skipped);
        for &(page, state) in &lane.changes {
            self.states.set(page, state);
        }
        lane.changes.clear();
        let gaps = lane.seen.gaps.iter().take(lane.seen.nr_gaps);
        for gap in gaps {
            self.forget(walk.slot, walk.mm, gap.clone());
        }
        for new in lane.seen.new.iter().take(lane.seen.nr_new) {
            self.track(walk, new.clone());
        }
    }

    /// Reads the pages that have to be read, and sees which of the batches' pages need more attention. Returns whether any does.
    fn begin(&mut self, walk: &Walk<'_, M::Mm>, crew: &impl Crew, lanes: &mut [Lane<M>]) -> bool {
        let key = self.memory.key();
        let mut beginner = Beginner {
            engine: self,
            walk,
            slices: lanes.iter_mut().flat_map(Lane::slices),
            any_left: false,
        };
        crew.follow(&mut beginner, |slice| slice.hash(&key));
        beginner.any_left
    }

    /// Takes note that nothing more is to be done with a page of a batch.
    fn done(&mut self, batch: &M::Batch, i: usize, work: &mut Work) {
        work.step = Step::Done;
        self.counters.pages_scanned = self.counters.pages_scanned.wrapping_add(1);
        self.memory.done(batch, i);
    }

    /// Decides about the pages of the batches, and merges what can be.
    fn merge_all<P: Pins<M::Mm>>(
        &mut self,
        walk: &Walk<'_, M::Mm>,
        pins: &P,
        crew: &impl Crew,
        lanes: &mut Lanes<M>,
        n: usize,
    ) {
        lanes.rewind();
        let mut merger = Merger {
            engine: self,
            walk,
            pins,
            lanes,
            n,
            turn: 0,
            under_way: 0,
            merged: false,
        };
        crew.follow(&mut merger, |chunk| {
            M::Merge::run_all(chunk.iter_mut().map(|pending| &mut pending.merge));
        });
    }

    /// Takes note that a full scan has ended.
    pub fn end_full_scan(&mut self) {
        self.counters.full_scans += 1;
        self.trust.end_full_scan();
    }

    /// Forgets all pages of an mm: it has left, or all of it has been unmerged. May sleep.
    pub fn forget_mm(&mut self, slot: SlotId, mm: &M::Mm) {
        let mut at = 0;
        while let Some((page, addr, state)) = self.states.next_linked(slot, at) {
            self.release_state(page, state);
            at = addr.saturating_add(PAGE_SIZE);
            self.memory.breathe();
        }
        let tracked = self.states.remove_slot(slot);
        self.counters.tracked = self.counters.tracked.wrapping_sub(tracked as u64);
        self.memory.account_tracked(mm, -(tracked as isize));
    }

    /// Looks at up to `count` stable nodes, going round, and removes those whose page is gone. Returns whether the
    /// round has ended.
    pub fn sweep(&mut self, count: usize) -> bool {
        for _ in 0..count {
            let Some(node) = self.memory.next_node(self.swept) else {
                self.swept = None;
                return true;
            };
            self.swept = Some(node);
            if self.memory.mappings(node) == 0 || self.memory.state(node) == NodeState::Stale {
                self.remove_node(node);
            } else if let Some(meta) = self.memory.meta(node) {
                if !meta.head && meta.next == node && meta.fingerprint != Fingerprint::NONE {
                    self.link_node(node, meta.fingerprint);
                }
            }
        }
        false
    }

    /// Removes all stable nodes. Returns whether none is left: a page that is still mapped keeps its node.
    pub fn remove_all_nodes(&mut self) -> bool {
        let mut at = None;
        while let Some(node) = self.memory.next_node(at) {
            self.remove_node(node);
            at = Some(node);
            self.memory.breathe();
        }
        self.memory.nodes() == 0
    }

    /// Forgets the stable nodes whose page frames, by number, have gone offline.
    pub fn forget_frames(&mut self, frames: Range<usize>) {
        let mut at = None;
        while let Some(node) = self.memory.next_node_in(at, frames.clone()) {
            at = Some(node);
            self.drop_node(node, |memory, node, orphan| {
                memory.forget_node(node, orphan);
                true
            });
        }
    }

    /// Checks all invariants, in time proportional to the number of tracked pages. May sleep.
    ///
    /// # Errors
    ///
    /// Says which one does not hold.
    pub fn check(&mut self) -> Result<(), &'static str> {
        self.states.check()?;
        let (stable, candidates) = (Cell::new(0), Cell::new(0));
        self.index.check(|entry| {
            let indexed = match entry {
                Entry::Stable(node) => {
                    stable.set(stable.get() + 1);
                    self.memory.meta(node)?.head
                }
                Entry::Candidate(page) => {
                    candidates.set(candidates.get() + 1);
                    matches!(
                        self.states.get(page)?,
                        PageState::Tracked { indexed: true, .. }
                    )
                }
            };
            key_of(&self.states, &self.memory, entry).filter(|_| indexed)
        })?;
        let mappings = self.check_nodes(stable.get())?;
        self.check_pages(candidates.get(), mappings)
    }

    /// Checks nodes against index and counters. Returns the number of rmap items.
    fn check_nodes(&mut self, in_index: usize) -> Result<u64, &'static str> {
        let (mut heads, mut in_rings, mut alone) = (0, 0, 0);
        let mut found = Counters::default();
        let mut at = None;
        while let Some(node) = self.memory.next_node(at) {
            at = Some(node);
            let meta = self
                .memory
                .meta(node)
                .ok_or("engine: a node that is none")?;
            match u64::from(self.memory.mappings(node)) {
                0 => {}
                mappings => {
                    found.pages_shared += 1;
                    found.pages_sharing += mappings - 1;
                }
            }
            if meta.head {
                let size = self.check_ring(node, meta)?;
                heads += 1;
                in_rings += size;
                if size > 1 {
                    found.stable_node_chains += 1;
                    found.stable_node_dups += size as u64;
                }
            } else if meta.next == node {
                if meta.prev != node {
                    return Err("engine: a node that is alone has another before it");
                }
                alone += 1;
            }
            self.memory.breathe();
        }
        if in_rings + alone != self.memory.nodes() {
            return Err("engine: not every node is in one ring with a head");
        }
        if heads != in_index {
            return Err("engine: the index has a node that is no head");
        }
        let counted = &self.counters;
        if (counted.pages_shared, counted.pages_sharing)
            != (found.pages_shared, found.pages_sharing)
        {
            return Err("engine: merged pages or their mappings are counted wrongly");
        }
        if (counted.stable_node_chains, counted.stable_node_dups)
            != (found.stable_node_chains, found.stable_node_dups)
        {
            return Err("engine: rings or the nodes in them are counted wrongly");
        }
        Ok(found.pages_shared + found.pages_sharing)
    }

    /// Checks the ring of a head. Returns how many nodes it has.
    fn check_ring(&self, head: NodeId, meta: NodeMeta) -> Result<usize, &'static str> {
        let of_content = |entry: &Entry| match entry {
            Entry::Stable(node) => {
                self.memory.meta(*node).map(|m| m.fingerprint) == Some(meta.fingerprint)
            }
            Entry::Candidate(_) => false,
        };
        let mut indexed = self.index.find(meta.fingerprint).filter(of_content);
        if indexed.next() != Some(Entry::Stable(head)) || indexed.next().is_some() {
            return Err("engine: the index has not just the head for a content");
        }
        let (mut size, mut last, mut node) = (1, head, meta.next);
        while node != head {
            let meta_here = self
                .memory
                .meta(node)
                .ok_or("engine: a ring has a node that is none")?;
            if meta_here.head || meta_here.prev != last || meta_here.fingerprint != meta.fingerprint
            {
                return Err("engine: a ring has a node that does not belong there");
            }
            size += 1;
            if size > self.memory.nodes() {
                return Err("engine: a ring does not close");
            }
            (last, node) = (node, meta_here.next);
        }
        if meta.prev != last {
            return Err("engine: a ring is not linked both ways");
        }
        Ok(size)
    }

    /// Checks page states against index, items and counters.
    fn check_pages(&mut self, in_index: usize, items: u64) -> Result<(), &'static str> {
        let (mut seen, mut merged, mut indexed) = (0, 0, 0);
        let mut slot = 0;
        while seen < self.states.tracked_total() {
            let mut at = 0;
            while let Some((page, addr, state)) = self.states.first_in(SlotId(slot), at..usize::MAX)
            {
                seen += 1;
                at = addr.saturating_add(PAGE_SIZE);
                match state {
                    PageState::Merged(item) => {
                        merged += 1;
                        let node = self.memory.node_of(item).and_then(|n| self.memory.meta(n));
                        node.ok_or("engine: a merged page has an item that is none")?;
                    }
                    PageState::Tracked {
                        fingerprint,
                        indexed: true,
                        ..
                    } => {
                        indexed += 1;
                        let own = |entry: &Entry| *entry == Entry::Candidate(page);
                        if self.index.find(fingerprint).filter(own).count() != 1 {
                            return Err("engine: a candidate is not in the index once");
                        }
                        if self
                            .candidate(fingerprint, page, CANDIDATE_TRIES - 1)
                            .is_some()
                        {
                            return Err("engine: more candidates for a content than are tried");
                        }
                    }
                    PageState::Tracked { .. } => {}
                }
                self.memory.breathe();
            }
            slot += 1;
        }
        if merged != items {
            return Err("engine: an item belongs to no page");
        }
        if indexed != in_index || self.counters.pages_unshared != indexed as u64 {
            return Err("engine: candidates are counted wrongly");
        }
        if self.counters.tracked != seen as u64 {
            return Err("engine: tracked pages are counted wrongly");
        }
        Ok(())
    }

    /// Looks up what is known of a page, and takes note of it. Returns whether it is to be decided what to do with it.
    fn look_up(
        &mut self,
        walk: &Walk<'_, M::Mm>,
        batch: &M::Batch,
        i: usize,
        work: &mut Work,
    ) -> bool {
        let (policy, mm, addr) = (walk.policy, walk.mm, work.addr);
        let known = self.states.at(walk.slot, addr);
        let (page, state) = match known {
            Some(known) => known,
            None => {
                self.track(walk, addr..addr + PAGE_SIZE);
                let Some(page) = self.states.lookup(walk.slot, addr) else {
                    return false;
                };
                (page, PageState::NEW)
            }
        };
        work.page = Some(page);
        let at = Place { mm, addr, page };
        match self.memory.kind(batch, i) {
            PageKind::Ksm(node) => {
                self.visit_merged(policy, at, state, batch, i, node);
                return false;
            }
            PageKind::Orphan => {
                self.release_state(page, state);
                return false;
            }
            PageKind::Plain => {}
        }
        match state {
            PageState::Tracked { fingerprint, .. } => work.fingerprint = fingerprint,
            // Somebody has written to it since.
            PageState::Merged(_) => self.release_state(page, state),
        }
        if walk.trust.enabled() && !matches!(known, Some((_, PageState::Tracked { .. }))) {
            // Whether it holds still will show next time, without its contents: many a page is gone by then.
            return false;
        }
        walk.read(&self.memory, batch, i, work);
        if work.fresh {
            work.fingerprint = Fingerprint::new(self.memory.hash(batch, i), work.domain);
        }
        true
    }

    /// Compares a page with what is known of it. Returns whether it may be like another one.
    fn compare(&mut self, walk: &Walk<'_, M::Mm>, work: &mut Work) -> bool {
        let Some((
            page,
            state @ PageState::Tracked {
                fingerprint,
                age,
                skips,
                ..
            },
        )) = work
            .page
            .and_then(|page| Some((page, self.states.get(page)?)))
        else {
            return false;
        };
        let now = work.fingerprint;
        if now != fingerprint {
            self.unindex(page, state);
            let state = PageState::Tracked {
                fingerprint: now,
                age,
                skips,
                indexed: false,
            };
            self.states.set(page, state);
            if fingerprint != Fingerprint::NONE || !work.still {
                return false;
            }
        }
        let own = Entry::Candidate(page);
        let other = self.index.find(now).find(|entry| *entry != own);
        if let Some(Entry::Stable(node)) = other {
            work.node = Some(node);
        }
        if other.is_some() || self.is_zero(walk, work) {
            return true;
        }
        // Most pages are like no other.
        self.become_candidate(page, work);
        false
    }

    /// Whether a page is to be replaced by the zero page, most likely.
    fn is_zero(&self, walk: &Walk<'_, M::Mm>, work: &Work) -> bool {
        walk.policy.use_zero_pages
            && work.fingerprint == Fingerprint::new(self.memory.zero_hash(), work.domain)
    }

    /// Starts to track the pages of these addresses.
    fn track(&mut self, walk: &Walk<'_, M::Mm>, within: Range<usize>) {
        let pages = within.len() / PAGE_SIZE;
        let flags = GFP_KERNEL | __GFP_NOWARN;
        let tracked = self.states.track_all(walk.slot, within, flags);
        self.counters.tracked += tracked as u64;
        self.memory.account_tracked(walk.mm, tracked as isize);
        for _ in tracked..pages {
            self.refusals.count(Refusal::NoMemory);
        }
    }

    /// Decides about one page of a batch. A merge is added to the chunk; what `others` are, others are at.
    fn decide<P: Pins<M::Mm>>(
        &mut self,
        walk: &Walk<'_, M::Mm>,
        pins: &P,
        lanes: &mut Lanes<M>,
        (l, i): (usize, usize),
        others: bool,
        chunk: &mut Chunk<M>,
    ) -> Next {
        let policy = walk.policy;
        let Some((lane, mut work)) = lanes.get_work(l, i) else {
            return Next::Done;
        };
        let Some(page) = work.page else {
            return Next::Done;
        };
        if !self.memory.regain(walk.mm, &mut lane.batch, i) {
            return Next::Done;
        }
        let now = work.fingerprint;
        // It may have been merged when one before it was.
        if !matches!(self.states.get(page), Some(PageState::Tracked { fingerprint, .. }) if fingerprint == now)
        {
            return Next::Done;
        }
        let huge = self.memory.huge(&lane.batch, i).is_some();
        if huge && (others || !chunk.is_empty()) {
            return Next::Alone;
        }
        let (ready, busy) = match huge {
            true => (Next::Split, false),
            false => (Next::Merge, lanes.busy.may_have(now)),
        };
        let Some(lane) = lanes.get(l) else {
            return Next::Done;
        };
        let zero = !work.zero_tried && self.is_zero(walk, &work);
        // One thread may merge several pages of the same contents, one after the other.
        if busy && !zero && !chunk.iter().any(|pending| pending.fingerprint == now) {
            return Next::Later;
        }
        let at = Place {
            mm: walk.mm,
            addr: work.addr,
            page,
        };
        let nid = (!policy.merge_across_nodes).then_some(work.domain);
        let pending = |with, merge| Pending {
            lane: l,
            i,
            fingerprint: now,
            with,
            merge,
        };

        if zero {
            work.zero_tried = true;
            lane.set_work(i, work);
            match self.memory.prepare(at, &lane.batch, i, Partner::Zero) {
                Ok(merge) => {
                    // There is room: who asks for more has seen to it.
                    let _ = chunk.push_within_capacity(pending(With::Zero, merge));
                    lanes.busy.add(now);
                    return ready;
                }
                Err(refusal) => self.refusals.count(refusal),
            }
        }

        while !work.node_tried {
            let to_come = |node| {
                let merges = chunk.iter().filter(|_| busy);
                let same = |with: &With| matches!(with, With::Node(other) if *other == node);
                merges.filter(|pending| same(&pending.with)).count() as u32
            };
            let node = self
                .head_at(work.node, now)
                .and_then(|head| self.node_with_room(head, policy.max_page_sharing, to_come));
            let Some(node) = node else { break };
            let partner = Partner::Node { node, nid };
            match self.memory.prepare(at, &lane.batch, i, partner) {
                Ok(merge) => {
                    let _ = chunk.push_within_capacity(pending(With::Node(node), merge));
                    lanes.busy.add(now);
                    return ready;
                }
                Err(Refusal::Stale) if busy => {
                    self.refusals.count(Refusal::Stale);
                    return Next::Later;
                }
                Err(refusal) => {
                    if self.node_refused(page, node, refusal, &mut work) {
                        return Next::Done;
                    }
                }
            }
        }
        lane.set_work(i, work);
        if busy {
            return Next::Later;
        }
        self.decide_candidate(walk, pins, lanes, (l, i), chunk)
    }

    /// Has a page that no merged page is like be merged with a candidate, or be one.
    fn decide_candidate<P: Pins<M::Mm>>(
        &mut self,
        walk: &Walk<'_, M::Mm>,
        pins: &P,
        lanes: &mut Lanes<M>,
        (l, i): (usize, usize),
        chunk: &mut Chunk<M>,
    ) -> Next {
        let Some((_, mut work)) = lanes.get_work(l, i) else {
            return Next::Done;
        };
        let Some(page) = work.page else {
            return Next::Done;
        };
        let now = work.fingerprint;
        let nid = (!walk.policy.merge_across_nodes).then_some(work.domain);
        while work.tries < CANDIDATE_TRIES {
            let Some((other, _)) = self.candidate(now, page, work.nth) else {
                break;
            };
            let Some((slot, addr)) = self.states.locate(other) else {
                break;
            };
            work.tries += 1;
            let Some(mm) = pins.pin(slot) else {
                work.nth += 1;
                continue;
            };
            if slot == walk.slot {
                self.let_go(lanes, addr);
            }
            let partner = Partner::Page {
                other: Place {
                    mm: &mm,
                    addr,
                    page: other,
                },
                nid,
            };
            let at = Place {
                mm: walk.mm,
                addr: work.addr,
                page,
            };
            let Some(lane) = lanes.get(l) else {
                return Next::Done;
            };
            match self.memory.prepare(at, &lane.batch, i, partner) {
                Ok(merge) => {
                    lane.set_work(i, work);
                    let huge = self.memory.huge(&lane.batch, i).is_some();
                    lanes.busy.add(now);
                    let pending = Pending {
                        lane: l,
                        i,
                        fingerprint: now,
                        with: With::Candidate(other),
                        merge,
                    };
                    // There is room: who asks for more has seen to it.
                    let _ = chunk.push_within_capacity(pending);
                    return if huge { Next::Split } else { Next::Merge };
                }
                Err(refusal) => self.candidate_refused(other, refusal, &mut work),
            }
        }
        // One page under several addresses, as after a fork: one of them is candidate enough.
        if !work.same {
            // Of pages whose mms are just leaving there may be any number.
            if let Some((last, state)) = self.candidate(now, page, CANDIDATE_TRIES - 1) {
                self.unindex(last, state);
            }
            self.become_candidate(page, &work);
        }
        Next::Done
    }

    /// Gives up the reference of a batch to the page at `addr`, which would keep it from being merged.
    fn let_go(&mut self, lanes: &mut Lanes<M>, addr: usize) {
        let Some((lane, i)) = lanes.find(addr) else {
            return;
        };
        if let Some(work) = lane.works.get_mut(i).filter(|w| w.step != Step::Done) {
            self.done(&lane.batch, i, work);
        }
        self.memory.release(&mut lane.batch, i);
    }

    /// Has others find a page, if there is memory for that.
    fn become_candidate(&mut self, page: PageId, work: &Work) {
        let Some(PageState::Tracked {
            age,
            skips,
            indexed: false,
            ..
        }) = self.states.get(page)
        else {
            return;
        };
        if self.insert(work.fingerprint, Entry::Candidate(page)) {
            self.counters.pages_unshared += 1;
            let state = PageState::Tracked {
                fingerprint: work.fingerprint,
                age,
                skips,
                indexed: true,
            };
            self.states.set(page, state);
        }
    }

    /// Takes note of what came of a merge.
    fn finish(&mut self, walk: &Walk<'_, M::Mm>, lanes: &mut Lanes<M>, pending: &mut Pending<M>) {
        let (l, i) = (pending.lane, pending.i);
        let outcome = self.memory.finish(&mut pending.merge);
        lanes.busy.remove(pending.fingerprint);
        let Some((lane, mut work)) = lanes.get_work(l, i) else {
            return;
        };
        let Some(page) = work.page else {
            return;
        };
        let done = match (pending.with, outcome) {
            (With::Zero, Ok(_) | Err(Refusal::Gone)) => {
                if let Some(state) = self.states.get(page) {
                    self.untrack(walk.mm, page, state);
                }
                true
            }
            (With::Zero, Err(refusal)) => {
                self.refusals.count(refusal);
                false
            }
            (With::Node(_), Ok(Merged::Node(item))) => {
                self.unindex_now(page);
                self.merged(page, item);
                true
            }
            (With::Node(node), Err(refusal)) => self.node_refused(page, node, refusal, &mut work),
            (With::Candidate(other), Ok(Merged::Pair(pair))) => {
                self.paired(page, other, &pair, &work, (&lane.batch, i));
                true
            }
            (With::Candidate(other), Err(refusal)) => {
                self.candidate_refused(other, refusal, &mut work);
                false
            }
            (_, Ok(_)) => true,
        };
        if done {
            self.done(&lane.batch, i, &mut work);
        }
        lane.set_work(i, work);
    }

    /// Two pages have become one merged page.
    fn paired(
        &mut self,
        page: PageId,
        other: PageId,
        pair: &Pair,
        work: &Work,
        (batch, i): (&M::Batch, usize),
    ) {
        for page in [other, page] {
            self.unindex_now(page);
        }
        self.states.set(page, PageState::Merged(pair.first));
        self.states.set(other, PageState::Merged(pair.second));
        self.counters.mapping_added(true);
        self.counters.mapping_added(false);
        let fingerprint = if work.fresh && !pair.touched {
            work.fingerprint
        } else {
            // Both may have been written to after they were looked at: only now the contents stay.
            Fingerprint::new(self.memory.hash(batch, i), work.domain)
        };
        self.link_node(pair.node, fingerprint);
    }

    /// A page was not merged with a node. Returns whether it needs no more attention.
    fn node_refused(
        &mut self,
        page: PageId,
        node: NodeId,
        refusal: Refusal,
        work: &mut Work,
    ) -> bool {
        self.refusals.count(refusal);
        match refusal {
            Refusal::Stale => {
                work.node_tried = !self.remove_node(node);
                false
            }
            Refusal::FarNode | Refusal::Same | Refusal::Differs => {
                work.node_tried = true;
                false
            }
            // The merged page may be back in a moment, and the same pages are best tried again then.
            _ => {
                self.unindex_now(page);
                true
            }
        }
    }

    /// A page was not merged with a candidate.
    fn candidate_refused(&mut self, other: PageId, refusal: Refusal, work: &mut Work) {
        self.refusals.count(refusal);
        match refusal {
            Refusal::Same => {
                work.same = true;
                work.nth += 1;
            }
            // What is remembered of it is not true.
            Refusal::Gone | Refusal::Differs => self.mistrust(other),
            // One of them cannot be merged now: no candidate, so that the scanner tries again next time.
            _ => self.unindex_now(other),
        }
    }

    /// A page that is merged already.
    fn visit_merged(
        &mut self,
        policy: &Policy,
        at: Place<'_, M::Mm>,
        state: PageState,
        batch: &M::Batch,
        i: usize,
        node: NodeId,
    ) {
        let page = at.page;
        if !policy.merge_across_nodes {
            self.follow_migration(batch, i, node);
        }
        if matches!(state, PageState::Merged(item) if self.memory.node_of(item) == Some(node)) {
            return;
        }
        self.release_state(page, state);
        // A child has inherited the mapping, over the sharing limit if need be.
        match self.memory.adopt(at, batch, i, node) {
            Ok(item) => self.merged(page, item),
            Err(refusal) => self.refusals.count(refusal),
        }
        // What was left of a pair of which one could not be merged: now its contents stay.
        let unknown = |meta: &NodeMeta| meta.fingerprint == Fingerprint::NONE;
        if self.memory.meta(node).as_ref().is_some_and(unknown) {
            let domain = match policy.merge_across_nodes {
                true => 0,
                false => self.memory.nid(batch, i),
            };
            let fingerprint = Fingerprint::new(self.memory.hash(batch, i), domain);
            self.link_node(node, fingerprint);
        }
    }

    /// Puts a node under the fingerprint of the NUMA node that its page has migrated to.
    fn follow_migration(&mut self, batch: &M::Batch, i: usize, node: NodeId) {
        let nid = self.memory.nid(batch, i);
        if self.memory.node_nid(node) == nid {
            return;
        }
        let fingerprint = Fingerprint::new(self.memory.hash(batch, i), nid);
        if let Some(meta) = self.memory.meta(node) {
            self.unlink_node(node, meta);
            self.memory.set_node_nid(node, nid);
            self.link_node(node, fingerprint);
        }
    }

    /// The head of the ring of this content.
    fn head(&self, fingerprint: Fingerprint) -> Option<NodeId> {
        self.index.find(fingerprint).find_map(|entry| match entry {
            Entry::Stable(node) => self
                .memory
                .meta(node)
                .is_some_and(|meta| meta.fingerprint == fingerprint)
                .then_some(node),
            Entry::Candidate(_) => None,
        })
    }

    /// The same, which most likely is `guess`.
    fn head_at(&self, guess: Option<NodeId>, fingerprint: Fingerprint) -> Option<NodeId> {
        let right = |node: &NodeId| {
            let meta = self.memory.meta(*node);
            meta.is_some_and(|meta| meta.head && meta.fingerprint == fingerprint)
        };
        guess.filter(right).or_else(|| self.head(fingerprint))
    }

    /// A node of this ring that can take one more mapping, with those `to_come`.
    fn node_with_room(
        &self,
        head: NodeId,
        max_page_sharing: u32,
        to_come: impl Fn(NodeId) -> u32,
    ) -> Option<NodeId> {
        let mut node = head;
        for _ in 0..RING_LOOK {
            let mappings = self.memory.mappings(node);
            if mappings > 0 && mappings + to_come(node) < max_page_sharing {
                return Some(node);
            }
            node = self.memory.meta(node)?.next;
            if node == head {
                break;
            }
        }
        None
    }

    /// The `nth` candidate of this content but for the page itself.
    fn candidate(
        &self,
        fingerprint: Fingerprint,
        but: PageId,
        nth: u8,
    ) -> Option<(PageId, PageState)> {
        self.index
            .find(fingerprint)
            .filter_map(|entry| match entry {
                Entry::Candidate(page) if page != but => match self.states.get(page) {
                    Some(state @ PageState::Tracked { fingerprint: f, .. }) if f == fingerprint => {
                        Some((page, state))
                    }
                    _ => None,
                },
                _ => None,
            })
            .nth(nth.into())
    }

    /// Takes note that a page is merged, by an item that is on its node already.
    fn merged(&mut self, page: PageId, item: ItemId) {
        self.states.set(page, PageState::Merged(item));
        let mappings = self
            .memory
            .node_of(item)
            .map_or(0, |node| self.memory.mappings(node));
        self.counters.mapping_added(mappings == 1);
    }

    /// Forgets the tracked pages of a range of addresses.
    fn forget(&mut self, slot: SlotId, mm: &M::Mm, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        // From the end, where taking a state out moves no other.
        while let Some((page, _, state)) = self.states.last_in(slot, range.clone()) {
            self.untrack(mm, page, state);
            self.memory.breathe();
        }
    }

    fn untrack(&mut self, mm: &M::Mm, page: PageId, state: PageState) {
        self.release_state(page, state);
        self.states.untrack(page);
        self.counters.tracked = self.counters.tracked.wrapping_sub(1);
        self.memory.account_tracked(mm, -1);
    }

    /// Lets go of what a page's state refers to, and leaves the page tracked with nothing known.
    fn release_state(&mut self, page: PageId, state: PageState) {
        match state {
            PageState::Tracked { .. } => self.unindex(page, state),
            PageState::Merged(item) => {
                self.states.set(page, PageState::NEW);
                let Some(released) = self.memory.release_item(item) else {
                    return;
                };
                if let Some((page, item)) = released.moved {
                    self.states.set(page, PageState::Merged(item));
                }
                self.counters.mapping_removed(released.remaining == 0);
                if released.due {
                    self.remove_node(released.node);
                } else {
                    self.move_up(released.node);
                }
                return;
            }
        }
        self.states.set(page, PageState::NEW);
    }

    /// Takes a page out of the candidates, if it is one.
    fn unindex(&mut self, page: PageId, state: PageState) {
        if let PageState::Tracked {
            fingerprint,
            age,
            skips,
            indexed: true,
        } = state
        {
            self.index.remove(fingerprint, Entry::Candidate(page));
            self.counters.pages_unshared = self.counters.pages_unshared.wrapping_sub(1);
            self.states.set(
                page,
                PageState::Tracked {
                    fingerprint,
                    age,
                    skips,
                    indexed: false,
                },
            );
        }
    }

    /// The same, whatever its state has become.
    fn unindex_now(&mut self, page: PageId) {
        if let Some(state) = self.states.get(page) {
            self.unindex(page, state);
        }
    }

    /// Has the contents of a page be read again before it is merged.
    fn mistrust(&mut self, page: PageId) {
        self.unindex_now(page);
        if let Some(PageState::Tracked { age, skips, .. }) = self.states.get(page) {
            self.states.set(
                page,
                PageState::Tracked {
                    fingerprint: Fingerprint::NONE,
                    age,
                    skips,
                    indexed: false,
                },
            );
        }
    }

    /// Adds to the index. Returns whether there was memory for it.
    fn insert(&mut self, fingerprint: Fingerprint, entry: Entry) -> bool {
        let (states, memory) = (&self.states, &self.memory);
        let inserted = self
            .index
            .insert(fingerprint, entry, GFP_KERNEL | __GFP_NOWARN, |entry| {
                key_of(states, memory, entry)
            });
        inserted.is_ok()
    }

    /// Makes a node the head of the ring of its contents.
    fn link_node(&mut self, node: NodeId, fingerprint: Fingerprint) {
        let mut meta = NodeMeta {
            fingerprint,
            next: node,
            prev: node,
            head: true,
        };
        let old = self
            .head(fingerprint)
            .and_then(|old| Some((old, self.memory.meta(old)?)));
        let Some((old, mut old_meta)) = old else {
            self.memory.set_meta(node, meta);
            meta.head = self.insert(fingerprint, Entry::Stable(node));
            self.memory.set_meta(node, meta);
            return;
        };
        self.index
            .replace(fingerprint, Entry::Stable(old), Entry::Stable(node));
        (meta.next, meta.prev) = (old, old_meta.prev);
        if old_meta.next == old {
            old_meta.next = node;
            self.counters.stable_node_chains += 1;
            self.counters.stable_node_dups += 1;
        } else if let Some(mut last) = self.memory.meta(old_meta.prev) {
            last.next = node;
            self.memory.set_meta(old_meta.prev, last);
        }
        self.counters.stable_node_dups += 1;
        (old_meta.head, old_meta.prev) = (false, node);
        self.memory.set_meta(old, old_meta);
        self.memory.set_meta(node, meta);
    }

    /// Takes a node out of its ring and the index.
    fn unlink_node(&mut self, node: NodeId, meta: NodeMeta) {
        if meta.next == node {
            if meta.head {
                self.index.remove(meta.fingerprint, Entry::Stable(node));
            }
            return;
        }
        self.counters.stable_node_dups -= 1;
        if meta.next == meta.prev {
            self.counters.stable_node_chains -= 1;
            self.counters.stable_node_dups -= 1;
        }
        if let Some(mut prev) = self.memory.meta(meta.prev) {
            prev.next = meta.next;
            self.memory.set_meta(meta.prev, prev);
        }
        if let Some(mut next) = self.memory.meta(meta.next) {
            next.prev = meta.prev;
            next.head |= meta.head;
            self.memory.set_meta(meta.next, next);
        }
        if meta.head {
            let (old, new) = (Entry::Stable(node), Entry::Stable(meta.next));
            self.index.replace(meta.fingerprint, old, new);
        }
    }

    /// Moves a node that has room again next to its ring's head.
    fn move_up(&mut self, node: NodeId) {
        let Some(meta) = self.memory.meta(node) else {
            return;
        };
        if meta.head || meta.next == meta.prev {
            return;
        }
        let Some(head) = self
            .head(meta.fingerprint)
            .filter(|head| *head != meta.prev)
        else {
            return;
        };
        let metas = (self.memory.meta(meta.prev), self.memory.meta(meta.next));
        let (Some(mut prev), Some(mut next)) = metas else {
            return;
        };
        prev.next = meta.next;
        next.prev = meta.prev;
        self.memory.set_meta(meta.prev, prev);
        self.memory.set_meta(meta.next, next);
        let Some(mut head_meta) = self.memory.meta(head) else {
            return;
        };
        let after = head_meta.next;
        head_meta.next = node;
        self.memory.set_meta(head, head_meta);
        if let Some(mut after_meta) = self.memory.meta(after) {
            after_meta.prev = node;
            self.memory.set_meta(after, after_meta);
        }
        self.memory.set_meta(
            node,
            NodeMeta {
                next: after,
                prev: head,
                ..meta
            },
        );
    }

    /// Removes a node whose page is unmapped or gone. Returns whether it was.
    fn remove_node(&mut self, node: NodeId) -> bool {
        self.drop_node(node, |memory, node, orphan| {
            memory.remove_node(node, orphan)
        })
    }

    fn drop_node(
        &mut self,
        node: NodeId,
        remove: impl FnOnce(&mut M, NodeId, &mut dyn FnMut(PageId)) -> bool,
    ) -> bool {
        let Some(meta) = self.memory.meta(node) else {
            return true;
        };
        let mut left = self.memory.mappings(node);
        let (states, counters) = (&mut self.states, &mut self.counters);
        let removed = remove(&mut self.memory, node, &mut |page| {
            left = left.saturating_sub(1);
            counters.mapping_removed(left == 0);
            states.set(page, PageState::NEW);
        });
        if removed {
            self.unlink_node(node, meta);
        }
        removed
    }
}

/// Leads the reading of pages.
struct Beginner<'a, 'w, M: Memory, I> {
    engine: &'a mut Engine<M>,
    walk: &'a Walk<'w, M::Mm>,
    slices: I,
    /// A page needs more attention.
    any_left: bool,
}

impl<'b, M: Memory, I: Iterator<Item = Slice<'b, M>>> Leader<Slice<'b, M>>
    for Beginner<'_, '_, M, I>
{
    fn next(&mut self) -> Option<Slice<'b, M>> {
        self.slices.next()
    }

    fn finish(&mut self, slice: Slice<'b, M>) {
        let (engine, walk, batch) = (&mut *self.engine, self.walk, slice.batch);
        for (at, work) in slice.works.iter_mut().enumerate() {
            let i = slice.first + at;
            let known = work.step == Step::Decide || engine.look_up(walk, batch, i, work);
            if known && engine.compare(walk, work) {
                work.step = Step::Decide;
                self.any_left = true;
            } else {
                engine.done(batch, i, work);
            }
        }
    }
}

/// Leads the merging of pages, in rounds: in each of them all lanes are gone through, until there is nothing left to merge.
struct Merger<'a, 'w, M: Memory, P> {
    engine: &'a mut Engine<M>,
    walk: &'a Walk<'w, M::Mm>,
    pins: &'a P,
    lanes: &'a mut Lanes<M>,
    n: usize,
    /// The lane that the next chunk is of. They take turns, so that who merges at the same time does so in different page
    /// tables.
    turn: usize,
    /// Chunks that are being merged.
    under_way: usize,
    /// There was something to merge in this round.
    merged: bool,
}

impl<M: Memory, P: Pins<M::Mm>> Merger<'_, '_, M, P> {
    /// Makes ready merges of a lane's pages. Returns whether to wait for those that are under way before there can be more.
    fn fill(&mut self, l: usize, chunk: &mut Chunk<M>) -> bool {
        while let Some(lane) = self.lanes.get(l) {
            let i = lane.next;
            match lane.works.get(i) {
                None => break,
                Some(work) if work.step == Step::Done => {
                    lane.next += 1;
                    continue;
                }
                Some(_) if chunk.len() == chunk.capacity() => break,
                Some(_) => {}
            }
            let (engine, lanes) = (&mut *self.engine, &mut *self.lanes);
            let others = self.under_way > 0;
            match engine.decide(self.walk, self.pins, lanes, (l, i), others, chunk) {
                Next::Done => {
                    if let Some((lane, mut work)) = lanes.get_work(l, i) {
                        engine.done(&lane.batch, i, &mut work);
                        lane.set_work(i, work);
                    }
                }
                Next::Merge => self.merged = true,
                Next::Split => {
                    self.merged = true;
                    self.split(chunk);
                }
                Next::Later => {}
                Next::Alone => return true,
            }
            if let Some(lane) = self.lanes.get(l) {
                lane.next += 1;
            }
        }
        false
    }

    /// Merges a page of a huge page, which is split for that.
    fn split(&mut self, chunk: &mut Chunk<M>) {
        let Some(mut pending) = chunk.pop() else {
            return;
        };
        let (engine, lanes) = (&mut *self.engine, &mut *self.lanes);
        let (own, i) = (pending.lane, pending.i);
        let huge = lanes
            .get(own)
            .and_then(|lane| engine.memory.huge(&lane.batch, i));
        pending.merge.run(|| {
            let Some(huge) = huge else { return };
            for (l, lane) in lanes.first(self.n).iter_mut().enumerate() {
                let keep = (l == own).then_some(i);
                engine.memory.make_way(&mut lane.batch, huge, keep);
            }
        });
        engine.finish(self.walk, lanes, &mut pending);
    }
}

impl<M: Memory, P: Pins<M::Mm>> Leader<Chunk<M>> for Merger<'_, '_, M, P> {
    fn next(&mut self) -> Option<Chunk<M>> {
        loop {
            for _ in 0..self.n {
                let mut chunk = self.lanes.spare.pop()?;
                let wait = self.fill(self.turn, &mut chunk);
                if !wait {
                    self.turn = (self.turn + 1) % self.n;
                }
                if !chunk.is_empty() {
                    self.under_way += 1;
                    return Some(chunk);
                }
                // There is room: it was taken from there.
                let _ = self.lanes.spare.push_within_capacity(chunk);
                if wait {
                    return None;
                }
            }
            if self.under_way > 0 || !self.merged {
                return None;
            }
            self.merged = false;
            self.turn = 0;
            self.lanes.rewind();
        }
    }

    fn finish(&mut self, mut chunk: Chunk<M>) {
        for pending in chunk.iter_mut() {
            self.engine.finish(self.walk, self.lanes, pending);
        }
        chunk.clear();
        self.under_way -= 1;
        // There is room: it was taken from there.
        let _ = self.lanes.spare.push_within_capacity(chunk);
    }
}

fn key_of<M: Memory>(states: &PageStates, memory: &M, entry: Entry) -> Option<Fingerprint> {
    match entry {
        Entry::Stable(node) => memory.meta(node).map(|meta| meta.fingerprint),
        Entry::Candidate(page) => match states.get(page)? {
            PageState::Tracked { fingerprint, .. } => Some(fingerprint),
            PageState::Merged(_) => None,
        },
    }
}
