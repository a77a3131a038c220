// SPDX-License-Identifier: GPL-2.0-only

//! The engine with its registry over the simulated mm, driven as `rksmd` drives them.

use crate::{
    control::MergeNow,
    memory::SimMemory,
    sim::{
        Batch,
        Chance,
        Event,
        Hash,
        List,
        Mapping,
        Pte,
        Space,
        World,
        BLOCK,
        PAGE, //
    }, //
};

use engine_tests::engine::{
    mm_list::{
        MmList,
        Step,
        Visited, //
    },
    policy::Policy,
    scan::{
        Allowance,
        Engine,
        PassBuffers,
        ScanTarget, //
    },
    stats::Counters, //
    types::{
        Fingerprint,
        MmPin,
        NodeId,
        Progress,
        Refusal,
        SlotId, //
    },
    worker_pool::{
        Stage,
        WorkerPool, //
    }, //
};

use kernel::{
    prelude::{
        ENOMEM,
        GFP_KERNEL, //
    },
    testing::{
        self,
        Fail, //
    }, //
};

use std::{
    cell::{
        Cell,
        RefCell, //
    },
    collections::{
        BTreeMap,
        BTreeSet,
        VecDeque, //
    },
    rc::Rc, //
};

/// Nodes of a chain that the engine examines for room.
const MAX_DUPS_TRIED: usize = 3;

/// A step of a history.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Happen(Event),
    /// Scans `budget` pages. The events of `interleaved` happen meanwhile.
    Scan {
        budget: u32,
        pause_after: Option<u32>,
        interleaved: Vec<(u32, Event)>,
    },
    /// Scans to the end of the full scan.
    FullScan {
        interleaved: Vec<(u32, Event)>,
    },
    Prune(usize),
    /// `run` = 2, which fails after `fail_after` pages.
    Unmerge {
        fail_after: Option<u32>,
        interleaved: Vec<(u32, Event)>,
    },
    HotRemove {
        block: usize,
    },
    Online,
    SmartScan(bool),
    UseZeroPages(bool),
    /// Files that cannot change while pages are merged.
    MergeAcrossNodes(bool),
    MaxPageSharing(u32),
    /// `scan_threads`, and the order in which they come.
    ScanThreads(usize, u64),
    Chance(Option<Chance>),
    /// Allocations that fail.
    Fail(Option<Chance>),
    Merge(MergeNow),
    /// Why pages of an mm are not merged, asked for so many walks at once.
    Why {
        mm: usize,
        walks: usize,
    },
    /// Pages of an mm are unmerged, and forgotten.
    UnmergeRange {
        mm: usize,
        page: usize,
        count: usize,
    },
}

/// A pool of one thread, which runs what several threads could run at once in a random order.
pub(crate) struct RandomOrderPool {
    threads: usize,
    random: Cell<u64>,
}

impl RandomOrderPool {
    /// A pool of the calling thread alone.
    pub(crate) fn single() -> Self {
        Self {
            threads: 1,
            random: Cell::new(0),
        }
    }

    /// A number below `n`.
    fn below(&self, n: usize) -> usize {
        // Knuth's MMIX generator; its high bits are the random ones.
        let next = self.random.get().wrapping_mul(6364136223846793005);
        self.random.set(next.wrapping_add(1442695040888963407));
        (self.random.get() >> 33) as usize % n
    }
}

impl WorkerPool for RandomOrderPool {
    fn run<T: Send + Unpin>(&self, stage: &mut impl Stage<T>, work: impl Fn(&mut T) + Sync) {
        let (mut waiting, mut done) = (Vec::new(), Vec::new());
        loop {
            // Nothing is left only when there is nothing next either.
            let next = (waiting.len() < self.threads && self.below(3) > 0)
                || (waiting.is_empty() && done.is_empty());
            match next.then(|| stage.next_job()).flatten() {
                Some(job) => waiting.push(job),
                None if !done.is_empty() && (waiting.is_empty() || self.below(2) == 0) => {
                    stage.complete(done.swap_remove(self.below(done.len())));
                }
                None if !waiting.is_empty() => {
                    let mut job = waiting.swap_remove(self.below(waiting.len()));
                    work(&mut job);
                    done.push(job);
                }
                None => break,
            }
        }
    }
}

