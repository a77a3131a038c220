// SPDX-License-Identifier: GPL-2.0-only

//! What the governor is to achieve, on simulated hosts.

use crate::{
    check,
    host::{
        Event,
        Host,
        Kind,
        Sample,
        MSEC,
        SEC,
        SLICE, //
    },
};

use engine_tests::engine::governor::{
    Limits,
    Memory, //
};

use proptest::prelude::*;

/// 5 % of a CPU, and 10 % while memory is short.
const LIMITS: Limits = Limits::for_cpus(2);

pub(crate) const MIB: usize = 256;
const GIB: usize = 1024 * MIB;

/// Little memory, and enough.
const SHORT: Memory = Memory {
    total: 1 << 20,
    available: 1 << 16,
    swapped: 0,
};
const ENOUGH: Memory = Memory {
    available: 1 << 19,
    ..SHORT
};

/// Nothing is registered.
pub(crate) fn idle() -> Host {
    let mut host = Host::new(LIMITS);
    host.run(600 * SEC);
    host
}

/// 100 MiB that nobody touches.
pub(crate) fn quiet(kind: Kind) -> Host {
    let mut host = Host::new(LIMITS).sampled(SEC);
    host.after(SEC, Event::Start(1, 100 * MIB, kind));
    host.run(600 * SEC);
    host
}

/// So many clones of 20 MiB start, one each so many milliseconds.
fn clones(host: &mut Host, first: usize, count: usize, apart: i64) {
    for n in 0..count {
        let at = SEC + n as i64 * apart * MSEC;
        host.after(at, Event::Start(first + n, 20 * MIB, Kind::Copies));
    }
}

/// A host on which 50 processes have settled, and some are volatile.
fn busy() -> Host {
    let mut host = Host::new(LIMITS);
    for key in 0..50 {
        let kind = match key % 5 {
            0 => Kind::Rewritten(0.75),
            1 | 2 => Kind::Copies,
            _ => Kind::Unique,
        };
        host.after(SEC, Event::Start(1000 + key, 64 * MIB, kind));
    }
    host.run(600 * SEC);
    host
}

/// The time from `since` on until 95 % of so many pages are merged, without those from before.
fn until_95(samples: &[Sample], since: i64, from: i64, all: i64) -> i64 {
    let enough = |sample: &&Sample| (sample.merged - from) * 100 >= all * 95;
    let at = samples
        .iter()
        .filter(|sample| sample.at >= since)
        .find(enough);
    at.map_or(i64::MAX, |sample| sample.at - since)
}

/// Samples between two times, as differences of what is counted.
fn between(host: &Host, from: i64, to: i64) -> (f64, f64) {
    let at = |time: i64| {
        host.samples
            .iter()
            .find(|sample| sample.at >= time)
            .unwrap()
    };
    let (first, last) = (at(from), at(to));
    let secs = (last.at - first.at) as f64 / SEC as f64;
    let wakeups = (last.wakeups - first.wakeups) as f64;
    let cpu = (last.cpu - first.cpu) as f64 / SEC as f64;
    (wakeups / secs, 100.0 * cpu / secs)
}

#[test]
fn an_idle_host_costs_next_to_nothing() {
    let host = idle();
    // Whether `rksmd` sleeps for good where nothing is registered is not for the governor to say.
    assert!(host.wakeups <= 601, "{} wake-ups", host.wakeups);
    assert!(host.cpu < 600 * 20_000, "{} ns", host.cpu);
}

#[test]
fn quiet_memory_costs_a_wakeup_a_second() {
    for kind in [Kind::Copies, Kind::Unique] {
        let host = quiet(kind);
        let begin = host.samples[0].at;
        let (wakeups, percent) = between(&host, begin + 120 * SEC, begin + 599 * SEC);
        assert!(wakeups <= 1.01, "{wakeups} a second");
        assert!(percent < 0.1, "{percent} %");
        host.assert_budget(0);
        assert!(host.full_scans >= 4, "{} full scans", host.full_scans);
        println!("{kind:?}: {wakeups:.2} wake-ups a second, {percent:.4} %");
    }
}

/// 20 clones of 20 MiB on a host with nothing else. Returns when the last one started, too.
pub(crate) fn clone_storm(apart: i64) -> (Host, i64) {
    let mut host = Host::new(LIMITS).sampled(SEC / 20);
    host.run(10 * SEC);
    let last = host.now + SEC + 19 * apart * MSEC;
    clones(&mut host, 1, 20, apart);
    host.run(20 * SEC);
    (host, last)
}

