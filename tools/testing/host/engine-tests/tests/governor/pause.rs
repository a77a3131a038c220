// SPDX-License-Identifier: GPL-2.0-only

//! The pause of a range, by what looks have found.

use crate::check;

use engine_tests::engine::{
    accessed::{
        AccessedHint,
        REREAD_INTERVAL, //
    },
    governor::pause::{
        earlier,
        is_past,
        tick_at,
        Found,
        Pressure,
        RangePause,
        Tick,
        TICKS_PER_SEC,
        TICK_NSECS, //
    },
    policy::Policy,
    types::RANGE_PAGES, //
};

use kernel::page::PAGE_SIZE;

use proptest::prelude::*;

const PAGES: u16 = RANGE_PAGES as u16;

pub(crate) const PRESSURES: [Pressure; 2] = [Pressure::None, Pressure::Some];

/// A range in which looks find that nothing is new.
const KNOWN: Found = Found {
    pages: PAGES,
    merged: 0,
    fresh: 0,
};

/// The pause that begins with the last look, without what spreads ranges and with it.
fn pauses(pause: &RangePause, pressure: Pressure) -> (Tick, Tick) {
    let seen = pause.seen().expect("a look");
    let all = (0..64).map(|number| pause.due(pressure, number).expect("a look") - seen);
    let all: Vec<_> = all.collect();
    (*all.iter().min().unwrap(), *all.iter().max().unwrap())
}

/// Looks when it is due, so many times, at what `found` says. Returns the time of each.
fn look(
    pause: &mut RangePause,
    looks: usize,
    pressure: Pressure,
    mut found: impl FnMut(&mut RangePause, Tick) -> Found,
) -> Vec<Tick> {
    let mut times = Vec::new();
    for _ in 0..looks {
        let now = pause.due(pressure, 0).unwrap_or(1000);
        let found = found(pause, now);
        pause.looked(now, &found, pressure);
        times.push(now);
    }
    times
}

#[test]
fn ticks_wrap_and_compare() {
    assert_eq!(tick_at(TICK_NSECS - 1), 0);
    assert_eq!(tick_at(TICK_NSECS), 1);
    assert_eq!(
        tick_at(i64::from(TICKS_PER_SEC) * TICK_NSECS),
        TICKS_PER_SEC
    );
    assert_eq!(tick_at(TICK_NSECS << 32), 0);
    check(1000, (any::<Tick>(), 0..Tick::MAX / 2), |(at, later)| {
        assert!(is_past(at, at.wrapping_add(later)));
        assert_eq!(is_past(at.wrapping_add(later), at), later == 0);
        assert_eq!(earlier(at, at.wrapping_add(later)), at);
        assert_eq!(earlier(at.wrapping_add(later), at), at);
    });
}

/// What is new is looked at in the first second a few times, then ever more seldom: every 64 s, or
/// every 16 s where memory is short.
#[test]
fn a_quiet_range_is_looked_at_soon_and_then_seldom() {
    for pressure in PRESSURES {
        let mut pause = RangePause::NEW;
        assert_eq!((pause.due(pressure, 7), pause.seen()), (None, None));
        let times = look(&mut pause, 20, pressure, |_, _| KNOWN);
        assert!(times[3] - times[0] <= TICKS_PER_SEC, "{times:?}");
        let longest = 1 << pressure.last_step();
        assert_eq!(pauses(&pause, pressure).0, longest);
        assert!(times[19] - times[18] >= longest);
        // It has taken twice the longest pause and an eighth to get there.
        let there = times.windows(2).find(|two| two[1] - two[0] >= longest);
        assert!(there.unwrap()[0] - times[0] <= longest * 9 / 4, "{times:?}");
        // Where memory becomes short, the pause that has begun is cut.
        assert_eq!(pauses(&pause, Pressure::Some).0, 256);
    }
}

/// Neighbours are not looked at all at once, unless soon. A pause is never shorter than it should
/// be, nor longer by more than an eighth.
#[test]
fn looks_at_neighbours_are_spread() {
    let mut pause = RangePause::NEW;
    look(&mut pause, 3, Pressure::None, |_, _| KNOWN);
    assert_eq!(pauses(&pause, Pressure::None), (4, 4));
    look(&mut pause, 17, Pressure::None, |_, _| KNOWN);
    assert_eq!(pauses(&pause, Pressure::Some).0, 256);
    let seen = pause.seen().unwrap();
    let mut found = [0; 4];
    for number in 0..1024 {
        let due = pause.due(Pressure::None, number).unwrap() - seen - 1024;
        found[due as usize / 32] += 1;
    }
    assert!(found.iter().all(|&n| n > 200), "{found:?}");
}

