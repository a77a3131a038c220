// SPDX-License-Identifier: GPL-2.0-only

//! The module's reference to itself, which keeps `rmmod` away while merged pages point into it.

use crate::bindings::raw;

/// Takes a reference. Returns false if the module is being unloaded.
///
/// # Context
///
/// Any.
pub(crate) fn get() -> bool {
    // SAFETY: This code is running, so the module is there.
    unsafe { raw::rksm_this_module_get() }
}

/// Gives up a reference that [`get`] took.
///
/// # Context
///
/// Any, in a thread that the module's exit waits for, or in a function of a file that it drains.
pub(crate) fn put() {
    // SAFETY: This code is running, and the context that the caller is in keeps the module until
    // it has returned.
    unsafe { raw::rksm_this_module_put() };
}
