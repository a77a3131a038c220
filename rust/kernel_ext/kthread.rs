// SPDX-License-Identifier: GPL-2.0-only

//! Kernel threads.
//!
//! C header: [`include/linux/kthread.h`](srctree/include/linux/kthread.h)

use crate::{
    bindings::raw,
    kernel_ext::symbols::Symbols, //
};
use core::ptr::NonNull;
use kernel::{
    error::from_err_ptr,
    prelude::*,
    types::NotThreadSafe, //
};

/// A kernel thread. Dropping it stops the thread, and sleeps until its body has returned.
///
/// The thread's body must return soon once [`Current::should_stop`] is true; stopping also wakes
/// the thread up from every wait, so a wait must have it in its condition.
///
/// # Invariants
///
/// `task` is the thread, of which this holds a reference. `body` is the box it was created with,
/// which is the thread's as soon as it runs, and `free` frees it.
pub(crate) struct Kthread {
    task: NonNull<raw::task_struct>,
    body: *mut c_void,
    free: unsafe fn(*mut c_void),
}

// SAFETY: All that is done with the task may be done from every thread. `body` is of a type that
// is `Send`, and is touched here only where the thread never ran.
unsafe impl Send for Kthread {}
// SAFETY: There is nothing to do with a shared reference.
unsafe impl Sync for Kthread {}

struct Body<T> {
    nice: c_long,
    run: T,
}

/// The current thread, which is a [`Kthread`].
pub(crate) struct Current(NotThreadSafe);

impl Current {
    /// Whether the thread is being stopped.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn should_stop(&self) -> bool {
        // SAFETY: The current thread is a kthread, which this type shows.
        unsafe { raw::kthread_should_stop() }
    }

    /// The CPU time this thread has used, in nanoseconds.
    ///
    /// # Context
    ///
    /// Any. Takes the lock of the run queue.
    pub(crate) fn cpu_time(&self) -> u64 {
        // SAFETY: The current task is there as long as it runs; the function has been resolved, as
        // every `Kthread` shows.
        unsafe { raw::task_sched_runtime(kernel::task::Task::current_raw()) }
    }

    /// Whether the freezer wants this thread to stop for a while, which it does in its next
    /// freezable wait.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn freezing(&self) -> bool {
        // SAFETY: The current task is there as long as it runs.
        unsafe { raw::rksm_freezing(kernel::task::Task::current_raw()) }
    }
}

impl Kthread {
    /// Starts a freezable thread `name` of the given niceness that runs `run`.
    ///
    /// # Context
    ///
    /// Sleeps until the thread has been created.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or `EINTR` when the current task was killed meanwhile.
    pub(crate) fn run<T>(_symbols: Symbols, name: &CStr, nice: i8, run: T) -> Result<Self>
    where
        T: FnOnce(&Current) + Send + 'static,
    {
        let nice = nice.into();
        let body = KBox::into_raw(KBox::new(Body { nice, run }, GFP_KERNEL)?).cast();
        // SAFETY: `main` takes over the box that it is given. The format takes one string.
        let task = unsafe {
            raw::kthread_create_on_node(
                Some(main::<T>),
                body,
                raw::NUMA_NO_NODE,
                c"%s".as_char_ptr(),
                name.as_char_ptr(),
            )
        };
        let task = match from_err_ptr(task).map(NonNull::new) {
            Ok(Some(task)) => task,
            other => {
                // SAFETY: No thread was made, so the box is still ours.
                unsafe { free::<T>(body) };
                return Err(other.err().unwrap_or(ENOMEM));
            }
        };
        // SAFETY: The new thread is there until somebody stops it or its body returns, and it does
        // not run before it is woken.
        unsafe {
            raw::get_task_struct(task.as_ptr());
            raw::wake_up_process(task.as_ptr());
        }
        // INVARIANT: As just made.
        Ok(Self {
            task,
            body,
            free: free::<T>,
        })
    }
}

impl Kthread {
    /// The CPU time the thread has used, in nanoseconds.
    ///
    /// # Context
    ///
    /// Any. Takes the lock of the run queue.
    pub(crate) fn cpu_time(&self) -> u64 {
        // SAFETY: By the type invariant there is a reference to the task.
        unsafe { raw::task_sched_runtime(self.task.as_ptr()) }
    }
}

/// The number of CPUs that are online.
///
/// # Context
///
/// Any.
pub(crate) fn online_cpus() -> u32 {
    // SAFETY: Reads a counter of the kernel that is always there.
    unsafe { raw::rksm_num_online_cpus() }
}

impl Drop for Kthread {
    fn drop(&mut self) {
        // SAFETY: By the type invariant there is a reference to the task, also if it has ended.
        let ended = unsafe { raw::kthread_stop(self.task.as_ptr()) };
        if ended == EINTR.to_errno() {
            // SAFETY: The thread was stopped before it ran (`main` returns 0), so the box is
            // still ours.
            unsafe { (self.free)(self.body) };
        }
        // SAFETY: Gives up the reference of the type invariant.
        unsafe { raw::put_task_struct(self.task.as_ptr()) };
    }
}

/// Frees the box of a thread that never ran.
///
/// # Safety
///
/// `body` is that of a `Kthread::run` with the same `T`, and is still ours.
unsafe fn free<T>(body: *mut c_void) {
    // SAFETY: By the contract.
    drop(unsafe { KBox::from_raw(body.cast::<Body<T>>()) });
}

/// What the thread runs.
///
/// # Safety
///
/// To be called as the function of a new kernel thread only, with the box of a `Kthread::run` with
/// the same `T`, which it takes over.
unsafe extern "C" fn main<T: FnOnce(&Current) + Send + 'static>(data: *mut c_void) -> c_int {
    // SAFETY: `data` is the box of which `Kthread::run` gave up the ownership.
    let body = unsafe { KBox::from_raw(data.cast::<Body<T>>()) };
    let Body { nice, run } = KBox::into_inner(body);
    // SAFETY: The current task is a kthread that is just starting.
    unsafe {
        raw::set_freezable();
        raw::set_user_nice(kernel::task::Task::current_raw(), nice);
    }
    run(&Current(NotThreadSafe));
    0
}
