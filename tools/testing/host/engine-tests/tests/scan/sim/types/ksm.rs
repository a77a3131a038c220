// SPDX-License-Identifier: GPL-2.0-only

//! Stable nodes and rmap items, and what a merge puts in the place of a page.

use super::process::Mm;
use engine_tests::engine::{
    backend::NodeMeta,
    types::{
        ItemId,
        NodeId,
        PageId, //
    }, //
};

pub(crate) struct Node {
    pub(crate) meta: NodeMeta,
    pub(crate) kpfn: usize,
    pub(crate) nid: u32,
    pub(crate) items: Vec<ItemId>,
}

pub(crate) struct Item {
    pub(in super::super) page: PageId,
    pub(crate) mm: Mm,
    pub(crate) addr: usize,
    pub(crate) node: NodeId,
}

/// Objects by number. A freed number is the first to be used again, as memory is.
pub(crate) struct Slab<T>(Vec<Option<T>>);

impl<T> Slab<T> {
    pub(in super::super) fn new() -> Self {
        Self(Vec::new())
    }

    pub(in super::super) fn insert(&mut self, value: T) -> u32 {
        match self.0.iter().position(Option::is_none) {
            Some(free) => {
                self.0[free] = Some(value);
                free as u32
            }
            None => {
                self.0.push(Some(value));
                self.0.len() as u32 - 1
            }
        }
    }

    pub(in super::super) fn remove(&mut self, id: u32) -> T {
        self.0[id as usize]
            .take()
            .expect("an object is freed twice")
    }

    pub(crate) fn get(&self, id: u32) -> Option<&T> {
        self.0.get(id as usize)?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, id: u32) -> Option<&mut T> {
        self.0.get_mut(id as usize)?.as_mut()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        let numbered = self.0.iter().enumerate();
        numbered.filter_map(|(id, value)| Some((id as u32, value.as_ref()?)))
    }
}

/// What a page is to be replaced by.
pub(crate) enum Target {
    Itself(NodeId),
    Frame(usize),
    Zero,
}
