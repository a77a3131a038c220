// SPDX-License-Identifier: GPL-2.0-only

//! The service: the registered mms, the engine, the knobs, and the thread `rksmd` that brings them
//! together.
//!
//! [`scanner`] is the thread, [`run`] what a write to `run` and to the two knobs that need it to
//! stand still does, [`attributes`] the reads and writes of all files, [`control`] the calls of
//! `/dev/rksm`, [`sweep`] how rules are applied, [`governor`](self::governor) what it does with
//! `governor=auto`, [`events`] what the kernel reports: mms that come and go, memory that goes
//! offline.
//!
//! # Locks
//!
//! The one list of locks. From the outermost to the innermost: a lock further down is never held
//! while one further up is taken.
//!
//! 1. `rules`, a mutex: the rules for processes and cgroups. Held by `rksmd` while it looks cgroups
//!    up, which takes kernfs's locks, and while it looks at all processes, where it takes the
//!    `alloc_lock` of one task at a time, under which only `mmlist_lock` is taken.
//! 2. `thread_mutex`, a mutex: the engine. Held by `rksmd` for a few passes, also for the threads
//!    that help it, and released as soon as another task waits for it; by a write to `run`,
//!    `merge_across_nodes` or `max_page_sharing` for as long as it takes; by a call of `/dev/rksm`
//!    as by `rksmd`; by the memory notifier; while what is merged is taken over or handed back.
//!    Exit never takes it.
//! 3. The built-in's `ksm_thread_mutex`: its `ksm_run`, and its trees, lists and counters of what
//!    is merged. Held briefly when unmerging begins or ends, and by an unload while it waits for
//!    tasks to sleep; throughout while what is merged is taken over or handed back.
//! 4. The `mmap_lock` of one mm, for reading: its vmas and page tables against being freed; for
//!    writing, and then not under `thread_mutex`, where a process is enabled or disabled. Never two
//!    at once.
//! 5. Folio locks: the `hlist` of a stable node, the `mapping` of a folio. A merge takes the page's
//!    and the KSM page's, both by trylock.
//! 6. Secondary page tables: the bracket of the mmu notifiers around the replacement of one page.
//! 7. Page table locks: a walk of one page table, the replacement of one page. See
//!    [`crate::ksm`].
//! 8. The worker pool's two spinlocks: the work that is published, and the queue of jobs. Leaves.
//! 9. `mmlist_lock`, a spinlock: the registry. A leaf; nothing is dropped or allocated under it.
//! 10. `published`, a spinlock: the values of the knobs and the counters last published. A leaf.
//! 11. The built-in's `ksm_mmlist_lock`, a spinlock: its list of mms, ksmd's place there, and
//!     whether an mm has rmap items. A leaf. Held for a batch of mms; for a walk over all of them
//!     to find those with items.
//!
//! `mmap_lock` is always dropped before a claim on a slot is released under `mmlist_lock`: from
//! then on the exit path may free the slot, and only the pin that the release hands back keeps the
//! mm.

pub(crate) mod attributes;
mod control;
mod events;
mod governor;
pub(crate) mod handover;
mod run;
mod scanner;
pub(crate) mod sweep;

use crate::{
    engine::{
        control::rules::Rules,
        governor::{
            nap::AWAKE,
            pause::Pressure,
            Governor, //
        },
        mm_list::MmList,
        pace::{
            Hold,
            Pace, //
        },
        registry::Registry,
        scan::{
            Engine,
            PassBuffers, //
        },
        stats::Snapshot,
        sysfs::knobs::{
            Knobs,
            RunState, //
        }, //
    },
    kernel_ext::{
        gfp::GFP_METADATA,
        mm::PinnedMm,
        mutex::{
            lock_interruptible,
            lock_killable, //
        },
        process::ProcessId,
        symbols::Symbols,
        wait::{
            new_wait_queue, //
            WaitQueue,
        }, //
    },
    ksm::{
        backend,
        batch::Batch,
        stable_nodes::StableNodes,
        trace::Trace,
        worker_pool::KthreadPool, //
    },
    takeover::builtin::Builtin, //
};
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
        Instant,
        Monotonic,
        NSEC_PER_USEC, //
    },
};

