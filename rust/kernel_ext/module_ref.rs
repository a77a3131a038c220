// SPDX-License-Identifier: GPL-2.0-only

//! The module's reference to itself, which keeps `rmmod` away while merged pages point into it.

use crate::bindings::raw;

/// A reference to the module.
///
/// # Context
///
/// Dropping: any, in a thread that the module's exit waits for, or in a function of a file that it
/// drains.
///
/// # Invariants
///
/// Owns one reference.
pub(crate) struct ModuleRef(());

impl ModuleRef {
    /// Takes a reference; `None` if the module is being unloaded.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn get() -> Option<Self> {
        // SAFETY: This code is running, so the module is there.
        // INVARIANT: A reference has been taken.
        unsafe { raw::rksm_this_module_get() }.then(|| Self(()))
    }
}

impl Drop for ModuleRef {
    fn drop(&mut self) {
        // SAFETY: By the invariant there is a reference to give up. The context that the caller is
        // in keeps the module until it has returned.
        unsafe { raw::rksm_this_module_put() };
    }
}
