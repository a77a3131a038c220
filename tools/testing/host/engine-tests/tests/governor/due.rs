// SPDX-License-Identifier: GPL-2.0-only

//! Which ranges a visit looks at, against a model that has them in a list.

use crate::{
    check,
    pause::PRESSURES, //
};

use engine_tests::engine::{
    accessed::REREAD_INTERVAL,
    governor::{
        pause::{
            earlier,
            is_past,
            Found,
            Pressure,
            RangePause,
            Tick,
            TICKS_PER_SEC, //
        },
        watch::Watch, //
    },
    page_state::{
        PageState,
        PageStates,
        Run,
        Tracked,
        View, //
    },
    types::{
        Fingerprint,
        ItemId,
        SlotId,
        RANGE_PAGES, //
    },
};

use kernel::{
    page::PAGE_SIZE,
    prelude::GFP_KERNEL, //
};

use proptest::prelude::*;

use std::{
    collections::BTreeMap,
    ops::Range, //
};

const SLOT: SlotId = SlotId(3);
const RANGE_BYTES: usize = RANGE_PAGES * PAGE_SIZE;

/// Returns whether a range with so many pages is to be looked at: the rule, once more.
pub(crate) fn is_wanted(pause: &RangePause, number: usize, pages: usize, view: &View) -> bool {
    match pause.due(view.pressure, number) {
        None => true,
        Some(due) if is_past(due, view.now) => true,
        Some(_) => view.open && pages < RANGE_PAGES && !pause.is_volatile(view.pressure),
    }
}

/// What a range is like, and how it came about.
#[derive(Clone, Debug)]
struct Spec {
    /// Ranges that are not there before it.
    gap: usize,
    pages: usize,
    /// 0: seen, 1: known, 2: merged.
    class: u8,
    /// Pages that have changed before each look, and the ticks before it.
    looks: Vec<(u16, Tick)>,
}

fn spec() -> impl Strategy<Value = Spec> {
    let gap = prop_oneof![4 => Just(0), 1 => 1..4usize];
    let pages = prop_oneof![2 => Just(RANGE_PAGES), 1 => 1..RANGE_PAGES];
    let changes = prop_oneof![3 => Just(0), 1 => 0..400u16];
    let looks = prop::collection::vec((changes, 1..200 as Tick), 0..20);
    (gap, pages, 0..3u8, looks).prop_map(|(gap, pages, class, looks)| Spec {
        gap,
        pages,
        class,
        looks,
    })
}

/// The states, and a mirror of their pauses by number.
struct Mirror {
    states: PageStates,
    ranges: BTreeMap<usize, (usize, RangePause)>,
    now: Tick,
}

impl Mirror {
    fn new(specs: &[Spec], pressure: Pressure) -> Self {
        let mut this = Self {
            states: PageStates::new(),
            ranges: BTreeMap::new(),
            now: 0,
        };
        let mut number = 100;
        for spec in specs {
            number += spec.gap;
            this.add(number, spec, pressure);
            number += 1;
        }
        let last = specs
            .iter()
            .flat_map(|spec| spec.looks.iter().map(|look| look.1).reduce(|a, b| a + b));
        this.now = last.max().unwrap_or(0);
        this
    }

    fn add(&mut self, number: usize, spec: &Spec, pressure: Pressure) {
        let base = number * RANGE_BYTES;
        let pages = base..base + spec.pages * PAGE_SIZE;
        assert_eq!(self.states.track_all(SLOT, pages, GFP_KERNEL), spec.pages);
        let known =
            |bits| PageState::Tracked(Tracked::NEW.with_fingerprint(Fingerprint::from_bits(bits)));
        for page in 0..spec.pages {
            let state = match spec.class {
                0 => PageState::NEW,
                1 => known(1),
                _ => PageState::Merged(ItemId::new(page as u64)),
            };
            let id = self.states.lookup(SLOT, base + page * PAGE_SIZE).unwrap();
            self.states.set(id, state);
        }
        let pages = spec.pages as u16;
        let found = Found {
            pages,
            merged: if spec.class == 2 { pages } else { 0 },
            fresh: if spec.class == 0 { pages } else { 0 },
        };
        let mut pause = RangePause::NEW;
        let (mut now, mut bits) = (0, 1);
        for &(changes, elapsed) in &spec.looks {
            now += elapsed;
            if spec.class == 1 {
                let id = self.states.lookup(SLOT, base).unwrap();
                for _ in 0..changes {
                    bits += 1;
                    self.states.set(id, known(bits));
                    pause.count_change();
                }
            }
            let view = View {
                now,
                pressure,
                open: false,
                most: 1,
            };
            self.states
                .looked(SLOT, base..base + RANGE_BYTES, &view, &mut Watch::default());
            pause.looked(now, &found, pressure);
        }
        self.ranges.insert(number, (spec.pages, pause));
    }
}

