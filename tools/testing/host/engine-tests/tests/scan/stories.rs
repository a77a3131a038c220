// SPDX-License-Identifier: GPL-2.0-only

//! What KSM does, told in a dozen short stories. Random histories are in `main.rs`.
//!
//! Each step of a story also checks everything that has to hold at any time: contents, counters,
//! and the engine's invariants.

use crate::{
    machine::{
        Machine,
        Op, //
    },
    sim::{
        Chance,
        Content,
        Event,
        Hash,
        Pte,
        AREAS,
        PAGES, //
    },
};

use engine_tests::engine::{
    metadata::mm_stats::MmStats,
    page_state::PageCounts,
    types::{
        Refusal,
        SlotId, //
    },
};

/// A machine with a number of processes, all of whose memory is mergeable.
pub(crate) struct Story(pub(crate) Machine);

impl Story {
    pub(crate) fn new(processes: usize) -> Self {
        let mut story = Self(Machine::new(Hash::Good));
        for _ in 0..processes {
            let mergeable = [true; AREAS.len()];
            story.happens(Event::Spawn { mergeable });
        }
        story
    }

    /// The same, with one knob changed.
    pub(crate) fn with(processes: usize, knob: Op) -> Self {
        let mut story = Self::new(processes);
        story.0.run(&knob);
        story
    }

    pub(crate) fn happens(&mut self, event: Event) {
        self.0.run(&Op::Happen(event));
    }

    /// A process writes the same content to pages from `page` on.
    pub(crate) fn write(&mut self, mm: usize, page: usize, count: usize, content: Content) {
        self.happens(write(mm, page, count, content));
    }

    /// A process writes to all of its pages, to each another content from `content` on.
    pub(crate) fn write_distinct(&mut self, mm: usize, content: Content) {
        self.happens(Event::Write {
            mm,
            page: 0,
            count: PAGES,
            content,
            step: 1,
        });
    }

    pub(crate) fn scans(&mut self, full_scans: usize) {
        for _ in 0..full_scans {
            self.0.run(&Op::FullScan {
                interleaved: Vec::new(),
            });
        }
    }

    /// `pages_shared` and `pages_sharing`.
    pub(crate) fn shared(&self) -> (u64, u64) {
        let counters = &self.0.engine.metadata.counters;
        (counters.pages_shared, counters.pages_sharing)
    }

    pub(crate) fn refused(&self, refusal: Refusal) -> u64 {
        self.0.engine.metadata.refusals.get(refusal)
    }

    /// What is counted for a process of those that came first.
    pub(crate) fn stats(&self, mm: u32) -> MmStats {
        self.0.engine.metadata.mm_stats(SlotId(mm))
    }

    pub(crate) fn unmap(&mut self, mm: usize, page: usize) {
        let count = 1;
        self.happens(Event::Unmap { mm, page, count });
    }
}

pub(crate) fn write(mm: usize, page: usize, count: usize, content: Content) -> Event {
    Event::Write {
        mm,
        page,
        count,
        content,
        step: 0,
    }
}

/// Pages that do not change from one scan to the next are merged by the second.
#[test]
fn two_equal_pages_merge_in_the_second_scan() {
    let mut story = Story::new(2);
    story.write(0, 3, 1, 7);
    story.write(1, 5, 1, 7);
    story.scans(1);
    assert_eq!(story.shared(), (0, 0));
    story.scans(1);
    assert_eq!(story.shared(), (1, 1));
}

/// A page that is written to between any two scans does not hold still, although the CPU that
/// writes remembers the translation, and sets no accessed bit as long as it does.
#[test]
fn a_hot_page_is_not_merged() {
    let mut story = Story::new(1);
    story.write(0, 0, 1, 7);
    story.write(0, 1, 1, 8);
    for scan in 0..40 {
        story.write(0, 2, 1, 7 + scan % 2);
        story.scans(1);
        assert_eq!(story.shared(), (0, 0));
    }
    story.scans(2);
    assert_eq!(story.shared(), (1, 1));
}