#[test]
fn clones_are_merged_within_two_seconds() {
    for apart in [0, 20, 100] {
        let (host, last) = clone_storm(apart);
        let took = until_95(&host.samples, last, 0, host.copies());
        assert!(took <= 2 * SEC, "{apart} ms apart: {took} ns");
        println!("{apart} ms apart: {} ms", took / MSEC);
        host.assert_budget(0);
    }
}

#[test]
fn one_clone_more_on_a_busy_host() {
    let mut host = busy().sampled(SEC / 20);
    let (begin, merged) = (host.now, host.merged);
    host.after(0, Event::Start(1, 20 * MIB, Kind::Copies));
    let mut took = 0;
    while host.merged_of(1) * 100 < 95 * 20 * MIB as i64 {
        host.run(SEC / 20);
        took = host.now - begin;
        assert!(took <= 2 * SEC, "{took} ns");
    }
    println!("{} ms, {} pages were merged before", took / MSEC, merged);
    host.assert_budget(0);
}

/// Processes come and go all the time, more than there is CPU time for.
pub(crate) fn churn() -> Host {
    let mut host = Host::new(LIMITS);
    for n in 0..2_000 {
        let (at, kind) = (
            n as i64 * 50 * MSEC,
            if n % 2 == 0 {
                Kind::Copies
            } else {
                Kind::Unique
            },
        );
        host.after(at, Event::Start(n, 20 * MIB, kind));
        host.after(at + 3 * SEC, Event::Exit(n));
    }
    host.run(120 * SEC);
    host
}

#[test]
fn churn_keeps_the_budget() {
    let host = churn();
    let most = host.assert_budget(0);
    println!(
        "{} ms beyond what came in, {} merges",
        most / MSEC,
        host.merges
    );
    assert!(host.merges > 0);
    assert_eq!(host.merged, 0);
}

/// 100 MiB of equal pages, of which a part is rewritten each second.
pub(crate) fn volatile(left: f64) -> Host {
    let mut host = Host::new(LIMITS).sampled(SEC);
    host.after(SEC, Event::Start(1, 100 * MIB, Kind::Rewritten(left)));
    host.run(600 * SEC);
    host
}

/// Merges in what a quarter of is rewritten each second: not a tenth of those that a scanner makes
/// which comes by every five seconds, as the built-in with its default knobs.
#[test]
fn what_breaks_soon_is_not_merged() {
    let mut host = volatile(0.75);
    let merges = host.merges;
    host.run(600 * SEC);
    let a_second = (host.merges - merges) as f64 / 600.0;
    let builtin = 100.0 * MIB as f64 / 5.0 * 0.75f64.powf(5.0);
    assert!(
        a_second < builtin / 10.0,
        "{a_second} merges a second, {builtin}"
    );
    println!("{a_second:.1} merges a second; a scan each 5 s: {builtin:.0}");
    // What is rewritten once in 200 s is worth it.
    let calm = volatile(0.995);
    assert!(
        calm.merged > 60 * MIB as i64,
        "{} pages merged",
        calm.merged
    );
    println!(
        "rewritten each 200 s: {} of {} pages are merged",
        calm.merged,
        100 * MIB
    );
    calm.assert_budget(0);
    host.assert_budget(0);
}

/// Memory is short from 300 s to 600 s.
pub(crate) fn pressure() -> Host {
    let mut host = Host::new(LIMITS).sampled(SEC);
    for key in 0..20 {
        host.after(SEC, Event::Start(key, 200 * MIB, Kind::Unique));
    }
    host.after(300 * SEC, Event::Memory(SHORT));
    host.after(600 * SEC, Event::Memory(ENOUGH));
    host.run(900 * SEC);
    host
}

#[test]
fn pressure_shortens_pauses_and_raises_the_budget() {
    let host = pressure();
    let begin = host.samples[0].at;
    let (_, before) = between(&host, begin + 200 * SEC, begin + 290 * SEC);
    let (_, under) = between(&host, begin + 400 * SEC, begin + 590 * SEC);
    let (_, after) = between(&host, begin + 700 * SEC, begin + 890 * SEC);
    println!("{before:.2} %, under pressure {under:.2} %, then {after:.2} %");
    assert!(
        under > 3.0 * before && after < under / 2.0,
        "{before} {under} {after}"
    );
    let short = host.samples.iter().filter(|sample| sample.pressure).count();
    assert!((305..=315).contains(&short), "{short} s");
    host.assert_budget(0);
}