/// Goes through an mm as the scanner does, which stops after each of these pages of a run. Returns
/// what has been looked at.
fn visit(
    states: &mut PageStates,
    view: &View,
    watch: &mut Watch,
    cuts: &[usize],
    mut scan: impl FnMut(&mut PageStates, &Run),
) -> Vec<Range<usize>> {
    let mut cuts = cuts.iter().cycle();
    let (mut at, mut looked, mut steps) = (0, Vec::new(), 0);
    while let Some(run) = states.next_run(SLOT, at, view, watch) {
        steps += 1;
        assert!(steps < 100_000, "a visit without an end");
        assert!(run.within.start >= at, "{run:?} after {at:#x}");
        if run.within.is_empty() {
            assert!(run.within.end > at, "a search that stands still");
            at = run.within.end;
            continue;
        }
        // Nothing is mapped far above.
        let cut = cuts.next().filter(|_| run.within.start < 200 * RANGE_BYTES);
        let most = cut.map_or(usize::MAX, |&pages| pages * PAGE_SIZE);
        let end = run.within.end.min(run.within.start.saturating_add(most));
        let within = run.within.start..end;
        scan(
            states,
            &Run {
                within: within.clone(),
                ..run
            },
        );
        states.looked(SLOT, within.clone(), view, watch);
        at = end;
        looked.push(within);
    }
    looked
}

/// The parts put together where one begins at the end of another, without those that overlap.
fn joined(parts: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut all: Vec<Range<usize>> = Vec::new();
    for part in parts {
        match all.last_mut() {
            Some(last) if last.end == part.start => last.end = part.end,
            last => {
                assert!(
                    last.is_none_or(|last| last.end < part.start),
                    "looked at twice: {part:x?}"
                );
                all.push(part.clone());
            }
        }
    }
    all
}

