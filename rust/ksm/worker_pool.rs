// SPDX-License-Identifier: GPL-2.0-only

//! Kernel threads that run the jobs of a stage beside `rksmd`.

use crate::engine::worker_pool::{
    Stage,
    WorkerPool, //
};
use crate::{
    bindings::raw,
    kernel_ext::{
        gfp::GFP_METADATA,
        kthread::{
            Current,
            Kthread, //
        },
        symbols::Symbols,
        wait::{
            new_wait_queue, //
            WaitQueue,
        }, //
    }, //
};
use core::ptr::NonNull;
use kernel::{
    io::poll::read_poll_timeout,
    new_spinlock,
    prelude::*,
    str::CString,
    sync::{
        atomic::{
            Atomic,
            Full,
            Relaxed, //
        },
        Arc,
        SpinLock, //
    },
    time::Delta,
};
use pin_init::stack_pin_init;

/// Niceness of the threads: that of `ksmd`.
pub(crate) const NICE: i8 = 5;

/// Most jobs in flight.
const HANDED_OUT: usize = 16;

/// Most jobs that wait for each worker before the thread that runs the stage takes one itself: a
/// worker that finds none falls asleep.
const AHEAD: usize = 4;

/// The jobs of a stage: those that wait to be run, and those that have been.
struct Jobs<T> {
    waiting: Ring<T>,
    done: Ring<T>,
}

/// A ring buffer of up to [`HANDED_OUT`] items, in order.
struct Ring<T> {
    items: [Option<T>; HANDED_OUT],
    first: usize,
    len: usize,
}

impl<T> Ring<T> {
    fn new() -> Self {
        Self {
            items: [const { None }; HANDED_OUT],
            first: 0,
            len: 0,
        }
    }

    fn push(&mut self, item: T) {
        let behind = (self.first + self.len) % HANDED_OUT;
        if let Some(place) = self.items.get_mut(behind) {
            *place = Some(item);
            self.len += 1;
        }
    }

    fn pop(&mut self) -> Option<T> {
        self.len = self.len.checked_sub(1)?;
        let first = self.items.get_mut(self.first)?.take();
        self.first = (self.first + 1) % HANDED_OUT;
        first
    }
}

/// How long a thread without a job polls for one before it falls asleep, in µs: about what it takes
/// to wake it.
const HALT_POLL_US: i64 = 100;

/// A stage that is run: its jobs, and what is done with each.
#[pin_data]
struct Work<'a, T, F> {
    #[pin]
    jobs: SpinLock<Jobs<T>>,
    work: F,
    waiting: &'a JobCount,
    done: &'a JobCount,
}

/// A [`Work`] of any type, as the workers see it.
trait Runnable: Sync {
    /// Runs jobs until none waits.
    ///
    /// # Context
    ///
    /// May sleep.
    fn run_jobs(&self);
}

impl<T: Send + Unpin, F: Fn(&mut T) + Sync> Runnable for Work<'_, T, F> {
    fn run_jobs(&self) {
        while let Some(mut job) = self.take() {
            (self.work)(&mut job);
            self.jobs.lock().done.push(job);
            self.done.add();
            cond_resched();
        }
    }
}

impl<T: Send + Unpin, F> Work<'_, T, F> {
    /// Makes a job available to the workers.
    fn post(&self, job: T) {
        self.jobs.lock().waiting.push(job);
        self.waiting.add();
    }

    /// Takes a job that waits, to run it.
    fn take(&self) -> Option<T> {
        let job = self.jobs.lock().waiting.pop();
        job.inspect(|_| self.waiting.remove())
    }

    /// Takes a job that a worker has run.
    fn taken_back(&self) -> Option<T> {
        let job = self.jobs.lock().done.pop();
        job.inspect(|_| self.done.remove())
    }
}

/// A number of jobs, and the threads that sleep until it is not zero.
#[pin_data]
struct JobCount {
    jobs: Atomic<usize>,
    sleepers: Atomic<usize>,
    #[pin]
    queue: WaitQueue,
}

