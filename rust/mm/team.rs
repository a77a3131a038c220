// SPDX-License-Identifier: GPL-2.0

//! Threads that work together: one has something done for each of several items, and the others help.

use super::{
    kthread::{
        Current,
        Kthread, //
    },
    symbols::Symbols,
    wait::{
        new_wait_queue,
        WaitQueue, //
    },
};
use crate::engine::lane::Crew;
use core::ptr::NonNull;
use kernel::{
    new_spinlock,
    prelude::*,
    str::CString,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        SpinLock, //
    },
};

/// Niceness of the threads: that of `ksmd`.
pub(crate) const NICE: i8 = 5;

/// Something to be done for each item of a slice.
///
/// # Invariants
///
/// `items` points to `len` items of the type, and `work` to a closure of the type, that `run` is for. Each item is for who
/// draws its number from `next`.
struct Job {
    next: Atomic<usize>,
    len: usize,
    items: *mut c_void,
    work: *const c_void,
    run: unsafe fn(*mut c_void, *const c_void, usize),
}

impl Job {
    fn has_items(&self) -> bool {
        self.next.load(Relaxed) < self.len
    }

    /// Does what is left.
    fn help(&self) {
        loop {
            let i = self.next.fetch_add(1, Relaxed);
            if i >= self.len {
                break;
            }
            // SAFETY: By the invariant; nobody else has drawn this number.
            unsafe { (self.run)(self.items, self.work, i) };
        }
    }
}

/// Calls a closure `F` with an item `T`.
///
/// # Safety
///
/// `items` points to more than `i` items, of which the `i`th is for the caller alone, and `work` to a closure that any thread
/// may call.
unsafe fn run<T: Send, F: Fn(&mut T) + Sync>(items: *mut c_void, work: *const c_void, i: usize) {
    // SAFETY: By the contract.
    unsafe { (*work.cast::<F>())(&mut *items.cast::<T>().add(i)) };
}

/// What the helpers are to do.
struct Post {
    job: Option<NonNull<Job>>,
    /// Helpers that may use it.
    busy: usize,
}

// SAFETY: A job is for all threads.
unsafe impl Send for Post {}

/// Where jobs are posted.
///
/// # Invariants
///
/// A job that is posted is there, and one that was for as long as helpers are busy.
#[pin_data]
struct Board {
    #[pin]
    post: SpinLock<Post>,
    /// Where helpers wait for a job.
    #[pin]
    posted: WaitQueue,
    /// Where the leader waits until no helper is busy.
    #[pin]
    done: WaitQueue,
}

impl Board {
    /// The body of a helper.
    fn help(&self, current: &Current) {
        while !current.should_stop() {
            let job = {
                let mut post = self.post.lock();
                let job = post.job;
                post.busy += usize::from(job.is_some());
                job
            };
            if let Some(job) = job {
                // SAFETY: It is there by the invariant, as this helper is busy.
                unsafe { job.as_ref() }.help();
                let busy = {
                    let mut post = self.post.lock();
                    post.busy -= 1;
                    post.busy
                };
                if busy == 0 {
                    self.done.wake_up_all();
                }
            }
            // An interrupted wait is none to worry about: the loop looks at everything again.
            let _ = self.posted.wait_freezable(|| {
                let post = self.post.lock();
                // SAFETY: It is there by the invariant.
                let job = post.job.map(|job| unsafe { job.as_ref() });
                let has_items = job.is_some_and(Job::has_items);
                has_items || current.should_stop()
            });
        }
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
                post <- new_spinlock!(Post { job: None, busy: 0 }, "rksm_team"),
                posted <- new_wait_queue!(c"rksm_team_posted"),
                done <- new_wait_queue!(c"rksm_team_done"),
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

impl Crew for Team {
    fn each<T: Send>(&self, items: &mut [T], work: impl Fn(&mut T) + Sync) {
        if self.helpers.is_empty() || items.len() < 2 {
            items.iter_mut().for_each(work);
            return;
        }
        /// Names the closure's type.
        fn runs<T: Send, F: Fn(&mut T) + Sync>(
            _work: &F,
        ) -> unsafe fn(*mut c_void, *const c_void, usize) {
            run::<T, F>
        }
        // INVARIANT: The items are borrowed until this returns, and so is the closure.
        let job = Job {
            next: Atomic::new(0),
            len: items.len(),
            items: items.as_mut_ptr().cast(),
            work: (&raw const work).cast(),
            run: runs::<T, _>(&work),
        };
        // INVARIANT: The job is there until no helper is busy with it any more, see below.
        self.board.post.lock().job = Some(NonNull::from(&job));
        self.board.posted.wake_up_interruptible();
        job.help();
        self.board.post.lock().job = None;
        self.board
            .done
            .wait_idle(|| self.board.post.lock().busy == 0);
    }
}
