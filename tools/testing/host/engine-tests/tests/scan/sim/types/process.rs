// SPDX-License-Identifier: GPL-2.0-only

//! Processes: their mm, page table, and what they have written.
//!
//! What a process has written is kept beside its page table, in [`Space::shadow`]: whatever happens
//! to the pages, that is what it has to read.

use super::frame::Content;
use engine_tests::engine::{
    mm_list::MmList,
    registry::Registry,
    scan::Pins,
    types::{
        MmPin,
        SlotId, //
    }, //
};
use std::{
    cell::RefCell,
    collections::{
        BTreeMap,
        BTreeSet, //
    },
    sync::{
        atomic::{
            AtomicBool,
            Ordering::Relaxed, //
        },
        Arc, //
    },
};

pub(crate) const PAGE: usize = 4096;

/// What a page table of the lowest level maps.
pub(crate) const TABLE: usize = 512 * PAGE;

/// Where mms can have memory: first address and number of pages. The second crosses a border of
/// the page state's ranges, the third is far away and larger than a batch.
pub(crate) const AREAS: [(usize, usize); 3] = [
    (0x10_0000, 24),
    (3 * 512 * PAGE - 8 * PAGE, 20),
    (1 << 40, 84),
];

/// Pages that an mm can have.
pub(crate) const PAGES: usize = AREAS[0].1 + AREAS[1].1 + AREAS[2].1;

/// The address of the `n`th page that an mm can have.
pub(crate) fn addr(n: usize) -> usize {
    let mut n = n % PAGES;
    for (start, pages) in AREAS {
        if n < pages {
            return start + n * PAGE;
        }
        n -= pages;
    }
    unreachable!()
}

/// The area that an address is in.
pub(in super::super) fn area(addr: usize) -> usize {
    AREAS
        .iter()
        .position(|&(start, pages)| (start..start + pages * PAGE).contains(&addr))
        .unwrap()
}

/// A pinned mm.
#[derive(Debug)]
pub(crate) struct Mm(Arc<MmStruct>);

#[derive(Debug)]
struct MmStruct {
    key: usize,
    users: AtomicBool,
}

impl Mm {
    /// The last user goes: the mm is exiting.
    pub(in super::super) fn drop_users(&self) {
        self.0.users.store(false, Relaxed);
    }
}

impl MmPin for Mm {
    fn key(&self) -> usize {
        self.0.key
    }

    fn exiting(&self) -> bool {
        !self.0.users.load(Relaxed)
    }

    fn clone_pin(&self) -> Self {
        Self(self.0.clone())
    }
}

/// The registry and its lock.
pub(crate) struct List(RefCell<Registry<Mm>>);

impl List {
    pub(in super::super) fn new() -> Self {
        Self(RefCell::new(Registry::new()))
    }
}

impl MmList for List {
    type Mm = Mm;

    fn locked<R>(&self, f: impl FnOnce(&mut Registry<Mm>) -> R) -> R {
        f(&mut self.0.borrow_mut())
    }
}

impl Pins<Mm> for List {
    fn pin(&self, slot: SlotId) -> Option<Mm> {
        self.locked(|registry| registry.pin(slot))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pte {
    Page(usize),
    /// The zero page, placed by KSM.
    Zero,
    Swap(Content),
}

/// An address space.
#[derive(Debug)]
pub(crate) struct Space {
    pub(in super::super) mm: Mm,
    /// Whether each area is mergeable.
    pub(crate) mergeable: [bool; AREAS.len()],
    pub(crate) ptes: BTreeMap<usize, Pte>,
    pub(in super::super) shadow: BTreeMap<usize, Content>,
    /// Entries whose accessed bit is set.
    pub(in super::super) accessed: BTreeSet<usize>,
    /// Entries that a TLB has: an access does not set the bit again.
    pub(in super::super) tlb: BTreeSet<usize>,
    /// `mm->ksm_rmap_items`.
    pub(crate) tracked: isize,
    /// `mm->ksm_zero_pages`, which may be wrong.
    pub(crate) zero_pages: isize,
    /// Its exit has been reported.
    pub(in super::super) exited: bool,
    /// How often the scanner will find that another task holds the mmap lock.
    pub(crate) held: u32,
}

impl Space {
    pub(in super::super) fn new(key: usize, mergeable: [bool; AREAS.len()]) -> Self {
        let users = AtomicBool::new(true);
        Self {
            mm: Mm(Arc::new(MmStruct { key, users })),
            mergeable,
            ptes: BTreeMap::new(),
            shadow: BTreeMap::new(),
            accessed: BTreeSet::new(),
            tlb: BTreeSet::new(),
            tracked: 0,
            zero_pages: 0,
            exited: false,
            held: 0,
        }
    }

    pub(crate) fn live(&self) -> bool {
        !self.mm.exiting()
    }

    /// What is mapped, and what accesses have left.
    pub(crate) fn mapped(&self) -> (&BTreeMap<usize, Pte>, &BTreeSet<usize>, &BTreeSet<usize>) {
        (&self.ptes, &self.accessed, &self.tlb)
    }

    /// The mappings of the zero page that there are.
    pub(crate) fn zeroes(&self) -> isize {
        let zeroes = self.ptes.values().filter(|pte| **pte == Pte::Zero);
        zeroes.count() as isize
    }

    /// Whether only the world pins the mm.
    pub(crate) fn unpinned(&self) -> bool {
        Arc::strong_count(&self.mm.0) == 1
    }

    pub(crate) fn mergeable_at(&self, addr: usize) -> bool {
        self.live() && self.mergeable[area(addr)]
    }
}
