// SPDX-License-Identifier: GPL-2.0

//! The simulated mm as the engine sees it. At each call that may sleep, something may happen beside it.

use crate::world::{
    nid,
    Batch,
    Mapping,
    Mm,
    World, //
};

use engine_tests::engine::{
    ids::{
        Fingerprint,
        ItemId,
        NodeId,
        PageRef, //
    },
    memory::{
        Collected,
        Interest,
        Look,
        Memory,
        NodeMeta,
        NodeState,
        PageKind,
        Pair,
        Place,
        Refusal,
        Released, //
    },
    registry::PinnedMm, //
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

impl SimMemory {
    /// The world, after something may have happened in it.
    fn sleep(&self) -> RefMut<'_, World> {
        let mut world = self.0.borrow_mut();
        world.step();
        world
    }

    /// The world, for a page of a batch that has to be one.
    fn sleep_at(&self, at: &Place<'_, Mm>, batch: &Batch, i: usize) -> RefMut<'_, World> {
        assert!(i >= batch.released, "a released page is used");
        assert_eq!((at.mm.key(), at.addr), (batch.key, batch.pages[i].0));
        self.sleep()
    }

    fn frame(&self, batch: &Batch, i: usize) -> usize {
        assert!(i >= batch.released, "a released page is looked at");
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
            self.0.borrow_mut().refusals[*refusal as usize] += 1;
        }
        result
    }
}

impl Memory for SimMemory {
    type Mm = Mm;
    type Batch = Batch;

    fn collect<L: Look>(
        &self,
        mm: &Mm,
        start: usize,
        limit: usize,
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
        let (mapped, end) = world.mapped(mm.key(), start);
        drop(world);
        for (addr, frame) in mapped {
            if batch.pages.len() == limit {
                return Collected::More(addr);
            }
            let touched = self.0.borrow().touched(mm.key(), addr);
            match look.look(addr, self.kind_of(frame), nid(frame), touched) {
                Interest::Take => self.0.borrow_mut().take(batch, addr, frame),
                Interest::Pass => self.0.borrow_mut().passed(batch, addr),
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
        assert!(i >= batch.released, "a released page is looked at");
        batch.touched[i]
    }

    fn hash(&self, batch: &Batch, i: usize) -> u64 {
        let world = self.0.borrow();
        world.hash(world.page(self.frame(batch, i)).content)
    }

    fn nid(&self, batch: &Batch, i: usize) -> u32 {
        nid(self.frame(batch, i))
    }

    fn release(&mut self, batch: &mut Batch, i: usize) {
        let mut world = self.0.borrow_mut();
        world.visited(batch, i);
        world.release(batch, i);
    }

    fn clear(&mut self, batch: &mut Batch) {
        if let Some(last) = batch.pages.len().checked_sub(1) {
            self.0.borrow_mut().release(batch, last);
        }
        batch.pages.clear();
        batch.touched.clear();
        batch.released = 0;
    }

    fn zero_hash(&self) -> u64 {
        self.0.borrow().hash(0)
    }

    fn merge_with_node(
        &mut self,
        at: Place<'_, Mm>,
        batch: &mut Batch,
        i: usize,
        node: NodeId,
        nid: Option<u32>,
    ) -> Result<ItemId, Refusal> {
        let mut world = self.sleep_at(&at, batch, i);
        let result = world.merge_with_node((at.addr, at.owner), batch, i, node, nid);
        drop(world);
        self.count(result)
    }

    fn merge_pair(
        &mut self,
        at: Place<'_, Mm>,
        batch: &mut Batch,
        i: usize,
        other: Place<'_, Mm>,
        nid: Option<u32>,
        fingerprint: Fingerprint,
    ) -> Result<Pair, Refusal> {
        let mut world = self.sleep_at(&at, batch, i);
        let kpage = batch.pages[i].1;
        let meta = |node| NodeMeta {
            fingerprint,
            next: node,
            prev: node,
            head: false,
        };
        let (key, addr) = (other.mm.key(), other.addr);
        let first = world.merge_first((at.addr, at.owner), batch, i, (key, addr), nid, meta);
        drop(world);
        let (node, first) = self.count(first)?;
        let touched = self.0.borrow().touched(at.mm.key(), at.addr);

        let second = self
            .sleep()
            .merge_second((key, addr, other.owner), node, kpage);
        match self.count(second) {
            Ok(second) => Ok(Pair {
                node,
                first,
                second,
                touched,
            }),
            Err(refusal) => {
                self.sleep().undo_first(at.addr, first, node);
                Err(refusal)
            }
        }
    }

    fn merge_with_zero(
        &mut self,
        at: Place<'_, Mm>,
        batch: &mut Batch,
        i: usize,
    ) -> Result<(), Refusal> {
        let mut world = self.sleep_at(&at, batch, i);
        let result = world.merge_with_zero(at.addr, batch, i);
        drop(world);
        self.count(result)
    }

    fn adopt(
        &mut self,
        at: Place<'_, Mm>,
        batch: &mut Batch,
        i: usize,
        node: NodeId,
    ) -> Result<ItemId, Refusal> {
        let mut world = self.sleep_at(&at, batch, i);
        let result = world.adopt((at.addr, at.owner), batch, i, node);
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

    fn remove_node(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageRef)) -> bool {
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

    fn forget_node(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageRef)) {
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
