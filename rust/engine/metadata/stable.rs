// SPDX-License-Identifier: GPL-2.0-only

//! Stable nodes: the chains of dups, and the removal of nodes whose page is gone.
//!
//! A KSM page is mapped at most `max_page_sharing` times, so one content may have several KSM
//! pages. Their stable nodes, the dups, form a chain. The newest is the head, and the only one in
//! the index. A dup that has room again moves next to the head. A search examines at most
//! [`MAX_DUPS_TRIED`] dups.
//!
//! Nodes of one content come about without need, too: two pages that are written to while they are
//! merged become a KSM page of their new contents, and mappings go, so that two dups would fit into
//! one. The smaller one then *retires*: scans move its mappings to the other, and no page joins it.
//! Retiring dups are at the end of the chain.

use super::super::{
    backend::{
        Backend,
        NodeMeta,
        NodeState, //
    },
    index::Entry,
    page_state::PageState,
    types::{
        Fingerprint,
        ItemId,
        NodeId,
        PageId, //
    },
};
use super::Metadata;
use core::ops::Range;

/// Dups of a chain that a search for room examines.
const MAX_DUPS_TRIED: usize = 3;

impl<B: Backend> Metadata<B> {
    /// Prunes up to `count` stable nodes, starting where the last call ended: removes those whose
    /// page is gone. Returns whether the last node was reached.
    ///
    /// The built-in KSM prunes each chain in `stable_node_dup()` when it searches that chain.
    ///
    /// A node whose mappings fit into another one of its content retires.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn prune(&mut self, count: usize, max_page_sharing: u32) -> bool {
        for _ in 0..count {
            let Some(node) = self.backend.next(self.prune_cursor) else {
                self.prune_cursor = None;
                return true;
            };
            self.prune_cursor = Some(node);
            if self.backend.mappings(node) == 0 || self.backend.state(node) == NodeState::Stale {
                self.remove_node(node);
            } else if let Some(meta) = self.backend.meta(node) {
                if meta.next != node {
                    self.join(node, meta, max_page_sharing);
                } else if !meta.head && meta.fingerprint != Fingerprint::NONE {
                    self.link_node(node, meta.fingerprint, max_page_sharing);
                }
            }
        }
        false
    }

    /// Removes all stable nodes, as `remove_all_stable_nodes()`. Returns whether none is left: a
    /// page that is still mapped keeps its node.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn remove_all_nodes(&mut self) -> bool {
        let mut at = None;
        while let Some(node) = self.backend.next(at) {
            self.remove_node(node);
            at = Some(node);
            self.backend.cond_resched();
        }
        self.backend.count() == 0
    }

    /// Frees the stable nodes whose page frame numbers are in `frames`, which have gone offline, as
    /// `ksm_check_stable_tree()`.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn forget_frames(&mut self, frames: Range<usize>) {
        let mut at = None;
        while let Some(node) = self.backend.next_in(at, frames.clone()) {
            at = Some(node);
            self.drop_node(node, |backend, node, orphan| {
                backend.forget(node, orphan);
                true
            });
        }
    }

    /// Moves a node whose page has migrated to NUMA node `nid` to the fingerprint of that NUMA
    /// node. In `stable_tree_search()` such nodes are on the list `migrate_nodes`.
    pub(in super::super) fn follow_migration(
        &mut self,
        node: NodeId,
        nid: u32,
        max_page_sharing: u32,
        hash: impl FnOnce() -> u64,
    ) {
        if self.backend.nid(node) == nid {
            return;
        }
        if let Some(meta) = self.backend.meta(node) {
            self.unlink_node(node, meta);
            self.backend.set_nid(node, nid);
            self.link_node(node, Fingerprint::new(hash(), nid), max_page_sharing);
        }
    }

    /// Returns the head of the chain of this content.
    fn head(&self, fingerprint: Fingerprint) -> Option<NodeId> {
        self.index.find(fingerprint).find_map(|entry| match entry {
            Entry::Stable(node) => self
                .backend
                .meta(node)
                .is_some_and(|meta| meta.fingerprint == fingerprint)
                .then_some(node),
            Entry::Candidate(_) => None,
        })
    }

    /// Returns the head of the chain of this content. `guess` is tried first.
    pub(in super::super) fn head_at(
        &self,
        guess: Option<NodeId>,
        fingerprint: Fingerprint,
    ) -> Option<NodeId> {
        let right = |node: &NodeId| {
            let meta = self.backend.meta(*node);
            meta.is_some_and(|meta| meta.head && meta.fingerprint == fingerprint)
        };
        guess.filter(right).or_else(|| self.head(fingerprint))
    }

    /// Returns a dup of this chain that has room for one more mapping, as `stable_node_dup()`.
    /// `to_come` returns how many mappings are about to be added to a node.
    pub(in super::super) fn node_with_room(
        &self,
        head: NodeId,
        max_page_sharing: u32,
        to_come: impl Fn(NodeId) -> u32,
    ) -> Option<NodeId> {
        let mut node = head;
        for _ in 0..MAX_DUPS_TRIED {
            let meta = self.backend.meta(node)?;
            let mappings = self.backend.mappings(node);
            if mappings > 0 && mappings + to_come(node) < max_page_sharing && !meta.retiring {
                return Some(node);
            }
            node = meta.next;
            if node == head {
                break;
            }
        }
        None
    }

    /// Returns another dup of a chain that has room for all mappings of `node`.
    fn fits_into(&self, head: NodeId, node: NodeId, max_page_sharing: u32) -> Option<NodeId> {
        let own = self.backend.mappings(node);
        // All but one, for which a search makes sure that there is room.
        let to_come = |other| match other == node {
            true => max_page_sharing,
            false => own.saturating_sub(1),
        };
        self.node_with_room(head, max_page_sharing, to_come)
    }

    /// Returns whether a dup is to retire: another one has room for it, and no fewer mappings.
    fn retires(&self, head: NodeId, node: NodeId, max_page_sharing: u32) -> bool {
        let other = self.fits_into(head, node, max_page_sharing);
        other.is_some_and(|other| self.backend.mappings(other) >= self.backend.mappings(node))
    }

    /// Adds a node to the chain of its content, as `stable_tree_insert()`: it becomes the head, or
    /// retires if its mappings fit elsewhere.
    pub(in super::super) fn link_node(
        &mut self,
        node: NodeId,
        fingerprint: Fingerprint,
        max_page_sharing: u32,
    ) {
        let mut meta = NodeMeta {
            fingerprint,
            next: node,
            prev: node,
            head: true,
            retiring: false,
        };
        let old = self
            .head(fingerprint)
            .and_then(|old| Some((old, self.backend.meta(old)?)));
        let Some((old, mut old_meta)) = old else {
            self.backend.set_meta(node, meta);
            meta.head = self.insert(fingerprint, Entry::Stable(node));
            self.backend.set_meta(node, meta);
            return;
        };
        meta.retiring = self.retires(old, node, max_page_sharing);
        meta.head = !meta.retiring;
        if meta.head {
            self.index
                .replace(fingerprint, Entry::Stable(old), Entry::Stable(node));
        } else {
            self.retiring += 1;
        }
        (meta.next, meta.prev) = (old, old_meta.prev);
        if old_meta.next == old {
            old_meta.next = node;
            self.counters.stable_node_chains += 1;
            self.counters.stable_node_dups += 1;
        } else if let Some(mut last) = self.backend.meta(old_meta.prev) {
            last.next = node;
            self.backend.set_meta(old_meta.prev, last);
        }
        self.counters.stable_node_dups += 1;
        (old_meta.head, old_meta.prev) = (!meta.head, node);
        self.backend.set_meta(old, old_meta);
        self.backend.set_meta(node, meta);
    }

    /// Lets a dup retire whose mappings fit elsewhere, or be found by a smaller one that fits into
    /// it.
    fn join(&mut self, node: NodeId, meta: NodeMeta, max_page_sharing: u32) {
        let Some(head) = self.head(meta.fingerprint).filter(|_| !meta.retiring) else {
            return;
        };
        if self.retires(head, node, max_page_sharing) {
            self.unlink_node(node, meta);
            self.link_node(node, meta.fingerprint, max_page_sharing);
        } else if self.fits_into(head, node, max_page_sharing).is_some() {
            self.move_to_head(node);
        }
    }

    /// Lets a retiring node stay, as there is no room elsewhere any more.
    pub(in super::super) fn keep_node(&mut self, node: NodeId) {
        if let Some(mut meta) = self.backend.meta(node).filter(|meta| meta.retiring) {
            meta.retiring = false;
            self.retiring -= 1;
            self.backend.set_meta(node, meta);
            self.move_to_head(node);
        }
    }

    /// Returns whether any node retires.
    pub(in super::super) fn any_retiring(&self) -> bool {
        self.retiring != 0
    }

    /// Returns whether a page is merged, and its node is this one, which retires.
    pub(in super::super) fn moves_from(&self, page: PageId, node: NodeId) -> bool {
        let Some(PageState::Merged(item)) = self.states.get(page) else {
            return false;
        };
        self.backend.node_of(item) == Some(node)
            && self.backend.meta(node).is_some_and(|meta| meta.retiring)
    }

    /// Removes a node from its chain and the index.
    fn unlink_node(&mut self, node: NodeId, meta: NodeMeta) {
        self.retiring -= usize::from(meta.retiring);
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
        if let Some(mut prev) = self.backend.meta(meta.prev) {
            prev.next = meta.next;
            self.backend.set_meta(meta.prev, prev);
        }
        if let Some(mut next) = self.backend.meta(meta.next) {
            next.prev = meta.prev;
            next.head |= meta.head;
            if next.head && next.retiring {
                // INVARIANT: 3. All others have gone.
                next.retiring = false;
                self.retiring -= 1;
            }
            self.backend.set_meta(meta.next, next);
        }
        if meta.head {
            let (old, new) = (Entry::Stable(node), Entry::Stable(meta.next));
            self.index.replace(meta.fingerprint, old, new);
        }
    }

    /// Moves a dup that has room again next to the head of its chain, where a search finds it.
    fn move_to_head(&mut self, node: NodeId) {
        let Some(meta) = self.backend.meta(node) else {
            return;
        };
        if meta.head || meta.retiring || meta.next == meta.prev {
            return;
        }
        let Some(head) = self
            .head(meta.fingerprint)
            .filter(|head| *head != meta.prev)
        else {
            return;
        };
        let metas = (self.backend.meta(meta.prev), self.backend.meta(meta.next));
        let (Some(mut prev), Some(mut next)) = metas else {
            return;
        };
        prev.next = meta.next;
        next.prev = meta.prev;
        self.backend.set_meta(meta.prev, prev);
        self.backend.set_meta(meta.next, next);
        let Some(mut head_meta) = self.backend.meta(head) else {
            return;
        };
        let after = head_meta.next;
        head_meta.next = node;
        self.backend.set_meta(head, head_meta);
        if let Some(mut after_meta) = self.backend.meta(after) {
            after_meta.prev = node;
            self.backend.set_meta(after, after_meta);
        }
        self.backend.set_meta(
            node,
            NodeMeta {
                next: after,
                prev: head,
                ..meta
            },
        );
    }

    /// Removes a node whose page is unmapped or gone, as `remove_stable_node()`. Returns whether it
    /// was removed.
    pub(in super::super) fn remove_node(&mut self, node: NodeId) -> bool {
        self.drop_node(node, |backend, node, orphan| backend.remove(node, orphan))
    }

    /// Removes a node by `remove`, which passes the page of each rmap item to its callback. Returns
    /// whether the node was removed.
    fn drop_node(
        &mut self,
        node: NodeId,
        remove: impl FnOnce(&mut B, NodeId, &mut dyn FnMut(PageId)) -> bool,
    ) -> bool {
        let Some(meta) = self.backend.meta(node) else {
            return true;
        };
        let mut left = self.backend.mappings(node);
        let (states, counters) = (&mut self.states, &mut self.counters);
        let removed = remove(&mut self.backend, node, &mut |page| {
            left = left.saturating_sub(1);
            counters.mapping_removed(left == 0);
            states.set(page, PageState::ORPHANED);
        });
        if removed {
            self.unlink_node(node, meta);
        }
        removed
    }

    /// Releases the rmap item of a page that is no longer merged, as
    /// `remove_rmap_item_from_tree()`.
    pub(super) fn release_item(&mut self, item: ItemId) {
        let Some(released) = self.backend.release_item(item) else {
            return;
        };
        self.counters.mapping_removed(released.remaining == 0);
        if released.due {
            self.remove_node(released.node);
        } else {
            self.move_to_head(released.node);
        }
    }

    /// Records that two pages map the KSM page of a new node, which has no other mappings.
    pub(in super::super) fn set_both_merged(
        &mut self,
        first: (PageId, ItemId),
        second: (PageId, ItemId),
    ) {
        for (page, item) in [second, first] {
            self.unindex_now(page);
            // INVARIANT: 2. The backend has made the item for this page.
            self.states.set(page, PageState::Merged(item));
        }
        // INVARIANT: 4. The node has two mappings, of which one is shared and one sharing.
        self.counters.mapping_added(true);
        self.counters.mapping_added(false);
    }
}
