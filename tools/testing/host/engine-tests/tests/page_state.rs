// SPDX-License-Identifier: GPL-2.0-only

//! Page state against an ordered map: what is tracked, in which order, and what it costs.

mod common;

use engine_tests::engine::{
    page_state::{
        PageCounts,
        PageState,
        PageStates,
        Tracked, //
    },
    smart_scan::{
        History,
        MAX_AGE, //
    },
    types::{
        Fingerprint,
        ItemId,
        PageId,
        RangeId,
        SlotId,
        RANGE_PAGES, //
    },
};

use kernel::{
    page::PAGE_SIZE,
    prelude::{
        ENOMEM,
        GFP_KERNEL, //
    },
    testing::{
        self,
        Fail, //
    }, //
};

use proptest::prelude::*;

use std::{
    collections::BTreeMap,
    ops::Range, //
};

const SLOT: SlotId = SlotId(0);

/// Bytes in a range of pages.
const RANGE_BYTES: usize = RANGE_PAGES * PAGE_SIZE;

/// The table and its model, which does every operation too and compares the answers.
struct Checked {
    states: PageStates,
    model: BTreeMap<(SlotId, usize), (PageId, PageState)>,
    bytes_before: isize,
}

impl Checked {
    fn new() -> Self {
        Self {
            states: PageStates::new(),
            model: BTreeMap::new(),
            bytes_before: testing::live_bytes(),
        }
    }

    /// Returns whether there was memory.
    fn track(&mut self, slot: SlotId, addr: usize) -> bool {
        let known = self.model.get(&(slot, addr)).copied();
        match (self.states.track(slot, addr, GFP_KERNEL), known) {
            (Ok(page), Some((known, state))) => {
                assert_eq!(page, known);
                assert_eq!(self.states.get(page), Some(state));
            }
            (Ok(page), None) => {
                let taken = self.model.values().find(|(other, _)| *other == page);
                assert_eq!(taken, None, "two pages of one name");
                assert_eq!(self.states.get(page), Some(PageState::NEW));
                self.model.insert((slot, addr), (page, PageState::NEW));
            }
            (Err(error), None) => {
                assert_eq!(error, ENOMEM);
                return false;
            }
            (Err(_), Some(_)) => panic!("memory was needed for nothing"),
        }
        true
    }

    /// Returns whether there was memory for all.
    fn track_all(&mut self, slot: SlotId, within: Range<usize>) -> bool {
        let tracked = self.states.track_all(slot, within.clone(), GFP_KERNEL);
        let mut new = 0;
        for addr in within.clone().step_by(PAGE_SIZE) {
            let known = self.model.get(&(slot, addr)).map(|(page, _)| *page);
            let page = self.states.lookup(slot, addr);
            if let (None, Some(page)) = (known, page) {
                assert_eq!(self.states.get(page), Some(PageState::NEW));
                self.model.insert((slot, addr), (page, PageState::NEW));
                new += 1;
            } else {
                assert_eq!(page, known);
            }
        }
        assert_eq!(tracked, new);
        let all = self.model.range((slot, within.start)..(slot, within.end));
        all.count() == within.len() / PAGE_SIZE
    }

    fn lookup(&mut self, slot: SlotId, addr: usize) {
        let known = self.model.get(&(slot, addr)).map(|(page, _)| *page);
        assert_eq!(self.states.lookup(slot, addr), known);
        // Anywhere in the page is the page.
        assert_eq!(self.states.lookup(slot, addr + PAGE_SIZE - 1), known);
    }

    fn set(&mut self, slot: SlotId, addr: usize, state: PageState) {
        if let Some((page, known)) = self.model.get_mut(&(slot, addr)) {
            assert_eq!(self.states.set(*page, state), Some(*known));
            *known = state;
        }
    }

