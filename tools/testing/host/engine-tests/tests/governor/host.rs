// SPDX-License-Identifier: GPL-2.0-only

//! A host on which the governor runs: time, CPU time and memory are simulated, and of memory only
//! how many pages of each range are what. `rksmd`'s loop is as in `rust/service/governor.rs`.

use crate::{
    due::is_wanted,
    list::{
        List,
        Pin, //
    },
};

use engine_tests::engine::{
    accessed::REREAD_INTERVAL,
    governor::{
        pause::{
            is_past,
            tick_at,
            Found,
            Pressure,
            RangePause,
            TICK_NSECS, //
        },
        watch::{
            Class,
            Watch, //
        },
        Governor,
        Limits,
        Memory,
        Visit,
        YOUNG_NSECS, //
    },
    mm_list::{
        MmList,
        Visited, //
    },
    page_state::View,
    types::{
        MmPin,
        Progress,
        RANGE_PAGES, //
    },
};

use kernel::prelude::GFP_KERNEL;

use std::{
    collections::BTreeMap,
    rc::Rc, //
};

pub(crate) const MSEC: i64 = 1_000_000;
pub(crate) const SEC: i64 = 1000 * MSEC;

/// Instructions for a page that is quiet, for one that is hashed, and for one until it is merged.
/// Measured with icount: `steady`, `unique` and `thp copies` of `Documentation/results/
/// instructions.md`, the last with what a first merge adds. A nanosecond has one.
const QUIET: i64 = 380;
const HASHED: i64 = 1_280;
const MERGED: i64 = 9_900;

/// Nanoseconds for an mm of a sweep, a range that is passed, the end of a visit (which flushes
/// TLBs), and a wake-up. Estimates on the high side.
const SWEPT: i64 = 50;
const PASSED: i64 = 100;
const ENDED: i64 = 2_000;
const WOKEN: i64 = 10_000;

/// A hold of the scan lock, and the ranges and pages of a run: those of the service.
const HOLD: i64 = 2 * MSEC;
const RUN_RANGES: usize = 2;

/// What a hold takes at most: a pass begins within its time, and may merge all of its pages.
pub(crate) const SLICE: i64 = HOLD + RANGE_PAGES as i64 * MERGED + MSEC;

const PAGES: u16 = RANGE_PAGES as u16;

/// What becomes of the pages of a range.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// They stay, and equal pages are elsewhere.
    Copies,
    /// They stay, and no other page equals them.
    Unique,
    /// Equal pages are elsewhere, and this part of them is not written to within a second.
    Rewritten(f64),
}

/// A range, by counts.
#[derive(Clone, Debug)]
struct Range {
    kind: Kind,
    pause: RangePause,
    /// Pages of which nothing is known, of unknown contents, hashed once, and without an equal.
    unseen: u16,
    fresh: u16,
    changing: u16,
    unique: u16,
    merged: u16,
    looked: i64,
}

impl Range {
    fn tracked(&self) -> u16 {
        self.fresh + self.changing + self.unique + self.merged
    }

    /// Looks at all pages. Returns what that costs, the merges it makes and those it finds broken.
    fn look(&mut self, now: i64, random: &mut Random) -> (i64, u16, u16) {
        let stay = match self.kind {
            Kind::Rewritten(left) => left.powf((now - self.looked) as f64 / SEC as f64),
            _ => 1.0,
        };
        self.looked = now;
        let mut stays = |pages: u16| random.round(f64::from(pages) * stay).min(pages);
        let [merged, changing, unique, fresh] =
            [self.merged, self.changing, self.unique, self.fresh].map(&mut stays);
        let broken = self.merged - merged;
        let changed = self.changing - changing + self.unique - unique;
        for _ in 0..broken + changed {
            self.pause.count_change();
        }
        // What has not changed since the last look is at rest.
        let at_rest = changing + fresh;
        let hashed = changed + self.fresh - fresh;
        let (mut cost, mut merges) = (0, 0);
        let price = match self.kind {
            Kind::Unique => {
                self.unique = unique + at_rest;
                HASHED
            }
            _ => {
                merges = at_rest;
                self.unique = unique;
                MERGED - QUIET
            }
        };
        cost += i64::from(at_rest) * price + i64::from(hashed + broken) * HASHED;
        cost += i64::from(unique + merged + self.unseen) * QUIET;
        self.merged = merged + merges;
        self.changing = hashed;
        self.fresh = broken + core::mem::take(&mut self.unseen);
        (cost, merges, broken)
    }

