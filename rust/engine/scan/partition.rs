// SPDX-License-Identifier: GPL-2.0-only

//! Partitions of the address space, each with a walk and a batch of its own.

use super::super::{
    backend::{
        Backend,
        Batch,
        Collected,
        HugeId,
        PageKind, //
    },
    page_state::{
        PageState,
        PageStates, //
    },
    types::{
        Fingerprint,
        PageId,
        RANGE_PAGES, //
    },
};
use super::{
    context::ScanContext,
    page_filter::{
        Deferred,
        PageFilter,
        WalkSummary,
        MAX_GAPS,
        MAX_PAGES_PER_WALK, //
    },
    scanned_page::{
        PageStatus,
        ScannedPage, //
    },
};
use core::ops::Range;
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// Most pages of one walk. Bounds what is done under one mmap lock.
const WALK_PAGES: usize = 64;

/// Partitions for each thread, where there are several threads.
const PARTITIONS_PER_WORKER: usize = 8;

/// Most pages of a partition's batch, where there are several threads: those of one page table, so
/// that threads do not contend for a page table lock.
const BATCH_PAGES: usize = RANGE_PAGES;

/// Pages of one hash job.
const HASH_JOB_PAGES: usize = 64;

/// Smallest partition with a bound, in bytes: its batch has room for all pages in it.
const MIN_SIZE: usize = BATCH_PAGES * PAGE_SIZE;

/// Largest partition with a bound, in bytes.
const MAX_SIZE: usize = MAX_PAGES_PER_WALK * PAGE_SIZE;

/// A page of a pass: its partition, and its number in the batch.
#[derive(Clone, Copy)]
pub(super) struct PagePos {
    pub(super) partition: usize,
    pub(super) index: usize,
}

/// A part of the address space, and the pages found there.
pub(super) struct Partition<B: Backend> {
    pub(super) batch: B::Batch,
    pub(super) within: Range<usize>,
    pub(super) found: Collected,
    pub(super) summary: WalkSummary,
    /// Changes of page states, kept until all partitions have been walked.
    pub(super) changes: KVec<(PageId, PageState)>,
    pub(super) pages: KVec<ScannedPage>,
    /// Pages before this one need no attention in this round of merges.
    pub(super) next: usize,
    /// A huge folio that could not be split in this pass.
    pub(super) unsplittable: Option<HugeId>,
    budget: u32,
}

impl<B: Backend> Partition<B> {
    /// Walks this partition while others are walked.
    pub(super) fn walk(&mut self, backend: &B, states: &PageStates, ctx: &ScanContext<'_, B::Mm>) {
        self.batch.clear();
        let deferred = Deferred {
            reader: states.reader(),
            changes: &mut self.changes,
        };
        let mut filter = PageFilter::new(backend, deferred, ctx, self.budget, &mut self.summary);
        let batch = &mut self.batch;
        let mut within = self.within.clone();
        loop {
            let room = BATCH_PAGES - batch.nr_pages();
            let limit = WALK_PAGES
                .min(room)
                .min((self.budget - filter.summary.budget_used) as usize);
            self.found = backend.collect(
                ctx.mm,
                within.clone(),
                limit,
                &self.within,
                batch,
                &mut filter,
            );
            match self.found {
                Collected::More(next) if next < within.end => within.start = next,
                Collected::Busy if within.start > self.within.start => {
                    self.found = Collected::More(within.start);
                    break;
                }
                _ => break,
            }
            let full = batch.nr_pages() == BATCH_PAGES || filter.summary.budget_used == self.budget;
            if full || filter.summary.stopped {
                break;
            }
        }
        // The changes of this walk are yet to be applied.
        self.look_up_collected(backend, states, ctx, 1);
    }

    /// Walks the only partition, alone.
    pub(super) fn walk_single(
        &mut self,
        backend: &B,
        states: &mut PageStates,
        ctx: &ScanContext<'_, B::Mm>,
    ) {
        self.batch.clear();
        let mut filter =
            PageFilter::new(backend, &mut *states, ctx, self.budget, &mut self.summary);
        let limit = WALK_PAGES.min(self.budget as usize);
        let batch = &mut self.batch;
        self.found = backend.collect(
            ctx.mm,
            self.within.clone(),
            limit,
            &(0..usize::MAX),
            batch,
            &mut filter,
        );
        self.look_up_collected(backend, states, ctx, 0);
    }

