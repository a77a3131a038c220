// SPDX-License-Identifier: GPL-2.0-only

//! The thread `rksmd`: housekeeping, batches, full scans, and the search for stale stable nodes.

use crate::{
    engine::{
        mm_list::{
            MmList,
            Step,
            Visited, //
        },
        pace::Hold,
        policy::Policy,
        scan::{
            Allowance,
            ScanTarget, //
        },
        sysfs::knobs::{
            AdvisorMode,
            RunState, //
        },
        types::Progress, //
    },
    kernel_ext::{
        folio,
        gfp::GFP_METADATA,
        kthread::Current,
        race_window, //
    },
    service::{
        pass_buffers,
        sweep::{
            Due,
            Sweeper, //
        },
        Ksm,
        ScanState, //
    }, //
};
use kernel::{
    prelude::*,
    sync::atomic::Relaxed,
    time::{
        delay::fsleep,
        msecs_to_jiffies,
        Delta,
        Msecs,
        NSEC_PER_MSEC, //
    }, //
};

/// How often a visit is tried again, one after the other, while the process holds its mmap lock.
/// Then its turn comes with the next full scan.
const BUSY_TRIES: u32 = 50;

/// How often that is done in one full scan, whatever the number of such processes.
const BUSY_TRIES_PER_SCAN: u32 = 500;

/// Microseconds between two tries.
pub(super) const BUSY_USECS: i64 = 200;

/// Fewest stable nodes that are checked for a page that is gone after each batch.
const PRUNE_MIN: usize = 32;

/// Most of them.
const PRUNE_MAX: usize = 4096;

/// Milliseconds between two attempts at what does not depend on `run` and is not done yet: stale
/// nodes while the scanner is stopped, memory for slots that could not be allocated.
const IDLE_MSECS: Msecs = 500;

/// The pause after a batch.
#[derive(Clone, Copy)]
pub(super) struct Pause {
    /// `sleep_millisecs` when it began.
    msecs: Msecs,
    /// When it ends, ns since the load.
    until: i64,
}

impl Pause {
    /// Whether the next batch may begin: the time is over, or `sleep_millisecs` is no longer what
    /// it was.
    fn is_over(self, now: i64, msecs: Msecs) -> bool {
        self.msecs != msecs || self.until <= now
    }

    /// Milliseconds that are left of it, rounded up.
    fn left(self, now: i64) -> Msecs {
        let ns = self.until.saturating_sub(now).max(0);
        Msecs::try_from((ns + NSEC_PER_MSEC - 1) / NSEC_PER_MSEC).unwrap_or(Msecs::MAX)
    }
}

/// What `rksmd` does after a hold of the scan lock.
pub(super) enum Next {
    /// It takes the lock again: the batch is not over.
    Batch,
    /// It drains the LRU caches for a new full scan, and takes the lock again.
    Drain,
    /// It waits for a process that holds its mmap lock, and takes the lock again.
    Retry,
    /// It waits for the next batch.
    Pause(Pause),
    /// It sleeps until this time, ns since the load, as the governor says, and whether that is for
    /// want of CPU time.
    Sleep(i64, bool),
    /// It waits for `run` to be 1 and for mms to scan.
    Idle,
}

impl Ksm {
    /// The body of `rksmd`.
    pub(crate) fn scan_thread(&self, current: &Current, mut sweeper: Sweeper) {
        let mut pause: Option<Pause> = None;
        let (mut drained, mut slept) = (false, false);
        while !current.should_stop() {
            let due = self.apply_rules(&mut sweeper);
            let (next, settled) = self.hold_scan_state(|state, hold| {
                state.wakeups += u64::from(core::mem::take(&mut slept));
                let settled = self.housekeeping(state, hold);
                // A wake-up for housekeeping buys no batch: rksmd waits for what is left of the
                // pause. A scanner that was stopped begins with a batch.
                pause = pause.filter(|pause| {
                    self.ksmd_should_run()
                        && !pause.is_over(self.now(), self.knobs().sleep_millisecs)
                });
                let next = match pause {
                    Some(rest) if !self.is_governed() => Next::Pause(rest),
                    _ => self.scan_batch(state, current, hold, &mut drained),
                };
                // Once a hold: a sleep costs far more, and without one a hold takes milliseconds.
                state.cpu_time = current.cpu_time() + state.pool.cpu_time();
                (next, settled && state.engine.metadata.nodes() == 0)
            });
            let woken = || {
                current.should_stop()
                    || self.housekeeping_due.load(Relaxed)
                    || self.sweep_due.load(Relaxed)
            };
            pause = None;
            match next {
                Next::Batch => {}
                Next::Drain => {
                    // Not under the lock: it waits for every CPU.
                    folio::lru_add_drain_all(self.symbols);
                    drained = true;
                }
                Next::Retry => {
                    fsleep(Delta::from_micros(BUSY_USECS));
                    slept = true;
                }
                Next::Pause(rest) => {
                    let left = msecs_to_jiffies(rest.left(self.now()));
                    let most = due.jiffies(self.now()).unwrap_or(left).min(left);
                    // The freezer needs a wait, and zero jiffies are none.
                    let jiffies = most.max(current.freezing().into());
                    let awake = || {
                        woken() || self.is_governed() || self.knobs().sleep_millisecs != rest.msecs
                    };
                    slept = jiffies > 0;
                    let waited = self.iter_wait.wait_freezable_timeout(jiffies, awake);
                    // Otherwise all jiffies have passed. The clock may differ from them by a tick.
                    pause = (waited != Ok(false) || most < left).then_some(rest);
                }
                Next::Sleep(until, spent) => {
                    let due = due.min(Due::At(until));
                    slept = self.sleep_governed(until, spent, due, current);
                }
                Next::Idle => {
                    let awake = || woken() || self.ksmd_should_run();
                    let retry = (!settled).then(|| msecs_to_jiffies(IDLE_MSECS));
                    let timeout = [retry, due.jiffies(self.now())].into_iter().flatten().min();
                    slept = timeout != Some(0);
                    // The result of a wait does not matter: the loop looks at everything again.
                    let _ = match timeout {
                        None => self.thread_wait.wait_freezable(awake).map(|()| true),
                        Some(jiffies) => {
                            // The freezer needs a wait, and zero jiffies are none.
                            let jiffies = jiffies.max(current.freezing().into());
                            self.thread_wait.wait_freezable_timeout(jiffies, awake)
                        }
                    };
                }
            }
        }
    }

