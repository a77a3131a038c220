// SPDX-License-Identifier: GPL-2.0-only

//! Threads that work together: one leads, and the others help.

use crate::engine::worker_pool::{
    Stage,
    WorkerPool, //
};
use crate::{
    bindings::raw,
    kernel_ext::{
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

/// Jobs that the leader has handed out, at most.
const HANDED_OUT: usize = 16;

/// Jobs that wait for each helper, at most, before the leader does one: a helper that finds none falls asleep.
const AHEAD: usize = 4;

/// Jobs of a leader: those that wait for somebody to do them, and those that are done.
struct Jobs<T> {
    waiting: Few<T>,
    done: Few<T>,
}

/// Up to [`HANDED_OUT`] of something, in order.
struct Few<T> {
    items: [Option<T>; HANDED_OUT],
    first: usize,
    len: usize,
}

impl<T> Few<T> {
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

/// How long a thread that has nothing to do looks out for something before it falls asleep, in µs: about what it takes to
/// wake it.
const LOOK_OUT: i64 = 100;

/// What helpers can do for a leader.
#[pin_data]
struct Work<'a, T, F> {
    #[pin]
    jobs: SpinLock<Jobs<T>>,
    work: F,
    waiting: &'a Signal,
    done: &'a Signal,
}

/// The same, for helpers who need not know of what kind it is.
trait Help: Sync {
    /// Does what waits.
    fn help(&self);
}

impl<T: Send + Unpin, F: Fn(&mut T) + Sync> Help for Work<'_, T, F> {
    fn help(&self) {
        while let Some(mut job) = self.take() {
            (self.work)(&mut job);
            self.jobs.lock().done.push(job);
            self.done.add();
            cond_resched();
        }
    }
}

impl<T: Send + Unpin, F> Work<'_, T, F> {
    /// Has a job wait for somebody to do it.
    fn post(&self, job: T) {
        self.jobs.lock().waiting.push(job);
        self.waiting.add();
    }

    /// Takes a job to do it.
    fn take(&self) -> Option<T> {
        let job = self.jobs.lock().waiting.pop();
        job.inspect(|_| self.waiting.remove())
    }

    /// Takes a job that a helper has done.
    fn taken_back(&self) -> Option<T> {
        let job = self.jobs.lock().done.pop();
        job.inspect(|_| self.done.remove())
    }
}

/// How many jobs there are, and who waits for some.
#[pin_data]
struct Signal {
    jobs: Atomic<usize>,
    sleepers: Atomic<usize>,
    #[pin]
    queue: WaitQueue,
}

impl Signal {
    /// No jobs.
    fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            jobs: Atomic::new(0),
            sleepers: Atomic::new(0),
            queue <- new_wait_queue!(c"rksm_team"),
        })
    }

    /// There is one more.
    fn add(&self) {
        // Who falls asleep counts itself, and then looks at the jobs: one of both sees the other.
        self.jobs.fetch_add(1, Full);
        if self.sleepers.load(Relaxed) > 0 {
            self.queue.wake_up_all();
        }
    }

    /// There is one less.
    fn remove(&self) {
        self.jobs.fetch_sub(1, Relaxed);
    }

    fn any(&self) -> bool {
        self.jobs.load(Relaxed) > 0
    }

    /// Waits for one for a short time. May sleep.
    fn look_out(&self) {
        let look = || {
            cond_resched();
            Ok(self.any())
        };
        let within = Delta::from_micros(LOOK_OUT);
        let _ = read_poll_timeout(look, |any| *any, Delta::ZERO, within);
    }

    /// Calls `wait` with the queue, who sleeps until there is one, or until something else has happened.
    fn sleep(&self, wait: impl FnOnce(&WaitQueue)) {
        self.sleepers.fetch_add(1, Full);
        wait(&self.queue);
        self.sleepers.fetch_sub(1, Relaxed);
    }
}

/// What the helpers are to do.
struct Post {
    work: Option<NonNull<dyn Help>>,
    /// Helpers that may use it.
    busy: usize,
}

// SAFETY: Work is for all threads.
unsafe impl Send for Post {}

/// Where work is posted.
///
/// # Invariants
///
/// Work that is posted is there, and what was for as long as helpers are busy.
#[pin_data]
struct Board {
    #[pin]
    post: SpinLock<Post>,
    /// Jobs that wait for a helper.
    #[pin]
    waiting: Signal,
    /// Jobs that helpers have done.
    #[pin]
    done: Signal,
    /// Where the leader waits until no helper is busy.
    #[pin]
    left: WaitQueue,
}

