// SPDX-License-Identifier: GPL-2.0-only

//! Decides what a page is merged with, and records the results.

use super::super::{
    backend::{
        Backend,
        Batch,
        HugeFolioRefs,
        HugeId,
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
        Refusal,
        Refused, //
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
        Partition,
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
        let mut spare = KVec::with_capacity(jobs, B::GFP)?;
        for _ in 0..jobs {
            spare.push(KVec::with_capacity(JOB_MERGES, B::GFP)?, B::GFP)?;
        }
        Ok(Self {
            spare,
            in_flight: KBox::new(InFlight::new(), B::GFP)?,
        })
    }
}

/// What to do with a page.
enum Decision {
    /// Nothing more.
    Done,
    /// Run the merge that has been appended to the job.
    Merge,
    /// Run that merge at once, before others are prepared: its page, or the candidate's, is part of
    /// a huge folio.
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

    /// Runs the last merge of the job, which splits a huge folio.
    ///
    /// The batches hold references to other pages of the folio, and drop them before the split.
    fn merge_after_split(&mut self, job: &mut MergeJob<B>) {
        let Some(mut prepared) = job.pop() else {
            return;
        };
        prepared.merge.run(&mut BatchRefs {
            partitions: self.partitions.first(self.used),
            keep: prepared.pos,
        });
        self.record(prepared);
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
        if !self.ctx.policy.merge_across_nodes && batch.nid(pos.index) != page.domain {
            // A split has put another page there.
            return Decision::Done;
        }
        if let Some(node) = page.moves_from {
            return self.decide_move(pos, id, page, node, job);
        }
        // It may have been merged as the candidate of an earlier page.
        if !self.metadata.has_fingerprint(id, page.fingerprint) {
            return Decision::Done;
        }
        let folio = partition.batch.huge(pos.index);
        let huge = folio.is_some();
        if huge && folio == partition.unsplittable {
            // What keeps one page of it from being split keeps all; it is counted once.
            self.metadata.unindex_now(id);
            return Decision::Done;
        }
        if huge && (self.jobs_in_flight > 0 || !job.is_empty()) {
            return Decision::WaitForInFlight;
        }
        let in_flight = !huge && self.buffers.in_flight.may_contain(page.fingerprint);
        let zero = !page.zero_tried
            && self
                .metadata
                .is_zero(self.ctx.policy, page.fingerprint, page.domain);
        let others = in_flight && !has_content(job, page.fingerprint);
        if others && !zero {
            return Decision::RetryNextRound;
        }
        let mut decision = None;
        if zero {
            decision = self.try_zero_page(pos, id, &mut page, job);
        }
        if decision.is_none() && others {
            decision = Some(Decision::RetryNextRound);
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

    /// Decides what to do with a mapping that is to leave a retiring node.
    fn decide_move(
        &mut self,
        pos: PagePos,
        id: PageId,
        mut page: ScannedPage,
        node: NodeId,
        job: &mut MergeJob<B>,
    ) -> Decision {
        if !self.metadata.moves_from(id, node) {
            return Decision::Done;
        }
        let in_flight = self.buffers.in_flight.may_contain(page.fingerprint);
        if in_flight && !has_content(job, page.fingerprint) {
            return Decision::RetryNextRound;
        }
        let decision = self.try_stable(pos, id, &mut page, in_flight, job);
        self.partitions.set_page(pos, page);
        decision.unwrap_or_else(|| {
            if !in_flight {
                self.metadata.keep_node(node);
            }
            Decision::Done
        })
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
            Err(refused) => {
                self.metadata.refuse(self.ctx.slot, refused.reason());
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
                Err(Refused::Target(Refusal::Stale)) if in_flight => {
                    self.metadata.refuse(self.ctx.slot, Refusal::Stale);
                    return Some(Decision::RetryNextRound);
                }
                Err(refused) => {
                    if self.node_refused(id, node, refused, page) {
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
            let held = (slot == self.ctx.slot).then(|| self.partitions.find(addr));
            let split = held
                .flatten()
                .is_some_and(|(partition, i)| partition.batch.huge(i).is_some());
            if split && (self.jobs_in_flight > 0 || !job.is_empty()) {
                return Some(Decision::WaitForInFlight);
            }
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
                Ok(()) if split => return Some(Decision::MergeAfterSplit),
                Ok(()) => return Some(Decision::Merge),
                Err(refused) => {
                    if self.candidate_refused(pos, id, other, refused, page) {
                        return Some(Decision::Done);
                    }
                }
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
    ) -> Result<(), Refused> {
        let partition = self.partitions.get_mut(pos.partition);
        let batch = &partition.ok_or(Refused::Page(Refusal::Gone))?.batch;
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
    fn record(&mut self, prepared: PreparedMerge<B>) {
        let metadata = &mut *self.metadata;
        let result = metadata.backend.finish(prepared.merge);
        self.buffers.in_flight.remove(prepared.fingerprint);
        let Some((partition, mut page)) = self.partitions.page(prepared.pos) else {
            return;
        };
        if matches!(result, Err(Refused::Page(Refusal::Unsplit))) {
            partition.unsplittable = partition.batch.huge(prepared.pos.index);
        }
        let Some(id) = page.page else {
            return;
        };
        let done = match (prepared.target, result) {
            (MergeTarget::ZeroPage, Ok(_) | Err(Refused::Page(Refusal::Gone))) => {
                if result.is_ok() {
                    metadata.zero_pages_placed += 1;
                    metadata.counters.merges.count_zero_page();
                }
                if let Some(state) = metadata.states.get(id) {
                    metadata.untrack(self.ctx.mm, id, state);
                }
                true
            }
            (MergeTarget::ZeroPage, Err(refused)) => {
                metadata.refuse(self.ctx.slot, refused.reason());
                false
            }
            (MergeTarget::StableNode(_), Ok(Merged::Joined(item))) => {
                if let Some(state) = metadata.states.get(id) {
                    // A candidate no longer, or no longer on the node that it has moved from.
                    metadata.release_state(id, state);
                }
                metadata.set_merged(id, item);
                if page.moves_from.is_none() {
                    metadata.counters.merges.count(1);
                }
                true
            }
            (MergeTarget::StableNode(node), Err(refused)) => {
                self.node_refused(id, node, refused, &mut page)
            }
            (
                MergeTarget::Candidate(other),
                Ok(Merged::NewNode {
                    node,
                    first,
                    second,
                    hash,
                }),
            ) => {
                metadata.set_both_merged((id, first), (other, second));
                metadata.counters.merges.count(2);
                // Both may have been written to since they were hashed. No accessed bit would tell:
                // a device or a debugger sets none, and the split of a huge page may lose it.
                let fingerprint = Fingerprint::new(hash, page.domain);
                metadata.link_node(node, fingerprint, self.ctx.policy.max_page_sharing);
                true
            }
            (MergeTarget::Candidate(other), Err(refused)) => {
                self.candidate_refused(prepared.pos, id, other, refused, &mut page)
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
        refused: Refused,
        page: &mut ScannedPage,
    ) -> bool {
        let refusal = refused.reason();
        self.metadata.refuse(self.ctx.slot, refusal);
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
            | Refusal::Userfault => {
                self.metadata.unindex_now(id);
                true
            }
        }
    }

    /// Handles a failed merge with a candidate. Returns whether the page needs no more attention.
    ///
    /// The refusal counts for the mm of the page at fault.
    ///
    /// Only that page ceases to be a candidate, so a page that cannot be merged neither
    /// keeps its equals from being found nor is found itself in their place. Never are two such
    /// pages of one content candidates: the second would have met the first.
    fn candidate_refused(
        &mut self,
        pos: PagePos,
        id: PageId,
        other: PageId,
        refused: Refused,
        page: &mut ScannedPage,
    ) -> bool {
        let own = self.ctx.slot;
        let refusal = match refused {
            Refused::Page(refusal) => {
                self.metadata.refuse(own, refusal);
                // The next full scan tries again.
                self.metadata.unindex_now(id);
                return true;
            }
            Refused::Target(refusal) => refusal,
        };
        let at_fault = match refusal {
            Refusal::Same => id,
            Refusal::Differs if self.has_changed(pos, page) => id,
            _ => other,
        };
        let located = self.metadata.states.locate(at_fault);
        let slot = located.map_or(own, |(slot, _)| slot);
        self.metadata.refuse(slot, refusal);
        match refusal {
            Refusal::Same => {
                page.shares_page_already = true;
                page.next_candidate += 1;
            }
            Refusal::Differs if at_fault == id => {
                self.metadata.forget_fingerprint(id);
                return true;
            }
            // Its contents are not what the index says.
            Refusal::Gone | Refusal::Differs => self.metadata.forget_fingerprint(other),
            // It cannot be merged now. It is no longer a candidate, so that the next full scan
            // tries again.
            Refusal::Busy
            | Refusal::FarNode
            | Refusal::Stale
            | Refusal::Locked
            | Refusal::Pinned
            | Refusal::Unsplit
            | Refusal::NoMemory
            | Refusal::Userfault => self.metadata.unindex_now(other),
        }
        false
    }

    /// Returns whether the contents of a page are no longer those of its fingerprint.
    fn has_changed(&mut self, pos: PagePos, page: &ScannedPage) -> bool {
        let key = self.metadata.backend.key();
        let partition = self.partitions.get_mut(pos.partition);
        let hash = partition.map(|partition| partition.batch.hash(pos.index, &key));
        hash.is_some_and(|hash| Fingerprint::new(hash, page.domain) != page.fingerprint)
    }
}

/// Returns whether a job has a merge of this content. Its merges run one after the other, so they
/// may have the same.
///
/// One with the zero page does not count: other jobs may have merges of that content, too.
fn has_content<B: Backend>(job: &MergeJob<B>, fingerprint: Fingerprint) -> bool {
    let zero = |merge: &PreparedMerge<B>| matches!(merge.target, MergeTarget::ZeroPage);
    let mut merges = job.iter().filter(|merge| !zero(merge));
    merges.any(|merge| merge.fingerprint == fingerprint)
}

/// The references of the batches of a pass, of which the page that is merged keeps its own.
struct BatchRefs<'a, B: Backend> {
    partitions: &'a mut [Partition<B>],
    keep: PagePos,
}

impl<B: Backend> HugeFolioRefs for BatchRefs<'_, B> {
    fn count(&self, huge: HugeId) -> usize {
        let refs = self.partitions.iter().map(|p| p.batch.huge_refs(huge));
        refs.sum()
    }

    fn release(&mut self, huge: HugeId) {
        for (n, partition) in self.partitions.iter_mut().enumerate() {
            let keep = (n == self.keep.partition).then_some(self.keep.index);
            partition.batch.release_huge_folio(huge, keep);
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
        for prepared in job.drain_all() {
            self.record(prepared);
        }
        self.jobs_in_flight -= 1;
        // There is room: the job was popped from `spare`.
        let _ = self.buffers.spare.push_within_capacity(job);
    }
}