/// How often the count of zero pages is read again if it changes meanwhile.
const HAND_BACK_TRIES: usize = 100;

/// Most pages of each partition in a visit.
const SLICE: u32 = 1024;

/// What only the holder of `thread_mutex` uses.
struct ScanState {
    engine: Engine<StableNodes>,
    /// The other threads.
    pool: KthreadPool,
    buffers: PassBuffers<StableNodes>,
    /// `scan_threads` that `pool` and `buffers` have been made for.
    threads: u32,
    /// When the next round of [`Ksm::prune`] may begin, ns since the load.
    prune_at: i64,
    /// Pages that the batch which is under way may still scan.
    batch_left: u32,
    /// How often the full scan that is under way may still wait for a process that holds its mmap
    /// lock.
    busy_left: u32,
    /// How often the last visit has been tried again.
    busy_tries: u32,
    pace: Pace,
    /// Longest hold of the lock by `rksmd`, ns.
    longest_hold: i64,
    /// How often `rksmd` has slept and gone on.
    wakeups: u64,
    governor: Governor,
    /// It has begun.
    governed: bool,
    /// Pages that had been refused as pinned when the LRU caches were last drained for that, and
    /// when that was, ns since the load.
    pinned_at: u64,
    drained_at: i64,
    /// CPU time of `rksmd` and the other threads when it last released the lock, ns.
    cpu_time: u64,
}

impl ScanState {
    /// Returns the pages of the next visit, at most so many. One thread looks at the clock after
    /// some pages, several threads after many.
    fn visit_pages(&mut self, most: u32) -> u32 {
        let partitions = self.buffers.partitions();
        if partitions == 1 {
            return most;
        }
        self.pace.limit(SLICE * partitions as u32);
        self.pace.pages().min(most)
    }
}

fn pass_buffers(threads: u32) -> Result<PassBuffers<StableNodes>> {
    PassBuffers::new(threads as usize, Batch::new)
}

