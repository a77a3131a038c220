// SPDX-License-Identifier: GPL-2.0-only

//! Who is to be killed when memory runs out.

use crate::bindings::raw;

/// Marks the current task as the one to kill if memory runs out while it unmerges, until this is dropped.
pub(crate) struct OomOrigin(());

impl OomOrigin {
    /// Marks the task.
    pub(crate) fn new() -> Self {
        // SAFETY: Sets a flag of the current task's signal struct.
        unsafe { raw::rksm_set_current_oom_origin() };
        Self(())
    }
}

impl Drop for OomOrigin {
    fn drop(&mut self) {
        // SAFETY: As above.
        unsafe { raw::rksm_clear_current_oom_origin() };
    }
}
