// SPDX-License-Identifier: GPL-2.0-only

//! What `rksmd` does with `governor=auto`, see [`crate::engine::governor`].

use crate::{
    engine::{
        governor::{
            nap::{
                Nap,
                AWAKE, //
            },
            pause::tick_at,
            watch::{
                Class,
                Watch, //
            },
            Memory,
            Visit,
            YOUNG_NSECS, //
        },
        mm_list::{
            MmList,
            Step,
            Visited, //
        },
        pace::Hold,
        page_state::{
            Run,
            View, //
        },
        policy::Policy,
        registry::Claim,
        scan::{
            Allowance,
            ScanTarget, //
        },
        sysfs::knobs::GovernorMode,
        types::{
            Progress,
            Refusal, //
        }, //
    },
    kernel_ext::{
        kthread::Current,
        memory,
        mm::PinnedMm,
        race_window, //
    },
    service::{
        scanner::Next,
        sweep::Due,
        Ksm,
        ScanState,
        SLICE, //
    }, //
};
use kernel::{
    sync::atomic::{
        Full,
        Relaxed, //
    },
    time::NSEC_PER_SEC, //
};

/// Least nanoseconds from one drain of the LRU caches to the next: it wakes every CPU.
const DRAIN_NSECS: i64 = NSEC_PER_SEC;

/// The same for memory that is not new: what has been written to again is in them, too.
const OLD_DRAIN_NSECS: i64 = 60 * NSEC_PER_SEC;

/// Stable nodes that are checked for a page that is gone, once a second.
const PRUNE: usize = 1024;

/// Ranges of a run for each partition: as many pages as a visit of [`SLICE`] has.
const RUN_RANGES: usize = 2;

impl Nap for Ksm {
    fn set_newcomers(&self) {
        self.newcomers.xchg(true, Full);
    }

    fn newcomers(&self) -> bool {
        self.newcomers.load(Relaxed)
    }

    fn asleep_until(&self) -> i64 {
        self.asleep_until.load(Relaxed)
    }

    fn set_asleep_until(&self, until: i64) {
        self.asleep_until.store(until, Relaxed);
    }

    fn now(&self) -> i64 {
        Self::now(self)
    }

    fn wake(&self) {
        self.iter_wait.wake_up_interruptible();
    }
}

impl Ksm {
    /// Whether the governor paces the scanner.
    pub(super) fn is_governed(&self) -> bool {
        self.knobs().governor == GovernorMode::Auto
    }

    /// Has `rksmd` look at a new mm soon.
    ///
    /// # Context
    ///
    /// Any. Wakes `rksmd` only if it would sleep for long: there may be many new mms.
    pub(super) fn announce_newcomer(&self) {
        Nap::announce(self);
    }

    /// Wakes `rksmd` from its sleep under the governor, if it is in one.
    pub(super) fn wake_governed(&self) {
        Nap::end_sleep(self);
    }

    /// Visits mms as the governor says, until the hold is over or there is nothing to do now.
    pub(super) fn scan_governed(
        &self,
        state: &mut ScanState,
        current: &Current,
        hold: Hold,
    ) -> Next {
        let limits = self.knobs().limits;
        let cpu_time = |state: &ScanState| current.cpu_time() + state.pool.cpu_time();
        if !core::mem::replace(&mut state.governed, true) {
            // What was left of a batch, or of a full scan, is not continued.
            state.batch_left = 0;
            self.locked(|registry| registry.abandon_scan());
            state.governor.begin(self.now(), cpu_time(state), limits);
            state.pinned_at = state.engine.metadata.refusals.get(Refusal::Pinned);
        }
        self.resize_worker_pool(state, current);
        loop {
            let (now, cpu) = (self.now(), cpu_time(state));
            state.governor.count(now, cpu, limits);
            if self.newcomers.load(Relaxed) {
                self.newcomers.store(false, Relaxed);
                state.governor.newcomer(now);
            }
            if state.governor.sweep_is_due(now) {
                self.sweep_mms(state, now);
            }
            let Some(visit) = state.governor.pick() else {
                let until = state.governor.wake_at(now);
                return Next::Sleep(until, state.governor.is_spent());
            };
            self.visit_governed(state, current, visit, hold);
            if self.needs_drain(state, visit.class) {
                return Next::Drain;
            }
            if self.is_over(hold) || current.freezing() || current.should_stop() {
                return Next::Batch;
            }
        }
    }

