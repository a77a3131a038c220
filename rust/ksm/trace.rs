// SPDX-License-Identifier: GPL-2.0-only

//! The `ksm:*` trace events, fired as the built-in KSM fires them.

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
