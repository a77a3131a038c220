// SPDX-License-Identifier: GPL-2.0-only

//! The places where a race could happen, made wide enough that tests meet it often.
//!
//! Each place is a no-op in the code until the module is loaded with `delay=`, which patches all of
//! them: then each waits now and then, for a random time.
//!
//! C header: [`include/linux/jump_label.h`](srctree/include/linux/jump_label.h)

use crate::bindings::raw;
use kernel::{
    jump_label::static_branch_unlikely,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
};

/// The longest wait, µs. Not 0 where the static key is on.
static LIMIT: Atomic<u32> = Atomic::new(0);

/// The longest wait, µs, where the caller must not sleep.
const MAX_SPIN: usize = 200;

/// One time in so many there is a wait.
const RARELY: usize = 8;

/// Makes all places wait, for at most so many µs. With 0 they stay as they are.
///
/// # Context
///
/// May sleep. Called once, before any of the places is reached.
pub(crate) fn widen(micros: u32) {
    if micros > 0 {
        LIMIT.store(micros, Relaxed);
        // SAFETY: The key is that of this module, whose code is loaded and may be patched.
        unsafe { raw::rksm_race_windows_enable() };
    }
}

/// Whether the places wait at all.
#[inline(always)]
fn widened() -> bool {
    // SAFETY: `rksm_race_windows` is defined in C, and its `key` is a static key.
    unsafe { static_branch_unlikely!(raw::rksm_race_windows, raw::rksm_static_key, key) }
}

/// Draws how long to wait this time, µs; `None` most of the time.
fn draw() -> Option<usize> {
    let limit = LIMIT.load(Relaxed) as usize;
    // SAFETY: May be called in any context.
    let random = unsafe { raw::get_random_u64() } as usize;
    (random % RARELY == 0).then(|| (random >> 32) % limit.max(1) + 1)
}

/// A place where the caller may sleep.
///
/// # Context
///
/// May sleep.
#[inline(always)]
pub(crate) fn sleep() {
    #[cold]
    fn wait() {
        if let Some(micros) = draw() {
            // SAFETY: The caller may sleep.
            unsafe { raw::rksm_usleep(micros) };
        }
    }
    if widened() {
        wait();
    }
}

/// A place where the caller must not sleep.
///
/// # Context
///
/// Any.
#[inline(always)]
pub(crate) fn spin() {
    #[cold]
    fn wait() {
        if let Some(micros) = draw() {
            // SAFETY: Waits without sleeping, for less than what `udelay` takes at most.
            unsafe { raw::rksm_udelay(micros.min(MAX_SPIN)) };
        }
    }
    if widened() {
        wait();
    }
}
