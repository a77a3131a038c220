// SPDX-License-Identifier: GPL-2.0-only

//! Processes: what they do with their memory, and how they begin and end.

use super::{
    types::{
        Content,
        Mapping,
        Pte,
        Purpose,
        Space,
        AREAS,
        HUGE,
        PAGE, //
    },
    world::World, //
};
use engine_tests::engine::{
    mm_list::MmList,
    types::MmPin, //
};
use std::ops::Range;

impl World {
    pub(super) fn space(&self, key: usize) -> &Space {
        &self.spaces[&key]
    }

    pub(crate) fn space_mut(&mut self, key: usize) -> &mut Space {
        self.spaces.get_mut(&key).unwrap()
    }

    /// Changes an entry, and counts mappings.
    pub(super) fn set_pte(&mut self, key: usize, addr: usize, new: Option<Pte>) {
        if let Some(Pte::Page(frame)) = new {
            self.page_mut(frame).maps += 1;
        }
        if new == Some(Pte::Zero) {
            self.zero_pages += 1;
            self.space_mut(key).zero_pages += 1;
        }
        let ptes = &mut self.space_mut(key).ptes;
        let old = match new {
            Some(pte) => ptes.insert(addr, pte),
            None => ptes.remove(&addr),
        };
        self.space_mut(key).tlb.remove(&addr);
        if new.is_none() {
            self.space_mut(key).accessed.remove(&addr);
        }
        match old {
            Some(Pte::Page(frame)) => {
                self.page_mut(frame).maps -= 1;
                self.put(frame);
            }
            Some(Pte::Zero) => {
                self.zero_pages -= 1;
                self.space_mut(key).zero_pages -= 1;
            }
            _ => {}
        }
    }

    pub(super) fn read(&self, key: usize, addr: usize) -> Option<Content> {
        Some(match *self.space(key).ptes.get(&addr)? {
            Pte::Page(frame) => self.page(frame).content,
            Pte::Zero => 0,
            Pte::Swap(content) => content,
        })
    }

    /// Gives an address a private page with its present content.
    pub(super) fn unshare(&mut self, key: usize, addr: usize) {
        if let Some(content) = self.read(key, addr) {
            let on = (addr / PAGE % 2) as u32;
            let frame = self.alloc(content, on);
            self.set_pte(key, addr, Some(Pte::Page(frame)));
            self.mark_accessed(key, addr);
        }
    }

    pub(super) fn write(&mut self, key: usize, addr: usize, content: Content) {
        let own = match self.space(key).ptes.get(&addr) {
            Some(&Pte::Page(frame)) => {
                let page = self.page(frame);
                (page.maps == 1 && page.mapping == Mapping::Anon).then_some(frame)
            }
            _ => None,
        };
        match own {
            Some(frame) => self.page_mut(frame).content = content,
            None => {
                let frame = self.alloc(content, (key / PAGE + addr / PAGE) as u32 % 2);
                self.set_pte(key, addr, Some(Pte::Page(frame)));
            }
        }
        self.space_mut(key).shadow.insert(addr, content);
        self.mark_accessed(key, addr);
    }

    pub(super) fn mark_accessed(&mut self, key: usize, addr: usize) {
        let space = self.space_mut(key);
        if space.ptes.contains_key(&addr) && space.tlb.insert(addr) {
            space.accessed.insert(addr);
        }
    }

    /// Drops what the TLBs have of an mm.
    pub(crate) fn flush_tlb(&mut self, key: usize) {
        assert_eq!(self.purpose, Purpose::Scan, "a TLB is flushed for nothing");
        self.flushes += 1;
        self.space_mut(key).tlb.clear();
    }

    /// The addresses that one entry maps: all of a huge page, where it is mapped in one piece.
    pub(super) fn mapping_at(&self, key: usize, addr: usize) -> Range<usize> {
        let huge = |addr: usize| match self.space(key).ptes.get(&addr) {
            Some(&Pte::Page(frame)) => self.huge(frame),
            _ => None,
        };
        let start = addr / (HUGE * PAGE) * (HUGE * PAGE);
        let all = start..start + HUGE * PAGE;
        match huge(addr) {
            Some(id) if all.clone().step_by(PAGE).all(|addr| huge(addr) == Some(id)) => all,
            _ => addr..addr + PAGE,
        }
    }

    /// Whether the accessed bit of an entry is set.
    pub(crate) fn accessed(&self, key: usize, addr: usize) -> bool {
        let mut all = self.mapping_at(key, addr).step_by(PAGE);
        all.any(|addr| self.space(key).accessed.contains(&addr))
    }

    /// The `n`th mm with users.
    pub(crate) fn nth(&self, n: usize) -> Option<usize> {
        let live: Vec<usize> = self.live().collect();
        live.get(n.checked_rem(live.len())?).copied()
    }

    pub(crate) fn live(&self) -> impl Iterator<Item = usize> + '_ {
        let live = self.spaces.iter().filter(|(_, space)| space.live());
        live.map(|(key, _)| *key)
    }

    pub(super) fn new_space(&mut self, mergeable: [bool; AREAS.len()]) -> usize {
        self.next_key += PAGE;
        let key = self.next_key;
        self.spaces.insert(key, Space::new(key, mergeable));
        key
    }

    /// Registers an mm that has mergeable memory; the registry may know it already.
    pub(crate) fn enter(&self, key: usize) {
        let space = self.space(key);
        if space.mergeable.contains(&true) {
            let _ = self.list.enter(space.mm.clone_pin());
        }
    }

    /// One of the three steps of an exit: no user is left, the exit is reported, the memory is
    /// freed.
    pub(crate) fn exit_step(&mut self, key: usize) {
        let space = self.space_mut(key);
        if space.live() {
            space.mm.drop_users();
        } else if !space.exited {
            space.exited = true;
            self.list.exit(key);
        } else {
            let addrs: Vec<usize> = space.ptes.keys().copied().collect();
            space.shadow.clear();
            for addr in addrs {
                self.set_pte(key, addr, None);
            }
        }
    }

    /// Gives every mapping of a KSM page a private page; fails after `left` of them.
    pub(crate) fn break_ksm(
        &mut self,
        key: usize,
        within: Range<usize>,
        left: &mut Option<u32>,
    ) -> Result<(), ()> {
        let space = self.space(key);
        let merged: Vec<usize> = space
            .ptes
            .range(within)
            .filter(|(addr, pte)| {
                space.mergeable_at(**addr)
                    && match **pte {
                        Pte::Page(frame) => self.page(frame).mapping != Mapping::Anon,
                        Pte::Zero => true,
                        Pte::Swap(_) => false,
                    }
            })
            .map(|(addr, _)| *addr)
            .collect();
        for addr in merged {
            match left {
                Some(0) => return Err(()),
                Some(left) => *left -= 1,
                None => {}
            }
            self.unshare(key, addr);
        }
        Ok(())
    }
}
