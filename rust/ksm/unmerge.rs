// SPDX-License-Identifier: GPL-2.0-only

//! Unmerging: giving every mapping of a merged page a page of its own.

use crate::{
    kernel_ext::{
        mm::PinnedMm,
        race_window, //
    },
    ksm::{
        page::{
            self,
            WALK_SPAN, //
        },
        replace_pte, //
    }, //
};
use kernel::prelude::*;

/// The most faults under one mmap lock.
const FAULTS: usize = 64;

/// Unshares all merged pages of an mm that are mapped in mergeable vmas.
///
/// The mm is pinned by `mm_users`, and its mmap lock held, only for a few faults at a time: in the
/// gaps the memory of a process that has been killed can be freed.
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
        let Some(vma) = page::mergeable_from(live, at) else {
            break;
        };
        let start = at.max(vma.start());
        let end = vma.end().min(start.saturating_add(WALK_SPAN));
        at = replace_pte::break_ksm(vma, start, end, FAULTS)?.unwrap_or(end);
        race_window::sleep();
    }
    Ok(())
}
