// SPDX-License-Identifier: GPL-2.0-only

//! The simulated mm as the engine sees it. At each call that may sleep an event may happen.

use crate::sim::{
    nid,
    Batch,
    Mapping,
    Mm,
    Target,
    World,
    TABLE, //
};

use engine_tests::engine::{
    backend::{
        self,
        Backend,
        Collected,
        HugeFolioRefs,
        HugeId,
        MergeTarget,
        Merged,
        NodeMeta,
        NodeState,
        PageAddr,
        PageKind,
        Released,
        StableNodes,
        WalkAction,
        WalkFilter,
        WalkStep, //
    },
    types::{
        Fingerprint,
        ItemId,
        MmPin,
        NodeId,
        PageId,
        Refusal,
        Refused, //
    },
};

use kernel::{
    alloc::Flags,
    prelude::GFP_KERNEL, //
};

use std::{
    cell::{
        RefCell,
        RefMut, //
    },
    ops::Range,
    rc::Rc, //
};

/// Bytes of a node or an item.
const OBJECT: usize = 64;

#[derive(Clone)]
pub(crate) struct SimMemory(pub(crate) Rc<RefCell<World>>);

// SAFETY: The pool of these tests is one thread.
unsafe impl Sync for SimMemory {}
// SAFETY: The pool of these tests is one thread.
unsafe impl Send for SimMemory {}

/// A merge: of the page at an address of an mm, and what came of it.
pub(crate) struct Merge {
    memory: SimMemory,
    key: usize,
    addr: usize,
    page: PageId,
    frame: usize,
    with: With,
    outcome: Result<Merged, Refused>,
    /// The first of two pages is a merged page, which the second has not become.
    undo: Option<(ItemId, NodeId)>,
}

enum With {
    Zero,
    Node(NodeId, Option<u32>),
    Page {
        key: usize,
        addr: usize,
        page: PageId,
        nid: Option<u32>,
    },
}

impl SimMemory {
    /// The world, after something may have happened in it.
    fn sleep(&self) -> RefMut<'_, World> {
        let mut world = self.0.borrow_mut();
        world.step();
        world
    }

    /// The world, for a page of a batch that has to be one.
    fn sleep_at(&self, at: &PageAddr<'_, Mm>, batch: &Batch, i: usize) -> RefMut<'_, World> {
        assert!(!batch.released[i], "a released page is used");
        assert_eq!((at.mm.key(), at.addr), (batch.key, batch.pages[i].0));
        self.sleep()
    }

    fn kind_of(&self, frame: usize) -> PageKind {
        match self.0.borrow().page(frame).mapping {
            Mapping::Anon => PageKind::Plain,
            Mapping::Ksm(node) => PageKind::Ksm(node),
            Mapping::Orphan => PageKind::Orphan,
        }
    }

    fn count<T>(&self, result: Result<T, Refused>) -> Result<T, Refused> {
        if let Err(refused) = &result {
            self.0.borrow_mut().refusals.count(refused.reason());
        }
        result
    }

    /// The references of the batches to the huge page that a frame is part of.
    fn held(&self, frame: usize, huge: &impl HugeFolioRefs) -> usize {
        let id = self.0.borrow().huge(frame);
        id.map_or(0, |id| huge.count(id))
    }
}

impl backend::Batch for Batch {
    type Key = SimMemory;

    fn nr_pages(&self) -> usize {
        self.pages.len()
    }

    fn addr(&self, i: usize) -> usize {
        self.pages[i].0
    }

    fn accessed(&self, i: usize) -> bool {
        assert!(!self.released[i], "a released page is looked at");
        self.accessed[i]
    }

    fn cleared_beyond(&self) -> Range<usize> {
        self.cleared.clone()
    }

    fn nid(&self, i: usize) -> u32 {
        nid(self.frame(i))
    }

    fn huge(&self, i: usize) -> Option<HugeId> {
        if self.released[i] {
            return None;
        }
        self.world.borrow().huge(self.frame(i))
    }

    fn hash(&self, i: usize, key: &SimMemory) -> u64 {
        let world = key.0.borrow();
        world.hash(world.page(self.frame(i)).content)
    }

    fn is_pinned(&self, i: usize) -> bool {
        let (world, frame) = (self.world.borrow(), self.frame(i));
        match world.huge(frame) {
            Some(huge) => world.huge_refs(frame) != self.huge_refs(huge),
            None => world.page(frame).pinned,
        }
    }

