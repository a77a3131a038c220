// SPDX-License-Identifier: GPL-2.0-only

//! Random histories of a few processes and the scanner.

use crate::{
    control::MergeNow,
    machine::{
        Machine,
        Op, //
    },
    sim::{
        Chance,
        Content,
        Event,
        Hash,
        AREAS,
        PAGES, //
    }, //
};

use proptest::{
    collection::vec,
    option,
    prelude::*, //
};

/// Which page of which mm, and how many from there on.
fn place() -> impl Strategy<Value = (usize, usize, usize)> {
    (
        0..8usize,
        0..PAGES,
        prop_oneof![4 => 1..6usize, 1 => 20..90usize],
    )
}

/// Few contents, so that many pages are alike.
fn content() -> impl Strategy<Value = Content> {
    prop_oneof![1 => Just(0u8), 4 => 1..5u8, 1 => 5..40u8]
}

fn event() -> impl Strategy<Value = Event> {
    let mergeable = proptest::array::uniform3(prop_oneof![4 => Just(true), 1 => Just(false)]);
    prop_oneof![
        2 => mergeable.prop_map(|mergeable| Event::Spawn { mergeable }),
        8 => (place(), content(), prop_oneof![3 => Just(0u8), 1 => 1..3u8]).prop_map(
            |((mm, page, count), content, step)| Event::Write { mm, page, count, content, step }
        ),
        2 => place().prop_map(|(mm, page, count)| Event::Unmap { mm, page, count }),
        1 => (place(), 0..PAGES)
            .prop_map(|((mm, from, count), to)| Event::Move { mm, from, to, count }),
        1 => place().prop_map(|(mm, page, count)| Event::SwapOut { mm, page, count }),
        1 => place().prop_map(|(mm, page, count)| Event::Age { mm, page, count }),
        1 => place().prop_map(|(mm, page, count)| Event::Read { mm, page, count }),
        2 => place().prop_map(|(mm, page, _)| Event::Collapse { mm, page }),
        2 => (0..8usize, option::weighted(0.3, 0..AREAS.len()))
            .prop_map(|(mm, dont_fork)| Event::Fork { mm, dont_fork }),
        1 => (0..8usize, -9..9isize).prop_map(|(mm, by)| Event::Miscount { mm, by }),
        2 => (0..12usize, 1..4usize).prop_map(|(mm, steps)| Event::Exit { mm, steps }),
        1 => (0..8usize, 0..AREAS.len(), any::<bool>())
            .prop_map(|(mm, area, on)| Event::Advise { mm, area, on }),
        2 => (place(), 0..2u32).prop_map(|((mm, page, _), nid)| Event::Migrate { mm, page, nid }),
        1 => (0..8usize, 1..4u32).prop_map(|(mm, tries)| Event::Hold { mm, tries }),
        1 => place().prop_map(|(mm, page, _)| Event::Lock { mm, page }),
        1 => place().prop_map(|(mm, page, _)| Event::Pin { mm, page }),
        1 => Just(Event::Release),
    ]
}

/// Events that happen during a scan, each after a number of the scan's steps.
fn interleaved() -> impl Strategy<Value = Vec<(u32, Event)>> {
    prop_oneof![
        1 => Just(Vec::new()),
        1 => vec((0..60u32, event()), 0..8),
    ]
}

fn chance(most: u64) -> impl Strategy<Value = Option<Chance>> {
    option::of((any::<u64>(), 1..most).prop_map(|(seed, one_in)| Chance { seed, one_in }))
}

fn threads() -> impl Strategy<Value = Op> {
    (prop_oneof![Just(1usize), Just(2), Just(4)], any::<u64>())
        .prop_map(|(threads, seed)| Op::ScanThreads(threads, seed))
}

/// Pages that are merged at once, all at a time or few.
fn merge_now() -> impl Strategy<Value = MergeNow> {
    let budget = prop_oneof![2 => 1..100u32, 1 => Just(1024)];
    let scan = option::weighted(0.3, 1..40u32);
    let all = prop_oneof![3 => Just(false), 1 => Just(true)];
    (place(), all, budget, any::<bool>(), scan, interleaved()).prop_map(
        |((mm, page, count), all, budget, pool, scan, interleaved)| MergeNow {
            mm,
            page: if all { 0 } else { page },
            count: if all { PAGES } else { count },
            budget,
            pool,
            scan,
            interleaved,
        },
    )
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => event().prop_map(Op::Happen),
        8 => (1..100u32, option::weighted(0.2, 1..40u32), interleaved())
            .prop_map(|(budget, pause_after, interleaved)| Op::Scan {
                budget,
                pause_after,
                interleaved,
            }),
        8 => interleaved().prop_map(|interleaved| Op::FullScan { interleaved }),
        2 => (1..20usize).prop_map(Op::Prune),
        1 => (option::weighted(0.3, 0..40u32), interleaved())
            .prop_map(|(fail_after, interleaved)| Op::Unmerge { fail_after, interleaved }),
        1 => (0..1000usize).prop_map(|block| Op::HotRemove { block }),
        1 => Just(Op::Online),
        1 => any::<bool>().prop_map(Op::SmartScan),
        1 => any::<bool>().prop_map(Op::UseZeroPages),
        1 => any::<bool>().prop_map(Op::MergeAcrossNodes),
        1 => (2..6u32).prop_map(Op::MaxPageSharing),
        1 => threads(),
        1 => chance(12).prop_map(Op::Chance),
        1 => chance(6).prop_map(Op::Fail),
        6 => merge_now().prop_map(Op::Merge),
        1 => (0..8usize, 1..4usize).prop_map(|(mm, walks)| Op::Why { mm, walks }),
        1 => place().prop_map(|(mm, page, count)| Op::UnmergeRange { mm, page, count }),
    ]
}

/// The knobs that a history begins with.
fn knobs() -> impl Strategy<Value = Vec<Op>> {
    (
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        prop_oneof![2..6u32, Just(256)],
        threads(),
    )
        .prop_map(|(smart_scan, zero, across, sharing, threads)| {
            vec![
                threads,
                Op::SmartScan(smart_scan),
                Op::UseZeroPages(zero),
                Op::MergeAcrossNodes(across),
                Op::MaxPageSharing(sharing),
            ]
        })
}

/// A history of a few processes.
pub(crate) fn history(len: usize) -> impl Strategy<Value = Vec<Op>> {
    let born = vec(event(), 6).prop_map(|events| {
        let spawn = || Event::Spawn {
            mergeable: [true; AREAS.len()],
        };
        [spawn(), spawn()]
            .into_iter()
            .chain(events)
            .map(Op::Happen)
            .collect::<Vec<_>>()
    });
    (knobs(), born, vec(op(), 1..len)).prop_map(|(knobs, born, ops)| [knobs, born, ops].concat())
}

/// Runs a history. Everything has to hold after each step.
pub(crate) fn run_history(hash: Hash, ops: &[Op]) -> Machine {
    let mut machine = Machine::new(hash);
    for op in ops {
        machine.run(op);
    }
    machine
}