impl JobCount {
    /// No jobs.
    fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            jobs: Atomic::new(0),
            sleepers: Atomic::new(0),
            queue <- new_wait_queue!(c"rksm_pool"),
        })
    }

    /// Counts one more, and wakes the sleepers.
    fn add(&self) {
        // A sleeper increments `sleepers` before it rechecks `jobs`. Both are fully ordered (store
        // buffering), so one of them sees the other: no wake-up is lost.
        self.jobs.fetch_add(1, Full);
        if self.sleepers.load(Relaxed) > 0 {
            self.queue.wake_up_all();
        }
    }

    /// Counts one less.
    fn remove(&self) {
        self.jobs.fetch_sub(1, Relaxed);
    }

    fn any(&self) -> bool {
        self.jobs.load(Relaxed) > 0
    }

    /// Polls for a job for [`HALT_POLL_US`].
    ///
    /// # Context
    ///
    /// May sleep.
    fn poll(&self) {
        let look = || {
            cond_resched();
            Ok(self.any())
        };
        let within = Delta::from_micros(HALT_POLL_US);
        let _ = read_poll_timeout(look, |any| *any, Delta::ZERO, within);
    }

    /// Counts the caller as a sleeper and runs `wait`, which sleeps on the queue until a job is
    /// available or its own condition holds.
    fn sleep(&self, wait: impl FnOnce(&WaitQueue)) {
        self.sleepers.fetch_add(1, Full);
        wait(&self.queue);
        self.sleepers.fetch_sub(1, Relaxed);
    }
}

/// The work that the workers may take jobs of.
struct CurrentWork {
    work: Option<NonNull<dyn Runnable>>,
    /// Workers that may use it.
    busy: usize,
}

// SAFETY: `Runnable` is `Sync`, so a pointer to one may be used by every thread.
unsafe impl Send for CurrentWork {}

/// What the workers and the thread that runs a stage share.
///
/// # Invariants
///
/// Published work is there, and stays there until it has been withdrawn and no worker is busy.
#[pin_data]
struct Shared {
    #[pin]
    current_work: SpinLock<CurrentWork>,
    /// Jobs that wait for a worker.
    #[pin]
    waiting: JobCount,
    /// Jobs that workers have run.
    #[pin]
    done: JobCount,
    /// Where the thread that runs a stage waits until no worker is busy.
    #[pin]
    idle: WaitQueue,
}

impl Shared {
    /// The body of a worker.
    fn work(&self, current: &Current) {
        while !current.should_stop() {
            let work = {
                let mut current_work = self.current_work.lock();
                let work = current_work.work;
                current_work.busy += usize::from(work.is_some());
                work
            };
            if let Some(work) = work {
                // SAFETY: By the invariant it is there, as this worker counts as busy.
                unsafe { work.as_ref() }.run_jobs();
                let busy = {
                    let mut current_work = self.current_work.lock();
                    current_work.busy -= 1;
                    current_work.busy
                };
                if busy == 0 {
                    self.idle.wake_up_all();
                }
            }
            self.waiting.poll();
            if !self.waiting.any() {
                // Whether the wait was interrupted does not matter: the loop rechecks everything.
                let awake = || self.waiting.any() || current.should_stop();
                self.waiting.sleep(|queue| {
                    let _ = queue.wait_freezable(awake);
                });
            }
        }
    }

    /// Publishes work for the workers.
    ///
    /// # Context
    ///
    /// Any. Takes a spinlock.
    ///
    /// # Safety
    ///
    /// The work stays where it is until [`Shared::withdraw`] has returned.
    unsafe fn publish(&self, work: &dyn Runnable) {
        let work = NonNull::from(work);
        // SAFETY: The types differ in the lifetime only, which the contract is about.
        let work = unsafe {
            core::mem::transmute::<NonNull<dyn Runnable + '_>, NonNull<dyn Runnable>>(work)
        };
        self.current_work.lock().work = Some(work);
    }

    /// Withdraws the work, and waits until no worker uses it.
    ///
    /// # Context
    ///
    /// Sleeps.
    fn withdraw(&self) {
        self.current_work.lock().work = None;
        self.idle.wait_idle(|| self.current_work.lock().busy == 0);
    }
}