    fn found(&self) -> Found {
        Found {
            pages: self.tracked(),
            merged: self.merged,
            fresh: self.fresh,
        }
    }
}

/// A generator of random numbers (splitmix64).
pub(crate) struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (bits >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Rounds so that the mean is right.
    fn round(&mut self, value: f64) -> u16 {
        let rest = self.next() < value.fract();
        value as u16 + u16::from(rest)
    }
}

/// What happens on the host.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// A process starts with so many pages.
    Start(usize, usize, Kind),
    /// It maps more.
    Grow(usize, usize, Kind),
    Exit(usize),
    Limits(Limits),
    Memory(Memory),
}

/// A process: its ranges, and its pin.
struct Process {
    pin: Pin,
    ranges: Vec<Range>,
}

/// How things are at a time.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sample {
    pub(crate) at: i64,
    pub(crate) cpu: i64,
    pub(crate) wakeups: u64,
    pub(crate) merged: i64,
    pub(crate) merges: i64,
    pub(crate) broken: i64,
    /// The largest delay of a look since the last sample.
    pub(crate) late: i64,
    pub(crate) pressure: bool,
}

/// The most by which a look came later than it was due, in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Late {
    pub(crate) old: i64,
    pub(crate) new: i64,
}

pub(crate) struct Host {
    list: Rc<List>,
    governor: Governor,
    processes: BTreeMap<usize, Process>,
    events: BTreeMap<i64, Vec<Event>>,
    random: Random,
    pub(crate) limits: Limits,
    memory: Memory,
    pub(crate) now: i64,
    pub(crate) cpu: i64,
    newcomers: bool,
    /// When it used CPU time, and how much until then.
    busy: Vec<(i64, i64)>,
    /// What came in until each count of the governor, at so many percent, and the largest burst.
    flow: Vec<(i64, f64)>,
    percent: u32,
    burst: i64,
    pub(crate) wakeups: u64,
    pub(crate) merged: i64,
    pub(crate) merges: i64,
    pub(crate) broken: i64,
    pub(crate) full_scans: u64,
    /// CPU time of each class.
    pub(crate) had: [i64; 3],
    pub(crate) late: Late,
    late_since: i64,
    pub(crate) samples: Vec<Sample>,
    every: i64,
}

impl Host {
    pub(crate) fn new(limits: Limits) -> Self {
        let mut governor = Governor::new();
        let now = 1000 * SEC;
        governor.begin(now, 0, limits);
        Self {
            list: Rc::new(List::new()),
            governor,
            processes: BTreeMap::new(),
            events: BTreeMap::new(),
            random: Random(1),
            limits,
            memory: Memory {
                total: 1 << 20,
                available: 1 << 19,
                swapped: 0,
            },
            now,
            cpu: 0,
            newcomers: false,
            busy: Vec::new(),
            flow: vec![(now, 0.0)],
            percent: limits.percent,
            burst: 0,
            wakeups: 0,
            merged: 0,
            merges: 0,
            broken: 0,
            full_scans: 0,
            had: [0; 3],
            late: Late::default(),
            late_since: 0,
            samples: Vec::new(),
            every: SEC / 4,
        }
    }

    /// Takes a sample so often.
    pub(crate) fn sampled(mut self, every: i64) -> Self {
        self.every = every;
        self
    }

