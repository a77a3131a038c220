// SPDX-License-Identifier: GPL-2.0-only

//! How much memory there is, and whether it is swapped.
//!
//! C headers: [`include/linux/mm.h`](srctree/include/linux/mm.h),
//! [`include/linux/vmstat.h`](srctree/include/linux/vmstat.h)

use crate::bindings::raw;

/// Returns the pages that are available for processes without swapping (`si_mem_available`).
///
/// # Context
///
/// Any.
pub(crate) fn available_pages() -> usize {
    // SAFETY: Reads counters of the kernel that are always there.
    unsafe { raw::rksm_available_pages() }
}

/// Returns the pages of memory (`totalram_pages`).
///
/// # Context
///
/// Any.
pub(crate) fn total_pages() -> usize {
    // SAFETY: Reads a counter of the kernel that is always there.
    unsafe { raw::rksm_total_pages() }
}

/// Returns how many pages have been swapped in or out since the boot. Takes time in proportion to
/// the number of CPUs.
///
/// # Context
///
/// Any.
pub(crate) fn swapped_pages() -> usize {
    // SAFETY: Reads counters of the kernel that are always there.
    unsafe { raw::rksm_swapped_pages() }
}
