// SPDX-License-Identifier: GPL-2.0-only

//! All stable nodes and rmap items, and the pages that the nodes stand for.

use crate::engine::{
    backend::{
        self,
        NodeMeta,
        NodeState,
        PageAddr,
        PageKind,
        Released, //
    },
    container::id_table::IdTable,
    content_hash::ContentKey,
    types::{
        Fingerprint,
        ItemId,
        NodeId,
        PageId,
        Refusal, //
    },
};
use crate::{
    bindings::raw,
    kernel_ext::{
        folio::{
            self,
            FolioLock,
            FolioMapping,
            FolioRef,
            PageRef, //
        },
        gfp::{
            GFP_METADATA,
            GFP_NODE, //
        },
        mm::PinnedMm,
        race_window,
        slab::KmemCache,
        symbols::Symbols, //
    },
    ksm::{
        node::{
            NodeRef,
            RmapItem,
            StableNode,
            UnlinkedItem,
            HEAD,
            RETIRING, //
        },
        page,
        trace::Trace, //
    }, //
};
use core::{
    ops::Range,
    ptr::NonNull, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::Atomic,
        Arc,
        UniqueArc, //
    },
};

/// Merged pages in existence, and the memory operations of the engine.
///
/// # Invariants
///
/// - Every node in `nodes` is an object of `node_cache`, and has its own number in `id`. A node's
///   `hlist` holds `rmap_hlist_len` items, objects of `item_cache`, all of which name it as their
///   `head`. `nr_items` counts the items.
/// - Its users keep the contract of [`backend::Backend`].
pub(crate) struct StableNodes {
    pub(super) nodes: IdTable<NonNull<StableNode>>,
    pub(super) node_cache: KmemCache<StableNode>,
    pub(super) item_cache: KmemCache<RmapItem>,
    pub(super) nr_items: usize,
    /// Items may be the built-in's already: a node with items is not freed.
    pub(super) handing_back: bool,
    pub(super) key: Arc<ContentKey>,
    pub(super) zero_hash: u64,
    pub(super) use_zero_pages: bool,
    pub(super) trace: Trace,
}

// SAFETY: All pointers in it are to kernel objects that any thread may use under the locks that the
// documentation of `node` names.
unsafe impl Send for StableNodes {}
// SAFETY: A shared reference gives only read access to nodes and items. Beside that a merge writes
// to items of its own, which the engine does not know before it is finished, and to lists of nodes,
// which the locks of their folios protect. Of what it writes to nodes only the length of a list is
// read without the lock, which is an atomic.
unsafe impl Sync for StableNodes {}

impl StableNodes {
    /// Creates the set without any node, with a random key.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    ///
    /// # Safety
    ///
    /// Whoever uses it keeps the contract of [`backend::Backend`]. The private structs of the
    /// running kernel are as this module has been compiled for. When it is used first, no folio is
    /// a merged page of the built-in KSM that this has not taken over.
    pub(crate) unsafe fn new(symbols: Symbols, trace: Trace) -> Result<Self> {
        let mut key = UniqueArc::new(ContentKey::new([0; ContentKey::WORDS]), GFP_KERNEL)?;
        let words = key.words_mut();
        // SAFETY: The words are ours, and any bytes make words.
        unsafe { raw::get_random_bytes(words.as_mut_ptr().cast(), size_of_val(words)) };
        // SAFETY: The zero page is always there.
        let zero = unsafe { NonNull::new(raw::rksm_zero_page()) }.ok_or(EINVAL)?;
        // SAFETY: The zero page is reserved, and never freed.
        let zero_hash = page::content_hash(&key, unsafe { PageRef::new(zero) });
        let node_cache = NonNull::new(symbols.stable_node_cache()).ok_or(EINVAL)?;
        let item_cache = NonNull::new(symbols.rmap_item_cache()).ok_or(EINVAL)?;
        // SAFETY: The built-in makes both at boot, for objects of these layouts.
        let (node_cache, item_cache) =
            unsafe { (KmemCache::new(node_cache), KmemCache::new(item_cache)) };
        // INVARIANT: There are no nodes; the rest is the contract.
        Ok(Self {
            nodes: IdTable::new(),
            node_cache,
            item_cache,
            nr_items: 0,
            handing_back: false,
            key: key.into(),
            zero_hash,
            use_zero_pages: false,
            trace,
        })
    }

