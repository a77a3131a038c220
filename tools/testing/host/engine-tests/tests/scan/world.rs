// SPDX-License-Identifier: GPL-2.0-only

//! A simulated mm: processes, vmas, page tables, pages with contents, and merged pages with their nodes and items.
//!
//! What a process has written is kept beside its page table, in `Space::shadow`: whatever happens to the pages, that is
//! what it has to read.

use engine_tests::engine::{
    backend::{
        HugeId,
        NodeMeta,
        Released, //
    },
    mm_list::MmList,
    registry::Registry,
    scan::Pins,
    types::{
        ItemId,
        MmPin,
        NodeId,
        PageId,
        Refusal,
        Refusals, //
    }, //
};

use kernel::testing;

use std::{
    cell::RefCell,
    collections::{
        BTreeMap,
        BTreeSet,
        VecDeque, //
    },
    ops::Range,
    rc::Rc,
    sync::{
        atomic::{
            AtomicBool,
            Ordering::Relaxed, //
        },
        Arc, //
    },
};

pub(crate) const PAGE: usize = 4096;

/// Where mms can have memory: first address and number of pages. The second crosses a border of the page state's ranges,
/// the third is far away and larger than a batch.
pub(crate) const AREAS: [(usize, usize); 3] = [
    (0x10_0000, 24),
    (3 * 512 * PAGE - 8 * PAGE, 20),
    (1 << 40, 84),
];

/// Pages that an mm can have.
pub(crate) const PAGES: usize = AREAS[0].1 + AREAS[1].1 + AREAS[2].1;

/// Bytes of address space that one walk covers at most.
const SPAN: usize = 1 << 30;

/// Pages of a huge page here.
const HUGE: usize = 8;

/// Frames of one NUMA node, and of one memory block.
const NODE_FRAMES: usize = 1 << 14;
pub(crate) const BLOCK: usize = 16;

/// What is in a page; 0 is a page of zeroes.
pub(crate) type Content = u8;

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

fn area(addr: usize) -> usize {
    AREAS
        .iter()
        .position(|&(start, pages)| (start..start + pages * PAGE).contains(&addr))
        .unwrap()
}

pub(crate) fn nid(frame: usize) -> u32 {
    (frame / NODE_FRAMES) as u32
}

/// A pinned mm.
#[derive(Debug)]
pub(crate) struct Mm(Arc<MmStruct>);

#[derive(Debug)]
struct MmStruct {
    key: usize,
    users: AtomicBool,
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

impl MmList for List {
    type Mm = Mm;

    fn locked<R>(&self, f: impl FnOnce(&mut Registry<Mm>) -> R) -> R {
        f(&mut self.0.borrow_mut())
    }
}

impl Pins<Mm> for List {
    fn pin(&self, slot: engine_tests::engine::types::SlotId) -> Option<Mm> {
        self.locked(|registry| registry.pin(slot))
    }
}

/// What `mapping` of a page says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    Anon,
    Ksm(NodeId),
    Orphan,
}

#[derive(Clone, Debug)]
pub(crate) struct Page {
    pub(crate) content: Content,
    pub(crate) mapping: Mapping,
    /// Page table entries.
    pub(crate) maps: u32,
    /// References of batches.
    pub(crate) refs: u32,
    huge: Option<u32>,
    locked: bool,
    pub(crate) pinned: bool,
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
    mm: Mm,
    /// Whether each area is mergeable.
    pub(crate) mergeable: [bool; AREAS.len()],
    pub(crate) ptes: BTreeMap<usize, Pte>,
    shadow: BTreeMap<usize, Content>,
    /// Entries that are marked as touched.
    touched: BTreeSet<usize>,
    /// `mm->ksm_rmap_items`.
    pub(crate) tracked: isize,
    /// Its exit has been reported.
    exited: bool,
}

impl Space {
    pub(crate) fn live(&self) -> bool {
        !self.mm.exiting()
    }

    /// Whether nobody pins the mm but the world itself.
    pub(crate) fn unpinned(&self) -> bool {
        Arc::strong_count(&self.mm.0) == 1
    }

