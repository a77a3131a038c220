// SPDX-License-Identifier: GPL-2.0-only

//! Page state and content index at native speed, beside a tree ordered by content.
//!
//! `cargo bench -p engine-benches`; `RKSM_BENCH_PAGES=1048576,16777216` chooses other numbers of
//! pages than the quick ones by default. 16 Mi pages take 3 GiB of memory and some minutes.
//!
//! The tree is a red-black tree whose nodes are compared by the first cache line of their pages,
//! which differ there, and which lies next to the node. That is kind to the tree: pages may differ
//! later than that, and in the kernel each comparison with a candidate takes an mmap lock and a
//! page table walk besides.

use engine_tests::engine::{
    index::{
        Entry,
        Index, //
    },
    page_state::{
        PageState,
        PageStates,
        Tracked, //
    },
    types::{
        Fingerprint,
        PageId,
        SlotId, //
    }, //
};

use kernel::{
    page::PAGE_SIZE,
    prelude::GFP_KERNEL, //
};

use criterion::{
    BenchmarkId,
    Criterion, //
};

use intrusive_collections::{
    intrusive_adapter,
    KeyAdapter,
    RBTree,
    RBTreeLink, //
};

use std::{
    hint::black_box,
    time::Duration, //
};

const SLOT: SlotId = SlotId(0);

/// Numbers without an order, the same in every run.
fn scatter(i: u64) -> u64 {
    let mut z = i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

fn fingerprint(content: u64) -> Fingerprint {
    Fingerprint::new(scatter(content), 0)
}

fn fingerprint_of(states: &PageStates) -> impl Fn(Entry) -> Option<Fingerprint> + '_ {
    |entry| match entry {
        Entry::Candidate(page) => states.fingerprint(page),
        Entry::Stable(_) => None,
    }
}

/// Unmerged pages of one mm without gaps; page `i` has content `i`.
struct Engine {
    states: PageStates,
    index: Index,
    pages: Vec<PageId>,
}

impl Engine {
    fn new(pages: u64) -> Self {
        let mut engine = Self {
            states: PageStates::new(),
            index: Index::new(),
            pages: Vec::new(),
        };
        for i in 0..pages {
            let addr = i as usize * PAGE_SIZE;
            let page = engine.states.track(SLOT, addr, GFP_KERNEL).expect("memory");
            engine.pages.push(page);
            engine.insert(page, i);
        }
        engine
    }

    fn insert(&mut self, page: PageId, content: u64) {
        let fingerprint = fingerprint(content);
        let state = PageState::Tracked(
            Tracked::NEW
                .with_fingerprint(fingerprint)
                .with_settled(true)
                .with_indexed(true),
        );
        self.states.set(page, state);
        let entry = Entry::Candidate(page);
        self.index
            .insert(fingerprint, entry, GFP_KERNEL, fingerprint_of(&self.states))
            .expect("memory");
    }

    fn find(&self, content: u64) -> Option<Entry> {
        let wanted = fingerprint(content);
        self.index
            .find(wanted)
            .find(|&entry| fingerprint_of(&self.states)(entry) == Some(wanted))
    }
}

/// What of a page is read to compare it.
#[repr(align(64))]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Content([u64; 8]);

impl Content {
    fn new(content: u64) -> Self {
        Self([scatter(content); 8])
    }
}

/// A page in the tree.
struct Node {
    link: RBTreeLink,
    content: Content,
}

intrusive_adapter!(ByContent = Box<Node>: Node { link: RBTreeLink });

impl<'a> KeyAdapter<'a> for ByContent {
    type Key = &'a Content;

    fn get_key(&self, node: &'a Node) -> &'a Content {
        &node.content
    }
}

struct Tree(RBTree<ByContent>);

impl Tree {
    fn new(pages: u64) -> Self {
        let mut tree = Self(RBTree::new(ByContent::new()));
        (0..pages).for_each(|i| tree.insert(i));
        tree
    }

