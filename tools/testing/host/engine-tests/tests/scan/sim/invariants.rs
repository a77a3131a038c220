// SPDX-License-Identifier: GPL-2.0-only

//! What has to hold, whatever the engine knows.

use super::{
    types::{
        Mapping,
        Pte, //
    },
    world::World, //
};
use std::collections::BTreeMap;

impl World {
    /// If the page that an address maps is merged, the mapping has its item.
    pub(super) fn assert_known(&self, key: usize, addr: usize) {
        let Some(&Pte::Page(frame)) = self.space(key).ptes.get(&addr) else {
            return;
        };
        let Mapping::Ksm(node) = self.page(frame).mapping else {
            return;
        };
        if self.space(key).mergeable_at(addr) && !self.excused.contains(&(key, addr)) {
            assert!(
                self.item_at(key, addr) == Some(node),
                "a merged page was visited, and its mapping has no item"
            );
        }
    }

    /// Checks what does not depend on what the engine knows. No engine method is running.
    pub(crate) fn check(&self) {
        let mut maps: BTreeMap<usize, u32> = BTreeMap::new();
        let mut zeroes = 0;
        for (key, space) in &self.spaces {
            assert!(space.tracked >= 0, "an mm has less than no tracked pages");
            assert_eq!(space.ptes.len(), space.shadow.len());
            for (addr, content) in &space.shadow {
                assert_eq!(
                    self.read(*key, *addr),
                    Some(*content),
                    "contents have changed"
                );
            }
            for pte in space.ptes.values() {
                match pte {
                    Pte::Page(frame) => *maps.entry(*frame).or_default() += 1,
                    Pte::Zero => zeroes += 1,
                    Pte::Swap(_) => {}
                }
            }
        }
        assert_eq!(self.zero_pages, zeroes);
        assert_eq!(
            maps.len(),
            self.frames.len(),
            "a page is left that no process maps"
        );
        for (frame, page) in &self.frames {
            assert_eq!(page.maps, maps[frame]);
            assert_eq!(page.refs, 0, "a reference is lost");
            if let Mapping::Ksm(node) = page.mapping {
                let node = self.nodes.get(node.0);
                assert_eq!(node.expect("a page without its node").kpfn, *frame);
            }
            assert_ne!(
                page.mapping,
                Mapping::Orphan,
                "a mapped page has lost its node"
            );
        }
    }
}
