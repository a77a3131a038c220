// SPDX-License-Identifier: GPL-2.0

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
//! Contents are not read again while nothing has touched the page ([`Trust`]). What is remembered of them may then be
//! out of date, which costs a merge tried in vain, or one that comes some scans late.
//!
//! # Locks
//!
//! The engine is a plain value under the `thread_mutex`, which the scanner holds for a batch, and a write to `run`
//! while it unmerges.

use super::{
    ids::{
        Fingerprint,
        ItemId,
        NodeId,
        PageRef,
        SlotId, //
    },
    index::{
        Entry,
        Index, //
    },
    memory::{
        Collected,
        Interest,
        Look,
        Memory,
        NodeMeta,
        NodeState,
        PageKind,
        Place,
        Refusal, //
    },
    mmlist::Progress,
    page_state::{
        PageState,
        PageStates, //
    },
    registry::PinnedMm,
    smart_scan::History,
    stats::Counters,
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

static_assert!(BATCH <= u64::BITS as usize);

/// Nodes of a ring that a search for room looks at.
const RING_LOOK: usize = 3;

/// Candidates of the same contents: so many are tried, and kept.
const CANDIDATE_TRIES: usize = 4;

/// A page that nothing seems to have touched is read all the same in one full scan of so many: what writes to it may
/// leave no trace in page tables, as devices do.
const REVISIT: usize = 16;

/// The knobs that decide about a page, as they are for one batch.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// `smart_scan`.
    pub smart_scan: bool,
    /// `use_zero_pages`.
    pub use_zero_pages: bool,
    /// `merge_across_nodes`.
    pub merge_across_nodes: bool,
    /// `max_page_sharing`: mappings of a merged page.
    pub max_page_sharing: u32,
}

/// Finds the mm of a slot whose pages are tracked.
pub trait Pins<Mm> {
    /// Pins the mm of a slot; `None` once it has left.
    ///
    /// May take the registry's lock.
    fn pin(&self, slot: SlotId) -> Option<Mm>;
}

/// Runs of pages that are mapped no more which one walk can note.
const GAPS: usize = 8;

/// Most pages that one walk comes by, whether it takes them or not. Bounds, too, what is done under one mmap lock.
const LOOKS: u32 = 1024;

/// For which pages an unchanged page table entry is taken for unchanged contents.
#[derive(Clone, Copy)]
struct Trust {
    /// For some at least.
    some: bool,
    /// Number of the full scan.
    round: usize,
}

impl Trust {
    fn holds(self, addr: usize) -> bool {
        self.some && (addr / PAGE_SIZE).wrapping_add(self.round) % REVISIT != 0
    }
}

/// What is known of the contents of the page that is visited.
#[derive(Clone, Copy)]
struct Content {
    fingerprint: Fingerprint,
    /// The NUMA node on which to look for its like, if not on all.
    nid: Option<u32>,
    /// They have been read since the walk took the page.
    fresh: bool,
}

/// What the engine thinks of the pages that a walk comes by, without touching them.
struct Glance<'a, M: Memory> {
    memory: &'a M,
    states: &'a mut PageStates,
    counters: &'a mut Counters,
    policy: &'a Policy,
    trust: Trust,
    slot: SlotId,
    /// Where the next page is expected: all before it has been looked at.
    from: usize,
    budget: &'a mut u32,
    /// Pages that may still be looked at.
    looks: u32,
    /// Addresses between pages in which pages are tracked that are not mapped.
    gaps: [Range<usize>; GAPS],
    nr_gaps: usize,
}

impl<M: Memory> Glance<'_, M> {
    /// Smart scan: whether the page is passed over this time.
    fn skips(&mut self, page: PageRef, state: PageState) -> bool {
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
        self.states.set(page, state);
        skip
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
        self.trust.holds(addr) && !(self.policy.use_zero_pages && zero())
    }

    /// Whether a merged page is what it was when its item was made.
    fn settled(&self, item: ItemId, node: NodeId, nid: u32) -> bool {
        self.memory.node_of(item) == Some(node)
            && (self.policy.merge_across_nodes || self.memory.node_nid(node) == nid)
    }
}

