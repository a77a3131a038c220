// SPDX-License-Identifier: GPL-2.0-only

//! The `ksm:*` trace events, fired as the built-in KSM fires them.
//!
//! # What `err` shows
//!
//! `ksm_merge_one_page` and `ksm_merge_with_ksm_page` show 0 in `err` for a page that was merged.
//! Otherwise `err` says why it was not, by the number that
//! [`trace_code`](crate::engine::types::Refusal::trace_code) gives to the reason. The numbers lie
//! beyond the kernel's own errnos and do not change. The built-in shows `-EFAULT` for all of them.
//!
//! | `err` | reason       | meaning                                                       |
//! |-------|--------------|---------------------------------------------------------------|
//! | -1001 | `gone`       | the vma or the mapping is gone, or no longer mergeable        |
//! | -1002 | `locked`     | another task holds the lock of the folio                      |
//! | -1003 | `pinned`     | a reference exists that could write to the page               |
//! | -1004 | `differs`    | the contents differ                                           |
//! | -1005 | `unsplit`    | the huge page could not be split                              |
//! | -1006 | `same`       | both addresses map the same page already                      |
//! | -1007 | `no_memory`  | no memory for the bookkeeping                                 |
//! | -1008 | `busy`       | the KSM page is locked, being migrated or poisoned            |
//! | -1009 | `stale`      | the KSM page has been freed                                   |
//! | -1010 | `far_node`   | another NUMA node, and `merge_across_nodes` is 0              |
//! | -1011 | `userfault`  | the entry is protected for a userfaultfd                      |

use crate::{
    bindings::raw,
    kernel_ext::symbols::Symbols, //
};
use kernel::{
    mm::Mm,
    prelude::*, //
};

/// Fires the `ksm` trace events as the built-in KSM fires them. An event costs one load while it is
/// not traced.
///
/// # Invariants
///
/// The tracepoints are resolved.
#[derive(Clone, Copy)]
pub(crate) struct Trace(());

impl Trace {
    /// Creates it; `_symbols` proves that the tracepoints are resolved.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn new(_symbols: Symbols) -> Self {
        // INVARIANT: There are `Symbols` only when everything in them is resolved.
        Self(())
    }

    /// A full scan begins: how many were completed, and how many pages are tracked.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn start_scan(self, seq: u64, rmap_entries: usize) {
        // SAFETY: The tracepoint is resolved by the invariant, and only reads its arguments.
        unsafe { raw::rksm_trace_ksm_start_scan(seq as c_int, rmap_entries as u32) }
    }

    /// A full scan ends.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn stop_scan(self, seq: u64, rmap_entries: usize) {
        // SAFETY: The tracepoint is resolved by the invariant, and only reads its arguments.
        unsafe { raw::rksm_trace_ksm_stop_scan(seq as c_int, rmap_entries as u32) }
    }

    /// rksm tried to merge a page with one that is not a KSM page yet, or with the zero page. The
    /// rmap item is only an address to print.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn merge_one_page(self, pfn: usize, rmap_item: usize, mm: &Mm, err: Result) {
        // SAFETY: The tracepoint is resolved by the invariant, and prints the pointers without
        // following them.
        unsafe {
            raw::rksm_trace_ksm_merge_one_page(
                pfn,
                rmap_item as *mut c_void,
                mm.as_raw().cast(),
                errno(err),
            )
        }
    }

    /// rksm tried to merge a page with a KSM page, whose `struct page` is at `ksm_page`.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn merge_with_ksm_page(
        self,
        ksm_page: usize,
        pfn: usize,
        rmap_item: usize,
        mm: &Mm,
        err: Result,
    ) {
        // SAFETY: The tracepoint is resolved by the invariant, and prints the pointers without
        // following them.
        unsafe {
            raw::rksm_trace_ksm_merge_with_ksm_page(
                ksm_page as *mut c_void,
                pfn,
                rmap_item as *mut c_void,
                mm.as_raw().cast(),
                errno(err),
            )
        }
    }

    /// A stable node is removed.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn remove_ksm_page(self, pfn: usize) {
        // SAFETY: The tracepoint is resolved by the invariant, and only reads its arguments.
        unsafe { raw::rksm_trace_ksm_remove_ksm_page(pfn) }
    }

    /// An rmap item leaves its stable node.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn remove_rmap_item(self, pfn: usize, rmap_item: usize, mm: &Mm) {
        // SAFETY: The tracepoint is resolved by the invariant, and prints the pointers without
        // following them.
        unsafe {
            raw::rksm_trace_ksm_remove_rmap_item(pfn, rmap_item as *mut c_void, mm.as_raw().cast())
        }
    }

    /// The advisor has set `pages_to_scan`: the last full scan took `scan_time` seconds.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn advisor(self, scan_time: i64, pages_to_scan: usize, cpu_percent: u32) {
        // SAFETY: The tracepoint is resolved by the invariant, and only reads its arguments.
        unsafe { raw::rksm_trace_ksm_advisor(scan_time, pages_to_scan, cpu_percent) }
    }
}

fn errno(result: Result) -> c_int {
    result.map_or_else(|error| error.to_errno(), |()| 0)
}
