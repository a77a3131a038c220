// SPDX-License-Identifier: GPL-2.0-only

//! Scanning one mm with several threads.
//!
//! A *pass* takes some pages of an mm through these steps. One of the threads, the [`Leader`], alone changes what is kept of
//! pages, which so needs no lock of its own; the steps in italics are done by all threads of the [`Crew`].
//!
//! 1. *Walk*: each lane has a part of the address space of its own, and a batch for what is there. What is known of each page
//!    is looked up.
//! 2. *Hash* what has to be read, slice by slice. Meanwhile the leader sees for each slice that has been hashed which pages
//!    need no more attention.
//! 3. *Merge* pages that are like others. Meanwhile the leader makes ready more merges, and takes note of what came of those
//!    that are done. No two threads merge pages of the same contents at once.
//!
//! Of the last two steps the leader does what nobody else has begun, when it has nothing better to do. With one thread there
//! is one lane, whose walk has no bound.

use super::{
    glance::{
        Deferred,
        Glance,
        Seen,
        LOOKS, //
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
    types::{
        Fingerprint,
        NodeId,
        PageId,
        RANGE_PAGES, //
    },
};
use core::ops::Range;
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// Lanes for each thread, where there are several.
const LANES: usize = 8;

/// Chunks of merges for each thread, where there are several: one that it is at, one that waits, and some that are being
/// taken note of.
const CHUNKS: usize = 4;

/// Most pages of a lane's batch, where there are several: those of one page table, so that threads do not wait for each
/// other's page table lock.
const LANE: usize = RANGE_PAGES;

/// Pages that are hashed at a time.
const SLICE: usize = 64;

/// Merges that are done at a time: enough that it does not matter what handing them over costs.
const CHUNK: usize = 32;

/// Least address space of a lane that has a bound: so much that a batch is large enough for all pages in there.
const MIN_STRIDE: usize = LANE * PAGE_SIZE;

/// Most of it.
const MAX_STRIDE: usize = LOOKS * PAGE_SIZE;

/// Has a crew work, and takes note of what it has done.
pub trait Leader<T> {
    /// What is to be done next; `None` if there is nothing before something that is under way has been finished, or
    /// nothing at all.
    fn next(&mut self) -> Option<T>;

    /// It has been done.
    fn finish(&mut self, job: T);
}

/// Threads that work together.
pub trait Crew {
    /// Has `work` be done with each job of the leader, with several at once, and returns when there is none left. May sleep.
    fn follow<T: Send + Unpin>(&self, leader: &mut impl Leader<T>, work: impl Fn(&mut T) + Sync);

    /// Calls `work` with each of the items, some of them at once, and returns when all is done. May sleep.
    fn each<T: Send>(&self, items: &mut [T], work: impl Fn(&mut T) + Sync) {
        struct Items<'a, T>(core::slice::IterMut<'a, T>);

        impl<'a, T> Leader<&'a mut T> for Items<'a, T> {
            fn next(&mut self) -> Option<&'a mut T> {
                self.0.next()
            }

            fn finish(&mut self, _item: &'a mut T) {}
        }
        self.follow(&mut Items(items.iter_mut()), |item| work(item));
    }
}

/// How far a page of a batch has come.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Step {
    /// It is to be looked up what it is.
    #[default]
    LookUp,
    /// It is to be decided what to do with it.
    Decide,
    /// Nothing more is to be done with it.
    Done,
}

/// What is known of a page of a batch.
#[derive(Clone, Copy, Default)]
pub(super) struct Work {
    pub(super) addr: usize,
    pub(super) page: Option<PageId>,
    pub(super) step: Step,
    pub(super) fingerprint: Fingerprint,
    /// NUMA node, or 0 where pages are merged across nodes.
    pub(super) domain: u32,
    /// What the index had for the fingerprint.
    pub(super) node: Option<NodeId>,
    /// The contents have been read since the walk took the page.
    pub(super) fresh: bool,
    /// Nothing seems to have touched the page since the last full scan.
    pub(super) still: bool,
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
    pub(super) changes: KVec<(PageId, PageState)>,
    pub(super) works: KVec<Work>,
    /// Pages before this one need no attention in this round of merges.
    pub(super) next: usize,
    budget: u32,
}

impl<M: Memory> Lane<M> {
    /// Walks this part of the address space beside other lanes.
    pub(super) fn walk(&mut self, memory: &M, states: &PageStates, walk: &Walk<'_, M::Mm>) {
        memory.clear(&mut self.batch);
        let deferred = Deferred {
            reader: states.reader(),
            changes: &mut self.changes,
        };
        let mut glance = Glance::new(memory, deferred, walk, self.budget, &mut self.seen);
        let batch = &mut self.batch;
        let mut within = self.within.clone();
        loop {
            let room = LANE - memory.len(batch);
            let limit = BATCH
                .min(room)
                .min((self.budget - glance.seen.used) as usize);
            self.found = memory.collect(
                walk.mm,
                within.clone(),
                limit,
                &self.within,
                batch,
                &mut glance,
            );
            match self.found {
                Collected::More(next) if next < within.end => within.start = next,
                _ => break,
            }
            let full = memory.len(batch) == LANE || glance.seen.used == self.budget;
            if full || glance.seen.stopped {
                break;
            }
        }
        self.survey(memory, states, walk);
    }

    /// Walks all of the address space from here on.
    pub(super) fn walk_alone(
        &mut self,
        memory: &M,
        states: &mut PageStates,
        walk: &Walk<'_, M::Mm>,
    ) {
        memory.clear(&mut self.batch);
        let mut glance = Glance::new(memory, &mut *states, walk, self.budget, &mut self.seen);
        let limit = BATCH.min(self.budget as usize);
        let batch = &mut self.batch;
        self.found = memory.collect(
            walk.mm,
            self.within.clone(),
            limit,
            &(0..usize::MAX),
            batch,
            &mut glance,
        );
        self.survey(memory, states, walk);
    }

