// SPDX-License-Identifier: GPL-2.0-only

//! Unmerging: giving every mapping of a merged page a page of its own.

use crate::{
    kernel_ext::{
        mm::PinnedMm,
        race_window,
        wait::signal_pending, //
    },
    ksm::{
        page::{
            mergeable_from,
            NextVma, //
        },
        replace_pte, //
    }, //
};
use kernel::prelude::*;

/// The most faults under one mmap lock.
const FAULTS: usize = 64;

/// The most vmas that are passed under one mmap lock.
const VMAS: usize = 4096;

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
    while let Some(user) = mm.mmget_not_zero() {
        race_window::sleep();
        if signal_pending() {
            return Err(ERESTARTSYS);
        }
        let guard = mm.mmap_read_lock_interruptible()?;
        let Some(live) = guard.live() else {
            break;
        };
        let mut vmas = 0;
        let step = || {
            vmas += 1;
            vmas <= VMAS
        };
        let vma = match mergeable_from(live, at, usize::MAX, step) {
            NextVma::Found(vma) => vma,
            NextVma::Stopped(next) => {
                at = next;
                continue;
            }
            NextVma::End => break,
        };
        let start = at.max(vma.start());
        at = replace_pte::break_ksm(&user, vma, start, vma.end(), FAULTS)?.unwrap_or(vma.end());
        race_window::sleep();
    }
    Ok(())
}
