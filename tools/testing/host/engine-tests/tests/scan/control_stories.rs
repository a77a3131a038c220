// SPDX-License-Identifier: GPL-2.0-only

//! What `/dev/rksm` asks of the engine: pages merged at once, and why others are not.

use crate::{
    check,
    control::MergeNow,
    machine::Op,
    sim::{
        Content,
        Event,
        Hash,
        Mapping,
        Pte,
        AREAS,
        PAGES, //
    },
    stories::{
        huge_pages,
        write,
        Story, //
    }, //
};

use engine_tests::engine::{
    stats::Merges,
    types::{
        Refusal,
        SlotId, //
    },
    why::Reasons, //
};

use proptest::{
    collection::vec,
    prelude::*, //
};

use std::collections::BTreeSet;

fn merges(merged: u64, zeroed: u64, saved: u64) -> Merges {
    Merges {
        merged,
        zeroed,
        saved,
    }
}

impl Story {
    /// Merges all pages of a process, and checks everything.
    fn merges(&mut self, mm: usize) -> Merges {
        self.merges_as(&MergeNow::all_of(mm))
    }

    fn merges_as(&mut self, merge: &MergeNow) -> Merges {
        let done = self.0.merge_now(merge);
        self.0.check();
        done
    }

    /// Scans to the end of the full scan, and merges pages of an mm after every few.
    fn scans_between(&mut self, merge: &MergeNow) {
        while !self.0.scan(40) {
            self.merges_as(merge);
        }
        self.0.check();
    }

    /// Asks why the pages of a process are not merged.
    fn reasons(&mut self, mm: usize) -> Reasons {
        let (reasons, calls) = self.0.why(mm, usize::MAX);
        assert_eq!(calls, 1);
        self.0.check();
        reasons
    }

    fn mergeable(&mut self, mm: usize, area: usize, on: bool) {
        self.happens(Event::Advise { mm, area, on });
    }

    fn spawns(&mut self) {
        let mergeable = [true; AREAS.len()];
        self.happens(Event::Spawn { mergeable });
    }

    /// The pages that are merged, and those that are the zero page, of all processes.
    fn shared_now(&self) -> (u64, u64) {
        let world = self.0.world.borrow();
        let (mut merged, mut zero) = (0, 0);
        for pte in world.spaces.values().flat_map(|space| space.ptes.values()) {
            match *pte {
                Pte::Page(frame) if world.page(frame).mapping != Mapping::Anon => merged += 1,
                Pte::Zero => zero += 1,
                _ => {}
            }
        }
        (merged, zero)
    }
}

/// Each way to merge at once.
fn ways() -> Vec<MergeNow> {
    let mut ways = Vec::new();
    for budget in [1, 7, 1024] {
        for pool in [false, true] {
            ways.push(MergeNow {
                budget,
                pool,
                ..MergeNow::all_of(0)
            });
        }
    }
    ways
}

/// Pages that are vouched for are merged at first sight, by one walk, with what was seen before and
/// with what comes later.
#[test]
fn vouched_pages_merge_at_first_sight() {
    for smart_scan in [false, true] {
        for merge in ways() {
            let mut story = Story::with(2, Op::SmartScan(smart_scan));
            story.0.run(&Op::ScanThreads(2, 3));
            story.write(0, 0, 3, 7);
            story.write(0, PAGES - 3, 2, 7);
            story.write(0, 10, 1, 8);
            story.write(1, 0, 1, 7);
            assert_eq!(story.merges_as(&merge), merges(5, 0, 4));
            assert_eq!(story.shared(), (1, 4));
            // A page of the other process finds the merged page, and one the candidate.
            story.write(1, 5, 1, 8);
            let other = MergeNow { mm: 1, ..merge };
            assert_eq!(story.merges_as(&other), merges(3, 0, 2));
            assert_eq!(story.shared(), (2, 6));
            assert_eq!(story.merges_as(&other), Merges::default());
            let counters = &story.0.engine.metadata.counters;
            assert_eq!((counters.full_scans, counters.pages_skipped), (0, 0));
        }
    }
}

/// A page that smart scan would skip, and one that has changed since it was looked at, too.
#[test]
fn what_the_scan_passes_over_is_merged_at_once() {
    let mut story = Story::with(2, Op::SmartScan(true));
    story.write(0, 0, 1, 7);
    story.write(0, 1, 1, 8);
    story.scans(30);
    assert!(story.0.engine.metadata.counters.pages_skipped > 0);
    story.write(0, 0, 1, 9);
    story.write(0, 1, 1, 9);
    story.happens(Event::Age {
        mm: 0,
        page: 0,
        count: 1,
    });
    assert_eq!(story.merges(0), merges(2, 0, 1));
    assert_eq!(story.refused(Refusal::Differs), 0);
}

