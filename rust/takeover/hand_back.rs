// SPDX-License-Identifier: GPL-2.0-only

//! Gives merged pages to the built-in, which has none.
//!
//! A node goes to the list `migrate_nodes`, whose nodes ksmd finds a place for when it comes to one
//! of their pages. There it takes that page off a node which is full, or which is the last mapping
//! of a content whose other nodes are full, and merges it anew. So such nodes go into the stable
//! tree, where they are left in peace.
//!
//! It cannot fail. The only allocation is that of a chain, without which a node is listed.
//!
//! # Locks
//!
//! [`MergedPages`] keeps ksmd out. An mm that has users has not begun to exit, so that its slot is
//! there; once that has items it stays on the list, and the mm may exit.

use crate::{
    bindings::raw::{
        self,
        layout, //
    },
    kernel_ext::{
        gfp::GFP_NODE,
        ksm_objects::{
            BuiltinItem,
            BuiltinNode, //
        },
        mm::PinnedMm,
        race_window, //
    },
    takeover::{
        builtin::MmlistLock,
        inventory::{
            self,
            Unfit, //
        },
        merged_pages::{
            cond_resched,
            dup_links,
            Counters,
            DupLinks,
            Item,
            MergedPages,
            Node,
            ScanProgress,
            Slot,
            STABLE_NODE_CHAIN, //
        }, //
    }, //
};
use core::{
    cmp::Ordering,
    ptr::{
        self,
        NonNull, //
    }, //
};
use kernel::prelude::*;

/// The number of mms that are looked at under one lock.
const BATCH: usize = 32;

/// Rmap items of one mm, linked for it, in ascending order of their addresses.
#[derive(Default)]
pub(crate) struct ItemList {
    first: Option<Item>,
    last: Option<Item>,
    count: u64,
}

impl ItemList {
    /// Appends an item.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn push(&mut self, item: BuiltinItem) {
        let item = item.as_non_null();
        // SAFETY: By the invariant of `BuiltinItem` the item is there; it is on no list of an mm.
        unsafe { (*item.as_ptr()).rmap_list = ptr::null_mut() };
        match self.last {
            // SAFETY: The last one was pushed here.
            Some(last) => unsafe { (*last.as_ptr()).rmap_list = item.as_ptr() },
            None => self.first = Some(item),
        }
        self.last = Some(item);
        self.count += 1;
    }
}

/// What the built-in is given back.
pub(crate) struct Return {
    merged: MergedPages,
    /// What it has been given.
    counters: Counters,
}