    fn huge_refs(&self, huge: HugeId) -> usize {
        let world = self.world.borrow();
        let held = self.pages.iter().zip(&self.released);
        held.filter(|((_, frame), released)| !**released && world.huge(*frame) == Some(huge))
            .count()
    }

    fn release(&mut self, i: usize) {
        self.world.clone().borrow_mut().release(self, i);
    }

    fn release_huge_folio(&mut self, huge: HugeId, keep: Option<usize>) {
        let world = self.world.clone();
        let mut world = world.borrow_mut();
        for i in 0..self.pages.len() {
            let frame = self.pages[i].1;
            if Some(i) != keep && !self.released[i] && world.huge(frame) == Some(huge) {
                world.release(self, i);
                self.released_for_split[i] = true;
            }
        }
    }

    fn clear(&mut self) {
        let world = self.world.clone();
        let mut world = world.borrow_mut();
        if self.passes != world.passes {
            world.visited(self);
        }
        for i in 0..self.pages.len() {
            world.release(self, i);
        }
        drop(world);
        *self = Self::new(self.world.clone());
    }
}

impl StableNodes for SimMemory {
    fn node_of(&self, item: ItemId) -> Option<NodeId> {
        let world = self.0.borrow();
        if let Some(asked) = world.asked.borrow_mut().as_mut() {
            asked.push(item);
        }
        world.items.get(item.get() as u32).map(|item| item.node)
    }

    fn release_item(&mut self, item: ItemId) -> Option<Released> {
        self.sleep().release_item(item)
    }

    fn meta(&self, node: NodeId) -> Option<NodeMeta> {
        self.0.borrow().nodes.get(node.0).map(|node| node.meta)
    }

    fn set_meta(&mut self, node: NodeId, meta: NodeMeta) {
        if let Some(node) = self.0.borrow_mut().nodes.get_mut(node.0) {
            node.meta = meta;
        }
    }

    fn nid(&self, node: NodeId) -> u32 {
        let world = self.0.borrow();
        world.nodes.get(node.0).map_or(0, |node| node.nid)
    }

    fn set_nid(&mut self, node: NodeId, nid: u32) {
        if let Some(node) = self.0.borrow_mut().nodes.get_mut(node.0) {
            node.nid = nid;
        }
    }

    fn mappings(&self, node: NodeId) -> u32 {
        let world = self.0.borrow();
        let node = world.nodes.get(node.0);
        node.map_or(0, |node| node.items.len() as u32)
    }

    fn content_hash(&self, node: NodeId) -> Option<u64> {
        let world = self.0.borrow();
        let frame = world.node_frame(node)?;
        Some(world.hash(world.page(frame).content))
    }

    fn state(&self, node: NodeId) -> NodeState {
        match self.0.borrow().node_frame(node) {
            Some(_) => NodeState::Alive,
            None => NodeState::Stale,
        }
    }

    fn remove(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageId)) -> bool {
        let mut world = self.sleep();
        world.nodes.get(node.0).is_none() || world.remove_node(node, orphan)
    }

    fn forget(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageId)) {
        self.0.borrow_mut().free_node(node, orphan);
    }

    fn next(&self, after: Option<NodeId>) -> Option<NodeId> {
        self.next_in(after, 0..usize::MAX)
    }

    fn next_in(&self, after: Option<NodeId>, frames: Range<usize>) -> Option<NodeId> {
        let world = self.0.borrow();
        let mut nodes = world.nodes.iter();
        nodes
            .find(|(id, node)| after.is_none_or(|a| *id > a.0) && frames.contains(&node.kpfn))
            .map(|(id, _)| NodeId(id))
    }

    fn count(&self) -> usize {
        self.0.borrow().nodes.iter().count()
    }

    fn bytes(&self) -> usize {
        let world = self.0.borrow();
        (world.nodes.iter().count() + world.items.iter().count()) * OBJECT
    }
}

impl Backend for SimMemory {
    type Mm = Mm;
    type Batch = Batch;
    type Merge = Merge;

    const GFP: Flags = GFP_KERNEL;

