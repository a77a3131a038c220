// SPDX-License-Identifier: GPL-2.0-only

//! When a page is read although its accessed bit is clear.

use engine_tests::engine::{
    accessed::{
        AccessedHint,
        REREAD_INTERVAL, //
    },
    policy::Policy,
    smart_scan::{
        History,
        MAX_AGE, //
    },
};

const PAGE: usize = 4096;

fn policy(smart_scan: bool) -> Policy {
    Policy {
        smart_scan,
        use_zero_pages: false,
        merge_across_nodes: true,
        vouched: false,
        max_page_sharing: 256,
    }
}

/// The hint in a full scan.
fn hint(smart_scan: bool, full_scan: usize) -> AccessedHint {
    let mut hint = AccessedHint::new();
    hint.update(&policy(smart_scan));
    for _ in 0..full_scan {
        hint.end_full_scan();
    }
    hint
}

/// Looks at a page from `full_scan` on until it is read, that one included.
fn looks(smart_scan: bool, mut history: History, page: usize, full_scan: usize) -> usize {
    let mut hint = hint(smart_scan, full_scan);
    let mut looks = 0;
    for _ in 0..10 * 9 * REREAD_INTERVAL {
        let age = history.age;
        if !(smart_scan && history.should_skip()) {
            looks += 1;
            if !hint.unchanged(page * PAGE, age) {
                return looks;
            }
        }
        hint.end_full_scan();
    }
    panic!("never read");
}

/// The histories that a page can have: a young one is not skipped as often as an old one.
fn histories() -> impl Iterator<Item = History> {
    let skips = |age| match age {
        0..=3 => 0,
        4 => 1,
        5..=6 => 2,
        7..=9 => 4,
        _ => 8,
    };
    (0..=MAX_AGE).flat_map(move |age| (0..=skips(age)).map(move |skips| History { age, skips }))
}

/// Whatever is known of a page, and whenever it changes, one of the next sixteen looks reads it.
#[test]
fn a_page_is_read_within_sixteen_looks() {
    let mut most = 0;
    for smart_scan in [false, true] {
        // A page is hashed at its second look, or later.
        for history in histories().filter(|history| history.age >= 2) {
            for page in 0..REREAD_INTERVAL {
                for full_scan in 0..REREAD_INTERVAL {
                    let looks = looks(smart_scan, history, page, full_scan);
                    assert!(
                        looks <= REREAD_INTERVAL,
                        "{looks}: {history:?}, page {page}"
                    );
                    most = most.max(looks);
                }
            }
        }
    }
    assert_eq!(most, REREAD_INTERVAL);
}

/// The histories above are those that full scans make, at any age.
#[test]
fn no_other_history_comes_about() {
    let all: Vec<History> = histories().collect();
    for mut history in all.clone() {
        history.should_skip();
        assert!(all.contains(&history), "{history:?}");
    }
}

/// One page in sixteen is read in each scan, not all in the same.
#[test]
fn turns_are_spread() {
    for full_scan in 0..REREAD_INTERVAL {
        let hint = hint(false, full_scan);
        let read = |page: &usize| !hint.unchanged(page * PAGE, 0);
        assert_eq!((0..1024).filter(read).count(), 1024 / REREAD_INTERVAL);
    }
}

/// Where fingerprints depend on the NUMA node nothing is trusted, nor until two full scans later.
#[test]
fn nothing_is_trusted_while_nodes_are_kept_apart() {
    let mut hint = hint(false, 0);
    assert!(hint.unchanged(PAGE, 0));
    let apart = Policy {
        merge_across_nodes: false,
        ..policy(false)
    };
    hint.update(&apart);
    assert!(!hint.unchanged(PAGE, 0));
    hint.update(&policy(false));
    for _ in 0..2 {
        hint.update(&policy(false));
        assert!(!hint.unchanged(PAGE, 0));
        hint.end_full_scan();
    }
    hint.update(&policy(false));
    assert!(hint.unchanged(PAGE, 0));
}
