// SPDX-License-Identifier: GPL-2.0-only

//! Unmerging: giving every mapping of a merged page a page of its own.

use crate::{
    bindings::raw,
    kernel_ext::{
        mm::PinnedMm,
        race_window, //
    },
    ksm::replace_pte, //
};
use kernel::prelude::*;

/// Most bytes of address space that are walked under one mmap lock.
const SPAN: usize = 1 << 30;

/// Most faults under one mmap lock.
const FAULTS: usize = 64;

/// Unshares all merged pages of an mm that are mapped in mergeable vmas.
///
/// The mm is pinned by `mm_users`, and its mmap lock held, only for a few faults at a time: the memory of a process
/// that is killed meanwhile goes at the next of these gaps. May sleep for long.
///
/// # Errors
///
/// `ENOMEM`, `ERESTARTSYS` where a signal is pending. Pages that have been unshared stay so.
pub(crate) fn unmerge_mm(mm: &PinnedMm) -> Result {
    let mut at = 0;
    while let Some(_user) = mm.mmget_not_zero() {
        race_window::sleep();
        let guard = mm.mmap_read_lock();
        let Some(live) = guard.live() else {
            break;
        };
        let Some(vma) = live.mergeable_from(at) else {
            break;
        };
        let start = at.max(vma.start());
        let end = vma.end().min(start.saturating_add(SPAN));
        at = replace_pte::break_ksm(vma, start, end, FAULTS)?.unwrap_or(end);
        race_window::sleep();
    }
    Ok(())
}

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
