// SPDX-License-Identifier: GPL-2.0-only

//! Which mm is next, and whether the CPU time for it is there.

use crate::check;

use engine_tests::engine::{
    governor::{
        pause::{
            tick_at,
            Pressure, //
        },
        watch::{
            Class,
            Watch, //
        },
        Governor,
        Limits,
        Memory,
        Visit, //
    },
    types::SlotId, //
};

use proptest::prelude::*;

const MSEC: i64 = 1_000_000;
const SEC: i64 = 1000 * MSEC;

const LIMITS: Limits = Limits {
    percent: 5,
    pressure_percent: 10,
    burst_msecs: 2000,
};

const FREE: Memory = Memory {
    total: 1_000_000,
    available: 500_000,
    swapped: 0,
};

/// A governor, and an mm for each number whose watch has been made due at a time.
struct Mms {
    governor: Governor,
    watches: Vec<Watch>,
    now: i64,
    cpu: i64,
    limits: Limits,
}

impl Mms {
    /// Begins at a time with mms that were born long before.
    fn new(now: i64, dues: &[i64]) -> Self {
        let mut governor = Governor::new();
        governor.begin(now, 0, LIMITS);
        let watches = dues.iter().map(|&due| old(due)).collect();
        Self {
            governor,
            watches,
            now,
            cpu: 0,
            limits: LIMITS,
        }
    }

    fn count(&mut self) {
        self.governor.count(self.now, self.cpu as u64, self.limits);
    }

    fn sweep(&mut self) -> bool {
        self.governor.begin_sweep();
        for (n, watch) in self.watches.iter_mut().enumerate() {
            self.governor.consider(self.now, SlotId(n as u32), watch, 0);
        }
        self.governor.end_sweep(self.now)
    }

    fn picks(&mut self) -> Vec<u32> {
        let mut picks = Vec::new();
        while let Some(visit) = self.governor.pick() {
            picks.push(visit.slot.0);
        }
        picks
    }

    /// Uses CPU time.
    fn work(&mut self, nsecs: i64) {
        self.now += nsecs;
        self.cpu += nsecs;
        self.count();
    }

    /// Visits so long as there is CPU time for it, for so long each. Each visit is put back.
    /// Returns what each class has had, and each mm.
    fn spend(&mut self, until: i64, price: impl Fn(Class) -> i64) -> ([i64; 3], Vec<i64>) {
        let (mut had, mut each) = ([0; 3], vec![0; self.watches.len()]);
        let mut still = 0;
        while self.now < until {
            self.count();
            if self.governor.sweep_is_due(self.now) {
                self.sweep();
            }
            match self.governor.pick() {
                Some(visit) => {
                    let price = price(visit.class);
                    had[visit.class as usize] += price;
                    each[visit.slot.0 as usize] += price;
                    self.work(price);
                    let pages_left = visit.pages_left.saturating_sub(200);
                    if pages_left == 0 {
                        let watch = &mut self.watches[visit.slot.0 as usize];
                        watch.postpone(tick_at(self.now), 0);
                    }
                    self.governor.put_back(Visit {
                        pages_left,
                        ..visit
                    });
                    still = 0;
                }
                None => {
                    let at = self.governor.wake_at(self.now);
                    still += 1;
                    assert!(at > self.now || still < 2, "a busy loop");
                    self.now = self.now.max(at);
                }
            }
        }
        (had, each)
    }
}

/// An mm that is not young, and that is due at a time.
fn old(due: i64) -> Watch {
    let due = tick_at(due);
    let mut watch = Watch::default();
    watch.class(due.wrapping_sub(1000), 0);
    watch.begin(due.wrapping_sub(500), 0, Pressure::None);
    watch.pass(1, due.wrapping_sub(500), due);
    watch.end(due.wrapping_sub(500));
    assert_eq!(watch.due(), due);
    watch
}

/// As `old`, under way for what is new.
fn grown(due: i64) -> Watch {
    let mut watch = old(due);
    let due = tick_at(due);
    assert_eq!(watch.class(due, 10_000), Some(Class::Grown));
    assert!(watch.begin(due, 0, Pressure::None).1);
    watch
}