    pub(crate) fn mergeable_at(&self, addr: usize) -> bool {
        self.live() && self.mergeable[area(addr)]
    }
}

pub(crate) struct Node {
    pub(crate) meta: NodeMeta,
    pub(crate) kpfn: usize,
    pub(crate) nid: u32,
    pub(crate) items: Vec<ItemId>,
}

pub(crate) struct Item {
    page: PageId,
    pub(crate) mm: Mm,
    pub(crate) addr: usize,
    pub(crate) node: NodeId,
}

/// Objects by number. A number is used again at once, as memory is.
pub(crate) struct Slab<T>(Vec<Option<T>>);

impl<T> Slab<T> {
    fn insert(&mut self, value: T) -> u32 {
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

    fn remove(&mut self, id: u32) -> T {
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

/// What processes and the rest of the kernel do.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// A new process.
    Spawn {
        mergeable: [bool; AREAS.len()],
    },
    /// A run of pages is written to, one content or several.
    Write {
        mm: usize,
        page: usize,
        count: usize,
        content: Content,
        step: Content,
    },
    Unmap {
        mm: usize,
        page: usize,
        count: usize,
    },
    Move {
        mm: usize,
        from: usize,
        to: usize,
        count: usize,
    },
    SwapOut {
        mm: usize,
        page: usize,
        count: usize,
    },
    /// Reclaim takes note of which pages were touched, and takes the marks away.
    Age {
        mm: usize,
        page: usize,
        count: usize,
    },
    /// A run of pages is read.
    Read {
        mm: usize,
        page: usize,
        count: usize,
    },
    /// Pages become one huge page.
    Collapse {
        mm: usize,
        page: usize,
    },
    Fork {
        mm: usize,
    },
    /// So many of the three steps by which an mm goes.
    Exit {
        mm: usize,
        steps: usize,
    },
    Advise {
        mm: usize,
        area: usize,
        on: bool,
    },
    Migrate {
        mm: usize,
        page: usize,
        nid: u32,
    },
    /// Somebody holds the lock of the folio.
    Lock {
        mm: usize,
        page: usize,
    },
    /// `get_user_pages`.
    Pin {
        mm: usize,
        page: usize,
    },
    /// All folio locks and pins are given up.
    Release,
}

/// Refusals at random.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chance {
    pub(crate) seed: u64,
    pub(crate) one_in: u64,
}

/// How contents are hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hash {
    Good,
    /// Different contents have equal hashes.
    Colliding,
}

/// What a page is to be replaced by.
pub(crate) enum Target {
    Itself(NodeId),
    Frame(usize),
    Zero,
}

/// Pages found by a walk.
pub(crate) struct Batch {
    pub(crate) world: Rc<RefCell<World>>,
    pub(crate) key: usize,
    /// `World::passes` when the walk began.
    pub(crate) passes: u64,
    /// Address and frame.
    pub(crate) pages: Vec<(usize, usize)>,
    /// Whether each was accessed before the walk.
    pub(crate) accessed: Vec<bool>,
    /// Whether the reference to each has been dropped.
    pub(crate) released: Vec<bool>,
    /// Whether it was dropped so that a huge page could be split.
    pub(crate) released_for_split: Vec<bool>,
    /// Addresses that the walk reached and left.
    pub(crate) passed: Vec<usize>,
    /// Allocations that had failed when the walk began.
    failures: u64,
}

// SAFETY: The pool of these tests is one thread.
unsafe impl Send for Batch {}
// SAFETY: The pool of these tests is one thread.
unsafe impl Sync for Batch {}

impl Batch {
    pub(crate) fn new(world: Rc<RefCell<World>>) -> Self {
        Self {
            world,
            key: 0,
            passes: 0,
            pages: Vec::new(),
            accessed: Vec::new(),
            released: Vec::new(),
            released_for_split: Vec::new(),
            passed: Vec::new(),
            failures: 0,
        }
    }