    fn insert(&mut self, content: u64) {
        self.0.insert(Box::new(Node {
            link: RBTreeLink::new(),
            content: Content::new(content),
        }));
    }

    fn has(&self, content: u64) -> bool {
        !self.0.find(&Content::new(content)).is_null()
    }

    fn remove(&mut self, content: u64) -> bool {
        self.0.find_mut(&Content::new(content)).remove().is_some()
    }
}

fn sizes() -> Vec<u64> {
    let chosen = std::env::var("RKSM_BENCH_PAGES").unwrap_or_else(|_| "65536,1048576".into());
    chosen
        .split(',')
        .map(|size| {
            size.trim()
                .parse()
                .unwrap_or_else(|_| panic!("RKSM_BENCH_PAGES: {size:?} is not a number of pages"))
        })
        .collect()
}

/// One pass of the scanner over pages it knows: look each up, read its state, write it back.
fn rescan(c: &mut Criterion) {
    let mut group = c.benchmark_group("rescan");
    for pages in sizes() {
        let mut engine = Engine::new(pages);
        let mut addr = 0;
        group.bench_function(BenchmarkId::new("page state", pages), |b| {
            b.iter(|| {
                let page = engine.states.lookup(SLOT, addr).expect("tracked");
                let state = engine.states.get(page).expect("tracked");
                addr = (addr + PAGE_SIZE) % (pages as usize * PAGE_SIZE);
                engine.states.set(page, black_box(state))
            });
        });
    }
}

/// Pages in no order: is there one of this content?
fn search(c: &mut Criterion) {
    let mut group = c.benchmark_group("search");
    for pages in sizes() {
        let engine = Engine::new(pages);
        let mut i = 0;
        let mut next = || {
            i += 1;
            scatter(i) % pages
        };
        group.bench_function(BenchmarkId::new("index, found", pages), |b| {
            b.iter(|| assert!(engine.find(next()).is_some()));
        });
        group.bench_function(BenchmarkId::new("index, not found", pages), |b| {
            b.iter(|| assert!(engine.find(pages + next()).is_none()));
        });
        drop(engine);

        let tree = Tree::new(pages);
        group.bench_function(BenchmarkId::new("tree, found", pages), |b| {
            b.iter(|| assert!(tree.has(next())));
        });
        group.bench_function(BenchmarkId::new("tree, not found", pages), |b| {
            b.iter(|| assert!(!tree.has(pages + next())));
        });
    }
}

/// The content of a page in no order changes: the old entry goes, a new one comes.
fn change(c: &mut Criterion) {
    let mut group = c.benchmark_group("change");
    for pages in sizes() {
        let mut engine = Engine::new(pages);
        let mut contents: Vec<u64> = (0..pages).collect();
        let mut i = 0;
        let mut next = || {
            i += 1;
            scatter(i) % pages
        };
        group.bench_function(BenchmarkId::new("index", pages), |b| {
            b.iter(|| {
                let changed = next();
                let page = engine.pages[changed as usize];
                let old = contents[changed as usize];
                assert!(engine
                    .index
                    .remove(fingerprint(old), Entry::Candidate(page)));
                // Each page has two contents that no other has.
                let new = if old == changed {
                    pages + changed
                } else {
                    changed
                };
                contents[changed as usize] = new;
                engine.insert(page, new);
            });
        });
        drop(engine);

        let mut tree = Tree::new(pages);
        contents = (0..pages).collect();
        group.bench_function(BenchmarkId::new("tree", pages), |b| {
            b.iter(|| {
                let changed = next();
                let old = contents[changed as usize];
                assert!(tree.remove(old));
                let new = if old == changed {
                    pages + changed
                } else {
                    changed
                };
                contents[changed as usize] = new;
                tree.insert(new);
            });
        });
    }
}

fn main() {
    let mut c = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    rescan(&mut c);
    search(&mut c);
    change(&mut c);
    c.final_summary();
}
