// SPDX-License-Identifier: GPL-2.0-only

//! What tasks ask for, as `/dev/rksm` does it: with one mm, wherever the full scan is.

use crate::{
    machine::{
        pass_buffers,
        Machine,
        RandomOrderPool, //
    },
    sim::{
        addr,
        Batch,
        Event,
        Mapping,
        Pte,
        Purpose,
        PAGE,
        PAGES, //
    }, //
};

use engine_tests::engine::{
    mm_list::MmList,
    policy::Policy,
    scan::{
        Allowance,
        ScanTarget, //
    },
    stats::Merges,
    types::{
        MmPin,
        Progress,
        SlotId, //
    },
    why::Reasons, //
};

use kernel::testing::{
    self,
    Fail, //
};

use std::{
    cell::Cell,
    ops::Range, //
};

/// Most slices of one call: more than there is to do.
const MAX_SLICES: usize = 2000;

/// Merges pages of an mm that are vouched for.
#[derive(Clone, Debug, Default)]
pub(crate) struct MergeNow {
    pub(crate) mm: usize,
    pub(crate) page: usize,
    pub(crate) count: usize,
    /// Of each slice.
    pub(crate) budget: u32,
    /// With the threads and buffers of the scan, not alone.
    pub(crate) pool: bool,
    /// What is scanned after each slice.
    pub(crate) scan: Option<u32>,
    pub(crate) interleaved: Vec<(u32, Event)>,
}

impl MergeNow {
    /// All pages of an mm, at once and alone.
    pub(crate) fn all_of(mm: usize) -> Self {
        Self {
            mm,
            count: PAGES,
            budget: 1024,
            ..Self::default()
        }
    }
}

/// The addresses of `count` pages that an mm can have, and what is between them.
pub(crate) fn range(page: usize, count: usize) -> Range<usize> {
    let page = page % PAGES;
    addr(page)..addr((page + count).min(PAGES) - 1) + PAGE
}

impl Machine {
    /// Merges pages at once. Returns what that has done, without the scans in between.
    pub(crate) fn merge_now(&mut self, merge: &MergeNow) -> Merges {
        let mut done = Merges::default();
        let Some(key) = self.world.borrow().nth(merge.mm) else {
            return done;
        };
        self.housekeeping();
        let Range { start: mut at, end } = range(merge.page, merge.count);
        let (single, mut own) = (RandomOrderPool::single(), pass_buffers(1, &self.world));
        for _ in 0..MAX_SLICES {
            let (before, visits) = (
                self.engine.metadata.counters.merges,
                self.world.borrow().visits.len(),
            );
            self.world.borrow_mut().purpose = Purpose::Vouched(key, at..end);
            testing::fail(self.fail);
            let Self {
                engine,
                policy,
                buffers,
                pool,
                list,
                ..
            } = self;
            let policy = Policy {
                vouched: true,
                ..*policy
            };
            let (pool, buffers) = match merge.pool {
                true => (&*pool, buffers),
                false => (&single, &mut own),
            };
            let mut progress = None;
            list.visit_key(key, |claim| {
                let target = ScanTarget {
                    slot: claim.id(),
                    mm: claim.mm(),
                    within: at..end,
                    look: None,
                };
                let mut allowance = Allowance {
                    budget: merge.budget,
                    pause: || false,
                };
                let pins = &**list;
                progress =
                    Some(engine.scan_mm(&policy, pins, &target, pool, buffers, &mut allowance));
                engine.metadata.tracks(claim.id())
            });
            testing::fail(Fail::Never);
            done = add(done, self.engine.metadata.counters.merges.since(&before));
            // What a full scan visits is not changed by that.
            let mut world = self.world.borrow_mut();
            world.purpose = Purpose::Scan;
            self.visits_before += (world.visits.len() - visits) as u64;
            world.visits.truncate(visits);
            drop(world);
            match progress {
                Some(Progress::At(next) | Progress::Busy(next)) => {
                    assert!((at..end).contains(&next), "it goes on somewhere else");
                    at = next;
                }
                Some(Progress::Done | Progress::Exiting) | None => return done,
            }
            if let Some(budget) = merge.scan {
                self.scan(budget);
            }
        }
        panic!("there is no end");
    }