    /// Sleeps until a time, as the governor has said, or until `due` comes before. While CPU time
    /// is `spent` no newcomer ends the sleep: there may be so many that waking up alone would take
    /// what comes in. Returns whether it has slept.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(super) fn sleep_governed(
        &self,
        until: i64,
        spent: bool,
        due: Due,
        current: &Current,
    ) -> bool {
        let announced = match spent {
            true => until.min(self.now() + YOUNG_NSECS),
            false => until,
        };
        self.asleep_until.store(announced, Relaxed);
        let awake = || current.should_stop() || self.sweep_due.load(Relaxed) || Nap::is_over(self);
        let jiffies = due.jiffies(self.now()).unwrap_or(0);
        // The freezer needs a wait, and zero jiffies are none.
        let jiffies = jiffies.max(current.freezing().into());
        // The result does not matter: the loop looks at everything again.
        let _ = self.iter_wait.wait_freezable_timeout(jiffies, awake);
        self.asleep_until.store(AWAKE, Relaxed);
        jiffies > 0
    }

    /// Goes through all mms for those that are due.
    fn sweep_mms(&self, state: &mut ScanState, now: i64) {
        let governor = &mut state.governor;
        if governor.beat_is_due(now) {
            governor.see_memory(
                now,
                &Memory {
                    total: memory::total_pages(),
                    available: memory::available_pages(),
                    swapped: memory::swapped_pages(),
                },
            );
            state
                .engine
                .metadata
                .prune(PRUNE, self.knobs().max_page_sharing);
        }
        governor.begin_sweep();
        let tick = tick_at(now);
        self.for_all_slots(|registry, from, count| {
            registry.watch_in(from, count, tick, |slot, mm, watch| {
                governor.consider(now, slot, watch, mm.anon_pages());
            })
        });
        if governor.end_sweep(now) {
            let counters = &state.engine.metadata.counters;
            let (full_scans, tracked) = (counters.full_scans, counters.tracked as usize);
            self.trace.stop_scan(full_scans, tracked);
            state.engine.end_full_scan();
            self.check(state);
            self.publish(state);
            self.trace.start_scan(full_scans + 1, tracked);
        }
    }

    /// Visits one mm, until the hold is over or others get their turn.
    fn visit_governed(
        &self,
        state: &mut ScanState,
        current: &Current,
        mut visit: Visit,
        hold: Hold,
    ) {
        let policy = Policy {
            // The pauses of ranges take its place.
            smart_scan: false,
            ..self.policy()
        };
        let mut unfinished = false;
        let step = self.visit_slot(visit.slot, |claim, watch| {
            let mut progress = Progress::Done;
            if claim.is_passed_over() {
                watch.pass_over(tick_at(self.now()));
            } else {
                progress =
                    self.look_at_runs(state, current, &policy, claim, watch, &mut visit, hold);
                unfinished = matches!(progress, Progress::At(_));
            }
            race_window::sleep();
            Visited {
                progress,
                tracked: state.engine.metadata.tracks(claim.id()),
            }
        });
        if step == (Step::Visited { reap: true }) {
            self.housekeeping_due.store(true, Relaxed);
        }
        if unfinished {
            state.governor.put_back(visit);
        }
    }

    /// Looks at the ranges of an mm that are due, and says how far that has come.
    #[expect(clippy::too_many_arguments, reason = "each is another thing")]
    fn look_at_runs(
        &self,
        state: &mut ScanState,
        current: &Current,
        policy: &Policy,
        claim: &Claim<PinnedMm>,
        watch: &mut Watch,
        visit: &mut Visit,
        hold: Hold,
    ) -> Progress {
        let stopping = || current.freezing() || current.should_stop() || self.is_over(hold);
        let pressure = state.governor.pressure();
        let anon = u32::try_from(claim.mm().anon_pages()).unwrap_or(u32::MAX);
        let (mut at, open) = watch.begin(tick_at(self.now()), anon, pressure);
        let partitions = state.buffers.partitions();
        loop {
            let view = View {
                now: tick_at(self.now()),
                pressure,
                open,
                most: RUN_RANGES * partitions,
            };
            let metadata = &state.engine.metadata;
            let Some(Run { within, look }) = metadata.next_run(claim.id(), at, &view, watch) else {
                if watch.end(view.now) {
                    state.engine.flush_tlb(claim.mm());
                }
                return Progress::Done;
            };
            if !within.is_empty() {
                let budget = state.visit_pages(SLICE * partitions as u32);
                let begun = self.now();
                let mut allowance = Allowance {
                    budget,
                    pause: stopping,
                };
                let target = ScanTarget {
                    slot: claim.id(),
                    mm: claim.mm(),
                    within: within.clone(),
                    look: Some(look),
                };
                let progress = state.engine.scan_mm(
                    policy,
                    self,
                    &target,
                    &state.pool,
                    &mut state.buffers,
                    &mut allowance,
                );
                let (reached, busy) = match progress {
                    Progress::Done => (within.end, false),
                    Progress::At(next) => (next, false),
                    Progress::Busy(next) => (next, true),
                    Progress::Exiting => return Progress::Exiting,
                };
                let metadata = &mut state.engine.metadata;
                metadata.looked(claim.id(), within.start..reached, &view, watch);
                at = reached;
                watch.move_to(at, state.engine.take_cleared());
                let used = budget - allowance.budget;
                state.pace.visited(used, self.now() - begun);
                visit.pages_left = visit.pages_left.saturating_sub(used);
                if busy {
                    watch.postpone(view.now, 1);
                    return Progress::Busy(at);
                }
            } else {
                at = within.end;
                watch.move_to(at, false);
            }
            if visit.pages_left == 0 {
                // Those that were due before come first.
                watch.postpone(view.now, 0);
            }
            if stopping() || visit.pages_left == 0 {
                return Progress::At(at);
            }
        }
    }

    /// Whether the LRU caches are to be drained: pages in them seem pinned, and new memory is there
    /// for a while.
    fn needs_drain(&self, state: &mut ScanState, class: Class) -> bool {
        let pause = match class {
            Class::Old => OLD_DRAIN_NSECS,
            _ => DRAIN_NSECS,
        };
        let pinned = state.engine.metadata.refusals.get(Refusal::Pinned);
        let now = self.now();
        if pinned == state.pinned_at || now - state.drained_at < pause {
            return false;
        }
        (state.pinned_at, state.drained_at) = (pinned, now);
        true
    }
}