/// A huge page has one accessed bit, which the walk clears that reaches its first page: others of
/// it count as accessed, too, when a later walk reaches them.
#[test]
fn a_hot_huge_page_is_not_merged() {
    let mut story = Story::new(1);
    story.write_distinct(0, 20);
    story.write(0, 0, 1, 7);
    story.write(0, 1, 1, 8);
    // A walk collects 40 pages here: the huge page is from page 76 to 83.
    story.happens(Event::Collapse { mm: 0, page: 76 });
    assert_eq!(huge_pages(&story), 8);
    for scan in 0..20 {
        story.write(0, 83, 1, 7 + scan % 2);
        story.scans(1);
        assert_eq!(story.shared(), (0, 0));
    }
    story.scans(2);
    assert_eq!(story.shared(), (1, 1));
}

/// With several threads what a walk has found is dropped if one below it ends early: what it has
/// found out about accesses is not.
#[test]
fn a_hot_page_is_not_merged_by_several_threads() {
    for seed in 0..10 {
        let mut story = Story::with(1, Op::ScanThreads(2, seed));
        story.write_distinct(0, 20);
        story.write(0, PAGES - 2, 1, 7);
        story.write(0, PAGES - 1, 1, 8);
        for scan in 0..20 {
            // The second pass begins at page 53, and its second partition at page 106. Many gaps
            // where pages were end the walk of the first.
            for page in (60..100).step_by(2) {
                match scan % 2 {
                    0 => story.write(0, page, 1, 20 + page as Content),
                    _ => story.happens(Event::Unmap {
                        mm: 0,
                        page,
                        count: 1,
                    }),
                }
            }
            story.write(0, PAGES - 10, 1, 7 + scan % 2);
            story.scans(1);
            assert_eq!(story.shared(), (0, 0));
            assert_eq!(story.refused(Refusal::Differs), 0, "a merge in vain");
        }
    }
}

/// Whenever a page is written to during a full scan, the next one reads it, also where a CPU that
/// remembers the translation has set no accessed bit.
#[test]
fn a_write_between_a_look_and_the_flush_is_seen() {
    for step in 0..30 {
        let mut story = Story::new(1);
        story.write(0, 0, 1, 7);
        story.write(0, 1, 1, 8);
        story.scans(2);
        story.write(0, 1, 1, 9);
        let interleaved = vec![(step, write(0, 1, 1, 7))];
        story.0.run(&Op::FullScan { interleaved });
        story.scans(2);
        assert_eq!(story.shared(), (1, 1), "written at step {step}");
    }
}

/// Where no accessed bit was cleared, no CPU has a translation that would hide an access.
#[test]
fn tlbs_are_flushed_if_a_bit_was_cleared() {
    for threads in [1, 2] {
        let mut story = Story::with(2, Op::ScanThreads(threads, 3));
        story.write_distinct(0, 20);
        story.write(1, 5, 2, 7);
        let flushes = |story: &mut Story| {
            let before = story.0.world.borrow().flushes;
            story.scans(1);
            story.0.world.borrow().flushes - before
        };
        assert_eq!(flushes(&mut story), 2);
        // What was accessed is read once more, and its bit set by that.
        story.scans(2);
        for scan in 0..20 {
            assert_eq!(flushes(&mut story), 0, "scan {scan}");
        }
        story.write(0, 3, 1, 9);
        assert_eq!(flushes(&mut story), 1);
    }
}

/// A page that changes without an accessed bit is found out after sixteen looks.
#[test]
fn a_change_without_a_trace_is_seen() {
    for smart_scan in [false, true] {
        for age in [1, 3, 7, 12, 20] {
            let mut story = Story::with(1, Op::SmartScan(smart_scan));
            story.write(0, 0, 1, 7);
            story.write(0, 1, 1, 8);
            story.scans(age);
            story.write(0, 1, 1, 7);
            story.happens(Event::Age {
                mm: 0,
                page: 1,
                count: 1,
            });
            // It has to be looked at twice, and skips may come before both.
            let scans = if smart_scan { 9 * 17 } else { 17 };
            story.scans(scans);
            assert_eq!(story.shared(), (1, 1));
        }
    }
}

/// So it is where looks have numbers of their own, whatever full scans are under way.
#[test]
fn a_change_without_a_trace_is_seen_by_numbered_looks() {
    for age in [2, 3, 7, 12, 250] {
        for scans in [0, 1, 5] {
            let mut story = Story::new(1);
            story.write(0, 0, 1, 7);
            story.write(0, 1, 1, 8);
            (0..age).for_each(|look| story.0.look(0, look));
            story.write(0, 1, 1, 7);
            story.happens(Event::Age {
                mm: 0,
                page: 1,
                count: 1,
            });
            let mut number = age;
            for look in 0..17 {
                story.0.look(0, number);
                number = number.checked_add(1).unwrap_or(16);
                if look % 4 == 0 {
                    (0..scans).for_each(|_| story.0.engine.end_full_scan());
                }
            }
            assert_eq!(story.shared(), (1, 1), "{age} {scans}");
        }
    }
}