/// Only the pages of the range are merged, but with any others that have been at rest.
#[test]
fn only_the_range_is_merged() {
    for way in ways() {
        let merge = MergeNow {
            page: 3,
            count: 4,
            ..way
        };
        let mut story = Story::new(2);
        story.write(0, 0, 10, 7);
        story.write(0, 40, 2, 7);
        assert_eq!(story.merges_as(&merge), merges(4, 0, 3));
        assert_eq!(story.stats(0).pages.total(), 4);
        assert_eq!(story.shared_now(), (4, 0));
        // The first of its content joins a candidate that is not in the range.
        story.write(1, 0, 2, 8);
        story.scans(2);
        story.write(1, 30, 1, 9);
        story.scans(2);
        story.write(0, 5, 1, 9);
        assert_eq!(story.merges_as(&merge), merges(2, 0, 1));
    }
}

/// Pages outside of the range that are gone stay known until a scan comes there; those in it do
/// not.
#[test]
fn gone_pages_of_the_range_are_forgotten() {
    let mut story = Story::new(1);
    story.write_distinct(0, 20);
    story.scans(1);
    for page in [1, 5, 6, 9] {
        story.unmap(0, page);
    }
    let all = PAGES as u64;
    story.merges_as(&MergeNow {
        page: 4,
        count: 3,
        ..MergeNow::all_of(0)
    });
    assert_eq!(story.stats(0).pages.total(), all - 2);
    story.scans(1);
    assert_eq!(story.stats(0).pages.total(), all - 4);
}

/// With `use_zero_pages` pages of zeroes become the zero page.
#[test]
fn vouched_zeroes_become_the_zero_page() {
    for merge in ways() {
        let mut story = Story::with(1, Op::UseZeroPages(true));
        story.write(0, 0, 3, 0);
        story.write(0, 3, 2, 7);
        assert_eq!(story.merges_as(&merge), merges(2, 3, 4));
        assert_eq!(story.shared_now(), (2, 3));
    }
}

/// A full scan under way visits each page once, wherever pages are merged at once meanwhile, and
/// whosever they are.
#[test]
fn a_full_scan_goes_on_after_a_merge() {
    for mm in 0..3 {
        for (page, count) in [(0, PAGES), (0, 30), (60, 68), (40, 1)] {
            for (threads, pool) in [(1, false), (2, false), (2, true)] {
                for first in [1, 30, PAGES as u32, PAGES as u32 + 30] {
                    let mut story = Story::with(3, Op::ScanThreads(threads, 5));
                    (0..3).for_each(|mm| story.write_distinct(mm, 20 + mm as Content));
                    story.scans(1);
                    let all = story.0.collectable();
                    story.0.visits_before += story.0.world.borrow().visits.len() as u64;
                    story.0.world.borrow_mut().visits.clear();
                    assert!(!story.0.scan(first));
                    story.merges_as(&MergeNow {
                        page,
                        count,
                        pool,
                        ..MergeNow::all_of(mm)
                    });
                    while !story.0.scan(40) {}
                    let mut visits = story.0.world.borrow().visits.clone();
                    visits.sort();
                    assert_eq!(visits, all);
                }
            }
        }
    }
}

/// What the scan knows of accesses is as if nothing had been merged at once: see the stories of the
/// same names without this.
#[test]
fn a_hot_page_is_not_merged_with_merges_between() {
    for other in [0, 1] {
        let merge = MergeNow {
            page: 40,
            count: 10,
            ..MergeNow::all_of(other)
        };
        let mut story = Story::new(2);
        story.write_distinct(0, 20);
        story.write(0, 0, 1, 7);
        story.write(0, 1, 1, 8);
        story.write(1, 40, 3, 5);
        story.happens(Event::Collapse { mm: 0, page: 76 });
        assert_eq!(huge_pages(&story), 8);
        for scan in 0..20 {
            story.write(0, 83, 1, 7 + scan % 2);
            story.scans_between(&merge);
            let differs = story.refused(Refusal::Differs);
            let merged = story.stats(0).pages.merged;
            assert_eq!((merged, differs), (0, 0), "scan {scan}");
        }
        assert_eq!(story.shared(), (1, 2));
        (0..2).for_each(|_| story.scans_between(&merge));
        assert_eq!(story.shared(), (2, 3));
    }
}

