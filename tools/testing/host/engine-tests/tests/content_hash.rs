// SPDX-License-Identifier: GPL-2.0-only

//! The hash of a page's contents.

mod common;

use common::runner;

use engine_tests::engine::content_hash::{
    ContentKey,
    WORDS, //
};

use proptest::prelude::*;

use std::cell::RefCell;

/// Words that look random, from a seed.
fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }
}

fn key(seed: u64) -> ContentKey {
    let mut random = random(seed);
    ContentKey::new([0; ContentKey::WORDS].map(|_| random()))
}

/// Each word counts, and so does its place; the same contents have the same hash.
#[test]
fn every_bit_and_its_place_count() {
    let strategy = (any::<u64>(), any::<u64>(), 0..WORDS, 0..64u32, 0..WORDS);
    runner(2000)
        .run(&strategy, |(keyed, content, word, bit, other)| {
            let key = key(keyed);
            let mut next = random(content);
            let page: Vec<u64> = (0..WORDS).map(|_| next()).collect();
            let hash = key.hash(|i| page[i]);
            prop_assert_eq!(hash, key.hash(|i| page[i]));
            let mut changed = page.clone();
            changed[word] ^= 1 << bit;
            prop_assert_ne!(hash, key.hash(|i| changed[i]));
            let mut swapped = page.clone();
            swapped.swap(word, other);
            prop_assert_eq!(word == other, hash == key.hash(|i| swapped[i]));
            Ok(())
        })
        .unwrap();
}

/// Pages that are alike in simple ways, under one key.
#[test]
fn simple_pages_do_not_collide() {
    let key = key(7);
    let mut hashes: Vec<u64> = (0..256u64)
        .map(|byte| key.hash(|_| byte * 0x0101_0101_0101_0101))
        .collect();
    hashes.extend((0..WORDS).map(|at| key.hash(|i| u64::from(i == at))));
    hashes.extend((0..64).map(|bit| key.hash(|i| if i == WORDS - 1 { 2 << bit } else { 0 })));
    let all = hashes.len();
    hashes.sort_unstable();
    hashes.dedup();
    // One page of zeroes is in each of the first and the last row.
    assert_eq!(hashes.len(), all - 1);
}

#[test]
fn another_key_gives_another_hash() {
    assert_ne!(key(1).hash(|i| i as u64), key(2).hash(|i| i as u64));
}

#[test]
fn each_word_is_read_once() {
    let reads = RefCell::new(vec![0; WORDS]);
    key(3).hash(|i| {
        reads.borrow_mut()[i] += 1;
        0
    });
    assert!(reads.borrow().iter().all(|n| *n == 1));
}
