// SPDX-License-Identifier: GPL-2.0-only

//! Checks of the invariants, for `check=1` and the tests.

use super::super::{
    backend::{
        Backend,
        NodeMeta, //
    },
    index::Entry,
    page_state::PageState,
    stats::Counters,
    types::{
        Fingerprint,
        NodeId,
        SlotId, //
    },
};
use super::{
    key_of,
    Metadata,
    MmStats,
    CANDIDATE_TRIES, //
};
use core::cell::Cell;
use kernel::page::PAGE_SIZE;

impl<B: Backend> Metadata<B> {
    /// Checks all invariants, in time proportional to the number of tracked pages.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// Which invariant does not hold.
    pub fn check(&mut self) -> Result<(), &'static str> {
        self.states.check()?;
        self.events.check(&self.refusals)?;
        let (stable, candidates) = (Cell::new(0), Cell::new(0));
        self.index.check(|entry| {
            let indexed = match entry {
                Entry::Stable(node) => {
                    stable.set(stable.get() + 1);
                    self.backend.meta(node)?.head
                }
                Entry::Candidate(page) => {
                    candidates.set(candidates.get() + 1);
                    let state = self.states.get(page)?;
                    matches!(state, PageState::Tracked(tracked) if tracked.is_indexed())
                }
            };
            key_of(&self.states, &self.backend, entry).filter(|_| indexed)
        })?;
        let mappings = self.check_nodes(stable.get())?;
        self.check_pages(candidates.get(), mappings)
    }

    /// Checks the stable nodes against index and counters. Returns the number of rmap items.
    fn check_nodes(&mut self, in_index: usize) -> Result<u64, &'static str> {
        let (mut heads, mut in_chains, mut alone, mut retiring) = (0, 0, 0, 0);
        let mut found = Counters::default();
        let mut at = None;
        while let Some(node) = self.backend.next(at) {
            at = Some(node);
            let meta = self
                .backend
                .meta(node)
                .ok_or("engine: a node that is none")?;
            match u64::from(self.backend.mappings(node)) {
                0 => {}
                mappings => {
                    found.pages_shared += 1;
                    found.pages_sharing += mappings - 1;
                }
            }
            self.check_content(node, meta)?;
            retiring += usize::from(meta.retiring);
            if meta.head {
                let size = self.check_chain(node, meta)?;
                heads += 1;
                in_chains += size;
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
            self.backend.cond_resched();
        }
        if in_chains + alone != self.backend.count() {
            return Err("engine: not every node is in one chain with a head");
        }
        if retiring != self.retiring {
            return Err("engine: retiring nodes are counted wrongly");
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
            return Err("engine: chains or the nodes in them are counted wrongly");
        }
        Ok(found.pages_shared + found.pages_sharing)
    }

    /// Checks that a node is where a search for its contents finds it.
    fn check_content(&self, node: NodeId, meta: NodeMeta) -> Result<(), &'static str> {
        if meta.fingerprint == Fingerprint::NONE {
            return Ok(());
        }
        let Some(hash) = self.backend.content_hash(node) else {
            return Ok(());
        };
        let domains = [0, self.backend.nid(node)];
        let right = |domain| Fingerprint::new(hash, domain) == meta.fingerprint;
        match domains.into_iter().any(right) {
            true => Ok(()),
            false => Err("engine: a node does not stand under the hash of its page"),
        }
    }

    /// Checks the chain of a head. Returns its number of nodes.
    fn check_chain(&self, head: NodeId, meta: NodeMeta) -> Result<usize, &'static str> {
        let of_content = |entry: &Entry| match entry {
            Entry::Stable(node) => {
                self.backend.meta(*node).map(|m| m.fingerprint) == Some(meta.fingerprint)
            }
            Entry::Candidate(_) => false,
        };
        let mut indexed = self.index.find(meta.fingerprint).filter(of_content);
        if indexed.next() != Some(Entry::Stable(head)) || indexed.next().is_some() {
            return Err("engine: the index has not just the head for a content");
        }
        if meta.retiring {
            return Err("engine: a head retires");
        }
        let (mut size, mut last, mut node) = (1, head, meta.next);
        while node != head {
            let meta_here = self
                .backend
                .meta(node)
                .ok_or("engine: a chain has a node that is none")?;
            if meta_here.head || meta_here.prev != last || meta_here.fingerprint != meta.fingerprint
            {
                return Err("engine: a chain has a node that does not belong there");
            }
            size += 1;
            if size > self.backend.count() {
                return Err("engine: a chain does not close");
            }
            (last, node) = (node, meta_here.next);
        }
        if meta.prev != last {
            return Err("engine: a chain is not linked both ways");
        }
        Ok(size)
    }

    /// Checks the page states against index, rmap items and counters.
    fn check_pages(&mut self, in_index: usize, items: u64) -> Result<(), &'static str> {
        let (mut seen, mut merged, mut indexed) = (0, 0, 0);
        let mut slot = 0;
        while seen < self.states.tracked_total() {
            let mut at = 0;
            let before = (seen, merged, indexed);
            while let Some((page, addr, state)) = self.states.first_in(SlotId(slot), at..usize::MAX)
            {
                seen += 1;
                at = addr.saturating_add(PAGE_SIZE);
                match state {
                    PageState::Merged(item) => {
                        merged += 1;
                        let node = self
                            .backend
                            .node_of(item)
                            .and_then(|n| self.backend.meta(n));
                        node.ok_or("engine: a merged page has an item that is none")?;
                    }
                    PageState::Tracked(tracked) if tracked.is_indexed() => {
                        indexed += 1;
                        let own = |entry: &Entry| *entry == Entry::Candidate(page);
                        if self.index.find(tracked.fingerprint()).filter(own).count() != 1 {
                            return Err("engine: a candidate is not in the index once");
                        }
                        if self
                            .candidate(tracked.fingerprint(), page, CANDIDATE_TRIES - 1)
                            .is_some()
                        {
                            return Err("engine: more candidates for a content than are tried");
                        }
                    }
                    PageState::Tracked(_) => {}
                }
                self.backend.cond_resched();
            }
            let MmStats { pages, .. } = self.mm_stats(SlotId(slot));
            let counted = (pages.total() as usize, pages.merged, pages.unique as usize);
            if counted != (seen - before.0, merged - before.1, indexed - before.2) {
                return Err("engine: pages of an mm are counted wrongly");
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
}
