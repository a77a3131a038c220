// SPDX-License-Identifier: GPL-2.0-only

//! Why the pages of an mm are not merged: all that are present in mergeable vmas, by reason.

use super::{
    backend::{
        Backend,
        Batch,
        Collected,
        PageKind,
        WalkAction,
        WalkFilter,
        WalkStep, //
    },
    page_state::PageState,
    scan::{
        Engine,
        ScanTarget, //
    },
    types::{
        Fingerprint,
        Progress, //
    },
};

/// Most pages that one walk collects: the room that [`Engine::why`] needs in a batch.
pub const WHY_PAGES: usize = 64;

/// Most steps of one walk, and most pages that it passes.
const MAX_STEPS: u32 = 1024;

/// Present pages, each under one reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reasons {
    /// Mappings of merged pages.
    pub merged: u64,
    /// Mappings of the zero page that KSM has placed.
    pub zero: u64,
    /// Somebody holds a reference to the page.
    pub pinned: u64,
    /// Somebody holds a reference to the huge page that it is part of.
    pub unsplit: u64,
    /// Unchanged, and no equal page has been found.
    pub unique: u64,
    /// Changed between the last two looks.
    pub changing: u64,
    /// Looked at once, or not yet.
    pub fresh: u64,
}

/// Passes all pages, counts what is merged, and collects the others.
struct Look<'a> {
    reasons: &'a mut Reasons,
    steps: u32,
}

impl Look<'_> {
    fn may_go_on(&mut self) -> bool {
        self.steps += 1;
        self.steps <= MAX_STEPS
    }
}

impl WalkFilter for Look<'_> {
    fn step(&mut self, _step: WalkStep) -> bool {
        self.may_go_on()
    }

    fn filter(&mut self, _addr: usize, kind: PageKind, _nid: u32, _accessed: bool) -> WalkAction {
        if !self.may_go_on() {
            return WalkAction::Stop;
        }
        match kind {
            PageKind::Ksm(_) | PageKind::Orphan => {
                self.reasons.merged += 1;
                WalkAction::Skip
            }
            PageKind::Plain => WalkAction::CollectUntouched,
        }
    }

    fn ksm_zero_page(&mut self) {
        self.reasons.zero += 1;
    }
}

impl<B: Backend> Engine<B> {
    /// Adds the pages of a target to `reasons`, until `pause` returns true, which is called after
    /// each walk. The batch is empty, and has room for [`WHY_PAGES`].
    ///
    /// Changes nothing: neither what is known of the pages nor their accessed bits.
    ///
    /// # Context
    ///
    /// May sleep. Takes the mmap lock of the mm, if it need not wait for it.
    pub fn why(
        &mut self,
        target: &ScanTarget<'_, B::Mm>,
        batch: &mut B::Batch,
        reasons: &mut Reasons,
        pause: impl Fn() -> bool,
    ) -> Progress {
        let (mut at, end) = (target.within.start, target.within.end);
        loop {
            let mut look = Look { reasons, steps: 0 };
            let found = self.metadata.backend.collect(
                target.mm,
                at..end,
                WHY_PAGES,
                &(0..0),
                batch,
                &mut look,
            );
            for i in 0..batch.nr_pages() {
                *self.reason(target, batch, i, reasons) += 1;
            }
            batch.clear();
            self.metadata.backend.cond_resched();
            match found {
                Collected::More(next) if next < end => at = next,
                Collected::More(_) | Collected::End => return Progress::Done,
                Collected::Busy => return Progress::Busy(at),
                Collected::Exiting => return Progress::Exiting,
            }
            if pause() {
                return Progress::At(at);
            }
        }
    }

    /// Returns under which reason page `i` of the batch, which is not merged, is to be counted.
    fn reason<'a>(
        &mut self,
        target: &ScanTarget<'_, B::Mm>,
        batch: &B::Batch,
        i: usize,
        reasons: &'a mut Reasons,
    ) -> &'a mut u64 {
        if batch.is_pinned(i) {
            return match batch.huge(i) {
                Some(_) => &mut reasons.unsplit,
                None => &mut reasons.pinned,
            };
        }
        match self.metadata.states.at(target.slot, batch.addr(i)) {
            Some((_, PageState::Tracked(tracked))) if tracked.is_indexed() => &mut reasons.unique,
            Some((_, PageState::Tracked(tracked)))
                if tracked.fingerprint() != Fingerprint::NONE =>
            {
                &mut reasons.changing
            }
            // One whose mapping was broken has not been looked at since.
            _ => &mut reasons.fresh,
        }
    }
}