    /// Has something happen so many nanoseconds from now on.
    pub(crate) fn after(&mut self, nsecs: i64, event: Event) {
        self.events.entry(self.now + nsecs).or_default().push(event);
    }

    fn work(&mut self, nsecs: i64) {
        self.busy.push((self.now, self.cpu));
        self.now += nsecs;
        self.cpu += nsecs;
        self.busy.push((self.now, self.cpu));
    }

    /// Pages of the kind that all could be merged with others.
    pub(crate) fn copies(&self) -> i64 {
        let ranges = self.processes.values().flat_map(|process| &process.ranges);
        let pages = ranges.map(|range| match range.kind {
            Kind::Copies => i64::from(range.unseen + range.tracked()),
            _ => 0,
        });
        pages.sum()
    }

    /// Merged pages that no one has written to yet.
    pub(crate) fn holding(&self) -> f64 {
        let ranges = self.processes.values().flat_map(|process| &process.ranges);
        let holding = ranges.map(|range| match range.kind {
            Kind::Rewritten(left) => {
                let secs = (self.now - range.looked) as f64 / SEC as f64;
                f64::from(range.merged) * left.powf(secs)
            }
            _ => f64::from(range.merged),
        });
        holding.sum()
    }

    /// Merged pages of one process, none where it does not run yet.
    pub(crate) fn merged_of(&self, key: usize) -> i64 {
        let ranges = self.processes.get(&key).map(|process| &process.ranges);
        let merged = ranges
            .into_iter()
            .flatten()
            .map(|range| i64::from(range.merged));
        merged.sum()
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Start(key, pages, kind) => {
                let pin = Pin::new(key);
                self.list.refill(GFP_KERNEL).expect("memory for slots");
                assert!(self.list.enter(pin.clone()).registered);
                let ranges = Vec::new();
                self.processes.insert(key, Process { pin, ranges });
                self.grow(key, pages, kind);
                self.newcomers = true;
            }
            Event::Grow(key, pages, kind) => self.grow(key, pages, kind),
            Event::Exit(key) => {
                let process = self.processes.remove(&key).expect("it runs");
                let merged = process.ranges.iter().map(|range| i64::from(range.merged));
                self.merged -= merged.sum::<i64>();
                self.list.exit(key);
                self.list.reap(|_, _| true, || false);
            }
            Event::Limits(limits) => self.limits = limits,
            Event::Memory(memory) => self.memory = memory,
        }
    }

    fn grow(&mut self, key: usize, mut pages: usize, kind: Kind) {
        // It may have exited before.
        let Some(process) = self.processes.get_mut(&key) else {
            return;
        };
        let anon = &process.pin.0.anon;
        anon.set(anon.get() + pages);
        while pages > 0 {
            let unseen = pages.min(RANGE_PAGES);
            process.ranges.push(Range {
                kind,
                pause: RangePause::NEW,
                unseen: unseen as u16,
                fresh: 0,
                changing: 0,
                unique: 0,
                merged: 0,
                looked: self.now,
            });
            pages -= unseen;
        }
    }

    /// Lets happen what is due by now.
    fn catch_up(&mut self) {
        while let Some(entry) = self.events.first_entry() {
            if *entry.key() > self.now {
                break;
            }
            for event in entry.remove() {
                self.happen(event);
            }
        }
        while self
            .samples
            .last()
            .is_none_or(|last| last.at + self.every <= self.now)
        {
            let at = self
                .samples
                .last()
                .map_or(self.now, |last| last.at + self.every);
            self.samples.push(Sample {
                at,
                cpu: self.cpu,
                wakeups: self.wakeups,
                merged: self.merged,
                merges: self.merges,
                broken: self.broken,
                late: core::mem::take(&mut self.late_since),
                pressure: self.governor.pressure() != Pressure::None,
            });
        }
    }

    /// Lets so much time pass.
    pub(crate) fn run(&mut self, nsecs: i64) {
        let until = self.now + nsecs;
        while self.now < until {
            self.catch_up();
            let Some(at) = self.hold() else {
                continue;
            };
            assert!(at > self.now, "rksmd does not sleep, at {}", self.now);
            self.sleep(at, until);
        }
        self.catch_up();
    }

    /// `sleep_governed`: until a time, or a newcomer that would wait for longer than young ones.
    fn sleep(&mut self, at: i64, until: i64) {
        loop {
            let end = at.min(until);
            let event = self.events.first_key_value().map(|(&event, _)| event);
            let Some(event) = event.filter(|&event| event < end) else {
                self.now = end;
                if end == at {
                    self.wakeups += 1;
                    self.work(WOKEN);
                }
                return;
            };
            self.now = self.now.max(event);
            self.catch_up();
            if self.newcomers && at - self.now > YOUNG_NSECS {
                self.wakeups += 1;
                self.work(WOKEN);
                return;
            }
        }
    }

    /// `scan_governed`: returns until when to sleep, `None` at the end of a hold.
    fn hold(&mut self) -> Option<i64> {
        let begun = self.now;
        loop {
            self.catch_up();
            self.count();
            if core::mem::take(&mut self.newcomers) {
                self.governor.newcomer(self.now);
            }
            if self.governor.sweep_is_due(self.now) {
                self.sweep();
            }
            let Some(visit) = self.governor.pick() else {
                return Some(self.governor.wake_at(self.now));
            };
            self.visit(visit, begun);
            if self.now - begun >= HOLD {
                return None;
            }
        }
    }

    fn count(&mut self) {
        let &(then, flow) = self.flow.last().expect("the beginning");
        let came = (self.now - then) as f64 * f64::from(self.percent) / 100.0;
        self.flow.push((self.now, flow + came));
        let limits = self.limits;
        self.governor.count(self.now, self.cpu as u64, limits);
        self.percent = match self.governor.pressure() {
            Pressure::None => limits.percent,
            Pressure::Some => limits.pressure_percent.max(limits.percent),
        };
        let burst = i64::from(limits.burst_msecs) * MSEC;
        let burst = burst * i64::from(self.percent) / i64::from(limits.percent);
        self.burst = self.burst.max(burst);
    }

    fn sweep(&mut self) {
        let now = self.now;
        if self.governor.beat_is_due(now) {
            self.governor.see_memory(now, &self.memory);
        }
        self.governor.begin_sweep();
        let (governor, mut seen) = (&mut self.governor, 0);
        self.list.for_all_slots(|registry, from, count| {
            registry.watch_in(from, count, tick_at(now), |slot, mm, watch| {
                seen += 1;
                governor.consider(now, slot, watch, mm.0.anon.get());
            })
        });
        self.full_scans += u64::from(self.governor.end_sweep(now));
        self.work(1_000 + seen * SWEPT);
    }

    fn visit(&mut self, mut visit: Visit, begun: i64) {
        let (list, before) = (self.list.clone(), self.cpu);
        let mut unfinished = false;
        list.visit_slot(visit.slot, |claim, watch| {
            let progress = self.look_at_runs(claim.mm().key(), watch, &mut visit, begun);
            unfinished = matches!(progress, Progress::At(_));
            Visited {
                progress,
                tracked: true,
            }
        });
        self.had[visit.class as usize] += self.cpu - before;
        if unfinished {
            self.governor.put_back(visit);
        } else if self.cpu == before {
            // The mm has left, or nothing was due.
            self.work(PASSED);
        }
    }

    fn look_at_runs(
        &mut self,
        key: usize,
        watch: &mut Watch,
        visit: &mut Visit,
        begun: i64,
    ) -> Progress {
        let pressure = self.governor.pressure();
        let process = self.processes.get_mut(&key).expect("it runs");
        let anon = process.pin.0.anon.get() as u32;
        let mut ranges = core::mem::take(&mut process.ranges);
        let (at, open) = watch.begin(tick_at(self.now), anon, pressure);
        let (mut at, mut progress) = (at, Progress::Done);
        let mut passed = 0;
        // Addresses are numbers of ranges here.
        loop {
            let view = View {
                now: tick_at(self.now),
                pressure,
                open,
                most: RUN_RANGES,
            };
            let wanted = |number: usize, range: &Range| match range.tracked() {
                0 => open,
                pages => is_wanted(
                    &range.pause,
                    number,
                    usize::from(pages.max(PAGES - range.unseen)),
                    &view,
                ),
            };
            let Some(range) = ranges.get(at) else {
                self.work(ENDED + passed * PASSED);
                watch.end(tick_at(self.now));
                break;
            };
            if !wanted(at, range) {
                let due = range.pause.due(pressure, at);
                if let (Some(seen), Some(due)) = (range.pause.seen(), due) {
                    watch.pass(1, seen, due);
                }
                (at, passed) = (at + 1, passed + 1);
                continue;
            }
            let look = range.pause.look() % REREAD_INTERVAL as u8;
            let mut budget = 1024u32;
            for _ in 0..RUN_RANGES {
                let Some(range) = ranges.get_mut(at) else {
                    break;
                };
                let same = range.pause.look() % REREAD_INTERVAL as u8 == look;
                if !same || !wanted(at, range) {
                    break;
                }
                let due = range.pause.due(pressure, at);
                let (cost, merges, broken) = range.look(self.now, &mut self.random);
                self.merges += i64::from(merges);
                self.broken += i64::from(broken);
                self.merged += i64::from(merges) - i64::from(broken);
                budget -= u32::from(range.tracked());
                if let Some(due) = due.filter(|&due| is_past(due, view.now)) {
                    let late = i64::from(view.now.wrapping_sub(due)) * TICK_NSECS;
                    let most = match visit.class {
                        Class::Old => &mut self.late.old,
                        _ => &mut self.late.new,
                    };
                    *most = (*most).max(late);
                    self.late_since = self.late_since.max(late);
                }
                let found = range.found();
                range.pause.looked(view.now, &found, pressure);
                if let Some(due) = range.pause.due(pressure, at) {
                    watch.pass(1, view.now, due);
                }
                at += 1;
                self.work(cost);
                if self.now - begun >= HOLD {
                    break;
                }
            }
            watch.move_to(at, false);
            visit.pages_left = visit.pages_left.saturating_sub(1024 - budget);
            if visit.pages_left == 0 {
                watch.postpone(view.now, 0);
            }
            if self.now - begun >= HOLD || visit.pages_left == 0 {
                self.work(passed * PASSED);
                progress = Progress::At(at);
                break;
            }
        }
        if let Some(process) = self.processes.get_mut(&key) {
            process.ranges = ranges;
        }
        progress
    }

    /// Asserts that in every window no more was used than the burst, what came in meanwhile, and
    /// one slice. Returns the most that was used beyond what came in.
    pub(crate) fn assert_budget(&self, slack: i64) -> i64 {
        let (mut flow, mut least, mut most) = (self.flow.iter().peekable(), f64::MAX, 0.0f64);
        let mut last = (self.flow[0].0, 0.0);
        for &(at, cpu) in &self.busy {
            while let Some(&next) = flow.next_if(|next| next.0 <= at) {
                last = next;
            }
            let came = match flow.peek() {
                Some(&&(then, came)) if then > last.0 => {
                    let part = (at - last.0) as f64 / (then - last.0) as f64;
                    last.1 + (came - last.1) * part
                }
                _ => last.1,
            };
            let beyond = cpu as f64 - came;
            least = least.min(beyond);
            most = most.max(beyond - least);
        }
        let (most, allowed) = (most as i64, self.burst + SLICE + slack);
        assert!(
            most <= allowed,
            "{most} ns in a window, {allowed} are allowed"
        );
        most
    }
}