    pub(super) fn node(&self, id: NodeId) -> Option<NodeRef<'_>> {
        let node = *self.nodes.get(id.0)?;
        // SAFETY: By the invariant the node is there. It is removed from the table, which the
        // result borrows, before it is freed.
        Some(unsafe { NodeRef::new(node) })
    }

    /// Returns the node of ours that a `mapping` word names.
    ///
    /// # Safety
    ///
    /// The word is that of a folio which is mapped or referenced.
    unsafe fn node_of_mapping(&self, mapping: FolioMapping) -> Option<NodeId> {
        let node = StableNode::of_mapping(mapping)?;
        // SAFETY: By the contract of `new` every node that a folio names is ours. A node is freed,
        // for which it takes a unique reference, only after its folio has been freed or has ceased
        // to name it.
        let node = unsafe { NodeRef::new(node) };
        (self.node(node.id()) == Some(node)).then_some(node.id())
    }

    /// Returns the kind of a page whose folio has this `mapping` word.
    ///
    /// # Safety
    ///
    /// The word is that of a folio which is mapped or referenced.
    pub(super) unsafe fn kind_of(&self, mapping: FolioMapping) -> PageKind {
        if mapping.is_plain_anon() {
            PageKind::Plain
        } else {
            // SAFETY: By the contract.
            unsafe { self.node_of_mapping(mapping) }.map_or(PageKind::Orphan, PageKind::Ksm)
        }
    }

    /// Returns the node's folio with a reference, if it is still the node's.
    ///
    /// The node holds no reference: its folio may be freed, or move to another frame, at any time.
    /// So the frame's `mapping` is read before and after a reference is taken. A folio that is
    /// being migrated has its count frozen, or a `mapping` of 0, and the node names the new frame
    /// before the old one ceases to name the node: hence the barrier, which pairs with the one in
    /// `folio_migrate_ksm`.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    pub(super) fn get_folio(&self, node: NodeRef<'_>) -> Option<FolioRef> {
        let expected = node.mapping();
        loop {
            let frame = node.kpfn();
            // SAFETY: `frame` is one that held our page; frames that are taken offline are pruned
            // before.
            let folio = unsafe { NonNull::new_unchecked(raw::rksm_pfn_folio(frame)) };
            // SAFETY: As above.
            if unsafe { folio::mapping(folio) } == expected {
                race_window::spin();
                let reference = loop {
                    // SAFETY: `folio` is the memory map's entry of a frame that is not taken
                    // offline before nodes in it are pruned; a folio of any kind may be tried.
                    match unsafe { FolioRef::try_get(folio) } {
                        Some(reference) => break Some(reference),
                        // A count of 0 means that the folio has been freed, or that migration has
                        // frozen it, which it does to a folio in the swap cache only.
                        // SAFETY: `folio` is an entry of the memory map, whose flags may be read
                        // without a reference.
                        None if unsafe { raw::rksm_folio_test_swapcache(folio.as_ptr()) } => {
                            core::hint::spin_loop()
                        }
                        None => break None,
                    }
                };
                if let Some(reference) = reference.filter(|r| r.mapping() == expected) {
                    return Some(reference);
                }
            }
            // SAFETY: A barrier.
            unsafe { raw::rksm_smp_rmb() };
            if node.kpfn() == frame {
                return None;
            }
        }
    }

    /// As [`Self::get_folio`], unless the page is poisoned, and must not be read.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    pub(super) fn readable_folio(&self, node: NodeRef<'_>) -> Option<FolioRef> {
        let folio = self.get_folio(node)?;
        // SAFETY: The folio is referenced.
        let poisoned = unsafe { raw::rksm_folio_poisoned(folio.as_ptr()) };
        (!poisoned).then_some(folio)
    }

    /// Calls `f` with the node's folio locked, if it is still the node's.
    ///
    /// # Context
    ///
    /// May sleep. Takes the folio lock. `f` runs under it.
    pub(super) fn with_locked<R>(
        &self,
        node: NodeRef<'_>,
        f: impl FnOnce(&FolioLock<'_>) -> R,
    ) -> Option<R> {
        let expected = node.mapping();
        loop {
            let folio = self.get_folio(node)?;
            race_window::sleep();
            let lock = folio.lock();
            // Until it was locked, the page may have been migrated.
            if folio.mapping() == expected {
                return Some(f(&lock));
            }
        }
    }

    /// Creates an rmap item that is on no node yet.
    ///
    /// The mmap lock must not be held: the OOM killer may need it to free memory.
    ///
    /// # Context
    ///
    /// May sleep. The engine's lock is held; the mmap lock is not.
    pub(super) fn new_item(
        &mut self,
        page: &PageAddr<'_, PinnedMm>,
    ) -> Result<UnlinkedItem, Refusal> {
        let item = RmapItem {
            range: page.page.range(),
            _unused: 0,
            anon_vma: None,
            mm: page.mm.clone(),
            address: page.addr,
            linear_page_index: 0,
            head: None,
            hlist: raw::hlist_node::default(),
        };
        let item = self.item_cache.alloc(item, GFP_METADATA);
        let item = item.ok_or(Refusal::NoMemory)?;
        self.nr_items += 1;
        // SAFETY: It has just been allocated, so nothing else has a pointer to it. It stays until
        // it is discarded, or has been on a node.
        Ok(unsafe { UnlinkedItem::new(item) })
    }

    /// Accounts for an item that has been added to a node.
    pub(super) fn added(&self, item: &UnlinkedItem) -> ItemId {
        // SAFETY: The item pins its mm.
        unsafe { raw::rksm_mm_add_merging(item.mm().as_ptr(), 1) };
        item.id()
    }

    /// Accounts for an item that has left its node, and frees it.
    ///
    /// # Context
    ///
    /// May sleep. The engine's lock is held.
    ///
    /// # Safety
    ///
    /// The item is on no node any more, and nothing uses it.
    pub(super) unsafe fn free_item(&mut self, item: NonNull<RmapItem>) {
        // SAFETY: By the contract.
        let item = unsafe { self.item_cache.free(item) };
        self.nr_items -= 1;
        // SAFETY: The item pins its mm.
        unsafe { raw::rksm_mm_add_merging(item.mm.as_ptr(), -1) };
    }

    /// Frees an item that was never on a node.
    pub(super) fn discard_item(&mut self, item: UnlinkedItem) {
        // SAFETY: By the invariant of `UnlinkedItem` nothing else uses the item, which is on no
        // node.
        drop(unsafe { self.item_cache.free(item.as_non_null()) });
        self.nr_items -= 1;
    }

    /// Adds a node without items for a page, whose folio does not name it yet. It stays until it is
    /// discarded or freed.
    ///
    /// # Context
    ///
    /// May sleep. The engine's lock is held; the mmap lock is not.
    pub(super) fn new_node(&mut self, page: PageRef<'_>) -> Result<NonNull<StableNode>, Refusal> {
        let node = StableNode {
            content: Fingerprint::NONE.to_bits(),
            next: NodeId(0),
            prev: NodeId(0),
            id: NodeId(0),
            _unused: [0; 5],
            hlist: raw::hlist_head::default(),
            kpfn: page.pfn(),
            rmap_hlist_len: Atomic::new(0),
            nid: page.nid() as c_int,
        };
        let node = self.node_cache.alloc(node, GFP_NODE);
        let node = node.ok_or(Refusal::NoMemory)?;
        // INVARIANT: The node gets its own number.
        match self.nodes.insert(node, GFP_NODE) {
            Ok(id) => {
                // SAFETY: The node has just been allocated, and nothing else uses it.
                unsafe { Self::set_alone(node, NodeId(id)) };
                Ok(node)
            }
            Err(_) => {
                // SAFETY: As above.
                unsafe { self.node_cache.free(node) };
                Err(Refusal::NoMemory)
            }
        }
    }

    /// Gives a node its number, and makes it a chain of its own with no content.
    ///
    /// # Safety
    ///
    /// The node is there, and only the caller uses these fields.
    pub(super) unsafe fn set_alone(node: NonNull<StableNode>, id: NodeId) {
        // SAFETY: By the contract.
        unsafe {
            (*node.as_ptr()).content = Fingerprint::NONE.to_bits();
            (*node.as_ptr()).id = id;
            (*node.as_ptr()).next = id;
            (*node.as_ptr()).prev = id;
        }
    }

    /// Frees a node.
    ///
    /// # Context
    ///
    /// May sleep. The engine's lock is held.
    ///
    /// # Safety
    ///
    /// No folio names the node, and its items are not the built-in's.
    unsafe fn free_node(&mut self, id: NodeId, orphan: &mut dyn FnMut(PageId)) {
        let kpfn = self.node(id).map_or(0, NodeRef::kpfn);
        let unlink_first = |node: NodeRef<'_>| {
            // SAFETY: By the contract no folio names the node, so no rmap walk follows its list.
            unsafe {
                let item = node.first()?;
                node.unlink(item);
                Some((item, node.items() > 0))
            }
        };
        while let Some((item, more)) = self.node(id).and_then(unlink_first) {
            // SAFETY: The item has not been freed yet.
            let page = unsafe { (*item.as_ptr()).page() };
            if more {
                // SAFETY: The item has not been freed yet, and pins its mm.
                let mm = unsafe { (*item.as_ptr()).mm.as_mm() };
                self.trace
                    .remove_rmap_item(kpfn, item.as_ptr() as usize, mm);
            }
            // SAFETY: It has left the node above.
            unsafe { self.free_item(item) };
            orphan(page);
        }
        self.trace.remove_ksm_page(kpfn);
        // SAFETY: The node has no items; the rest is the contract.
        unsafe { self.discard_node(id) };
    }

    /// Frees a node without items.
    ///
    /// # Safety
    ///
    /// No folio names the node, and it has no items.
    pub(super) unsafe fn discard_node(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.remove(id.0) {
            // SAFETY: By the contract nothing uses the node any more.
            unsafe { self.node_cache.free(node) };
        }
    }
}

