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
        Content,
        Event,
        Hash,
        Pte,
        AREAS,
        PAGES, //
    },
};

use engine_tests::engine::types::Refusal;

/// A machine with a number of processes, all of whose memory is mergeable.
struct Story(Machine);

impl Story {
    fn new(processes: usize) -> Self {
        let mut story = Self(Machine::new(Hash::Good));
        for _ in 0..processes {
            let mergeable = [true; AREAS.len()];
            story.happens(Event::Spawn { mergeable });
        }
        story
    }

    /// The same, with one knob changed.
    fn with(processes: usize, knob: Op) -> Self {
        let mut story = Self::new(processes);
        story.0.run(&knob);
        story
    }

    fn happens(&mut self, event: Event) {
        self.0.run(&Op::Happen(event));
    }

    /// A process writes the same content to pages from `page` on.
    fn write(&mut self, mm: usize, page: usize, count: usize, content: Content) {
        self.happens(write(mm, page, count, content));
    }

    /// A process writes to all of its pages, to each another content from `content` on.
    fn write_distinct(&mut self, mm: usize, content: Content) {
        self.happens(Event::Write {
            mm,
            page: 0,
            count: PAGES,
            content,
            step: 1,
        });
    }

    fn scans(&mut self, full_scans: usize) {
        for _ in 0..full_scans {
            self.0.run(&Op::FullScan {
                interleaved: Vec::new(),
            });
        }
    }

    /// `pages_shared` and `pages_sharing`.
    fn shared(&self) -> (u64, u64) {
        let counters = &self.0.engine.metadata.counters;
        (counters.pages_shared, counters.pages_sharing)
    }

    fn refused(&self, refusal: Refusal) -> u64 {
        self.0.engine.metadata.refusals.get(refusal)
    }
}

fn write(mm: usize, page: usize, count: usize, content: Content) -> Event {
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

fn huge_pages(story: &Story) -> usize {
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
