// SPDX-License-Identifier: GPL-2.0-only

//! Which full scans skip a page.

use engine_tests::engine::smart_scan::{
    History,
    MAX_AGE, //
};

#[test]
fn the_first_scans_look_and_later_ones_skip_more_and_more() {
    let mut history = History::default();
    let looked_at: Vec<_> = (0..60).filter(|_| !history.should_skip()).collect();
    // Three looks; then a look, and as many skips as the page is old enough for.
    assert_eq!(looked_at, [0, 1, 2, 3, 5, 8, 13, 22, 31, 40, 49, 58]);
}

#[test]
fn age_grows_with_each_scan_up_to_what_four_bits_hold() {
    let mut history = History::default();
    for scan in 1..100u8 {
        history.should_skip();
        assert_eq!(history.age, scan.min(MAX_AGE));
        assert!(history.skips <= 8);
    }
    assert_eq!(MAX_AGE, 15);
}

#[test]
fn every_history_that_can_be_stored_leads_to_another() {
    for age in 0..=MAX_AGE {
        for skips in 0..=15 {
            let mut history = History { age, skips };
            let skip = history.should_skip();
            assert_eq!(skip, age >= 3 && skips > 0);
            assert!(history.age <= MAX_AGE && history.skips <= 15);
            if skip {
                assert_eq!(history.skips, skips - 1);
            }
        }
    }
}