impl Return {
    /// Begins.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn begin(merged: MergedPages) -> Self {
        Self {
            merged,
            counters: Counters::default(),
        }
    }

    /// Calls `visit` with each live mm on the built-in's list, which gets the rmap items that it
    /// returns. Those that come meanwhile may be visited or not, and an mm may be visited twice.
    ///
    /// # Context
    ///
    /// May sleep. Takes `ksm_mmlist_lock`; `visit` is called without it. Allocates nothing.
    pub(crate) fn for_each_live_mm(&mut self, mut visit: impl FnMut(&PinnedMm) -> ItemList) {
        // An mm that leaves the list moves those behind it to the place of one that was visited.
        while self.visit_all(&mut visit) {}
    }

    /// Visits the mms of the list, but for some if any leave it. Returns whether any got items.
    fn visit_all(&mut self, visit: &mut impl FnMut(&PinnedMm) -> ItemList) -> bool {
        let mut any = false;
        // A slot that has got items stays on the list: the scanner alone would take it off.
        let (mut after, mut skip) = (None, 0);
        loop {
            let mut batch = [const { None }; BATCH];
            let found = self.slots(after, skip, &mut batch);
            skip += found;
            for (i, place) in batch.into_iter().enumerate() {
                let Some((slot, mm)) = place else { break };
                // An mm that has users has its slot.
                let Some(_user) = mm.mmget_not_zero() else {
                    continue;
                };
                race_window::sleep();
                let items = visit(&mm);
                race_window::sleep();
                if items.count > 0 {
                    self.attach(slot, items);
                    (after, skip, any) = (Some(slot), found - 1 - i, true);
                }
                cond_resched();
            }
            if found < BATCH {
                return any;
            }
        }
    }

    /// Finds the slots behind `after`, or all, without the first `skip`, as many as there is room
    /// for. Returns how many.
    fn slots(
        &self,
        after: Option<Slot>,
        skip: usize,
        batch: &mut [Option<(Slot, PinnedMm)>],
    ) -> usize {
        let list = MmlistLock::lock(self.merged.builtin);
        let mut found = 0;
        for (place, slot) in batch.iter_mut().zip(list.slots_after(after).skip(skip)) {
            *place = Some((slot, inventory::mm_of(slot)));
            found += 1;
        }
        found
    }

    /// Gives a slot its items.
    fn attach(&mut self, slot: Slot, items: ItemList) {
        self.counters.items += items.count;
        let _list = MmlistLock::lock(self.merged.builtin);
        // SAFETY: Its mm has users, so that it has not left the list.
        unsafe {
            (*slot.as_ptr()).rmap_list = items.first.map_or(ptr::null_mut(), NonNull::as_ptr)
        };
    }

    /// Gives a node back, to the list of nodes that wait for a place in a tree.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn list_node(&mut self, node: BuiltinNode) {
        let node = node.as_non_null();
        let head = self.merged.symbols().migrate_nodes();
        // SAFETY: By the invariant of `BuiltinNode` it is there. Nobody else looks at its links,
        // nor at the list, which the mutex protects.
        unsafe {
            let links = dup_links(node);
            links.write(DupLinks::default());
            (*links).head = head;
            raw::rksm_list_add_tail(&raw mut (*links).__bindgen_anon_1.list, head);
        }
        self.count(node);
    }

    /// Gives a node back, to tree `nid`. `compare` compares the contents of the pages of two nodes,
    /// `None` where that cannot be done: the node is then listed, as by [`Self::list_node`].
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn insert_node(
        &mut self,
        node: BuiltinNode,
        nid: u32,
        compare: impl Fn(&BuiltinNode, &BuiltinNode) -> Option<Ordering>,
    ) {
        let Some(root) = self.merged.stable_roots().nth(nid as usize) else {
            return self.list_node(node);
        };
        // SAFETY: The tree does not change but here while the mutex is held.
        let mut link = unsafe { &raw mut (*root.as_ptr()).rb_node };
        let mut parent = ptr::null_mut();
        loop {
            cond_resched();
            // SAFETY: The root's link, or one of a node in the tree, which begins with its link.
            let Some(at) = NonNull::new(unsafe { *link }) else {
                break;
            };
            let there = at.cast();
            match compare(&node, &first_dup(there)) {
                // SAFETY: The node is in the tree.
                Some(Ordering::Less) => unsafe { link = &raw mut (*at.as_ptr()).rb_left },
                // SAFETY: As above.
                Some(Ordering::Greater) => unsafe { link = &raw mut (*at.as_ptr()).rb_right },
                Some(Ordering::Equal) => match self.chain(there, nid, root) {
                    Some(chain) => return self.add_dup(node.as_non_null(), chain, nid),
                    None => return self.list_node(node),
                },
                None => return self.list_node(node),
            }
            parent = at.as_ptr();
        }
        let node = node.as_non_null();
        // SAFETY: By the invariant of `BuiltinNode` the node is there, and nobody else looks at its
        // links. `link` is the place in the tree below `parent` where it belongs.
        unsafe {
            dup_links(node).write(DupLinks::default());
            (*node.as_ptr()).nid = nid as c_int;
            raw::rb_link_node(node.as_ptr().cast(), parent, link);
            raw::rb_insert_color(node.as_ptr().cast(), root.as_ptr());
        }
        self.count(node);
    }

    /// Returns the chain that a node in the tree is, or becomes the first dup of. `None` without
    /// memory for it.
    fn chain(&mut self, node: Node, nid: u32, root: NonNull<raw::rb_root>) -> Option<Node> {
        // SAFETY: The node is in the tree.
        if unsafe { (*node.as_ptr()).rmap_hlist_len } == STABLE_NODE_CHAIN {
            return Some(node);
        }
        let mut chain = layout::ksm_stable_node {
            rmap_hlist_len: STABLE_NODE_CHAIN,
            // `NUMA_NO_NODE`
            nid: -1,
            ..layout::ksm_stable_node::default()
        };
        // SAFETY: Only reads the time.
        let now = unsafe { ptr::read_volatile(&raw const raw::jiffies) };
        chain.__bindgen_anon_2.chain_prune_time = now;
        let chain = self.merged.nodes_cache()?.alloc(chain, GFP_NODE)?;
        // SAFETY: The node is in the tree, and the chain takes its place there.
        unsafe {
            raw::rb_replace_node(node.as_ptr().cast(), chain.as_ptr().cast(), root.as_ptr());
        }
        self.counters.chains += 1;
        self.link_dup(node, chain, nid);
        Some(chain)
    }

    /// Adds a node to a chain.
    fn add_dup(&mut self, node: Node, chain: Node, nid: u32) {
        self.link_dup(node, chain, nid);
        self.count(node);
    }

    fn link_dup(&mut self, node: Node, chain: Node, nid: u32) {
        // SAFETY: Both are there. The node is in no tree and on no list, and nobody else looks at
        // its links, nor at the chain.
        unsafe {
            let links = dup_links(node);
            links.write(DupLinks::default());
            (*links).head = self.merged.dup_head();
            (*node.as_ptr()).nid = nid as c_int;
            raw::rksm_hlist_add_head(
                &raw mut (*links).__bindgen_anon_1.hlist_dup,
                &raw mut (*chain.as_ptr()).hlist,
            );
        }
        self.counters.dups += 1;
    }

    fn count(&mut self, node: Node) {
        // SAFETY: The node is there. Only a scanner changes its length.
        let len = unsafe { (*node.as_ptr()).rmap_hlist_len };
        if let Some(more) = u64::try_from(len).ok().and_then(|len| len.checked_sub(1)) {
            self.counters.shared += 1;
            self.counters.sharing += more;
        }
    }

    /// Ends: the built-in counts what it has been given, and goes on counting from `progress`. With
    /// `check`, returns what is wrong with it.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn end(self, progress: ScanProgress, check: bool) -> Option<&'static str> {
        self.merged.add_counters(&self.counters);
        self.merged.set_progress(progress);
        match check.then(|| self.merged.inventory())? {
            Err(Unfit::Unknown(what)) => Some(what),
            _ => None,
        }
    }
}

/// Returns a node in a tree, or the first dup of a chain.
fn first_dup(node: Node) -> BuiltinNode {
    // SAFETY: The node is in a tree. A chain has dups, linked by their `hlist_dup`. They stay there
    // while the mutex is held.
    unsafe {
        if (*node.as_ptr()).rmap_hlist_len != STABLE_NODE_CHAIN {
            return BuiltinNode::new(node);
        }
        let dup = (*node.as_ptr()).hlist.first;
        let links = kernel::container_of!(dup, DupLinks, __bindgen_anon_1.hlist_dup);
        BuiltinNode::new(NonNull::new_unchecked(links.cast()))
    }
}
