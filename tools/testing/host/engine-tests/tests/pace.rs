// SPDX-License-Identifier: GPL-2.0-only

//! How long the scanner works before it lets others in.

use engine_tests::engine::pace::{
    Hold,
    Pace, //
};

const MSEC: i64 = 1_000_000;

/// A hold ends after 2 ms, or as soon as another task waits.
#[test]
fn a_hold_ends_by_time_and_by_waiters() {
    let hold = Hold::begin(5 * MSEC);
    assert!(!hold.is_over(5 * MSEC, false));
    assert!(hold.is_over(5 * MSEC, true));
    assert!(!hold.is_over(7 * MSEC - 1, false));
    assert!(hold.is_over(7 * MSEC, false));
    assert_eq!(hold.nsecs(8 * MSEC), 3 * MSEC);
}

/// Scans at a price per page until the hold is over, and returns how long it took.
fn hold(pace: &mut Pace, most: u32, nsecs_per_page: i64) -> i64 {
    let (begin, mut now) = (Hold::begin(0), 0);
    loop {
        pace.limit(most);
        let took = i64::from(pace.pages()) * nsecs_per_page;
        now += took;
        pace.visited(pace.pages(), took);
        if begin.is_over(now, false) {
            return begin.nsecs(now);
        }
    }
}

/// Whatever a page costs, a hold takes 4 ms at most once the pace has been found.
#[test]
fn no_hold_takes_longer_than_4_ms() {
    for nsecs_per_page in [1, 50, 300, 1_000, 5_000, 15_000] {
        let mut pace = Pace::new();
        for _ in 0..20 {
            let took = hold(&mut pace, 16 * 1024, nsecs_per_page);
            assert!(took <= 4 * MSEC, "{took} ns at {nsecs_per_page} ns a page");
        }
    }
}

/// The pace grows while pages are cheap, up to what there is room for, and falls at once.
#[test]
fn the_pace_follows_what_pages_cost() {
    let mut pace = Pace::new();
    hold(&mut pace, 16 * 1024, 10);
    for _ in 0..20 {
        hold(&mut pace, 16 * 1024, 10);
    }
    pace.limit(16 * 1024);
    assert_eq!(pace.pages(), 16 * 1024);
    let fast = pace.pages();
    pace.visited(fast, 10 * MSEC);
    assert_eq!(pace.pages(), fast / 2);
    // A visit that ended early, as the mm did, says nothing.
    pace.visited(1, 1);
    assert_eq!(pace.pages(), fast / 2);
}
