// SPDX-License-Identifier: GPL-2.0-only

//! What is derived from the counters.

use engine_tests::engine::stats::{
    Counters,
    Snapshot, //
};

#[test]
fn pages_volatile_is_what_is_left_and_never_negative() {
    let mut stats = Snapshot::default();
    stats.counters.tracked = 10;
    stats.counters.pages_shared = 1;
    stats.counters.pages_sharing = 2;
    stats.counters.pages_unshared = 3;
    assert_eq!(stats.pages_volatile(), 4);
    stats.counters.pages_unshared = 7;
    assert_eq!(stats.pages_volatile(), 0);
    stats.counters.pages_unshared = 8;
    assert_eq!(stats.pages_volatile(), 0);
}

#[test]
fn profit_is_what_is_saved_less_what_is_spent() {
    let mut stats = Snapshot::default();
    stats.counters.pages_sharing = 3;
    stats.zero_pages = 2;
    stats.metadata_bytes = 1;
    assert_eq!(stats.general_profit(), 5 * 4096 - 1);
    stats.counters.pages_sharing = 0;
    stats.zero_pages = -1;
    assert_eq!(stats.general_profit(), -4097);
}

#[test]
fn the_first_mapping_is_shared_and_further_ones_are_sharing() {
    let mut counters = Counters::default();
    counters.mapping_added(true);
    counters.mapping_added(false);
    counters.mapping_added(false);
    assert_eq!((counters.pages_shared, counters.pages_sharing), (1, 2));
    counters.mapping_removed(false);
    assert_eq!((counters.pages_shared, counters.pages_sharing), (1, 1));
    counters.mapping_removed(false);
    counters.mapping_removed(true);
    assert_eq!(counters, Counters::default());
}
