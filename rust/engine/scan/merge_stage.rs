// SPDX-License-Identifier: GPL-2.0-only

//! Decides what a page is merged with, and records the results.

use super::super::{
    backend::{
        Backend,
        Batch,
        Merge,
        MergeTarget,
        Merged,
        PageAddr, //
    },
    metadata::{
        Metadata,
        CANDIDATE_TRIES, //
    },
    types::{
        Fingerprint,
        NodeId,
        PageId,
        Refusal, //
    },
    worker_pool::Stage,
};
use super::{
    context::{
        Pins,
        ScanContext, //
    },
    in_flight::InFlight,
    partition::{
        PagePos,
        Partitions, //
    },
    scanned_page::{
        PageStatus,
        ScannedPage, //
    },
};
use kernel::prelude::*;

/// Merge jobs for each thread, where there are several threads: one that is run, one that waits,
/// and some whose results are being processed.
const JOBS_PER_WORKER: usize = 4;

/// Merges of one job: enough to make the cost of handing it over negligible.
const JOB_MERGES: usize = 32;

/// A merge that is ready, of a page of a batch.
pub(super) struct PreparedMerge<B: Backend> {
    pos: PagePos,
    fingerprint: Fingerprint,
    target: MergeTarget<PageId>,
    merge: B::Merge,
}

/// Merges that are ready, of one partition.
pub(super) type MergeJob<B> = KVec<PreparedMerge<B>>;

/// Runs the merges of a job.
pub(super) fn run_job<B: Backend>(job: &mut MergeJob<B>) {
    B::Merge::run_all(job.iter_mut().map(|prepared| &mut prepared.merge));
}

/// Memory of the merge stage, allocated once.
pub(super) struct MergeBuffers<B: Backend> {
    /// Empty jobs. Their number bounds how many can be in flight.
    spare: KVec<MergeJob<B>>,
    /// The contents of the merges in flight.
    in_flight: KBox<InFlight>,
}

impl<B: Backend> MergeBuffers<B> {
    /// Creates the buffers for a number of threads.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn new(threads: usize) -> Result<Self> {
        let jobs = if threads > 1 {
            threads * JOBS_PER_WORKER
        } else {
            1
        };
        let mut spare = KVec::with_capacity(jobs, GFP_KERNEL)?;
        for _ in 0..jobs {
            spare.push(KVec::with_capacity(JOB_MERGES, GFP_KERNEL)?, GFP_KERNEL)?;
        }
        Ok(Self {
            spare,
            in_flight: KBox::new(InFlight::new(), GFP_KERNEL)?,
        })
    }
}

/// What to do with a page.
enum Decision {
    /// Nothing more.
    Done,
    /// Run the merge that has been appended to the job.
    Merge,
    /// Run that merge at once, before others are prepared: its page is part of a huge folio.
    MergeAfterSplit,
    /// Retry in the next round: a merge in flight has the same fingerprint.
    RetryNextRound,
    /// Wait until no merge is in flight: the page is part of a huge folio.
    WaitForInFlight,
}

/// Merges the pages of a pass, in rounds over all partitions until nothing is left to merge.
pub(super) struct MergeStage<'a, 'c, B: Backend, P> {
    metadata: &'a mut Metadata<B>,
    ctx: &'a ScanContext<'c, B::Mm>,
    pins: &'a P,
    partitions: &'a mut Partitions<B>,
    buffers: &'a mut MergeBuffers<B>,
    /// Number of partitions that take part.
    used: usize,
    /// The partition of the next job. They take turns, so that merges that run at the same time are
    /// in different page tables.
    next_partition: usize,
    jobs_in_flight: usize,
    /// This round had something to merge.
    merged: bool,
}

impl<'a, 'c, B: Backend, P: Pins<B::Mm>> MergeStage<'a, 'c, B, P> {
    /// Begins to merge the pages of the first `used` partitions.
    pub(super) fn new(
        metadata: &'a mut Metadata<B>,
        ctx: &'a ScanContext<'c, B::Mm>,
        pins: &'a P,
        partitions: &'a mut Partitions<B>,
        buffers: &'a mut MergeBuffers<B>,
        used: usize,
    ) -> Self {
        partitions.begin_round();
        Self {
            metadata,
            ctx,
            pins,
            partitions,
            buffers,
            used,
            next_partition: 0,
            jobs_in_flight: 0,
            merged: false,
        }
    }

