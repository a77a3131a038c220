// SPDX-License-Identifier: GPL-2.0-only

//! What is known of all pages: their states, the content index, the stable nodes, and what is
//! counted of them.

mod candidate;
mod check;
mod handover;
pub mod mm_stats;
mod stable;

use super::{
    backend::Backend,
    governor::watch::Watch,
    index::{
        Entry,
        Index, //
    },
    pace::MAX_FORGOTTEN,
    page_state::{
        PageState,
        PageStates,
        Run,
        View, //
    },
    policy::Policy,
    stats::Counters,
    types::{
        Fingerprint,
        ItemId,
        NodeId,
        PageId,
        Refusal,
        Refusals,
        SlotId, //
    },
};
use core::ops::Range;
use kernel::page::PAGE_SIZE;
use mm_stats::{
    MmEvents,
    MmStats, //
};

/// Maximum number of candidates of one content.
pub(super) const CANDIDATE_TRIES: u8 = 4;

/// What is known of all pages.
///
/// # Invariants
///
/// 1. A page is in the index as a candidate if and only if its state is tracked and `indexed`,
///    under its state's fingerprint.
/// 2. A page's state is `Merged(item)` if and only if `item` exists and names the page.
/// 3. Nodes with one fingerprint form chains, each with exactly one head, which is in the index
///    under that fingerprint. (A node for which the index had no memory is a chain of its own
///    without a head.) A head is not retiring, and `retiring` counts the nodes that are.
/// 4. `counters` count what is there.
/// 5. No content has more than [`CANDIDATE_TRIES`] candidates, so that a search for it ends soon.
pub struct Metadata<B: Backend> {
    pub(super) backend: B,
    pub(super) states: PageStates,
    pub(super) index: Index,
    /// What the files show.
    pub counters: Counters,
    /// Why pages were not merged.
    pub refusals: Refusals,
    /// The same and more of each mm.
    events: MmEvents,
    /// Pages that have been replaced by the zero page in this pass.
    pub(super) zero_pages_placed: usize,
    /// The node that [`Metadata::prune`] examined last.
    prune_cursor: Option<NodeId>,
    /// Number of retiring nodes.
    retiring: usize,
}

impl<B: Backend> Metadata<B> {
    /// Creates metadata that knows no page, without allocating.
    pub(super) fn new(backend: B) -> Self {
        Self {
            backend,
            states: PageStates::new(),
            index: Index::new(),
            counters: Counters::default(),
            refusals: Refusals::default(),
            events: MmEvents::new(),
            zero_pages_placed: 0,
            prune_cursor: None,
            retiring: 0,
        }
    }

    /// Returns how many bytes of memory page states, counters of mms, index, nodes and rmap items
    /// take.
    pub fn bytes(&self) -> usize {
        self.states.bytes() + self.events.bytes() + self.index.bytes() + self.backend.bytes()
    }

    /// Returns whether a page of this mm is tracked, or something is counted for it: whether it
    /// has to be forgotten before its slot is another's.
    pub fn tracks(&self, slot: SlotId) -> bool {
        self.states.tracked(slot) != 0 || self.events.any(slot)
    }

    /// Returns the number of stable nodes, those without mappings included.
    pub fn nodes(&self) -> usize {
        self.backend.count()
    }

    /// Returns what is counted for an mm, in time proportional to the number of its ranges.
    ///
    /// # Context
    ///
    /// Any.
    pub fn mm_stats(&self, slot: SlotId) -> MmStats {
        self.events.stats(slot, self.states.counts(slot))
    }

    /// As [`PageStates::next_run`].
    pub fn next_run(
        &self,
        slot: SlotId,
        from: usize,
        view: &View,
        watch: &mut Watch,
    ) -> Option<Run> {
        self.states.next_run(slot, from, view, watch)
    }

    /// As [`PageStates::looked`].
    pub fn looked(&mut self, slot: SlotId, within: Range<usize>, view: &View, watch: &mut Watch) {
        self.states.looked(slot, within, view, watch);
    }

    /// Counts that a page of an mm was not merged.
    pub(super) fn refuse(&mut self, slot: SlotId, refusal: Refusal) {
        self.refusals.count(refusal);
        self.events.refuse(slot, refusal, B::GFP);
    }

    /// Counts that the scan has found a merged page of an mm replaced by one of its own.
    pub(super) fn count_broken(&mut self, slot: SlotId) {
        self.events.break_one(slot, B::GFP);
    }