/// Buffers of the simulation for a number of threads.
pub(crate) fn pass_buffers(threads: usize, world: &Rc<RefCell<World>>) -> PassBuffers<SimMemory> {
    PassBuffers::new(threads, |_| Ok(Batch::new(world.clone()))).unwrap()
}

pub(crate) struct Machine {
    pub(crate) world: Rc<RefCell<World>>,
    pub(crate) list: Rc<List>,
    pub(crate) engine: Engine<SimMemory>,
    pub(crate) buffers: PassBuffers<SimMemory>,
    pub(crate) pool: RandomOrderPool,
    threads: usize,
    pub(crate) policy: Policy,
    pub(crate) fail: Fail,
    /// Pages visited before the world's list of visits was cleared.
    pub(crate) visits_before: u64,
}

impl Machine {
    pub(crate) fn new(hash: Hash) -> Self {
        let world = World::new(hash);
        let list = world.list.clone();
        let policy = Policy {
            smart_scan: false,
            use_zero_pages: false,
            merge_across_nodes: world.merge_across_nodes,
            max_page_sharing: world.max_page_sharing,
            vouched: false,
        };
        let world = Rc::new(RefCell::new(world));
        testing::fail(Fail::Never);
        Self {
            engine: Engine::new(SimMemory(world.clone())),
            list,
            buffers: pass_buffers(1, &world),
            world,
            pool: RandomOrderPool::single(),
            threads: 1,
            policy,
            fail: Fail::Never,
            visits_before: 0,
        }
    }

    pub(crate) fn happen(&mut self, event: Event) {
        self.world.borrow_mut().happen(&event);
    }

    pub(crate) fn run(&mut self, op: &Op) {
        match op {
            Op::Happen(event) => self.happen(event.clone()),
            Op::Scan {
                budget,
                pause_after,
                interleaved,
            } => {
                self.interleaved(interleaved);
                self.world.borrow_mut().pause_after = *pause_after;
                self.scan(*budget);
                let mut world = self.world.borrow_mut();
                (world.pause_after, world.paused) = (None, false);
                drop(world);
                self.deliver_rest();
            }
            Op::FullScan { interleaved } => {
                self.interleaved(interleaved);
                self.full_scan();
                self.deliver_rest();
            }
            Op::Prune(count) => {
                let max = self.policy.max_page_sharing;
                self.engine.metadata.prune(*count, max);
            }
            Op::Unmerge {
                fail_after,
                interleaved,
            } => {
                self.interleaved(interleaved);
                let advised =
                    |(_, event): &(u32, Event)| matches!(event, Event::Advise { on: true, .. });
                self.unmerge(*fail_after, interleaved.iter().any(advised));
                self.deliver_rest();
            }
            Op::HotRemove { block } => self.hot_remove(*block),
            Op::Online => self.world.borrow_mut().offline.clear(),
            Op::SmartScan(on) => self.policy.smart_scan = *on,
            Op::UseZeroPages(on) => self.policy.use_zero_pages = *on,
            Op::MergeAcrossNodes(on) => {
                if self.empty() {
                    self.policy.merge_across_nodes = *on;
                    self.world.borrow_mut().merge_across_nodes = *on;
                }
            }
            Op::MaxPageSharing(max) => {
                if self.empty() {
                    self.policy.max_page_sharing = *max;
                    self.world.borrow_mut().max_page_sharing = *max;
                }
            }
            Op::ScanThreads(threads, seed) => {
                self.buffers = pass_buffers(*threads, &self.world);
                self.pool.random.set(*seed);
                self.pool.threads = *threads;
                self.threads = *threads;
            }
            Op::Merge(merge) => {
                self.interleaved(&merge.interleaved);
                self.merge_now(merge);
                self.deliver_rest();
            }
            Op::Why { mm, walks } => {
                self.why(*mm, *walks);
            }
            Op::UnmergeRange { mm, page, count } => self.unmerge_range(*mm, *page, *count),
            Op::Chance(chance) => self.world.borrow_mut().chance = *chance,
            Op::Fail(chance) => {
                self.fail = chance.map_or(Fail::Never, |chance| Fail::Random {
                    seed: chance.seed,
                    one_in: chance.one_in,
                });
            }
        }
        self.check();
    }

    /// Whether nothing is merged, as a change of some files needs it.
    fn empty(&mut self) -> bool {
        self.engine.metadata.counters.pages_shared == 0 && self.engine.metadata.remove_all_nodes()
    }