/// Each unaccessed page is read again once in 16 full scans.
#[test]
fn a_change_without_a_trace_is_seen_with_merges_between() {
    for age in [1, 3, 7, 12, 20] {
        let mut story = Story::new(2);
        story.write(0, 0, 1, 7);
        story.write(0, 1, 1, 8);
        story.write_distinct(1, 20);
        let merge = MergeNow::all_of(1);
        (0..age).for_each(|_| story.scans_between(&merge));
        story.write(0, 1, 1, 7);
        story.happens(Event::Age {
            mm: 0,
            page: 1,
            count: 1,
        });
        (0..17).for_each(|_| story.scans_between(&merge));
        assert_eq!(story.0.engine.metadata.counters.merges.merged, 2);
    }
}

/// A page whose accessed bit was clear when it was merged in vain, or looked at, is no page at rest
/// for the scan: the accessed bits say what happened since the last scan, not since then.
#[test]
fn a_look_at_vouched_pages_is_no_look_of_the_scan() {
    for look in [0, 1, 2] {
        let mut story = Story::new(1);
        story.write(0, 0, 1, 7);
        story.write(0, 1, 1, 8);
        for scan in 0..20 {
            story.write(0, 2, 1, 9 + scan);
            story.scans(1);
            if look == 1 {
                story.merges(0);
            }
            story.write(0, 2, 1, 60 + scan);
            if look == 2 {
                story.merges(0);
            }
        }
        // It holds still, and is merged with its equal by the second scan from now.
        story.write(0, 2, 1, 7);
        story.scans(2);
        assert_eq!(story.shared(), (1, 1), "{look}");
    }
}

/// A count of zero pages is right again after the first full scan that nothing has come into.
#[test]
fn zero_pages_are_counted_with_merges_between() {
    for mm in [0, 1] {
        for (page, count) in [(0, PAGES), (0, 20), (60, 60)] {
            for first in [10, 40, 60, 120] {
                let mut story = Story::with(2, Op::UseZeroPages(true));
                for mm in 0..2 {
                    story.write_distinct(mm, 20);
                    story.write(mm, 4, 5, 0);
                    story.write(mm, 70, 5, 0);
                }
                story.scans(2);
                for mm in 0..2 {
                    story.write(mm, 6, 9, 0);
                    story.write(mm, 72, 9, 0);
                }
                assert!(!story.0.scan(first));
                let merge = MergeNow {
                    page,
                    count,
                    ..MergeNow::all_of(mm)
                };
                story.merges_as(&merge);
                story.0.assert_zero_pages_counted();
                // Some are gone, too.
                story.write(mm, 7, 1, 3);
                story.write(mm, 73, 1, 3);
                story.scans(1);
                story.0.assert_zero_pages_counted();
                story.happens(Event::Miscount { mm, by: -3 });
                assert!(!story.0.scan(first));
                story.merges_as(&merge);
                story.scans(2);
                story.0.assert_zero_pages_counted();
            }
        }
    }
}

/// Mappings that a child has inherited, and those that leave a node for another, are no merges.
#[test]
fn adoptions_and_moves_are_no_merges() {
    for at_once in [false, true] {
        let mut story = Story::with(1, Op::MaxPageSharing(4));
        let look = |story: &mut Story, mm| match at_once {
            true => drop(story.merges(mm)),
            false => story.scans(2),
        };
        story.write(0, 0, 4, 7);
        look(&mut story, 0);
        story.write(0, 4, 2, 7);
        look(&mut story, 0);
        let before = story.0.engine.metadata.counters.merges;
        assert_eq!(before, merges(6, 0, 4));
        story.write(0, 0, 2, 8);
        story.scans(3);
        let with_others = merges(8, 0, 5);
        assert_eq!(story.0.engine.metadata.counters.merges, with_others);
        story.0.run(&Op::Prune(10));
        look(&mut story, 0);
        story.0.run(&Op::Prune(10));
        assert_eq!(story.0.engine.metadata.counters.stable_node_chains, 0);
        assert_eq!(story.shared(), (2, 4));
        assert_eq!(story.0.engine.metadata.counters.merges, with_others);

        story.happens(Event::Fork {
            mm: 0,
            dont_fork: None,
        });
        look(&mut story, 1);
        assert_eq!(story.stats(1).pages.merged, 6);
        assert_eq!(story.0.engine.metadata.counters.merges, with_others);
    }
}

