// SPDX-License-Identifier: GPL-2.0

//! Scanning one mm with several threads.
//!
//! A *pass* takes some pages of an mm through these steps; those in italics are done by all threads of the [`Crew`] at
//! once, the others by one of them while the rest wait:
//!
//! 1. *Collect*, and *hash* what has to be read: each lane has a part of the address space of its own, and a batch for what
//!    is there.
//! 2. Look up what is known of each page.
//! 3. Decide about each page, and make ready the merges, no two of which are of the same contents.
//! 4. *Merge*.
//! 5. Take note of what came of that; on with 3 until there is nothing left to decide.
//!
//! So what is kept of pages changes while one thread is at it alone, and needs no lock of its own. Each step that many do
//! costs a wake-up, which is why there are few. With one thread there is one lane, whose walk has no bound.

use super::{
    glance::{
        Deferred,
        Glance,
        Seen,
        LOOKS, //
    },
    ids::{
        Fingerprint,
        PageRef,
        RANGE_PAGES, //
    },
    memory::{
        Collected,
        Memory,
        PageKind, //
    },
    page_state::{
        PageState,
        PageStates, //
    },
    scan::{
        Pending,
        Walk,
        BATCH, //
    },
};
use core::ops::Range;
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// Lanes for each thread, where there are several.
const LANES: usize = 2;

/// Most pages of a lane's batch, where there are several: those of one page table, so that threads do not wait for each
/// other's page table lock.
const LANE: usize = RANGE_PAGES;

/// Merges that are made ready at a time, for each thread: enough that a wake-up is small beside the work.
const MERGES: usize = 128;

/// Least address space of a lane that has a bound: so much that a batch is large enough for all pages in there.
const MIN_STRIDE: usize = LANE * PAGE_SIZE;

/// Most of it.
const MAX_STRIDE: usize = LOOKS * PAGE_SIZE;

/// Threads that work together.
pub trait Crew {
    /// Calls `work` with each of the items, some of them at once, and returns when all is done. May sleep.
    fn each<T: Send>(&self, items: &mut [T], work: impl Fn(&mut T) + Sync);
}

/// How far a page of a batch has come.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Step {
    /// It is to be decided what to do with it.
    Decide,
    /// Nothing more is to be done with it.
    #[default]
    Done,
}

/// What is known of a page of a batch.
#[derive(Clone, Copy, Default)]
pub(super) struct Work {
    pub(super) addr: usize,
    pub(super) page: Option<PageRef>,
    pub(super) step: Step,
    pub(super) fingerprint: Fingerprint,
    /// NUMA node, or 0 where pages are merged across nodes.
    pub(super) domain: u32,
    /// The contents have been read since the walk took the page.
    pub(super) fresh: bool,
    /// Nothing seems to have touched the page since the last full scan.
    pub(super) still: bool,
    /// It has been seen whether the contents are what they were.
    pub(super) compared: bool,
    /// The zero page was tried.
    pub(super) zero_tried: bool,
    /// A stable node was tried.
    pub(super) node_tried: bool,
    /// Candidates that were tried.
    pub(super) tries: u8,
    /// The next candidate to try.
    pub(super) nth: u8,
    /// Another address has the very page.
    pub(super) same: bool,
}

/// A part of an address space, and what is found there.
pub(super) struct Lane<M: Memory> {
    pub(super) batch: M::Batch,
    pub(super) within: Range<usize>,
    pub(super) found: Collected,
    pub(super) seen: Seen,
    /// Changes of page states that wait until all lanes have been walked.
    pub(super) changes: KVec<(PageRef, PageState)>,
    pub(super) works: KVec<Work>,
    /// Pages before this one need no more attention.
    pub(super) undone: usize,
    /// Hashes of pages that were read in the walk.
    hashes: KVec<Option<u64>>,
    budget: u32,
}

