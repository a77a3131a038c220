// SPDX-License-Identifier: GPL-2.0-only

//! Tests of `container/id_table.rs`.

use engine_tests::engine::container::id_table::IdTable;

use kernel::{
    prelude::GFP_KERNEL,
    testing::{
        fail,
        live_bytes,
        Fail, //
    },
};
use proptest::prelude::*;
use std::collections::BTreeMap;

#[derive(Clone, Debug)]
enum Op {
    Insert(u64),
    /// Removes one of those that are there.
    Remove(usize),
    /// Removes this number, which nothing may have.
    RemoveNumber(u32),
    /// All allocations fail for the next operation.
    Fail,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => any::<u64>().prop_map(Op::Insert),
        5 => any::<usize>().prop_map(Op::Remove),
        1 => (0..100u32).prop_map(Op::RemoveNumber),
        1 => Just(Op::Fail),
    ]
}

proptest! {
    /// Each value is found by its number until it is removed, and by nothing else.
    #[test]
    fn behaves_as_a_map(ops in prop::collection::vec(op(), 1..400)) {
        let mut table = IdTable::new();
        let mut known = BTreeMap::new();
        let mut failing = false;
        for op in ops {
            match op {
                Op::Insert(value) => match table.insert(value, GFP_KERNEL) {
                    Ok(id) => prop_assert_eq!(known.insert(id, value), None),
                    Err(_) => prop_assert!(failing),
                },
                Op::Remove(nth) => {
                    let id = known.keys().nth(nth % known.len().max(1)).copied();
                    if let Some(id) = id {
                        prop_assert_eq!(table.remove(id), known.remove(&id));
                    }
                }
                Op::RemoveNumber(id) => prop_assert_eq!(table.remove(id), known.remove(&id)),
                Op::Fail => {
                    fail(Fail::From(0));
                    failing = true;
                    continue;
                }
            }
            fail(Fail::Never);
            failing = false;
            prop_assert_eq!(table.len(), known.len());
            prop_assert_eq!(table.is_empty(), known.is_empty());
            let (mut at, mut there) = (None, Vec::new());
            while let Some(id) = table.next(at) {
                there.push((id, *table.get(id).unwrap()));
                at = Some(id);
            }
            prop_assert!(there.into_iter().eq(known.clone()));
        }
        fail(Fail::Never);
    }
}

/// Numbers are used again, so that the table stays as large as it has to be, and all memory is
/// given back with the last value.
#[test]
fn numbers_are_used_again() {
    let before = live_bytes();
    let mut table = IdTable::new();
    for i in 0..10_000u32 {
        assert_eq!(table.insert(u64::from(i), GFP_KERNEL), Ok(i));
    }
    let bytes = table.bytes();
    // Each round takes a quarter away and adds as much.
    for round in 0..100 {
        for i in (round % 4..10_000).step_by(4) {
            table.remove(i);
        }
        while table.len() < 10_000 {
            table.insert(0, GFP_KERNEL).unwrap();
        }
    }
    assert!(
        table.bytes() <= bytes + bytes / 4,
        "{} bytes, {bytes} at first",
        table.bytes()
    );
    while let Some(id) = table.next(None) {
        table.remove(id);
    }
    assert_eq!((table.bytes(), live_bytes()), (0, before));
}