/// Whenever a page is written to during the merge or right after it, its content stays.
#[test]
fn a_vouched_page_is_written_while_it_is_merged() {
    let mut refused = 0;
    for pool in [false, true] {
        for step in 0..30 {
            let mut story = Story::with(1, Op::ScanThreads(2, step.into()));
            story.write(0, 0, 3, 7);
            let merge = MergeNow {
                pool,
                interleaved: vec![(step, write(0, 1, 1, 8))],
                ..MergeNow::all_of(0)
            };
            story.0.run(&Op::Merge(merge));
            refused += story.refused(Refusal::Differs);
            story.write(0, 2, 1, 9);
            story.merges(0);
            story.scans(1);
            let counts = story.stats(0).pages;
            assert_eq!(counts.total(), 3);
        }
    }
    assert!(refused > 0, "no write has come at the right moment");
}

/// A process that holds its mmap lock is tried again; one that exits is left alone.
#[test]
fn a_busy_process_and_one_that_exits() {
    let mut story = Story::new(1);
    story.write(0, 0, 2, 7);
    story.happens(Event::Hold { mm: 0, tries: 3 });
    assert_eq!(story.merges(0), merges(2, 0, 1));
    for steps in 1..4 {
        for after in 0..12 {
            let mut story = Story::new(2);
            story.write(0, 0, 2, 7);
            story.write(1, 0, 2, 7);
            let merge = MergeNow {
                budget: 1,
                interleaved: vec![(after, Event::Exit { mm: 0, steps })],
                ..MergeNow::all_of(0)
            };
            story.0.run(&Op::Merge(merge));
            story.scans(2);
            assert_eq!(story.shared().0, 1);
            story.0.tear_down();
        }
    }
}

/// A pinned page is refused once, and the others are merged without it.
#[test]
fn refused_pages_keep_no_vouched_ones_apart() {
    let mut story = Story::new(1);
    story.write(0, 0, 4, 7);
    story.happens(Event::Pin { mm: 0, page: 1 });
    assert_eq!(story.merges(0), merges(3, 0, 2));
    assert_eq!(story.stats(0).refusals.get(Refusal::Pinned), 1);
    story.happens(Event::Release);
    assert_eq!(story.merges(0), merges(1, 0, 1));
}

/// Whatever pages there are and however they have been scanned: those that are vouched for are
/// merged by one call, and what that has done is what can be seen.
#[test]
fn all_vouched_pages_are_merged() {
    let writes = vec((0..2usize, 0..PAGES, 1..30usize, 0..12u8, 0..3u8), 1..12);
    let collapsed = vec((0..2usize, 0..PAGES), 0..3);
    let merge = (0..PAGES, 1..PAGES, 1..80u32, any::<bool>());
    let given = (writes, collapsed, merge, 0..3usize, any::<[bool; 2]>());
    check(300, given, |(writes, collapsed, merge, scans, knobs)| {
        let mut story = Story::with(2, Op::UseZeroPages(knobs[0]));
        story.0.run(&Op::ScanThreads(2, 1));
        story.0.run(&Op::SmartScan(knobs[1]));
        let half = writes.len() / 2;
        for (n, (mm, page, count, content, step)) in writes.into_iter().enumerate() {
            if n == half {
                story.scans(scans);
            }
            story.happens(Event::Write {
                mm,
                page,
                count,
                content,
                step,
            });
        }
        for (mm, page) in collapsed {
            story.happens(Event::Collapse { mm, page });
        }
        let huge = huge_pages(&story) > 0;
        let (page, count, budget, pool) = merge;
        let merge = MergeNow {
            page,
            count,
            budget,
            pool,
            ..MergeNow::all_of(0)
        };
        let before = (story.shared_now(), story.0.world.borrow().frames.len());
        let done = story.merges_as(&merge);
        let after = (story.shared_now(), story.0.world.borrow().frames.len());
        let world = story.0.world.borrow();
        assert_eq!(after.0 .0 - before.0 .0, done.merged);
        if !huge {
            // A split replaces others.
            assert_eq!(after.0 .1 - before.0 .1, done.zeroed);
            assert_eq!((before.1 - after.1) as u64, done.saved);
        }
        let range = crate::control::range(page, count);
        let space = world.spaces.values().next().unwrap();
        let mut contents = BTreeSet::new();
        for pte in space.ptes.range(range).map(|(_, pte)| pte) {
            if let Pte::Page(frame) = *pte {
                let page = world.page(frame);
                if page.mapping == Mapping::Anon && world.huge(frame).is_none() {
                    assert!(contents.insert(page.content), "two equal pages are left");
                    assert!(page.content != 0 || !knobs[0], "zeroes are left");
                }
            }
        }
    });
}

