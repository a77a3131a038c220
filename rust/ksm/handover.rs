// SPDX-License-Identifier: GPL-2.0-only

//! Stable nodes and rmap items that come from the built-in KSM, or go back to it, as they are.
//!
//! What the core of mm looks at does not change, so the locks of folios are not needed. An item
//! pins its mm here, while the built-in pins it once for each of its slots.
//!
//! # Locks
//!
//! The caller holds the engine's lock, `thread_mutex`, and keeps the built-in's scanner out.

use crate::engine::{
    backend::StableNodes as _,
    container::id_table::IdTable,
    types::{
        ItemId,
        NodeId,
        PageId, //
    },
};
use crate::{
    bindings::raw,
    kernel_ext::{
        gfp::GFP_NODE,
        ksm_objects::{
            BuiltinItem,
            BuiltinNode, //
        },
        mm::PinnedMm, //
    },
    ksm::{
        node::{
            NodeRef,
            RmapItem, //
        },
        stable_nodes::StableNodes, //
    }, //
};
use core::cmp::Ordering;
use kernel::prelude::*;

impl StableNodes {
    /// Returns the number that an item of the built-in has here once it has been taken over.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn item_id(item: &BuiltinItem) -> ItemId {
        RmapItem::id(item.as_non_null().cast())
    }

    /// Notes a node, which is still the built-in's until [`Self::take_nodes`].
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn note_node(&mut self, node: BuiltinNode) -> Result {
        self.nodes.insert(node.as_non_null().cast(), GFP_NODE)?;
        Ok(())
    }

    /// Forgets all nodes that were noted.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn forget_noted_nodes(&mut self) {
        self.nodes = IdTable::new();
    }

    /// Takes over the nodes that were noted, each a chain of its own with no content, on the NUMA
    /// node where its page is.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn take_nodes(&mut self) {
        let mut at = None;
        while let Some(id) = self.nodes.next(at) {
            at = Some(id);
            if let Some(node) = self.nodes.get(id) {
                // SAFETY: The node was noted by its token, so that it is there, and nobody looks at
                // its links any more.
                unsafe { Self::set_alone(*node, NodeId(id)) };
            }
            let node = self.node(NodeId(id)).and_then(|node| self.get_folio(node));
            if let Some(nid) = node.map(|folio| folio.page().nid()) {
                self.set_nid(NodeId(id), nid);
            }
        }
    }

    /// Takes over an item, which maps `page` if that is tracked, and pins the mm for it.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn take_item(&mut self, item: BuiltinItem, mm: &PinnedMm, page: Option<PageId>) {
        let item = item.as_non_null().cast::<RmapItem>();
        // The item owns the pin from now on.
        core::mem::forget(mm.clone());
        self.nr_items += 1;
        if let Some(page) = page {
            // SAFETY: By the invariant of `BuiltinItem` the item is there. It is on no list of an
            // mm, whose link is here.
            unsafe { (*item.as_ptr()).range = page.range() };
        }
    }

    /// From here on a node that has items is not freed, as they may have been given away.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn begin_hand_back(&mut self) {
        self.handing_back = true;
    }

    /// Gives an item away, on its node.
    ///
    /// # Context
    ///
    /// Any. The mm is pinned otherwise.
    pub(crate) fn give_item(&mut self, item: ItemId) -> Option<BuiltinItem> {
        let item = RmapItem::of_id(item)?;
        self.nr_items -= 1;
        // SAFETY: By the contract of `Backend` the item is there, and nothing here uses it any
        // more. The pin that it owned goes, the pointer stays.
        unsafe {
            core::ptr::drop_in_place(&raw mut (*item.as_ptr()).mm);
            Some(BuiltinItem::new(item.cast()))
        }
    }

    /// Gives the first node behind `after` away, with the items on it, which have been given away
    /// before.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn give_node(&mut self, after: Option<NodeId>) -> Option<(NodeId, BuiltinNode)> {
        let id = self.next(after)?;
        let node = self.nodes.remove(id.0)?;
        // SAFETY: It has been taken out of the table, so that nothing here uses it any more.
        Some((id, unsafe { BuiltinNode::new(node.cast()) }))
    }

    /// Returns the NUMA node of a node's page, if that still exists and may be read.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    pub(crate) fn page_nid(&self, node: &BuiltinNode) -> Option<u32> {
        Some(self.readable_folio(node_ref(node))?.page().nid())
    }

    /// Returns whether the built-in would go on with a node as it is if it had to find a place for
    /// it first. It takes the page that it comes to off a node which has no room for another
    /// mapping, or that page off the last one of a content whose other nodes have none.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    pub(crate) fn can_wait(&self, node: &BuiltinNode, max_page_sharing: u32) -> bool {
        let node = node_ref(node);
        node.items() < max_page_sharing && node.is_alone()
    }

    /// Compares the contents of two nodes' pages, as `memcmp`; `None` if one of them is gone, or
    /// cannot be read.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    pub(crate) fn compare(&self, a: &BuiltinNode, b: &BuiltinNode) -> Option<Ordering> {
        let (a, b) = (
            self.readable_folio(node_ref(a))?,
            self.readable_folio(node_ref(b))?,
        );
        // SAFETY: Both folios are referenced. The contents of merged pages do not change.
        let order = unsafe { raw::rksm_memcmp_pages(a.page().as_ptr(), b.page().as_ptr()) };
        Some(order.cmp(&0))
    }
}

/// The node of a token.
fn node_ref(node: &BuiltinNode) -> NodeRef<'_> {
    // SAFETY: By the invariant of `BuiltinNode`.
    unsafe { NodeRef::new(node.as_non_null().cast()) }
}
