// SPDX-License-Identifier: GPL-2.0-only

//! The content index against a hash map of sets: what is found, and what that costs.

mod common;

use engine_tests::engine::{
    index::{
        Entry,
        Index, //
    }, //
    types::{
        Fingerprint,
        NodeId,
        PageId,
        RangeId, //
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
    collections::{
        BTreeMap,
        BTreeSet, //
    }, //
};

/// The index and its model, which does every operation too and compares the answers.
struct Checked {
    index: Index,
    /// Under which fingerprint each entry is.
    entries: BTreeMap<Entry, Fingerprint>,
    by_fingerprint: BTreeMap<Fingerprint, BTreeSet<Entry>>,
    bytes_before: isize,
}

impl Checked {
    fn new() -> Self {
        Self {
            index: Index::new(),
            entries: BTreeMap::new(),
            by_fingerprint: BTreeMap::new(),
            bytes_before: testing::live_bytes(),
        }
    }

    fn forget(&mut self, fingerprint: Fingerprint, entry: Entry) {
        self.entries.remove(&entry);
        let same = self.by_fingerprint.get_mut(&fingerprint).unwrap();
        same.remove(&entry);
        if same.is_empty() {
            self.by_fingerprint.remove(&fingerprint);
        }
    }

    fn note(&mut self, fingerprint: Fingerprint, entry: Entry) {
        self.entries.insert(entry, fingerprint);
        self.by_fingerprint
            .entry(fingerprint)
            .or_default()
            .insert(entry);
    }

    fn first(&self, fingerprint: Fingerprint) -> Option<Entry> {
        self.index.find(fingerprint).next()
    }

    /// Returns whether there was memory.
    fn insert(&mut self, fingerprint: Fingerprint, entry: Entry) -> bool {
        if self.entries.contains_key(&entry) {
            return true;
        }
        let known = &self.entries;
        let result = self.index.insert(fingerprint, entry, GFP_KERNEL, |entry| {
            // Only what is there may be asked for.
            Some(known[&entry])
        });
        match result {
            Ok(()) => {
                self.note(fingerprint, entry);
                assert_eq!(self.first(fingerprint), Some(entry));
                true
            }
            Err(error) => {
                assert_eq!(error, ENOMEM);
                false
            }
        }
    }

    fn remove(&mut self, entry: Entry) {
        match self.entries.get(&entry).copied() {
            Some(fingerprint) => {
                assert!(self.index.remove(fingerprint, entry));
                self.forget(fingerprint, entry);
                assert!(!self.index.remove(fingerprint, entry));
            }
            None => {
                for fingerprint in self.by_fingerprint.keys() {
                    assert!(!self.index.remove(*fingerprint, entry));
                }
            }
        }
    }

    fn replace(&mut self, old: Entry, new: Entry) {
        if self.entries.contains_key(&new) {
            return;
        }
        let Some(fingerprint) = self.entries.get(&old).copied() else {
            return;
        };
        assert!(self.index.replace(fingerprint, old, new));
        self.forget(fingerprint, old);
        self.note(fingerprint, new);
        assert!(!self.index.replace(fingerprint, old, new));
    }

    /// Everything is found, and what else is found has the same tag: bits 12 to 33.
    fn find(&self, fingerprint: Fingerprint) {
        let found: Vec<_> = self.index.find(fingerprint).collect();
        let (mut same, mut others) = (BTreeSet::new(), 0);
        for entry in &found {
            match self.entries[entry] {
                other if other == fingerprint => {
                    same.insert(*entry);
                }
                other => {
                    let differ = other.to_bits() ^ fingerprint.to_bits();
                    assert_eq!(differ >> 12 & ((1 << 22) - 1), 0);
                    others += 1;
                }
            }
        }
        assert_eq!(found.len(), same.len() + others, "an entry was found twice");
        let expected = self.by_fingerprint.get(&fingerprint);
        assert_eq!(&same, expected.unwrap_or(&BTreeSet::new()));
    }

    fn check(&self) {
        self.index
            .check(|entry| self.entries.get(&entry).copied())
            .unwrap();
        assert_eq!(self.index.len(), self.entries.len());
        assert_eq!(self.index.is_empty(), self.entries.is_empty());
        assert_eq!(
            self.index.bytes() as isize,
            testing::live_bytes() - self.bytes_before
        );
    }

    fn check_all(&self) {
        self.check();
        for fingerprint in self.by_fingerprint.keys() {
            self.find(*fingerprint);
        }
    }
}

impl Drop for Checked {
    fn drop(&mut self) {
        testing::fail(Fail::Never);
    }
}

#[derive(Clone, Debug)]
enum Op {
    Insert(Fingerprint, Entry),
    InsertRun(u64, u32),
    InsertSame(Fingerprint, u32),
    Remove(Entry),
    RemoveRun(u64, u32),
    Replace(Entry, Entry),
    Find(Fingerprint),
}

fn page(number: u32) -> Entry {
    let range = RangeId::new(number >> 9).unwrap();
    Entry::Candidate(PageId::new(range, number as usize))
}

/// A spread of fingerprints that any number may be asked of.
fn spread(i: u64) -> Fingerprint {
    Fingerprint::new(i, 0)
}

fn entry() -> impl Strategy<Value = Entry> {
    prop_oneof![
        (0..300u32).prop_map(page),
        (0..100u32).prop_map(|node| Entry::Stable(NodeId(node))),
        any::<u32>().prop_map(|node| Entry::Stable(NodeId(node))),
    ]
}

/// Many, and few: with the same tags, or the same buckets, or both.
fn fingerprint() -> impl Strategy<Value = Fingerprint> {
    prop_oneof![
        4 => (0..300u64).prop_map(spread),
        2 => (0..4u64, 0..4u64)
            .prop_map(|(tag, bucket)| Fingerprint::from_bits(tag << 32 | bucket << 3)),
        1 => any::<u64>().prop_map(Fingerprint::from_bits),
        1 => Just(Fingerprint::NONE),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (fingerprint(), entry()).prop_map(|(f, e)| Op::Insert(f, e)),
        2 => (0..1000u64, 0..300u32).prop_map(|(from, n)| Op::InsertRun(from, n)),
        1 => (fingerprint(), 0..60u32).prop_map(|(f, n)| Op::InsertSame(f, n)),
        8 => entry().prop_map(Op::Remove),
        2 => (0..1000u64, 0..300u32).prop_map(|(from, n)| Op::RemoveRun(from, n)),
        2 => (entry(), entry()).prop_map(|(old, new)| Op::Replace(old, new)),
        2 => fingerprint().prop_map(Op::Find),
    ]
}

/// Does one operation on index and model. Returns whether there was memory.
fn apply(checked: &mut Checked, op: &Op) -> bool {
    match *op {
        Op::Insert(fingerprint, entry) => return checked.insert(fingerprint, entry),
        Op::InsertRun(from, n) => {
            return (0..n).all(|i| {
                let i = from + u64::from(i);
                checked.insert(spread(i), page(1000 + i as u32))
            });
        }
        Op::InsertSame(fingerprint, n) => {
            return (0..n).all(|i| checked.insert(fingerprint, Entry::Stable(NodeId(500 + i))));
        }
        Op::Remove(entry) => checked.remove(entry),
        Op::RemoveRun(from, n) => {
            for i in 0..n {
                checked.remove(page(1000 + from as u32 + i));
            }
        }
        Op::Replace(old, new) => checked.replace(old, new),
        Op::Find(fingerprint) => checked.find(fingerprint),
    }
    true
}

#[test]
fn any_history_is_as_in_a_map_of_sets() {
    let mut runner = common::runner(256);
    let histories = prop::collection::vec(op(), 1..60);
    let result = runner.run(&histories, |history| {
        let mut checked = Checked::new();
        for op in &history {
            assert!(apply(&mut checked, op));
            checked.check();
        }
        checked.check_all();
        let entries: Vec<_> = checked.entries.keys().copied().collect();
        for entry in entries {
            checked.remove(entry);
            checked.check();
        }
        assert_eq!(checked.index.bytes(), 0);
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

/// While there is no memory for buckets the chains grow; with memory again the buckets catch up.
#[test]
fn the_table_catches_up_after_a_shortage() {
    let mut checked = Checked::new();
    // From here on the fifth allocation fails, and all after it.
    testing::fail(Fail::From(5));
    let held = (0..).find(|&i| !checked.insert(spread(i), page(i as u32)));
    let held = held.unwrap();
    assert!(held > 300, "only {held} fitted into four pages");
    checked.check_all();
    testing::fail(Fail::Never);
    for i in held..2 * held {
        assert!(checked.insert(spread(i), page(i as u32)));
    }
    checked.check_all();
    let per_entry = checked.index.bytes() as f64 / checked.index.len() as f64;
    assert!(per_entry < 20.0, "{per_entry} bytes per entry");

    // Removal needs memory for joined buckets at times, but does without.
    testing::fail(Fail::From(0));
    for i in 0..2 * held {
        checked.remove(page(i as u32));
        checked.check();
    }
    assert_eq!(checked.index.bytes(), 0);
}

/// One bucket takes them all, whatever the size of the table.
#[test]
fn any_number_of_entries_may_have_one_fingerprint() {
    let mut checked = Checked::new();
    let same = spread(17);
    for node in 0..3000 {
        assert!(checked.insert(same, Entry::Stable(NodeId(node))));
    }
    checked.check_all();
    assert_eq!(checked.index.find(same).count(), 3000);
    for node in (0..3000).rev().step_by(3).chain(0..3000) {
        checked.remove(Entry::Stable(NodeId(node)));
        if node % 50 == 0 {
            checked.check();
        }
    }
    assert_eq!(checked.index.bytes(), 0);
}

/// Two buckets of a table that never had an overflow line may need some when they are joined.
/// Without memory they stay two, and nothing is lost.
#[test]
fn buckets_are_joined_only_with_memory() {
    let mut checked = Checked::new();
    let mut numbers = 0..;
    let mut add = |checked: &mut Checked, bucket: u64, n: usize| -> Vec<Entry> {
        let numbers = numbers.by_ref().take(n);
        let add = numbers.map(|number: u32| {
            let fingerprint = Fingerprint::from_bits(u64::from(number) << 32 | bucket);
            let entry = Entry::Stable(NodeId(number));
            assert!(checked.insert(fingerprint, entry));
            entry
        });
        add.collect()
    };
    // In an order that splits one bucket into four and leaves none of them with more than sixteen
    // on the way.
    let mut others = add(&mut checked, 0, 7);
    others.extend(add(&mut checked, 2, 8));
    let mut odd = add(&mut checked, 1, 8);
    odd.extend(add(&mut checked, 3, 7));
    others.extend(add(&mut checked, 0, 8));
    others.extend(add(&mut checked, 2, 6));
    odd.extend(add(&mut checked, 1, 1));
    odd.extend(add(&mut checked, 1, 7));
    odd.extend(add(&mut checked, 3, 8));
    checked.check_all();
    // Four buckets, no overflow lines.
    let bytes = checked.index.bytes();
    testing::fail(Fail::From(0));
    for entry in others.drain(1..) {
        checked.remove(entry);
    }
    assert_eq!(testing::failures(), 0, "memory was needed too soon");
    while checked.entries.len() > 25 {
        checked.remove(odd.pop().unwrap());
        checked.check_all();
    }
    assert_ne!(testing::failures(), 0, "no memory was needed");
    assert_eq!(checked.index.bytes(), bytes);
    testing::fail(Fail::Never);
    checked.remove(odd.pop().unwrap());
    checked.check_all();
    assert!(checked.index.bytes() > bytes, "there is no overflow line");
}

/// An entry that refers to nothing any more, or to a page that has changed, goes when its bucket is
/// split, as long as the index is small.
#[test]
fn stale_entries_are_dropped() {
    let of = |entry| match entry {
        Entry::Candidate(page) => {
            let number = u64::from(page.range().get()) << 9 | page.offset() as u64;
            let bits = spread(number).to_bits();
            match page.offset() % 4 {
                // Another bucket, and the same one but another tag.
                1 => Some(Fingerprint::from_bits(bits ^ 1)),
                2 => Some(Fingerprint::from_bits(bits ^ 1 << 33)),
                3 => None,
                _ => Some(spread(number)),
            }
        }
        Entry::Stable(_) => None,
    };
    let mut index = Index::new();
    for i in 0..4000 {
        assert_eq!(
            index.insert(spread(i), page(i as u32), GFP_KERNEL, of),
            Ok(())
        );
    }
    let mut left = [0usize; 4];
    for i in 0..4000 {
        if index.remove(spread(i), page(i as u32)) {
            left[i as usize % 4] += 1;
        }
        // The first split went by the bit that was wrong.
        let wrong = Fingerprint::from_bits(spread(i).to_bits() ^ 1);
        left[1] += usize::from(index.remove(wrong, page(i as u32)));
    }
    assert_eq!(left[0], 1000, "an entry that was not stale is gone");
    // Those that came after the last split of their bucket are still there.
    for stale in &left[1..] {
        assert!(*stale < 600, "{left:?} entries were left");
    }
    assert!(index.is_empty());
}

/// At any size, not only where the number of buckets is a power of two.
#[test]
fn memory_follows_the_number_of_entries() {
    let mut index = Index::new();
    let of = |entry| match entry {
        Entry::Candidate(page) => Some(spread(
            u64::from(page.range().get()) << 9 | page.offset() as u64,
        )),
        Entry::Stable(_) => None,
    };
    let mut worst = 0.0f64;
    const MOST: u32 = 300_000;
    for i in 0..MOST {
        index
            .insert(spread(u64::from(i)), page(i), GFP_KERNEL, of)
            .unwrap();
        if i >= 20_000 && i % 1000 == 0 {
            worst = worst.max(index.bytes() as f64 / index.len() as f64);
        }
    }
    println!("at most {worst:.2} bytes per entry");
    assert!(worst <= 11.5, "{worst} bytes per entry");
    for i in 0..MOST {
        assert!(index.remove(spread(u64::from(i)), page(i)));
        let left = index.len();
        if left >= 20_000 && i % 1000 == 0 {
            let per_entry = index.bytes() as f64 / left as f64;
            assert!(
                per_entry <= 19.0,
                "{per_entry} bytes per entry with {left} left"
            );
        }
    }
    assert_eq!(index.bytes(), 0);
    assert!(worst * 20_000.0 > PAGE_SIZE as f64, "nothing was measured");
}