/// Each page of mergeable memory is counted under one reason.
#[test]
fn each_page_has_one_reason() {
    let mut story = Story::with(2, Op::UseZeroPages(true));
    story.mergeable(0, 1, false);
    story.write(0, 0, 2, 7);
    story.write(0, 2, 3, 0);
    story.write(0, 5, 1, 8);
    story.write(0, AREAS[0].1 + 2, 1, 30);
    // A huge page of which one is pinned, at a multiple of its size.
    for page in 8..16 {
        story.write(0, page, 1, 32 + page as Content);
    }
    for page in 16..24 {
        story.write(0, page, 1, 64 + page as Content);
    }
    story.happens(Event::Collapse { mm: 0, page: 8 });
    story.happens(Event::Collapse { mm: 0, page: 16 });
    assert_eq!(huge_pages(&story), 16);
    story.happens(Event::Pin { mm: 0, page: 9 });
    story.write(0, 6, 1, 9);
    story.scans(3);
    story.write(0, 7, 1, 10);
    story.scans(1);
    for content in [11, 12] {
        story.write(0, 7, 1, content);
        story.scans(1);
    }
    story.happens(Event::Pin { mm: 0, page: 6 });
    story.write(0, AREAS[0].1 + AREAS[1].1, 2, 13);
    let unsplit = 8;
    assert_eq!(
        story.reasons(0),
        Reasons {
            merged: 2,
            zero: 3,
            pinned: 1,
            unsplit,
            // Page 5, and the huge page that could be split.
            unique: 1 + 8,
            changing: 1,
            fresh: 2,
        }
    );
    assert_eq!(story.reasons(1), Reasons::default());
    story.happens(Event::Release);
    let reasons = story.reasons(0);
    assert_eq!((reasons.pinned, reasons.unsplit), (0, 0));
    // A merged page that was written to, and one that is not mergeable any more.
    story.write(0, 0, 1, 14);
    story.unmap(0, 1);
    let reasons = story.reasons(0);
    assert_eq!((reasons.merged, reasons.fresh), (0, 3));
    story.mergeable(0, 0, false);
    let reasons = story.reasons(0);
    assert_eq!((reasons.zero, reasons.unique, reasons.fresh), (0, 0, 2));
}

/// A merged page that no scan has come to, as a child inherits it, counts as merged.
#[test]
fn inherited_pages_are_merged_ones() {
    let mut story = Story::new(1);
    story.write(0, 0, 2, 7);
    story.scans(2);
    story.happens(Event::Fork {
        mm: 0,
        dont_fork: None,
    });
    let expected = Reasons {
        merged: 2,
        ..Reasons::default()
    };
    assert_eq!(story.reasons(1), expected);
    assert_eq!(story.stats(1).pages.total(), 0);
}

/// An answer can be had in parts, each page in one of them, with batches of 64 pages.
#[test]
fn reasons_are_added_up_over_calls() {
    let mut story = Story::with(1, Op::UseZeroPages(true));
    story.write_distinct(0, 20);
    story.write(0, 30, 9, 0);
    story.scans(2);
    story.write(0, 64, 10, 7);
    let whole = story.reasons(0);
    assert_eq!((whole.zero, whole.unique), (9, 119));
    let mut calls = Vec::new();
    for walks in 1..4 {
        let (parts, n) = story.0.why(0, walks);
        assert_eq!(parts, whole);
        calls.push(n);
    }
    // 119 pages that are collected.
    assert_eq!(calls, [2, 1, 1]);
    story.0.check();
}

/// Whatever has happened: asking changes nothing that happens later.
#[test]
fn asking_changes_nothing() {
    check(150, crate::history::history(30), |ops| {
        let mut plain = crate::history::run_history(Hash::Good, &ops);
        let asked: Vec<Op> = ops
            .iter()
            .enumerate()
            .flat_map(|(n, op)| {
                let why = |mm| Op::Why {
                    mm,
                    walks: 1 + n % 3,
                };
                [op.clone(), why(n), why(n + 1)]
            })
            .collect();
        let mut other = crate::history::run_history(Hash::Good, &asked);
        assert_eq!(plain.all_known(), other.all_known());
        plain.full_scan();
        other.full_scan();
        assert_eq!(plain.all_known(), other.all_known());
    });
}