/// A write breaks the mapping; with the last mapping the KSM page is gone.
#[test]
fn a_write_gives_a_merged_page_back() {
    let mut story = Story::new(1);
    story.write(0, 0, 2, 7);
    story.scans(2);
    story.write(0, 0, 1, 8);
    story.scans(1);
    assert_eq!(story.shared(), (1, 0));
    story.write(0, 1, 1, 8);
    story.scans(1);
    story.0.run(&Op::Prune(10));
    assert_eq!(story.0.engine.metadata.nodes(), 0);
}

/// A child maps the KSM pages of its parent, and the next scan counts that.
#[test]
fn a_child_inherits_merged_pages() {
    let mut story = Story::new(1);
    story.write(0, 0, 2, 7);
    story.scans(2);
    story.happens(Event::Fork {
        mm: 0,
        dont_fork: None,
    });
    assert_eq!(story.shared(), (1, 1));
    story.scans(1);
    assert_eq!(story.shared(), (1, 3));
}

/// `max_page_sharing` mappings fill a KSM page; what comes then makes another of the same content.
#[test]
fn a_full_page_gets_a_dup() {
    let mut story = Story::new(3);
    story.write(0, 0, PAGES, 7);
    story.write(1, 0, PAGES, 7);
    story.write(2, 0, 1, 7);
    story.scans(3);
    assert_eq!(2 * PAGES, 256);
    assert_eq!(story.shared(), (1, 255));
    story.write(2, 1, 1, 7);
    story.scans(2);
    assert_eq!(story.shared(), (2, 256));
    let counters = &story.0.engine.metadata.counters;
    assert_eq!(
        (counters.stable_node_chains, counters.stable_node_dups),
        (1, 2)
    );
}

/// Whenever a page is written to during the scan that merges it, its content stays.
#[test]
fn a_page_is_written_while_it_is_merged() {
    let mut refused = 0;
    for step in 0..30 {
        let mut story = Story::new(1);
        story.write(0, 0, 2, 7);
        story.scans(1);
        let interleaved = vec![(step, write(0, 1, 1, 8))];
        story.0.run(&Op::FullScan { interleaved });
        refused += story.refused(Refusal::Differs);
    }
    assert!(refused > 0, "no write has come at the right moment");
}

/// Equal fingerprints are no proof: contents are compared before anything is merged.
#[test]
fn pages_of_one_hash_differ() {
    let mut story = Story(Machine::new(Hash::Colliding));
    let mergeable = [true; AREAS.len()];
    story.happens(Event::Spawn { mergeable });
    story.write(0, 0, 1, 7);
    story.write(0, 1, 1, 10);
    story.scans(4);
    assert_eq!(story.shared(), (0, 0));
    assert!(story.refused(Refusal::Differs) > 0);
}

/// A pinned page could be written to through the pin: it waits until that is gone.
#[test]
fn a_pinned_page_is_left() {
    let mut story = Story::new(1);
    story.write(0, 0, 2, 7);
    story.happens(Event::Pin { mm: 0, page: 0 });
    story.scans(4);
    assert_eq!(story.shared(), (0, 0));
    assert!(story.refused(Refusal::Pinned) > 0);
    story.happens(Event::Release);
    story.scans(2);
    assert_eq!(story.shared(), (1, 1));
}

/// Pages that cannot be merged, scanned between others of the same content, keep none of these from
/// the others: the fault is theirs, and they are not found in the others' place.
#[test]
fn pinned_pages_keep_no_others_apart() {
    let mut story = Story::new(4);
    for mm in 0..4 {
        story.write(mm, 0, 1, 7);
    }
    story.happens(Event::Pin { mm: 1, page: 0 });
    story.happens(Event::Pin { mm: 3, page: 0 });
    story.scans(3);
    assert_eq!(story.shared(), (1, 1));
    // Both had a fingerprint all the time.
    assert_eq!(story.refused(Refusal::Gone), 0);
    story.happens(Event::Release);
    story.scans(2);
    assert_eq!(story.shared(), (1, 3));
}