fn young(born: i64) -> Watch {
    let mut watch = Watch::default();
    watch.class(tick_at(born), 0);
    watch
}

/// Whatever the times, those that are due come in their order, also where there are more than a
/// sweep has room for.
#[test]
fn who_has_waited_longest_comes_first() {
    let dues = prop::collection::vec(0..200 * SEC, 0..300);
    check(100, dues, |dues| {
        let now = 100 * SEC + 1000 * SEC;
        let dues: Vec<i64> = dues.iter().map(|due| due + 1000 * SEC).collect();
        let mut mms = Mms::new(now, &dues);
        let due = |n: &u32| tick_at(dues[*n as usize]);
        let mut expected: Vec<u32> = (0..dues.len() as u32).collect();
        expected.retain(|n| due(n) <= tick_at(now));
        let mut picked = Vec::new();
        // A sweep is due again each time it is dry.
        for _ in 0..8 {
            mms.count();
            if !mms.governor.sweep_is_due(now) {
                break;
            }
            mms.sweep();
            let picks = mms.picks();
            assert!(picks.len() <= 64);
            for &n in &picks {
                mms.watches[n as usize] = old(now + 100 * SEC);
            }
            picked.extend(picks);
        }
        let times: Vec<_> = picked.iter().map(due).collect();
        assert!(times.is_sorted(), "{times:?}");
        picked.sort_unstable();
        assert_eq!(picked, expected);
    });
}

#[test]
fn what_is_new_comes_first_and_others_have_their_share() {
    let now = 1000 * SEC;
    let mut mms = Mms::new(now, &[now - SEC]);
    mms.watches.push(grown(now - 2 * SEC));
    mms.watches.push(young(now - SEC));
    mms.count();
    mms.sweep();
    assert_eq!(mms.picks(), [2, 1, 0]);
    // A quarter of what flows in is left to each: after that they are first.
    mms.work(MSEC);
    mms.now += SEC;
    mms.count();
    mms.sweep();
    assert_eq!(mms.picks(), [0, 1, 2]);
}

/// Half of the burst is kept for what is new, unless memory is short.
#[test]
fn a_reserve_is_kept() {
    for short in [false, true] {
        let now = 1000 * SEC;
        let mut mms = Mms::new(now, &[now - SEC]);
        if short {
            let memory = Memory {
                available: 149_000,
                ..FREE
            };
            mms.governor.see_memory(now, &memory);
        }
        mms.count();
        mms.sweep();
        let mut had = 0;
        while let Some(visit) = mms.governor.pick() {
            mms.work(MSEC);
            had += MSEC;
            mms.governor.put_back(visit);
        }
        let kept = if short { 2100 } else { 1052 } * MSEC;
        assert!(
            (kept - 200 * MSEC..=kept + 200 * MSEC).contains(&had),
            "{had}"
        );
        // A young one finds what is left.
        mms.watches.push(young(now - SEC));
        mms.sweep();
        assert_eq!(mms.picks().is_empty(), short);
    }
}

/// While others have endless work, old mms get a quarter of what flows in, and others the rest,
/// whatever a visit takes.
#[test]
fn old_mms_get_a_quarter() {
    for class in [Class::Young, Class::Grown] {
        for price in [MSEC / 10, MSEC, 4 * MSEC] {
            let begin = 1000 * SEC;
            let mut mms = Mms::new(begin, &[begin - SEC, begin - 2 * SEC]);
            for _ in 0..200 {
                mms.watches.push(match class {
                    Class::Young => young(begin - SEC),
                    _ => grown(begin - SEC),
                });
            }
            // The burst is used up first.
            mms.spend(begin + 4 * SEC, |_| price);
            let until = mms.now + 5 * SEC;
            let (had, _) = mms.spend(until, |_| price);
            let all: i64 = had.iter().sum();
            let share = had[Class::Old as usize] as f64 / all as f64;
            assert!(
                (0.2..=0.3).contains(&share),
                "{share} at {price} ns: {had:?}"
            );
            // No more than flows in.
            assert!(all <= 5 * SEC / 20 + 8 * MSEC + price, "{all}");
        }
    }
}

