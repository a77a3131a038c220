// SPDX-License-Identifier: GPL-2.0-only

//! Page frames: allocated, freed, migrated, split, taken offline.

use super::{
    types::{
        nid,
        Content,
        Mapping,
        Page,
        Pte,
        NODE_FRAMES, //
    },
    world::World, //
};
use engine_tests::engine::{
    backend::HugeId,
    types::Refusal, //
};
use std::ops::Range;

impl World {
    pub(super) fn alloc(&mut self, content: Content, on: u32) -> usize {
        let first = on as usize * NODE_FRAMES + 1;
        let frame = (first..)
            .find(|f| !self.frames.contains_key(f) && !self.offline.contains(f))
            .unwrap();
        self.frames.insert(
            frame,
            Page {
                content,
                mapping: Mapping::Anon,
                maps: 0,
                refs: 0,
                huge: None,
                locked: false,
                pinned: false,
            },
        );
        frame
    }

    pub(crate) fn page(&self, frame: usize) -> &Page {
        &self.frames[&frame]
    }

    pub(super) fn page_mut(&mut self, frame: usize) -> &mut Page {
        self.frames.get_mut(&frame).unwrap()
    }

    pub(super) fn put(&mut self, frame: usize) {
        let page = self.page(frame);
        if page.maps == 0 && page.refs == 0 {
            self.frames.remove(&frame);
        }
    }

    /// The page at an address, if only page tables refer to it.
    pub(super) fn free_to_change(&self, key: usize, addr: usize) -> Option<usize> {
        match self.space(key).ptes.get(&addr) {
            Some(&Pte::Page(frame)) => {
                let page = self.page(frame);
                (page.refs == 0 && !page.locked && !page.pinned && page.huge.is_none())
                    .then_some(frame)
            }
            _ => None,
        }
    }

    pub(super) fn migrate(&mut self, frame: usize, on: u32) {
        let moved = self.page(frame).clone();
        let new = self.alloc(moved.content, on);
        if let Mapping::Ksm(node) = moved.mapping {
            self.nodes.get_mut(node.0).unwrap().kpfn = new;
        }
        *self.page_mut(new) = moved;
        self.frames.remove(&frame);
        for space in self.spaces.values_mut() {
            for pte in space.ptes.values_mut() {
                if *pte == Pte::Page(frame) {
                    *pte = Pte::Page(new);
                }
            }
        }
    }

    /// Takes a block of memory offline, and migrates its pages. False if one of them cannot be.
    pub(crate) fn take_offline(&mut self, block: Range<usize>) -> bool {
        let frames: Vec<usize> = self.frames.range(block.clone()).map(|(f, _)| *f).collect();
        let stuck =
            |page: &Page| page.refs > 0 || page.locked || page.pinned || page.huge.is_some();
        if frames.iter().any(|frame| stuck(self.page(*frame))) {
            return false;
        }
        self.offline.extend(block);
        for frame in frames {
            self.migrate(frame, nid(frame));
        }
        true
    }

    pub(crate) fn huge(&self, frame: usize) -> Option<HugeId> {
        self.page(frame).huge.map(|huge| HugeId(huge as usize))
    }

    /// References to the huge page that `frame` is part of, other than of page tables.
    pub(crate) fn huge_refs(&self, frame: usize) -> usize {
        let huge = self.page(frame).huge;
        let pages = self.frames.values().filter(|page| page.huge == huge);
        pages
            .map(|page| page.refs as usize + usize::from(page.pinned))
            .sum()
    }

    /// Splits the huge page that `frame` is part of. The only reference may be one to `frame`.
    pub(super) fn split(&mut self, frame: usize) -> Result<(), Refusal> {
        self.may_refuse(&[Refusal::Unsplit])?;
        let huge = self.page(frame).huge;
        let stuck = |(f, page): (&usize, &Page)| {
            page.huge == huge && (page.pinned || page.refs > u32::from(*f == frame))
        };
        if self.frames.iter().any(stuck) {
            return Err(Refusal::Unsplit);
        }
        let zeroes: Vec<usize> = self
            .frames
            .iter()
            .filter(|(_, page)| page.huge == huge && page.content == 0 && page.maps > 0)
            .map(|(frame, _)| *frame)
            .collect();
        self.splits += 1;
        for page in self.frames.values_mut().filter(|page| page.huge == huge) {
            page.huge = None;
        }
        // The core of mm gives pages of zeroes away, which are then counted or taken back.
        let mapped = self.spaces.iter().flat_map(|(key, space)| {
            let zeroes = &zeroes;
            let ptes = space
                .ptes
                .iter()
                .filter(move |(_, pte)| matches!(pte, Pte::Page(frame) if zeroes.contains(frame)));
            ptes.map(|(addr, _)| (*key, *addr))
        });
        let mapped: Vec<(usize, usize)> = mapped.collect();
        for (key, addr) in mapped {
            if self.use_zero_pages && self.space(key).mergeable_at(addr) {
                self.set_pte(key, addr, Some(Pte::Zero));
            } else {
                self.unshare(key, addr);
            }
        }
        Ok(())
    }
}
