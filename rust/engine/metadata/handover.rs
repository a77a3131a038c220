// SPDX-License-Identifier: GPL-2.0-only

//! Merged pages that are taken over from another KSM, or handed on to it, without a change of their
//! mappings.

use super::super::{
    backend::Backend,
    page_state::{
        PageState,
        PageStates, //
    },
    types::{
        Fingerprint,
        ItemId,
        NodeId,
        PageId,
        SlotId, //
    },
};
use super::Metadata;
use kernel::prelude::*;

impl<B: Backend> Metadata<B> {
    /// Returns the stable nodes.
    ///
    /// # Context
    ///
    /// Any.
    pub fn backend(&mut self) -> &mut B {
        &mut self.backend
    }

    /// Notes that a page is merged, by an item that is still another KSM's. It is not accounted for
    /// before [`Metadata::inherited`], and [`Metadata::disinherit`] forgets it.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub fn inherit(&mut self, slot: SlotId, addr: usize, item: ItemId) -> Result {
        let page = self.states.track(slot, addr, B::GFP)?;
        self.states.set(page, PageState::Merged(item));
        self.backend.cond_resched();
        Ok(())
    }

    /// Forgets all that [`Metadata::inherit`] has noted, where nothing else was known.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn disinherit(&mut self) {
        self.states = PageStates::new();
    }

    /// Accounts for a page that has been inherited. Returns it, or `None` for one that has not.
    ///
    /// # Context
    ///
    /// Any.
    pub fn inherited(&mut self, slot: SlotId, addr: usize) -> Option<PageId> {
        let page = self.states.lookup(slot, addr)?;
        // INVARIANT: 4.
        self.counters.tracked += 1;
        Some(page)
    }

    /// Adds a node that has been inherited to the chain of its contents, and counts its mappings.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn inherit_node(&mut self, node: NodeId, merge_across_nodes: bool, max_page_sharing: u32) {
        for nth in 0..self.backend.mappings(node) {
            // INVARIANT: 4.
            self.counters.mapping_added(nth == 0);
        }
        // A page whose contents cannot be had is gone or poisoned: no search is to find it.
        if let Some(hash) = self.backend.content_hash(node) {
            let domain = match merge_across_nodes {
                true => 0,
                false => self.backend.nid(node),
            };
            self.link_node(node, Fingerprint::new(hash, domain), max_page_sharing);
        }
        self.backend.cond_resched();
    }

    /// Forgets the pages of an mm, and calls `give` with the item of each that is merged, in
    /// ascending order of the addresses. The items stay on their nodes.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn bequeath(&mut self, slot: SlotId, mm: &B::Mm, mut give: impl FnMut(&mut B, ItemId)) {
        let mut given = 0;
        self.remove_mm(slot, mm, |metadata, page, state| match state {
            PageState::Merged(item) => {
                metadata.states.set(page, PageState::NEW);
                give(&mut metadata.backend, item);
                given += 1;
            }
            state => metadata.release_state(page, state),
        });
        // The other KSM tracks these.
        self.backend.account_tracked(mm, given);
    }
}