impl<M: Memory> Lane<M> {
    /// Walks this part of the address space beside other lanes.
    pub(super) fn walk(&mut self, memory: &M, states: &PageStates, walk: &Walk<'_, M::Mm>) {
        memory.clear(&mut self.batch);
        let mut reader = states.reader();
        let states = Deferred {
            reader: states.reader(),
            changes: &mut self.changes,
        };
        let mut glance = Glance::new(memory, states, walk, self.budget, &mut self.seen);
        let batch = &mut self.batch;
        let mut within = self.within.clone();
        loop {
            let room = LANE - memory.len(batch);
            let limit = BATCH
                .min(room)
                .min((self.budget - glance.seen.used) as usize);
            self.found = memory.collect(walk.mm, within.clone(), limit, false, batch, &mut glance);
            match self.found {
                Collected::More(next) if next < within.end => within.start = next,
                _ => break,
            }
            let full = memory.len(batch) == LANE || glance.seen.used == self.budget;
            if full || glance.seen.stopped {
                break;
            }
        }
        for i in 0..memory.len(batch) {
            let known = reader.at(walk.slot, memory.addr(batch, i));
            let fresh = memory.kind(batch, i) == PageKind::Plain
                && walk
                    .reading(memory, batch, i, known.map(|(_, state)| state))
                    .is_some_and(|(_, fresh)| fresh);
            let hash = fresh.then(|| memory.hash(batch, i));
            // A batch has no more pages than there is room for.
            let _ = self.hashes.push_within_capacity(hash);
        }
    }

    /// Walks all of the address space from here on.
    pub(super) fn walk_alone(
        &mut self,
        memory: &M,
        states: &mut PageStates,
        walk: &Walk<'_, M::Mm>,
    ) {
        memory.clear(&mut self.batch);
        let mut glance = Glance::new(memory, states, walk, self.budget, &mut self.seen);
        let limit = BATCH.min(self.budget as usize);
        let batch = &mut self.batch;
        self.found = memory.collect(
            walk.mm,
            self.within.clone(),
            limit,
            true,
            batch,
            &mut glance,
        );
    }

    /// Whether the walk ended before the end of its part.
    pub(super) fn stopped(&self) -> bool {
        matches!(self.found, Collected::More(next) if next < self.within.end)
    }

    /// Changes what is known of a page of the batch.
    pub(super) fn set_work(&mut self, i: usize, work: Work) {
        if let Some(place) = self.works.get_mut(i) {
            *place = work;
        }
    }

    /// The hash of a page's contents, which have been read in the walk, or are now.
    pub(super) fn hash(&self, memory: &M, i: usize) -> u64 {
        let hash = self.hashes.get(i).copied().flatten();
        hash.unwrap_or_else(|| memory.hash(&self.batch, i))
    }
}

/// What the threads of a crew need for a pass.
pub struct Lanes<M: Memory> {
    lanes: KVec<Lane<M>>,
    /// Merges that are ready.
    pub(super) merges: KVec<Pending<M>>,
    /// Address space of each lane but the last.
    stride: usize,
}