impl<M: Memory> Look for Glance<'_, M> {
    fn look(&mut self, addr: usize, kind: PageKind, nid: u32, touched: bool) -> Interest {
        if *self.budget == 0 || self.looks == 0 {
            return Interest::Stop;
        }
        self.looks -= 1;
        if addr > self.from && self.states.first_in(self.slot, self.from..addr).is_some() {
            let Some(gap) = self.gaps.get_mut(self.nr_gaps) else {
                return Interest::Stop;
            };
            *gap = self.from..addr;
            self.nr_gaps += 1;
        }
        self.from = addr + PAGE_SIZE;
        let interest = match (kind, self.states.at(self.slot, addr)) {
            (PageKind::Ksm(node), Some((_, PageState::Merged(item))))
                if self.settled(item, node, nid) =>
            {
                self.counters.pages_scanned = self.counters.pages_scanned.wrapping_add(1);
                Interest::Pass
            }
            (PageKind::Plain, Some((page, state)))
                if self.policy.smart_scan && self.skips(page, state) =>
            {
                self.counters.pages_skipped = self.counters.pages_skipped.wrapping_add(1);
                return Interest::Pass;
            }
            (PageKind::Plain, Some((_, state))) if !touched && self.waits(addr, state) => {
                self.counters.pages_scanned = self.counters.pages_scanned.wrapping_add(1);
                Interest::Pass
            }
            _ => Interest::Take,
        };
        *self.budget -= 1;
        interest
    }
}

/// How often each [`Refusal`] kept a page from being merged.
pub type Refusals = [u64; Refusal::COUNT];

/// What is known of all pages, and the merging of them.
///
/// # Invariants
///
/// 1. A page is in the index as a candidate if and only if its state is tracked and `indexed`, under its state's
///    fingerprint.
/// 2. A page's state is `Merged(item)` if and only if `item` exists with the page as its owner.
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
    /// Pages of the batch, one bit each, that were merged when one before them was visited: what the batch has of
    /// them is no longer what their address maps.
    merged_ahead: u64,
    trust: Trust,
    /// `merge_across_nodes` as it was last.
    across_nodes: bool,
    /// Full scans to come before fingerprints are again what they were made under other knobs.
    distrust: u8,
}