    fn untrack(&mut self, slot: SlotId, addr: usize) {
        if let Some((page, known)) = self.model.remove(&(slot, addr)) {
            assert_eq!(self.states.untrack(page), Some(known));
            assert_eq!(self.states.untrack(page), None);
            assert_eq!(self.states.get(page), None);
            assert_eq!(self.states.locate(page), None);
            assert_eq!(self.states.set(page, PageState::NEW), None);
        }
    }

    fn ends(&mut self, slot: SlotId, within: Range<usize>) {
        let mut pages = self
            .model
            .range((slot, 0)..=(slot, usize::MAX))
            .filter(|((_, addr), _)| within.contains(addr))
            .map(|((_, addr), (page, state))| (*page, *addr, *state));
        let first = pages.next();
        let last = pages.next_back().or(first);
        assert_eq!(self.states.first_in(slot, within.clone()), first);
        assert_eq!(self.states.last_in(slot, within), last);
    }

    fn remove_slot(&mut self, slot: SlotId) {
        let before = self.model.len();
        self.model.retain(|(of, _), _| *of != slot);
        assert_eq!(self.states.remove_slot(slot), before - self.model.len());
    }

    fn check(&self) {
        self.states.check().unwrap();
        for slot in (0..4).map(SlotId) {
            let of_slot = self.model.range((slot, 0)..=(slot, usize::MAX));
            let counts = counts(of_slot.map(|(_, (_, state))| *state));
            assert_eq!(self.states.counts(slot), counts);
        }
        assert_eq!(self.states.tracked_total(), self.model.len());
        assert_eq!(
            self.states.bytes() as isize,
            testing::live_bytes() - self.bytes_before
        );
    }

    fn check_all(&mut self) {
        self.check();
        for (&(slot, addr), &(page, state)) in &self.model {
            assert_eq!(self.states.lookup(slot, addr), Some(page));
            assert_eq!(self.states.get(page), Some(state));
            assert_eq!(self.states.locate(page), Some((slot, addr)));
        }
        for slot in (0..4).map(SlotId) {
            let of_slot: Vec<_> = self
                .model
                .range((slot, 0)..=(slot, usize::MAX))
                .map(|((_, addr), _)| *addr)
                .collect();
            assert_eq!(self.states.tracked(slot), of_slot.len());
            let mut up = Vec::new();
            let mut next = 0;
            while let Some((_, addr, _)) = self.states.first_in(slot, next..usize::MAX) {
                up.push(addr);
                next = addr + PAGE_SIZE;
            }
            assert_eq!(up, of_slot);
            let mut down = Vec::new();
            let mut end = usize::MAX;
            while let Some((_, addr, _)) = self.states.last_in(slot, 0..end) {
                down.push(addr);
                end = addr;
            }
            down.reverse();
            assert_eq!(down, of_slot);
        }
    }
}

fn counts(states: impl Iterator<Item = PageState>) -> PageCounts {
    let mut counts = PageCounts::default();
    for state in states {
        let count = match state {
            PageState::Merged(_) => &mut counts.merged,
            PageState::Tracked(tracked) if tracked.is_indexed() => &mut counts.unique,
            PageState::Tracked(t) if t.fingerprint() == Fingerprint::NONE => &mut counts.fresh,
            PageState::Tracked(_) => &mut counts.changing,
        };
        *count += 1;
    }
    counts
}

impl Drop for Checked {
    fn drop(&mut self) {
        testing::fail(Fail::Never);
    }
}

#[derive(Clone, Debug)]
enum Op {
    Track(SlotId, usize),
    TrackRun(SlotId, usize, usize),
    TrackAll(SlotId, usize, usize),
    Lookup(SlotId, usize),
    Set(SlotId, usize, PageState),
    Untrack(SlotId, usize),
    DrainUp(SlotId, Range<usize>),
    DrainDown(SlotId, Range<usize>),
    Ends(SlotId, Range<usize>),
    RemoveSlot(SlotId),
}

fn slot() -> impl Strategy<Value = SlotId> {
    prop_oneof![3 => Just(SLOT), 1 => (1..4u32).prop_map(SlotId)]
}

