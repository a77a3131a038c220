// SPDX-License-Identifier: GPL-2.0-only

//! Hashing the contents of pages, and comparing them with what is known.

use super::super::{
    backend::{
        Backend,
        Batch,
        NodeMeta,
        PageAddr,
        PageKind, //
    },
    index::Entry,
    metadata::Metadata,
    page_state::PageState,
    types::{
        Fingerprint,
        NodeId,
        PageId, //
    },
    worker_pool::Stage,
};
use super::{
    context::ScanContext,
    partition::HashJob,
    scanned_page::{
        PageStatus,
        ScannedPage, //
    },
};
use kernel::page::PAGE_SIZE;

/// Compares pages with what is known, while others are being hashed.
pub(super) struct HashStage<'a, 'c, B: Backend, I> {
    pub(super) metadata: &'a mut Metadata<B>,
    pub(super) ctx: &'a ScanContext<'c, B::Mm>,
    pub(super) key: &'a <B::Batch as Batch>::Key,
    pub(super) jobs: I,
    /// A page may be merged.
    pub(super) any_left: bool,
}

impl<'b, B, I> Stage<HashJob<'b, B::Batch>> for HashStage<'_, '_, B, I>
where
    B: Backend + 'b,
    I: Iterator<Item = HashJob<'b, B::Batch>>,
{
    fn next_job(&mut self) -> Option<HashJob<'b, B::Batch>> {
        self.jobs.next()
    }

    fn complete(&mut self, job: HashJob<'b, B::Batch>) {
        for (n, page) in job.pages.iter_mut().enumerate() {
            let i = job.first + n;
            let known = page.status == PageStatus::Classified || self.look_up(job.batch, i, page);
            if known && (page.moves_from.is_some() || self.compare(page)) {
                page.status = PageStatus::Classified;
                self.any_left = true;
            } else {
                page.finish(&mut self.metadata.counters);
            }
        }
    }
}

impl<B: Backend, I> HashStage<'_, '_, B, I> {
    /// Looks up a page that was not classified by the walk, and starts to track it. Returns whether
    /// it has to be compared.
    fn look_up(&mut self, batch: &B::Batch, i: usize, page: &mut ScannedPage) -> bool {
        let (ctx, metadata, addr) = (self.ctx, &mut *self.metadata, page.addr);
        let known = metadata.states.at(ctx.slot, addr);
        let (id, state) = match known {
            Some(known) => known,
            None => {
                metadata.track(ctx.slot, ctx.mm, addr..addr + PAGE_SIZE);
                let Some(id) = metadata.states.lookup(ctx.slot, addr) else {
                    return false;
                };
                (id, PageState::NEW)
            }
        };
        page.page = Some(id);
        match metadata.backend.kind(batch, i) {
            PageKind::Ksm(node) => {
                let own = PageAddr {
                    mm: ctx.mm,
                    addr,
                    page: id,
                };
                self.visit_merged(own, state, batch, i, node);
                return self.moves(id, node, page);
            }
            PageKind::Orphan => {
                metadata.release_state(id, state);
                return false;
            }
            PageKind::Plain => {}
        }
        match state {
            PageState::Tracked(tracked) => page.recall(id, tracked),
            // The mapping was broken by a write.
            PageState::Merged(_) => {
                metadata.count_broken(ctx.slot);
                metadata.release_state(id, state);
            }
        }
        if ctx.hint.enabled() && !matches!(known, Some((_, PageState::Tracked(_)))) {
            // The next scan sees by the accessed bit whether it has changed. Many pages are gone by
            // then: do not hash them now.
            return false;
        }
        page.read(ctx, batch, i);
        if page.rehashed {
            page.fingerprint = Fingerprint::new(batch.hash(i, self.key), page.domain);
        }
        true
    }

    /// Compares a page with what is known. Returns whether there may be an equal page.
    ///
    /// Mirrors the checksum rule of `cmp_and_merge_page()`: only a page whose contents have not
    /// changed since the last scan becomes a candidate.
    fn compare(&mut self, page: &mut ScannedPage) -> bool {
        let metadata = &mut *self.metadata;
        let known = page
            .page
            .and_then(|id| Some((id, metadata.states.get(id)?)));
        let Some((id, PageState::Tracked(tracked))) = known else {
            return false;
        };
        let now = page.fingerprint;
        if tracked.is_orphaned() {
            // All mappings of its merged page were broken before the scan came to any.
            metadata.count_broken(self.ctx.slot);
        }
        let changed = now != tracked.fingerprint();
        // The page may have changed before its contents have been at rest for a full scan; after
        // that, whoever changed it set no accessed bit, and may do so again.
        let at_rest = page.unaccessed && (!tracked.is_settled() || tracked.is_orphaned());
        // What was not read now had been read unaccessed, too.
        let mut seen = tracked.with_settled(page.unaccessed);
        if changed {
            metadata.unindex(id, tracked);
            seen = seen.with_fingerprint(now);
        }
        if seen != tracked {
            metadata.states.set(id, PageState::Tracked(seen));
        }
        if changed && !at_rest && !self.ctx.policy.vouched {
            return false;
        }
        let own = Entry::Candidate(id);
        let other = metadata.index.find(now).find(|entry| *entry != own);
        if let Some(Entry::Stable(node)) = other {
            page.node = Some(node);
        }
        if other.is_some() || metadata.is_zero(self.ctx.policy, now, page.domain) {
            return true;
        }
        // Most pages have no equal.
        metadata.become_candidate(id, now);
        false
    }

    /// Visits a page that is already merged. Compare `stable_tree_append()`, by which
    /// `cmp_and_merge_page()` adds such a page to its node.
    fn visit_merged(
        &mut self,
        page: PageAddr<'_, B::Mm>,
        state: PageState,
        batch: &B::Batch,
        i: usize,
        node: NodeId,
    ) {
        let (policy, metadata) = (self.ctx.policy, &mut *self.metadata);
        let domain = match policy.merge_across_nodes {
            true => 0,
            false => {
                let nid = batch.nid(i);
                let hash = || batch.hash(i, self.key);
                metadata.follow_migration(node, nid, policy.max_page_sharing, hash);
                nid
            }
        };
        let item = |item| metadata.backend.node_of(item) == Some(node);
        if matches!(state, PageState::Merged(i) if item(i)) {
            return;
        }
        metadata.release_state(page.page, state);
        // A child has inherited the mapping, which may exceed max_page_sharing.
        match metadata.backend.adopt(page, batch, i, node) {
            Ok(item) => metadata.set_merged(page.page, item),
            Err(refusal) => metadata.refuse(self.ctx.slot, refusal),
        }
        // The first page of a pair whose second page could not be merged. It is write-protected, so
        // its contents no longer change.
        let unknown = |meta: &NodeMeta| meta.fingerprint == Fingerprint::NONE;
        if metadata.backend.meta(node).as_ref().is_some_and(unknown) {
            let fingerprint = Fingerprint::new(batch.hash(i, self.key), domain);
            metadata.link_node(node, fingerprint, policy.max_page_sharing);
        }
    }

    /// Returns whether a page that maps the KSM page of a node is to map that of another one.
    fn moves(&mut self, id: PageId, node: NodeId, page: &mut ScannedPage) -> bool {
        if !self.metadata.moves_from(id, node) {
            return false;
        }
        let meta = self.metadata.backend.meta(node);
        page.fingerprint = meta.map_or(Fingerprint::NONE, |meta| meta.fingerprint);
        if !self.ctx.policy.merge_across_nodes {
            page.domain = self.metadata.backend.nid(node);
        }
        page.moves_from = Some(node);
        true
    }
}