    /// Scans as much of a batch as the hold allows, if there is something to scan.
    fn scan_batch(
        &self,
        state: &mut ScanState,
        current: &Current,
        hold: Hold,
        drained: &mut bool,
    ) -> Next {
        if self.is_governed() && self.ksmd_should_run() {
            return self.scan_governed(state, current, hold);
        }
        state.governed &= self.is_governed();
        if state.batch_left == 0 {
            self.prune(state, hold);
        }
        if self.ksmd_should_run() {
            let pages = self.knobs().pages_to_scan;
            if state.batch_left == 0 {
                self.resize_worker_pool(state, current);
                state.batch_left = pages;
            }
            state.batch_left = state.batch_left.min(pages);
            if let Some(next) = self.do_scan(state, current, hold, drained) {
                return next;
            }
        }
        state.batch_left = 0;
        // Read under the mutex: a user that stops the scanner, changes the pause and starts it
        // again does not wait for the new pause.
        if !self.ksmd_should_run() {
            return Next::Idle;
        }
        let msecs = self.knobs().sleep_millisecs;
        Next::Pause(Pause {
            msecs,
            until: self.now() + i64::from(msecs) * NSEC_PER_MSEC,
        })
    }

    /// Does what must not wait for `run`: frees the slots of mms that have left, allocates slots
    /// for new ones, registers mms that found no slot. Returns whether all of it is done.
    fn housekeeping(&self, state: &mut ScanState, hold: Hold) -> bool {
        self.housekeeping_due.store(false, Relaxed);
        let metadata = &mut state.engine.metadata;
        let pause = || self.is_over(hold);
        if !self.reap(|slot, mm| metadata.forget_some(slot, mm, pause), pause) {
            self.housekeeping_due.store(true, Relaxed);
            return false;
        }
        if self.refill(GFP_METADATA).is_err() {
            return false;
        }
        if !self.locked(|registry| registry.take_missed()) {
            return true;
        }
        let registered = self.register_all();
        if registered.is_err() {
            self.locked(|registry| registry.mark_missed());
        }
        registered.is_ok()
    }

    /// Resizes the worker pool to `scan_threads`. Without memory for all of them the scan goes on
    /// with fewer.
    ///
    /// Does nothing while tasks are being frozen: a frozen thread does not stop, and waiting for it
    /// would keep `rksmd` from being frozen.
    pub(super) fn resize_worker_pool(&self, state: &mut ScanState, current: &Current) {
        let threads = self.knobs().scan_threads;
        if threads == state.threads || current.freezing() {
            return;
        }
        state.threads = threads;
        let resized = pass_buffers(threads).and_then(|buffers| {
            state.buffers = buffers;
            state.pool.resize(self.symbols, threads as usize)
        });
        if let Err(error) = resized {
            pr_warn!("scan_threads={threads} cannot be had ({error:?}); fewer scan until it is written again\n");
        }
    }