    /// Prepares merges of a partition's pages. Returns whether merges in flight have to complete
    /// before there can be more.
    fn fill(&mut self, n: usize, job: &mut MergeJob<B>) -> bool {
        while let Some(partition) = self.partitions.get_mut(n) {
            let pos = PagePos {
                partition: n,
                index: partition.next,
            };
            match partition.pages.get(pos.index) {
                None => break,
                Some(page) if page.status == PageStatus::Done => {
                    partition.next += 1;
                    continue;
                }
                Some(_) if job.len() == job.capacity() => break,
                Some(_) => {}
            }
            match self.decide(pos, job) {
                Decision::Done => self.finish_page(pos),
                Decision::Merge => self.merged = true,
                Decision::MergeAfterSplit => {
                    self.merged = true;
                    self.merge_after_split(job);
                }
                Decision::RetryNextRound => {}
                Decision::WaitForInFlight => return true,
            }
            if let Some(partition) = self.partitions.get_mut(n) {
                partition.next += 1;
            }
        }
        false
    }

    /// Marks a page as done.
    fn finish_page(&mut self, pos: PagePos) {
        if let Some((partition, mut page)) = self.partitions.page(pos) {
            page.finish(&mut self.metadata.counters);
            partition.set_page(pos.index, page);
        }
    }

    /// Runs the last merge of the job, whose page is part of a huge folio, which the merge splits.
    ///
    /// The batches hold references to other pages of the folio, and drop them before the split.
    fn merge_after_split(&mut self, job: &mut MergeJob<B>) {
        let Some(mut prepared) = job.pop() else {
            return;
        };
        let PagePos { partition, index } = prepared.pos;
        let huge = self
            .partitions
            .get_mut(partition)
            .and_then(|partition| partition.batch.huge(index));
        prepared.merge.run(|| {
            let Some(huge) = huge else { return };
            for (n, other) in self.partitions.first(self.used).iter_mut().enumerate() {
                let keep = (n == partition).then_some(index);
                other.batch.release_huge_folio(huge, keep);
            }
        });
        self.record(&mut prepared);
    }

    /// Decides what to do with the page at `pos`, as `cmp_and_merge_page()`: tries the zero page,
    /// stable nodes and candidates in this order. A merge that is ready is appended to `job`.
    fn decide(&mut self, pos: PagePos, job: &mut MergeJob<B>) -> Decision {
        let Some((partition, mut page)) = self.partitions.page(pos) else {
            return Decision::Done;
        };
        let Some(id) = page.page else {
            return Decision::Done;
        };
        let (backend, batch) = (&self.metadata.backend, &mut partition.batch);
        if !backend.reacquire(self.ctx.mm, batch, pos.index) {
            return Decision::Done;
        }
        // It may have been merged as the candidate of an earlier page.
        if !self.metadata.has_fingerprint(id, page.fingerprint) {
            return Decision::Done;
        }
        let huge = partition.batch.huge(pos.index).is_some();
        if huge && (self.jobs_in_flight > 0 || !job.is_empty()) {
            return Decision::WaitForInFlight;
        }
        let in_flight = !huge && self.buffers.in_flight.may_contain(page.fingerprint);
        let zero = !page.zero_tried
            && self
                .metadata
                .is_zero(self.ctx.policy, page.fingerprint, page.domain);
        // The merges of one job run one after the other, so they may have the same content.
        let own = |job: &MergeJob<B>| job.iter().any(|p| p.fingerprint == page.fingerprint);
        if in_flight && !zero && !own(job) {
            return Decision::RetryNextRound;
        }
        let mut decision = None;
        if zero {
            decision = self.try_zero_page(pos, id, &mut page, job);
        }
        if decision.is_none() {
            decision = self.try_stable(pos, id, &mut page, in_flight, job);
        }
        if decision.is_none() {
            decision = match in_flight {
                true => Some(Decision::RetryNextRound),
                false => self.try_candidates(pos, id, &mut page, job),
            };
        }
        self.partitions.set_page(pos, page);
        match decision {
            Some(Decision::Merge) if huge => Decision::MergeAfterSplit,
            Some(decision) => decision,
            None => {
                self.stay_candidate(id, &page);
                Decision::Done
            }
        }
    }

    /// Tries to merge a page with the zero page, as `try_to_merge_with_zero_page()`.
    fn try_zero_page(
        &mut self,
        pos: PagePos,
        id: PageId,
        page: &mut ScannedPage,
        job: &mut MergeJob<B>,
    ) -> Option<Decision> {
        page.zero_tried = true;
        match self.prepare(pos, id, page, MergeTarget::ZeroPage, job) {
            Ok(()) => Some(Decision::Merge),
            Err(refusal) => {
                self.metadata.refusals.count(refusal);
                None
            }
        }
    }