/// A visit looks at each address of a range that is due, and at no other range; one that is open
/// also at all that lies between ranges. None is looked at twice, wherever a hold ends.
#[test]
fn a_visit_looks_at_what_is_due_and_at_nothing_else() {
    let cuts = prop::collection::vec(prop_oneof![1..700usize, Just(2048)], 1..8);
    let case = (
        prop::collection::vec(spec(), 0..40),
        any::<(bool, bool)>(),
        1..6usize,
        0..600 as Tick,
        cuts,
    );
    check(300, case, |(specs, (open, short), most, elapsed, cuts)| {
        let pressure = PRESSURES[usize::from(short)];
        let mut mirror = Mirror::new(&specs, pressure);
        let view = View {
            now: mirror.now + elapsed,
            pressure,
            open,
            most,
        };
        let wanted = |number: &usize| {
            let (pages, pause) = &mirror.ranges[number];
            is_wanted(pause, *number, *pages, &view)
        };
        // The whole address space without the ranges that are not wanted, or those that are.
        let mut expected = Vec::new();
        let mut from = 0;
        for number in mirror.ranges.keys() {
            let base = number * RANGE_BYTES;
            match (open, wanted(number)) {
                (true, false) => {
                    expected.push(from..base);
                    from = base + RANGE_BYTES;
                }
                (false, true) => expected.push(base..base + RANGE_BYTES),
                _ => {}
            }
        }
        if open {
            expected.push(from..usize::MAX);
        }
        expected.retain(|part| !part.is_empty());
        let mut watch = Watch::default();
        watch.class(view.now, 0);
        watch.begin(view.now, 0, pressure);
        let looked = visit(&mut mirror.states, &view, &mut watch, &cuts, |_, run| {
            let in_run = |&(number, _): &(&usize, &(usize, RangePause))| {
                run.within
                    .contains(&(number * RANGE_BYTES).max(run.within.start))
                    && number * RANGE_BYTES < run.within.end
                    && (number + 1) * RANGE_BYTES > run.within.start
            };
            let ranges: Vec<_> = mirror.ranges.iter().filter(in_run).collect();
            assert!(ranges.len() <= most, "{} ranges in a run", ranges.len());
            for (_, (_, pause)) in ranges {
                assert_eq!(pause.look() % REREAD_INTERVAL as u8, run.look, "{run:?}");
            }
        });
        assert_eq!(joined(&looked), joined(&expected));
        // The next visit is due when the first range is, or a young mm after a second.
        let mut next = view.now + TICKS_PER_SEC;
        for (number, (pages, pause)) in &mut mirror.ranges {
            if is_wanted(pause, *number, *pages, &view) {
                let merged = specs_class(&specs, *number) == 2;
                let fresh = specs_class(&specs, *number) == 0;
                let pages = *pages as u16;
                let found = Found {
                    pages,
                    merged: if merged { pages } else { 0 },
                    fresh: if fresh { pages } else { 0 },
                };
                pause.looked(view.now, &found, pressure);
            }
            next = earlier(next, pause.due(pressure, *number).unwrap());
        }
        watch.end(view.now);
        assert_eq!(watch.due(), next.max(view.now + 1));
        // Nothing is left to do.
        let closed = View {
            open: false,
            ..view
        };
        assert_eq!(
            visit(&mut mirror.states, &closed, &mut watch, &[], |_, _| {}),
            []
        );
    });
}

fn specs_class(specs: &[Spec], number: usize) -> u8 {
    let mut at = 100;
    for spec in specs {
        at += spec.gap;
        if at == number {
            return spec.class;
        }
        at += 1;
    }
    unreachable!()
}

/// New memory in a gap is tracked while it is looked at: all of it is seen, and seen once.
#[test]
fn memory_that_appears_in_a_gap_is_looked_at_once() {
    let cuts = prop::collection::vec(1..1500usize, 1..8);
    check(
        100,
        (prop::collection::vec(spec(), 1..20), cuts),
        |(specs, cuts)| {
            let mut mirror = Mirror::new(&specs, Pressure::None);
            let view = View {
                now: mirror.now + 2000,
                pressure: Pressure::None,
                open: true,
                most: 2,
            };
            let mut watch = Watch::default();
            let looked = visit(
                &mut mirror.states,
                &view,
                &mut watch,
                &cuts,
                |states, run| {
                    // A page at the start of each range that has none.
                    let end = run.within.end.min(200 * RANGE_BYTES);
                    for page in (run.within.start..end).step_by(64 * PAGE_SIZE) {
                        states
                            .track(SLOT, page & !(PAGE_SIZE - 1), GFP_KERNEL)
                            .unwrap();
                    }
                },
            );
            let everything = 0..usize::MAX;
            assert_eq!(joined(&looked), [everything]);
        },
    );
}

/// A search passes some thousand ranges, and goes on.
#[test]
fn a_long_search_goes_on() {
    let mut states = PageStates::new();
    const RANGES: usize = 10_000;
    for number in 0..RANGES {
        states
            .track(SLOT, number * RANGE_BYTES, GFP_KERNEL)
            .unwrap();
    }
    let view = |now| View {
        now,
        pressure: Pressure::None,
        open: false,
        most: 2,
    };
    let mut watch = Watch::default();
    states.looked(SLOT, 0..(RANGES - 1) * RANGE_BYTES, &view(10), &mut watch);
    let mut breaks = Vec::new();
    let mut at = 0;
    let run = loop {
        let run = states.next_run(SLOT, at, &view(11), &mut watch).unwrap();
        if !run.within.is_empty() {
            break run;
        }
        breaks.push(run.within.start / RANGE_BYTES);
        at = run.within.end;
    };
    assert_eq!(breaks, [4096, 8192]);
    assert_eq!(run.within, (RANGES - 1) * RANGE_BYTES..RANGES * RANGE_BYTES);
}
