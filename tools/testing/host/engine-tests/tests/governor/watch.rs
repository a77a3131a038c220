// SPDX-License-Identifier: GPL-2.0-only

//! When an mm is visited.

use crate::{
    check,
    pause::PRESSURES, //
};

use engine_tests::engine::governor::{
    pause::{
        is_past,
        Pressure,
        Tick,
        TICKS_PER_SEC, //
    },
    watch::{
        Class,
        Watch, //
    },
};

use proptest::prelude::*;

const YOUNG: Tick = 10 * TICKS_PER_SEC;

/// Visits an mm all of whose ranges are due at `next`. Returns whether the visit was open.
fn visit(watch: &mut Watch, now: Tick, anon: u32, next: Tick) -> bool {
    let (at, open) = watch.begin(now, anon, Pressure::None);
    assert_eq!(at, 0);
    watch.pass(1, now, next);
    watch.move_to(1 << 21, true);
    assert!(watch.end(now));
    open
}

/// An mm that has been visited at its time, and is not young any more.
fn settled(now: Tick, anon: u32) -> Watch {
    let mut watch = Watch::default();
    assert_eq!(watch.class(now - 2 * YOUNG, anon), None);
    assert!(visit(&mut watch, now - YOUNG, anon, now + 5000));
    watch
}

/// Also those before a pause count.
#[test]
fn a_visit_remembers_that_accessed_bits_were_cleared() {
    let mut watch = settled(1000, 50);
    for cleared in [false, true, false] {
        watch.begin(1000, 50, Pressure::None);
        watch.move_to(1 << 21, cleared);
        watch.pass(5, 1000, 2000);
        watch.move_to(6 << 21, false);
        assert_eq!(watch.begin(1001, 50, Pressure::None).0, 6 << 21);
        assert_eq!(watch.end(1001), cleared);
    }
}

#[test]
fn a_new_mm_is_visited_after_a_quarter_of_a_second() {
    let mut watch = Watch::default();
    assert_eq!(watch.class(100, 50), None);
    assert_eq!(watch.class(103, 50), None);
    assert_eq!(watch.class(104, 50), Some(Class::Young));
    assert!(visit(&mut watch, 104, 50, 108));
    assert_eq!(watch.class(107, 50), None);
    assert_eq!(watch.class(108, 50), Some(Class::Young));
    // Nothing has come since: no open visit.
    assert!(!visit(&mut watch, 108, 50, 100 + YOUNG));
    assert!(watch.is_young(99 + YOUNG) && !watch.is_young(100 + YOUNG));
    assert_eq!(watch.class(100 + YOUNG, 50), Some(Class::Old));
}

/// It has to grow by 64 pages, and by a sixty-fourth.
#[test]
fn growth_begins_an_open_visit() {
    for (anon, growth) in [(0, 64), (4096, 64), (64_000, 1000), (1 << 22, 1 << 16)] {
        let mut watch = settled(10_000, anon);
        assert_eq!(watch.class(10_000, anon + growth), None, "{anon}");
        assert_eq!(watch.class(10_001, anon + growth + 1), Some(Class::Grown));
        assert!(visit(&mut watch, 10_001, anon + growth + 1, 20_000));
        assert_eq!(watch.class(10_020, anon + growth + 1), None);
        // What it has lost first counts, too.
        assert_eq!(watch.class(10_030, 0), None);
        assert_eq!(watch.class(10_040, anon / 8 * 7 + 66), Some(Class::Grown));
    }
}

/// What shrinks and grows again, by little or by much, is visited as seldom as others in the end;
/// what goes on to grow, however slowly, is not.
#[test]
fn to_breathe_is_not_to_grow() {
    let visits = |anon: fn(u32) -> u32| {
        let mut watch = settled(10_000, 1000);
        let mut visits = Vec::new();
        for now in 10_000..30_000 {
            let pages = anon(now - 10_000);
            if watch.class(now, pages) == Some(Class::Grown) {
                assert!(visit(&mut watch, now, pages, now + 1024));
                visits.push(now);
            }
        }
        visits
    };
    for breathe in [
        |at: u32| 1000 + at / 8 % 2 * 100,
        |at: u32| 1000 + at / 8 % 2 * 5000,
    ] {
        let breathing = visits(breathe);
        assert!(breathing.len() < 40, "{} visits", breathing.len());
        let last = breathing[breathing.len() - 1] - breathing[breathing.len() - 2];
        assert!(last >= 1024, "{last} ticks");
    }
    assert!(visits(|at| 1000 + at).len() > 100);
    assert!(visits(|at| 1000 + at * 100).len() > 300);
}

