// SPDX-License-Identifier: GPL-2.0-only

//! The service: the registered mms, the engine, the knobs, and the thread `rksmd` that brings them together.
//!
//! # Locks
//!
//! From the outermost to the innermost:
//!
//! 1. `thread_mutex`: the engine. Held by `rksmd` for one batch, also while other threads help it, and by a write to `run`
//!    while it unmerges. Sleeps. Exit never takes it.
//! 2. The mmap lock of one mm, then folio locks, then page table locks: see [`crate::ksm::replace_pte`].
//! 3. `mmlist_lock`: the registry. A leaf; nothing is dropped or allocated under it.
//! 4. `knobs`: the values of the files and the counters last published. A leaf.
//!
//! `mmap_lock` is always dropped before a claim on a slot is released under `mmlist_lock`: from then on the exit path
//! may free the slot, and only the pin that the release hands back keeps the mm.

use crate::{
    engine::{
        ids::SlotId,
        knobs::{
            Action,
            AdvisorMode,
            Change,
            File,
            Knobs,
            Mode,
            RunState,
            StoreCtx, //
            FILES,
        },
        lane::Lanes,
        mmlist::{
            MmList,
            Progress,
            Step,
            Visited, //
        },
        registry::Registry,
        scan::{
            Engine,
            Pins,
            Policy, //
        },
        stats::Snapshot, //
    },
    kernel_ext::{
        kthread::{
            self,
            Current, //
        },
        memory_notifier::MemoryEvents,
        mm::PinnedMm,
        race_window,
        symbols::Symbols,
        tracepoint::{
            MmEvents,
            Trace, //
        },
        wait::{
            new_wait_queue, //
            WaitQueue,
        }, //
    },
    ksm::{
        backend::{
            self,
            StableNodes, //
        },
        collect::{
            self,
            Batch, //
        },
        unmerge,
        worker_pool::Team, //
    },
    takeover::{
        attributes::Files, //
        Builtin,
    }, //
};
use core::fmt::Write;
use kernel::{
    mm::Mm,
    new_mutex, new_spinlock,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex,
        SpinLock, //
    },
    time::{
        msecs_to_jiffies,
        Instant,
        Monotonic,
        Msecs, //
    },
};

/// The built-in's files of `/sys/kernel/mm/ksm`, in the order of [`FILES`]. Those of our own come after them.
pub(crate) const NAMES: [&CStr; 24] = [
    c"sleep_millisecs",
    c"pages_to_scan",
    c"run",
    c"pages_scanned",
    c"pages_shared",
    c"pages_sharing",
    c"pages_unshared",
    c"pages_volatile",
    c"pages_skipped",
    c"ksm_zero_pages",
    c"full_scans",
    c"merge_across_nodes",
    c"max_page_sharing",
    c"stable_node_chains",
    c"stable_node_dups",
    c"stable_node_chains_prune_millisecs",
    c"use_zero_pages",
    c"general_profit",
    c"smart_scan",
    c"advisor_mode",
    c"advisor_max_cpu",
    c"advisor_min_pages_to_scan",
    c"advisor_max_pages_to_scan",
    c"advisor_target_scan_time",
];

/// The file of our own, and its place in [`FILES`].
pub(crate) const SCAN_THREADS: (&CStr, usize) = (c"scan_threads", NAMES.len());

/// Most pages of each lane that are scanned before the counters are shown anew: a large `pages_to_scan` takes long.
const SLICE: u32 = 1024;

/// Fewest stable nodes that are looked at for a page that is gone after each batch.
const SWEEP_MIN: usize = 32;

/// Most of them.
const SWEEP_MAX: usize = 4096;

/// Milliseconds between two looks at what cannot wait for the scanner: stale nodes while it is stopped, memory for
/// slots that could not be had.
const IDLE_MSECS: Msecs = 500;