impl<M: Memory> Lanes<M> {
    /// What a crew of `size` threads needs. `batch` makes empty batches with room for so many pages.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub fn new(size: usize, mut batch: impl FnMut(usize) -> Result<M::Batch>) -> Result<Self> {
        let (lanes, pages) = if size > 1 {
            (size * LANES, LANE)
        } else {
            (1, BATCH)
        };
        let mut this = Self {
            lanes: KVec::with_capacity(lanes, GFP_KERNEL)?,
            merges: KVec::with_capacity(size * MERGES, GFP_KERNEL)?,
            stride: MIN_STRIDE,
        };
        for _ in 0..lanes {
            let lane = Lane {
                batch: batch(pages)?,
                within: 0..0,
                found: Collected::End,
                seen: Seen::default(),
                changes: KVec::with_capacity(if size > 1 { LOOKS } else { 0 }, GFP_KERNEL)?,
                works: KVec::with_capacity(pages, GFP_KERNEL)?,
                undone: 0,
                hashes: KVec::with_capacity(if size > 1 { pages } else { 0 }, GFP_KERNEL)?,
                budget: 0,
            };
            this.lanes.push(lane, GFP_KERNEL)?;
        }
        Ok(this)
    }

    /// How many lanes there are.
    pub fn count(&self) -> usize {
        self.lanes.len()
    }

    /// Begins a pass at `at` over up to `budget` pages. Returns how many lanes take part.
    pub(super) fn open(&mut self, at: usize, budget: u32) -> usize {
        let batches = (budget as usize).div_ceil(BATCH);
        let lanes = self.lanes.len().min(batches).max(1);
        let share = budget / lanes as u32;
        // A lane comes by no more pages than its share.
        let stride = self.stride.min(share as usize * PAGE_SIZE);
        let mut start = at;
        for (l, lane) in self.lanes.iter_mut().take(lanes).enumerate() {
            let last = l + 1 == lanes;
            let end = match last {
                true => usize::MAX,
                false => start.saturating_add(stride),
            };
            lane.within = start..end;
            lane.seen = Seen {
                from: start,
                ..Seen::default()
            };
            lane.works.clear();
            lane.undone = 0;
            lane.hashes.clear();
            // What cannot be shared out evenly is the first one's.
            lane.budget = share + if l == 0 { budget % lanes as u32 } else { 0 };
            start = end;
        }
        for lane in self.lanes.iter_mut().skip(lanes) {
            lane.within = 0..0;
        }
        lanes
    }

    /// Has the lanes' parts be as large as they can be with room in each batch for what is there: `used` lanes have looked up
    /// their pages, and others were given up if the parts were too large.
    pub(super) fn fit(&mut self, used: usize, too_large: bool) {
        let bounded = self.lanes.get(..used.saturating_sub(1)).unwrap_or_default();
        if too_large {
            self.stride = (self.stride / 2).max(MIN_STRIDE);
        } else if bounded.iter().all(|lane| lane.works.len() <= LANE / 4) {
            self.stride = (self.stride * 2).min(MAX_STRIDE);
        }
    }

    /// All lanes.
    pub(super) fn all(&mut self) -> &mut [Lane<M>] {
        &mut self.lanes
    }

    /// The first `n` lanes.
    pub(super) fn first(&mut self, n: usize) -> &mut [Lane<M>] {
        self.lanes.get_mut(..n).unwrap_or_default()
    }

    /// A lane.
    pub(super) fn get(&mut self, l: usize) -> Option<&mut Lane<M>> {
        self.lanes.get_mut(l)
    }

    /// Pages in a lane's batch.
    pub(super) fn works(&self, l: usize) -> usize {
        self.lanes.get(l).map_or(0, |lane| lane.works.len())
    }

    /// Where in a lane's batch pages begin that need attention.
    pub(super) fn undone(&mut self, l: usize) -> usize {
        let Some(lane) = self.lanes.get_mut(l) else {
            return 0;
        };
        let rest = lane.works.get(lane.undone..).unwrap_or_default();
        let done = rest.iter().take_while(|work| work.step == Step::Done);
        lane.undone += done.count();
        lane.undone
    }

    /// How far a page of a batch has come.
    pub(super) fn step(&self, l: usize, i: usize) -> Step {
        let work = self.lanes.get(l).and_then(|lane| lane.works.get(i));
        work.map_or(Step::Done, |work| work.step)
    }

    /// What is known of a page of a batch, and its lane.
    pub(super) fn get_work(&mut self, l: usize, i: usize) -> Option<(&mut Lane<M>, Work)> {
        let lane = self.lanes.get_mut(l)?;
        let work = *lane.works.get(i)?;
        Some((lane, work))
    }

    /// Where the page at `addr` of the mm that is scanned is in a batch.
    pub(super) fn find(&mut self, addr: usize) -> Option<(&mut Lane<M>, usize)> {
        let lane = self
            .lanes
            .iter_mut()
            .find(|lane| lane.within.contains(&addr))?;
        let i = lane
            .works
            .binary_search_by_key(&addr, |work| work.addr)
            .ok()?;
        Some((lane, i))
    }
}

/// Fingerprints of the contents that are being merged, most likely.
pub(super) struct Busy([u64; 64]);

impl Busy {
    pub(super) const fn new() -> Self {
        Self([0; 64])
    }

    fn place(fingerprint: Fingerprint) -> (usize, u64) {
        let bits = fingerprint.to_bits() as usize;
        (bits / 64 % 64, 1 << (bits % 64))
    }

    /// Whether the contents may be among them; not, surely, where none has been added.
    pub(super) fn may_have(&self, fingerprint: Fingerprint) -> bool {
        let (word, bit) = Self::place(fingerprint);
        self.0.get(word).is_some_and(|word| word & bit != 0)
    }

    pub(super) fn add(&mut self, fingerprint: Fingerprint) {
        let (word, bit) = Self::place(fingerprint);
        if let Some(word) = self.0.get_mut(word) {
            *word |= bit;
        }
    }
}