/// No huge page is split, and no page converted, for one that cannot be merged.
#[test]
fn a_huge_page_is_not_split_for_a_pinned_one() {
    for pinned in [2, 20] {
        let mut story = Story::new(1);
        for page in 0..8 {
            story.write(0, page, 1, page as Content + 1);
        }
        story.happens(Event::Collapse { mm: 0, page: 0 });
        story.write(0, 20, 1, 3);
        let pin = Event::Pin {
            mm: 0,
            page: pinned,
        };
        story.happens(pin);
        story.scans(6);
        assert_eq!(story.shared(), (0, 0));
        let world = story.0.world.borrow();
        assert_eq!((world.splits, world.undone), (0, 0));
    }
}

/// A huge page that cannot be split is tried once in a pass, not once for each of its pages.
#[test]
fn an_unsplittable_huge_page_is_tried_once() {
    let mut story = Story::new(1);
    story.write(0, 0, 8, 7);
    story.write(0, 16, 2, 7);
    story.happens(Event::Collapse { mm: 0, page: 0 });
    story.happens(Event::Pin { mm: 0, page: 3 });
    story.scans(3);
    let before = story.refused(Refusal::Unsplit);
    story.scans(1);
    assert_eq!(story.refused(Refusal::Unsplit), before + 1);
    assert_eq!(story.shared(), (1, 1));
}

/// Two KSM pages of one content become one when there is room.
#[test]
fn nodes_with_room_for_each_other_are_joined() {
    let mut story = Story::with(1, Op::MaxPageSharing(4));
    story.write(0, 0, 4, 7);
    story.scans(2);
    story.write(0, 4, 2, 7);
    story.scans(2);
    assert_eq!(story.shared(), (2, 4));
    story.write(0, 0, 2, 8);
    story.scans(3);
    story.0.run(&Op::Prune(10));
    story.scans(1);
    // Two pages of either content.
    assert_eq!(story.shared(), (2, 4));
    story.0.run(&Op::Prune(10));
    let counters = &story.0.engine.metadata.counters;
    assert_eq!(counters.stable_node_chains, 0);
}

/// Two pages are written to while they are merged, and become a KSM page of their new contents:
/// that joins the one which is there.
#[test]
fn a_pair_that_changes_joins_its_equals() {
    let mut joined = 0;
    for step in 0..40 {
        let mut story = Story::new(1);
        story.write(0, 8, 2, 9);
        story.scans(2);
        story.write(0, 0, 2, 7);
        story.scans(1);
        let age = Event::Age {
            mm: 0,
            page: 0,
            count: 2,
        };
        let interleaved = vec![(step, write(0, 0, 2, 9)), (0, age)];
        story.0.run(&Op::FullScan { interleaved });
        joined += u64::from(story.shared().0 == 2);
        // A page that looks unaccessed is read again in one full scan of 16.
        story.scans(18);
        assert_eq!(story.shared(), (1, 3));
    }
    assert!(joined > 0, "no write has come at the right moment");
}

/// `run` = 2 that ends early leaves what it has not come to; the next one finishes.
#[test]
fn unmerging_is_interrupted() {
    let mut story = Story::new(2);
    story.write(0, 0, 2, 7);
    story.write(1, 0, 2, 7);
    story.scans(2);
    let unmerge = |fail_after| Op::Unmerge {
        fail_after,
        interleaved: Vec::new(),
    };
    story.0.run(&unmerge(Some(3)));
    assert_ne!(story.shared(), (0, 0));
    story.0.run(&unmerge(None));
    assert_eq!(story.shared(), (0, 0));
}

/// With `use_zero_pages` pages of zeroes are replaced by the zero page, which needs no KSM page.
#[test]
fn pages_of_zeroes_need_no_ksm_page() {
    let mut story = Story::with(1, Op::UseZeroPages(true));
    story.write(0, 0, 3, 0);
    story.scans(2);
    assert_eq!(story.shared(), (0, 0));
    assert_eq!(story.0.world.borrow().zero_pages, 3);
}

