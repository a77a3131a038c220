// SPDX-License-Identifier: GPL-2.0-only

//! The simulated mm as the engine sees it. At each call that may sleep, something may happen beside it.

use crate::world::{
    nid,
    Batch,
    Mapping,
    Mm,
    Target,
    World, //
};

use engine_tests::engine::{
    memory::{
        self,
        Collected,
        HugeId,
        Interest,
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
        MmPin,
        NodeId,
        PageId,
        Refusal, //
    },
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

// SAFETY: The crew of these tests is one thread.
unsafe impl Sync for SimMemory {}
// SAFETY: As above.
unsafe impl Send for SimMemory {}

/// A merge: of the page at an address of an mm, and what came of it.
pub(crate) struct Merge {
    memory: SimMemory,
    key: usize,
    addr: usize,
    page: PageId,
    frame: usize,
    with: With,
    outcome: Result<Merged, Refusal>,
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
    fn sleep_at(&self, at: &Place<'_, Mm>, batch: &Batch, i: usize) -> RefMut<'_, World> {
        assert!(!batch.released[i], "a released page is used");
        assert_eq!((at.mm.key(), at.addr), (batch.key, batch.pages[i].0));
        self.sleep()
    }

    fn frame(&self, batch: &Batch, i: usize) -> usize {
        assert!(!batch.released[i], "a released page is looked at");
        batch.pages[i].1
    }

    fn kind_of(&self, frame: usize) -> PageKind {
        match self.0.borrow().page(frame).mapping {
            Mapping::Anon => PageKind::Plain,
            Mapping::Ksm(node) => PageKind::Ksm(node),
            Mapping::Orphan => PageKind::Orphan,
        }
    }

    fn count<T>(&self, result: Result<T, Refusal>) -> Result<T, Refusal> {
        if let Err(refusal) = &result {
            self.0.borrow_mut().refusals.count(*refusal);
        }
        result
    }
}

impl Memory for SimMemory {
    type Mm = Mm;
    type Batch = Batch;
    type Key = SimMemory;
    type Merge = Merge;

    fn collect<L: Look>(
        &self,
        mm: &Mm,
        within: Range<usize>,
        limit: usize,
        _own: &Range<usize>,
        batch: &mut Batch,
        look: &mut L,
    ) -> Collected {
        let world = self.sleep();
        if mm.exiting() {
            return Collected::Exiting;
        }
        batch.start(mm.key());
        assert!(limit > 0);
        // The engine asks for nodes and items while it looks.
        let (mapped, end) = world.mapped(mm.key(), within.start);
        drop(world);
        let full = batch.pages.len() + limit;
        for (addr, frame) in mapped {
            if batch.pages.len() == full || addr >= within.end {
                return Collected::More(addr);
            }
            let touched = self.0.borrow().touched(mm.key(), addr);
            match look.look(addr, self.kind_of(frame), nid(frame), touched) {
                Interest::Take => self.0.borrow_mut().take(batch, addr, frame),
                Interest::Pass => self.0.borrow_mut().passed(batch, addr),
                Interest::Note => self.0.borrow_mut().noted(batch, addr),
                Interest::Stop => return Collected::More(addr),
            }
        }
        end.map_or(Collected::End, Collected::More)
    }

    fn len(&self, batch: &Batch) -> usize {
        batch.pages.len()
    }

    fn addr(&self, batch: &Batch, i: usize) -> usize {
        batch.pages[i].0
    }

    fn kind(&self, batch: &Batch, i: usize) -> PageKind {
        self.kind_of(self.frame(batch, i))
    }

    fn touched(&self, batch: &Batch, i: usize) -> bool {
        assert!(!batch.released[i], "a released page is looked at");
        batch.touched[i]
    }

    fn key(&self) -> SimMemory {
        self.clone()
    }

    fn hash_by(key: &SimMemory, batch: &Batch, i: usize) -> u64 {
        let world = key.0.borrow();
        world.hash(world.page(key.frame(batch, i)).content)
    }

    fn nid(&self, batch: &Batch, i: usize) -> u32 {
        nid(self.frame(batch, i))
    }

    fn huge(&self, batch: &Batch, i: usize) -> Option<HugeId> {
        let frame = self.frame(batch, i);
        self.0.borrow().huge(frame)
    }

    fn done(&self, batch: &Batch, i: usize) {
        self.0.borrow_mut().visited(batch, i);
    }

    fn release(&self, batch: &mut Batch, i: usize) {
        self.0.borrow_mut().release(batch, i);
    }

    fn make_way(&self, batch: &mut Batch, huge: HugeId, keep: Option<usize>) {
        let mut world = self.0.borrow_mut();
        for i in 0..batch.pages.len() {
            let frame = batch.pages[i].1;
            if Some(i) != keep && !batch.released[i] && world.huge(frame) == Some(huge) {
                world.release(batch, i);
                batch.lost[i] = true;
            }
        }
    }

    fn regain(&self, mm: &Mm, batch: &mut Batch, i: usize) -> bool {
        assert_eq!(mm.key(), batch.key);
        !batch.lost[i] || self.sleep().regain(batch, i)
    }

    fn clear(&self, batch: &mut Batch) {
        let visits = batch.passed.iter().map(|addr| (batch.key, *addr));
        self.0.borrow_mut().visits.extend(visits);
        self.discard(batch);
    }

    fn discard(&self, batch: &mut Batch) {
        for i in 0..batch.pages.len() {
            self.release(batch, i);
        }
        *batch = Batch::default();
    }

    fn zero_hash(&self) -> u64 {
        self.0.borrow().hash(0)
    }

    fn prepare(
        &mut self,
        at: Place<'_, Mm>,
        batch: &Batch,
        i: usize,
        partner: Partner<'_, Mm>,
    ) -> Result<Merge, Refusal> {
        drop(self.sleep_at(&at, batch, i));
        let with = match partner {
            Partner::Zero => With::Zero,
            Partner::Node { node, nid } => {
                let world = self.0.borrow();
                if world.node_frame(node).is_none() {
                    drop(world);
                    return self.count(Err(Refusal::Stale));
                }
                With::Node(node, nid)
            }
            Partner::Page { other, nid } => With::Page {
                key: other.mm.key(),
                addr: other.addr,
                page: other.page,
                nid,
            },
        };
        Ok(Merge {
            memory: self.clone(),
            key: at.mm.key(),
            addr: at.addr,
            page: at.page,
            frame: batch.pages[i].1,
            with,
            outcome: Err(Refusal::Gone),
            undo: None,
        })
    }

    fn finish(&mut self, merge: &mut Merge) -> Result<Merged, Refusal> {
        if let Some((item, node)) = merge.undo {
            self.sleep().undo_first(merge.addr, item, node);
        }
        self.count(merge.outcome)
    }

    fn adopt(
        &mut self,
        at: Place<'_, Mm>,
        batch: &Batch,
        i: usize,
        node: NodeId,
    ) -> Result<ItemId, Refusal> {
        let mut world = self.sleep_at(&at, batch, i);
        let result = world.adopt((at.addr, at.page), batch, i, node);
        drop(world);
        self.count(result)
    }

    fn node_of(&self, item: ItemId) -> Option<NodeId> {
        let world = self.0.borrow();
        if let Some(asked) = world.asked.borrow_mut().as_mut() {
            asked.push(item);
        }
        world.items.get(item.0).map(|item| item.node)
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

    fn node_nid(&self, node: NodeId) -> u32 {
        let world = self.0.borrow();
        world.nodes.get(node.0).map_or(0, |node| node.nid)
    }

    fn set_node_nid(&mut self, node: NodeId, nid: u32) {
        if let Some(node) = self.0.borrow_mut().nodes.get_mut(node.0) {
            node.nid = nid;
        }
    }

    fn mappings(&self, node: NodeId) -> u32 {
        let world = self.0.borrow();
        let node = world.nodes.get(node.0);
        node.map_or(0, |node| node.items.len() as u32)
    }

    fn state(&self, node: NodeId) -> NodeState {
        match self.0.borrow().node_frame(node) {
            Some(_) => NodeState::Alive,
            None => NodeState::Stale,
        }
    }

    fn remove_node(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageId)) -> bool {
        let mut world = self.sleep();
        world.nodes.get(node.0).is_none() || world.remove_node(node, orphan)
    }

    fn next_node_in(&self, after: Option<NodeId>, frames: Range<usize>) -> Option<NodeId> {
        let world = self.0.borrow();
        let mut nodes = world.nodes.iter();
        nodes
            .find(|(id, node)| after.is_none_or(|a| *id > a.0) && frames.contains(&node.kpfn))
            .map(|(id, _)| NodeId(id))
    }

    fn forget_node(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageId)) {
        self.0.borrow_mut().free_node(node, orphan);
    }

    fn next_node(&self, after: Option<NodeId>) -> Option<NodeId> {
        self.next_node_in(after, 0..usize::MAX)
    }

    fn nodes(&self) -> usize {
        self.0.borrow().nodes.iter().count()
    }

    fn account_tracked(&mut self, mm: &Mm, delta: isize) {
        let mut world = self.0.borrow_mut();
        let space = world.spaces.get_mut(&mm.key()).unwrap();
        space.tracked += delta;
    }

    fn bytes(&self) -> usize {
        let world = self.0.borrow();
        (world.nodes.iter().count() + world.items.iter().count()) * OBJECT
    }

    fn breathe(&mut self) -> bool {
        let mut world = self.sleep();
        if let Some(left) = world.pause_after.as_mut() {
            *left = left.saturating_sub(1);
            world.paused |= *left == 0;
        }
        world.paused
    }
}

impl memory::Merge for Merge {
    fn run(&mut self, before_split: impl FnOnce()) {
        let memory = self.memory.clone();
        drop(memory.sleep());
        self.outcome = match self.with {
            With::Zero => memory
                .share(self, &Target::Zero, before_split)
                .map(|()| Merged::Zero),
            With::Node(node, nid) => memory
                .merge_with_node(self, node, nid, before_split)
                .map(Merged::Node),
            With::Page { .. } => memory.merge_pair(self, before_split).map(Merged::Pair),
        };
    }
}

impl SimMemory {
    /// Shares the page of a merge.
    fn share(
        &self,
        merge: &Merge,
        target: &Target,
        before_split: impl FnOnce(),
    ) -> Result<(), Refusal> {
        let (key, addr, frame) = (merge.key, merge.addr, merge.frame);
        let huge = self.0.borrow_mut().check_share(key, addr, frame, target)?;
        if huge {
            before_split();
        }
        self.0.borrow_mut().share(key, addr, frame, target, huge)
    }

    fn merge_with_node(
        &self,
        merge: &Merge,
        node: NodeId,
        on: Option<u32>,
        before_split: impl FnOnce(),
    ) -> Result<ItemId, Refusal> {
        let mut world = self.0.borrow_mut();
        let kpage = world.node_partner(merge.frame, node, on)?;
        let item = world.new_item(merge.key, merge.addr, merge.page, node)?;
        let far = nid(kpage) != nid(merge.frame);
        drop(world);
        self.share(merge, &Target::Frame(kpage), before_split)
            .inspect_err(|_| drop(self.0.borrow_mut().free_item(item)))?;
        let across = self.0.borrow().merge_across_nodes;
        assert!(across || !far, "merged across nodes");
        Ok(item)
    }

    fn merge_pair(&self, merge: &mut Merge, before_split: impl FnOnce()) -> Result<Pair, Refusal> {
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
        };
        let mut world = self.0.borrow_mut();
        let node = world.new_node(merge.frame, (key, addr), nid, meta)?;
        let item = world.new_item(merge.key, merge.addr, merge.page, node);
        drop(world);
        let first = item.and_then(|item| {
            self.share(merge, &Target::Itself(node), before_split)
                .inspect_err(|_| drop(self.0.borrow_mut().free_item(item)))
                .map(|()| item)
        });
        let first = first.inspect_err(|_| self.0.borrow_mut().free_node(node, &mut |_| {}))?;
        let touched = self.0.borrow().touched(merge.key, merge.addr);
        let second = self
            .sleep()
            .merge_second((key, addr, page), node, merge.frame, nid);
        match second {
            Ok(second) => Ok(Pair {
                node,
                first,
                second,
                touched,
            }),
            Err(refusal) => {
                merge.undo = Some((first, node));
                Err(refusal)
            }
        }
    }
}
