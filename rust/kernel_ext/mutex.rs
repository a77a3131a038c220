// SPDX-License-Identifier: GPL-2.0-only

//! Locking a mutex unless a signal comes first.
//!
//! C header: [`include/linux/mutex.h`](srctree/include/linux/mutex.h)

use crate::bindings::raw;
use core::ptr;
use kernel::{
    error::to_result,
    prelude::*,
    sync::{
        Mutex,
        MutexGuard, //
    }, //
};

// The state of a lock is a `struct mutex`, and without data there is nothing else.
const _: () = assert!(size_of::<Mutex<()>>() == size_of::<raw::mutex>());

/// Locks a mutex, unless a fatal signal comes first (`mutex_lock_killable`).
///
/// # Context
///
/// May sleep. Takes the mutex.
///
/// # Errors
///
/// `EINTR` when a fatal signal came.
pub(crate) fn lock_killable<T>(mutex: &Mutex<T>) -> Result<MutexGuard<'_, T>> {
    // SAFETY: `lock` passes a mutex that has been initialised.
    lock(mutex, |state| unsafe {
        raw::rksm_mutex_lock_killable(state)
    })
}

/// Locks a mutex, unless a signal comes first (`mutex_lock_interruptible`).
///
/// # Context
///
/// May sleep. Takes the mutex.
///
/// # Errors
///
/// `EINTR` when a signal came.
pub(crate) fn lock_interruptible<T>(mutex: &Mutex<T>) -> Result<MutexGuard<'_, T>> {
    // SAFETY: `lock` passes a mutex that has been initialised.
    lock(mutex, |state| unsafe {
        raw::rksm_mutex_lock_interruptible(state)
    })
}

/// Locks a mutex by a function of the kernel, which returns 0 once it is locked by this task.
fn lock<T>(
    mutex: &Mutex<T>,
    lock: impl FnOnce(*mut raw::mutex) -> c_int,
) -> Result<MutexGuard<'_, T>> {
    // A lock is `repr(C)` and begins with its state, an `Opaque<mutex>` that may be changed through
    // a shared reference and was initialised when the lock was made, as `Lock::from_raw` has it,
    // too.
    let state = ptr::from_ref(mutex).cast_mut().cast::<raw::mutex>();
    to_result(lock(state))?;
    // SAFETY: The mutex has just been locked, by this task.
    Ok(unsafe { MutexGuard::new(mutex, ()) })
}