/// Limits change while there is more to do than they allow.
#[test]
fn limits_may_change_at_any_time() {
    let mut host = Host::new(LIMITS);
    for key in 0..40 {
        host.after(0, Event::Start(key, GIB, Kind::Copies));
    }
    let steps = [(5, 2000), (50, 200), (1, 10), (20, 5000), (2, 1), (5, 2000)];
    for (n, (percent, burst_msecs)) in steps.into_iter().enumerate() {
        let limits = Limits {
            percent,
            pressure_percent: 2 * percent,
            burst_msecs,
        };
        let before = host.cpu;
        host.after(0, Event::Limits(limits));
        host.run(60 * SEC);
        let used = host.cpu - before;
        let flow = 60 * SEC / 100 * i64::from(percent);
        // A new percentage also holds for the second before, in which `rksmd` slept.
        let most = flow + 5 * SEC + SLICE + SEC / 2;
        println!("{percent} %: {} ms used", used / MSEC);
        assert!(used <= most, "step {n}: {used} of {most}");
        assert!(
            n == 2 || n == 4 || used >= flow - SEC / 10,
            "step {n}: {used} of {flow}"
        );
    }
    host.assert_budget(SEC / 2);
}

/// A hundred processes a second start, each with 2 MiB, and live for a second, beside old ones of
/// 64 MiB.
pub(crate) fn fork_storm(olds: usize) -> Host {
    let mut host = Host::new(LIMITS).sampled(SEC);
    for key in 0..olds {
        host.after(0, Event::Start(key, 64 * MIB, Kind::Unique));
    }
    host.run(1200 * SEC);
    (host.had, host.late) = Default::default();
    for n in 0..30_000 {
        let at = n as i64 * 10 * MSEC;
        host.after(at, Event::Start(10_000 + n, 2 * MIB, Kind::Copies));
        host.after(at + SEC, Event::Exit(10_000 + n));
    }
    host.run(300 * SEC);
    host
}

/// A range that is due is looked at, whatever others do, after a beat and as soon as a quarter of
/// what flows in was enough for all that was due before it: here, for all of these mms. Old mms get
/// what they need, or that quarter.
#[test]
fn a_fork_storm_starves_nobody() {
    for (olds, part) in [(100, 0.15), (200, 0.24), (400, 0.24)] {
        let host = fork_storm(olds);
        // Of what flows in during the storm.
        let flow = 300 * SEC / 100 * i64::from(LIMITS.percent);
        let share = host.had[2] as f64 / flow as f64;
        // All ranges, quiet: 0.38 µs a page.
        let work = (olds * 64 * MIB) as i64 * 380;
        let bound = SEC + work * 100 / i64::from(LIMITS.percent) * 4;
        let late = host.late.old;
        println!(
            "{olds}: {share:.2} for old mms, late by {} of {} s",
            late / SEC,
            bound / SEC
        );
        assert!(late <= bound, "{late} of {bound}");
        assert!(share > part, "{share}");
        host.assert_budget(0);
    }
}

/// A process that is not young grows, by so many MiB at once, or so many each second. Returns how
/// long it takes after that until 95 % of it are merged.
fn growth(before: usize, steps: usize, mib: usize) -> i64 {
    let mut host = Host::new(LIMITS);
    host.after(0, Event::Start(1, before * MIB, Kind::Unique));
    host.run(1200 * SEC);
    for step in 0..steps {
        let at = SEC / 3 + step as i64 * SEC;
        host.after(at, Event::Grow(1, mib * MIB, Kind::Copies));
    }
    host.run(SEC / 3 + (steps as i64 - 1) * SEC);
    let begin = host.now;
    while host.merged_of(1) * 100 < (95 * steps * mib * MIB) as i64 {
        host.run(SEC / 20);
        assert!(host.now < begin + 300 * SEC, "not merged");
    }
    host.assert_budget(0);
    host.now - begin
}

/// Growth is found at the next beat, and merged at the second look, one beat later; what grows all
/// the time by little of what it has is searched less often, up to once in the longest pause.
#[test]
fn what_grows_is_merged_soon() {
    let cases = [
        (200, 1, 20, 2),
        (200, 1, 400, 3),
        (200, 20, 20, 2),
        (8000, 1, 400, 3),
        (8000, 60, 20, 66),
    ];
    for (before, steps, mib, most) in cases {
        let took = growth(before, steps, mib);
        println!("{before} MiB and {steps} times {mib}: {} ms", took / MSEC);
        assert!(took <= most * SEC, "{took} ns");
    }
}

