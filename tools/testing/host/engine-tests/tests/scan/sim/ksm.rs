// SPDX-License-Identifier: GPL-2.0-only

//! Merging: stable nodes, rmap items, and the pages that they stand for.

use super::{
    batch::Batch,
    types::{
        nid,
        Content,
        Item,
        Mapping,
        Node,
        Pte,
        Target,
        PAGE, //
    },
    world::World, //
};
use engine_tests::engine::{
    backend::{
        NodeMeta,
        Released, //
    },
    types::{
        ItemId,
        MmPin,
        NodeId,
        PageId,
        Refusal,
        Refused, //
    }, //
};

impl World {
    /// The frame of a node's page, if that is still the node's.
    pub(crate) fn node_frame(&self, node: NodeId) -> Option<usize> {
        let kpfn = self.nodes.get(node.0)?.kpfn;
        let page = self.frames.get(&kpfn)?;
        (page.mapping == Mapping::Ksm(node)).then_some(kpfn)
    }

    /// The node that the item of an address is on.
    pub(crate) fn item_at(&self, key: usize, addr: usize) -> Option<NodeId> {
        let mut items = self.items.iter();
        let found = items.find(|(_, item)| item.mm.key() == key && item.addr == addr);
        found.map(|(_, item)| item.node)
    }

    /// Whether a frame is a merged page, and the mapping of it has its item.
    pub(crate) fn is_known(&self, key: usize, addr: usize, frame: usize) -> bool {
        match self.page(frame).mapping {
            Mapping::Ksm(node) => self.item_at(key, addr) == Some(node),
            Mapping::Anon | Mapping::Orphan => false,
        }
    }

    pub(crate) fn new_item(
        &mut self,
        key: usize,
        addr: usize,
        page: PageId,
        frame: usize,
        node: NodeId,
    ) -> Result<ItemId, Refusal> {
        self.may_refuse(&[Refusal::NoMemory])?;
        let from = self.page(frame).mapping;
        let moves = |old| old != node && from == Mapping::Ksm(old);
        assert!(
            self.item_at(key, addr).is_none_or(moves),
            "a second item for one address"
        );
        let item = Item {
            page,
            mm: self.space(key).mm.clone_pin(),
            addr,
            node,
        };
        let id = ItemId::new(self.items.insert(item).into());
        self.nodes.get_mut(node.0).unwrap().items.push(id);
        Ok(id)
    }

    pub(crate) fn free_item(&mut self, id: ItemId) -> Item {
        let item = self.items.remove(id.get() as u32);
        self.nodes
            .get_mut(item.node.0)
            .unwrap()
            .items
            .retain(|i| *i != id);
        item
    }

    /// Checks whether the page at an address can be shared. Returns whether it is part of a huge
    /// page.
    pub(crate) fn check_share(
        &mut self,
        key: usize,
        addr: usize,
        frame: usize,
        target: &Target,
        refs: usize,
    ) -> Result<bool, Refusal> {
        if !self.space(key).mergeable_at(addr) {
            return Err(Refusal::Gone);
        }
        self.may_refuse(&[
            Refusal::Locked,
            Refusal::Pinned,
            Refusal::Userfault,
            Refusal::Gone,
            Refusal::Differs,
        ])?;
        let content = self.content_of(frame, target);
        let page = self.page(frame);
        if page.mapping != Mapping::Anon && !matches!(target, Target::Frame(_)) {
            return Err(Refusal::Gone);
        }
        self.check_page(frame, refs)?;
        if page.huge.is_some() && page.content != content {
            return Err(Refusal::Differs);
        }
        Ok(page.huge.is_some())
    }

    /// Checks what a look at a page shows, to whose huge page the batches hold `refs` references.
    pub(crate) fn check_page(&self, frame: usize, refs: usize) -> Result<(), Refusal> {
        let page = self.page(frame);
        if page.locked {
            return Err(Refusal::Locked);
        }
        match page.huge {
            Some(_) if self.huge_refs(frame) != refs => Err(Refusal::Unsplit),
            None if page.pinned => Err(Refusal::Pinned),
            _ => Ok(()),
        }
    }

