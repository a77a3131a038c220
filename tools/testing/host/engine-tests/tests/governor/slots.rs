// SPDX-License-Identifier: GPL-2.0-only

//! What the registry does for the governor.

use crate::{
    check,
    list::{
        List,
        Pin, //
    }, //
};

use engine_tests::engine::{
    governor::watch::Watch,
    mm_list::{
        MmList,
        Step,
        Visited, //
    },
    types::{
        MmPin,
        Progress,
        SlotId, //
    },
};

use kernel::prelude::GFP_KERNEL;

use proptest::prelude::*;

use std::collections::{
    BTreeMap,
    BTreeSet, //
};

fn slot_of(list: &List, key: usize) -> SlotId {
    let found = list.locked(|registry| {
        let mut all = registry.iter();
        all.find(|(_, mm)| mm.key() == key).map(|(slot, _)| slot)
    });
    found.expect("it is registered")
}

/// A watch that can be told from others.
fn mark(due: u32) -> Watch {
    let mut watch = Watch::default();
    watch.pass_over(due);
    watch
}

/// What is remembered of each mm, by its key.
fn marks(list: &List, now: u32, count: u32) -> BTreeMap<usize, Watch> {
    let mut marks = BTreeMap::new();
    let mut next = Some(0);
    while let Some(from) = next {
        next = list.locked(|registry| {
            registry.watch_in(from, count, now, |slot, mm, watch| {
                assert!((from..from + count).contains(&slot.0));
                assert_eq!(marks.insert(mm.key(), *watch), None, "seen twice");
            })
        });
    }
    marks
}

const DONE: Visited = Visited {
    progress: Progress::Done,
    tracked: true,
};

/// Each registered mm is shown once, whatever has come and gone, and so is what it was given.
#[test]
fn every_mm_is_watched_once() {
    let ops = prop::collection::vec((0..3u8, 0..400usize), 1..900);
    check(40, (ops, 1..200u32), |(ops, count)| {
        let list = List::new();
        let mut known = BTreeMap::new();
        for (n, (op, key)) in ops.into_iter().enumerate() {
            match op {
                0 => {
                    list.enter(Pin::new(key));
                    known.entry(key).or_insert_with(Watch::default);
                }
                1 => {
                    list.exit(key);
                    known.remove(&key);
                }
                _ if known.contains_key(&key) => {
                    let step = list.visit_slot(slot_of(&list, key), |claim, watch| {
                        assert_eq!(claim.mm().key(), key);
                        assert_eq!(*watch, known[&key]);
                        *watch = mark(n as u32);
                        DONE
                    });
                    assert_eq!(step, Step::Visited { reap: false });
                    known.insert(key, mark(n as u32));
                }
                _ => {}
            }
            assert!(list.reap(|_, _| true, || false));
            assert_eq!(list.refill(GFP_KERNEL), Ok(()));
        }
        assert_eq!(marks(&list, 7, count), known);
        list.check();
    });
}

/// What is changed stays; those that are passed over are not shown, and count as looked at.
#[test]
fn what_is_passed_over_is_not_watched() {
    let list = List::with(&[1, 2, 3]);
    list.locked(|registry| {
        assert_eq!(registry.exclude(1, 5, true), Some(true));
        assert!(registry.keep_out(2));
        registry.watch_in(0, 64, 9, |_, mm, watch| {
            assert_eq!(mm.key(), 3);
            *watch = mark(50);
        });
        registry.let_in(2);
        registry.readmit_in(0, 64, 6);
    });
    let expected = [(1, mark(9)), (2, mark(9)), (3, mark(50))];
    assert_eq!(marks(&list, 10, 64), BTreeMap::from(expected));
}

/// A slot whose mm has left or is leaving is not claimed, and a new mm in it begins anew.
#[test]
fn only_the_mm_in_a_slot_is_visited() {
    let list = List::with(&[1]);
    let slot = slot_of(&list, 1);
    let none = |_: &_, _: &mut _| -> Visited { panic!("visited") };
    assert_eq!(list.visit_slot(SlotId(slot.0 + 1), none), Step::Idle);
    assert_eq!(list.visit_slot(SlotId(u32::MAX), none), Step::Idle);
    let step = list.visit_slot(slot, |_, watch| {
        *watch = mark(3);
        assert!(!list.exit(1));
        assert_eq!(list.visit_slot(slot, none), Step::Idle);
        DONE
    });
    assert_eq!(step, Step::Visited { reap: true });
    // Dead, with page state.
    assert_eq!(list.visit_slot(slot, none), Step::Idle);
    assert!(list.reap(|_, _| true, || false));
    list.check();
    list.enter(Pin::new(2));
    assert_eq!(slot_of(&list, 2), slot);
    assert_eq!(marks(&list, 0, 64), BTreeMap::from([(2, Watch::default())]));
}

/// An mm that a visit finds exiting leaves, and its exit finds nothing.
#[test]
fn a_visit_that_finds_an_exit_unregisters() {
    let list = List::with(&[1, 2]);
    let exiting = Visited {
        progress: Progress::Exiting,
        tracked: false,
    };
    let step = list.visit_slot(slot_of(&list, 1), |_, _| exiting);
    assert_eq!(step, Step::Visited { reap: true });
    assert!(!list.exit(1));
    let mut reaped = BTreeSet::new();
    assert!(list.reap(|_, mm| reaped.insert(mm.key()), || false));
    assert_eq!(reaped, BTreeSet::from([1]));
    list.check();
}

/// The cursor of full scans and the governor's visits do not meet: whoever stops a full scan in the
/// middle, the next one begins with the first mm, and skips none.
#[test]
fn a_full_scan_that_is_left_begins_anew() {
    let list = List::with(&[1, 2, 3]);
    let scan = |progress| {
        let mut seen = None;
        let step = list.visit(|claim| {
            seen = Some((claim.mm().key(), claim.address()));
            Visited {
                progress,
                tracked: true,
            }
        });
        (seen, step)
    };
    assert!(list.locked(|registry| registry.begin()));
    assert_eq!(scan(Progress::Done).0, Some((1, 0)));
    assert_eq!(scan(Progress::At(0x5000)).0, Some((2, 0)));
    list.locked(|registry| registry.abandon_scan());
    list.check();
    assert!(!list.locked(|registry| registry.scanning()));
    assert_eq!(scan(Progress::Done), (None, Step::Idle));
    list.visit_slot(slot_of(&list, 1), |_, _| DONE);
    list.exit(2);
    list.check();
    assert!(list.locked(|registry| registry.begin()));
    assert_eq!(scan(Progress::Done).0, Some((1, 0)));
    assert_eq!(scan(Progress::Done).0, Some((3, 0)));
    assert_eq!(scan(Progress::Done), (None, Step::End));
}