    /// Sets the events that happen while the engine runs.
    fn interleaved(&mut self, events: &[(u32, Event)]) {
        self.world.borrow_mut().interleaved = events.iter().cloned().collect();
    }

    /// Lets the events happen for which the engine made too few steps.
    fn deliver_rest(&mut self) {
        let left: VecDeque<_> = core::mem::take(&mut self.world.borrow_mut().interleaved);
        for (_, event) in left {
            self.happen(event);
        }
    }

    /// What the scanner does before it scans: forgets the mms that have left, and registers those
    /// that were missed.
    pub(crate) fn housekeeping(&mut self) {
        let engine = &mut self.engine;
        self.list.reap(
            |slot, mm| engine.metadata.forget_some(slot, mm, || false),
            || false,
        );
        if self.list.refill(GFP_KERNEL).is_ok()
            && self.list.locked(|registry| registry.take_missed())
        {
            let world = self.world.borrow();
            for key in world.live() {
                world.enter(key);
            }
        }
    }

    /// Scans `budget` pages, or until the full scan ends. Returns whether it ended or could not
    /// begin.
    pub(crate) fn scan(&mut self, mut budget: u32) -> bool {
        self.housekeeping();
        testing::fail(self.fail);
        let (mut over, mut paused) = (false, false);
        while budget > 0 && !over && !paused {
            if !self.list.locked(|registry| registry.begin()) {
                over = true;
                break;
            }
            let Self {
                engine,
                policy,
                buffers,
                pool,
                list,
                world,
                ..
            } = self;
            let step = list.visit(|claim| {
                let (id, mm) = (claim.id(), claim.mm());
                let (before, scanned) = (budget, engine.metadata.counters.pages_scanned);
                let (passes, steps) = (Cell::new(1), world.borrow().steps);
                let pause = || {
                    passes.set(passes.get() + 1);
                    let mut world = world.borrow_mut();
                    world.step();
                    world.count_pause();
                    world.paused
                };
                let target = ScanTarget {
                    slot: id,
                    mm,
                    within: claim.address()..usize::MAX,
                    look: None,
                };
                let mut allowance = Allowance { budget, pause };
                let progress =
                    engine.scan_mm(policy, &**list, &target, &*pool, buffers, &mut allowance);
                budget = allowance.budget;
                let scanned = engine.metadata.counters.pages_scanned - scanned;
                let (paid, steps) = (u64::from(before - budget), world.borrow().steps - steps);
                assert!(paid > 0, "a visit for nothing");
                assert!(scanned <= paid, "pages scanned beyond the budget");
                assert!(
                    paid <= scanned + passes.get() + steps * 4,
                    "{paid} of the budget for {scanned} pages, {steps} steps",
                );
                assert!(progress != Progress::Exiting || mm.exiting());
                Visited {
                    progress,
                    tracked: engine.metadata.tracks(id),
                }
            });
            over = step == Step::End;
            paused = self.world.borrow().paused;
        }
        if let Fail::Random { seed, .. } = &mut self.fail {
            // The next time others fail.
            *seed = seed.wrapping_add(1);
        }
        testing::fail(Fail::Never);
        if over {
            self.engine.end_full_scan();
        }
        over
    }

    /// Looks at an mm as the governor does, which says what number the look has.
    pub(crate) fn look(&mut self, slot: u32, look: u8) {
        self.housekeeping();
        let Self {
            engine,
            policy,
            buffers,
            pool,
            list,
            ..
        } = self;
        list.visit_slot(SlotId(slot), |claim, _| {
            let target = ScanTarget {
                slot: claim.id(),
                mm: claim.mm(),
                within: 0..usize::MAX,
                look: Some(look),
            };
            let mut allowance = Allowance {
                budget: u32::MAX,
                pause: || false,
            };
            let progress =
                engine.scan_mm(policy, &**list, &target, &*pool, buffers, &mut allowance);
            Visited {
                progress,
                tracked: engine.metadata.tracks(claim.id()),
            }
        });
        self.check();
    }

    /// Scans to the end of the full scan that is under way, or of the next one.
    pub(crate) fn full_scan(&mut self) {
        let budget = 40 * self.threads as u32 * self.threads as u32;
        while !self.scan(budget) {}
    }