/// What only the holder of `thread_mutex` uses.
struct Core {
    engine: Engine<StableNodes>,
    /// The other threads.
    team: Team,
    lanes: Lanes<StableNodes>,
    /// `scan_threads` that `team` and `lanes` have been made for.
    threads: u32,
    /// When the next round of the sweep for stale nodes may begin, ns since the load.
    sweep_at: i64,
}

fn lanes(threads: u32) -> Result<Lanes<StableNodes>> {
    Lanes::new(threads as usize, Batch::new)
}

/// What every reader of a file may look at.
struct Shown {
    knobs: Knobs,
    snapshot: Snapshot,
}

/// The service.
#[pin_data]
pub(crate) struct Ksm {
    symbols: Symbols,
    builtin: Builtin,
    trace: Trace,
    loaded: Instant<Monotonic>,
    /// All invariants are checked after each full scan.
    check: bool,
    #[pin]
    thread_mutex: Mutex<Core>,
    #[pin]
    mmlist_lock: SpinLock<Registry<PinnedMm>>,
    #[pin]
    shown: SpinLock<Shown>,
    /// `rksmd` has something to do that does not depend on `run`.
    attention: Atomic<bool>,
    /// Where `rksmd` waits for `run` to be 1 and for mms to scan.
    #[pin]
    thread_wait: WaitQueue,
    /// Where `rksmd` waits between two batches.
    #[pin]
    iter_wait: WaitQueue,
    /// Where others wait while memory goes offline.
    #[pin]
    offline_wait: WaitQueue,
}

