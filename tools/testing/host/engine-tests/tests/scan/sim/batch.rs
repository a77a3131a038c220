// SPDX-License-Identifier: GPL-2.0-only

//! Pages that a walk has collected.

use super::{
    types::{
        Pte,
        Purpose,
        AREAS,
        PAGE, //
    },
    world::World, //
};
use kernel::testing;
use std::{
    cell::RefCell,
    ops::Range,
    rc::Rc, //
};

/// Pages found by a walk.
pub(crate) struct Batch {
    pub(crate) world: Rc<RefCell<World>>,
    pub(crate) key: usize,
    /// `World::passes` when the walk began.
    pub(crate) passes: u64,
    /// Address and frame.
    pub(crate) pages: Vec<(usize, usize)>,
    /// Whether each was accessed before the walk.
    pub(crate) accessed: Vec<bool>,
    /// A huge mapping whose accessed bit this walk has cleared.
    pub(crate) cleared: Range<usize>,
    /// Whether the reference to each has been dropped.
    pub(crate) released: Vec<bool>,
    /// Whether it was dropped so that a huge page could be split.
    pub(crate) released_for_split: Vec<bool>,
    /// Addresses that the walk skipped.
    pub(crate) skipped: Vec<usize>,
    /// Allocations that had failed when the walk began.
    failures: u64,
}

// SAFETY: The pool of these tests is one thread.
unsafe impl Send for Batch {}
// SAFETY: The pool of these tests is one thread.
unsafe impl Sync for Batch {}

impl Batch {
    pub(crate) fn new(world: Rc<RefCell<World>>) -> Self {
        Self {
            world,
            key: 0,
            passes: 0,
            pages: Vec::new(),
            accessed: Vec::new(),
            cleared: 0..0,
            released: Vec::new(),
            released_for_split: Vec::new(),
            skipped: Vec::new(),
            failures: 0,
        }
    }

    /// A walk of this mm begins.
    pub(crate) fn start(&mut self, key: usize, passes: u64) {
        let same = self.pages.is_empty() || self.key == key;
        assert!(same, "a batch of several mms");
        (self.key, self.passes) = (key, passes);
        self.failures = testing::failures();
    }

    /// Adds a page.
    fn push(&mut self, addr: usize, frame: usize, accessed: bool) {
        self.pages.push((addr, frame));
        self.accessed.push(accessed);
        self.released.push(false);
        self.released_for_split.push(false);
    }

    /// The frame of a page, to which the batch has to hold a reference.
    pub(crate) fn frame(&self, i: usize) -> usize {
        assert!(!self.released[i], "a released page is looked at");
        self.pages[i].1
    }
}

impl World {
    /// Whether another task still holds the mmap lock.
    pub(crate) fn still_held(&mut self, key: usize) -> bool {
        let space = self.space_mut(key);
        let held = space.held > 0;
        space.held = space.held.saturating_sub(1);
        held
    }

    /// The pages of mergeable memory from `start` on, without a frame for the zero page.
    pub(crate) fn mapped(&self, key: usize, start: usize) -> Vec<(usize, Option<usize>)> {
        let space = &self.spaces[&key];
        let mut pages = Vec::new();
        let mut at = start;
        for (n, (first, count)) in AREAS.into_iter().enumerate() {
            let end = first + count * PAGE;
            if end <= at || !space.mergeable[n] {
                continue;
            }
            at = at.max(first);
            for (addr, pte) in space.ptes.range(at..end) {
                match *pte {
                    Pte::Page(frame) => pages.push((*addr, Some(frame))),
                    Pte::Zero => pages.push((*addr, None)),
                    Pte::Swap(_) => {}
                }
            }
            at = end;
        }
        pages
    }

    /// A walk collects a page.
    pub(crate) fn collect(&mut self, batch: &mut Batch, addr: usize, frame: usize) {
        self.page_mut(frame).refs += 1;
        self.excused.remove(&(batch.key, addr));
        self.classified.remove(&(batch.key, addr));
        let accessed = self.clear_accessed(batch, addr);
        batch.push(addr, frame, accessed);
    }