/// Where pages live for less long than a merge is to last, looks are as far apart as that: what is
/// at rest then has earned it. Where it calms down, looks go on as elsewhere.
#[test]
fn a_volatile_range_is_looked_at_as_seldom_as_a_merge_is_to_last() {
    for (pressure, left) in PRESSURES.into_iter().zip([0.75f64, 0.1]) {
        let mut pause = RangePause::NEW;
        let mut before = 1000;
        let mut rewrite = |pause: &mut RangePause, now: Tick| {
            let secs = f64::from(now - before) / f64::from(TICKS_PER_SEC);
            before = now;
            for _ in 0..(f64::from(PAGES) * (1.0 - left.powf(secs))) as u16 {
                pause.count_change();
            }
            KNOWN
        };
        let mut volatile = false;
        for _ in 0..8 {
            look(&mut pause, 1, pressure, &mut rewrite);
            volatile |= pause.is_volatile(pressure);
        }
        assert!(volatile, "{pause:?}");
        let times = look(&mut pause, 30, pressure, &mut rewrite);
        let apart = times.windows(2).map(|two| two[1] - two[0]).min();
        let least = pressure.least_life();
        assert!(apart.unwrap() >= least, "{times:?}");
        look(&mut pause, 12, pressure, |_, _| KNOWN);
        assert!(!pause.is_volatile(pressure));
    }
}

/// A page that changes once a minute in a hundred is no reason to wait.
#[test]
fn a_few_changes_make_no_range_volatile() {
    let mut pause = RangePause::NEW;
    look(&mut pause, 40, Pressure::None, |pause, _| {
        for _ in 0..5 {
            pause.count_change();
        }
        KNOWN
    });
    assert!(!pause.is_volatile(Pressure::None));
}

/// New pages in a range that has been quiet, and merges, bring the next look nearer.
#[test]
fn what_looking_brings_decides() {
    let quiet = || {
        let mut pause = RangePause::NEW;
        look(&mut pause, 20, Pressure::None, |_, _| KNOWN);
        pause
    };
    let after = |found: Found| {
        let mut pause = quiet();
        look(&mut pause, 1, Pressure::None, |_, _| found);
        pauses(&pause, Pressure::None).0
    };
    let fresh = |fresh| Found { fresh, ..KNOWN };
    let merged = |merged| Found { merged, ..KNOWN };
    assert_eq!(after(KNOWN), 1024);
    assert_eq!(after(fresh(PAGES / 16)), 1024);
    assert_eq!(after(fresh(PAGES / 16 + 1)), 4);
    assert_eq!(after(merged(PAGES / 16)), 1024);
    assert_eq!(after(merged(PAGES / 16 + 1)), 512);
    // What was merged before is no reason.
    let mut pause = quiet();
    look(&mut pause, 2, Pressure::None, |_, _| merged(PAGES));
    assert_eq!(pauses(&pause, Pressure::None).0, 1024);
}

/// Any history: pauses stay within their limits, and only so far apart does a volatile range wait.
#[test]
fn any_history_keeps_the_limits() {
    let found = (0..=PAGES, 0..=PAGES, 0..=PAGES).prop_map(|(pages, merged, fresh)| Found {
        pages,
        merged: merged.min(pages),
        fresh: fresh.min(pages - merged.min(pages)),
    });
    let step = (0..2000 as Tick, found, 0..700u16, any::<bool>());
    let history = (any::<Tick>(), prop::collection::vec(step, 1..600));
    check(200, history, |(start, history)| {
        let (mut pause, mut now) = (RangePause::NEW, start);
        for (n, (elapsed, found, changed, short)) in history.into_iter().enumerate() {
            let pressure = PRESSURES[usize::from(short)];
            (0..changed).for_each(|_| pause.count_change());
            now = now.wrapping_add(elapsed);
            pause.looked(now, &found, pressure);
            assert_eq!(pause.seen(), Some(now));
            for number in [0, n, usize::MAX] {
                let due = pause.due(pressure, number).unwrap().wrapping_sub(now);
                let longest = 1 << pressure.last_step();
                assert!((4..=longest + longest / 8).contains(&due), "{due}");
                if n >= 3 && pause.is_volatile(pressure) {
                    assert!(due >= pressure.least_life(), "{due}");
                }
            }
        }
    });
}

/// Sixteen looks in a row have all remainders, however many there have been: each page is read
/// again at one of them, whatever the times between.
#[test]
fn a_page_is_read_again_within_sixteen_looks() {
    let policy = Policy {
        smart_scan: false,
        use_zero_pages: false,
        merge_across_nodes: true,
        vouched: false,
        max_page_sharing: 256,
    };
    let reads = |look: u8, page: usize| {
        let mut hint = AccessedHint::new();
        hint.update(&policy);
        // What the number of the look stands in for.
        (0..look).for_each(|_| hint.end_full_scan());
        !hint.unchanged(page * PAGE_SIZE, 0)
    };
    let times = prop::collection::vec(1..5000 as Tick, 700);
    check(8, times, |times| {
        let (mut pause, mut now) = (RangePause::NEW, 0);
        let looks: Vec<u8> = times
            .into_iter()
            .map(|elapsed| {
                let look = pause.look();
                now += elapsed;
                pause.looked(now, &KNOWN, Pressure::None);
                look
            })
            .collect();
        for page in 0..REREAD_INTERVAL {
            for looks in looks.windows(REREAD_INTERVAL) {
                assert!(looks.iter().any(|&look| reads(look, page)), "{looks:?}");
            }
        }
    });
}