/// Without growth, too, new memory is searched once in the longest pause.
#[test]
fn an_open_visit_comes_by_itself() {
    for pressure in PRESSURES {
        let mut watch = settled(10_000, 1000);
        let mut opened = Vec::new();
        for now in 10_001..18_000 {
            if watch.class(now, 1000).is_some() {
                let (_, open) = watch.begin(now, 1000, pressure);
                watch.pass(1, now, now + 5000);
                watch.end(now);
                if open {
                    opened.push(now);
                }
            }
        }
        let longest = 1 << pressure.last_step();
        assert!(opened.len() >= 7, "{opened:?}");
        let apart = opened.windows(2).map(|two| two[1] - two[0]);
        assert!(
            apart.into_iter().all(|ticks| ticks == longest),
            "{opened:?}"
        );
    }
}

#[test]
fn a_visit_goes_on_where_it_was() {
    let mut watch = settled(10_000, 1000);
    assert_eq!(watch.class(15_000, 1000), Some(Class::Old));
    assert_eq!(watch.begin(15_000, 1000, Pressure::None), (0, true));
    watch.move_to(0x20_0000, true);
    // It is open: it counts as growth, and so it does not begin again.
    assert_eq!(watch.class(15_001, 9000), Some(Class::Grown));
    assert_eq!(watch.begin(15_001, 9000, Pressure::None), (0x20_0000, true));
    watch.postpone(15_001, 3);
    assert_eq!(watch.class(15_003, 9000), None);
    assert_eq!(watch.class(15_004, 9000), Some(Class::Grown));
    assert!(watch.end(15_004));
    // The growth was seen while the visit was under way, and may be where it had been already.
    assert_eq!(watch.class(15_010, 9000), Some(Class::Grown));
}

/// An mm with very many ranges, one of which is always due, is not passed through in each tick.
#[test]
fn a_large_mm_is_gone_through_less_often() {
    let mut watch = settled(10_000, 1 << 28);
    for (ranges, ticks) in [(100, 1), (5_120, 11), (1 << 20, 2049)] {
        watch.begin(20_000, 1 << 28, Pressure::None);
        watch.pass(ranges, 19_000, 20_000);
        assert!(!watch.end(20_000));
        assert_eq!(watch.due(), 20_000 + ticks);
    }
}

/// Memory counts as looked at since the oldest look at any of its ranges, or since the last search
/// for new memory.
#[test]
fn what_is_covered_was_looked_at() {
    let looks = prop::collection::vec(0..2000 as Tick, 0..20);
    check(200, (looks, any::<Tick>()), |(looks, base)| {
        let mut watch = settled(base, 1000);
        let now = base.wrapping_add(2000);
        let (_, open) = watch.begin(now, 1000, Pressure::None);
        assert!(open);
        let all = looks.iter().map(|&look| base.wrapping_add(look));
        all.clone().for_each(|look| watch.pass(1, look, look));
        watch.end(now);
        assert!(all.into_iter().all(|look| is_past(watch.covered(), look)));
        assert!(is_past(watch.covered(), now));
    });
}

/// What an mm has counts as new when it is no longer passed over.
#[test]
fn an_mm_that_is_passed_over_counts_as_looked_at() {
    let mut watch = settled(10_000, 1000);
    watch.begin(15_000, 1000, Pressure::None);
    watch.move_to(0x1000, false);
    watch.pass_over(15_000);
    assert_eq!(watch.covered(), 15_000);
    assert_eq!(watch.class(15_016, 1000), Some(Class::Grown));
    assert_eq!(watch.begin(15_016, 1000, Pressure::None), (0, true));
}

/// So does what an mm has of which all that was known has been dropped.
#[test]
fn what_is_forgotten_is_new() {
    let mut watch = settled(10_000, 1000);
    assert_eq!(watch.class(10_100, 1000), None);
    watch.forget();
    assert_eq!(watch.class(10_100, 1000), Some(Class::Grown));
    assert!(visit(&mut watch, 10_100, 1000, 20_000));
    assert_eq!(watch.class(10_200, 1000), None);
}