    /// A walk of this mm begins.
    pub(crate) fn start(&mut self, key: usize, passes: u64) {
        let same = self.pages.is_empty() || self.key == key;
        assert!(same, "a batch of several mms");
        (self.key, self.passes) = (key, passes);
        self.failures = testing::failures();
    }

    /// The frame of a page, to which the batch has to hold a reference.
    pub(crate) fn frame(&self, i: usize) -> usize {
        assert!(!self.released[i], "a released page is looked at");
        self.pages[i].1
    }
}

pub(crate) struct World {
    pub(crate) list: Rc<List>,
    pub(crate) hash: Hash,
    pub(crate) frames: BTreeMap<usize, Page>,
    pub(crate) offline: BTreeSet<usize>,
    pub(crate) spaces: BTreeMap<usize, Space>,
    pub(crate) nodes: Slab<Node>,
    pub(crate) items: Slab<Item>,
    pub(crate) zero_pages: i64,
    pub(crate) chance: Option<Chance>,
    /// What happens beside the scanner: after how many of its steps, and what.
    pub(crate) beside: VecDeque<(u32, Event)>,
    /// The scan is to pause after so many pages.
    pub(crate) pause_after: Option<u32>,
    pub(crate) paused: bool,
    /// What the engine was told to do, to see that it does so.
    pub(crate) max_page_sharing: u32,
    pub(crate) merge_across_nodes: bool,
    /// How often each refusal was given.
    pub(crate) refusals: Refusals,
    /// Every page that the engine was done with.
    pub(crate) visits: Vec<(usize, usize)>,
    /// Addresses that may map a merged page without an item: memory for that was refused.
    excused: BTreeSet<(usize, usize)>,
    /// Items that the engine asked for, while it checks itself.
    pub(crate) asked: RefCell<Option<Vec<ItemId>>>,
    /// How often the engine could reschedule. It does so after each pass, and never between a walk and the decision to do
    /// that walk anew, so this tells a batch that went through the pass from one that was discarded.
    pub(crate) passes: u64,
    /// Pages of which the engine asked what they are, since a walk took them.
    classified: BTreeSet<(usize, usize)>,
    next_key: usize,
    next_huge: u32,
}

impl World {
    pub(crate) fn new(hash: Hash) -> Self {
        Self {
            list: Rc::new(List(RefCell::new(Registry::new()))),
            hash,
            frames: BTreeMap::new(),
            offline: BTreeSet::new(),
            spaces: BTreeMap::new(),
            nodes: Slab(Vec::new()),
            items: Slab(Vec::new()),
            zero_pages: 0,
            chance: None,
            beside: VecDeque::new(),
            pause_after: None,
            paused: false,
            max_page_sharing: 256,
            merge_across_nodes: true,
            refusals: Refusals::default(),
            visits: Vec::new(),
            excused: BTreeSet::new(),
            asked: RefCell::new(None),
            passes: 0,
            classified: BTreeSet::new(),
            next_key: 0xffff_0000,
            next_huge: 0,
        }
    }

