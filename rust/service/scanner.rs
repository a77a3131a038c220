// SPDX-License-Identifier: GPL-2.0-only

//! The thread `rksmd`: housekeeping, batches, full scans, and the search for stale stable nodes.

use crate::{
    engine::{
        mm_list::{
            MmList,
            Step,
            Visited, //
        },
        policy::Policy,
        scan::ScanTarget,
        sysfs::knobs::{
            AdvisorMode,
            RunState, //
        }, //
    },
    kernel_ext::{
        folio,
        kthread::Current,
        race_window, //
    },
    service::{
        pass_buffers,
        Ksm,
        ScanState, //
    }, //
};
use kernel::{
    prelude::*,
    sync::atomic::Relaxed,
    time::{
        msecs_to_jiffies,
        Msecs,
        NSEC_PER_MSEC, //
    }, //
};

/// Most pages of each partition that are scanned before the counters are published again: a large
/// `pages_to_scan` takes long.
const SLICE: u32 = 1024;

/// Fewest stable nodes that are checked for a page that is gone after each batch.
const PRUNE_MIN: usize = 32;

/// Most of them.
const PRUNE_MAX: usize = 4096;

/// Milliseconds between two attempts at what does not depend on `run` and is not done yet: stale
/// nodes while the scanner is stopped, memory for slots that could not be allocated.
const IDLE_MSECS: Msecs = 500;

/// The pause after a batch.
#[derive(Clone, Copy)]
struct Pause {
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

impl Ksm {
    /// The body of `rksmd`.
    pub(crate) fn scan_thread(&self, current: &Current) {
        let mut pause: Option<Pause> = None;
        while !current.should_stop() {
            let settled = self.with_scan_state(|state| {
                let settled = self.housekeeping(state);
                // A wake-up for housekeeping buys no batch: rksmd waits for what is left of the
                // pause. A scanner that was stopped begins with a batch.
                pause = pause.filter(|pause| {
                    self.ksmd_should_run()
                        && !pause.is_over(self.now(), self.knobs().sleep_millisecs)
                });
                if pause.is_none() {
                    self.prune(state);
                    pause = self.scan_batch(state, current);
                }
                settled && state.engine.metadata.nodes() == 0
            });
            let woken = || current.should_stop() || self.housekeeping_due.load(Relaxed);
            if let Some(rest) = pause {
                let left = msecs_to_jiffies(rest.left(self.now()));
                // The freezer needs a wait, and zero jiffies are none.
                let jiffies = left.max(current.freezing().into());
                let awake = || woken() || self.knobs().sleep_millisecs != rest.msecs;
                if let Ok(false) = self.iter_wait.wait_freezable_timeout(jiffies, awake) {
                    // All jiffies have passed. The clock may differ from them by a tick.
                    pause = None;
                }
                continue;
            }
            let awake = || woken() || self.ksmd_should_run();
            // The result of a wait does not matter: the loop looks at everything again.
            let _ = if settled {
                self.thread_wait.wait_freezable(awake).map(|()| true)
            } else {
                self.thread_wait
                    .wait_freezable_timeout(msecs_to_jiffies(IDLE_MSECS), awake)
            };
        }
    }

    /// Scans one batch if there is something to scan. Returns the pause after it, or `None` if the
    /// scanner is to stop.
    fn scan_batch(&self, state: &mut ScanState, current: &Current) -> Option<Pause> {
        if self.ksmd_should_run() {
            self.resize_worker_pool(state, current);
            self.do_scan(state, current);
        }
        // Read under the mutex: a user that stops the scanner, changes the pause and starts it
        // again does not wait for the new pause.
        self.ksmd_should_run().then(|| {
            let msecs = self.knobs().sleep_millisecs;
            Pause {
                msecs,
                until: self.now() + i64::from(msecs) * NSEC_PER_MSEC,
            }
        })
    }

    /// Does what must not wait for `run`: frees the slots of mms that have left, allocates slots
    /// for new ones, registers mms that found no slot. Returns whether all of it is done.
    fn housekeeping(&self, state: &mut ScanState) -> bool {
        self.housekeeping_due.store(false, Relaxed);
        self.reap(|slot, mm| state.engine.metadata.forget_mm(slot, mm));
        if self.refill(GFP_KERNEL).is_err() {
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
    fn resize_worker_pool(&self, state: &mut ScanState, current: &Current) {
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

    /// Scans `pages_to_scan` pages, or until the full scan ends.
    fn do_scan(&self, state: &mut ScanState, current: &Current) {
        let knobs = self.knobs();
        let policy = Policy {
            smart_scan: knobs.smart_scan,
            use_zero_pages: knobs.use_zero_pages,
            merge_across_nodes: knobs.merge_across_nodes,
            max_page_sharing: knobs.max_page_sharing,
        };
        let mut budget = knobs.pages_to_scan;
        while budget > 0 && !current.freezing() && !current.should_stop() {
            if !self.begin_full_scan(state) {
                return;
            }
            let ScanState {
                engine,
                pool,
                buffers,
                ..
            } = state;
            let most = SLICE * buffers.partitions() as u32;
            let slice = budget.min(most);
            budget -= slice;
            let mut left = slice;
            let step = self.visit(|claim| {
                let target = ScanTarget {
                    slot: claim.id(),
                    mm: claim.mm(),
                    start: claim.address(),
                };
                let progress = engine.scan_mm(&policy, self, &target, pool, buffers, &mut left);
                race_window::sleep();
                Visited {
                    progress,
                    tracked: engine.metadata.tracks(target.slot),
                }
            });
            budget += left;
            if slice == most {
                self.publish(state);
            }
            match step {
                Step::Visited { reap: true } => self.housekeeping_due.store(true, Relaxed),
                Step::Visited { reap: false } => {}
                Step::End => return self.end_full_scan(state, current),
                Step::Idle => return,
            }
        }
    }

    /// Begins a full scan unless one is under way. False if there is no mm to scan.
    fn begin_full_scan(&self, state: &mut ScanState) -> bool {
        let (scanning, empty) = self.locked(|registry| (registry.scanning(), registry.is_empty()));
        if scanning || empty {
            return scanning;
        }
        let now = self.now();
        self.published.lock().knobs.scan_started(now);
        let counters = &state.engine.metadata.counters;
        self.trace
            .start_scan(counters.full_scans, counters.tracked as usize);
        folio::lru_add_drain_all(self.symbols);
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
    fn check(&self, state: &mut ScanState) {
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
    fn prune(&self, state: &mut ScanState) {
        let (now, knobs) = (self.now(), self.knobs());
        // A scanner that is stopped has time for nodes that keep the module from being unloaded.
        let idle = knobs.run != RunState::Merge;
        if now < state.prune_at && !idle {
            return;
        }
        let count = if idle {
            PRUNE_MAX
        } else {
            knobs.pages_to_scan as usize / 32
        };
        if state
            .engine
            .metadata
            .prune(count.clamp(PRUNE_MIN, PRUNE_MAX), knobs.max_page_sharing)
            && !idle
        {
            let pause = i64::from(knobs.stable_node_chains_prune_millisecs) * 1_000_000;
            state.prune_at = now.saturating_add(pause);
        }
    }
}