impl Ksm {
    /// Makes the service, with the knobs that it begins with. Nothing runs yet. With `check`, all
    /// invariants are checked after each full scan.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(
        symbols: Symbols,
        builtin: Builtin,
        knobs: Knobs,
        check: bool,
    ) -> Result<Arc<Self>> {
        let trace = Trace::new(symbols);
        let core = Core {
            engine: Engine::new(StableNodes::new(trace)?),
            team: Team::new()?,
            lanes: lanes(1)?,
            threads: 1,
            sweep_at: 0,
        };
        let ksm = Arc::pin_init(
            pin_init!(Self {
                symbols,
                builtin,
                trace,
                loaded: Instant::now(),
                check,
                thread_mutex <- new_mutex!(core, "rksm_thread_mutex"),
                mmlist_lock <- new_spinlock!(Registry::new(), "rksm_mmlist_lock"),
                shown <- new_spinlock!(Shown { knobs, snapshot: Snapshot::default() }, "rksm_knobs"),
                attention: Atomic::new(false),
                thread_wait <- new_wait_queue!(c"rksm_thread_wait"),
                iter_wait <- new_wait_queue!(c"rksm_iter_wait"),
                offline_wait <- new_wait_queue!(c"rksm_offline_wait"),
            }),
            GFP_KERNEL,
        )?;
        ksm.refill(GFP_KERNEL)?;
        Ok(ksm)
    }

    /// Registers the mms that the built-in knows. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn register_all(&self) -> Result {
        self.builtin.for_each_mm(|mm| {
            self.refill(GFP_KERNEL)?;
            self.register(mm);
            Ok(())
        })
    }

    /// Registers one mm, if it is not yet. Does not sleep.
    fn register(&self, mm: &Mm) {
        let entered = MmList::enter(self, PinnedMm::mmgrab(mm));
        if entered.refill {
            self.attend();
        } else if entered.wake_scanner {
            self.thread_wait.wake_up_interruptible();
        }
    }

    /// Has `rksmd` look at what does not depend on `run`.
    fn attend(&self) {
        self.attention.store(true, Relaxed);
        self.thread_wait.wake_up_interruptible();
        self.iter_wait.wake_up_interruptible();
    }

    /// Nanoseconds since the module was loaded.
    fn now(&self) -> i64 {
        self.loaded.elapsed().as_nanos()
    }

    /// Calls `f` with the engine, when no memory is going offline. Sleeps.
    fn with_core<R>(&self, f: impl FnOnce(&mut Core) -> R) -> R {
        loop {
            let mut core = self.thread_mutex.lock();
            if !self.offlining() {
                let result = f(&mut core);
                self.publish(&core);
                return result;
            }
            drop(core);
            self.offline_wait.wait_idle(|| !self.offlining());
        }
    }

    fn offlining(&self) -> bool {
        self.shown.lock().knobs.offline
    }

    /// Makes the counters visible to readers of the files.
    fn publish(&self, core: &Core) {
        let slots = self.locked(|registry| registry.bytes());
        let snapshot = Snapshot {
            counters: core.engine.counters,
            zero_pages: 0,
            metadata_bytes: (core.engine.bytes() + slots) as u64,
        };
        self.shown.lock().snapshot = snapshot;
    }

    fn knobs(&self) -> Knobs {
        self.shown.lock().knobs
    }

    /// Whether there is something to scan and `run` says so.
    fn ksmd_should_run(&self) -> bool {
        self.knobs().run == RunState::Merge && !self.locked(|registry| registry.is_empty())
    }

    // The thread.

    /// The body of `rksmd`.
    pub(crate) fn scan_thread(&self, current: &Current) {
        while !current.should_stop() {
            let (settled, pause) = self.with_core(|core| {
                let settled = self.attend_now(core);
                self.sweep(core);
                if self.ksmd_should_run() {
                    self.muster(core);
                    self.do_scan(core, current);
                }
                // Who stops the scanner, changes the pause, and starts it again does not wait for the new pause.
                let pause = self.ksmd_should_run().then(|| self.knobs().sleep_millisecs);
                (settled && core.engine.nodes() == 0, pause)
            });
            let woken = || current.should_stop() || self.attention.load(Relaxed);
            // An interrupted wait is none to worry about: the loop looks at everything again.
            let _ = if let Some(msecs) = pause {
                // A wait of no time is none, and the freezer needs one.
                let jiffies = msecs_to_jiffies(msecs).max(current.freezing().into());
                self.iter_wait.wait_freezable_timeout(jiffies, || {
                    woken() || self.knobs().sleep_millisecs != msecs
                })
            } else if settled {
                self.thread_wait
                    .wait_freezable(|| woken() || self.ksmd_should_run())
                    .map(|()| true)
            } else {
                self.thread_wait
                    .wait_freezable_timeout(msecs_to_jiffies(IDLE_MSECS), || {
                        woken() || self.ksmd_should_run()
                    })
            };
        }
    }

    /// Does what must not wait for `run`: frees the slots of mms that have left, makes room for new ones, finds those
    /// for which there was no room. Returns whether all of it is done.
    fn attend_now(&self, core: &mut Core) -> bool {
        self.attention.store(false, Relaxed);
        self.reap(|slot, mm| core.engine.forget_mm(slot, mm));
        if self.refill(GFP_KERNEL).is_err() {
            return false;
        }
        if !self.locked(|registry| registry.take_missed()) {
            return true;
        }
        let registered = self.register_all();
        if registered.is_err() {
            self.locked(|registry| registry.set_missed());
        }
        registered.is_ok()
    }

    /// Has as many threads at hand as `scan_threads` says. Fewer have to do where there is no memory for them.
    fn muster(&self, core: &mut Core) {
        let threads = self.knobs().scan_threads;
        if threads == core.threads {
            return;
        }
        core.threads = threads;
        let mustered = lanes(threads).and_then(|lanes| {
            core.lanes = lanes;
            core.team.resize(self.symbols, threads as usize)
        });
        if let Err(error) = mustered {
            pr_warn!("scan_threads={threads} cannot be had ({error:?}); fewer scan until it is written again\n");
        }
    }

    /// Scans `pages_to_scan` pages, or until the full scan ends.
    fn do_scan(&self, core: &mut Core, current: &Current) {
        let knobs = self.knobs();
        let policy = Policy {
            smart_scan: knobs.smart_scan,
            use_zero_pages: knobs.use_zero_pages,
            merge_across_nodes: knobs.merge_across_nodes,
            max_page_sharing: knobs.max_page_sharing,
        };
        let mut budget = knobs.pages_to_scan;
        while budget > 0 && !current.freezing() && !current.should_stop() {
            if !self.begin_full_scan(core) {
                return;
            }
            let Core {
                engine,
                team,
                lanes,
                ..
            } = core;
            let most = SLICE * lanes.count() as u32;
            let slice = budget.min(most);
            budget -= slice;
            let mut left = slice;
            let step = self.visit(|claim| {
                let (id, mm) = (claim.id(), claim.mm());
                let progress = engine.scan_mm(
                    &policy,
                    self,
                    (id, mm),
                    claim.address(),
                    (team, lanes),
                    &mut left,
                );
                race_window::sleep();
                Visited {
                    progress,
                    tracked: engine.tracks(id),
                }
            });
            budget += left;
            if slice == most {
                self.publish(core);
            }
            match step {
                Step::Visited { reap: true } => self.attention.store(true, Relaxed),
                Step::Visited { reap: false } => {}
                Step::End => return self.end_full_scan(core, current),
                Step::Idle => return,
            }
        }
    }

    /// Begins a full scan unless one is under way. False if there is no mm to scan.
    fn begin_full_scan(&self, core: &mut Core) -> bool {
        let (scanning, empty) = self.locked(|registry| (registry.scanning(), registry.is_empty()));
        if scanning || empty {
            return scanning;
        }
        let now = self.now();
        self.shown.lock().knobs.scan_started(now);
        let counters = &core.engine.counters;
        self.trace
            .start_scan(counters.full_scans, counters.tracked as usize);
        collect::lru_add_drain_all(self.symbols);
        self.locked(|registry| registry.begin())
    }

    fn end_full_scan(&self, core: &mut Core, current: &Current) {
        if self.knobs().advisor_mode != AdvisorMode::None {
            let (now, cpu) = (self.now(), current.cpu_time() + core.team.cpu_time());
            let advice = self.shown.lock().knobs.scan_ended(now, cpu);
            if let Some(advice) = advice {
                self.trace.advisor(
                    advice.scan_time as i64,
                    advice.pages_to_scan as usize,
                    advice.cpu_percent,
                );
            }
        }
        let counters = &core.engine.counters;
        self.trace
            .stop_scan(counters.full_scans, counters.tracked as usize);
        core.engine.end_full_scan();
        self.check(core);
        // Who waits for the end of a full scan is told at once: nothing that is written from now on has been seen.
        self.publish(core);
    }

    /// Warns if an invariant does not hold, where the module was told to check them.
    fn check(&self, core: &mut Core) {
        if !self.check {
            return;
        }
        let broken = self.locked(|registry| registry.check());
        if let Err(what) = broken.and_then(|()| core.engine.check()) {
            pr_err!("invariant broken: {what}\n");
            kernel::warn_on!(true);
        }
    }

    /// Looks for stable nodes whose page is gone: a bounded number a batch, and all of them no more often than
    /// `stable_node_chains_prune_millisecs`.
    fn sweep(&self, core: &mut Core) {
        let (now, knobs) = (self.now(), self.knobs());
        // A scanner that stands still has time for nodes that keep the module from being unloaded.
        let idle = knobs.run != RunState::Merge;
        if now < core.sweep_at && !idle {
            return;
        }
        let count = if idle {
            SWEEP_MAX
        } else {
            knobs.pages_to_scan as usize / 32
        };
        if core.engine.sweep(count.clamp(SWEEP_MIN, SWEEP_MAX)) && !idle {
            let pause = i64::from(knobs.stable_node_chains_prune_millisecs) * 1_000_000;
            core.sweep_at = now.saturating_add(pause);
        }
    }

    // The files.

    /// Changes what only the holder of `thread_mutex` may change.
    fn change_excluding_scanner(&self, core: &mut Core, change: Change) -> Result {
        let ctx = StoreCtx {
            pages_shared: core.engine.counters.pages_shared,
            cpus: 0,
        };
        let action = self.shown.lock().knobs.apply(change, &ctx)?;
        if let (Change::Run(_), Action::Done | Action::WakeScanner) = (change, action) {
            let unmerging = self.knobs().run == RunState::Unmerge;
            self.builtin.set_unmerging(unmerging);
        }
        match action {
            Action::Done => Ok(()),
            Action::WakeIter => {
                self.iter_wait.wake_up_interruptible();
                Ok(())
            }
            Action::WakeScanner => {
                self.thread_wait.wake_up_interruptible();
                Ok(())
            }
            Action::Unmerge => {
                self.builtin.set_unmerging(true);
                self.unmerge_all(core).inspect_err(|_| {
                    self.shown.lock().knobs.unmerge_failed();
                    self.builtin.set_unmerging(false);
                })
            }
            Action::Empty(pending) => {
                if !core.engine.remove_all_nodes() {
                    return Err(EBUSY);
                }
                self.shown.lock().knobs.commit(pending);
                Ok(())
            }
        }
    }

    /// Unmerges all that is merged.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, `ERESTARTSYS` where a signal is pending.
    fn unmerge_all(&self, core: &mut Core) -> Result {
        let origin = unmerge::OomOrigin::new();
        let mut result = self.unmerge_registered(core);
        // Children that found no room while their parents were unmerged have inherited merged pages.
        while result.is_ok() && self.locked(|registry| registry.take_missed()) {
            result = self
                .register_all()
                .and_then(|()| self.unmerge_registered(core));
            if result.is_err() {
                self.locked(|registry| registry.set_missed());
            }
        }
        drop(origin);
        self.reap(|slot, mm| core.engine.forget_mm(slot, mm));
        result?;
        // Nodes of pages that are just going, with their last process, are left to the sweep.
        core.engine.remove_all_nodes();
        core.engine.counters.full_scans = 0;
        Ok(())
    }

    /// Unmerges the mms that are registered, or become so meanwhile.
    fn unmerge_registered(&self, core: &mut Core) -> Result {
        MmList::unmerge(self, |claim| {
            unmerge::unmerge_mm(claim.mm())?;
            core.engine.forget_mm(claim.id(), claim.mm());
            self.publish(core);
            self.refill(GFP_KERNEL)?;
            Ok(Visited {
                progress: Progress::Done,
                tracked: false,
            })
        })
    }

    /// Forgets all mms and pages: the thread and the probes are gone, and nothing is merged. May sleep.
    pub(crate) fn shut_down(&self) {
        let mut core = self.thread_mutex.lock();
        // Takes threads away, so there is no memory to be had.
        let _ = core.team.resize(self.symbols, 1);
        self.clear(|slot, mm| core.engine.forget_mm(slot, mm));
        core.engine.remove_all_nodes();
    }

    /// What each file of the built-in is to be given to have the values from here, in the order to write them.
    ///
    /// # Errors
    ///
    /// The first error of `give`; the other files are given all the same.
    pub(crate) fn hand_back(&self, mut give: impl FnMut(usize, &[u8]) -> Result) -> Result<u8> {
        let knobs = self.knobs();
        let mut first = Ok(());
        let mut write = |file: File, text: &[u8]| {
            if let Some(i) = FILES.iter().position(|row| row.file == file) {
                let given = give(i, text);
                if first.is_ok() {
                    first = given;
                }
            }
        };
        // An advisor keeps `pages_to_scan` from being set, and sets it when it is switched on.
        write(File::AdvisorMode, b"none\n");
        let plain = FILES.iter().take(NAMES.len()).filter(|row| {
            let last = matches!(row.file, File::Run | File::AdvisorMode);
            let advised = row.file == File::PagesToScan && knobs.advisor_mode != AdvisorMode::None;
            row.mode == Mode::ReadWrite && !last && !advised
        });
        for row in plain {
            let mut text = Line::new();
            if knobs.hand_back(row.file, &mut text).is_ok() {
                write(row.file, text.as_bytes());
            }
        }
        let mut text = Line::new();
        if knobs.hand_back(File::AdvisorMode, &mut text).is_ok() {
            write(File::AdvisorMode, text.as_bytes());
        }
        first.map(|()| knobs.run as u8)
    }
}