    /// Asks why the pages of an mm are not merged, and checks what can be known of the answer. Each
    /// call ends after a number of walks. Returns the answer and the number of calls.
    pub(crate) fn why(&mut self, mm: usize, walks: usize) -> (Reasons, usize) {
        let (mut reasons, mut calls) = (Reasons::default(), 0);
        let Some(key) = self.world.borrow().nth(mm) else {
            return (reasons, calls);
        };
        let mut batch = Batch::new(self.world.clone());
        let held = core::mem::take(&mut self.world.borrow_mut().space_mut(key).held);
        let before = self.all_known();
        let (mut slot, mut at) = (None, 0);
        while at != usize::MAX {
            self.world.borrow_mut().purpose = Purpose::Why;
            let mut progress = None;
            let engine = &mut self.engine;
            self.list.visit_key(key, |claim| {
                slot = Some(claim.id());
                let target = ScanTarget {
                    slot: claim.id(),
                    mm: claim.mm(),
                    within: at..usize::MAX,
                    look: None,
                };
                let walked = Cell::new(0);
                let pause = || {
                    walked.set(walked.get() + 1);
                    walked.get() == walks
                };
                progress = Some(engine.why(&target, &mut batch, &mut reasons, pause));
                engine.metadata.tracks(claim.id())
            });
            self.world.borrow_mut().purpose = Purpose::Scan;
            calls += 1;
            at = match progress {
                Some(Progress::At(next)) => {
                    assert!(next > at, "it does not go on");
                    next
                }
                Some(Progress::Done) => usize::MAX,
                None => break,
                Some(other) => panic!("{other:?}"),
            };
        }
        assert_eq!(before, self.all_known(), "asking has changed something");
        self.world.borrow_mut().space_mut(key).held = held;
        if let Some(slot) = slot {
            self.check_reasons(key, slot, &reasons);
        }
        (reasons, calls)
    }

    /// Asks once, whatever keeps it from being answered.
    pub(crate) fn why_once(&mut self, n: usize, at: usize) -> (Option<Progress>, Reasons) {
        let mut reasons = Reasons::default();
        let key = self.world.borrow().spaces.keys().nth(n).copied().unwrap();
        let mut batch = Batch::new(self.world.clone());
        let (mut progress, engine) = (None, &mut self.engine);
        self.world.borrow_mut().purpose = Purpose::Why;
        self.list.visit_key(key, |claim| {
            let target = ScanTarget {
                slot: claim.id(),
                mm: claim.mm(),
                within: at..usize::MAX,
                look: None,
            };
            progress = Some(engine.why(&target, &mut batch, &mut reasons, || false));
            engine.metadata.tracks(claim.id())
        });
        self.world.borrow_mut().purpose = Purpose::Scan;
        (progress, reasons)
    }

    /// All that is known, counted and mapped.
    pub(crate) fn all_known(&self) -> String {
        let (world, metadata) = (self.world.borrow(), &self.engine.metadata);
        let spaces: Vec<_> = world.spaces.values().map(|space| space.mapped()).collect();
        let slots: Vec<_> = (0..16)
            .map(|slot| metadata.mm_stats(SlotId(slot)))
            .collect();
        let (counters, refusals, bytes) =
            (&metadata.counters, &metadata.refusals, metadata.bytes());
        format!("{:?}", (spaces, slots, counters, refusals, bytes))
    }

    fn check_reasons(&self, key: usize, slot: SlotId, reasons: &Reasons) {
        let world = self.world.borrow();
        let mut expected = Reasons::default();
        let mut others = 0;
        for (_, pte) in world.spaces[&key]
            .ptes
            .iter()
            .filter(|(addr, _)| world.spaces[&key].mergeable_at(**addr))
        {
            match *pte {
                Pte::Zero => expected.zero += 1,
                Pte::Swap(_) => {}
                Pte::Page(frame) => match world.page(frame).mapping {
                    Mapping::Ksm(_) | Mapping::Orphan => expected.merged += 1,
                    Mapping::Anon if world.huge(frame).is_none() => {
                        match world.page(frame).pinned {
                            true => expected.pinned += 1,
                            false => others += 1,
                        }
                    }
                    Mapping::Anon => match world.huge_refs(frame) {
                        0 => others += 1,
                        _ => expected.unsplit += 1,
                    },
                },
            }
        }
        let (unique, changing, fresh) = (reasons.unique, reasons.changing, reasons.fresh);
        assert_eq!(unique + changing + fresh, others);
        let known = self.engine.metadata.mm_stats(slot).pages;
        assert!(unique <= known.unique && changing <= known.changing);
        let rest = Reasons {
            unique,
            changing,
            fresh,
            ..expected
        };
        assert_eq!(*reasons, rest);
    }

    /// Unmerges pages of an mm, and forgets what is known of them.
    pub(crate) fn unmerge_range(&mut self, mm: usize, page: usize, count: usize) {
        let Some(key) = self.world.borrow().nth(mm) else {
            return;
        };
        let range = range(page, count);
        let broken = self
            .world
            .borrow_mut()
            .break_ksm(key, range.clone(), &mut None);
        assert!(broken.is_ok());
        let metadata = &mut self.engine.metadata;
        self.list.visit_key(key, |claim| {
            let before = metadata.mm_stats(claim.id());
            assert!(metadata.forget_range(claim.id(), claim.mm(), range.clone(), || false));
            let after = metadata.mm_stats(claim.id());
            assert!(after.pages.total() <= before.pages.total());
            assert_eq!(after.broken, before.broken);
            assert_eq!(after.refusals, before.refusals);
            metadata.tracks(claim.id())
        });
        let world = self.world.borrow();
        let mut items = world.items.iter();
        let known = items.any(|(_, item)| item.mm.key() == key && range.contains(&item.addr));
        assert!(!known, "an item is left");
    }
}

fn add(a: Merges, b: Merges) -> Merges {
    Merges {
        merged: a.merged + b.merged,
        zeroed: a.zeroed + b.zeroed,
        saved: a.saved + b.saved,
    }
}