    /// Looks up what is known of the collected pages. `uncounted` is added to their ages.
    fn look_up_collected(
        &mut self,
        backend: &B,
        states: &PageStates,
        ctx: &ScanContext<'_, B::Mm>,
        uncounted: u8,
    ) {
        let mut states = states.reader();
        let batch = &self.batch;
        for i in 0..batch.nr_pages() {
            let mut page = ScannedPage {
                addr: batch.addr(i),
                ..ScannedPage::default()
            };
            let known = states.at(ctx.slot, page.addr);
            if let Some((id, PageState::Tracked(tracked))) = known {
                if backend.kind(batch, i) == PageKind::Plain {
                    page.recall(id, tracked);
                    page.age += uncounted;
                    page.read(ctx, batch, i);
                    page.status = PageStatus::Classified;
                }
            }
            // A batch has no more pages than there is room for.
            let _ = self.pages.push_within_capacity(page);
        }
    }

    /// Cuts the batch into hash jobs.
    pub(super) fn hash_jobs(&mut self) -> impl Iterator<Item = HashJob<'_, B::Batch>> {
        let batch = &self.batch;
        let jobs = self.pages.chunks_mut(HASH_JOB_PAGES).enumerate();
        jobs.map(move |(n, pages)| HashJob {
            batch,
            first: n * HASH_JOB_PAGES,
            pages,
        })
    }

    /// Returns whether the walk ended before the end of the partition.
    pub(super) fn stopped(&self) -> bool {
        match self.found {
            Collected::More(next) => next < self.within.end,
            Collected::Busy => true,
            Collected::End | Collected::Exiting => false,
        }
    }

    /// Adds the pages to `pages` whose accessed bits the walk has cleared, although not all of them
    /// are looked at now: none if the walk was `dropped`.
    pub(super) fn add_cleared_ahead(&self, dropped: bool, pages: &mut Range<usize>) {
        add(pages, self.batch.cleared_beyond());
        if dropped {
            let known = |page: &&ScannedPage| page.status == PageStatus::Classified;
            for page in self.pages.iter().filter(known) {
                if !page.unaccessed {
                    add(pages, page.addr..page.addr + PAGE_SIZE);
                }
            }
        }
    }

    /// Drops what the walk has found. The next pass repeats the walk.
    pub(super) fn discard(&mut self) {
        self.changes.clear();
        self.batch.clear();
    }

    /// Changes what is known of a page of the batch.
    pub(super) fn set_page(&mut self, i: usize, page: ScannedPage) {
        if let Some(entry) = self.pages.get_mut(i) {
            *entry = page;
        }
    }
}

/// Extends `pages` to those of `more`, and to what lies between.
fn add(pages: &mut Range<usize>, more: Range<usize>) {
    if (*pages).is_empty() {
        *pages = more;
    } else if !more.is_empty() {
        *pages = pages.start.min(more.start)..pages.end.max(more.end);
    }
}

/// Some pages of a batch, whose contents are hashed by one thread.
pub(super) struct HashJob<'a, T: Batch> {
    pub(super) batch: &'a T,
    /// Number of the first page in the batch.
    pub(super) first: usize,
    pub(super) pages: &'a mut [ScannedPage],
}

impl<T: Batch> HashJob<'_, T> {
    /// Hashes the contents that have to be read.
    pub(super) fn run(&mut self, key: &T::Key) {
        for (i, page) in self.pages.iter_mut().enumerate() {
            if page.rehashed && page.status == PageStatus::Classified {
                let hash = self.batch.hash(self.first + i, key);
                page.fingerprint = Fingerprint::new(hash, page.domain);
            }
        }
    }
}

/// The partitions of a pass.
pub(super) struct Partitions<B: Backend> {
    partitions: KVec<Partition<B>>,
    /// Bytes of address space of each partition but the last.
    size: usize,
}

