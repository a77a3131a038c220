// SPDX-License-Identifier: GPL-2.0-only

//! The scan of an mm: decides what becomes of each page, as `cmp_and_merge_page()`.
//!
//! A page is merged after its contents have not changed from one full scan to the next: with the
//! KSM page of the same contents if there is one, else with another page that has not changed, a
//! *candidate*. Both are looked up in one content index by a fingerprint. The [`Backend`] compares
//! the contents themselves when the page is write-protected, so a wrong answer of the index does no
//! harm.
//!
//! Contents are not read again while the accessed bit is clear ([`AccessedHint`]). What is known of
//! them may then be out of date. The cost is a merge that fails, or one that happens some scans
//! later.
//!
//! # A pass
//!
//! A *pass* takes some pages of an mm through these stages. One thread runs the stages. Only this
//! thread changes the metadata, which therefore needs no lock of its own. All threads of the
//! [`WorkerPool`] run the jobs.
//!
//! 1. *Walk*: each partition is a part of the address space with a batch for the pages there. What
//!    is known of each page is looked up.
//! 2. *Hash* the contents that have to be read, job by job. Meanwhile the stage compares the pages
//!    of completed jobs with what is known: most need no more attention.
//! 3. *Merge* pages that have an equal. Meanwhile the stage prepares more merges, and records the
//!    results. No two threads merge pages of the same contents at once.
//!
//! The thread that runs a stage also runs jobs while the stage has nothing to do. With one thread
//! there is one partition, which has no end.
//!
//! # Context
//!
//! The engine is a plain value, protected by the `thread_mutex`. The scanner holds it for one
//! batch, a write to `run` for as long as it unmerges.

mod context;
mod hash_stage;
mod in_flight;
mod merge_stage;
mod page_filter;
mod partition;
mod scanned_page;
mod zero_count;

use super::{
    accessed::AccessedHint,
    backend::{
        Backend,
        Batch,
        Collected, //
    },
    metadata::Metadata,
    policy::Policy,
    types::{
        Progress,
        SlotId, //
    },
    worker_pool::WorkerPool,
};
use context::ScanContext;
use core::ops::Range;
use hash_stage::HashStage;
use kernel::prelude::*;
use merge_stage::{
    MergeBuffers,
    MergeStage, //
};
use partition::{
    Partition,
    Partitions, //
};
use zero_count::ZeroPageCount;

pub use context::Pins;

/// The memory that a pass works in, for a number of threads.
pub struct PassBuffers<B: Backend> {
    partitions: Partitions<B>,
    merges: MergeBuffers<B>,
}

impl<B: Backend> PassBuffers<B> {
    /// Creates the buffers for a number of threads. `batch` creates empty batches with room for so
    /// many pages.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub fn new(threads: usize, batch: impl FnMut(usize) -> Result<B::Batch>) -> Result<Self> {
        Ok(Self {
            partitions: Partitions::new(threads, batch)?,
            merges: MergeBuffers::new(threads)?,
        })
    }

    /// Returns the number of partitions.
    pub fn partitions(&self) -> usize {
        self.partitions.count()
    }
}

/// The mm that is scanned, and where.
pub struct ScanTarget<'a, Mm> {
    /// The slot of the mm.
    pub slot: SlotId,
    /// The mm.
    pub mm: &'a Mm,
    /// The addresses.
    pub within: Range<usize>,
    /// The number of this look at them, where the visit does not belong to a full scan from one end
    /// of the mm to the other.
    pub look: Option<u8>,
}

/// What a visit may take.
pub struct Allowance<F> {
    /// Pages that may be scanned.
    pub budget: u32,
    /// Returns whether the scan has to end. Called after each pass.
    pub pause: F,
}

/// What is known of all pages, and the scan of them.
pub struct Engine<B: Backend> {
    /// What is known.
    pub metadata: Metadata<B>,
    hint: AccessedHint,
    /// Walks have cleared accessed bits since TLBs were flushed.
    cleared: bool,
    /// The mm that was scanned last, and [`ScanContext::cleared_ahead`].
    cleared_ahead: (SlotId, Range<usize>),
    zero_pages: Option<ZeroPageCount>,
}

impl<B: Backend> Engine<B> {
    /// Creates an engine that knows no page, without allocating.
    pub fn new(backend: B) -> Self {
        Self {
            metadata: Metadata::new(backend),
            hint: AccessedHint::new(),
            cleared: false,
            cleared_ahead: (SlotId(0), 0..0),
            zero_pages: None,
        }
    }