/// Addresses close together, at the seams of ranges, and far apart.
fn addr() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => 0..2 * RANGE_PAGES,
        2 => (0..64usize).prop_map(|i| i * 64),
        1 => (0..40usize).prop_map(|i| i * RANGE_PAGES - usize::from(i != 0)),
        1 => 0..1usize << 44,
        1 => (1usize << 44) - 4..1 << 44,
    ]
    .prop_map(|page| page * PAGE_SIZE)
}

fn within() -> impl Strategy<Value = Range<usize>> {
    prop_oneof![
        (addr(), addr()).prop_map(|(a, b)| a.min(b)..a.max(b)),
        (addr(), 0..3 * PAGE_SIZE).prop_map(|(a, len)| a..a + len),
        addr().prop_map(|a| a..usize::MAX),
        addr().prop_map(|a| 0..a),
        // Empty, the wrong way round.
        addr().prop_map(|a| a + 1..a),
    ]
}

/// Those of a fingerprint, or of none.
fn bits() -> impl Strategy<Value = u64> {
    prop_oneof![3 => any::<u64>(), 1 => Just(Fingerprint::NONE.to_bits())]
}

fn state() -> impl Strategy<Value = PageState> {
    prop_oneof![
        3 => (bits(), 0..=MAX_AGE, 0..=MAX_AGE, any::<bool>(), any::<bool>()).prop_map(
            |(bits, age, skips, settled, indexed)| {
                let tracked = Tracked::NEW
                    .with_fingerprint(Fingerprint::from_bits(bits))
                    .with_history(History { age, skips })
                    .with_settled(settled)
                    .with_indexed(indexed);
                PageState::Tracked(tracked)
            }
        ),
        1 => any::<u64>().prop_map(|item| PageState::Merged(ItemId::new(item))),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (slot(), addr()).prop_map(|(s, a)| Op::Track(s, a)),
        2 => (slot(), addr(), 0..700usize).prop_map(|(s, a, n)| Op::TrackRun(s, a, n)),
        2 => (slot(), addr(), 0..1200usize).prop_map(|(s, a, n)| Op::TrackAll(s, a, n)),
        2 => (slot(), addr()).prop_map(|(s, a)| Op::Lookup(s, a)),
        4 => (slot(), addr(), state()).prop_map(|(s, a, v)| Op::Set(s, a, v)),
        4 => (slot(), addr()).prop_map(|(s, a)| Op::Untrack(s, a)),
        1 => (slot(), within()).prop_map(|(s, w)| Op::DrainUp(s, w)),
        1 => (slot(), within()).prop_map(|(s, w)| Op::DrainDown(s, w)),
        3 => (slot(), within()).prop_map(|(s, w)| Op::Ends(s, w)),
        1 => slot().prop_map(Op::RemoveSlot),
    ]
}

/// Does one operation on table and model. Returns whether there was memory.
fn apply(checked: &mut Checked, op: &Op) -> bool {
    match *op {
        Op::Track(slot, addr) => return checked.track(slot, addr),
        Op::TrackRun(slot, addr, pages) => {
            return (0..pages).all(|i| checked.track(slot, addr + i * PAGE_SIZE));
        }
        Op::Lookup(slot, addr) => checked.lookup(slot, addr),
        Op::Set(slot, addr, state) => checked.set(slot, addr, state),
        Op::TrackAll(slot, addr, pages) => {
            return checked.track_all(slot, addr..addr + pages * PAGE_SIZE)
        }
        Op::Untrack(slot, addr) => checked.untrack(slot, addr),
        Op::DrainUp(slot, ref within) => {
            while let Some((_, addr, _)) = checked.states.first_in(slot, within.clone()) {
                assert!(within.contains(&addr));
                checked.untrack(slot, addr);
            }
        }
        Op::DrainDown(slot, ref within) => {
            while let Some((_, addr, _)) = checked.states.last_in(slot, within.clone()) {
                assert!(within.contains(&addr));
                checked.untrack(slot, addr);
            }
        }
        Op::Ends(slot, ref within) => checked.ends(slot, within.clone()),
        Op::RemoveSlot(slot) => checked.remove_slot(slot),
    }
    if let Op::DrainUp(slot, ref within) | Op::DrainDown(slot, ref within) = *op {
        checked.ends(slot, within.clone());
    }
    true
}