    /// A walk collects a page, and leaves its accessed bit.
    pub(crate) fn collect_untouched(&mut self, batch: &mut Batch, addr: usize, frame: usize) {
        assert_ne!(self.purpose, Purpose::Scan, "a change would not be seen");
        self.page_mut(frame).refs += 1;
        if self.purpose != Purpose::Why {
            self.excused.remove(&(batch.key, addr));
            self.classified.remove(&(batch.key, addr));
        }
        self.assert_asked_for(batch.key, addr);
        let accessed = self.accessed(batch.key, addr);
        batch.push(addr, frame, accessed);
    }

    /// Clears the accessed bit of an entry, which is that of a whole huge mapping. Returns whether
    /// it was set before the walk.
    fn clear_accessed(&mut self, batch: &mut Batch, addr: usize) -> bool {
        assert_eq!(self.purpose, Purpose::Scan, "an accessed bit is cleared");
        let key = batch.key;
        let all = self.mapping_at(key, addr);
        let accessed = self.accessed(key, addr);
        for addr in all.clone().step_by(PAGE) {
            self.space_mut(key).accessed.remove(&addr);
        }
        let before = batch.cleared.contains(&addr);
        if accessed && all.len() > PAGE {
            batch.cleared = all;
        }
        accessed || before
    }

    /// A walk skips a page, which the engine has finished with.
    pub(crate) fn skipped(&mut self, batch: &mut Batch, addr: usize) {
        self.assert_asked_for(batch.key, addr);
        if self.purpose == Purpose::Why {
            return;
        }
        batch.skipped.push(addr);
        self.assert_known(batch.key, addr);
    }

    /// A page that is vouched for is one of those that are.
    pub(crate) fn assert_asked_for(&self, key: usize, addr: usize) {
        if let Purpose::Vouched(mm, within) = &self.purpose {
            let asked_for = *mm == key && within.contains(&addr);
            assert!(asked_for, "{addr:#x} of {key:#x} is not vouched for");
        }
    }

    /// A walk skips a page, and clears its accessed bit.
    pub(crate) fn skipped_clear_accessed(&mut self, batch: &mut Batch, addr: usize) {
        self.clear_accessed(batch, addr);
        self.skipped(batch, addr);
    }

    /// Drops the reference to page `i`, if it is held.
    pub(crate) fn release(&mut self, batch: &mut Batch, i: usize) {
        if !core::mem::replace(&mut batch.released[i], true) {
            let (_, frame) = batch.pages[i];
            self.page_mut(frame).refs -= 1;
            self.put(frame);
        }
    }

    /// The engine asks for the kind of a page: it had memory for the page's state.
    pub(crate) fn classified(&mut self, batch: &Batch, i: usize) {
        self.classified.insert((batch.key, batch.pages[i].0));
    }

    /// The engine has finished with the pages of a batch: those that are merged have their items.
    pub(crate) fn visited(&mut self, batch: &Batch) {
        let visits = batch.skipped.iter().map(|addr| (batch.key, *addr));
        self.visits.extend(visits);
        for &(addr, _) in &batch.pages {
            let page = (batch.key, addr);
            self.visits.push(page);
            // Without memory for the page's state it has none.
            if testing::failures() != batch.failures && !self.classified.contains(&page) {
                self.excused.insert(page);
            }
            self.assert_known(batch.key, addr);
        }
    }

    /// Counts down to the pause that the test asks for.
    pub(crate) fn count_pause(&mut self) {
        if let Some(left) = self.pause_after.as_mut() {
            *left = left.saturating_sub(1);
            self.paused |= *left == 0;
        }
    }

    /// Takes a reference again to the page that is at the address of page `i` now.
    pub(crate) fn reacquire(&mut self, batch: &mut Batch, i: usize) -> bool {
        let addr = batch.pages[i].0;
        let Ok(frame) = self.frame_at(batch.key, addr) else {
            return false;
        };
        self.page_mut(frame).refs += 1;
        batch.pages[i].1 = frame;
        (batch.released[i], batch.released_for_split[i]) = (false, false);
        true
    }
}