/// A mapping that leaves its node is not prepared beside another thread's merge of that content
/// because one with the zero page is: the simulation would find `max_page_sharing` exceeded. As a
/// random history had it.
#[test]
fn a_merge_with_the_zero_page_hides_no_merge_in_flight() {
    let mergeable = [true; AREAS.len()];
    let scan = |budget, interleaved| Op::Scan {
        budget,
        pause_after: None,
        interleaved,
    };
    let full_scan = |interleaved| Op::FullScan { interleaved };
    let fork = |mm| Event::Fork {
        mm,
        dont_fork: None,
    };
    let mut machine = Machine::new(Hash::Colliding);
    for op in [
        Op::UseZeroPages(true),
        Op::MaxPageSharing(3),
        Op::Happen(Event::Spawn { mergeable }),
        Op::Happen(Event::Spawn { mergeable }),
        Op::Happen(Event::Spawn { mergeable }),
        Op::Happen(write(0, 44, 3, 4)),
        Op::Happen(write(7, 35, 80, 3)),
        Op::Happen(write(0, 47, 1, 2)),
        Op::Happen(write(7, 11, 39, 1)),
        Op::Happen(fork(1)),
        Op::Chance(Some(Chance {
            seed: 14013986550193927285,
            one_in: 5,
        })),
        full_scan(vec![]),
        scan(44, vec![(8, fork(1))]),
        Op::ScanThreads(2, 6133589852849562263),
        full_scan(vec![(0, fork(2)), (0, Event::Hold { mm: 0, tries: 2 })]),
        Op::Happen(write(6, 0, 1, 1)),
        Op::Happen(write(6, 1, 1, 3)),
        Op::Happen(write(3, 23, 1, 0)),
        scan(1, vec![]),
        scan(56, vec![]),
        scan(29, vec![(0, Event::Exit { mm: 7, steps: 1 })]),
        full_scan(vec![]),
    ] {
        machine.run(&op);
    }
    machine.tear_down();
}

/// A child inherits the count of its parent's zero pages, but not all of them: the next scan
/// corrects the count.
#[test]
fn zero_pages_are_counted_again() {
    let mut story = Story::with(1, Op::UseZeroPages(true));
    story.write(0, 0, AREAS[0].1 + 2, 0);
    story.scans(2);
    story.happens(Event::Fork {
        mm: 0,
        dont_fork: Some(0),
    });
    story.scans(1);
    story.0.assert_zero_pages_counted();
    story.happens(Event::Miscount { mm: 0, by: -7 });
    story.scans(1);
    story.0.assert_zero_pages_counted();
}

/// Zero pages that are moved while the scan passes are not counted twice, nor forgotten.
#[test]
fn zero_pages_are_moved() {
    for after in 0..20 {
        for (from, to) in [(0, 40), (40, 0)] {
            let mut story = Story::with(1, Op::UseZeroPages(true));
            story.write(0, from, 3, 0);
            story.write(0, 10, 20, 7);
            story.scans(2);
            let count = 3;
            story.0.run(&Op::FullScan {
                interleaved: vec![(
                    after,
                    Event::Move {
                        mm: 0,
                        from,
                        to,
                        count,
                    },
                )],
            });
            story.0.assert_zero_pages_counted();
        }
    }
}

/// Smart scan skips a page that never has an equal: at the age of 3 for the first time.
#[test]
fn smart_scan_skips_what_has_no_equal() {
    let mut story = Story::with(1, Op::SmartScan(true));
    story.write(0, 0, 1, 7);
    story.scans(4);
    assert_eq!(story.0.engine.metadata.counters.pages_skipped, 0);
    story.scans(2);
    assert_eq!(story.0.engine.metadata.counters.pages_skipped, 1);
}

/// A huge page is split if one of its pages can be merged.
#[test]
fn a_huge_page_is_split() {
    let mut story = Story::new(1);
    for page in 0..8 {
        story.write(0, page, 1, page as Content + 1);
    }
    story.happens(Event::Collapse { mm: 0, page: 0 });
    story.write(0, 20, 1, 3);
    story.scans(1);
    assert!(huge_pages(&story) > 0);
    // The page of the huge one is the candidate, and other pages of it are held by the batch.
    story.scans(1);
    assert_eq!(story.refused(Refusal::Unsplit), 0);
    assert_eq!(story.shared(), (1, 1));
    assert_eq!(huge_pages(&story), 0);
}