#[test]
fn any_history_is_as_in_an_ordered_map() {
    let mut runner = common::runner(256);
    let histories = prop::collection::vec(op(), 1..60);
    let result = runner.run(&histories, |history| {
        let mut checked = Checked::new();
        for op in &history {
            assert!(apply(&mut checked, op));
            checked.check();
        }
        checked.check_all();
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn a_failed_allocation_loses_nothing_and_changes_nothing() {
    let mut runner = common::runner(256);
    let histories = (prop::collection::vec(op(), 1..60), any::<u64>(), 1..12u64);
    let failures = testing::failures();
    let result = runner.run(&histories, |(history, seed, one_in)| {
        let mut checked = Checked::new();
        testing::fail(Fail::Random { seed, one_in });
        for op in &history {
            apply(&mut checked, op);
            checked.check();
        }
        checked.check_all();
        testing::fail(Fail::Never);
        // As if nothing had been.
        for op in &history {
            assert!(apply(&mut checked, op));
        }
        checked.check_all();
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
    assert_ne!(testing::failures(), failures, "nothing was made to fail");
}

/// Every allocation of a fixed history fails once, in its turn.
#[test]
fn each_allocation_in_turn_may_fail() {
    let history = |checked: &mut Checked| {
        let mut all = true;
        // Enough ranges for a second chunk of them, and for a second leaf by ascent and by a cut.
        for i in (0..1100).step_by(2).chain((1..300).step_by(2)) {
            all &= checked.track(SLOT, i * RANGE_BYTES);
        }
        for page in 0..20 {
            all &= checked.track(SlotId(200), page * PAGE_SIZE);
        }
        all
    };
    let mut checked = Checked::new();
    let before = testing::allocations();
    assert!(history(&mut checked));
    let needed = testing::allocations() - before;
    assert!(
        needed > 700,
        "{needed} allocations are too few for this test"
    );
    // Every one of the rare kinds at the start, then a sample.
    for nth in (0..200).chain((200..needed).step_by(13)) {
        let mut checked = Checked::new();
        testing::fail(Fail::Once(nth));
        assert!(!history(&mut checked), "allocation {nth} did not matter");
        checked.check();
        assert!(history(&mut checked));
        checked.check();
        assert_eq!(checked.states.tracked_total(), 700 + 20);
    }
}

#[test]
fn states_survive_packing() {
    let mut runner = common::runner(1000);
    let mut states = PageStates::new();
    let page = states.track(SLOT, 0, GFP_KERNEL).unwrap();
    let mut last = PageState::NEW;
    let mut expect = |state| {
        assert_eq!(states.set(page, state), Some(last));
        assert_eq!(states.get(page), Some(state));
        last = state;
    };
    for fingerprint in [0, 1, (1 << Fingerprint::BITS) - 1].map(Fingerprint::from_bits) {
        for (age, skips, indexed) in [(0, 0, false), (MAX_AGE, 0, true), (0, MAX_AGE, false)] {
            let tracked = Tracked::NEW
                .with_fingerprint(fingerprint)
                .with_history(History { age, skips })
                .with_settled(indexed)
                .with_indexed(indexed);
            let history = tracked.history();
            assert_eq!(tracked.fingerprint(), fingerprint);
            assert_eq!((history.age, history.skips), (age, skips));
            assert_eq!(tracked.is_settled(), indexed);
            assert_eq!(tracked.is_indexed(), indexed);
            expect(PageState::Tracked(tracked));
        }
    }
    expect(PageState::Merged(ItemId::new(0)));
    expect(PageState::Merged(ItemId::new(u64::MAX)));
    let expect = std::cell::RefCell::new(expect);
    let result = runner.run(&state(), |state| {
        expect.borrow_mut()(state);
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn ages_and_skips_stop_at_their_greatest() {
    let mut states = PageStates::new();
    let page = states.track(SLOT, 0, GFP_KERNEL).unwrap();
    let old = |age, skips| PageState::Tracked(Tracked::NEW.with_history(History { age, skips }));
    states.set(page, old(16, 255));
    assert_eq!(states.get(page), Some(old(MAX_AGE, MAX_AGE)));
}

#[test]
fn only_unmerged_pages_have_a_fingerprint() {
    let mut states = PageStates::new();
    let page = states.track(SLOT, 0, GFP_KERNEL).unwrap();
    assert_eq!(states.fingerprint(page), Some(Fingerprint::NONE));
    states.set(page, PageState::Merged(ItemId::new(7)));
    assert_eq!(states.fingerprint(page), None);
    states.untrack(page);
    assert_eq!(states.fingerprint(page), None);
}

#[test]
fn handles_survive_packing() {
    assert_eq!(RangeId::new(RangeId::LIMIT), None);
    let ranges = [0, 1, 0x5555_5555, RangeId::LIMIT - 1];
    for range in ranges.map(|range| RangeId::new(range).unwrap()) {
        for offset in [0, 1, 255, 511] {
            let page = PageId::new(range, offset);
            assert_eq!((page.range(), page.offset()), (range, offset));
            assert!(page.to_bits() < 1 << PageId::BITS);
            assert_eq!(PageId::from_bits(page.to_bits()), page);
            assert_eq!(PageId::from_bits(page.to_bits() | !0 << PageId::BITS), page);
        }
    }
}

#[test]
fn fingerprints_depend_on_every_bit_of_hash_and_domain() {
    let of_zero = Fingerprint::new(0, 0);
    for bit in 0..64 {
        assert_ne!(
            Fingerprint::new(1 << bit, 0),
            of_zero,
            "bit {bit} of the hash"
        );
    }
    for bit in 0..32 {
        assert_ne!(
            Fingerprint::new(0, 1 << bit),
            of_zero,
            "bit {bit} of the domain"
        );
    }
    let all = (1 << Fingerprint::BITS) - 1;
    assert_eq!(Fingerprint::from_bits(u64::MAX).to_bits(), all);
}

#[test]
fn ranges_may_come_in_any_order() {
    // Each spans several leaves.
    let orders: [Box<dyn Fn(usize) -> usize>; 3] = [
        Box::new(|i| i),
        Box::new(|i| 4999 - i),
        // 1237 has no factor in common with 5000.
        Box::new(|i| i * 1237 % 5000),
    ];
    for order in &orders {
        let mut checked = Checked::new();
        for i in 0..5000 {
            assert!(checked.track(SLOT, order(i) * RANGE_BYTES));
        }
        checked.check_all();
        for i in 0..5000 {
            checked.untrack(SLOT, order(i) * RANGE_BYTES);
            if i % 100 == 0 {
                checked.check();
            }
        }
        checked.check_all();
        assert!(checked.states.bytes() < 3 * PAGE_SIZE);
    }
}

#[test]
fn memory_goes_with_the_pages() {
    let mut checked = Checked::new();
    let slots: Vec<_> = (0..300).map(SlotId).collect();
    for round in 0..3 {
        for &slot in &slots {
            for i in 0..40 {
                assert!(checked
                    .states
                    .track(slot, i * 64 * PAGE_SIZE, GFP_KERNEL)
                    .is_ok());
            }
        }
        checked.states.check().unwrap();
        let full = checked.states.bytes();
        // Every other mm goes; ranges of the others stay in between.
        for &slot in slots.iter().step_by(2) {
            assert_eq!(checked.states.remove_slot(slot), 40);
            assert_eq!(checked.states.tracked(slot), 0);
        }
        checked.states.check().unwrap();
        assert_eq!(checked.states.tracked_total(), 150 * 40);
        assert!(checked.states.bytes() < full, "round {round}");
        for &slot in slots.iter().skip(1).step_by(2) {
            assert_eq!(checked.states.remove_slot(slot), 40);
        }
        checked.check();
        assert!(checked.states.bytes() <= 2 * PAGE_SIZE, "round {round}");
    }
}

/// Ascending visits find each page at once, and with pages that are not tracked in between.
#[test]
fn a_scan_in_ascending_order() {
    let mut checked = Checked::new();
    for round in 0..3 {
        let mut from = 0;
        for page in (0..20_000).filter(|page| page % 7 != round && page / 600 % 5 != 3) {
            let addr = page * PAGE_SIZE;
            // What is tracked in the gap is gone, as the scanner sees it.
            while let Some((gone, at, _)) = checked.states.first_in(SLOT, from..addr) {
                assert_eq!(at / PAGE_SIZE % 7, round);
                checked.states.untrack(gone);
            }
            let found = checked.states.lookup(SLOT, addr);
            assert_eq!(found.is_some(), round > 0 && page % 7 != round - 1);
            let tracked = checked.states.track(SLOT, addr, GFP_KERNEL).unwrap();
            assert_eq!(found.unwrap_or(tracked), tracked);
            assert_eq!(checked.states.locate(tracked), Some((SLOT, addr)));
            from = addr + PAGE_SIZE;
        }
        checked.states.check().unwrap();
    }
}

/// Each page of an mm is in one count, until it is untracked or the mm goes.
#[test]
fn pages_are_counted_by_what_is_known() {
    let mut states = PageStates::new();
    let other = SlotId(1);
    assert_eq!(states.track_all(SLOT, 0..4 * PAGE_SIZE, GFP_KERNEL), 4);
    assert_eq!(states.track_all(other, 0..PAGE_SIZE, GFP_KERNEL), 1);
    let known = Tracked::NEW.with_fingerprint(Fingerprint::from_bits(5));
    let [unique, changing, merged] = [1, 2, 3].map(|page| {
        let page = states.lookup(SLOT, page * PAGE_SIZE);
        page.unwrap()
    });
    states.set(unique, PageState::Tracked(known.with_indexed(true)));
    states.set(changing, PageState::Tracked(known));
    states.set(merged, PageState::Merged(ItemId::new(0)));
    let mut expected = PageCounts {
        merged: 1,
        unique: 1,
        changing: 1,
        fresh: 1,
    };
    assert_eq!(states.counts(SLOT), expected);
    assert_eq!(states.counts(SLOT).total(), states.tracked(SLOT) as u64);
    states.untrack(merged);
    states.set(unique, PageState::ORPHANED);
    (expected.merged, expected.unique, expected.fresh) = (0, 0, 2);
    assert_eq!(states.counts(SLOT), expected);
    states.remove_slot(SLOT);
    assert_eq!(states.counts(SLOT), PageCounts::default());
    assert_eq!(states.counts(other).fresh, 1);
    states.check().unwrap();
}

/// Only what was merged and has not been looked at since is orphaned, whatever smart scan does.
#[test]
fn an_orphan_is_one_until_it_is_hashed() {
    let history = History { age: 3, skips: 1 };
    let known = Fingerprint::from_bits(1);
    assert!(!Tracked::NEW.is_orphaned());
    assert!(Tracked::ORPHANED.is_orphaned());
    assert!(Tracked::ORPHANED.with_history(history).is_orphaned());
    let looked_at = Tracked::ORPHANED.with_fingerprint(known);
    assert!(!looked_at.is_orphaned());
    assert!(!looked_at.with_settled(true).is_orphaned());
}