impl Board {
    /// The body of a helper.
    fn help(&self, current: &Current) {
        while !current.should_stop() {
            let work = {
                let mut post = self.post.lock();
                let work = post.work;
                post.busy += usize::from(work.is_some());
                work
            };
            if let Some(work) = work {
                // SAFETY: It is there by the invariant, as this helper is busy.
                unsafe { work.as_ref() }.help();
                let busy = {
                    let mut post = self.post.lock();
                    post.busy -= 1;
                    post.busy
                };
                if busy == 0 {
                    self.left.wake_up_all();
                }
            }
            self.waiting.look_out();
            if !self.waiting.any() {
                // An interrupted wait is none to worry about: the loop looks at everything again.
                let awake = || self.waiting.any() || current.should_stop();
                self.waiting.sleep(|queue| {
                    let _ = queue.wait_freezable(awake);
                });
            }
        }
    }

    /// Has helpers work.
    ///
    /// # Safety
    ///
    /// The work is there until [`Board::take_down`] has returned.
    unsafe fn put_up(&self, work: &dyn Help) {
        let work = NonNull::from(work);
        // SAFETY: The types differ in the lifetime only, which the contract is about.
        let work =
            unsafe { core::mem::transmute::<NonNull<dyn Help + '_>, NonNull<dyn Help>>(work) };
        self.post.lock().work = Some(work);
    }

    /// Takes down what is posted, and waits until no helper uses it. Sleeps.
    fn take_down(&self) {
        self.post.lock().work = None;
        self.left.wait_idle(|| self.post.lock().busy == 0);
    }
}

/// The threads that scan besides `rksmd`, which leads them.
///
/// A helper that is frozen, or has not come by yet, is not waited for: the leader does what nobody else does.
pub(crate) struct Team {
    helpers: KVec<Kthread>,
    board: Arc<Board>,
}

impl Team {
    /// A leader without helpers.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        let board = Arc::pin_init(
            pin_init!(Board {
                post <- new_spinlock!(Post { work: None, busy: 0 }, "rksm_team"),
                waiting <- Signal::new(),
                done <- Signal::new(),
                left <- new_wait_queue!(c"rksm_team_left"),
            }),
            GFP_KERNEL,
        )?;
        Ok(Self {
            helpers: KVec::new(),
            board,
        })
    }

    /// Has the team be of `size` threads, with the leader. Sleeps.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; the team is smaller then.
    pub(crate) fn resize(&mut self, symbols: Symbols, size: usize) -> Result {
        while self.helpers.len() + 1 > size && self.helpers.pop().is_some() {}
        while self.helpers.len() + 1 < size {
            let name = CString::try_from_fmt(fmt!("rksmd/{}", self.helpers.len() + 1))?;
            self.helpers.reserve(1, GFP_KERNEL)?;
            let board = self.board.clone();
            let helper = Kthread::run(symbols, &name, NICE, move |current| board.help(current))?;
            self.helpers.push(helper, GFP_KERNEL)?;
        }
        Ok(())
    }

    /// The CPU time that the helpers have used, in nanoseconds.
    pub(crate) fn cpu_time(&self) -> u64 {
        self.helpers.iter().map(Kthread::cpu_time).sum()
    }
}

/// Lets others have the CPU if they need it. May sleep.
fn cond_resched() {
    // SAFETY: Threads of a team hold no spinlock between jobs.
    unsafe { raw::rksm_cond_resched() };
}

impl WorkerPool for Team {
    fn run<T: Send + Unpin>(&self, stage: &mut impl Stage<T>, work: impl Fn(&mut T) + Sync) {
        if self.helpers.is_empty() {
            while let Some(mut job) = stage.next_job() {
                work(&mut job);
                stage.complete(job);
                cond_resched();
            }
            return;
        }
        let board = &*self.board;
        stack_pin_init!(let jobs = pin_init!(Work {
            jobs <- new_spinlock!(Jobs { waiting: Few::new(), done: Few::new() }, "rksm_jobs"),
            work,
            waiting: &board.waiting,
            done: &board.done,
        }));
        let jobs = jobs.into_ref().get_ref();
        // SAFETY: It is taken down below.
        unsafe { board.put_up(jobs) };
        // Jobs that wait, that a helper is at, or that one has done.
        let mut handed_out = 0;
        let most = (self.helpers.len() * AHEAD).min(HANDED_OUT);
        // The first one is nothing to call helpers for, if there is no other.
        let mut first = stage.next_job();
        loop {
            cond_resched();
            if let Some(job) = jobs.taken_back() {
                handed_out -= 1;
                stage.complete(job);
                continue;
            }
            if board.waiting.jobs.load(Relaxed) < most && handed_out < HANDED_OUT {
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
                board.done.look_out();
                if !board.done.any() {
                    board
                        .done
                        .sleep(|queue| queue.wait_idle(|| board.done.any()));
                }
            }
        }
        board.take_down();
    }
}
