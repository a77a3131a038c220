// SPDX-License-Identifier: GPL-2.0-only

//! The scan-time advisor against figures that the built-in's own code gave for the same input.

use engine_tests::engine::sysfs::{
    advisor::Advice,
    attribute::*,
    knobs::{
        Knobs,
        StoreCtx, //
    }, //
};

use proptest::prelude::*;

/// When a full scan began (none if below zero) and ended, and the scanner's CPU time, all in ms;
/// then scan time, pages to scan and CPU share.
type Scan = (i64, i64, u64, [u64; 3]);

const MSEC: i64 = 1_000_000;

fn knobs(max_cpu: &str, min: &str, max: &str, target: &str) -> Knobs {
    let mut knobs = Knobs::new();
    for (file, text) in [
        (&ADVISOR_MAX_CPU, max_cpu),
        (&ADVISOR_MIN_PAGES_TO_SCAN, min),
        (&ADVISOR_MAX_PAGES_TO_SCAN, max),
        (&ADVISOR_TARGET_SCAN_TIME, target),
        (&ADVISOR_MODE, "scan-time"),
    ] {
        let ctx = StoreCtx {
            pages_shared: 0,
            cpus: 1,
        };
        let change = file.parse(text.as_bytes()).unwrap();
        assert!(knobs.apply(change, &ctx).is_ok());
    }
    knobs
}

fn check(mut knobs: Knobs, scans: &[Scan]) {
    for &(start, end, cpu, [scan_time, pages_to_scan, cpu_percent]) in scans {
        if start >= 0 {
            knobs.scan_started(start * MSEC);
        }
        let advice = knobs.scan_ended(end * MSEC, cpu * MSEC as u64);
        let expected = Advice {
            scan_time,
            pages_to_scan,
            cpu_percent: cpu_percent as u32,
        };
        assert_eq!(advice, Some(expected));
        assert_eq!(knobs.pages_to_scan, pages_to_scan as u32);
    }
}

#[test]
fn follows_the_built_in_with_its_defaults() {
    check(
        knobs("70", "500", "30000", "200"),
        &[
            (5_000, 405_000, 1_000, [400, 5000, 1]),
            (406_000, 700_000, 30_000, [294, 5550, 9]),
            (700_000, 800_999, 60_000, [100, 1850, 30]),
            (801_000, 801_400, 60_010, [1, 18500, 1]),
            (801_400, 900_000, 160_000, [98, 12670, 102]),
            (900_000, 1_400_000, 161_000, [500, 30000, 1]),
            (1_400_000, 1_700_000, 163_000, [300, 30000, 1]),
        ],
    );
}

#[test]
fn follows_the_built_in_with_a_short_target() {
    check(
        knobs("20", "100", "5000", "1"),
        &[
            (1_000, 3_500, 900, [2, 40, 45]),
            (3_500, 4_000, 1_200, [1, 14, 30]),
            (4_000, 14_000, 2_000, [10, 20, 8]),
            (14_000, 15_000, 2_900, [1, 20, 90]),
            (15_000, 16_000, 3_000, [1, 38, 10]),
        ],
    );
}

#[test]
fn switched_on_in_the_middle_of_a_scan_it_counts_from_boot() {
    check(
        knobs("70", "500", "30000", "200"),
        &[
            (-1, 90_000, 5_000, [90, 1000, 5]),
            (90_000, 100_000, 5_100, [10, 10000, 1]),
        ],
    );
}

#[test]
fn wraps_around_where_the_built_in_does() {
    check(
        knobs("70", "4294967396", "18446744073709551615", "200"),
        &[
            (0, 1_000_000, 10, [1000, 1000, 1]),
            (1_000_000, 5_000_000, 20, [4000, 28200, 1]),
            (5_000_000, 25_000_000, 30, [20000, 1_974_000, 1]),
        ],
    );
    check(
        knobs(
            "4294967295",
            "42949673",
            "18446744073709551615",
            "184467440737095517",
        ),
        &[
            (0, 50_000, 100, [50, 429_496_730, 1]),
            (50_000, 60_000, 120, [10, 4_294_967_300, 1]),
            (60_000, 400_000, 50_000, [340, 4152, 14]),
            (400_000, 400_000, 900_000, [1, 35878, 85000]),
        ],
    );
}

proptest! {
    #[test]
    fn never_exceeds_the_most_pages_and_never_panics(
        settings in (any::<u64>(), any::<u64>(), prop_oneof![0..3u64, any::<u64>()], 1..=u64::MAX),
        scans in prop::collection::vec((any::<i64>(), any::<i64>(), any::<u64>()), 1..20),
    ) {
        let (cpu, min, max, target) = settings;
        let text = |value: u64| value.to_string();
        let mut knobs = knobs(&text(cpu), &text(min), &text(max), &text(target));
        for (start, end, cpu_ns) in scans {
            knobs.scan_started(start);
            let advice = knobs.scan_ended(end, cpu_ns).unwrap();
            prop_assert!(advice.pages_to_scan <= max);
            prop_assert!(advice.scan_time >= 1 && advice.cpu_percent >= 1);
            prop_assert_eq!(knobs.pages_to_scan, advice.pages_to_scan as u32);
        }
    }
}