    pub(super) fn content_of(&self, frame: usize, target: &Target) -> Content {
        match target {
            Target::Itself(_) => self.page(frame).content,
            Target::Frame(kpage) => self.page(*kpage).content,
            Target::Zero => 0,
        }
    }

    /// Shares a page that has been checked, and found to be `huge` or not.
    pub(crate) fn share(
        &mut self,
        key: usize,
        addr: usize,
        frame: usize,
        target: &Target,
        huge: bool,
    ) -> Result<(), Refusal> {
        let content = self.content_of(frame, target);
        if huge {
            self.split(frame)?;
        }
        // A split replaces pages of zeroes.
        if self.space(key).ptes.get(&addr) != Some(&Pte::Page(frame)) {
            return Err(Refusal::Gone);
        }
        let page = self.page(frame);
        if page.pinned {
            return Err(Refusal::Pinned);
        }
        if page.content != content {
            return Err(Refusal::Differs);
        }
        self.space_mut(key).tlb.remove(&addr);
        match *target {
            Target::Itself(node) => {
                self.page_mut(frame).mapping = Mapping::Ksm(node);
                self.nodes.get_mut(node.0).unwrap().kpfn = frame;
            }
            Target::Frame(kpage) => self.set_pte(key, addr, Some(Pte::Page(kpage))),
            Target::Zero => self.set_pte(key, addr, Some(Pte::Zero)),
        }
        Ok(())
    }

    /// The page of a node that a page may be merged with.
    pub(crate) fn node_partner(
        &mut self,
        frame: usize,
        node: NodeId,
        on: Option<u32>,
    ) -> Result<usize, Refusal> {
        self.may_refuse(&[Refusal::Busy, Refusal::Locked])?;
        let kpage = self.node_frame(node).ok_or(Refusal::Stale)?;
        if self.page(kpage).locked {
            return Err(Refusal::Busy);
        }
        if kpage == frame {
            return Err(Refusal::Same);
        }
        if on.is_some_and(|on| on != nid(kpage)) {
            return Err(Refusal::FarNode);
        }
        let mappings = self.nodes.get(node.0).unwrap().items.len();
        assert!(
            mappings > 0 && mappings < self.max_page_sharing as usize,
            "a merged page is to be mapped too often"
        );
        Ok(kpage)
    }

    /// Creates a node for two pages, unless they cannot be merged.
    pub(crate) fn new_node(
        &mut self,
        frame: usize,
        other: usize,
        other_addr: usize,
        on: Option<u32>,
        refs: [usize; 2],
        meta: impl Fn(NodeId) -> NodeMeta,
    ) -> Result<NodeId, Refused> {
        self.check_page(frame, refs[0]).map_err(Refused::Page)?;
        let second = self.check_second(frame, other, other_addr, on);
        second
            .and_then(|second| self.check_page(second, refs[1]))
            .map_err(Refused::Target)?;
        self.may_refuse(&[Refusal::NoMemory])
            .map_err(Refused::Page)?;
        let node = Node {
            meta: meta(NodeId(0)),
            kpfn: frame,
            nid: nid(frame),
            items: Vec::new(),
        };
        let node = NodeId(self.nodes.insert(node));
        self.nodes.get_mut(node.0).unwrap().meta = meta(node);
        Ok(node)
    }

    fn check_second(
        &self,
        frame: usize,
        other: usize,
        other_addr: usize,
        on: Option<u32>,
    ) -> Result<usize, Refusal> {
        let second = self.frame_at(other, other_addr)?;
        if second == frame {
            return Err(Refusal::Same);
        }
        if self.page(second).mapping != Mapping::Anon {
            return Err(Refusal::Gone);
        }
        if on.is_some_and(|on| on != nid(second)) {
            return Err(Refusal::FarNode);
        }
        if self.page(second).content != self.page(frame).content {
            return Err(Refusal::Differs);
        }
        Ok(second)
    }