impl backend::StableNodes for StableNodes {
    fn node_of(&self, item: ItemId) -> Option<NodeId> {
        // SAFETY: By the contract of `Backend` the item is there, and so is the node that it is on.
        unsafe {
            let node = (*RmapItem::of_id(item)?.as_ptr()).head?;
            Some(NodeRef::new(node).id())
        }
    }

    fn release_item(&mut self, id: ItemId) -> Option<Released> {
        let item = RmapItem::of_id(id)?;
        let node_id = self.node_of(id)?;
        let node = self.node(node_id)?;
        // SAFETY: By the invariant the item is on the node that it names, and by the contract of
        // `Backend` no merge uses either. The folio is locked, or names the node no more.
        let unlink = || unsafe { node.unlink(item) };
        let mapped = self.with_locked(node, |lock| {
            unlink();
            lock.folio().mapped()
        });
        if mapped.is_none() {
            unlink();
        }
        // SAFETY: The item has not been freed yet, and pins its mm.
        let mm = unsafe { (*item.as_ptr()).mm.as_mm() };
        self.trace
            .remove_rmap_item(node.kpfn(), item.as_ptr() as usize, mm);
        let remaining = node.items();
        // SAFETY: It has left the node above.
        unsafe { self.free_item(item) };
        Some(Released {
            node: node_id,
            remaining,
            due: match mapped {
                None => true,
                Some(mapped) => remaining == 0 && !mapped,
            },
        })
    }

