// SPDX-License-Identifier: GPL-2.0-only

//! What page state and index take together for each unmerged page, in memory that a kernel would
//! really give out.

use engine_tests::engine::{
    index::{
        Entry,
        Index, //
    },
    page_state::{
        PageState,
        PageStates,
        Tracked, //
    },
    smart_scan::History,
    types::{
        Fingerprint,
        SlotId,
        RANGE_PAGES, //
    }, //
};

use kernel::{
    page::PAGE_SIZE,
    prelude::GFP_KERNEL,
    testing, //
};

/// Tracks and indexes every `step`th page of a few mms, and calls `at` with the number of pages and
/// of bytes after each range.
fn fill(pages: usize, step: usize, mut at: impl FnMut(usize, usize)) {
    let before = testing::live_bytes();
    let mut states = PageStates::new();
    let mut index = Index::new();
    for i in 0..pages {
        let slot = SlotId((i * 4 / pages) as u32);
        let page = states
            .track(slot, i * step * PAGE_SIZE, GFP_KERNEL)
            .unwrap();
        let fingerprint = Fingerprint::new((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15), 0);
        let state = PageState::Tracked(
            Tracked::NEW
                .with_fingerprint(fingerprint)
                .with_history(History { age: 1, skips: 0 })
                .with_settled(true)
                .with_indexed(true),
        );
        states.set(page, state);
        index
            .insert(
                fingerprint,
                Entry::Candidate(page),
                GFP_KERNEL,
                |entry| match entry {
                    Entry::Candidate(page) => states.fingerprint(page),
                    Entry::Stable(_) => None,
                },
            )
            .unwrap();
        if (i + 1) * step % RANGE_PAGES == 0 {
            let bytes = states.bytes() + index.bytes();
            assert_eq!(bytes as isize, testing::live_bytes() - before);
            at(i + 1, bytes);
        }
    }
}

/// The most bytes for each page at any number of pages from `from` to `pages`.
fn most_per_page(from: usize, pages: usize, step: usize) -> f64 {
    let mut most = 0.0f64;
    let mut measured = 0;
    fill(pages, step, |pages, bytes| {
        if pages >= from {
            most = most.max(bytes as f64 / pages as f64);
            measured += 1;
        }
    });
    assert!(measured > 100);
    println!("1 page in {step}: at most {most:.2} bytes for each of {from} to {pages} pages");
    most
}

#[test]
fn dense_pages_take_20_bytes_each() {
    let most = most_per_page(1 << 16, 1 << 19, 1);
    assert!(most <= 20.0, "{most} bytes per page");
    // The state alone is 8 of them, so less would be a mistake in the accounting.
    assert!(most >= 16.0, "{most} bytes per page");
}

#[test]
fn sparse_pages_take_far_less_than_96_bytes_each() {
    let most = most_per_page(1 << 12, 1 << 15, 64);
    assert!(most <= 48.0, "{most} bytes per page");
}

/// One page in each range is the worst there is.
#[test]
fn lonely_pages_take_a_range_each() {
    let most = most_per_page(1 << 12, 1 << 14, RANGE_PAGES);
    assert!(most <= 192.0, "{most} bytes per page");
}
