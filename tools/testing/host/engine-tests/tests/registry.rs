// SPDX-License-Identifier: GPL-2.0-only

//! The registry against a model: the order of the scan, the life of a slot, and every pin.

use engine_tests::engine::{
    registry::{
        Claim,
        Dead,
        Enter,
        Exit,
        Next,
        Registry,
        Released,
        SlotChunk, //
    }, //
    types::{
        MmPin,
        SlotId, //
    },
};

use kernel::{
    prelude::GFP_KERNEL,
    testing::{
        self,
        Fail, //
    }, //
};

use proptest::prelude::*;

use std::{
    cell::Cell,
    collections::BTreeMap,
    rc::Rc, //
};

thread_local! {
    static LOCKED: Cell<bool> = const { Cell::new(false) };
}

/// An mm, as its exit and its pins see it.
#[derive(Debug, Default)]
struct Mm {
    key: usize,
    exiting: Cell<bool>,
    pins: Cell<usize>,
}

/// A pin on an [`Mm`], which must not be dropped under the lock.
#[derive(Debug)]
struct Pin(Rc<Mm>);

impl Pin {
    fn new(mm: &Rc<Mm>) -> Self {
        mm.pins.set(mm.pins.get() + 1);
        Self(mm.clone())
    }
}

impl MmPin for Pin {
    fn key(&self) -> usize {
        self.0.key
    }

    fn exiting(&self) -> bool {
        self.0.exiting.get()
    }

    fn clone_pin(&self) -> Self {
        Self::new(&self.0)
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        assert!(!LOCKED.get(), "dropped under the lock");
        self.0.pins.set(self.0.pins.get() - 1);
    }
}

fn mm(key: usize) -> Rc<Mm> {
    Rc::new(Mm {
        key,
        ..Mm::default()
    })
}

/// A registry behind a lock, checked after each use.
struct Locked(Registry<Pin>);

impl Locked {
    fn new() -> Self {
        let mut this = Self(Registry::new());
        this.refill();
        this
    }

    fn with<R>(&mut self, f: impl FnOnce(&mut Registry<Pin>) -> R) -> R {
        LOCKED.set(true);
        let before = (testing::allocations(), testing::live_bytes());
        let result = f(&mut self.0);
        let after = (testing::allocations(), testing::live_bytes());
        assert_eq!(before, after, "allocated or freed under the lock");
        LOCKED.set(false);
        assert_eq!(self.0.check(), Ok(()));
        result
    }

    /// Adds a chunk if one is wanted.
    fn refill(&mut self) {
        if let Some(number) = self.with(|registry| registry.wanted()) {
            let chunk = SlotChunk::new(number, GFP_KERNEL).expect("memory for a chunk");
            assert!(self.with(|registry| registry.add_chunk(chunk)).is_ok());
        }
    }

    fn enter(&mut self, mm: &Rc<Mm>) -> Enter<Pin> {
        let pin = Pin::new(mm);
        self.with(|registry| registry.enter(pin))
    }

    fn exit(&mut self, key: usize) -> Exit<Pin> {
        self.with(|registry| registry.exit(key))
    }

    fn visit(&mut self) -> Claim<Pin> {
        match self.with(|registry| registry.claim()) {
            Next::Visit(claim) => claim,
            other => panic!("no mm to visit: {other:?}"),
        }
    }

    fn release(&mut self, claim: Claim<Pin>, tracked: bool) -> Released<Pin> {
        self.with(|registry| registry.release(claim, tracked))
    }

    /// The registered mms, in scan order.
    fn keys(&self) -> Vec<usize> {
        self.0.iter().map(|(_, pin)| pin.key()).collect()
    }

    /// Whether no mm waits on the dead list.
    fn none_dead(&mut self) -> bool {
        self.with(|registry| registry.pop_dead()).is_none()
    }

    /// Visits every mm until the end of the scan, and leaves each as `tracked` says.
    fn scan(&mut self, tracked: bool) -> Vec<usize> {
        let mut keys = Vec::new();
        assert!(self.with(|registry| registry.begin()));
        loop {
            match self.with(|registry| registry.claim()) {
                Next::Visit(claim) => {
                    keys.push(claim.mm().key());
                    self.with(|registry| registry.advance(&claim));
                    drop(self.release(claim, tracked));
                }
                Next::End => return keys,
                Next::Idle => panic!("a scan that was begun is idle"),
            }
        }
    }
}

fn registered(enter: Enter<Pin>) -> bool {
    matches!(enter, Enter::Registered { .. })
}

#[test]
fn an_empty_registry_has_no_room() {
    let mut registry = Locked(Registry::new());
    let a = mm(1);
    assert_eq!(registry.0.bytes(), 0);
    assert!(matches!(registry.enter(&a), Enter::NoRoom(_)));
    assert!(matches!(registry.exit(1), Exit::NotFound));
    assert!(registry.with(|registry| registry.take_missed()));
    assert!(!registry.with(|registry| registry.take_missed()));
    assert!(!registry.with(|registry| registry.begin()));
    assert!(registry.with(|registry| registry.drain()).is_none());
    assert_eq!(a.pins.get(), 0);

    registry.refill();
    assert!(registered(registry.enter(&a)));
    assert!(registry.0.bytes() >= 256 * size_of::<usize>());
}