    fn meta(&self, node: NodeId) -> Option<NodeMeta> {
        let node = self.node(node)?.as_ptr();
        // SAFETY: The node is there; only the engine, whose lock is held, looks at these.
        let (content, next, prev) = unsafe { ((*node).content, (*node).next, (*node).prev) };
        Some(NodeMeta {
            fingerprint: Fingerprint::from_bits(content),
            next,
            prev,
            head: content & HEAD != 0,
            retiring: content & RETIRING != 0,
        })
    }

    fn set_meta(&mut self, node: NodeId, meta: NodeMeta) {
        let Some(node) = self.node(node) else { return };
        let head = if meta.head { HEAD } else { 0 };
        let retiring = if meta.retiring { RETIRING } else { 0 };
        // SAFETY: The node is there; only the engine, whose lock is held, accesses these
        // fields.
        unsafe {
            (*node.as_ptr()).content = meta.fingerprint.to_bits() | head | retiring;
            (*node.as_ptr()).next = meta.next;
            (*node.as_ptr()).prev = meta.prev;
        }
    }

    fn nid(&self, node: NodeId) -> u32 {
        self.node(node).map_or(0, |node| {
            // SAFETY: The node is there; only the engine, whose lock is held, changes `nid`.
            unsafe { (*node.as_ptr()).nid as u32 }
        })
    }