    /// Tries to merge a page with the KSM page that `stable_tree_search()` would find. `in_flight`:
    /// the job has merges of the same content.
    fn try_stable(
        &mut self,
        pos: PagePos,
        id: PageId,
        page: &mut ScannedPage,
        in_flight: bool,
        job: &mut MergeJob<B>,
    ) -> Option<Decision> {
        while !page.stable_tried {
            let to_come = |node| {
                let merges = job.iter().filter(|_| in_flight);
                let joins = |target| matches!(target, MergeTarget::StableNode(n) if n == node);
                merges.filter(|prepared| joins(prepared.target)).count() as u32
            };
            let node = self
                .metadata
                .head_at(page.node, page.fingerprint)
                .and_then(|head| {
                    let max = self.ctx.policy.max_page_sharing;
                    self.metadata.node_with_room(head, max, to_come)
                })?;
            match self.prepare(pos, id, page, MergeTarget::StableNode(node), job) {
                Ok(()) => return Some(Decision::Merge),
                Err(Refusal::Stale) if in_flight => {
                    self.metadata.refusals.count(Refusal::Stale);
                    return Some(Decision::RetryNextRound);
                }
                Err(refusal) => {
                    if self.node_refused(id, node, refusal, page) {
                        return Some(Decision::Done);
                    }
                }
            }
        }
        None
    }

    /// Tries to merge a page with a candidate, as `unstable_tree_search_insert()` finds one.
    fn try_candidates(
        &mut self,
        pos: PagePos,
        id: PageId,
        page: &mut ScannedPage,
        job: &mut MergeJob<B>,
    ) -> Option<Decision> {
        while page.candidates_tried < CANDIDATE_TRIES {
            let (other, _) = self
                .metadata
                .candidate(page.fingerprint, id, page.next_candidate)?;
            let (slot, addr) = self.metadata.states.locate(other)?;
            page.candidates_tried += 1;
            let Some(mm) = self.pins.pin(slot) else {
                page.next_candidate += 1;
                continue;
            };
            if slot == self.ctx.slot {
                self.release_from_batch(addr);
            }
            let target = MergeTarget::Candidate(PageAddr {
                mm: &mm,
                addr,
                page: other,
            });
            match self.prepare(pos, id, page, target, job) {
                Ok(()) => return Some(Decision::Merge),
                Err(refusal) => self.candidate_refused(other, refusal, page),
            }
        }
        None
    }

    /// Prepares a merge, and appends it to the job.
    fn prepare(
        &mut self,
        pos: PagePos,
        id: PageId,
        page: &ScannedPage,
        target: MergeTarget<PageAddr<'_, B::Mm>>,
        job: &mut MergeJob<B>,
    ) -> Result<(), Refusal> {
        let partition = self.partitions.get_mut(pos.partition);
        let batch = &partition.ok_or(Refusal::Gone)?.batch;
        let addr = PageAddr {
            mm: self.ctx.mm,
            addr: page.addr,
            page: id,
        };
        let nid = (!self.ctx.policy.merge_across_nodes).then_some(page.domain);
        let by_id = target.by_id();
        let backend = &mut self.metadata.backend;
        let merge = backend.prepare(addr, batch, pos.index, target, nid)?;
        // There is room: `fill` has checked that.
        let _ = job.push_within_capacity(PreparedMerge {
            pos,
            fingerprint: page.fingerprint,
            target: by_id,
            merge,
        });
        self.buffers.in_flight.add(page.fingerprint);
        Ok(())
    }

    /// Makes a page that could not be merged a candidate, as `unstable_tree_search_insert()`.
    fn stay_candidate(&mut self, id: PageId, page: &ScannedPage) {
        // After a fork one page is mapped at several addresses; one candidate is enough.
        if page.shares_page_already {
            return;
        }
        // All candidates may belong to mms that are leaving: replace the last one.
        let last = CANDIDATE_TRIES - 1;
        if let Some((last, tracked)) = self.metadata.candidate(page.fingerprint, id, last) {
            self.metadata.unindex(last, tracked);
        }
        self.metadata.become_candidate(id, page.fingerprint);
    }

    /// Drops the reference that a batch holds to the page at `addr`, which would keep the page from
    /// being merged.
    fn release_from_batch(&mut self, addr: usize) {
        let Some((partition, i)) = self.partitions.find(addr) else {
            return;
        };
        if let Some(page) = partition.pages.get_mut(i) {
            if page.status != PageStatus::Done {
                page.finish(&mut self.metadata.counters);
            }
        }
        partition.batch.release(i);
    }