    fn collect<F: WalkFilter>(
        &self,
        mm: &Mm,
        within: Range<usize>,
        limit: usize,
        _own: &Range<usize>,
        batch: &mut Batch,
        filter: &mut F,
    ) -> Collected {
        let mut world = self.sleep();
        world.walks += 1;
        if world.still_held(mm.key()) {
            return Collected::Busy;
        }
        if mm.exiting() {
            return Collected::Exiting;
        }
        batch.start(mm.key(), world.passes);
        assert!(limit > 0);
        // The engine asks for nodes and items while it looks.
        let mapped = world.mapped(mm.key(), within.start);
        drop(world);
        let full = batch.pages.len() + limit;
        self.0.borrow_mut().steps += 1;
        assert!(filter.step(WalkStep::Vma), "a walk takes no step");
        let mut table = None;
        for (addr, frame) in mapped {
            if batch.pages.len() == full || addr >= within.end {
                return Collected::More(addr);
            }
            if table.replace(addr / TABLE) != Some(addr / TABLE) {
                self.0.borrow_mut().steps += 1;
                if !filter.step(WalkStep::Table(512)) {
                    return Collected::More(addr);
                }
            }
            let Some(frame) = frame else {
                filter.ksm_zero_page();
                continue;
            };
            let accessed =
                self.0.borrow().accessed(mm.key(), addr) || batch.cleared.contains(&addr);
            match filter.filter(addr, self.kind_of(frame), nid(frame), accessed) {
                WalkAction::Collect => self.0.borrow_mut().collect(batch, addr, frame),
                WalkAction::CollectUntouched => {
                    self.0.borrow_mut().collect_untouched(batch, addr, frame)
                }
                WalkAction::Skip => self.0.borrow_mut().skipped(batch, addr),
                WalkAction::SkipClearAccessed => {
                    self.0.borrow_mut().skipped_clear_accessed(batch, addr)
                }
                WalkAction::Stop => return Collected::More(addr),
            }
        }
        Collected::End
    }

    fn flush_tlb(&self, mm: &Mm) {
        self.sleep().flush_tlb(mm.key());
    }

    fn kind(&self, batch: &Batch, i: usize) -> PageKind {
        self.0.borrow_mut().classified(batch, i);
        self.kind_of(batch.frame(i))
    }

    fn reacquire(&self, mm: &Mm, batch: &mut Batch, i: usize) -> bool {
        assert_eq!(mm.key(), batch.key);
        !batch.released_for_split[i] || self.sleep().reacquire(batch, i)
    }

    fn key(&self) -> SimMemory {
        self.clone()
    }

    fn zero_hash(&self) -> u64 {
        self.0.borrow().hash(0)
    }

    fn set_use_zero_pages(&mut self, on: bool) {
        self.0.borrow_mut().use_zero_pages = on;
    }

    fn prepare(
        &mut self,
        page: PageAddr<'_, Mm>,
        batch: &Batch,
        i: usize,
        target: MergeTarget<PageAddr<'_, Mm>>,
        nid: Option<u32>,
    ) -> Result<Merge, Refused> {
        let world = self.sleep_at(&page, batch, i);
        world.assert_asked_for(page.mm.key(), page.addr);
        drop(world);
        let with = match target {
            MergeTarget::ZeroPage => With::Zero,
            MergeTarget::StableNode(node) => {
                let world = self.0.borrow();
                if world.node_frame(node).is_none() {
                    drop(world);
                    return self.count(Err(Refused::Target(Refusal::Stale)));
                }
                With::Node(node, nid)
            }
            MergeTarget::Candidate(other) => With::Page {
                key: other.mm.key(),
                addr: other.addr,
                page: other.page,
                nid,
            },
        };
        Ok(Merge {
            memory: self.clone(),
            key: page.mm.key(),
            addr: page.addr,
            page: page.page,
            frame: batch.pages[i].1,
            with,
            outcome: Err(Refused::Page(Refusal::Gone)),
            undo: None,
        })
    }

    fn finish(&mut self, merge: Merge) -> Result<Merged, Refused> {
        if let Some((item, node)) = merge.undo {
            self.sleep().undo_first(merge.addr, item, node);
        }
        self.count(merge.outcome)
    }

    fn adopt(
        &mut self,
        page: PageAddr<'_, Mm>,
        batch: &Batch,
        i: usize,
        node: NodeId,
    ) -> Result<ItemId, Refusal> {
        let mut world = self.sleep_at(&page, batch, i);
        let result = world.adopt(page.addr, page.page, batch, i, node);
        drop(world);
        let refused = self.count(result.map_err(Refused::Page));
        refused.map_err(Refused::reason)
    }

    fn account_tracked(&mut self, mm: &Mm, delta: isize) {
        let mut world = self.0.borrow_mut();
        let space = world.spaces.get_mut(&mm.key()).unwrap();
        space.tracked += delta;
    }

    fn zero_pages(&self, mm: &Mm) -> isize {
        self.0.borrow().spaces[&mm.key()].zero_pages
    }

    fn correct_zero_pages(&self, mm: &Mm, delta: isize) {
        let mut world = self.0.borrow_mut();
        world.spaces.get_mut(&mm.key()).unwrap().zero_pages += delta;
    }

