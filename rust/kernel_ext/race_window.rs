// SPDX-License-Identifier: GPL-2.0-only

//! Delays at the places where a race would happen, so that tests meet it often.
//!
//! Off, unless the module is loaded with `delay=`; then each place waits now and then, for a random time.

use crate::bindings::raw;
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

/// The longest delay, µs; 0 for none.
static LIMIT: Atomic<u32> = Atomic::new(0);

/// The longest where nobody may sleep.
const MAX_SPIN: usize = 200;

/// One time in so many there is a delay.
const RARELY: usize = 8;

/// Switches delays on, of at most so many µs, or off with 0.
pub(crate) fn set_limit(micros: u32) {
    LIMIT.store(micros, Relaxed);
}

/// How long to wait this time, µs.
fn draw() -> Option<usize> {
    let limit = LIMIT.load(Relaxed) as usize;
    if limit == 0 {
        return None;
    }
    // SAFETY: Has no preconditions.
    let random = unsafe { raw::get_random_u64() } as usize;
    (random % RARELY == 0).then_some((random >> 32) % limit + 1)
}

/// A place where one may sleep, but for spinlocks.
#[inline]
pub(crate) fn sleep() {
    if let Some(micros) = draw() {
        // SAFETY: The caller may sleep.
        unsafe { raw::rksm_usleep(micros) };
    }
}

/// A place where nobody may sleep.
#[inline]
pub(crate) fn spin() {
    if let Some(micros) = draw() {
        // SAFETY: Has no preconditions.
        unsafe { raw::rksm_udelay(micros.min(MAX_SPIN)) };
    }
}
