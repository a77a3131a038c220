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
use core::ops::Range;
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
/// # Context
///
/// May sleep. Takes the mmap lock.
///
/// # Errors
///
/// `ENOMEM`, `ERESTARTSYS` where a signal is pending. Pages that have been unshared stay so.
pub(crate) fn unmerge_mm(mm: &PinnedMm) -> Result {
    unmerge_range(mm, &mut (0..usize::MAX), &mut 0, true, || false).map(|_| ())
}

/// As [`unmerge_mm`], for these addresses, until `pause` returns true, which is called after each
/// few faults. Returns whether all is done. Without `wait` it is not where a process holds its mmap
/// lock. `range.start` moves to where to go on, also with an
/// error, and the number of unshared pages is added to `pages`.
///
/// # Context
///
/// As [`unmerge_mm`].
///
/// # Errors
///
/// As [`unmerge_mm`].
pub(crate) fn unmerge_range(
    mm: &PinnedMm,
    range: &mut Range<usize>,
    pages: &mut u64,
    wait: bool,
    mut pause: impl FnMut() -> bool,
) -> Result<bool> {
    while range.start < range.end {
        let Some(user) = mm.mmget_not_zero() else {
            break;
        };
        race_window::sleep();
        if signal_pending() {
            return Err(ERESTARTSYS);
        }
        let guard = match wait {
            true => mm.mmap_read_lock_interruptible()?,
            false => match mm.mmap_read_lock_briefly() {
                Some(guard) => guard,
                None => return Ok(false),
            },
        };
        let Some(live) = guard.live() else {
            break;
        };
        let mut vmas = 0;
        let step = || {
            vmas += 1;
            vmas <= VMAS
        };
        match mergeable_from(live, range.start, range.end, step) {
            NextVma::Found(vma) => {
                let part = range.start.max(vma.start())..vma.end().min(range.end);
                range.start = if part.is_empty() {
                    range.end
                } else {
                    replace_pte::break_ksm(&user, vma, part.clone(), FAULTS, pages)?
                        .unwrap_or(part.end)
                };
            }
            NextVma::Stopped(next) => range.start = next,
            NextVma::End => break,
        }
        race_window::sleep();
        drop(guard);
        if pause() {
            return Ok(false);
        }
    }
    range.start = range.end;
    Ok(true)
}
