// SPDX-License-Identifier: GPL-2.0-only

//! Candidates: pages that have not changed for a while, and are found by an equal page.

use super::super::{
    backend::Backend,
    index::Entry,
    page_state::{
        PageState,
        Tracked, //
    },
    types::{
        Fingerprint,
        PageId, //
    },
};
use super::Metadata;

impl<B: Backend> Metadata<B> {
    /// Returns the `nth` candidate of this content other than the page itself.
    pub(in super::super) fn candidate(
        &self,
        fingerprint: Fingerprint,
        page: PageId,
        nth: u8,
    ) -> Option<(PageId, Tracked)> {
        self.index
            .find(fingerprint)
            .filter_map(|entry| match entry {
                Entry::Candidate(other) if other != page => match self.states.get(other) {
                    Some(PageState::Tracked(tracked)) if tracked.fingerprint() == fingerprint => {
                        Some((other, tracked))
                    }
                    _ => None,
                },
                _ => None,
            })
            .nth(nth.into())
    }

    /// Makes a page a candidate, unless there is no memory for it or it is one.
    pub(in super::super) fn become_candidate(&mut self, page: PageId, fingerprint: Fingerprint) {
        let tracked = match self.states.get(page) {
            Some(PageState::Tracked(tracked)) if !tracked.is_indexed() => tracked,
            _ => return,
        };
        if self.insert(fingerprint, Entry::Candidate(page)) {
            // INVARIANT: 1. and 4. The page has just been put into the index.
            self.counters.pages_unshared += 1;
            let tracked = tracked.with_fingerprint(fingerprint).with_indexed(true);
            self.states.set(page, PageState::Tracked(tracked));
        }
    }

    /// Removes a page from the candidates, if it is one.
    pub(in super::super) fn unindex(&mut self, page: PageId, tracked: Tracked) {
        if tracked.is_indexed() {
            // INVARIANT: 1. and 4. The page is removed from the index.
            self.index
                .remove(tracked.fingerprint(), Entry::Candidate(page));
            self.counters.pages_unshared = self.counters.pages_unshared.wrapping_sub(1);
            let tracked = tracked.with_indexed(false);
            self.states.set(page, PageState::Tracked(tracked));
        }
    }

    /// Removes a page from the candidates, whatever its state has become.
    pub(in super::super) fn unindex_now(&mut self, page: PageId) {
        if let Some(PageState::Tracked(tracked)) = self.states.get(page) {
            self.unindex(page, tracked);
        }
    }

    /// Forgets the contents of a page, so that they are read again before it is merged.
    pub(in super::super) fn forget_fingerprint(&mut self, page: PageId) {
        self.unindex_now(page);
        if let Some(PageState::Tracked(tracked)) = self.states.get(page) {
            let unknown = tracked
                .with_fingerprint(Fingerprint::NONE)
                .with_settled(false);
            self.states.set(page, PageState::Tracked(unknown));
        }
    }
}
