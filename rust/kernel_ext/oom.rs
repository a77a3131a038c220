// SPDX-License-Identifier: GPL-2.0-only

//! Which task is killed first when memory runs out.
//!
//! C header: [`include/linux/oom.h`](srctree/include/linux/oom.h)

use crate::bindings::raw;
use kernel::types::NotThreadSafe;

/// Marks the current task as the one that the OOM killer takes first, until this is dropped.
pub(crate) struct OomOrigin(NotThreadSafe);

impl OomOrigin {
    /// Marks the task.
    ///
    /// # Context
    ///
    /// Any, in a task.
    pub(crate) fn new() -> Self {
        // SAFETY: Sets a flag of the current task's signal struct, which is there while it runs.
        unsafe { raw::rksm_set_current_oom_origin() };
        Self(NotThreadSafe)
    }
}

impl Drop for OomOrigin {
    fn drop(&mut self) {
        // SAFETY: Clears the flag; the task is the one that `new` marked, as this is not `Send`.
        unsafe { raw::rksm_clear_current_oom_origin() };
    }
}