/// One that is busy or exiting has no reasons, and the caller is told.
#[test]
fn no_reasons_of_a_busy_process_or_one_that_exits() {
    use engine_tests::engine::types::Progress;
    let mut story = Story::new(1);
    story.write(0, 0, 3, 7);
    story.0.housekeeping();
    story.happens(Event::Hold { mm: 0, tries: 2 });
    for _ in 0..2 {
        let busy = (Some(Progress::Busy(4096)), Reasons::default());
        assert_eq!(story.0.why_once(0, 4096), busy);
    }
    let reasons = Reasons {
        fresh: 3,
        ..Reasons::default()
    };
    assert_eq!(story.0.why_once(0, 4096), (Some(Progress::Done), reasons));
    // An end before a page is the end.
    story.happens(Event::Exit { mm: 0, steps: 1 });
    let exiting = (Some(Progress::Exiting), Reasons::default());
    assert_eq!(story.0.why_once(0, 0), exiting);
    story.happens(Event::Exit { mm: 0, steps: 2 });
    assert_eq!(story.0.why_once(0, 0), (None, Reasons::default()));
    story.0.check();
}

/// What was unmerged is not known any more, and so does not count as broken; the rest is.
#[test]
fn unmerged_pages_are_forgotten() {
    for (page, count, left) in [(0, PAGES, 0), (0, 2, 3), (1, 3, 2), (4, 1, 4), (9, 1, 5)] {
        let mut story = Story::new(2);
        story.write(0, 0, 5, 7);
        story.write(1, 0, 1, 7);
        story.scans(2);
        assert_eq!(story.shared(), (1, 5));
        story.0.run(&Op::UnmergeRange { mm: 0, page, count });
        assert_eq!(story.shared(), (1, left));
        assert_eq!(story.stats(0).pages.total(), left);
        assert_eq!(story.stats(0).pages.merged, left);
        story.scans(1);
        assert_eq!(story.stats(0).broken, 0);
        assert_eq!(story.stats(0).pages.total(), 5);
        story.scans(2);
        assert_eq!(story.shared(), (1, 5));
    }
}

/// Pages that are no merged ones are forgotten too, with their place among the candidates.
#[test]
fn candidates_of_a_range_are_forgotten() {
    let mut story = Story::new(1);
    story.write_distinct(0, 20);
    story.scans(2);
    assert_eq!(story.stats(0).pages.unique, PAGES as u64);
    story.0.run(&Op::UnmergeRange {
        mm: 0,
        page: 20,
        count: 50,
    });
    assert_eq!(story.stats(0).pages.unique, PAGES as u64 - 50);
    assert_eq!(story.0.engine.metadata.counters.pages_unshared, 78);
    story.0.run(&Op::UnmergeRange {
        mm: 0,
        page: 0,
        count: PAGES,
    });
    assert!(!story.0.engine.metadata.tracks(SlotId(0)));
}

/// A slot that has counted something is not free because its pages are forgotten.
#[test]
fn counts_outlive_forgotten_pages() {
    let mut story = Story::new(1);
    story.write(0, 0, 2, 7);
    story.scans(2);
    story.write(0, 0, 1, 8);
    story.scans(1);
    assert_eq!(story.stats(0).broken, 1);
    story.0.run(&Op::UnmergeRange {
        mm: 0,
        page: 0,
        count: PAGES,
    });
    assert_eq!(story.stats(0).pages.total(), 0);
    assert_eq!(story.stats(0).broken, 1);
    story.happens(Event::Exit { mm: 0, steps: 3 });
    story.scans(1);
    story.spawns();
    assert_eq!(story.stats(0).broken, 0);
}

/// A pass that has fewer partitions than the one before finds the pages of that as candidates that
/// nobody holds.
#[test]
fn a_smaller_pass_holds_no_pages_of_the_larger_one() {
    let mut story = Story::with(1, Op::ScanThreads(2, 1));
    for (page, count, content, step) in [(39, 28, 2, 1), (67, 3, 1, 1), (23, 7, 4, 0)] {
        story.happens(Event::Write {
            mm: 0,
            page,
            count,
            content,
            step,
        });
    }
    let merge = MergeNow {
        count: 70,
        budget: 65,
        pool: true,
        ..MergeNow::all_of(0)
    };
    assert_eq!(story.merges_as(&merge), merges(8 + 4, 0, 7 + 2));
    assert_eq!(story.refused(Refusal::Pinned), 0);
}