/// The threads that scan beside `rksmd`, the thread that runs the stages.
///
/// A worker that is frozen, or has not woken up yet, is not waited for: the thread that runs the
/// stage runs the jobs itself that no worker has taken.
pub(crate) struct KthreadPool {
    workers: KVec<Kthread>,
    /// CPU time of workers that have been stopped, in nanoseconds.
    stopped_cpu_time: u64,
    shared: Arc<Shared>,
}

impl KthreadPool {
    /// A pool without workers.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        let shared = Arc::pin_init(
            pin_init!(Shared {
                current_work <- new_spinlock!(CurrentWork { work: None, busy: 0 }, "rksm_pool"),
                waiting <- JobCount::new(),
                done <- JobCount::new(),
                idle <- new_wait_queue!(c"rksm_pool_idle"),
            }),
            GFP_KERNEL,
        )?;
        Ok(Self {
            workers: KVec::new(),
            stopped_cpu_time: 0,
            shared,
        })
    }

    /// Resizes the pool to `size` threads, with the one that runs the stages.
    ///
    /// # Context
    ///
    /// Sleeps until threads have started or ended.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; the pool is smaller then.
    pub(crate) fn resize(&mut self, symbols: Symbols, size: usize) -> Result {
        while self.workers.len() + 1 > size {
            let Some(worker) = self.workers.pop() else {
                break;
            };
            self.stopped_cpu_time += worker.cpu_time();
        }
        while self.workers.len() + 1 < size {
            let name = CString::try_from_fmt(fmt!("rksmd/{}", self.workers.len() + 1))?;
            self.workers.reserve(1, GFP_METADATA)?;
            let shared = self.shared.clone();
            let worker = Kthread::run(symbols, &name, NICE, move |current| shared.work(current))?;
            self.workers.push(worker, GFP_METADATA)?;
        }
        Ok(())
    }

    /// Returns the CPU time that the workers have used, in nanoseconds. It never decreases: the
    /// time of workers that have been stopped stays in it.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn cpu_time(&self) -> u64 {
        let running: u64 = self.workers.iter().map(Kthread::cpu_time).sum();
        self.stopped_cpu_time + running
    }
}

/// Reschedules if another task needs the CPU.
///
/// # Context
///
/// May sleep.
fn cond_resched() {
    // SAFETY: Threads of a pool hold no spinlock between jobs.
    unsafe { raw::rksm_cond_resched() };
}

impl WorkerPool for KthreadPool {
    fn run<T: Send + Unpin>(&self, stage: &mut impl Stage<T>, work: impl Fn(&mut T) + Sync) {
        if self.workers.is_empty() {
            while let Some(mut job) = stage.next_job() {
                work(&mut job);
                stage.complete(job);
                cond_resched();
            }
            return;
        }
        let shared = &*self.shared;
        stack_pin_init!(let jobs = pin_init!(Work {
            jobs <- new_spinlock!(Jobs { waiting: Ring::new(), done: Ring::new() }, "rksm_jobs"),
            work,
            waiting: &shared.waiting,
            done: &shared.done,
        }));
        let jobs = jobs.into_ref().get_ref();
        // SAFETY: It is withdrawn below, before `jobs` goes out of scope.
        unsafe { shared.publish(jobs) };
        // Jobs that wait, are being run by a worker, or have been.
        let mut handed_out = 0;
        let most = (self.workers.len() * AHEAD).min(HANDED_OUT);
        // A single job is not worth waking a worker.
        let mut first = stage.next_job();
        loop {
            cond_resched();
            if let Some(job) = jobs.taken_back() {
                handed_out -= 1;
                stage.complete(job);
                continue;
            }
            if shared.waiting.jobs.load(Relaxed) < most && handed_out < HANDED_OUT {
                if let Some(job) = stage.next_job() {
                    handed_out += 1;
                    jobs.post(job);
                    continue;
                }
            }
            let own = first.take().or_else(|| {
                let job = jobs.take();
                job.inspect(|_| handed_out -= 1)
            });
            if let Some(mut job) = own {
                (jobs.work)(&mut job);
                stage.complete(job);
            } else if handed_out == 0 {
                break;
            } else {
                shared.done.poll();
                if !shared.done.any() {
                    shared
                        .done
                        .sleep(|queue| queue.wait_idle(|| shared.done.any()));
                }
            }
        }
        shared.withdraw();
    }
}