#[test]
fn the_first_mm_wakes_the_scanner() {
    let mut registry = Locked::new();
    for (key, first) in [(1, true), (2, false), (3, false)] {
        match registry.enter(&mm(key)) {
            Enter::Registered { was_empty, low } => assert_eq!((was_empty, low), (first, false)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(registry.0.len(), 3);
    assert!(!registry.0.is_empty());
}

#[test]
fn no_mm_is_registered_twice_or_after_its_exit() {
    let mut registry = Locked::new();
    let (a, b) = (mm(1), mm(2));
    assert!(registered(registry.enter(&a)));
    assert!(matches!(registry.enter(&a), Enter::AlreadyThere(_)));
    b.exiting.set(true);
    assert!(matches!(registry.enter(&b), Enter::Exiting(_)));
    assert_eq!((a.pins.get(), b.pins.get()), (1, 0));
    assert_eq!(registry.keys(), [1]);
}

#[test]
fn an_exit_with_nothing_tracked_frees_at_once() {
    let mut registry = Locked::new();
    let a = mm(1);
    assert!(registered(registry.enter(&a)));
    assert!(matches!(registry.exit(1), Exit::Freed(_)));
    assert!(matches!(registry.exit(1), Exit::NotFound));
    assert_eq!(a.pins.get(), 0);
    assert!(registry.0.is_empty() && registry.none_dead());
    assert_eq!(registry.0.nr_left(), 0);
}

#[test]
fn an_exit_with_pages_tracked_waits_for_the_reaper() {
    let mut registry = Locked::new();
    let (a, b) = (mm(1), mm(2));
    assert!(registered(registry.enter(&a)) && registered(registry.enter(&b)));
    assert_eq!(registry.scan(true), [1, 2]);
    assert!(matches!(registry.exit(1), Exit::Deferred { reap: true }));
    assert!(matches!(registry.exit(2), Exit::Deferred { reap: true }));
    assert!(registry.0.is_empty());
    assert_eq!((a.pins.get(), b.pins.get()), (1, 1));

    // In the order in which they left.
    let first = registry.with(|registry| registry.pop_dead()).unwrap();
    let second = registry.with(|registry| registry.pop_dead()).unwrap();
    assert!(registry.with(|registry| registry.pop_dead()).is_none());
    assert_eq!((first.mm().key(), second.mm().key()), (1, 2));
    assert_eq!(registry.0.nr_left(), 2);
    assert_ne!(first.id(), second.id());
    drop(registry.with(|registry| registry.free(first)));
    drop(registry.with(|registry| registry.free(second)));
    assert_eq!((a.pins.get(), b.pins.get()), (0, 0));
    assert_eq!(registry.0.nr_left(), 0);
}

#[test]
fn a_claimed_slot_outlives_the_exit() {
    let mut registry = Locked::new();
    let a = mm(1);
    assert!(registered(registry.enter(&a)));
    assert!(registry.with(|registry| registry.begin()));
    let claim = registry.visit();
    let other = registry.visit();
    assert_eq!(claim.id(), other.id());

    assert!(matches!(registry.exit(1), Exit::Deferred { reap: false }));
    assert!(registry.none_dead());
    assert!(registry.with(|registry| registry.pin(claim.id())).is_none());
    // The id of the slot is not reused.
    let b = mm(2);
    assert!(registered(registry.enter(&b)));
    assert!(registry.0.iter().all(|(id, _)| id != claim.id()));

    let released = registry.release(claim, true);
    assert!(!released.reap && registry.none_dead());
    drop(released);
    let released = registry.release(other, false);
    assert!(released.reap);
    drop(released);
    assert_eq!(a.pins.get(), 1);
    let dead = registry.with(|registry| registry.pop_dead()).unwrap();
    drop(registry.with(|registry| registry.free(dead)));
    assert_eq!(a.pins.get(), 0);
}

#[test]
fn an_mm_is_claimed_by_its_key_wherever_the_cursor_is() {
    let mut registry = Locked::new();
    let (a, b) = (mm(1), mm(2));
    assert!(registered(registry.enter(&a)) && registered(registry.enter(&b)));
    assert!(registry.with(|registry| registry.claim_key(3)).is_none());
    let claim = registry.with(|registry| registry.claim_key(2)).unwrap();
    assert_eq!((claim.mm().key(), claim.address()), (2, 0));
    assert_eq!(b.pins.get(), 2);

    // The exit leaves the slot to the claim, which says that there are pages of it.
    assert!(matches!(registry.exit(2), Exit::Deferred { reap: false }));
    assert!(registry.with(|registry| registry.claim_key(2)).is_none());
    let released = registry.release(claim, true);
    assert!(released.reap);
    drop(released);
    let dead = registry.with(|registry| registry.pop_dead()).unwrap();
    assert_eq!(dead.mm().key(), 2);
    drop(registry.with(|registry| registry.free(dead)));
    assert_eq!((a.pins.get(), b.pins.get()), (1, 0));
    assert_eq!(registry.scan(false), [1]);
}

#[test]
fn what_release_says_of_tracked_pages_decides_the_next_exit() {
    let mut registry = Locked::new();
    let a = mm(1);
    assert!(registered(registry.enter(&a)));
    assert_eq!(registry.scan(true), [1]);
    assert_eq!(registry.scan(false), [1]);
    assert!(matches!(registry.exit(1), Exit::Freed(_)));
}

#[test]
fn only_one_of_unregister_and_exit_removes() {
    let mut registry = Locked::new();
    let a = mm(1);
    for scanner_first in [true, false] {
        assert!(registered(registry.enter(&a)));
        assert!(registry.with(|registry| registry.begin()));
        let claim = registry.visit();
        if scanner_first {
            assert!(registry.with(|registry| registry.unregister(&claim)));
            assert!(!registry.with(|registry| registry.unregister(&claim)));
            assert!(matches!(registry.exit(1), Exit::NotFound));
        } else {
            assert!(matches!(registry.exit(1), Exit::Deferred { reap: false }));
            assert!(!registry.with(|registry| registry.unregister(&claim)));
        }
        let released = registry.release(claim, true);
        assert!(released.reap);
        drop(released);
        let dead = registry.with(|registry| registry.pop_dead()).unwrap();
        drop(registry.with(|registry| registry.free(dead)));
        assert_eq!(a.pins.get(), 0);
        assert!(matches!(
            registry.with(|registry| registry.claim()),
            Next::End
        ));
    }
}

#[test]
fn new_mms_go_behind_the_cursor() {
    let mut registry = Locked::new();
    for key in [1, 2, 3] {
        assert!(registered(registry.enter(&mm(key))));
    }
    assert!(registry.with(|registry| registry.begin()));
    let claim = registry.visit();
    registry.with(|registry| registry.advance(&claim));
    drop(registry.release(claim, false));

    // The cursor is on 2.
    assert!(registered(registry.enter(&mm(4))));
    assert_eq!(registry.keys(), [1, 4, 2, 3]);
    assert_eq!(registry.scan(false), [2, 3]);
    // Between two scans, that is the end of the list.
    assert!(registered(registry.enter(&mm(5))));
    assert_eq!(registry.scan(false), [1, 4, 2, 3, 5]);
}

#[test]
fn new_mms_go_to_the_end_while_unmerging() {
    let mut registry = Locked::new();
    for key in [1, 2] {
        assert!(registered(registry.enter(&mm(key))));
    }
    assert!(registry.with(|registry| registry.begin()));
    let claim = registry.visit();
    registry.with(|registry| registry.advance(&claim));
    drop(registry.release(claim, false));

    // From the first again, and a child that is forked meanwhile is visited too.
    registry.with(|registry| registry.unmerge_begin());
    let claim = registry.visit();
    assert_eq!((claim.mm().key(), claim.address()), (1, 0));
    assert!(registered(registry.enter(&mm(3))));
    registry.with(|registry| registry.advance(&claim));
    drop(registry.release(claim, false));
    assert_eq!(registry.scan(false), [2, 3]);
    registry.with(|registry| registry.unmerge_end());

    assert!(!registry.0.scanning());
    assert!(matches!(
        registry.with(|registry| registry.claim()),
        Next::Idle
    ));
    assert!(registry.with(|registry| registry.begin()));
    let claim = registry.visit();
    registry.with(|registry| registry.advance(&claim));
    assert!(registered(registry.enter(&mm(4))));
    drop(registry.release(claim, false));
    assert_eq!(registry.keys(), [1, 4, 2, 3]);
}

#[test]
fn the_cursor_keeps_its_address_only_on_the_mm_it_is_about() {
    let mut registry = Locked::new();
    for key in [1, 2] {
        assert!(registered(registry.enter(&mm(key))));
    }
    assert!(registry.with(|registry| registry.begin()));
    let first = registry.visit();
    registry.with(|registry| registry.move_to(&first, 0x1000));
    let again = registry.visit();
    assert_eq!(
        (again.mm().key(), again.address(), first.address()),
        (1, 0x1000, 0)
    );

    // It leaves under the cursor: the next one begins at 0, and late news of the first is ignored.
    assert!(matches!(registry.exit(1), Exit::Deferred { .. }));
    registry.with(|registry| registry.move_to(&first, 0x2000));
    registry.with(|registry| registry.advance(&again));
    let second = registry.visit();
    assert_eq!((second.mm().key(), second.address()), (2, 0));
    registry.with(|registry| registry.advance(&second));
    registry.with(|registry| registry.advance(&second));
    assert!(matches!(
        registry.with(|registry| registry.claim()),
        Next::End
    ));
    for claim in [first, again, second] {
        drop(registry.release(claim, false));
    }
}

#[test]
fn a_scan_that_lost_every_mm_before_the_first_is_none() {
    let mut registry = Locked::new();
    assert!(registered(registry.enter(&mm(1))));
    assert!(registry.with(|registry| registry.begin()));
    assert!(matches!(registry.exit(1), Exit::Freed(_)));
    assert!(registry.0.scanning());
    assert!(matches!(
        registry.with(|registry| registry.claim()),
        Next::Idle
    ));
    assert!(!registry.0.scanning());
}

#[test]
fn chunks_are_asked_for_in_time_and_added_once() {
    let mut registry = Locked::new();
    let mut low_at = None;
    let mms: Vec<_> = (0..256).map(|key| mm(key << 11)).collect();
    for (n, mm) in mms.iter().enumerate() {
        match registry.enter(mm) {
            Enter::Registered { low, .. } => {
                if low && low_at.is_none() {
                    low_at = Some(n);
                }
            }
            other => panic!("{other:?}"),
        }
    }
    // Of 256 slots, an eighth and 64 more are kept in hand.
    assert_eq!(low_at, Some(256 - (64 + 32)));
    let late = mm(1);
    assert!(matches!(registry.enter(&late), Enter::NoRoom(_)));
    assert!(registry.with(|registry| registry.take_missed()));

    assert_eq!(registry.0.wanted(), Some(1));
    let chunk = SlotChunk::new(1, GFP_KERNEL).unwrap();
    let twin = SlotChunk::new(1, GFP_KERNEL).unwrap();
    assert!(registry.with(|registry| registry.add_chunk(chunk)).is_ok());
    assert!(registry.with(|registry| registry.add_chunk(twin)).is_err());
    assert_eq!(registry.0.wanted(), None);
    assert!(registered(registry.enter(&late)));
    assert_eq!(registry.0.len(), 257);
    for mm in &mms {
        assert!(matches!(registry.exit(mm.key), Exit::Freed(_)));
    }
    assert_eq!(registry.keys(), [1]);
}

#[test]
fn a_chunk_without_memory_is_an_error() {
    testing::fail(Fail::Once(0));
    assert!(SlotChunk::<Pin>::new(0, GFP_KERNEL).is_err());
    testing::fail(Fail::Never);
    assert!(SlotChunk::<Pin>::new(15, GFP_KERNEL).is_err());
    assert_eq!(testing::live_bytes(), 0);
}

#[test]
fn many_mms_are_found_whatever_their_number() {
    let mut registry = Registry::new();
    let mut mms = Vec::new();
    // So many that a search through all of them, each time, would never end.
    for key in 0..200_000usize {
        if let Some(number) = registry.wanted() {
            assert!(registry
                .add_chunk(SlotChunk::new(number, GFP_KERNEL).unwrap())
                .is_ok());
        }
        let mm = mm(0xffff_8880_0000_0000 + key * 0x740);
        assert!(registered(registry.enter(Pin::new(&mm))));
        mms.push(mm);
        if key % 20_000 == 0 {
            assert_eq!(registry.check(), Ok(()));
        }
    }
    for mm in mms.iter().step_by(2) {
        assert!(matches!(registry.exit(mm.key), Exit::Freed(_)));
    }
    assert_eq!(registry.check(), Ok(()));
    for (n, mm) in mms.iter().enumerate() {
        let there = matches!(registry.enter(Pin::new(mm)), Enter::AlreadyThere(_));
        assert_eq!(there, n % 2 == 1);
    }
    assert_eq!(registry.check(), Ok(()));
    assert_eq!(registry.len(), mms.len());
}

#[test]
fn a_missed_mm_is_reported_once() {
    let mut registry = Registry::<Pin>::new();
    assert!(!registry.take_missed());
    registry.mark_missed();
    assert!(registry.take_missed());
    assert!(!registry.take_missed());
}

#[test]
fn draining_takes_the_dead_first_and_leaves_the_claimed() {
    let mut registry = Locked::new();
    for key in [1, 2, 3, 4] {
        assert!(registered(registry.enter(&mm(key))));
    }
    assert_eq!(registry.scan(true), [1, 2, 3, 4]);
    assert!(registry.with(|registry| registry.begin()));
    let claim = registry.visit();
    assert!(matches!(registry.exit(3), Exit::Deferred { .. }));
    let mut drained = Vec::new();
    while let Some(dead) = registry.with(|registry| registry.drain()) {
        drained.push(dead.mm().key());
        drop(registry.with(|registry| registry.free(dead)));
    }
    assert_eq!(drained, [3, 2, 4]);
    assert_eq!(registry.keys(), [1]);
    drop(registry.release(claim, true));
    let dead = registry.with(|registry| registry.drain()).unwrap();
    assert_eq!(dead.mm().key(), 1);
    drop(registry.with(|registry| registry.free(dead)));
    assert!(registry.with(|registry| registry.drain()).is_none());
}

impl Locked {
    /// Whether a visit to the mm with this key passes over it.
    fn passes_over(&mut self, key: usize) -> bool {
        let claim = self.with(|registry| registry.claim_key(key)).unwrap();
        let passed_over = claim.is_passed_over();
        drop(self.release(claim, false));
        passed_over
    }

    fn exclude(&mut self, key: usize, sweep: u32, begin: bool) -> Option<bool> {
        self.with(|registry| registry.exclude(key, sweep, begin))
    }

    /// Visits slots until the `most`th mm, and returns key and exclusion of each, and where to go
    /// on.
    fn visit_in(
        &mut self,
        from: u32,
        count: u32,
        most: usize,
    ) -> (Vec<(usize, bool)>, Option<u32>) {
        let mut seen = Vec::new();
        let next = self.with(|registry| {
            registry.visit_in(from, count, |id, pin, excluded| {
                assert_eq!(
                    registry
                        .iter()
                        .find(|(_, p)| p.key() == pin.key())
                        .unwrap()
                        .0,
                    id
                );
                if seen.len() == most {
                    return false;
                }
                seen.push((pin.key(), excluded));
                true
            })
        });
        (seen, next)
    }
}

/// A registry with these mms, in slots from 0 on.
fn with_mms(keys: &[usize]) -> Locked {
    let mut registry = Locked::new();
    for &key in keys {
        assert!(registered(registry.enter(&mm(key))));
    }
    registry
}

#[test]
fn an_excluded_mm_is_passed_over_until_a_sweep_does_not_see_it() {
    let mut registry = with_mms(&[1, 2, 3]);
    assert_eq!(registry.exclude(9, 1, true), None);
    assert!(!registry.0.is_excluded(9));
    // Whether it is new can be asked first.
    assert_eq!(registry.exclude(2, 1, false), Some(true));
    assert!(!registry.0.is_excluded(2) && !registry.passes_over(2));
    assert_eq!(registry.exclude(2, 1, true), Some(true));
    assert_eq!(registry.exclude(2, 1, true), Some(false));
    assert_eq!(registry.exclude(3, 1, true), Some(true));
    let passed: Vec<_> = [1, 2, 3].map(|key| registry.passes_over(key)).into();
    assert_eq!(passed, [false, true, true]);

    // The second sweep sees only one of them, and does not begin with it again.
    assert_eq!(registry.exclude(3, 2, false), Some(false));
    assert_eq!(
        registry.with(|registry| registry.readmit_in(0, 256, 2)),
        None
    );
    let excluded: Vec<_> = [1, 2, 3].map(|key| registry.0.is_excluded(key)).into();
    assert_eq!(excluded, [false, false, true]);
    // All of them are still visited by a scan, in their order.
    assert_eq!(registry.scan(false), [1, 2, 3]);
}

#[test]
fn mms_are_readmitted_slot_by_slot() {
    let mut registry = with_mms(&[1, 2, 3, 4]);
    for key in 1..=4 {
        assert_eq!(registry.exclude(key, 7, true), Some(true));
    }
    let excluded = |registry: &Locked| (1..=4).filter(|key| registry.0.is_excluded(*key)).count();
    assert_eq!(
        registry.with(|registry| registry.readmit_in(1, 0, 8)),
        Some(1)
    );
    assert_eq!(
        registry.with(|registry| registry.readmit_in(1, 2, 8)),
        Some(3)
    );
    assert!(registry.0.is_excluded(1) && registry.0.is_excluded(4));
    assert_eq!(excluded(&registry), 2);
    assert_eq!(
        registry.with(|registry| registry.readmit_in(3, 253, 7)),
        None
    );
    assert_eq!(excluded(&registry), 2);
    for (from, count) in [(256, 1), (u32::MAX, u32::MAX), (300, 0)] {
        assert_eq!(
            registry.with(|registry| registry.readmit_in(from, count, 8)),
            None
        );
    }
    assert_eq!(
        registry.with(|registry| registry.readmit_in(0, u32::MAX, 8)),
        None
    );
    assert_eq!(excluded(&registry), 0);
}

#[test]
fn an_mm_is_excluded_while_it_is_visited() {
    let mut registry = with_mms(&[1]);
    assert!(registry.with(|registry| registry.begin()));
    let claim = registry.visit();
    assert_eq!(registry.exclude(1, 1, true), Some(true));
    // This visit goes on as it has begun.
    assert!(!claim.is_passed_over());
    registry.with(|registry| registry.move_to(&claim, 0x1000));
    let again = registry.visit();
    assert!(again.is_passed_over() && again.address() == 0x1000);
    assert_eq!(
        registry.with(|registry| registry.readmit_in(0, 256, 2)),
        None
    );
    assert!(again.is_passed_over() && !registry.passes_over(1));
    drop(registry.release(claim, false));
    drop(registry.release(again, false));
}

#[test]
fn a_slot_that_is_used_again_is_not_excluded() {
    for excluded in [true, false] {
        let mut registry = with_mms(&[1]);
        if excluded {
            assert_eq!(registry.exclude(1, 1, true), Some(true));
        } else {
            assert!(registry.with(|registry| registry.keep_out(1)));
        }
        let id = registry.0.iter().next().unwrap().0;
        assert!(matches!(registry.exit(1), Exit::Freed(_)));
        assert!(!registry.0.is_excluded(1));
        assert_eq!(registry.exclude(1, 1, true), None);
        assert!(registered(registry.enter(&mm(2))));
        assert_eq!(registry.0.iter().next().unwrap().0, id);
        assert!(!registry.0.is_excluded(2) && !registry.passes_over(2));
    }
}

#[test]
fn an_mm_is_kept_out_as_often_as_it_is_let_in() {
    let mut registry = with_mms(&[1, 2]);
    assert!(!registry.with(|registry| registry.keep_out(3)));
    registry.with(|registry| registry.let_in(3));
    for _ in 0..2 {
        assert!(registry.with(|registry| registry.keep_out(1)));
    }
    assert!(registry.passes_over(1) && !registry.passes_over(2));
    // That is no rule's doing.
    assert!(!registry.0.is_excluded(1));
    assert_eq!(
        registry.visit_in(0, 256, 9),
        (vec![(1, false), (2, false)], None)
    );
    assert_eq!(
        registry.with(|registry| registry.readmit_in(0, 256, 1)),
        None
    );
    registry.with(|registry| registry.let_in(1));
    assert!(registry.passes_over(1));
    registry.with(|registry| registry.let_in(1));
    assert!(!registry.passes_over(1));
    registry.with(|registry| registry.let_in(1));
    assert!(!registry.passes_over(1));

    // Both reasons at once.
    assert!(registry.with(|registry| registry.keep_out(1)));
    assert_eq!(registry.exclude(1, 1, true), Some(true));
    registry.with(|registry| registry.let_in(1));
    assert!(registry.passes_over(1));

    // One more than there is room for is refused, and those before it still count.
    let most = usize::from(u16::MAX);
    let kept = (0..most + 1).filter(|_| registry.0.keep_out(2)).count();
    assert_eq!(kept, most);
    (1..most).for_each(|_| registry.0.let_in(2));
    assert!(registry.passes_over(2));
    registry.0.let_in(2);
    assert!(!registry.passes_over(2));
}

#[test]
fn a_visit_of_slots_goes_on_where_it_has_stopped() {
    let mut registry = with_mms(&[1, 2, 3, 4, 5]);
    assert_eq!(registry.exclude(4, 1, true), Some(true));
    // Slots without an mm, and one whose mm has left and is claimed.
    assert!(matches!(registry.exit(1), Exit::Freed(_)));
    let claim = registry.with(|registry| registry.claim_key(3)).unwrap();
    assert!(matches!(registry.exit(3), Exit::Deferred { .. }));
    assert_eq!(
        registry.visit_in(0, 256, 9).0,
        [(2, false), (4, true), (5, false)]
    );

    for most in 1..5 {
        for count in 1..7 {
            let (mut seen, mut next) = (Vec::new(), Some(0));
            while let Some(from) = next {
                let (keys, to) = registry.visit_in(from, count, most);
                assert!(to.is_none_or(|to| to > from));
                seen.extend(keys);
                next = to;
            }
            assert_eq!(seen, [(2, false), (4, true), (5, false)]);
        }
    }
    // No room for a single one: the same is next.
    assert_eq!(registry.visit_in(0, 256, 0), (vec![], Some(1)));
    assert_eq!(registry.visit_in(3, 1, 0), (vec![], Some(3)));
    assert_eq!(registry.visit_in(2, 1, 0), (vec![], Some(3)));
    for (from, count) in [(256, 1), (u32::MAX, u32::MAX)] {
        assert_eq!(registry.visit_in(from, count, 9), (vec![], None));
    }
    drop(registry.release(claim, false));
}

/// One step of a random history. `who` chooses among the mms, claims or dead that there are.
#[derive(Clone, Copy, Debug)]
enum Step {
    Enter { who: usize },
    Exit { who: usize },
    Begin,
    Claim,
    MoveTo { who: usize, address: usize },
    Advance { who: usize },
    Unregister { who: usize },
    Release { who: usize, tracked: bool },
    PopDead,
    Free { who: usize },
    PutBack { who: usize },
    UnmergeBegin,
    UnmergeEnd,
    Pin { who: usize },
    Drain,
    Exclude { who: usize, sweep: u32, begin: bool },
    Readmit { from: u32, count: u32, sweep: u32 },
    KeepOut { who: usize },
    LetIn { who: usize },
    VisitSlots { from: u32, count: u32, most: usize },
}

/// Slots, of which the first 16 are in use at most.
fn slots() -> impl Strategy<Value = (u32, u32)> {
    let any = prop_oneof![12 => 0..20u32, 1 => 250..260u32, 1 => Just(u32::MAX)];
    (any.clone(), any)
}

fn step() -> impl Strategy<Value = Step> {
    let who = 0..16usize;
    prop_oneof![
        8 => who.clone().prop_map(|who| Step::Enter { who }),
        4 => who.clone().prop_map(|who| Step::Exit { who }),
        2 => Just(Step::Begin),
        6 => Just(Step::Claim),
        2 => (who.clone(), 1..9usize)
            .prop_map(|(who, page)| Step::MoveTo { who, address: page << 12 }),
        4 => who.clone().prop_map(|who| Step::Advance { who }),
        1 => who.clone().prop_map(|who| Step::Unregister { who }),
        5 => (who.clone(), any::<bool>()).prop_map(|(who, tracked)| Step::Release { who, tracked }),
        3 => Just(Step::PopDead),
        3 => who.clone().prop_map(|who| Step::Free { who }),
        1 => who.clone().prop_map(|who| Step::PutBack { who }),
        1 => Just(Step::UnmergeBegin),
        1 => Just(Step::UnmergeEnd),
        1 => who.clone().prop_map(|who| Step::Pin { who }),
        1 => Just(Step::Drain),
        4 => (who.clone(), 1..4u32, any::<bool>())
            .prop_map(|(who, sweep, begin)| Step::Exclude { who, sweep, begin }),
        2 => (slots(), 1..4u32)
            .prop_map(|((from, count), sweep)| Step::Readmit { from, count, sweep }),
        2 => who.clone().prop_map(|who| Step::KeepOut { who }),
        2 => who.prop_map(|who| Step::LetIn { who }),
        1 => (slots(), 0..9usize)
            .prop_map(|((from, count), most)| Step::VisitSlots { from, count, most }),
    ]
}

/// What the registry is expected to be, in the plainest terms.
#[derive(Default)]
struct Model {
    list: Vec<usize>,
    cursor: Option<usize>,
    address: usize,
    scanning: bool,
    visited: bool,
    unmerging: bool,
    tracked: BTreeMap<usize, bool>,
    dead: Vec<usize>,
    /// The slot of each mm on the list, its sweep, and how often it is kept out.
    slots: BTreeMap<usize, (u32, u32, usize)>,
}

impl Model {
    fn passed_over(&self, key: usize) -> bool {
        let slot = self.slots.get(&key);
        slot.is_some_and(|&(_, sweep, kept_out)| sweep != 0 || kept_out != 0)
    }

    /// The mms of slots, in that order: slot, key, and whether a rule has excluded each.
    fn in_slots(&self, from: u32, count: u32) -> Vec<(u32, usize, bool)> {
        let within = from..from.saturating_add(count);
        let slots = self.slots.iter();
        let mut found: Vec<_> = slots
            .filter(|(_, (slot, ..))| within.contains(slot))
            .map(|(key, (slot, sweep, _))| (*slot, *key, *sweep != 0))
            .collect();
        found.sort();
        found
    }

    fn remove(&mut self, key: usize) {
        let at = self.list.iter().position(|&other| other == key).unwrap();
        if self.cursor == Some(key) {
            self.step();
        }
        self.list.remove(at);
        self.slots.remove(&key);
    }

    fn step(&mut self) {
        let at = self.list.iter().position(|&key| Some(key) == self.cursor);
        self.cursor = at.and_then(|at| self.list.get(at + 1).copied());
        self.address = 0;
    }

    fn restart(&mut self) {
        self.scanning = true;
        self.visited = false;
        self.cursor = self.list.first().copied();
        self.address = 0;
    }
}

/// Runs a history on the registry and on the model side by side.
fn run(steps: &[Step]) {
    let mut registry = Locked::new();
    let mut model = Model::default();
    // Each mm that ever was; a key stands for the newest mm that has it.
    let mut all: Vec<Rc<Mm>> = (1..=16).map(mm).collect();
    let mut alive = all.clone();
    let mut claims: Vec<Claim<Pin>> = Vec::new();
    let mut reaping: Vec<Dead<Pin>> = Vec::new();
    let mut leaving: Vec<usize> = Vec::new();

    for &step in steps {
        match step {
            Step::Enter { who } => {
                let mm = &alive[who];
                match registry.enter(mm) {
                    Enter::Registered { was_empty, .. } => {
                        assert!(!mm.exiting.get());
                        assert_eq!(was_empty, model.list.is_empty());
                        assert!(!model.list.contains(&mm.key));
                        let before = if model.unmerging { None } else { model.cursor };
                        let at = model.list.iter().position(|&key| Some(key) == before);
                        model.list.insert(at.unwrap_or(model.list.len()), mm.key);
                        model.tracked.insert(mm.key, false);
                        let (id, _) = registry.0.iter().find(|(_, p)| p.key() == mm.key).unwrap();
                        model.slots.insert(mm.key, (id.0, 0, 0));
                    }
                    Enter::AlreadyThere(_) => assert!(model.list.contains(&mm.key)),
                    Enter::Exiting(_) => assert!(mm.exiting.get()),
                    Enter::NoRoom(_) => panic!("16 mms do not fit 256 slots"),
                }
            }
            Step::Exit { who } => {
                let mm = alive[who].clone();
                mm.exiting.set(true);
                let claimed = claims.iter().any(|claim| Rc::ptr_eq(&claim.mm().0, &mm));
                match registry.exit(mm.key) {
                    Exit::NotFound => assert!(!model.list.contains(&mm.key)),
                    Exit::Freed(pin) => {
                        assert!(Rc::ptr_eq(&pin.0, &mm));
                        assert!(!claimed && !model.tracked[&mm.key]);
                        model.remove(mm.key);
                    }
                    Exit::Deferred { reap } => {
                        assert_eq!(reap, !claimed);
                        assert!(claimed || model.tracked[&mm.key]);
                        model.remove(mm.key);
                        if claimed {
                            leaving.push(mm.key);
                        } else {
                            model.dead.push(mm.key);
                        }
                    }
                }
                // Another mm can have its address only when it is not pinned any more.
                if mm.pins.get() == 0 {
                    alive[who] = self::mm(mm.key);
                    all.push(alive[who].clone());
                }
            }
            Step::Begin => {
                let begun = registry.with(|registry| registry.begin());
                assert_eq!(begun, model.scanning || !model.list.is_empty());
                if begun && !model.scanning {
                    model.restart();
                }
            }
            Step::Claim => match registry.with(|registry| registry.claim()) {
                Next::Visit(claim) => {
                    assert!(model.scanning);
                    assert_eq!(Some(claim.mm().key()), model.cursor);
                    assert_eq!(claim.address(), model.address);
                    assert_eq!(claim.is_passed_over(), model.passed_over(claim.mm().key()));
                    model.visited = true;
                    claims.push(claim);
                }
                next => {
                    assert_eq!(model.cursor, None);
                    let end = matches!(next, Next::End);
                    assert_eq!(end, model.scanning && model.visited);
                    model.scanning = false;
                }
            },
            Step::MoveTo { who, address } if !claims.is_empty() => {
                let claim = &claims[who % claims.len()];
                registry.with(|registry| registry.move_to(claim, address));
                if is_cursor(&model, claim, &alive) {
                    model.address = address;
                }
            }
            Step::Advance { who } if !claims.is_empty() => {
                let claim = &claims[who % claims.len()];
                registry.with(|registry| registry.advance(claim));
                if is_cursor(&model, claim, &alive) {
                    model.step();
                }
            }
            Step::Unregister { who } if !claims.is_empty() => {
                let claim = &claims[who % claims.len()];
                let key = claim.mm().key();
                let live = model.list.contains(&key);
                claim.mm().0.exiting.set(true);
                assert_eq!(registry.with(|registry| registry.unregister(claim)), live);
                if live {
                    model.remove(key);
                    leaving.push(key);
                }
            }
            Step::Release { who, tracked } if !claims.is_empty() => {
                let claim = claims.swap_remove(who % claims.len());
                let key = claim.mm().key();
                let last = claims.iter().all(|other| other.mm().key() != key);
                let released = registry.release(claim, tracked);
                let gone = leaving.contains(&key);
                assert_eq!(released.reap, last && gone);
                if gone && last {
                    leaving.retain(|&other| other != key);
                    model.dead.push(key);
                } else {
                    model.tracked.insert(key, tracked);
                }
            }
            Step::PopDead => match registry.with(|registry| registry.pop_dead()) {
                Some(dead) => {
                    assert_eq!(dead.mm().key(), model.dead.remove(0));
                    reaping.push(dead);
                }
                None => assert!(model.dead.is_empty()),
            },
            Step::Free { who } if !reaping.is_empty() => {
                let dead = reaping.swap_remove(who % reaping.len());
                drop(registry.with(|registry| registry.free(dead)));
            }
            Step::PutBack { who } if !reaping.is_empty() => {
                let dead = reaping.swap_remove(who % reaping.len());
                model.dead.push(dead.mm().key());
                registry.with(|registry| registry.put_back(dead));
            }
            Step::UnmergeBegin => {
                registry.with(|registry| registry.unmerge_begin());
                model.unmerging = true;
                model.restart();
            }
            Step::UnmergeEnd => {
                registry.with(|registry| registry.unmerge_end());
                model.unmerging = false;
                model.scanning = false;
                model.cursor = None;
                model.address = 0;
            }
            Step::Pin { who } if !claims.is_empty() => {
                let claim = &claims[who % claims.len()];
                let pin = registry.with(|registry| registry.pin(claim.id()));
                assert_eq!(pin.is_some(), !leaving.contains(&claim.mm().key()));
                if let Some(pin) = pin {
                    assert!(Rc::ptr_eq(&pin.0, &claim.mm().0));
                }
            }
            Step::Drain => {
                let claimed = |key| claims.iter().any(|claim| claim.mm().key() == key);
                let idle = model.list.iter().copied().find(|&key| !claimed(key));
                match registry.with(|registry| registry.drain()) {
                    Some(dead) => {
                        let key = dead.mm().key();
                        if model.dead.is_empty() {
                            assert_eq!(Some(key), idle);
                            model.remove(key);
                        } else {
                            assert_eq!(key, model.dead.remove(0));
                        }
                        reaping.push(dead);
                    }
                    None => assert!(model.dead.is_empty() && idle.is_none()),
                }
            }
            Step::Exclude { who, sweep, begin } => {
                let key = alive[who].key;
                let slot = model.slots.get_mut(&key);
                assert_eq!(
                    registry.exclude(key, sweep, begin),
                    slot.as_ref().map(|slot| slot.1 == 0)
                );
                if let Some(slot) = slot.filter(|slot| begin || slot.1 != 0) {
                    slot.1 = sweep;
                }
            }
            Step::Readmit { from, count, sweep } => {
                let next = registry.with(|registry| registry.readmit_in(from, count, sweep));
                let end = from.saturating_add(count);
                assert_eq!(next, (end < 256).then_some(end));
                for (_, key, _) in model.in_slots(from, count) {
                    let slot = model.slots.get_mut(&key).unwrap();
                    if slot.1 != sweep {
                        slot.1 = 0;
                    }
                }
            }
            Step::KeepOut { who } => {
                let key = alive[who].key;
                let kept_out = registry.with(|registry| registry.keep_out(key));
                assert_eq!(kept_out, model.slots.contains_key(&key));
                if let Some(slot) = model.slots.get_mut(&key) {
                    slot.2 += 1;
                }
            }
            Step::LetIn { who } => {
                let key = alive[who].key;
                registry.with(|registry| registry.let_in(key));
                if let Some(slot) = model.slots.get_mut(&key) {
                    slot.2 = slot.2.saturating_sub(1);
                }
            }
            Step::VisitSlots { from, count, most } => {
                let expected = model.in_slots(from, count);
                let end = from.saturating_add(count);
                let stopped = expected.get(most).map(|(slot, ..)| *slot);
                let keys = expected.iter().map(|(_, key, excluded)| (*key, *excluded));
                assert_eq!(
                    registry.visit_in(from, count, most),
                    (
                        keys.take(most).collect(),
                        stopped.or((end < 256).then_some(end))
                    )
                );
            }
            _ => {}
        }
        assert_eq!(registry.keys(), model.list);
        assert_eq!(registry.0.len(), model.list.len());
        assert_eq!(registry.0.scanning(), model.scanning);
        for key in 1..=16 {
            let excluded = model.slots.get(&key).is_some_and(|slot| slot.1 != 0);
            assert_eq!(registry.0.is_excluded(key), excluded);
        }
        assert_eq!(
            registry.0.nr_left(),
            leaving.len() + model.dead.len() + reaping.len()
        );
    }

    // Whatever the history was, nothing is left when all claims and pins are gone.
    for claim in claims {
        drop(registry.release(claim, true));
    }
    for dead in reaping {
        drop(registry.with(|registry| registry.free(dead)));
    }
    while let Some(dead) = registry.with(|registry| registry.drain()) {
        drop(registry.with(|registry| registry.free(dead)));
    }
    assert!(registry.0.is_empty());
    assert_eq!(registry.0.nr_left(), 0);
    assert_eq!(all.iter().map(|mm| mm.pins.get()).sum::<usize>(), 0);
}

/// Whether the cursor is on the very mm that the claim is about, and not on a later one of its key.
fn is_cursor(model: &Model, claim: &Claim<Pin>, alive: &[Rc<Mm>]) -> bool {
    let key = claim.mm().key();
    model.cursor == Some(key) && alive.iter().any(|mm| Rc::ptr_eq(mm, &claim.mm().0))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_history_is_like_the_model(steps in prop::collection::vec(step(), 0..200)) {
        run(&steps);
    }
}

#[test]
fn an_id_that_never_was_pins_nothing() {
    let mut registry = Locked::new();
    for id in [0, 255, 256, 1 << 20, u32::MAX - 1, u32::MAX] {
        assert!(registry.with(|registry| registry.pin(SlotId(id))).is_none());
    }
}