    fn set_nid(&mut self, node: NodeId, nid: u32) {
        if let Some(node) = self.node(node) {
            // SAFETY: The node is there; only the engine, whose lock is held, accesses `nid`.
            unsafe { (*node.as_ptr()).nid = nid as c_int };
        }
    }

    fn mappings(&self, node: NodeId) -> u32 {
        self.node(node).map_or(0, NodeRef::items)
    }

    fn content_hash(&self, node: NodeId) -> Option<u64> {
        let folio = self.readable_folio(self.node(node)?)?;
        // The contents of a merged page do not change.
        Some(page::content_hash(&self.key, folio.page()))
    }

    fn state(&self, node: NodeId) -> NodeState {
        match self.node(node).and_then(|node| self.get_folio(node)) {
            None => NodeState::Stale,
            Some(_) => NodeState::Alive,
        }
    }

    fn remove(&mut self, id: NodeId, orphan: &mut dyn FnMut(PageId)) -> bool {
        let Some(node) = self.node(id) else {
            return true;
        };
        if self.handing_back && node.items() > 0 {
            return false;
        }
        let mapped = self.with_locked(node, |lock| {
            let mapped = lock.folio().mapped();
            if !mapped {
                // SAFETY: The folio is locked and not mapped, so nothing needs its node any more.
                unsafe {
                    raw::rksm_folio_set_mapping(
                        lock.folio().as_ptr(),
                        FolioMapping::KSM_WITHOUT_NODE.as_raw(),
                    )
                };
            }
            mapped
        });
        if mapped == Some(true) {
            return false;
        }
        // SAFETY: The node's folio has been freed, or has ceased to name it above.
        unsafe { self.free_node(id, orphan) };
        true
    }

    fn forget(&mut self, id: NodeId, orphan: &mut dyn FnMut(PageId)) {
        if self.node(id).is_some() {
            // SAFETY: By the contract of `Backend` the node's folio is gone with its frame.
            unsafe { self.free_node(id, orphan) };
        }
    }

    fn next(&self, after: Option<NodeId>) -> Option<NodeId> {
        self.nodes.next(after.map(|id| id.0)).map(NodeId)
    }

    fn next_in(&self, after: Option<NodeId>, frames: Range<usize>) -> Option<NodeId> {
        let mut at = after;
        while let Some(id) = self.next(at) {
            let kpfn = self.node(id).map(NodeRef::kpfn);
            if kpfn.is_some_and(|kpfn| frames.contains(&kpfn)) {
                return Some(id);
            }
            at = Some(id);
        }
        None
    }

    fn count(&self) -> usize {
        self.nodes.len()
    }

    fn bytes(&self) -> usize {
        self.nodes.bytes()
            + self.nodes.len() * size_of::<StableNode>()
            + self.nr_items * size_of::<RmapItem>()
    }
}