    fn unmerge(&mut self, mut left: Option<u32>, advised: bool) {
        let (engine, world) = (&mut self.engine, &self.world);
        let result = self.list.unmerge(|claim| {
            let mut world = world.borrow_mut();
            world.step();
            world
                .break_ksm(claim.mm().key(), 0..usize::MAX, &mut left)
                .map_err(|()| ENOMEM)?;
            drop(world);
            engine.metadata.forget_mm(claim.id(), claim.mm());
            Ok(Visited {
                progress: Progress::Done,
                tracked: false,
            })
        });
        self.list.reap(
            |slot, mm| engine.metadata.forget_some(slot, mm, || false),
            || false,
        );
        if result.is_err() {
            return;
        }
        engine.metadata.remove_all_nodes();
        engine.metadata.counters.full_scans = 0;
        self.assert_nothing_known();
        if advised {
            // What is opted in behind the walk may have inherited merged pages.
            return;
        }
        // A page may be left that is mapped where nothing is mergeable, or by an exiting process.
        let world = self.world.borrow();
        for (key, space) in &world.spaces {
            for (addr, pte) in space
                .ptes
                .iter()
                .filter(|(addr, _)| space.mergeable_at(**addr))
            {
                if let Pte::Page(frame) = *pte {
                    let mapping = world.page(frame).mapping;
                    assert_eq!(
                        mapping,
                        Mapping::Anon,
                        "{addr:#x} of {key:#x} is still merged"
                    );
                }
            }
        }
    }

    fn hot_remove(&mut self, block: usize) {
        let frames: Vec<usize> = self.world.borrow().frames.keys().copied().collect();
        let Some(n) = block.checked_rem(frames.len()) else {
            return;
        };
        let start = frames[n] / BLOCK * BLOCK;
        let block = start..start + BLOCK;
        if !self.world.borrow_mut().take_offline(block.clone()) {
            return;
        }
        self.engine.metadata.forget_frames(block.clone());
        let world = self.world.borrow();
        let mut nodes = world.nodes.iter();
        assert!(
            !nodes.any(|(_, node)| block.contains(&node.kpfn)),
            "a node refers to memory that is gone"
        );
    }

    /// No page is known, so that there is nothing to count but nodes whose pages are still mapped.
    pub(crate) fn assert_nothing_known(&self) {
        let counters = self.engine.metadata.counters;
        let none = Counters {
            pages_shared: 0,
            pages_sharing: 0,
            pages_unshared: 0,
            tracked: 0,
            ..counters
        };
        assert_eq!(counters, none);
    }

    /// Checks what has to hold after every step.
    pub(crate) fn check(&mut self) {
        *self.world.borrow().asked.borrow_mut() = Some(Vec::new());
        if let Err(what) = self.engine.metadata.check() {
            panic!("{what}");
        }
        let world = self.world.borrow();
        world.check();
        self.list.locked(|registry| registry.check()).unwrap();

        // Each item is some page's, and no other's.
        let mut asked = world.asked.take().unwrap();
        asked.sort();
        let items: Vec<u64> = world.items.iter().map(|(id, _)| id.into()).collect();
        assert_eq!(asked.iter().map(|id| id.get()).collect::<Vec<_>>(), items);

        let mappings = world.nodes.iter().map(|(_, node)| node.items.len() as u64);
        let mapped: Vec<u64> = mappings.filter(|mappings| *mappings > 0).collect();
        let shared = mapped.len() as u64;
        let chains = chains(&world);
        let several = chains.iter().filter(|chain| chain.len() > 1);
        let tracked: isize = world.spaces.values().map(|space| space.tracked).sum();
        let counters = self.engine.metadata.counters;
        let recounted = Counters {
            pages_shared: shared,
            pages_sharing: mapped.iter().sum::<u64>() - shared,
            stable_node_chains: several.clone().count() as u64,
            stable_node_dups: several.map(|chain| chain.len() as u64).sum(),
            tracked: tracked as u64,
            ..counters
        };
        assert_eq!(counters, recounted);
        assert_eq!(counters.merges, world.merges);
        let not_volatile = counters.pages_shared + counters.pages_sharing + counters.pages_unshared;
        assert!(counters.tracked >= not_volatile);
        let visits = counters.pages_scanned + counters.pages_skipped;
        assert_eq!(visits, world.visits.len() as u64 + self.visits_before);

        for chain in chains {
            let fingerprint = world.nodes.get(chain[0].0).unwrap().meta.fingerprint;
            if fingerprint == Fingerprint::NONE {
                // Left of a pair that could not be merged.
                assert_eq!(chain.len(), 1);
                continue;
            }
            for node in chain {
                let nid = world.nodes.get(node.0).unwrap().nid;
                let domain = if world.merge_across_nodes { 0 } else { nid };
                if let Some(frame) = world.node_frame(node) {
                    let hash = world.hash(world.page(frame).content);
                    assert_eq!(
                        fingerprint,
                        Fingerprint::new(hash, domain),
                        "a node is where its content is not looked for"
                    );
                }
            }
        }
        for &refusal in Refusal::ALL {
            let (counted, given) = (
                self.engine.metadata.refusals.get(refusal),
                world.refusals.get(refusal),
            );
            match refusal {
                // Of the engine's own, where there is no memory for a page's state.
                Refusal::NoMemory => assert!(counted >= given),
                // A page that is gone before the zero page replaces it is not counted as refused.
                Refusal::Gone => assert!(counted <= given),
                _ => assert_eq!(counted, given, "refusals of kind {refusal:?}"),
            }
        }
    }