    /// Looks up what is known of the pages in the batch.
    fn survey(&mut self, memory: &M, states: &PageStates, walk: &Walk<'_, M::Mm>) {
        let mut states = states.reader();
        let batch = &self.batch;
        for i in 0..memory.len(batch) {
            let mut work = Work {
                addr: memory.addr(batch, i),
                ..Work::default()
            };
            let known = states.at(walk.slot, work.addr);
            if let (Some((page, PageState::Tracked { fingerprint, .. })), PageKind::Plain) =
                (known, memory.kind(batch, i))
            {
                work.page = Some(page);
                work.fingerprint = fingerprint;
                walk.read(memory, batch, i, &mut work);
                work.step = Step::Decide;
            }
            // A batch has no more pages than there is room for.
            let _ = self.works.push_within_capacity(work);
        }
    }

    /// What is to be hashed of the batch.
    pub(super) fn slices(&mut self) -> impl Iterator<Item = Slice<'_, M>> {
        let batch = &self.batch;
        let slices = self.works.chunks_mut(SLICE).enumerate();
        slices.map(move |(n, works)| Slice {
            batch,
            first: n * SLICE,
            works,
        })
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
}

/// Some pages of a batch.
pub(super) struct Slice<'a, M: Memory> {
    pub(super) batch: &'a M::Batch,
    /// Number of the first one in the batch.
    pub(super) first: usize,
    pub(super) works: &'a mut [Work],
}

impl<M: Memory> Slice<'_, M> {
    /// Hashes the contents that have to be read.
    pub(super) fn hash(&mut self, key: &M::Key) {
        for (i, work) in self.works.iter_mut().enumerate() {
            if work.fresh && work.step == Step::Decide {
                let hash = M::hash_by(key, self.batch, self.first + i);
                work.fingerprint = Fingerprint::new(hash, work.domain);
            }
        }
    }
}

/// Merges that are ready, of one lane.
pub(super) type Chunk<M> = KVec<Pending<M>>;

/// What the threads of a crew need for a pass.
pub struct Lanes<M: Memory> {
    lanes: KVec<Lane<M>>,
    /// Room for merges that are ready. How much there is bounds how many can be under way.
    pub(super) spare: KVec<Chunk<M>>,
    /// What the merges that are under way are of.
    pub(super) busy: KBox<Busy>,
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
        let (lanes, pages, chunks) = if size > 1 {
            (size * LANES, LANE, size * CHUNKS)
        } else {
            (1, BATCH, 1)
        };
        let mut this = Self {
            lanes: KVec::with_capacity(lanes, GFP_KERNEL)?,
            spare: KVec::with_capacity(chunks, GFP_KERNEL)?,
            busy: KBox::new(Busy::new(), GFP_KERNEL)?,
            stride: MIN_STRIDE,
        };
        for _ in 0..chunks {
            this.spare
                .push(KVec::with_capacity(CHUNK, GFP_KERNEL)?, GFP_KERNEL)?;
        }
        for _ in 0..lanes {
            let lane = Lane {
                batch: batch(pages)?,
                within: 0..0,
                found: Collected::End,
                seen: Seen::default(),
                changes: KVec::with_capacity(if size > 1 { LOOKS } else { 0 }, GFP_KERNEL)?,
                works: KVec::with_capacity(pages, GFP_KERNEL)?,
                next: 0,
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
        // Whole page tables, if there are several to be had.
        let parts = match budget as usize / LANE {
            0 | 1 => (budget as usize).div_ceil(BATCH),
            tables => tables,
        };
        let lanes = self.lanes.len().min(parts).max(1);
        let share = budget / lanes as u32;
        // A lane comes by no more pages than its share.
        let stride = self.stride.min(share as usize * PAGE_SIZE);
        // No page table is of two lanes, nor a huge page.
        let grain = if stride < MIN_STRIDE {
            PAGE_SIZE
        } else {
            MIN_STRIDE
        };
        let mut start = at;
        for (l, lane) in self.lanes.iter_mut().take(lanes).enumerate() {
            let last = l + 1 == lanes;
            let end = match last {
                true => usize::MAX,
                false => start.saturating_add(stride) / grain * grain,
            };
            lane.within = start..end;
            lane.seen = Seen {
                from: start,
                ..Seen::default()
            };
            lane.works.clear();
            lane.next = 0;
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

    /// Begins another round of merges.
    pub(super) fn rewind(&mut self) {
        for lane in &mut self.lanes {
            let done = lane.works.iter().take_while(|w| w.step == Step::Done);
            lane.next = done.count();
        }
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
pub(super) struct Busy([u16; Self::PLACES]);

impl Busy {
    const PLACES: usize = 1024;

    const fn new() -> Self {
        Self([0; Self::PLACES])
    }

    fn place(&mut self, fingerprint: Fingerprint) -> Option<&mut u16> {
        self.0
            .get_mut(fingerprint.to_bits() as usize % Self::PLACES)
    }

    /// Whether the contents may be among them; not, surely, where none has been added.
    pub(super) fn may_have(&mut self, fingerprint: Fingerprint) -> bool {
        self.place(fingerprint).is_some_and(|count| *count != 0)
    }

    pub(super) fn add(&mut self, fingerprint: Fingerprint) {
        if let Some(count) = self.place(fingerprint) {
            *count += 1;
        }
    }

    pub(super) fn remove(&mut self, fingerprint: Fingerprint) {
        if let Some(count) = self.place(fingerprint) {
            *count -= 1;
        }
    }
}