    /// Forgets all pages of an mm that has left or been unmerged, as
    /// `remove_trailing_rmap_items()`.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn forget_mm(&mut self, slot: SlotId, mm: &B::Mm) {
        self.remove_mm(slot, mm, Self::release_state);
    }

    /// Stops tracking all pages of an mm, in ascending order of the addresses, and forgets what was
    /// counted for it. `release` leaves each page without what its state refers to.
    fn remove_mm(
        &mut self,
        slot: SlotId,
        mm: &B::Mm,
        mut release: impl FnMut(&mut Self, PageId, PageState),
    ) {
        let mut at = 0;
        while let Some((page, addr, state)) = self.states.next_linked(slot, at) {
            release(self, page, state);
            at = addr.saturating_add(PAGE_SIZE);
            self.backend.cond_resched();
        }
        let tracked = self.states.remove_slot(slot);
        self.events.forget(slot);
        self.counters.tracked = self.counters.tracked.wrapping_sub(tracked as u64);
        self.backend.account_tracked(mm, -(tracked as isize));
    }

    /// As [`Metadata::forget_mm`], until `pause` returns true, which is called after each
    /// [`MAX_FORGOTTEN`] pages. Returns whether nothing is left.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn forget_some(&mut self, slot: SlotId, mm: &B::Mm, pause: impl Fn() -> bool) -> bool {
        while self.states.tracked(slot) > MAX_FORGOTTEN {
            self.forget(slot, mm, 0..usize::MAX);
            if pause() {
                return false;
            }
        }
        self.forget_mm(slot, mm);
        true
    }

    /// As [`Metadata::forget_some`], for the pages of these addresses.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn forget_range(
        &mut self,
        slot: SlotId,
        mm: &B::Mm,
        range: Range<usize>,
        pause: impl Fn() -> bool,
    ) -> bool {
        while !self.forget(slot, mm, range.clone()) {
            if pause() {
                return false;
            }
        }
        true
    }

    /// Forgets the tracked pages of a range of addresses, [`MAX_FORGOTTEN`] at most. Returns
    /// whether none is left.
    pub(super) fn forget(&mut self, slot: SlotId, mm: &B::Mm, range: Range<usize>) -> bool {
        if range.is_empty() {
            return true;
        }
        // From the end: removing the last state moves no other.
        for _ in 0..MAX_FORGOTTEN {
            let Some((page, _, state)) = self.states.last_in(slot, range.clone()) else {
                return true;
            };
            self.untrack(mm, page, state);
            self.backend.cond_resched();
        }
        self.states.first_in(slot, range).is_none()
    }

    /// Starts to track the pages of these addresses.
    pub(super) fn track(&mut self, slot: SlotId, mm: &B::Mm, within: Range<usize>) {
        let pages = within.len() / PAGE_SIZE;
        let tracked = self.states.track_all(slot, within, B::GFP);
        self.counters.tracked += tracked as u64;
        self.backend.account_tracked(mm, tracked as isize);
        for _ in tracked..pages {
            self.refuse(slot, Refusal::NoMemory);
        }
    }

    /// Stops tracking a page.
    pub(super) fn untrack(&mut self, mm: &B::Mm, page: PageId, state: PageState) {
        self.release_state(page, state);
        self.states.untrack(page);
        self.counters.tracked = self.counters.tracked.wrapping_sub(1);
        self.backend.account_tracked(mm, -1);
    }

    /// Releases what a page's state refers to, and leaves the page tracked with nothing known.
    pub(super) fn release_state(&mut self, page: PageId, state: PageState) {
        match state {
            PageState::Tracked(tracked) => {
                self.unindex(page, tracked);
                self.states.set(page, PageState::NEW);
            }
            PageState::Merged(item) => {
                self.states.set(page, PageState::NEW);
                self.release_item(item);
            }
        }
    }

    /// Returns whether the page is not merged and has this fingerprint.
    pub(super) fn has_fingerprint(&self, page: PageId, fingerprint: Fingerprint) -> bool {
        matches!(
            self.states.get(page),
            Some(PageState::Tracked(tracked)) if tracked.fingerprint() == fingerprint
        )
    }

    /// Returns whether a page is to be replaced by the zero page, because it probably has only
    /// zeroes.
    pub(super) fn is_zero(&self, policy: &Policy, fingerprint: Fingerprint, domain: u32) -> bool {
        policy.use_zero_pages && fingerprint == Fingerprint::new(self.backend.zero_hash(), domain)
    }

    /// Adds an entry to the index. Returns whether there was memory for it.
    fn insert(&mut self, fingerprint: Fingerprint, entry: Entry) -> bool {
        let (states, backend) = (&self.states, &self.backend);
        let inserted = self.index.insert(fingerprint, entry, B::GFP, |entry| {
            key_of(states, backend, entry)
        });
        inserted.is_ok()
    }

    /// Records that a page is merged. `item` is already on its node.
    pub(super) fn set_merged(&mut self, page: PageId, item: ItemId) {
        // INVARIANT: 2. The caller has the item from the backend, made for this page.
        self.states.set(page, PageState::Merged(item));
        let mappings = self
            .backend
            .node_of(item)
            .map_or(0, |node| self.backend.mappings(node));
        // INVARIANT: 4.
        self.counters.mapping_added(mappings == 1);
    }
}

/// Returns the fingerprint under which an entry is in the index.
fn key_of<B: Backend>(states: &PageStates, backend: &B, entry: Entry) -> Option<Fingerprint> {
    match entry {
        Entry::Stable(node) => backend.meta(node).map(|meta| meta.fingerprint),
        Entry::Candidate(page) => states.fingerprint(page),
    }
}
