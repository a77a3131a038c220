// SPDX-License-Identifier: GPL-2.0-only

//! The module's reference to itself, which keeps `rmmod` away while merged pages point into it.

use crate::bindings::raw;

fn this_module() -> *mut raw::module {
    kernel::module::this_module::<crate::Rksm>().as_ptr()
}

/// Takes a reference. False if the module is being unloaded.
pub(crate) fn get() -> bool {
    // SAFETY: This code is running, so the module is there.
    unsafe { raw::try_module_get(this_module()) }
}

/// Gives up a reference that [`get`] took. The caller runs in a thread that the module's exit waits for, or in a
/// function of a file that it drains.
pub(crate) fn put() {
    // SAFETY: As above.
    unsafe { raw::module_put(this_module()) };
}