/// What every reader of a file may look at.
struct Published {
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
    thread_mutex: Mutex<ScanState>,
    /// Tasks other than `rksmd` that wait for `thread_mutex`.
    waiting: Atomic<i32>,
    #[pin]
    rules: Mutex<Rules<ProcessId>>,
    #[pin]
    mmlist_lock: SpinLock<Registry<PinnedMm>>,
    #[pin]
    published: SpinLock<Published>,
    /// `rksmd` has something to do that does not depend on `run`.
    housekeeping_due: Atomic<bool>,
    /// The rules have changed since `rksmd` last applied them.
    sweep_due: Atomic<bool>,
    /// Mms have come that the governor has not seen.
    newcomers: Atomic<bool>,
    /// Until when `rksmd` sleeps under the governor, ns since the load, or [`AWAKE`].
    asleep_until: Atomic<i64>,
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
    /// Creates the service, with the knobs that it begins with. Nothing runs yet. With `check`, all
    /// invariants are checked after each full scan.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(
        symbols: Symbols,
        builtin: Builtin,
        nodes: StableNodes,
        knobs: Knobs,
        check: bool,
    ) -> Result<Arc<Self>> {
        let trace = Trace::new(symbols);
        let state = ScanState {
            engine: Engine::new(nodes),
            pool: KthreadPool::new()?,
            buffers: pass_buffers(1)?,
            threads: 1,
            prune_at: 0,
            batch_left: 0,
            busy_left: 0,
            busy_tries: 0,
            pace: Pace::new(),
            longest_hold: 0,
            wakeups: 0,
            governor: Governor::new(),
            governed: false,
            pinned_at: 0,
            drained_at: 0,
            cpu_time: 0,
        };
        let published = Published {
            knobs,
            snapshot: Snapshot::default(),
        };
        let ksm = Arc::pin_init(
            pin_init!(Self {
                symbols,
                builtin,
                trace,
                loaded: Instant::now(),
                check,
                thread_mutex <- new_mutex!(state, "rksm_thread_mutex"),
                waiting: Atomic::new(0),
                rules <- new_mutex!(Rules::new(), "rksm_rules"),
                mmlist_lock <- new_spinlock!(Registry::new(), "rksm_mmlist_lock"),
                published <- new_spinlock!(published, "rksm_published"),
                housekeeping_due: Atomic::new(false),
                sweep_due: Atomic::new(false),
                newcomers: Atomic::new(false),
                asleep_until: Atomic::new(AWAKE),
                thread_wait <- new_wait_queue!(c"rksm_thread_wait"),
                iter_wait <- new_wait_queue!(c"rksm_iter_wait"),
                offline_wait <- new_wait_queue!(c"rksm_offline_wait"),
            }),
            GFP_KERNEL,
        )?;
        ksm.refill(GFP_KERNEL)?;
        Ok(ksm)
    }

    /// Registers the mms that the built-in knows.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn register_all(&self) -> Result {
        self.builtin.for_each_mm(|mm| {
            self.refill(GFP_METADATA)?;
            self.register(mm);
            Ok(())
        })
    }

    /// Registers one mm, if it is not yet.
    ///
    /// # Context
    ///
    /// Any that may take a spinlock. Takes `mmlist_lock`.
    fn register(&self, mm: &Mm) {
        let entered = MmList::enter(self, PinnedMm::mmgrab(mm));
        if entered.refill {
            self.kick_housekeeping();
        } else if entered.wake_scanner {
            self.thread_wait.wake_up_interruptible();
        }
        if entered.registered {
            self.announce_newcomer();
        }
    }

    /// Wakes `rksmd` for [`Ksm::housekeeping`], whatever `run` is.
    fn kick_housekeeping(&self) {
        self.housekeeping_due.store(true, Relaxed);
        self.thread_wait.wake_up_interruptible();
        self.wake_governed();
    }

    /// Has `rksmd` drop an mm that has left. Under the governor it does so when it goes on by
    /// itself: there may be many.
    fn kick_reaping(&self) {
        self.housekeeping_due.store(true, Relaxed);
        self.thread_wait.wake_up_interruptible();
        if self.asleep_until.load(Relaxed) == AWAKE {
            self.iter_wait.wake_up_interruptible();
        }
    }

    /// Has `rksmd` apply the rules now.
    fn kick_sweep(&self) {
        self.sweep_due.store(true, Relaxed);
        self.thread_wait.wake_up_interruptible();
        self.wake_governed();
    }

    /// Nanoseconds since the module was loaded.
    fn now(&self) -> i64 {
        self.loaded.elapsed().as_nanos()
    }

    /// Calls `f` with the scan state when no memory is going offline. For users of the files.
    ///
    /// # Context
    ///
    /// May sleep. Takes `thread_mutex`.
    ///
    /// # Errors
    ///
    /// `EINTR` or `ERESTARTSYS` when a fatal signal came while this waited.
    fn with_scan_state<R>(&self, f: impl FnOnce(&mut ScanState) -> R) -> Result<R> {
        loop {
            let mut state = self.waiting(lock_killable)?;
            if !self.offlining() {
                let result = f(&mut state);
                self.publish(&state);
                return Ok(result);
            }
            drop(state);
            self.offline_wait.wait_killable(|| !self.offlining())?;
        }
    }

    /// As [`Self::with_scan_state`], until any signal comes. `f` is told when its hold is over.
    ///
    /// # Context
    ///
    /// May sleep. Takes `thread_mutex`.
    ///
    /// # Errors
    ///
    /// `EINTR` when a signal came while this waited.
    fn with_scan_state_interruptible<R>(
        &self,
        f: impl FnOnce(&mut ScanState, Hold) -> R,
    ) -> Result<R> {
        loop {
            let mut state = self.waiting(lock_interruptible)?;
            if !self.offlining() {
                let result = f(&mut state, Hold::begin(self.now()));
                self.publish(&state);
                return Ok(result);
            }
            drop(state);
            let online = self.offline_wait.wait_freezable(|| !self.offlining());
            online.map_err(|_| EINTR)?;
        }
    }

    /// Calls `f` with the scan state when no memory is going offline. For `rksmd`, which releases
    /// the lock as soon as the hold that `f` is told is over.
    ///
    /// # Context
    ///
    /// May sleep. Takes `thread_mutex`.
    fn hold_scan_state<R>(&self, f: impl FnOnce(&mut ScanState, Hold) -> R) -> R {
        loop {
            let mut state = self.thread_mutex.lock();
            if !self.offlining() {
                let hold = Hold::begin(self.now());
                let result = f(&mut state, hold);
                state.longest_hold = state.longest_hold.max(hold.nsecs(self.now()));
                self.publish(&state);
                return result;
            }
            drop(state);
            self.offline_wait.wait_idle(|| !self.offlining());
        }
    }

    /// Whether `rksmd` is to release the scan state.
    fn is_over(&self, hold: Hold) -> bool {
        hold.is_over(self.now(), self.waiting.load(Relaxed) > 0)
    }

    /// Calls `lock` with `thread_mutex`, which `rksmd` then releases soon.
    fn waiting<'a, R>(&'a self, lock: impl FnOnce(&'a Mutex<ScanState>) -> R) -> R {
        self.waiting.add(1, Relaxed);
        let result = lock(&self.thread_mutex);
        self.waiting.add(-1, Relaxed);
        result
    }

    fn offlining(&self) -> bool {
        self.published.lock().knobs.offline
    }

    /// Makes the counters visible to readers of the files.
    fn publish(&self, state: &ScanState) {
        let slots = self.locked(|registry| registry.bytes());
        let snapshot = Snapshot {
            counters: state.engine.metadata.counters,
            refusals: state.engine.metadata.refusals,
            zero_pages: 0,
            longest_hold_usecs: (state.longest_hold / NSEC_PER_USEC) as u64,
            wakeups: state.wakeups,
            cpu_microsecs: state.cpu_time / NSEC_PER_USEC as u64,
            processes: 0,
            memory_pressure: state.governed && state.governor.pressure() != Pressure::None,
            metadata_bytes: (state.engine.metadata.bytes() + slots) as u64,
        };
        self.published.lock().snapshot = snapshot;
    }

    fn knobs(&self) -> Knobs {
        self.published.lock().knobs
    }

    /// The knobs, and the counters as they were last published.
    fn values(&self) -> (Knobs, Snapshot) {
        let published = self.published.lock();
        (published.knobs, published.snapshot)
    }

    /// Whether there is something to scan and `run` says so.
    fn ksmd_should_run(&self) -> bool {
        self.knobs().run == RunState::Merge && !self.locked(|registry| registry.is_empty())
    }

    /// Returns how many mappings of the zero page KSM has placed.
    ///
    /// This is the sum of what the core of mm counts for each mm, which the scan corrects. The
    /// core's count for all of them keeps the errors of processes that have exited.
    ///
    /// # Context
    ///
    /// Any. Takes `mmlist_lock`.
    fn zero_pages(&self) -> isize {
        self.sum(backend::zero_pages)
    }

    /// Corrects the core's count of zero pages for all mms, which the built-in shows.
    fn hand_back_zero_pages(&self) {
        for _ in 0..HAND_BACK_TRIES {
            let before = backend::all_zero_pages(self.symbols);
            let sum = self.zero_pages();
            let now = backend::all_zero_pages(self.symbols);
            if before == now {
                return backend::correct_all_zero_pages(self.symbols, sum - now);
            }
        }
    }

    /// Has `rksmd` do what `run` says.
    ///
    /// # Context
    ///
    /// Any. Takes `published`.
    pub(crate) fn set_run(&self, run: RunState) {
        self.published.lock().knobs.run = run;
        self.thread_wait.wake_up_interruptible();
    }
}