/// So many virtual machines, with so many GiB, on a host with so many CPUs: a third of their memory
/// is equal.
pub(crate) fn virtual_machines(count: usize, gib: usize, cpus: u32, secs: i64) -> Host {
    let mut host = Host::new(Limits::for_cpus(cpus)).sampled(10 * SEC);
    for key in 0..count {
        // Not all at once.
        let at = key as i64 * SEC / 4;
        host.after(at, Event::Start(1000 + key, gib * GIB / 3, Kind::Copies));
        host.after(at, Event::Grow(1000 + key, gib * GIB / 3 * 2, Kind::Unique));
    }
    host.run(secs * SEC);
    host
}

/// 2 TiB: whatever is under way, a clone is merged within two seconds, and each range has its turn.
#[test]
fn two_tebibytes_with_400_machines() {
    let mut host = virtual_machines(400, 5, 128, 600);
    host.assert_budget(0);
    let used = host.cpu as f64 / (600 * SEC) as f64;
    println!(
        "{used:.2} of a CPU, {} GiB merged",
        host.merged / GIB as i64
    );
    let begin = host.now;
    host.after(0, Event::Start(1, 20 * MIB, Kind::Copies));
    let mut took = 0;
    while host.merged_of(1) * 100 < 95 * 20 * MIB as i64 && took < 60 * SEC {
        host.run(SEC / 20);
        took = host.now - begin;
    }
    println!("one clone more: {} ms", took / MSEC);
    assert!(took <= 2 * SEC, "{took} ns");
    host.assert_budget(0);
}

/// A quarter of that when all is known: their pauses are stretched to what the budget is worth, and
/// none is forgotten.
#[test]
fn a_large_host_stretches_pauses() {
    let mut host = virtual_machines(100, 5, 32, 3 * 3600);
    host.late = Default::default();
    host.run(3600 * SEC);
    // A round over all pages, quiet, at 16 % of a CPU.
    let round = 100 * 5 * GIB as i64 / 16 * 100 * 380;
    println!(
        "late by {} s, a round takes {} s",
        host.late.old / SEC,
        round / SEC
    );
    assert!(host.late.old <= round, "{} of {round}", host.late.old);
    host.assert_budget(0);
}

/// Any mixture, with limits and memory that change: the budget holds in each window, and `rksmd`
/// never spins.
#[test]
fn the_budget_holds_whatever_happens() {
    let kind = prop_oneof![
        Just(Kind::Copies),
        Just(Kind::Unique),
        (0.0..1.0f64).prop_map(Kind::Rewritten),
    ];
    let at = 0..60_000i64;
    let event = prop_oneof![
        6 => (at.clone(), 1..50_000usize, kind, 100..60_000i64).prop_map(|(at, pages, kind, life)| {
            (at, 0, pages, kind, life)
        }),
        1 => (at, 1..3u8, 0..2usize).prop_map(|(at, what, on)| (at, what, on, Kind::Unique, 0)),
    ];
    let limits = (1..30u32, 1..40u32, 1..5000u32);
    check(
        40,
        (prop::collection::vec(event, 1..120), limits),
        |(events, limits)| {
            let (percent, pressure_percent, burst_msecs) = limits;
            let mut host = Host::new(Limits {
                percent,
                pressure_percent,
                burst_msecs,
            });
            for (key, (at, what, amount, kind, life)) in events.into_iter().enumerate() {
                match what {
                    0 => {
                        host.after(at * MSEC, Event::Start(key, amount / 2 + 1, kind));
                        host.after((at + life / 2) * MSEC, Event::Grow(key, amount / 2, kind));
                        host.after((at + life) * MSEC, Event::Exit(key));
                    }
                    _ => {
                        let memory = if amount == 1 { SHORT } else { ENOUGH };
                        host.after(at * MSEC, Event::Memory(memory));
                    }
                }
            }
            host.run(150 * SEC);
            host.assert_budget(0);
            assert_eq!(host.merged, 0);
        },
    );
}

/// How memory fares of which a part is rewritten each second: merges a second, the part that is
/// merged, and percent of a CPU.
pub(crate) fn fares(left: f64) -> (f64, f64, f64) {
    let mut host = volatile(left);
    let (merges, cpu, mut holding) = (host.merges, host.cpu, 0.0);
    const SECS: usize = 1000;
    for _ in 0..SECS {
        host.run(SEC);
        holding += host.holding();
    }
    let secs = SECS as f64;
    (
        (host.merges - merges) as f64 / secs,
        holding / secs / (100 * MIB) as f64,
        (host.cpu - cpu) as f64 / SEC as f64 / secs * 100.0,
    )
}
