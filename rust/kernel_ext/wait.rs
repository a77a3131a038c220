// SPDX-License-Identifier: GPL-2.0-only

//! Wait queues: sleeping until a condition holds, with no lock of one's own.
//!
//! C header: [`include/linux/wait.h`](srctree/include/linux/wait.h)

use crate::bindings::raw;
use core::{
    marker::PhantomPinned,
    ptr, //
};
use kernel::{
    error::to_result,
    prelude::*,
    sync::LockClassKey,
    task::MAX_SCHEDULE_TIMEOUT,
    time::Jiffies,
    types::Opaque, //
};

/// Creates an initialiser of a [`WaitQueue`] with a lock class of its own.
macro_rules! new_wait_queue {
    ($name:literal) => {
        $crate::kernel_ext::wait::WaitQueue::new($name, ::kernel::static_lock_class!())
    };
}
pub(crate) use new_wait_queue;

/// Whether a signal waits for the current task to return to user space.
///
/// # Context
///
/// Any task.
pub(crate) fn signal_pending() -> bool {
    // SAFETY: Reads the current task's state.
    unsafe { raw::rksm_signal_pending() }
}

/// A `struct wait_queue_head`.
///
/// A wait ends when its condition is true; the condition is evaluated again at each wake-up. The
/// task that makes it true must wake the queue afterwards. Conditions run while the task is already
/// marked as sleeping: they must not sleep, and should only read atomics or take a spinlock.
#[pin_data]
pub(crate) struct WaitQueue {
    #[pin]
    head: Opaque<raw::wait_queue_head>,
    /// The head is a list that refers to itself.
    #[pin]
    _pin: PhantomPinned,
}

// SAFETY: A wait queue head may be used from every thread; it has a lock of its own.
unsafe impl Send for WaitQueue {}
// SAFETY: All its functions take the lock of the head, or only read it.
unsafe impl Sync for WaitQueue {}

impl WaitQueue {
    /// Initialises a wait queue; see [`new_wait_queue`].
    pub(crate) fn new(name: &'static CStr, key: Pin<&'static LockClassKey>) -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `slot` may be written to; name and key live for ever.
            head <- Opaque::ffi_init(|slot| unsafe {
                raw::__init_waitqueue_head(
                    slot,
                    name.as_char_ptr(),
                    key.as_ptr(),
                )
            }),
            _pin: PhantomPinned,
        })
    }

    /// Sleeps until `condition`, interruptible by signals (`wait_event_freezable`).
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ERESTARTSYS` when a signal came; kernel threads get none.
    pub(crate) fn wait_freezable(&self, condition: impl FnMut() -> bool) -> Result {
        let state = raw::TASK_INTERRUPTIBLE | raw::TASK_FREEZABLE;
        self.wait(state, MAX_SCHEDULE_TIMEOUT, condition)
            .map(|_| ())
    }

    /// Sleeps until `condition`, for at most `timeout` jiffies (`wait_event_freezable_timeout`).
    ///
    /// Returns whether the condition was true in the end.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ERESTARTSYS` when a signal came.
    pub(crate) fn wait_freezable_timeout(
        &self,
        timeout: Jiffies,
        condition: impl FnMut() -> bool,
    ) -> Result<bool> {
        let state = raw::TASK_INTERRUPTIBLE | raw::TASK_FREEZABLE;
        let timeout = c_long::try_from(timeout).unwrap_or(MAX_SCHEDULE_TIMEOUT);
        self.wait(state, timeout, condition)
    }

    /// Sleeps until `condition`, uninterruptibly and without adding to the load
    /// (`wait_event_idle`).
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn wait_idle(&self, condition: impl FnMut() -> bool) {
        // No signal ends this one, so there is no error.
        let _ = self.wait(raw::TASK_IDLE, MAX_SCHEDULE_TIMEOUT, condition);
    }

    /// Sleeps until `condition` or a fatal signal (`wait_event_killable`).
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ERESTARTSYS` when a fatal signal came.
    pub(crate) fn wait_killable(&self, condition: impl FnMut() -> bool) -> Result {
        self.wait(raw::TASK_KILLABLE, MAX_SCHEDULE_TIMEOUT, condition)
            .map(|_| ())
    }

    /// Wakes one task of those in an interruptible wait (`wake_up_interruptible`).
    ///
    /// # Context
    ///
    /// Any. Takes the lock of the queue.
    pub(crate) fn wake_up_interruptible(&self) {
        self.wake(raw::TASK_INTERRUPTIBLE, 1);
    }

    /// Wakes every sleeper, interruptible or not (`wake_up_all`).
    ///
    /// # Context
    ///
    /// Any. Takes the lock of the queue.
    pub(crate) fn wake_up_all(&self) {
        self.wake(raw::TASK_INTERRUPTIBLE | raw::TASK_UNINTERRUPTIBLE, 0);
    }

    fn wake(&self, mode: c_uint, count: c_int) {
        // SAFETY: The head has been initialised in `new`, and is pinned.
        unsafe { raw::__wake_up(self.head.get(), mode, count, ptr::null_mut()) };
    }

    /// Sleeps until `condition` or for `timeout` jiffies; says whether the condition was true.
    fn wait(
        &self,
        state: c_uint,
        mut timeout: c_long,
        mut condition: impl FnMut() -> bool,
    ) -> Result<bool> {
        kernel::task::might_sleep();
        if condition() {
            return Ok(true);
        }

        let entry = Opaque::<raw::wait_queue_entry>::uninit();
        // SAFETY: `entry` is on this stack, and leaves the queue before it goes.
        unsafe { raw::init_wait_entry(entry.get(), 0) };
        let outcome = loop {
            // SAFETY: Head and entry are initialised. The state is one for sleeping.
            let signal =
                unsafe { raw::prepare_to_wait_event(self.head.get(), entry.get(), state as c_int) };
            if condition() {
                break Ok(true);
            }
            // Comes only where `state` lets signals end the wait.
            if signal != 0 {
                break to_result(signal as c_int).map(|()| false);
            }
            if timeout == 0 {
                break Ok(false);
            }
            // SAFETY: Called from a context that may sleep.
            timeout = unsafe { raw::schedule_timeout(timeout) };
        };
        // SAFETY: Takes `entry` off the queue if it is still there, and marks the task as running.
        unsafe { raw::finish_wait(self.head.get(), entry.get()) };
        outcome
    }
}