/// A batch holds references to all pages of a huge page. It drops those to the others before the
/// page is split, and takes them again: two pages merge in one scan.
#[test]
fn a_batch_releases_a_huge_page_that_is_split() {
    let mut story = Story::new(1);
    story.write(0, 0, 1, 3);
    story.write(0, 1, 1, 6);
    for page in 0..8 {
        story.write(0, 8 + page, 1, page as Content + 1);
    }
    story.happens(Event::Collapse { mm: 0, page: 8 });
    assert_eq!(huge_pages(&story), 8);
    story.scans(1);
    assert_eq!(story.shared(), (0, 0));
    story.scans(1);
    assert_eq!(story.refused(Refusal::Unsplit), 0);
    assert_eq!(story.shared(), (2, 2));
    assert_eq!(huge_pages(&story), 0);
}

pub(crate) fn huge_pages(story: &Story) -> usize {
    let world = story.0.world.borrow();
    let frames = world.frames.keys();
    frames.filter(|frame| world.huge(**frame).is_some()).count()
}

/// With `merge_across_nodes` = 0 only pages of one NUMA node are merged.
#[test]
fn numa_nodes_are_kept_apart() {
    let mut story = Story::with(1, Op::MergeAcrossNodes(false));
    let migrate = |page, nid| Event::Migrate { mm: 0, page, nid };
    story.write(0, 0, 2, 7);
    story.happens(migrate(0, 0));
    story.happens(migrate(1, 1));
    story.scans(4);
    assert_eq!(story.shared(), (0, 0));
    story.happens(migrate(1, 0));
    story.scans(3);
    assert_eq!(story.shared(), (1, 1));
}

/// A process exits: its mappings are no longer counted, and the other keeps its page.
#[test]
fn a_process_exits() {
    let mut story = Story::new(2);
    story.write(0, 0, 1, 7);
    story.write(1, 0, 1, 7);
    story.scans(2);
    story.happens(Event::Exit { mm: 0, steps: 3 });
    story.scans(1);
    assert_eq!(story.shared(), (1, 0));
    let world = story.0.world.borrow();
    let mapped = |pte: &Pte| matches!(pte, Pte::Page(_));
    let left = world.spaces.values().flat_map(|space| space.ptes.values());
    assert_eq!(left.filter(|pte| mapped(pte)).count(), 1);
}

/// A process without a page takes its part of the budget, so that a batch over nothing ends.
#[test]
fn empty_memory_costs_budget() {
    let mut story = Story::new(5);
    assert!(!story.0.scan(3));
    assert!(!story.0.scan(1));
    // The fifth process, and the end of the full scan.
    assert!(story.0.scan(2));
    assert_eq!(story.0.engine.metadata.counters.pages_scanned, 0);
}

/// A walk that finds unmapped memory again and again does not end there: with several threads the
/// walks of those behind it would be in vain.
#[test]
fn gaps_cost_no_walks() {
    let mut story = Story::with(1, Op::ScanThreads(2, 1));
    let far = AREAS[0].1 + AREAS[1].1;
    for page in 0..AREAS[2].1 {
        story.write(0, far + page, 1, 1 + page as Content);
    }
    // Until the partitions have the size that they keep.
    story.scans(8);
    for page in (1..AREAS[2].1).step_by(2) {
        story.happens(Event::Unmap {
            mm: 0,
            page: far + page,
            count: 1,
        });
    }
    let walks = |story: &mut Story| {
        let before = story.0.world.borrow().walks;
        story.scans(1);
        let after = story.0.world.borrow().walks;
        after - before
    };
    let with_gaps = walks(&mut story);
    // What was tracked there has been forgotten.
    assert_eq!(with_gaps, walks(&mut story));
}

/// A process that holds its mmap lock is scanned when it has let go of it.
#[test]
fn a_process_that_is_busy_is_scanned_later() {
    let mut story = Story::new(2);
    story.write(0, 3, 1, 7);
    story.write(1, 5, 1, 7);
    story.scans(1);
    story.happens(Event::Hold { mm: 0, tries: 3 });
    story.scans(1);
    assert_eq!(story.shared(), (1, 1));
}

