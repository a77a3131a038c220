// SPDX-License-Identifier: GPL-2.0-only

//! How far a page of a batch has come.

use super::super::{
    backend::Batch,
    page_state::Tracked,
    stats::Counters,
    types::{
        Fingerprint,
        NodeId,
        PageId, //
    },
};
use super::context::ScanContext;

/// How far a page of a batch has come.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum PageStatus {
    /// The metadata has not been searched for it.
    #[default]
    Unclassified,
    /// Its metadata is known; it is to be hashed, compared or merged.
    Classified,
    /// It needs no more attention in this pass.
    Done,
}

/// What is known of a page of a batch.
#[derive(Clone, Copy, Default)]
pub(super) struct ScannedPage {
    pub(super) addr: usize,
    pub(super) page: Option<PageId>,
    pub(super) status: PageStatus,
    pub(super) fingerprint: Fingerprint,
    /// NUMA node, or 0 where pages are merged across nodes.
    pub(super) domain: u32,
    /// The stable node that the index had for the fingerprint.
    pub(super) node: Option<NodeId>,
    /// Its age, with this look counted.
    pub(super) age: u8,
    /// The retiring node whose KSM page this is.
    pub(super) moves_from: Option<NodeId>,
    /// The fingerprint is that of the contents since the walk collected the page.
    pub(super) rehashed: bool,
    /// The accessed bit was clear.
    pub(super) unaccessed: bool,
    /// The zero page was tried.
    pub(super) zero_tried: bool,
    /// A stable node was tried.
    pub(super) stable_tried: bool,
    /// Number of candidates that were tried.
    pub(super) candidates_tried: u8,
    /// Number of the next candidate to try.
    pub(super) next_candidate: u8,
    /// A candidate maps the same page.
    pub(super) shares_page_already: bool,
}

impl ScannedPage {
    /// Remembers what is known of the page. What is not settled has to be read again, and counts as
    /// unknown.
    pub(super) fn recall(&mut self, id: PageId, tracked: Tracked) {
        self.page = Some(id);
        self.fingerprint = match tracked.is_settled() {
            true => tracked.fingerprint(),
            false => Fingerprint::NONE,
        };
        self.age = tracked.history().age;
    }

    /// Reads what the batch knows of page `i`, whose last fingerprint and age are set, and
    /// decides whether its contents are to be hashed.
    pub(super) fn read<Mm>(&mut self, ctx: &ScanContext<'_, Mm>, batch: &impl Batch, i: usize) {
        self.unaccessed =
            ctx.hint.enabled() && !batch.accessed(i) && !ctx.cleared_ahead.contains(&self.addr);
        let known = self.fingerprint != Fingerprint::NONE;
        let unchanged = ctx.hint.unchanged(self.addr, self.age.saturating_sub(1));
        self.rehashed = !(known && self.unaccessed && unchanged);
        if !ctx.policy.merge_across_nodes {
            self.domain = batch.nid(i);
        }
    }

    /// Marks the page as done, and counts it.
    pub(super) fn finish(&mut self, counters: &mut Counters) {
        self.status = PageStatus::Done;
        counters.pages_scanned = counters.pages_scanned.wrapping_add(1);
    }
}