    fn cond_resched(&self) {
        let mut world = self.sleep();
        world.passes += 1;
        world.count_pause();
    }
}

impl backend::Merge for Merge {
    fn run(&mut self, huge: &mut impl HugeFolioRefs) {
        let memory = self.memory.clone();
        drop(memory.sleep());
        let moves = memory.0.borrow().is_known(self.key, self.addr, self.frame);
        self.outcome = match self.with {
            With::Zero => memory
                .share(self, &Target::Zero, huge)
                .map(|()| Merged::ZeroPage)
                .map_err(Refused::Page),
            With::Node(node, nid) => memory
                .merge_with_node(self, node, nid, huge)
                .map(Merged::Joined)
                .map_err(Refused::Page),
            With::Page { .. } => memory.merge_pair(self, huge),
        };
        let mut world = memory.0.borrow_mut();
        match self.outcome {
            Ok(Merged::ZeroPage) => world.merges.zeroed += 1,
            Ok(Merged::Joined(_)) if moves => return,
            Ok(Merged::Joined(_)) => world.merges.merged += 1,
            Ok(Merged::NewNode { .. }) => world.merges.merged += 2,
            Err(_) => return,
        }
        world.merges.saved += 1;
    }
}

impl SimMemory {
    /// Shares the page of a merge.
    fn share(
        &self,
        merge: &Merge,
        target: &Target,
        huge: &mut impl HugeFolioRefs,
    ) -> Result<(), Refusal> {
        let (key, addr, frame) = (merge.key, merge.addr, merge.frame);
        let refs = self.held(frame, huge);
        let mut world = self.0.borrow_mut();
        let split = world.check_share(key, addr, frame, target, refs)?;
        let id = world.huge(frame);
        drop(world);
        id.into_iter().for_each(|id| huge.release(id));
        self.0.borrow_mut().share(key, addr, frame, target, split)
    }

    fn merge_with_node(
        &self,
        merge: &Merge,
        node: NodeId,
        on: Option<u32>,
        huge: &mut impl HugeFolioRefs,
    ) -> Result<ItemId, Refusal> {
        let mut world = self.0.borrow_mut();
        let kpage = world.node_partner(merge.frame, node, on)?;
        let item = world.new_item(merge.key, merge.addr, merge.page, merge.frame, node)?;
        let far = nid(kpage) != nid(merge.frame);
        drop(world);
        self.share(merge, &Target::Frame(kpage), huge)
            .inspect_err(|_| drop(self.0.borrow_mut().free_item(item)))?;
        let across = self.0.borrow().merge_across_nodes;
        assert!(across || !far, "merged across nodes");
        Ok(item)
    }

    fn merge_pair(
        &self,
        merge: &mut Merge,
        huge: &mut impl HugeFolioRefs,
    ) -> Result<Merged, Refused> {
        let With::Page {
            key,
            addr,
            page,
            nid,
        } = merge.with
        else {
            unreachable!()
        };
        let meta = |node| NodeMeta {
            fingerprint: Fingerprint::NONE,
            next: node,
            prev: node,
            head: false,
            retiring: false,
        };
        let other = self.0.borrow().frame_at(key, addr).unwrap_or(merge.frame);
        let refs = [self.held(merge.frame, huge), self.held(other, huge)];
        let mut world = self.0.borrow_mut();
        let node = world.new_node(merge.frame, key, addr, nid, refs, meta)?;
        let item = world.new_item(merge.key, merge.addr, merge.page, merge.frame, node);
        drop(world);
        let first = item.and_then(|item| {
            self.share(merge, &Target::Itself(node), huge)
                .inspect_err(|_| drop(self.0.borrow_mut().free_item(item)))
                .map(|()| item)
        });
        let first = first
            .inspect_err(|_| self.0.borrow_mut().free_node(node, &mut |_| {}))
            .map_err(Refused::Page)?;
        drop(self.sleep());
        let world = self.0.borrow();
        let other = world.frame_at(key, addr);
        let id = other.ok().and_then(|frame| world.huge(frame));
        drop(world);
        id.into_iter().for_each(|id| huge.release(id));
        let mut world = self.0.borrow_mut();
        let second = world.merge_second(key, addr, page, node, merge.frame, nid);
        match second {
            Ok(second) => Ok(Merged::NewNode {
                node,
                first,
                second,
                hash: world.hash(world.page(merge.frame).content),
            }),
            Err(refusal) => {
                merge.undo = Some((first, node));
                Err(Refused::Target(refusal))
            }
        }
    }
}