    /// Scans what is left of the batch, or until the full scan ends. Returns `None` at the end of
    /// the batch, and what is to be done where the hold is over before it.
    fn do_scan(
        &self,
        state: &mut ScanState,
        current: &Current,
        hold: Hold,
        drained: &mut bool,
    ) -> Option<Next> {
        let policy = self.policy();
        let stopping = || current.freezing() || current.should_stop();
        while state.batch_left > 0 && !stopping() {
            if !self.locked(|registry| registry.scanning()) {
                if !core::mem::take(drained) {
                    return Some(Next::Drain);
                }
                if !self.begin_full_scan(state) {
                    return None;
                }
            }
            let slice = state.visit_pages(state.batch_left);
            let ScanState {
                engine,
                pool,
                buffers,
                batch_left,
                busy_left,
                busy_tries,
                pace,
                ..
            } = state;
            let (begun, mut busy) = (self.now(), false);
            let mut allowance = Allowance {
                budget: slice,
                pause: || stopping() || self.is_over(hold),
            };
            let step = self.visit(|claim| {
                if claim.is_passed_over() {
                    return Visited {
                        progress: Progress::Done,
                        tracked: engine.metadata.tracks(claim.id()),
                    };
                }
                let target = ScanTarget {
                    slot: claim.id(),
                    mm: claim.mm(),
                    within: claim.address()..usize::MAX,
                    look: None,
                };
                let progress =
                    match engine.scan_mm(&policy, self, &target, pool, buffers, &mut allowance) {
                        Progress::Busy(at) if *busy_left > 0 && *busy_tries < BUSY_TRIES => {
                            *busy_left -= 1;
                            *busy_tries += 1;
                            busy = true;
                            Progress::At(at)
                        }
                        Progress::Busy(_) => {
                            engine.leave(target.mm);
                            Progress::Done
                        }
                        progress => progress,
                    };
                if !busy {
                    *busy_tries = 0;
                }
                race_window::sleep();
                Visited {
                    progress,
                    tracked: engine.metadata.tracks(target.slot),
                }
            });
            let used = slice - allowance.budget;
            *batch_left -= used;
            pace.visited(used, self.now() - begun);
            match step {
                Step::Visited { reap: true } => self.housekeeping_due.store(true, Relaxed),
                Step::Visited { reap: false } => {}
                Step::End => {
                    self.end_full_scan(state, current);
                    return None;
                }
                Step::Idle => return None,
            }
            if busy {
                return Some(Next::Retry);
            }
            if self.is_over(hold) {
                return Some(Next::Batch);
            }
        }
        None
    }

    /// Returns the knobs that decide about a page.
    pub(super) fn policy(&self) -> Policy {
        let knobs = self.knobs();
        Policy {
            smart_scan: knobs.smart_scan,
            use_zero_pages: knobs.use_zero_pages,
            merge_across_nodes: knobs.merge_across_nodes,
            max_page_sharing: knobs.max_page_sharing,
            vouched: false,
        }
    }

    /// Begins a full scan. False if there is no mm to scan.
    fn begin_full_scan(&self, state: &mut ScanState) -> bool {
        if self.locked(|registry| registry.is_empty()) {
            return false;
        }
        state.busy_left = BUSY_TRIES_PER_SCAN;
        let now = self.now();
        self.published.lock().knobs.scan_started(now);
        let counters = &state.engine.metadata.counters;
        self.trace
            .start_scan(counters.full_scans, counters.tracked as usize);
        self.locked(|registry| registry.begin())
    }

    fn end_full_scan(&self, state: &mut ScanState, current: &Current) {
        if self.knobs().advisor_mode != AdvisorMode::None {
            let (now, cpu) = (self.now(), current.cpu_time() + state.pool.cpu_time());
            let advice = self.published.lock().knobs.scan_ended(now, cpu);
            if let Some(advice) = advice {
                self.trace.advisor(
                    advice.scan_time as i64,
                    advice.pages_to_scan as usize,
                    advice.cpu_percent,
                );
            }
        }
        let counters = &state.engine.metadata.counters;
        self.trace
            .stop_scan(counters.full_scans, counters.tracked as usize);
        state.engine.end_full_scan();
        self.check(state);
        // At once, for those that wait for the end of a full scan: nothing that is written from now
        // on has been seen by it.
        self.publish(state);
    }

    /// Warns if an invariant does not hold, where the module was told to check them.
    pub(super) fn check(&self, state: &mut ScanState) {
        if !self.check {
            return;
        }
        let (broken, live, left) =
            self.locked(|registry| (registry.check(), registry.len(), registry.nr_left()));
        if let Err(what) = broken.and_then(|()| state.engine.metadata.check()) {
            pr_err!("invariant broken: {what} ({live} mms, {left} have left)\n");
            kernel::warn_on!(true);
        }
    }

    /// Drops stable nodes whose page is gone: checks a bounded number a batch, and all of them no
    /// more often than once in `stable_node_chains_prune_millisecs`.
    fn prune(&self, state: &mut ScanState, hold: Hold) {
        let (now, knobs) = (self.now(), self.knobs());
        // A scanner that is stopped has time to free what belongs to pages that are gone.
        let idle = knobs.run != RunState::Merge;
        if now < state.prune_at && !idle {
            return;
        }
        let count = if idle {
            PRUNE_MAX
        } else {
            knobs.pages_to_scan as usize / 32
        };
        for _ in 0..count.clamp(PRUNE_MIN, PRUNE_MAX) / PRUNE_MIN {
            if state
                .engine
                .metadata
                .prune(PRUNE_MIN, knobs.max_page_sharing)
            {
                if !idle {
                    let pause = i64::from(knobs.stable_node_chains_prune_millisecs) * 1_000_000;
                    state.prune_at = now.saturating_add(pause);
                }
                return;
            }
            if self.is_over(hold) {
                return;
            }
        }
    }
}