impl<B: Backend> Partitions<B> {
    /// Creates the partitions for a number of threads. `batch` creates empty batches with room for
    /// so many pages.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn new(
        threads: usize,
        mut batch: impl FnMut(usize) -> Result<B::Batch>,
    ) -> Result<Self> {
        // A bounded partition has room for all gaps that there can be: if its walk stopped at one,
        // those of the partitions after it would be in vain.
        let (count, pages, changes, gaps) = if threads > 1 {
            (
                threads * PARTITIONS_PER_WORKER,
                BATCH_PAGES,
                MAX_PAGES_PER_WALK,
                MAX_PAGES_PER_WALK / 2,
            )
        } else {
            (1, WALK_PAGES, 0, MAX_GAPS)
        };
        let mut partitions = KVec::with_capacity(count, B::GFP)?;
        for _ in 0..count {
            let partition = Partition {
                batch: batch(pages)?,
                within: 0..0,
                found: Collected::End,
                summary: WalkSummary::new(gaps, B::GFP)?,
                changes: KVec::with_capacity(changes, B::GFP)?,
                pages: KVec::with_capacity(pages, B::GFP)?,
                next: 0,
                unsplittable: None,
                budget: 0,
            };
            partitions.push(partition, B::GFP)?;
        }
        Ok(Self {
            partitions,
            size: MIN_SIZE,
        })
    }

    /// Returns the number of partitions.
    pub(super) fn count(&self) -> usize {
        self.partitions.len()
    }

    /// Begins a pass over up to `budget` pages of these addresses, from the first on. Returns how
    /// many partitions take part.
    pub(super) fn begin_pass(&mut self, within: Range<usize>, budget: u32) -> usize {
        // Whole page tables, if the budget is enough for several.
        let parts = match budget as usize / BATCH_PAGES {
            0 | 1 => (budget as usize).div_ceil(WALK_PAGES),
            tables => tables,
        };
        let count = self.partitions.len().min(parts).max(1);
        let share = budget / count as u32;
        // A partition has no more pages than its share of the budget.
        let size = self.size.min(share as usize * PAGE_SIZE);
        // Neither a page table nor a huge page is part of two partitions.
        let alignment = if size < MIN_SIZE { PAGE_SIZE } else { MIN_SIZE };
        let Range {
            mut start,
            end: all,
        } = within;
        for (n, partition) in self.partitions.iter_mut().take(count).enumerate() {
            let last = n + 1 == count;
            let end = match last {
                true => all,
                false => (start.saturating_add(size) / alignment * alignment).min(all),
            };
            partition.within = start..end;
            partition.summary.begin(start);
            partition.pages.clear();
            partition.next = 0;
            partition.unsplittable = None;
            // The remainder of the budget goes to the first partition.
            partition.budget = share + if n == 0 { budget % count as u32 } else { 0 };
            start = end;
        }
        for partition in self.partitions.iter_mut().skip(count) {
            partition.within = 0..0;
            // A page of the pass before that it still holds could not be merged in this one.
            partition.batch.clear();
        }
        count
    }

    /// Adapts the size of partitions to the density of the pages: as large as possible with room
    /// in each batch. `used` partitions had room; others were discarded if they were `too_large`.
    pub(super) fn adapt_size(&mut self, used: usize, too_large: bool) {
        let bounded = self
            .partitions
            .get(..used.saturating_sub(1))
            .unwrap_or_default();
        if too_large {
            self.size = (self.size / 2).max(MIN_SIZE);
        } else if bounded
            .iter()
            .all(|partition| partition.pages.len() <= BATCH_PAGES / 4)
        {
            self.size = (self.size * 2).min(MAX_SIZE);
        }
    }

    /// Returns all partitions.
    pub(super) fn all(&mut self) -> &mut [Partition<B>] {
        &mut self.partitions
    }

    /// Returns the first `n` partitions.
    pub(super) fn first(&mut self, n: usize) -> &mut [Partition<B>] {
        self.partitions.get_mut(..n).unwrap_or_default()
    }

    /// Returns a partition.
    pub(super) fn get_mut(&mut self, partition: usize) -> Option<&mut Partition<B>> {
        self.partitions.get_mut(partition)
    }

    /// Begins another round of merges.
    pub(super) fn begin_round(&mut self) {
        for partition in &mut self.partitions {
            let done = partition
                .pages
                .iter()
                .take_while(|page| page.status == PageStatus::Done);
            partition.next = done.count();
        }
    }

    /// Returns the partition of a page, and what is known of the page.
    pub(super) fn page(&mut self, pos: PagePos) -> Option<(&mut Partition<B>, ScannedPage)> {
        let partition = self.partitions.get_mut(pos.partition)?;
        let page = *partition.pages.get(pos.index)?;
        Some((partition, page))
    }

    /// Changes what is known of a page.
    pub(super) fn set_page(&mut self, pos: PagePos, page: ScannedPage) {
        if let Some(partition) = self.partitions.get_mut(pos.partition) {
            partition.set_page(pos.index, page);
        }
    }

    /// Finds the batch that may hold a reference to the page at `addr` of the mm that is scanned.
    pub(super) fn find(&mut self, addr: usize) -> Option<(&mut Partition<B>, usize)> {
        let partition = self
            .partitions
            .iter_mut()
            .find(|partition| partition.within.contains(&addr))?;
        let i = partition
            .pages
            .binary_search_by_key(&addr, |page| page.addr)
            .ok()?;
        Some((partition, i))
    }
}