    /// Ends all that keeps pages from being merged, and scans until nothing changes any more.
    pub(crate) fn scan_until_stable(&mut self) {
        self.run(&Op::Happen(Event::Release));
        self.run(&Op::Chance(None));
        self.run(&Op::Fail(None));
        self.run(&Op::FullScan {
            interleaved: Vec::new(),
        });
        // An unaccessed page is read once in 16 scans, and smart scan skips a page up to 8 times.
        for _ in 0..if self.policy.smart_scan {
            16 * 9 + 40
        } else {
            20
        } {
            let all = self.collectable();
            self.visits_before += self.world.borrow().visits.len() as u64;
            self.world.borrow_mut().visits.clear();
            let zeroes = self.zeroes();
            self.full_scan();
            if self.zeroes() == zeroes {
                self.assert_zero_pages_counted();
            }
            let mut visits = self.world.borrow().visits.clone();
            visits.sort();
            let all: Vec<_> = all
                .into_iter()
                .filter(|page| !self.became_zero(page, &visits))
                .collect();
            assert_eq!(visits, all, "not every page was visited once");
            let max = self.policy.max_page_sharing;
            while !self.engine.metadata.prune(2, max) {}
            self.check();
        }
    }

    /// Whether a split has replaced a page of zeroes before the scan came to it.
    fn became_zero(&self, page: &(usize, usize), visits: &[(usize, usize)]) -> bool {
        let pte = self.world.borrow().spaces[&page.0]
            .ptes
            .get(&page.1)
            .copied();
        pte == Some(Pte::Zero) && visits.binary_search(page).is_err()
    }

    /// The zero pages of each mm.
    fn zeroes(&self) -> Vec<(usize, isize)> {
        let world = self.world.borrow();
        let spaces = world.live().map(|key| (key, &world.spaces[&key]));
        spaces.map(|(key, space)| (key, space.zeroes())).collect()
    }

    /// Asserts that the count of zero pages is right in each mm that is scanned.
    pub(crate) fn assert_zero_pages_counted(&self) {
        let world = self.world.borrow();
        for space in world.live().map(|key| &world.spaces[&key]) {
            if space.mergeable.contains(&true) {
                assert_eq!(
                    space.zero_pages,
                    space.zeroes(),
                    "zero pages are miscounted"
                );
            }
        }
    }

    /// What a full scan has to visit: the pages in mergeable memory.
    pub(crate) fn collectable(&self) -> Vec<(usize, usize)> {
        let world = self.world.borrow();
        let pages = world.spaces.iter().flat_map(|(key, space)| {
            let pages = space
                .ptes
                .iter()
                .filter(|(addr, pte)| matches!(pte, Pte::Page(_)) && space.mergeable_at(**addr));
            pages.map(|(addr, _)| (*key, *addr))
        });
        pages.collect()
    }