impl<M: Memory> Engine<M> {
    /// An engine that knows no page. Allocates nothing.
    pub fn new(memory: M) -> Self {
        Self {
            memory,
            states: PageStates::new(),
            index: Index::new(),
            counters: Counters::default(),
            refusals: [0; Refusal::COUNT],
            swept: None,
            merged_ahead: 0,
            trust: Trust {
                some: false,
                round: 0,
            },
            across_nodes: true,
            distrust: 0,
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

    /// Scans an mm from `start` on until it ends or `budget` pages have been scanned.
    ///
    /// Pages that smart scan skips cost no budget. May sleep.
    pub fn scan_mm<P: Pins<M::Mm>>(
        &mut self,
        policy: &Policy,
        pins: &P,
        (slot, mm): (SlotId, &M::Mm),
        start: usize,
        batch: &mut M::Batch,
        budget: &mut u32,
    ) -> Progress {
        self.update_trust(policy);
        let mut at = start;
        while *budget > 0 {
            let limit = BATCH.min(*budget as usize);
            let mut glance = Glance {
                memory: &self.memory,
                states: &mut self.states,
                counters: &mut self.counters,
                policy,
                trust: self.trust,
                slot,
                from: at,
                budget,
                looks: LOOKS,
                gaps: [const { 0..0 }; GAPS],
                nr_gaps: 0,
            };
            let found = self.memory.collect(mm, at, limit, batch, &mut glance);
            let (from, gaps, nr_gaps) = (glance.from, glance.gaps, glance.nr_gaps);
            for gap in gaps.into_iter().take(nr_gaps) {
                self.forget(slot, mm, gap);
            }
            let end = match found {
                Collected::Exiting => {
                    self.forget_mm(slot, mm);
                    return Progress::Exiting;
                }
                Collected::More(next) => Some(next),
                Collected::End => None,
            };
            let collected = self.memory.len(batch);
            self.merged_ahead = 0;
            let mut pause = false;
            let mut i = 0;
            while i < self.memory.len(batch) && !pause {
                let addr = self.memory.addr(batch, i);
                if self.merged_ahead & 1 << i == 0 {
                    self.visit(policy, pins, (slot, mm), addr, batch, i);
                }
                self.counters.pages_scanned = self.counters.pages_scanned.wrapping_add(1);
                self.memory.release(batch, i);
                at = addr.saturating_add(PAGE_SIZE);
                i += 1;
                pause = self.memory.breathe();
            }
            // A huge page that was split takes what follows it out of the batch: collect that anew.
            let cut = i < collected;
            *budget += (collected - i) as u32;
            self.memory.clear(batch);
            if pause {
                return Progress::At(at);
            }
            match end {
                _ if cut => {}
                Some(next) => {
                    self.forget(slot, mm, from..next);
                    at = next;
                }
                None => {
                    self.forget(slot, mm, from..usize::MAX);
                    return Progress::Done;
                }
            }
        }
        Progress::At(at)
    }

    /// A page may migrate to another NUMA node untouched, so nothing is trusted where its fingerprint depends on that.
    fn update_trust(&mut self, policy: &Policy) {
        if self.across_nodes != policy.merge_across_nodes {
            self.across_nodes = policy.merge_across_nodes;
            // In the full scan that is under way, pages may have been passed already.
            self.distrust = 2;
        }
        self.trust.some = policy.merge_across_nodes && self.distrust == 0;
    }

    /// Takes note that a full scan has ended.
    pub fn end_full_scan(&mut self) {
        self.counters.full_scans += 1;
        self.trust.round = self.trust.round.wrapping_add(1);
        self.distrust = self.distrust.saturating_sub(1);
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
                if !meta.head && meta.next == node {
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

    /// Decides about one page.
    fn visit<P: Pins<M::Mm>>(
        &mut self,
        policy: &Policy,
        pins: &P,
        (slot, mm): (SlotId, &M::Mm),
        addr: usize,
        batch: &mut M::Batch,
        i: usize,
    ) {
        let known = self.states.at(slot, addr);
        let mut new = known.is_none();
        let (page, state) = match known {
            Some(known) => known,
            None => match self.states.track(slot, addr, GFP_KERNEL | __GFP_NOWARN) {
                Ok(page) => {
                    self.counters.tracked += 1;
                    self.memory.account_tracked(mm, 1);
                    (page, PageState::NEW)
                }
                Err(_) => {
                    self.refuse(Refusal::NoMemory);
                    return;
                }
            },
        };
        let at = Place {
            mm,
            addr,
            owner: page,
        };

        match self.memory.kind(batch, i) {
            PageKind::Ksm(node) => {
                self.visit_merged(policy, at, state, batch, i, node);
                return;
            }
            PageKind::Orphan => {
                self.release_state(page, state);
                return;
            }
            PageKind::Plain => {}
        }
        let state = match state {
            PageState::Merged(_) => {
                // Somebody has written to it since.
                self.release_state(page, state);
                new = true;
                PageState::NEW
            }
            PageState::Tracked { .. } => state,
        };
        let PageState::Tracked {
            fingerprint,
            age,
            skips,
            indexed,
        } = state
        else {
            return;
        };

        let domain = if policy.merge_across_nodes {
            0
        } else {
            self.memory.nid(batch, i)
        };
        // Whether it holds still will show next time, without its contents: many a page is gone by then.
        if new && self.trust.some {
            return;
        }
        let known = fingerprint != Fingerprint::NONE;
        let still = self.trust.some && !self.memory.touched(batch, i);
        let fresh = !(known && still && self.trust.holds(addr));
        let now = if fresh {
            Fingerprint::new(self.memory.hash(batch, i), domain)
        } else {
            fingerprint
        };
        if now != fingerprint {
            self.unindex(page, state);
            let state = PageState::Tracked {
                fingerprint: now,
                age,
                skips,
                indexed: false,
            };
            self.states.set(page, state);
            if known || !still {
                return;
            }
        }
        let content = Content {
            fingerprint: now,
            nid: (!policy.merge_across_nodes).then_some(domain),
            fresh,
        };
        if policy.use_zero_pages && now == Fingerprint::new(self.memory.zero_hash(), domain) {
            match self.memory.merge_with_zero(self.place(&at), batch, i) {
                Ok(()) | Err(Refusal::Gone) => {
                    self.untrack(mm, page, state);
                    return;
                }
                Err(refusal) => self.refuse(refusal),
            }
        }

        match self.merge_with_node(policy, &at, batch, i, content) {
            Some(Ok(item)) => {
                self.unindex(page, state);
                self.merged(page, item);
                return;
            }
            // The merged page may be back in a moment, and the same pages are best tried again then.
            Some(Err(_)) => return self.unindex(page, state),
            None => {}
        }
        if self.merge_with_candidate(pins, &at, batch, i, content) || indexed {
            return;
        }
        if self.insert(now, Entry::Candidate(page)) {
            self.counters.pages_unshared += 1;
            self.states.set(
                page,
                PageState::Tracked {
                    fingerprint: now,
                    age,
                    skips,
                    indexed: true,
                },
            );
        }
    }

    /// A page that is merged already.
    fn visit_merged(
        &mut self,
        policy: &Policy,
        at: Place<'_, M::Mm>,
        state: PageState,
        batch: &mut M::Batch,
        i: usize,
        node: NodeId,
    ) {
        let page = at.owner;
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
            Err(refusal) => self.refuse(refusal),
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

    /// Merges with a merged page of the same contents; `None` where there is none with room.
    fn merge_with_node(
        &mut self,
        policy: &Policy,
        at: &Place<'_, M::Mm>,
        batch: &mut M::Batch,
        i: usize,
        content: Content,
    ) -> Option<Result<ItemId, Refusal>> {
        loop {
            let node = self.node_with_room(content.fingerprint, policy.max_page_sharing)?;
            match self
                .memory
                .merge_with_node(self.place(at), batch, i, node, content.nid)
            {
                Err(Refusal::Stale) => {
                    self.refuse(Refusal::Stale);
                    if !self.remove_node(node) {
                        return None;
                    }
                }
                Err(refusal @ (Refusal::FarNode | Refusal::Same | Refusal::Differs)) => {
                    self.refuse(refusal);
                    return None;
                }
                Err(refusal) => {
                    self.refuse(refusal);
                    return Some(Err(refusal));
                }
                Ok(item) => return Some(Ok(item)),
            }
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

    /// A node of this content that can take one more mapping.
    fn node_with_room(&self, fingerprint: Fingerprint, max_page_sharing: u32) -> Option<NodeId> {
        let head = self.head(fingerprint)?;
        let mut node = head;
        for _ in 0..RING_LOOK {
            let mappings = self.memory.mappings(node);
            if mappings > 0 && mappings < max_page_sharing {
                return Some(node);
            }
            node = self.memory.meta(node)?.next;
            if node == head {
                break;
            }
        }
        None
    }

    /// Merges with a candidate of the same contents. Returns whether the page needs no more attention.
    fn merge_with_candidate<P: Pins<M::Mm>>(
        &mut self,
        pins: &P,
        at: &Place<'_, M::Mm>,
        batch: &mut M::Batch,
        i: usize,
        content: Content,
    ) -> bool {
        let Content {
            fingerprint, nid, ..
        } = content;
        let mut same = false;
        let mut nth = 0;
        for _ in 0..CANDIDATE_TRIES {
            let Some((other, state)) = self.candidate(fingerprint, at.owner, nth) else {
                break;
            };
            let Some((slot, addr)) = self.states.owner(other) else {
                break;
            };
            let Some(mm) = pins.pin(slot) else {
                nth += 1;
                continue;
            };
            let place = Place {
                mm: &mm,
                addr,
                owner: other,
            };
            let pair = self
                .memory
                .merge_pair(self.place(at), batch, i, place, nid, fingerprint);
            match pair {
                Ok(pair) => {
                    self.unindex(other, state);
                    if let Some(own) = self.states.get(at.owner) {
                        self.unindex(at.owner, own);
                    }
                    self.states.set(at.owner, PageState::Merged(pair.first));
                    self.states.set(other, PageState::Merged(pair.second));
                    self.counters.mapping_added(true);
                    self.counters.mapping_added(false);
                    let fingerprint = if content.fresh && !pair.touched {
                        fingerprint
                    } else {
                        // Both may have been written to after they were looked at: only now the contents stay.
                        Fingerprint::new(self.memory.hash(batch, i), nid.unwrap_or(0))
                    };
                    self.link_node(pair.node, fingerprint);
                    if mm.key() == at.mm.key() {
                        let mut ahead = i + 1..self.memory.len(batch);
                        if let Some(j) = ahead.find(|j| self.memory.addr(batch, *j) == addr) {
                            self.merged_ahead |= 1 << j;
                        }
                    }
                    return true;
                }
                Err(refusal) => {
                    self.refuse(refusal);
                    match refusal {
                        Refusal::Same => {
                            same = true;
                            nth += 1;
                        }
                        // What is remembered of it is not true.
                        Refusal::Gone | Refusal::Differs => self.mistrust(other, state),
                        // One of them cannot be merged now: no candidate, so that the scanner tries again next time.
                        _ => self.unindex(other, state),
                    }
                }
            }
        }
        if nth == CANDIDATE_TRIES && !same {
            // Of pages whose mms are just leaving there may be any number.
            if let Some((last, state)) = self.candidate(fingerprint, at.owner, nth - 1) {
                self.unindex(last, state);
            }
        }
        // One page under several addresses, as after a fork: one of them is candidate enough.
        same
    }

    /// The `nth` candidate of this content but for the page itself.
    fn candidate(
        &self,
        fingerprint: Fingerprint,
        but: PageRef,
        nth: usize,
    ) -> Option<(PageRef, PageState)> {
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
            .nth(nth)
    }

    fn place<'a>(&self, at: &Place<'a, M::Mm>) -> Place<'a, M::Mm> {
        Place {
            mm: at.mm,
            addr: at.addr,
            owner: at.owner,
        }
    }

    fn refuse(&mut self, refusal: Refusal) {
        if let Some(count) = self.refusals.get_mut(refusal as usize) {
            *count = count.wrapping_add(1);
        }
    }

    /// Takes note that a page is merged, by an item that is on its node already.
    fn merged(&mut self, page: PageRef, item: ItemId) {
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

    fn untrack(&mut self, mm: &M::Mm, page: PageRef, state: PageState) {
        self.release_state(page, state);
        self.states.untrack(page);
        self.counters.tracked = self.counters.tracked.wrapping_sub(1);
        self.memory.account_tracked(mm, -1);
    }

    /// Lets go of what a page's state refers to, and leaves the page tracked with nothing known.
    fn release_state(&mut self, page: PageRef, state: PageState) {
        match state {
            PageState::Tracked { .. } => self.unindex(page, state),
            PageState::Merged(item) => {
                self.states.set(page, PageState::NEW);
                let Some(released) = self.memory.release_item(item) else {
                    return;
                };
                if let Some((owner, item)) = released.moved {
                    self.states.set(owner, PageState::Merged(item));
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
    fn unindex(&mut self, page: PageRef, state: PageState) {
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

    /// Has the contents of a page be read again before it is merged.
    fn mistrust(&mut self, page: PageRef, state: PageState) {
        self.unindex(page, state);
        if let PageState::Tracked { age, skips, .. } = state {
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
        remove: impl FnOnce(&mut M, NodeId, &mut dyn FnMut(PageRef)) -> bool,
    ) -> bool {
        let Some(meta) = self.memory.meta(node) else {
            return true;
        };
        let mut left = self.memory.mappings(node);
        let (states, counters) = (&mut self.states, &mut self.counters);
        let removed = remove(&mut self.memory, node, &mut |owner| {
            left = left.saturating_sub(1);
            counters.mapping_removed(left == 0);
            states.set(owner, PageState::NEW);
        });
        if removed {
            self.unlink_node(node, meta);
        }
        removed
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