    pub(crate) fn merge_second(
        &mut self,
        key: usize,
        addr: usize,
        page: PageId,
        node: NodeId,
        kpage: usize,
        on: Option<u32>,
    ) -> Result<ItemId, Refusal> {
        let frame = self.frame_at(key, addr)?;
        if on.is_some_and(|on| on != nid(frame)) {
            return Err(Refusal::FarNode);
        }
        if frame == kpage {
            return Err(Refusal::Same);
        }
        if self.page(frame).refs > 0 {
            return Err(Refusal::Pinned);
        }
        let far = nid(kpage) != nid(frame);
        let item = self.new_item(key, addr, page, frame, node)?;
        let target = Target::Frame(kpage);
        let shared = self.check_share(key, addr, frame, &target, 0);
        match shared.and_then(|huge| self.share(key, addr, frame, &target, huge)) {
            Ok(()) => {
                assert!(self.merge_across_nodes || !far, "merged across nodes");
                Ok(item)
            }
            Err(refusal) => {
                self.free_item(item);
                Err(refusal)
            }
        }
    }

    /// Undoes the first half, as far as that is possible.
    pub(crate) fn undo_first(&mut self, addr: usize, item: ItemId, node: NodeId) {
        self.undone += 1;
        let key = self.items.get(item.get() as u32).unwrap().mm.key();
        if self.roll().is_some() {
            self.excused.insert((key, addr));
        } else if self.space(key).live() {
            let _ = self.break_ksm(key, addr..addr + PAGE, &mut None);
        }
        self.release_item(item);
        self.remove_node(node, &mut |_| {});
    }

    pub(crate) fn adopt(
        &mut self,
        addr: usize,
        page: PageId,
        batch: &Batch,
        i: usize,
        node: NodeId,
    ) -> Result<ItemId, Refusal> {
        let (key, frame) = (batch.key, batch.pages[i].1);
        let result = if !self.space(key).mergeable_at(addr) {
            Err(Refusal::Gone)
        } else if self.page(frame).mapping != Mapping::Ksm(node) {
            Err(Refusal::Stale)
        } else {
            self.new_item(key, addr, page, frame, node)
        };
        if result.is_err() {
            self.excused.insert((key, addr));
        }
        result
    }

    /// The page that is mapped at an address of mergeable memory.
    pub(crate) fn frame_at(&self, key: usize, addr: usize) -> Result<usize, Refusal> {
        let space = self.space(key);
        match space.ptes.get(&addr) {
            Some(&Pte::Page(frame)) if space.mergeable_at(addr) => Ok(frame),
            _ => Err(Refusal::Gone),
        }
    }

    pub(crate) fn release_item(&mut self, id: ItemId) -> Option<Released> {
        let node = self.items.get(id.get() as u32)?.node;
        self.free_item(id);
        let remaining = self.nodes.get(node.0).unwrap().items.len() as u32;
        let mapped = self.node_frame(node).map(|frame| self.page(frame).maps > 0);
        Some(Released {
            node,
            remaining,
            due: match mapped {
                None => true,
                Some(mapped) => remaining == 0 && !mapped,
            },
        })
    }

    pub(crate) fn remove_node(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageId)) -> bool {
        if let Some(frame) = self.node_frame(node) {
            let page = self.page_mut(frame);
            if page.maps > 0 {
                return false;
            }
            page.mapping = Mapping::Orphan;
        }
        self.free_node(node, orphan);
        true
    }

    pub(crate) fn free_node(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageId)) {
        let named = self
            .frames
            .values()
            .any(|page| page.mapping == Mapping::Ksm(node));
        assert!(!named, "a node is freed that its page names");
        while let Some(&item) = self.nodes.get(node.0).unwrap().items.last() {
            let item = self.free_item(item);
            orphan(item.page);
        }
        self.nodes.remove(node.0);
    }
}