    /// Asserts that everything that can be merged is.
    pub(crate) fn assert_all_merged(&self) {
        let world = self.world.borrow();
        let all = self.collectable();
        assert!(
            self.engine.metadata.counters.tracked <= all.len() as u64,
            "pages are tracked that are not there"
        );
        // Pages that are not merged, and whether there is a merged one with room, for each content.
        let mut plain: BTreeMap<Fingerprint, BTreeSet<usize>> = BTreeMap::new();
        for (key, addr) in all {
            let Some(&Pte::Page(frame)) = world.spaces[&key].ptes.get(&addr) else {
                unreachable!();
            };
            let page = world.page(frame);
            let domain = if world.merge_across_nodes {
                0
            } else {
                crate::sim::nid(frame)
            };
            let fingerprint = Fingerprint::new(world.hash(page.content), domain);
            match page.mapping {
                Mapping::Anon => {
                    assert!(
                        page.content != 0 || !self.policy.use_zero_pages,
                        "a page of zeroes is left"
                    );
                    plain.entry(fingerprint).or_default().insert(frame);
                }
                Mapping::Ksm(node) => {
                    assert_eq!(
                        world.item_at(key, addr),
                        Some(node),
                        "a mapping without its item"
                    );
                }
                Mapping::Orphan => panic!("a page without its node"),
            }
        }
        for (fingerprint, frames) in &plain {
            assert_eq!(frames.len(), 1, "pages of one content are not merged");
            let head = world
                .nodes
                .iter()
                .find(|(_, node)| node.meta.head && node.meta.fingerprint == *fingerprint);
            let Some((head, _)) = head else { continue };
            for node in chain(&world, NodeId(head)).into_iter().take(MAX_DUPS_TRIED) {
                let items = world.nodes.get(node.0).unwrap().items.len();
                let room = items > 0 && items < world.max_page_sharing as usize;
                assert!(!room, "a page is not merged, although there is room");
            }
        }
        for chain in chains(&world) {
            let items = |node: &NodeId| world.nodes.get(node.0).unwrap().items.len();
            let head = chain
                .iter()
                .position(|node| world.nodes.get(node.0).unwrap().meta.head);
            let near = (0..MAX_DUPS_TRIED.min(chain.len()))
                .map(|n| chain[(head.unwrap_or(0) + n) % chain.len()]);
            for other in near {
                let fits = |node: &NodeId| {
                    *node != other
                        && items(node) > 0
                        && items(&other) > 0
                        && items(node) + items(&other) <= world.max_page_sharing as usize
                };
                assert!(
                    !chain.iter().any(fits),
                    "two nodes of one content are not joined"
                );
            }
        }
        for (id, node) in world.nodes.iter() {
            let alone = !node.meta.head && node.meta.next == NodeId(id);
            assert!(!alone || node.items.is_empty(), "a node is in no chain");
            let mapped = world
                .node_frame(NodeId(id))
                .is_some_and(|frame| world.page(frame).maps > 0);
            assert!(mapped, "a node without a page is left");
        }
    }

    /// All processes exit, and nothing may be left.
    pub(crate) fn tear_down(mut self) {
        self.world.borrow_mut().chance = None;
        let keys = self.world.borrow().spaces.len();
        for _ in 0..3 {
            for mm in 0..keys {
                let mut world = self.world.borrow_mut();
                let key = world.spaces.keys().nth(mm).copied();
                key.into_iter().for_each(|key| world.exit_step(key));
            }
            self.check();
        }
        self.housekeeping();
        self.assert_nothing_known();
        self.check();
        assert!(self.engine.metadata.remove_all_nodes());
        self.check();
        let world = self.world.borrow();
        assert_eq!(world.frames.len(), 0);
        assert_eq!(world.items.iter().count(), 0);
        assert!(world.spaces.values().all(Space::unpinned), "a pin is lost");
        assert_eq!(self.engine.metadata.nodes(), 0);
        // Room for a few mms is kept.
        assert!(self.engine.metadata.bytes() < 2 * PAGE);
        assert_eq!(
            self.list
                .locked(|registry| registry.len() + registry.nr_left()),
            0
        );
    }
}

/// The nodes of a node's chain, beginning with that node.
fn chain(world: &World, first: NodeId) -> Vec<NodeId> {
    let mut chain = vec![first];
    let next = |node: NodeId| world.nodes.get(node.0).unwrap().meta.next;
    let mut node = next(first);
    while node != first {
        chain.push(node);
        assert!(
            chain.len() <= world.nodes.iter().count(),
            "a chain does not close"
        );
        node = next(node);
    }
    chain
}

/// All chains.
fn chains(world: &World) -> Vec<Vec<NodeId>> {
    let mut chains = Vec::new();
    let mut seen = BTreeSet::new();
    for (id, _) in world.nodes.iter() {
        if !seen.contains(&NodeId(id)) {
            let chain = chain(world, NodeId(id));
            seen.extend(chain.iter().copied());
            chains.push(chain);
        }
    }
    chains
}
