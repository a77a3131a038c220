// SPDX-License-Identifier: GPL-2.0-only

//! Tests of `rust/ksm/arena.rs`.

#[path = "../../../../../rust/ksm/arena.rs"]
mod arena;

use arena::ObjectArena;
use core::{
    cell::Cell,
    ptr::NonNull, //
};
use kernel::{
    prelude::GFP_KERNEL,
    testing::{
        fail,
        live_bytes,
        Fail, //
    },
};
use proptest::prelude::*;
use std::{
    collections::BTreeMap,
    rc::Rc, //
};

/// An object of 48 bytes that counts how many of its kind there are.
struct Object {
    value: u64,
    live: Rc<Cell<usize>>,
    _rest: [u64; 4],
}

impl Object {
    fn new(value: u64, live: &Rc<Cell<usize>>) -> Self {
        live.set(live.get() + 1);
        Self {
            value,
            live: live.clone(),
            _rest: [value; 4],
        }
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        self.live.set(self.live.get() - 1);
    }
}

#[derive(Clone, Debug)]
enum Op {
    Insert(u64),
    /// Removes one of those that are there.
    Remove(usize),
    /// Writes to one through the pointer that [`ObjectArena::insert`] gave out.
    Write(usize, u64),
    /// All allocations fail for the next operation.
    Fail,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => any::<u64>().prop_map(Op::Insert),
        5 => any::<usize>().prop_map(Op::Remove),
        2 => (any::<usize>(), any::<u64>()).prop_map(|(i, value)| Op::Write(i, value)),
        1 => Just(Op::Fail),
    ]
}

fn value(object: NonNull<Object>) -> u64 {
    // SAFETY: The tests only pass objects that are in their arena.
    unsafe { (&raw const (*object.as_ptr()).value).read() }
}

fn nth<'a, V>(known: &'a BTreeMap<u32, V>, i: usize) -> Option<(u32, &'a V)> {
    let i = i % known.len().max(1);
    known.iter().nth(i).map(|(id, v)| (*id, v))
}

proptest! {
    /// An arena holds what a map holds, at addresses that do not change, and frees all of it.
    #[test]
    fn an_arena_is_a_map_whose_values_never_move(ops in prop::collection::vec(op(), 1..800)) {
        let live = Rc::new(Cell::new(0));
        let before = live_bytes();
        let mut known: BTreeMap<u32, (NonNull<Object>, u64)> = BTreeMap::new();
        let mut arena = ObjectArena::new(GFP_KERNEL);
        for op in ops {
            let mut fails = false;
            match op {
                Op::Insert(value) => match arena.insert(Object::new(value, &live)) {
                    Ok((id, at)) => prop_assert!(known.insert(id, (at, value)).is_none()),
                    Err(_) => prop_assert!(false, "memory was there"),
                },
                Op::Remove(i) => {
                    if let Some((id, &(_, expected))) = nth(&known, i) {
                        prop_assert_eq!(arena.remove(id).map(|o| o.value), Some(expected));
                        prop_assert!(arena.remove(id).is_none());
                        known.remove(&id);
                    }
                }
                Op::Write(i, value) => {
                    if let Some((id, &(at, _))) = nth(&known, i) {
                        // SAFETY: The object is in the arena.
                        unsafe { (&raw mut (*at.as_ptr()).value).write(value) };
                        known.insert(id, (at, value));
                    }
                }
                Op::Fail => fails = true,
            }
            if fails {
                fail(Fail::From(0));
                let inserted = arena.insert(Object::new(7, &live));
                fail(Fail::Never);
                if let Ok((id, at)) = inserted {
                    known.insert(id, (at, 7));
                }
            }
            prop_assert_eq!(arena.len(), known.len());
            prop_assert_eq!(live.get(), known.len());
        }
        let mut at = None;
        for (&id, &(object, expected)) in &known {
            prop_assert_eq!(arena.get(id), Some(object));
            prop_assert_eq!(value(object), expected);
            // SAFETY: The object is in the arena.
            prop_assert_eq!(unsafe { ObjectArena::number_of(object) }, id);
            at = arena.next(at);
            prop_assert_eq!(at, Some(id));
        }
        prop_assert_eq!(arena.next(at), None);
        drop(arena);
        prop_assert_eq!(live.get(), 0);
        prop_assert_eq!(live_bytes(), before);
    }
}

/// A chunk is freed with its last object, and its number is used again.
#[test]
fn numbers_of_freed_chunks_are_used_again() {
    let live = Rc::new(Cell::new(0));
    let mut arena = ObjectArena::new(GFP_KERNEL);
    let fill = |arena: &mut ObjectArena<Object>| -> Vec<u32> {
        (0..12 * 84)
            .map(|i| {
                arena
                    .insert(Object::new(i, &live))
                    .expect("memory is there")
                    .0
            })
            .collect()
    };
    let mut first = fill(&mut arena);
    let full = arena.bytes();
    assert!((12 * 4096..14 * 4096).contains(&full));
    for &id in &first {
        assert!(arena.remove(id).is_some());
    }
    assert!(arena.bytes() < full / 10);
    let mut second = fill(&mut arena);
    first.sort_unstable();
    second.sort_unstable();
    assert_eq!(first, second);
}

/// Where there is no memory nothing changes, and later there is room again.
#[test]
fn an_arena_survives_every_failed_allocation() {
    let live = Rc::new(Cell::new(0));
    for n in 0..6 {
        let mut arena = ObjectArena::new(GFP_KERNEL);
        fail(Fail::Once(n));
        let tried = (0..200).filter(|&i| arena.insert(Object::new(i, &live)).is_ok());
        let done = tried.count();
        fail(Fail::Never);
        assert!(done >= 199);
        assert_eq!((arena.len(), live.get()), (done, done));
        assert!(arena.insert(Object::new(0, &live)).is_ok());
    }
    assert_eq!(live.get(), 0);
}