    /// Records the result of a merge.
    fn record(&mut self, prepared: &mut PreparedMerge<B>) {
        let metadata = &mut *self.metadata;
        let result = metadata.backend.finish(&mut prepared.merge);
        self.buffers.in_flight.remove(prepared.fingerprint);
        let Some((partition, mut page)) = self.partitions.page(prepared.pos) else {
            return;
        };
        let Some(id) = page.page else {
            return;
        };
        let done = match (prepared.target, result) {
            (MergeTarget::ZeroPage, Ok(_) | Err(Refusal::Gone)) => {
                metadata.zero_pages_placed += usize::from(result.is_ok());
                if let Some(state) = metadata.states.get(id) {
                    metadata.untrack(self.ctx.mm, id, state);
                }
                true
            }
            (MergeTarget::ZeroPage, Err(refusal)) => {
                metadata.refusals.count(refusal);
                false
            }
            (MergeTarget::StableNode(_), Ok(Merged::Joined(item))) => {
                metadata.unindex_now(id);
                metadata.set_merged(id, item);
                true
            }
            (MergeTarget::StableNode(node), Err(refusal)) => {
                self.node_refused(id, node, refusal, &mut page)
            }
            (
                MergeTarget::Candidate(other),
                Ok(Merged::NewNode {
                    node,
                    first,
                    second,
                    ..
                }),
            ) => {
                metadata.set_both_merged((id, first), (other, second));
                // Both may have been written to since they were hashed, without an accessed bit;
                // from now on the contents do not change.
                let hash = partition
                    .batch
                    .hash(prepared.pos.index, &metadata.backend.key());
                let fingerprint = Fingerprint::new(hash, page.domain);
                metadata.link_node(node, fingerprint);
                true
            }
            (MergeTarget::Candidate(other), Err(refusal)) => {
                self.candidate_refused(other, refusal, &mut page);
                false
            }
            (_, Ok(_)) => true,
        };
        if done {
            page.finish(&mut self.metadata.counters);
        }
        self.partitions.set_page(prepared.pos, page);
    }

    /// Handles a failed merge with a stable node. Returns whether the page needs no more attention.
    fn node_refused(
        &mut self,
        id: PageId,
        node: NodeId,
        refusal: Refusal,
        page: &mut ScannedPage,
    ) -> bool {
        self.metadata.refusals.count(refusal);
        match refusal {
            Refusal::Stale => {
                page.stable_tried = !self.metadata.remove_node(node);
                false
            }
            Refusal::FarNode | Refusal::Same | Refusal::Differs => {
                page.stable_tried = true;
                false
            }
            // The KSM page is locked or being migrated, or the page itself cannot be merged now.
            // Retry with it in the next full scan rather than merge with something else.
            Refusal::Busy
            | Refusal::Gone
            | Refusal::Locked
            | Refusal::Pinned
            | Refusal::Unsplit
            | Refusal::NoMemory
            | Refusal::Userfault
            | Refusal::Unloading => {
                self.metadata.unindex_now(id);
                true
            }
        }
    }

    /// Handles a failed merge with a candidate.
    fn candidate_refused(&mut self, other: PageId, refusal: Refusal, page: &mut ScannedPage) {
        self.metadata.refusals.count(refusal);
        match refusal {
            Refusal::Same => {
                page.shares_page_already = true;
                page.next_candidate += 1;
            }
            // Its contents are not what the index says.
            Refusal::Gone | Refusal::Differs => self.metadata.forget_fingerprint(other),
            // One of the two cannot be merged now. The other is no longer a candidate, so that the
            // next full scan tries again.
            Refusal::Busy
            | Refusal::FarNode
            | Refusal::Stale
            | Refusal::Locked
            | Refusal::Pinned
            | Refusal::Unsplit
            | Refusal::NoMemory
            | Refusal::Userfault
            | Refusal::Unloading => self.metadata.unindex_now(other),
        }
    }
}

impl<B: Backend, P: Pins<B::Mm>> Stage<MergeJob<B>> for MergeStage<'_, '_, B, P> {
    fn next_job(&mut self) -> Option<MergeJob<B>> {
        loop {
            for _ in 0..self.used {
                let mut job = self.buffers.spare.pop()?;
                let wait = self.fill(self.next_partition, &mut job);
                if !wait {
                    self.next_partition = (self.next_partition + 1) % self.used;
                }
                if !job.is_empty() {
                    self.jobs_in_flight += 1;
                    return Some(job);
                }
                // There is room: the job was popped from `spare`.
                let _ = self.buffers.spare.push_within_capacity(job);
                if wait {
                    return None;
                }
            }
            if self.jobs_in_flight > 0 || !self.merged {
                return None;
            }
            self.merged = false;
            self.next_partition = 0;
            self.partitions.begin_round();
        }
    }

    fn complete(&mut self, mut job: MergeJob<B>) {
        for prepared in job.iter_mut() {
            self.record(prepared);
        }
        job.clear();
        self.jobs_in_flight -= 1;
        // There is room: the job was popped from `spare`.
        let _ = self.buffers.spare.push_within_capacity(job);
    }
}