    /// Scans addresses of an mm until they end or nothing is allowed any more, with all threads of
    /// the pool.
    ///
    /// A pass takes at least a page of the budget, also where there are no pages, or only those
    /// that smart scan skips.
    ///
    /// The full scan that is under way goes on as if there had been no scan of vouched pages.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn scan_mm<P: Pins<B::Mm>>(
        &mut self,
        policy: &Policy,
        pins: &P,
        target: &ScanTarget<'_, B::Mm>,
        pool: &impl WorkerPool,
        buffers: &mut PassBuffers<B>,
        allowance: &mut Allowance<impl Fn() -> bool>,
    ) -> Progress {
        if policy.vouched {
            // It touches no accessed bit, and its visits do not cover an mm.
            let cleared = self.take_cleared();
            let cleared_ahead = core::mem::replace(&mut self.cleared_ahead, (target.slot, 0..0));
            let hint = core::mem::take(&mut self.hint);
            self.zero_pages = None;
            let policy = Policy {
                smart_scan: false,
                ..*policy
            };
            let progress = self.visit_mm(&policy, pins, target, pool, buffers, allowance);
            (self.cleared, self.cleared_ahead, self.hint) = (cleared, cleared_ahead, hint);
            return progress;
        }
        self.hint.update(policy);
        if self.cleared_ahead.0 != target.slot || target.within.start == 0 {
            self.cleared_ahead = (target.slot, 0..0);
        }
        if let Some(look) = target.look {
            let hint = self.hint;
            self.hint = hint.at_look(look);
            self.zero_pages = None;
            let progress = self.visit_mm(policy, pins, target, pool, buffers, allowance);
            self.hint = hint;
            return progress;
        }
        let count = self.zero_pages.take();
        self.zero_pages = ZeroPageCount::resume(
            count,
            &self.metadata.backend,
            target.slot,
            target.mm,
            target.within.start,
        );
        self.visit_mm(policy, pins, target, pool, buffers, allowance)
    }

    /// Takes the pages of a target through passes.
    fn visit_mm<P: Pins<B::Mm>>(
        &mut self,
        policy: &Policy,
        pins: &P,
        target: &ScanTarget<'_, B::Mm>,
        pool: &impl WorkerPool,
        buffers: &mut PassBuffers<B>,
        allowance: &mut Allowance<impl Fn() -> bool>,
    ) -> Progress {
        let mut ctx = ScanContext {
            policy,
            hint: self.hint,
            slot: target.slot,
            mm: target.mm,
            cleared_ahead: self.cleared_ahead.1.clone(),
            moves: self.metadata.any_retiring(),
        };
        let Range { start: mut at, end } = target.within;
        self.metadata
            .backend
            .set_use_zero_pages(policy.use_zero_pages);
        while allowance.budget > 0 {
            let found = self.pass(&ctx, pins, at..end, pool, buffers, &mut allowance.budget);
            match found {
                Collected::More(next) if next >= end => {
                    clear(pool, buffers);
                    return Progress::Done;
                }
                Collected::More(next) => {
                    at = next;
                    let ahead = &mut self.cleared_ahead.1;
                    ahead.start = ahead.start.max(at);
                    ctx.cleared_ahead = ahead.clone();
                }
                Collected::Busy => {
                    clear(pool, buffers);
                    return Progress::Busy(at);
                }
                Collected::End => {
                    clear(pool, buffers);
                    self.leave(ctx.mm);
                    if let Some(count) = self.zero_pages.take() {
                        count.finish(&self.metadata.backend, ctx.mm);
                    }
                    return Progress::Done;
                }
                Collected::Exiting => {
                    clear(pool, buffers);
                    return Progress::Exiting;
                }
            }
            if (allowance.pause)() {
                break;
            }
        }
        clear(pool, buffers);
        Progress::At(at)
    }

    /// Ends the visit to an mm in this full scan. What has not been reached is left to the next.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn leave(&mut self, mm: &B::Mm) {
        if self.take_cleared() {
            self.flush_tlb(mm);
        }
    }

    /// Returns whether accessed bits have been cleared, for a caller that flushes the TLBs of the
    /// mm when its visit ends: others may be visited before.
    pub fn take_cleared(&mut self) -> bool {
        core::mem::take(&mut self.cleared)
    }

    /// [`Backend::flush_tlb`], at the end of a visit in which accessed bits have been cleared.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn flush_tlb(&self, mm: &B::Mm) {
        self.metadata.backend.flush_tlb(mm);
    }

    /// Takes pages of these addresses, from the first on, through all stages.
    fn pass<P: Pins<B::Mm>>(
        &mut self,
        ctx: &ScanContext<'_, B::Mm>,
        pins: &P,
        within: Range<usize>,
        pool: &impl WorkerPool,
        buffers: &mut PassBuffers<B>,
        budget: &mut u32,
    ) -> Collected {
        let start = within.start;
        let PassBuffers { partitions, merges } = buffers;
        let begun = partitions.begin_pass(within, *budget);
        self.walk(ctx, pool, partitions.first(begun));
        let exiting = |partition: &Partition<B>| partition.found == Collected::Exiting;
        if partitions.first(begun).iter().any(exiting) {
            for partition in partitions.first(begun) {
                partition.discard();
            }
            *budget -= 1;
            return Collected::Exiting;
        }
        // If a partition has more pages than room, those after it wait for the next pass.
        let stopped = partitions.first(begun).iter().position(Partition::stopped);
        let used = stopped.map_or(begun, |n| n + 1);
        for (n, partition) in partitions.first(begun).iter().enumerate() {
            self.cleared |= self.hint.enabled() && partition.summary.cleared;
            partition.add_cleared_ahead(n >= used, &mut self.cleared_ahead.1);
        }
        for partition in partitions.first(begun).iter_mut().skip(used) {
            partition.discard();
            partition.within = 0..0;
        }

        let mut cost = 0;
        for partition in partitions.first(used) {
            cost += partition.summary.cost();
            self.apply_walk(ctx, partition);
        }
        *budget = budget.saturating_sub(cost.max(1));
        partitions.adapt_size(used, used < begun);
        if self.hash(ctx, pool, partitions.first(used)) {
            let mut stage =
                MergeStage::new(&mut self.metadata, ctx, pins, partitions, merges, used);
            pool.run(&mut stage, merge_stage::run_job);
        }
        let mut found = Collected::End;
        let mut zero_pages = 0;
        for partition in partitions.first(used) {
            zero_pages += partition.summary.zero_pages;
            let within = &partition.within;
            let to = match partition.found {
                Collected::More(next) => next.min(within.end),
                Collected::Busy => within.start,
                _ => within.end,
            };
            found = match partition.found {
                // The first partition makes no progress without the lock.
                Collected::Busy if within.start > start => Collected::More(within.start),
                found => found,
            };
            let from = partition.summary.from;
            if !self.metadata.forget(ctx.slot, ctx.mm, from..to) {
                // The next pass finds nothing there, and forgets more.
                found = Collected::More(from);
                // Zero pages there would be counted twice.
                self.zero_pages = None;
                break;
            }
        }
        let placed = core::mem::take(&mut self.metadata.zero_pages_placed);
        let next = match found {
            Collected::More(next) => next,
            Collected::Busy => start,
            _ => usize::MAX,
        };
        if let Some(count) = &mut self.zero_pages {
            count.passed(zero_pages, placed, next);
        }
        self.metadata.backend.cond_resched();
        found
    }

    /// Walks the partitions.
    fn walk(
        &mut self,
        ctx: &ScanContext<'_, B::Mm>,
        pool: &impl WorkerPool,
        partitions: &mut [Partition<B>],
    ) {
        let Metadata {
            backend, states, ..
        } = &mut self.metadata;
        if let [partition] = partitions {
            partition.walk_single(backend, states, ctx);
            return;
        }
        let (backend, states) = (&*backend, &*states);
        pool.for_each(partitions, |partition| partition.walk(backend, states, ctx));
    }

    /// Applies what a walk has found besides the pages it collected.
    fn apply_walk(&mut self, ctx: &ScanContext<'_, B::Mm>, partition: &mut Partition<B>) {
        let (metadata, summary) = (&mut self.metadata, &partition.summary);
        let counters = &mut metadata.counters;
        counters.pages_scanned = counters.pages_scanned.wrapping_add(summary.unchanged);
        counters.pages_skipped = counters.pages_skipped.wrapping_add(summary.skipped);
        for &(page, state) in &partition.changes {
            metadata.states.set(page, state);
        }
        partition.changes.clear();
        for gap in &summary.unmapped_gaps {
            metadata.forget(ctx.slot, ctx.mm, gap.clone());
        }
        for run in summary.untracked_runs.iter().take(summary.nr_runs) {
            metadata.track(ctx.slot, ctx.mm, run.clone());
        }
    }

    /// Hashes the pages whose contents have to be read, and compares all of them with what is
    /// known. Returns whether any may be merged.
    fn hash(
        &mut self,
        ctx: &ScanContext<'_, B::Mm>,
        pool: &impl WorkerPool,
        partitions: &mut [Partition<B>],
    ) -> bool {
        let key = self.metadata.backend.key();
        let mut stage = HashStage {
            metadata: &mut self.metadata,
            ctx,
            key: &key,
            jobs: partitions.iter_mut().flat_map(Partition::hash_jobs),
            any_left: false,
        };
        pool.run(&mut stage, |job| job.run(&key));
        stage.any_left
    }

    /// Ends a full scan.
    pub fn end_full_scan(&mut self) {
        self.metadata.counters.full_scans += 1;
        self.hint.end_full_scan();
    }
}

/// Drops the references that batches still hold.
fn clear<B: Backend>(pool: &impl WorkerPool, buffers: &mut PassBuffers<B>) {
    pool.for_each(buffers.partitions.all(), |partition| {
        partition.batch.clear()
    });
}