/// Each page of a process is counted by what is known of it.
#[test]
fn pages_are_counted_for_their_process() {
    let mut story = Story::new(2);
    story.write(0, 0, 2, 7);
    story.write(0, 2, 1, 8);
    for scan in 0..4 {
        story.write(0, 3, 1, 20 + scan);
        if scan == 3 {
            story.write(0, 4, 3, 30);
            story.write(1, 0, 1, 31);
        }
        story.scans(1);
    }
    let counts = PageCounts {
        merged: 2,
        unique: 1,
        changing: 1,
        fresh: 3,
    };
    assert_eq!(story.stats(0).pages, counts);
    assert_eq!(story.stats(1).pages.fresh, 1);
    assert_eq!(story.stats(1).pages.total(), 1);
    story.happens(Event::Exit { mm: 0, steps: 3 });
    story.scans(1);
    assert_eq!(story.stats(0), MmStats::default());
    assert_eq!(story.stats(1).pages.unique, 1);
}

/// A refusal is counted for the process whose page is at fault, whichever is scanned first, and is
/// not inherited by the next process of the slot.
#[test]
fn refusals_are_counted_for_the_process_at_fault() {
    for pinned in [0, 1] {
        let mut story = Story::new(2);
        story.write(0, 0, 1, 7);
        story.write(1, 0, 1, 7);
        let mm = pinned as usize;
        story.happens(Event::Pin { mm, page: 0 });
        story.scans(4);
        let all = story.refused(Refusal::Pinned);
        assert!(all > 0);
        assert_eq!(story.stats(pinned).refusals.get(Refusal::Pinned), all);
        assert_eq!(story.stats(1 - pinned).refusals.get(Refusal::Pinned), 0);
        // It has no page left, and is not known by its pages any more.
        story.unmap(mm, 0);
        story.scans(1);
        assert_eq!(story.stats(pinned).pages.total(), 0);
        assert_eq!(story.stats(pinned).refusals.get(Refusal::Pinned), all);
        story.happens(Event::Exit { mm, steps: 3 });
        let mergeable = [true; AREAS.len()];
        story.scans(1);
        story.happens(Event::Spawn { mergeable });
        story.scans(1);
        assert_eq!(story.stats(pinned), MmStats::default());
        assert_eq!(story.refused(Refusal::Pinned), all);
    }
}

/// A merged page that is written to counts as broken once, for the process that wrote; one that is
/// unmapped does not.
#[test]
fn broken_pages_are_counted() {
    let broken = |story: &Story| [0, 1].map(|mm| story.stats(mm).broken);
    let mut story = Story::new(2);
    story.write(0, 0, 4, 7);
    story.write(1, 0, 1, 7);
    story.scans(2);
    assert_eq!(story.stats(0).pages.merged, 4);
    story.write(0, 1, 1, 8);
    story.unmap(0, 2);
    story.scans(3);
    assert_eq!(broken(&story), [1, 0]);
    story.write(1, 0, 1, 9);
    story.scans(3);
    assert_eq!(broken(&story), [1, 1]);
    assert_eq!(story.stats(0).pages.merged, 2);
}

/// The merged page may be freed, and its node pruned, before the scan comes to where it was.
#[test]
fn broken_pages_of_a_pruned_node_are_counted() {
    for smart_scan in [false, true] {
        for threads in [1, 2] {
            let mut story = Story::with(2, Op::SmartScan(smart_scan));
            story.0.run(&Op::ScanThreads(threads, 3));
            story.write(0, 0, 3, 7);
            story.write(1, 0, 1, 7);
            story.scans(2);
            assert_eq!(story.shared(), (1, 3));
            story.write(0, 0, 1, 8);
            story.write(0, 1, 1, 9);
            story.unmap(0, 2);
            story.unmap(1, 0);
            story.0.run(&Op::Prune(10));
            assert_eq!(story.0.engine.metadata.nodes(), 0);
            assert_eq!(story.stats(0).pages.fresh, 3);
            story.scans(30);
            assert_eq!(story.stats(0).broken, 2);
            assert_eq!(story.stats(1).broken, 0);
            assert_eq!(story.stats(0).pages.total(), 2);
        }
    }
}

/// What is found there is at rest as soon as any other page that was not looked at before.
#[test]
fn pages_of_a_pruned_node_are_new() {
    let mut story = Story::new(1);
    story.write(0, 0, 2, 7);
    story.scans(2);
    story.write(0, 0, 1, 8);
    story.write(0, 1, 1, 9);
    story.0.run(&Op::Prune(10));
    story.happens(Event::Age {
        mm: 0,
        page: 0,
        count: 2,
    });
    story.scans(1);
    assert_eq!((story.stats(0).broken, story.stats(0).pages.unique), (2, 2));
}