impl MmList for Ksm {
    type Mm = PinnedMm;

    fn locked<R>(&self, f: impl FnOnce(&mut Registry<PinnedMm>) -> R) -> R {
        f(&mut self.mmlist_lock.lock())
    }
}

impl Pins<PinnedMm> for Ksm {
    fn pin(&self, slot: SlotId) -> Option<PinnedMm> {
        self.locked(|registry| registry.pin(slot))
    }
}

impl MmEvents for Ksm {
    fn enter(&self, mm: &Mm) {
        race_window::spin();
        self.register(mm);
    }

    fn exit(&self, mm: &Mm) {
        race_window::spin();
        if MmList::exit(self, mm.as_raw() as usize) {
            self.attend();
        }
    }
}

impl MemoryEvents for Ksm {
    fn going_offline(&self, _start_pfn: usize, _nr_pages: usize) {
        // Whoever uses the engine is done when this has the lock, and who comes later waits.
        let _core = self.thread_mutex.lock();
        self.shown.lock().knobs.offline = true;
    }

    fn offline(&self, start_pfn: usize, nr_pages: usize) {
        {
            let mut core = self.thread_mutex.lock();
            core.engine
                .forget_frames(start_pfn..start_pfn.saturating_add(nr_pages));
            self.publish(&core);
        }
        self.cancel_offline(start_pfn, nr_pages);
    }

