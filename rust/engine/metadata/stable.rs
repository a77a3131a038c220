// SPDX-License-Identifier: GPL-2.0-only

//! Stable nodes: the chains of dups, and the removal of nodes whose page is gone.
//!
//! A KSM page is mapped at most `max_page_sharing` times, so one content may have several KSM
//! pages. Their stable nodes, the dups, form a chain. The newest is the head, and the only one in
//! the index. A dup that has room again moves next to the head. A search examines at most
//! [`MAX_DUPS_TRIED`] dups.

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
    /// # Context
    ///
    /// May sleep.
    pub fn prune(&mut self, count: usize) -> bool {
        for _ in 0..count {
            let Some(node) = self.backend.next(self.prune_cursor) else {
                self.prune_cursor = None;
                return true;
            };
            self.prune_cursor = Some(node);
            if self.backend.mappings(node) == 0 || self.backend.state(node) == NodeState::Stale {
                self.remove_node(node);
            } else if let Some(meta) = self.backend.meta(node) {
                if !meta.head && meta.next == node && meta.fingerprint != Fingerprint::NONE {
                    self.link_node(node, meta.fingerprint);
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
        hash: impl FnOnce() -> u64,
    ) {
        if self.backend.nid(node) == nid {
            return;
        }
        if let Some(meta) = self.backend.meta(node) {
            self.unlink_node(node, meta);
            self.backend.set_nid(node, nid);
            self.link_node(node, Fingerprint::new(hash(), nid));
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
            let mappings = self.backend.mappings(node);
            if mappings > 0 && mappings + to_come(node) < max_page_sharing {
                return Some(node);
            }
            node = self.backend.meta(node)?.next;
            if node == head {
                break;
            }
        }
        None
    }

    /// Makes a node the head of the chain of its content, as `stable_tree_insert()`.
    pub(in super::super) fn link_node(&mut self, node: NodeId, fingerprint: Fingerprint) {
        let mut meta = NodeMeta {
            fingerprint,
            next: node,
            prev: node,
            head: true,
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
        self.index
            .replace(fingerprint, Entry::Stable(old), Entry::Stable(node));
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
        (old_meta.head, old_meta.prev) = (false, node);
        self.backend.set_meta(old, old_meta);
        self.backend.set_meta(node, meta);
    }

    /// Removes a node from its chain and the index.
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
        if let Some(mut prev) = self.backend.meta(meta.prev) {
            prev.next = meta.next;
            self.backend.set_meta(meta.prev, prev);
        }
        if let Some(mut next) = self.backend.meta(meta.next) {
            next.prev = meta.prev;
            next.head |= meta.head;
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
        if meta.head || meta.next == meta.prev {
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
            states.set(page, PageState::NEW);
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
        if let Some((page, item)) = released.moved {
            // INVARIANT: 2. The item has this id now.
            self.states.set(page, PageState::Merged(item));
        }
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