/// Mms that grow have as much left to them, whatever young ones do.
#[test]
fn growing_mms_get_a_quarter() {
    let begin = 1000 * SEC;
    let mut mms = Mms::new(begin, &[begin - SEC]);
    mms.watches.extend((0..3).map(|_| young(begin - SEC)));
    mms.watches.push(grown(begin - SEC));
    mms.spend(begin + 4 * SEC, |_| MSEC);
    let until = mms.now + 4 * SEC;
    let (had, _) = mms.spend(until, |_| MSEC);
    let all = had.iter().sum::<i64>() as f64;
    for class in [Class::Grown, Class::Old] {
        let share = had[class as usize] as f64 / all;
        assert!((0.2..=0.3).contains(&share), "{share}: {had:?}");
    }
}

/// The same where the visits of others are cheap, or theirs are.
#[test]
fn old_mms_get_a_quarter_whatever_their_pages_cost() {
    for (old, new) in [(MSEC / 10, 4 * MSEC), (4 * MSEC, MSEC / 10)] {
        let begin = 1000 * SEC;
        let mut mms = Mms::new(begin, &[begin - SEC, begin - 2 * SEC]);
        mms.watches.extend([young(begin - SEC), young(begin - SEC)]);
        let price = |class| if class == Class::Old { old } else { new };
        mms.spend(begin + 4 * SEC, price);
        let until = mms.now + 5 * SEC;
        let (had, _) = mms.spend(until, price);
        let share = had[2] as f64 / had.iter().sum::<i64>() as f64;
        assert!((0.2..=0.3).contains(&share), "{share}: {had:?}");
    }
}

/// Mms of a class have their turns, one visit after the other, also where old ones come in between.
#[test]
fn no_mm_keeps_others_of_its_class_waiting() {
    for class in [Class::Young, Class::Grown] {
        for olds in [0, 3] {
            let begin = 1000 * SEC;
            let mut mms = Mms::new(begin, &vec![begin - SEC; olds]);
            for ago in 1..=5 {
                mms.watches.push(match class {
                    Class::Young => young(begin - ago * SEC),
                    _ => grown(begin - ago * SEC),
                });
            }
            // 82 holds for a visit, of 4 ms each.
            mms.spend(begin + 4 * SEC, |_| 4 * MSEC);
            let until = mms.now + 5 * 82 * 4 * MSEC * 20 * 2;
            let (_, each) = mms.spend(until, |_| 4 * MSEC);
            assert!(each.iter().all(|&had| had > 0), "{each:?}");
        }
    }
}

/// A visit goes on after its hold, but not for ever while others wait.
#[test]
fn a_long_visit_lets_others_in() {
    let now = 1000 * SEC;
    let mut mms = Mms::new(now, &[]);
    mms.watches.extend([young(now - 2 * SEC), young(now - SEC)]);
    mms.count();
    mms.sweep();
    let first = mms.governor.pick().unwrap();
    assert_eq!(first.slot, SlotId(0));
    let begun = Visit {
        pages_left: 5,
        ..first
    };
    mms.governor.put_back(begun);
    assert_eq!(mms.governor.pick(), Some(begun));
    mms.governor.put_back(Visit {
        pages_left: 0,
        ..first
    });
    assert_eq!(mms.governor.pick().unwrap().slot, SlotId(1));
    // The next sweep finds it again.
    assert!(mms.governor.sweep_is_due(now));
    mms.sweep();
    assert!(mms.picks().contains(&0));
}

/// Without CPU time nothing is picked nor swept, and nobody wakes up before it is worth it.
#[test]
fn nothing_happens_without_cpu_time() {
    let now = 1000 * SEC;
    let mut mms = Mms::new(now, &[now - SEC]);
    mms.watches.push(young(now - SEC));
    mms.work(2500 * MSEC);
    assert!(!mms.governor.sweep_is_due(mms.now));
    mms.now += SEC;
    mms.count();
    assert!(!mms.governor.sweep_is_due(mms.now));
    assert_eq!(mms.governor.pick(), None);
    // It takes 20 times as long as what is owed, and the four milliseconds that are worth it.
    let at = mms.governor.wake_at(mms.now);
    assert_eq!(at - mms.now, 20 * (450 + 4) * MSEC);
}

