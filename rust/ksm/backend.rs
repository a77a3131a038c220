// SPDX-License-Identifier: GPL-2.0-only

//! The memory operations of the engine, over the other files of this folder.

use crate::engine::{
    content_hash::ContentKey,
    memory::{
        Collected,
        HugeId,
        Look,
        Memory,
        Merged,
        NodeMeta,
        NodeState,
        PageKind,
        Pair,
        Partner,
        Place,
        Released, //
    },
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
            FolioMapping,
            FolioRef, //
        },
        mm::PinnedMm,
        race_window,
        symbols::Symbols, //
    },
    ksm::{
        arena::Arena,
        batch::Batch,
        collect,
        merge::{
            in_vma,
            Couple,
            Merge,
            With, //
        },
        node::{
            kpfn,
            StableNode,
            HEAD, //
        },
        page::{
            self,
            page_nid, //
        },
        stable_nodes::StableNodes, //
    }, //
};
use core::{
    ops::Range,
    ptr::NonNull, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// Mappings of the zero page that KSM, built-in or not, has placed. The core of mm counts them down.
pub(crate) fn zero_pages(_symbols: Symbols) -> i64 {
    // SAFETY: The counter has been resolved.
    unsafe { raw::rksm_ksm_zero_pages() as i64 }
}

impl Memory for StableNodes {
    type Mm = PinnedMm;
    type Batch = Batch;
    type Key = Arc<ContentKey>;
    type Merge = Merge;

    fn collect<L: Look>(
        &self,
        mm: &PinnedMm,
        within: Range<usize>,
        limit: usize,
        own: &Range<usize>,
        batch: &mut Batch,
        look: &mut L,
    ) -> Collected {
        batch.set_limit(limit, own);
        race_window::sleep();
        let guard = mm.mmap_read_lock();
        let Some(live) = guard.live() else {
            return Collected::Exiting;
        };
        let mut look = |addr, mapped: &raw::rksm_mapped| {
            let kind = self.kind_of(FolioMapping::from_raw(mapped.mapping));
            look.look(addr, kind, mapped.nid as u32, mapped.touched)
        };
        match collect::collect(live, within, batch, &mut look) {
            Some(next) => Collected::More(next),
            None => Collected::End,
        }
    }

    fn len(&self, batch: &Batch) -> usize {
        batch.len()
    }

    fn addr(&self, batch: &Batch, i: usize) -> usize {
        batch.addr(i)
    }

    fn kind(&self, batch: &Batch, i: usize) -> PageKind {
        let Some(page) = batch.page(i) else {
            return PageKind::Orphan;
        };
        // SAFETY: The batch holds a reference to the page.
        let folio = unsafe { NonNull::new_unchecked(raw::rksm_page_folio(page.as_ptr())) };
        self.kind_of(folio::mapping(folio))
    }

    fn touched(&self, batch: &Batch, i: usize) -> bool {
        batch.touched(i)
    }

    fn key(&self) -> Arc<ContentKey> {
        self.key.clone()
    }

    fn hash_by(key: &Arc<ContentKey>, batch: &Batch, i: usize) -> u64 {
        batch.page(i).map_or(0, |page| {
            // SAFETY: The batch holds a reference to the page.
            unsafe { page::content_hash(key, page) }
        })
    }

    fn nid(&self, batch: &Batch, i: usize) -> u32 {
        batch.page(i).map_or(0, page_nid)
    }

    fn huge(&self, batch: &Batch, i: usize) -> Option<HugeId> {
        batch.huge_folio(i).map(|folio| HugeId(folio as usize))
    }

    fn release(&self, batch: &mut Batch, i: usize) {
        batch.release(i);
    }

    fn make_way(&self, batch: &mut Batch, huge: HugeId, keep: Option<usize>) {
        batch.make_way(huge.0 as *mut raw::folio, keep);
    }

    fn regain(&self, mm: &PinnedMm, batch: &mut Batch, i: usize) -> bool {
        if !batch.lost(i) {
            return true;
        }
        let addr = batch.addr(i);
        let held = in_vma(mm, addr, |_, vma| {
            page::page_at(vma, addr).ok_or(Refusal::Gone)
        });
        held.map(|held| batch.regain(i, held)).is_ok()
    }

    fn clear(&self, batch: &mut Batch) {
        batch.clear();
    }

    fn zero_hash(&self) -> u64 {
        self.zero_hash
    }

    fn prepare(
        &mut self,
        at: Place<'_, PinnedMm>,
        batch: &Batch,
        i: usize,
        partner: Partner<'_, PinnedMm>,
    ) -> Result<Merge, Refusal> {
        let page = batch.page(i).ok_or(Refusal::Gone)?;
        let with = match partner {
            Partner::Zero => With::Zero {
                mm: at.mm.clone(),
                addr: at.addr,
            },
            Partner::Node { node, nid } => {
                let node = self.node(node).ok_or(Refusal::Stale)?;
                let kfolio = self.get_folio(node).ok_or(Refusal::Stale)?;
                if nid.is_some_and(|nid| nid != page_nid(kfolio.page())) {
                    return Err(Refusal::FarNode);
                }
                With::Node {
                    node,
                    kfolio,
                    item: self.new_item(&at)?,
                }
            }
            Partner::Page { other, nid } => {
                let first = self.new_item(&at)?;
                let second = self
                    .new_item(&other)
                    .inspect_err(|_| self.discard_item(&first))?;
                let node = self.new_node(page_nid(page) as c_int).inspect_err(|_| {
                    self.discard_item(&first);
                    self.discard_item(&second);
                })?;
                // SAFETY: The node is ours alone until a folio names it. The page is referenced.
                unsafe { (*node.as_ptr()).kpfn = raw::rksm_page_to_pfn(page.as_ptr()) };
                With::Page(Couple {
                    node,
                    first,
                    second,
                    nid,
                    shared: None,
                })
            }
        };
        // INVARIANT: The caller does so.
        Ok(Merge {
            trace: self.trace,
            page,
            with,
            outcome: Err(Refusal::Gone),
        })
    }

    fn finish(&mut self, merge: &mut Merge) -> Result<Merged, Refusal> {
        match (&merge.with, merge.outcome) {
            (With::Zero { .. }, outcome) => outcome.map(|()| Merged::Zero),
            (With::Node { item, .. }, Ok(())) => Ok(Merged::Node(self.added(item))),
            (With::Node { item, .. }, Err(refusal)) => {
                self.discard_item(item);
                Err(refusal)
            }
            (With::Page(couple), Ok(())) => Ok(Merged::Pair(Pair {
                // SAFETY: The node is in the arena.
                node: unsafe { (*couple.node.as_ptr()).id },
                first: self.added(&couple.first),
                second: self.added(&couple.second),
                touched: couple.shared.unwrap_or(true),
            })),
            (With::Page(couple), Err(refusal)) => {
                self.discard_item(&couple.second);
                if couple.shared.is_some() {
                    self.added(&couple.first);
                    self.undo_first(&couple.first);
                } else {
                    self.discard_item(&couple.first);
                    // SAFETY: The node is in the arena.
                    self.discard_node(unsafe { (*couple.node.as_ptr()).id });
                }
                Err(refusal)
            }
        }
    }

    fn adopt(
        &mut self,
        at: Place<'_, PinnedMm>,
        batch: &Batch,
        i: usize,
        node: NodeId,
    ) -> Result<ItemId, Refusal> {
        let page = batch.page(i).ok_or(Refusal::Gone)?;
        let node = self.node(node).ok_or(Refusal::Stale)?;
        // SAFETY: The batch holds a reference to the page.
        let folio = unsafe { NonNull::new_unchecked(raw::rksm_page_folio(page.as_ptr())) };
        // SAFETY: As above.
        let folio = unsafe { FolioRef::try_get(folio) }.ok_or(Refusal::Stale)?;
        let item = self.new_item(&at)?;
        let adopted = in_vma(at.mm, at.addr, |_, vma| item.place_in(vma)).and_then(|()| {
            race_window::sleep();
            let lock = folio.lock();
            if folio.mapping() != StableNode::mapping(node) {
                return Err(Refusal::Stale);
            }
            // SAFETY: The node's folio is locked, and names it.
            unsafe { item.append(node, Some(&lock)) };
            Ok(())
        });
        match adopted {
            Ok(()) => Ok(self.added(&item)),
            Err(refusal) => {
                self.discard_item(&item);
                Err(refusal)
            }
        }
    }

    fn node_of(&self, item: ItemId) -> Option<NodeId> {
        // SAFETY: The item is in the arena.
        self.item(item).map(|item| unsafe { (*item.as_ptr()).node })
    }

    fn release_item(&mut self, id: ItemId) -> Option<Released> {
        let item = self.item(id)?;
        let node_id = self.node_of(id)?;
        let node = self.node(node_id)?;
        // SAFETY: Both are in their arenas; the folio is locked, or names the node no more.
        let unlink = || unsafe { StableNode::unlink(node, item) };
        let locked = self.with_locked(node, |lock| (unlink(), lock.folio().mapped()));
        let (gone, mapped) = match locked {
            Some((gone, mapped)) => (gone, Some(mapped)),
            None => (unlink(), None),
        };
        // SAFETY: The item is in the arena still, and pins its mm.
        let mm = unsafe { (*gone.as_ptr()).mm.as_mm() };
        self.trace
            .remove_rmap_item(kpfn(node), item.as_ptr() as usize, mm);
        // SAFETY: As above.
        self.free_item(ItemId(unsafe { Arena::number_of(gone) }));
        let remaining = self.mappings(node_id);
        Some(Released {
            node: node_id,
            remaining,
            due: match mapped {
                None => true,
                Some(mapped) => remaining == 0 && !mapped,
            },
            moved: (gone != item).then(|| {
                // SAFETY: Another item has come to this place, which is in the arena.
                (unsafe { (*item.as_ptr()).page() }, id)
            }),
        })
    }

    fn meta(&self, node: NodeId) -> Option<NodeMeta> {
        let node = self.node(node)?.as_ptr();
        // SAFETY: The node is in the arena; only the engine, whose lock is held, looks at these.
        let (content, next, prev) = unsafe { ((*node).content, (*node).next, (*node).prev) };
        Some(NodeMeta {
            fingerprint: Fingerprint::from_bits(content),
            next,
            prev,
            head: content & HEAD != 0,
        })
    }

    fn set_meta(&mut self, node: NodeId, meta: NodeMeta) {
        let Some(node) = self.node(node) else { return };
        let head = if meta.head { HEAD } else { 0 };
        // SAFETY: As above.
        unsafe {
            (*node.as_ptr()).content = meta.fingerprint.to_bits() | head;
            (*node.as_ptr()).next = meta.next;
            (*node.as_ptr()).prev = meta.prev;
        }
    }

    fn node_nid(&self, node: NodeId) -> u32 {
        self.node(node).map_or(0, |node| {
            // SAFETY: The node is in the arena; only the engine, whose lock is held, changes `nid`.
            unsafe { (*node.as_ptr()).nid as u32 }
        })
    }

    fn set_node_nid(&mut self, node: NodeId, nid: u32) {
        if let Some(node) = self.node(node) {
            // SAFETY: As above.
            unsafe { (*node.as_ptr()).nid = nid as c_int };
        }
    }

    fn mappings(&self, node: NodeId) -> u32 {
        self.node(node).map_or(0, |node| {
            // SAFETY: The node is in the arena; only the engine, whose lock is held, changes the length.
            unsafe { (*node.as_ptr()).rmap_hlist_len as u32 }
        })
    }

    fn state(&self, node: NodeId) -> NodeState {
        match self.node(node).and_then(|node| self.get_folio(node)) {
            None => NodeState::Stale,
            Some(_) => NodeState::Alive,
        }
    }

    fn remove_node(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageId)) -> bool {
        let Some(node) = self.node(node) else {
            return true;
        };
        let mapped = self.with_locked(node, |lock| {
            let mapped = lock.folio().mapped();
            if !mapped {
                // SAFETY: The folio is locked, and nobody maps it: it may end its days without a node.
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
        self.free_node(node, orphan);
        true
    }

    fn next_node_in(&self, after: Option<NodeId>, frames: Range<usize>) -> Option<NodeId> {
        let mut at = after;
        while let Some(id) = self.next_node(at) {
            let kpfn = self.node(id).map(kpfn);
            if kpfn.is_some_and(|kpfn| frames.contains(&kpfn)) {
                return Some(id);
            }
            at = Some(id);
        }
        None
    }

    fn forget_node(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageId)) {
        if let Some(node) = self.node(node) {
            self.free_node(node, orphan);
        }
    }

    fn next_node(&self, after: Option<NodeId>) -> Option<NodeId> {
        self.nodes.next(after.map(|id| id.0)).map(NodeId)
    }

    fn nodes(&self) -> usize {
        self.nodes.len()
    }

    fn account_tracked(&mut self, mm: &PinnedMm, delta: isize) {
        // SAFETY: The mm is pinned; only the engine, whose lock is held, changes the field.
        unsafe { raw::rksm_mm_add_rmap_items(mm.as_ptr(), delta) };
    }

    fn bytes(&self) -> usize {
        self.nodes.bytes() + self.items.bytes()
    }

    fn breathe(&mut self) -> bool {
        // SAFETY: The engine's lock is a mutex; no spinlock is held.
        unsafe {
            raw::rksm_cond_resched();
            raw::rksm_freezing(kernel::task::Task::current_raw()) || raw::rksm_kthread_stopping()
        }
    }
}