    pub(crate) fn hash(&self, content: Content) -> u64 {
        let content = match self.hash {
            Hash::Good => content,
            Hash::Colliding => content % 3,
        };
        (u64::from(content) + 1).wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    // Frames.

    fn alloc(&mut self, content: Content, on: u32) -> usize {
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

    fn page_mut(&mut self, frame: usize) -> &mut Page {
        self.frames.get_mut(&frame).unwrap()
    }

    fn put(&mut self, frame: usize) {
        let page = self.page(frame);
        if page.maps == 0 && page.refs == 0 {
            self.frames.remove(&frame);
        }
    }

    fn space(&self, key: usize) -> &Space {
        &self.spaces[&key]
    }

    fn space_mut(&mut self, key: usize) -> &mut Space {
        self.spaces.get_mut(&key).unwrap()
    }

    /// Changes an entry, and counts mappings.
    fn set_pte(&mut self, key: usize, addr: usize, new: Option<Pte>) {
        if let Some(Pte::Page(frame)) = new {
            self.page_mut(frame).maps += 1;
        }
        if new == Some(Pte::Zero) {
            self.zero_pages += 1;
        }
        let ptes = &mut self.space_mut(key).ptes;
        let old = match new {
            Some(pte) => ptes.insert(addr, pte),
            None => ptes.remove(&addr),
        };
        if new.is_none() {
            self.space_mut(key).touched.remove(&addr);
        }
        match old {
            Some(Pte::Page(frame)) => {
                self.page_mut(frame).maps -= 1;
                self.put(frame);
            }
            Some(Pte::Zero) => self.zero_pages -= 1,
            _ => {}
        }
    }

    fn read(&self, key: usize, addr: usize) -> Option<Content> {
        Some(match *self.space(key).ptes.get(&addr)? {
            Pte::Page(frame) => self.page(frame).content,
            Pte::Zero => 0,
            Pte::Swap(content) => content,
        })
    }

    /// Gives an address a page of its own with what it has now.
    fn unshare(&mut self, key: usize, addr: usize) {
        if let Some(content) = self.read(key, addr) {
            let on = (addr / PAGE % 2) as u32;
            let frame = self.alloc(content, on);
            self.set_pte(key, addr, Some(Pte::Page(frame)));
            self.touch(key, addr);
        }
    }

    fn write(&mut self, key: usize, addr: usize, content: Content) {
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
        self.touch(key, addr);
    }

    fn touch(&mut self, key: usize, addr: usize) {
        let space = self.space_mut(key);
        if space.ptes.contains_key(&addr) {
            space.touched.insert(addr);
        }
    }

    /// Whether an entry is marked as touched.
    pub(crate) fn touched(&self, key: usize, addr: usize) -> bool {
        self.space(key).touched.contains(&addr)
    }

    // What happens.

    /// The `n`th mm with users.
    fn nth(&self, n: usize) -> Option<usize> {
        let live: Vec<usize> = self.live().collect();
        live.get(n.checked_rem(live.len())?).copied()
    }

    pub(crate) fn live(&self) -> impl Iterator<Item = usize> + '_ {
        let live = self.spaces.iter().filter(|(_, space)| space.live());
        live.map(|(key, _)| *key)
    }

    fn new_space(&mut self, mergeable: [bool; AREAS.len()]) -> usize {
        self.next_key += PAGE;
        let key = self.next_key;
        let mm = Mm(Arc::new(MmStruct {
            key,
            users: AtomicBool::new(true),
        }));
        let space = Space {
            mm,
            mergeable,
            ptes: BTreeMap::new(),
            shadow: BTreeMap::new(),
            touched: BTreeSet::new(),
            tracked: 0,
            exited: false,
        };
        self.spaces.insert(key, space);
        key
    }

    /// Registers an mm that has mergeable memory; the registry may have it already.
    pub(crate) fn enter(&self, key: usize) {
        let space = self.space(key);
        if space.mergeable.contains(&true) {
            let _ = self.list.enter(space.mm.clone_pin());
        }
    }

    /// The page of an address, where nobody but page tables refers to it.
    fn free_to_change(&self, key: usize, addr: usize) -> Option<usize> {
        match self.space(key).ptes.get(&addr) {
            Some(&Pte::Page(frame)) => {
                let page = self.page(frame);
                (page.refs == 0 && !page.locked && !page.pinned && page.huge.is_none())
                    .then_some(frame)
            }
            _ => None,
        }
    }

    fn migrate(&mut self, frame: usize, on: u32) {
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

    pub(crate) fn happen(&mut self, event: &Event) {
        let at = |page: usize, count: usize| (page..page + count).map(addr);
        match *event {
            Event::Spawn { mergeable } => {
                if self.live().count() < 8 {
                    let key = self.new_space(mergeable);
                    self.enter(key);
                }
            }
            Event::Write {
                mm,
                page,
                count,
                content,
                step,
            } => {
                let Some(key) = self.nth(mm) else { return };
                let mut content = content;
                for addr in at(page, count) {
                    self.write(key, addr, content);
                    content = content.wrapping_add(step);
                }
            }
            Event::Unmap { mm, page, count } => {
                let Some(key) = self.nth(mm) else { return };
                for addr in at(page, count) {
                    self.set_pte(key, addr, None);
                    self.space_mut(key).shadow.remove(&addr);
                }
            }
            Event::Move {
                mm,
                from,
                to,
                count,
            } => {
                let Some(key) = self.nth(mm) else { return };
                for (from, to) in at(from, count).zip(at(to, count)) {
                    // Only memory that is mergeable alike can be moved there.
                    let space = self.space(key);
                    let alike = space.mergeable[area(from)] == space.mergeable[area(to)];
                    let Some(&pte) = space.ptes.get(&from).filter(|_| alike && from != to) else {
                        continue;
                    };
                    self.set_pte(key, to, Some(pte));
                    self.set_pte(key, from, None);
                    let shadow = &mut self.space_mut(key).shadow;
                    let content = shadow.remove(&from).unwrap();
                    shadow.insert(to, content);
                    let touched = &mut self.space_mut(key).touched;
                    if touched.remove(&from) {
                        touched.insert(to);
                    } else {
                        touched.remove(&to);
                    }
                    // Should it be the page being visited, that has seen another.
                    self.excused.insert((key, to));
                }
            }
            Event::SwapOut { mm, page, count } => {
                let Some(key) = self.nth(mm) else { return };
                for addr in at(page, count) {
                    if self.free_to_change(key, addr).is_some() {
                        let content = self.read(key, addr).unwrap();
                        self.set_pte(key, addr, Some(Pte::Swap(content)));
                    }
                }
            }
            Event::Age { mm, page, count } => {
                let Some(key) = self.nth(mm) else { return };
                for addr in at(page, count) {
                    // Between a hash and a merge it would leave a node where nobody finds it, which does no harm but breaks
                    // what is checked here.
                    let held = match self.space(key).ptes.get(&addr) {
                        Some(&Pte::Page(frame)) => self.page(frame).refs > 0,
                        _ => false,
                    };
                    if !held {
                        self.space_mut(key).touched.remove(&addr);
                    }
                }
            }
            Event::Read { mm, page, count } => {
                let Some(key) = self.nth(mm) else { return };
                for addr in at(page, count) {
                    self.touch(key, addr);
                }
            }
            Event::Collapse { mm, page } => {
                let Some(key) = self.nth(mm) else { return };
                let start = addr(page) / (HUGE * PAGE) * (HUGE * PAGE);
                let frames: Option<Vec<usize>> = (start..start + HUGE * PAGE)
                    .step_by(PAGE)
                    .map(|addr| {
                        self.free_to_change(key, addr).filter(|frame| {
                            let page = self.page(*frame);
                            page.maps == 1 && page.mapping == Mapping::Anon
                        })
                    })
                    .collect();
                for frame in frames.into_iter().flatten() {
                    self.page_mut(frame).huge = Some(self.next_huge);
                }
                self.next_huge += 1;
            }
            Event::Fork { mm } => {
                let Some(key) = self.nth(mm).filter(|_| self.live().count() < 8) else {
                    return;
                };
                let parent = self.space(key);
                let (mergeable, shadow) = (parent.mergeable, parent.shadow.clone());
                let ptes: Vec<(usize, Pte)> = parent.ptes.iter().map(|(a, p)| (*a, *p)).collect();
                let child = self.new_space(mergeable);
                self.space_mut(child).shadow = shadow;
                for (addr, pte) in ptes {
                    match pte {
                        Pte::Page(frame) if self.page(frame).pinned => {
                            let content = self.page(frame).content;
                            let copy = self.alloc(content, 0);
                            self.set_pte(child, addr, Some(Pte::Page(copy)));
                        }
                        // What is counted is what KSM has placed; a copy is that too.
                        pte => self.set_pte(child, addr, Some(pte)),
                    }
                }
                self.enter(child);
            }
            Event::Exit { mm, steps } => {
                // One that has begun to go is as likely as any other.
                let all: Vec<usize> = self
                    .spaces
                    .iter()
                    .filter(|(_, space)| space.live() || !space.ptes.is_empty() || !space.exited)
                    .map(|(key, _)| *key)
                    .collect();
                let Some(n) = mm.checked_rem(all.len()) else {
                    return;
                };
                for _ in 0..steps {
                    self.exit_step(all[n]);
                }
            }
            Event::Advise { mm, area, on } => {
                let Some(key) = self.nth(mm) else { return };
                let n = area % AREAS.len();
                if on {
                    self.space_mut(key).mergeable[n] = true;
                    self.enter(key);
                } else if self.space(key).mergeable[n] {
                    let (start, pages) = AREAS[n];
                    let _ = self.break_ksm(key, start..start + pages * PAGE, &mut None);
                    self.space_mut(key).mergeable[n] = false;
                }
            }
            Event::Migrate { mm, page, nid } => {
                let Some(key) = self.nth(mm) else { return };
                if let Some(frame) = self.free_to_change(key, addr(page)) {
                    self.migrate(frame, nid % 2);
                }
            }
            Event::Lock { mm, page } | Event::Pin { mm, page } => {
                let Some(key) = self.nth(mm) else { return };
                if let Some(&Pte::Page(frame)) = self.space(key).ptes.get(&addr(page)) {
                    let page = self.page_mut(frame);
                    match event {
                        Event::Lock { .. } => page.locked = true,
                        // A pin for writing is preceded by a write, which gives a page of its own.
                        _ => page.pinned = page.mapping == Mapping::Anon && page.maps == 1,
                    }
                }
            }
            Event::Release => {
                for page in self.frames.values_mut() {
                    (page.locked, page.pinned) = (false, false);
                }
            }
        }
    }

    /// One of the three steps by which an mm goes: no user is left, its exit is reported, its memory is freed.
    pub(crate) fn exit_step(&mut self, key: usize) {
        let space = self.space_mut(key);
        if space.live() {
            space.mm.0.users.store(false, Relaxed);
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

    /// Gives every mapping of a merged page a page of its own; fails once there were `left`.
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

    /// Takes a block of memory offline: its pages go elsewhere. False if one of them cannot.
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

    // What the scanner does.

    /// Another step of the scanner: something may happen beside it.
    pub(crate) fn step(&mut self) {
        while let Some((after, _)) = self.beside.front_mut() {
            if *after > 0 {
                *after -= 1;
                return;
            }
            if let Some((_, event)) = self.beside.pop_front() {
                self.happen(&event);
            }
        }
    }

    fn roll(&mut self) -> Option<u64> {
        let chance = self.chance.as_mut()?;
        chance.seed = chance
            .seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let number = chance.seed >> 33;
        (number % chance.one_in == 0).then_some(number / chance.one_in)
    }

    /// Refuses at random.
    fn may_refuse(&mut self, reasons: &[Refusal]) -> Result<(), Refusal> {
        match self.roll() {
            Some(number) => Err(reasons[number as usize % reasons.len()]),
            None => Ok(()),
        }
    }

    /// The frame of a node's page, if that is still the node's.
    pub(crate) fn node_frame(&self, node: NodeId) -> Option<usize> {
        let kpfn = self.nodes.get(node.0)?.kpfn;
        let page = self.frames.get(&kpfn)?;
        (page.mapping == Mapping::Ksm(node)).then_some(kpfn)
    }

    /// The pages of mergeable memory from `start` on that one walk covers, and where the next one is to begin.
    pub(crate) fn mapped(&self, key: usize, start: usize) -> (Vec<(usize, usize)>, Option<usize>) {
        let bound = start.saturating_add(SPAN);
        let space = &self.spaces[&key];
        let mut pages = Vec::new();
        let mut at = start;
        for (n, (first, count)) in AREAS.into_iter().enumerate() {
            let end = first + count * PAGE;
            if end <= at || !space.mergeable[n] {
                continue;
            }
            at = at.max(first);
            if at >= bound {
                return (pages, Some(at));
            }
            for (addr, pte) in space.ptes.range(at..end) {
                if let Pte::Page(frame) = *pte {
                    pages.push((*addr, frame));
                }
            }
            at = end;
        }
        (pages, None)
    }

    /// A walk takes a page.
    pub(crate) fn take(&mut self, batch: &mut Batch, addr: usize, frame: usize) {
        self.page_mut(frame).refs += 1;
        self.excused.remove(&(batch.key, addr));
        batch.pages.push((addr, frame));
        self.classified.remove(&(batch.key, addr));
        batch
            .accessed
            .push(self.space_mut(batch.key).touched.remove(&addr));
        batch.released.push(false);
        batch.released_for_split.push(false);
    }

    /// A walk passes a page over, with which the engine is done so.
    pub(crate) fn passed(&mut self, batch: &mut Batch, addr: usize) {
        batch.passed.push(addr);
        self.assert_known(batch.key, addr);
    }

    /// A walk leaves a page but for the mark that it was touched.
    pub(crate) fn noted(&mut self, batch: &mut Batch, addr: usize) {
        self.space_mut(batch.key).touched.remove(&addr);
        self.passed(batch, addr);
    }

    pub(crate) fn release(&mut self, batch: &mut Batch, i: usize) {
        if !core::mem::replace(&mut batch.released[i], true) {
            let (_, frame) = batch.pages[i];
            self.page_mut(frame).refs -= 1;
            self.put(frame);
        }
    }

    /// The engine asks what a page is, for whose state it had memory.
    pub(crate) fn classified(&mut self, batch: &Batch, i: usize) {
        self.classified.insert((batch.key, batch.pages[i].0));
    }

    /// The engine is done with the pages of a batch: those that are merged have their items.
    pub(crate) fn visited(&mut self, batch: &Batch) {
        let visits = batch.passed.iter().map(|addr| (batch.key, *addr));
        self.visits.extend(visits);
        for &(addr, _) in &batch.pages {
            let page = (batch.key, addr);
            self.visits.push(page);
            // Without memory for the page's state it has none.
            if testing::failures() != batch.failures && !self.classified.contains(&page) {
                self.excused.insert(page);
            }
            self.assert_known(batch.key, addr);
        }
    }

    /// Counts down to the pause that is asked for.
    pub(crate) fn count_pause(&mut self) {
        if let Some(left) = self.pause_after.as_mut() {
            *left = left.saturating_sub(1);
            self.paused |= *left == 0;
        }
    }

    /// If the page that an address maps is merged, the mapping has its item.
    fn assert_known(&self, key: usize, addr: usize) {
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

    /// The node that the item of an address is on.
    pub(crate) fn item_at(&self, key: usize, addr: usize) -> Option<NodeId> {
        let mut items = self.items.iter();
        let found = items.find(|(_, item)| item.mm.key() == key && item.addr == addr);
        found.map(|(_, item)| item.node)
    }

    /// Takes a reference again to what is at the address of a page of a batch.
    pub(crate) fn reacquire(&mut self, batch: &mut Batch, i: usize) -> bool {
        let addr = batch.pages[i].0;
        let Ok(frame) = self.frame_at(batch.key, addr) else {
            return false;
        };
        self.page_mut(frame).refs += 1;
        batch.pages[i].1 = frame;
        (batch.released[i], batch.released_for_split[i]) = (false, false);
        true
    }

    pub(crate) fn new_item(
        &mut self,
        key: usize,
        addr: usize,
        page: PageId,
        node: NodeId,
    ) -> Result<ItemId, Refusal> {
        self.may_refuse(&[Refusal::NoMemory])?;
        assert!(
            self.item_at(key, addr).is_none(),
            "a second item for one address"
        );
        let item = Item {
            page,
            mm: self.space(key).mm.clone_pin(),
            addr,
            node,
        };
        let id = ItemId(self.items.insert(item));
        self.nodes.get_mut(node.0).unwrap().items.push(id);
        Ok(id)
    }

    pub(crate) fn free_item(&mut self, id: ItemId) -> Item {
        let item = self.items.remove(id.0);
        self.nodes
            .get_mut(item.node.0)
            .unwrap()
            .items
            .retain(|i| *i != id);
        item
    }

    /// Puts a page in the place of that at an address, or makes it a merged page.
    pub(crate) fn check_share(
        &mut self,
        key: usize,
        addr: usize,
        frame: usize,
        target: &Target,
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
        if page.mapping != Mapping::Anon {
            return Err(Refusal::Gone);
        }
        if page.locked {
            return Err(Refusal::Locked);
        }
        if page.huge.is_some() && page.content != content {
            return Err(Refusal::Differs);
        }
        Ok(page.huge.is_some())
    }

    pub(crate) fn huge(&self, frame: usize) -> Option<HugeId> {
        self.page(frame).huge.map(|huge| HugeId(huge as usize))
    }

    fn content_of(&self, frame: usize, target: &Target) -> Content {
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
        let page = self.page(frame);
        if self.space(key).ptes.get(&addr) != Some(&Pte::Page(frame)) {
            return Err(Refusal::Gone);
        }
        if page.pinned {
            return Err(Refusal::Pinned);
        }
        if page.content != content {
            return Err(Refusal::Differs);
        }
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

    /// Splits the huge page that a page is part of: nobody may hold a reference but one to this page.
    fn split(&mut self, frame: usize) -> Result<(), Refusal> {
        self.may_refuse(&[Refusal::Unsplit])?;
        let huge = self.page(frame).huge;
        let stuck = |(f, page): (&usize, &Page)| {
            page.huge == huge && (page.pinned || page.refs > u32::from(*f == frame))
        };
        if self.frames.iter().any(stuck) {
            return Err(Refusal::Unsplit);
        }
        for page in self.frames.values_mut().filter(|page| page.huge == huge) {
            page.huge = None;
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

    /// Looks at the page that another is to be merged with, and makes a node for them.
    pub(crate) fn new_node(
        &mut self,
        frame: usize,
        (other, other_addr): (usize, usize),
        on: Option<u32>,
        meta: impl Fn(NodeId) -> NodeMeta,
    ) -> Result<NodeId, Refusal> {
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
        self.may_refuse(&[Refusal::NoMemory, Refusal::Unloading])?;
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

    pub(crate) fn merge_second(
        &mut self,
        (key, addr, page): (usize, usize, PageId),
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
        let item = self.new_item(key, addr, page, node)?;
        let target = Target::Frame(kpage);
        let shared = self.check_share(key, addr, frame, &target);
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
        let key = self.items.get(item.0).unwrap().mm.key();
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
        (addr, page): (usize, PageId),
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
            self.new_item(key, addr, page, node)
        };
        if result.is_err() {
            self.excused.insert((key, addr));
        }
        result
    }

    /// The page that is mapped at an address of mergeable memory.
    fn frame_at(&self, key: usize, addr: usize) -> Result<usize, Refusal> {
        let space = self.space(key);
        match space.ptes.get(&addr) {
            Some(&Pte::Page(frame)) if space.mergeable_at(addr) => Ok(frame),
            _ => Err(Refusal::Gone),
        }
    }

    pub(crate) fn release_item(&mut self, id: ItemId) -> Option<Released> {
        let node = self.items.get(id.0)?.node;
        // The item that was put on the node last comes to the place of the one that goes.
        let last = *self.nodes.get(node.0)?.items.last()?;
        if last != id {
            self.items.0.swap(last.0 as usize, id.0 as usize);
        }
        self.free_item(last);
        let moved = self.items.get(id.0).map(|item| (item.page, id));
        let remaining = self.nodes.get(node.0).unwrap().items.len() as u32;
        let mapped = self.node_frame(node).map(|frame| self.page(frame).maps > 0);
        Some(Released {
            node,
            remaining,
            due: match mapped {
                None => true,
                Some(mapped) => remaining == 0 && !mapped,
            },
            moved,
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

    // What has to hold.

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
        assert_eq!(maps.len(), self.frames.len(), "a page that nobody maps");
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