/// Memory is short below 15 % and where pages are swapped, and for ten seconds after that.
#[test]
fn pressure_comes_and_goes() {
    let mut governor = Governor::new();
    governor.begin(0, 0, LIMITS);
    let mut see = |now: i64, available, swapped| {
        let memory = Memory {
            available,
            swapped,
            ..FREE
        };
        governor.see_memory(now * SEC, &memory);
        governor.pressure()
    };
    // What was swapped before the governor began does not matter.
    assert_eq!(see(0, 500_000, 77), Pressure::None);
    assert_eq!(see(1, 149_999, 77), Pressure::Some);
    assert_eq!(see(2, 150_000, 77), Pressure::Some);
    assert_eq!(see(10, 150_000, 77), Pressure::Some);
    assert_eq!(see(11, 150_000, 77), Pressure::None);
    assert_eq!(see(12, 500_000, 78), Pressure::Some);
    assert_eq!(see(21, 500_000, 78), Pressure::Some);
    assert_eq!(see(22, 500_000, 78), Pressure::None);
}

/// A full scan ends when each mm that was there when it began has been looked at since.
#[test]
fn a_full_scan_is_a_look_at_everything() {
    let begin = 1000 * SEC;
    let mut mms = Mms::new(begin, &[begin + 20 * SEC, begin + 30 * SEC]);
    let look = |watch: &mut Watch, now: i64| {
        let now = tick_at(now);
        watch.begin(now, 0, Pressure::None);
        watch.pass(1, now, now + 500);
        watch.end(now);
    };
    assert!(!mms.sweep());
    // An open visit is due by then: what is new is looked at, too.
    look(&mut mms.watches[0], begin + 105 * SEC);
    mms.now = begin + 106 * SEC;
    // One that came after the scan began is not waited for.
    mms.watches.push(young(mms.now));
    assert!(!mms.sweep());
    look(&mut mms.watches[1], begin + 107 * SEC);
    mms.now = begin + 108 * SEC;
    assert!(mms.sweep());
    assert!(!mms.sweep());
    // Where there is no mm at all there is no scan.
    mms.watches.clear();
    assert!(!mms.sweep());
}

/// Whatever comes, goes on or has to wait: `rksmd` sleeps, or has something to do.
#[test]
fn there_is_no_busy_loop() {
    let mm = (0..3u8, 0..60 * SEC);
    let case = (
        prop::collection::vec(mm, 0..200),
        prop::collection::vec(
            (10_000..8 * MSEC, 0..400u32, any::<bool>(), 0..20u8),
            20..60,
        ),
        1..40u32,
    );
    check(200, case, |(specs, steps, percent)| {
        let begin = 1000 * SEC;
        let mut mms = Mms::new(begin, &[]);
        mms.limits.percent = percent;
        mms.watches = specs
            .iter()
            .map(|&(kind, ago)| match kind {
                0 => young(begin - ago),
                1 => grown(begin - ago),
                _ => old(begin + 30 * SEC - ago),
            })
            .collect();
        let mut steps = steps.iter().cycle();
        let until = begin + 30 * SEC;
        let mut wakeups = 0u64;
        while mms.now < until {
            mms.count();
            if mms.governor.sweep_is_due(mms.now) {
                mms.sweep();
            }
            let Some(visit) = mms.governor.pick() else {
                let at = mms.governor.wake_at(mms.now);
                assert!(at > mms.now, "{at} at {}", mms.now);
                wakeups += 1;
                mms.now = at;
                continue;
            };
            let &(price, pages, done, other) = steps.next().unwrap();
            mms.work(price);
            if other == 0 {
                mms.governor.newcomer(mms.now);
            }
            if done {
                mms.watches[visit.slot.0 as usize] = old(mms.now + SEC * i64::from(other));
            } else {
                let pages_left = visit.pages_left.saturating_sub(pages * 40);
                mms.governor.put_back(Visit {
                    pages_left,
                    ..visit
                });
            }
        }
        // Not more often than there is CPU time worth it, and the sweeps.
        let worth = 30 * 10 * u64::from(percent) / 4 + 1;
        assert!(wakeups <= worth + 30 * 5 + 600, "{wakeups} wake-ups");
    });
}