    fn cancel_offline(&self, _start_pfn: usize, _nr_pages: usize) {
        self.shown.lock().knobs.offline = false;
        self.offline_wait.wake_up_all();
    }
}

impl Files for Ksm {
    fn show(&self, file: usize, text: &mut [u8]) -> Result<usize> {
        let file = FILES.get(file).ok_or(ENOENT)?.file;
        let (knobs, mut snapshot) = {
            let shown = self.shown.lock();
            (shown.knobs, shown.snapshot)
        };
        snapshot.zero_pages = backend::zero_pages(self.symbols);
        let mut line = Line::new();
        knobs.show(file, &snapshot, &mut line).map_err(|_| EINVAL)?;
        let line = line.as_bytes();
        text.get_mut(..line.len())
            .ok_or(EINVAL)?
            .copy_from_slice(line);
        Ok(line.len())
    }

    fn store(&self, file: usize, data: &[u8]) -> Result {
        let change = FILES.get(file).ok_or(ENOENT)?.file.parse(data)?;
        if let Change::Run(_) | Change::MergeAcrossNodes(_) | Change::MaxPageSharing(_) = change {
            return self.with_core(|core| self.change_excluding_scanner(core, change));
        }
        let ctx = StoreCtx {
            pages_shared: 0,
            cpus: kthread::online_cpus(),
        };
        let action = self.shown.lock().knobs.apply(change, &ctx)?;
        if action == Action::WakeIter {
            self.iter_wait.wake_up_interruptible();
        }
        Ok(())
    }
}

/// A line of a file.
struct Line {
    text: [u8; 32],
    len: usize,
}

impl Line {
    const fn new() -> Self {
        Self {
            text: [0; 32],
            len: 0,
        }
    }

    fn as_bytes(&self) -> &[u8] {
        self.text.get(..self.len).unwrap_or_default()
    }
}

impl Write for Line {
    fn write_str(&mut self, s: &str) -> core::fmt::Result {
        let room = self.text.get_mut(self.len..self.len + s.len());
        room.ok_or(core::fmt::Error)?.copy_from_slice(s.as_bytes());
        self.len += s.len();
        Ok(())
    }
}
