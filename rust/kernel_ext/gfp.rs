// SPDX-License-Identifier: GPL-2.0-only

//! Flags of allocations for bookkeeping.
//!
//! Bookkeeping is not worth a process: a plain `GFP_KERNEL` request of a few pages calls the OOM
//! killer, which never chooses the kernel thread that asks. These give up after a round of
//! reclaim, without a line in the log, and the page is tried again in a later scan.
//!
//! C header: [`include/linux/gfp_types.h`](srctree/include/linux/gfp_types.h)

use crate::bindings::raw;
use kernel::alloc::{
    flags::GFP_KERNEL,
    Flags, //
};

/// Makes flags of a mask of `__GFP_` bits.
const fn flags(mask: u32) -> Flags {
    // SAFETY: `Flags` has one field, a `u32`, which takes all of its bytes, as the sizes are the
    // same. Any mask is a valid one.
    unsafe { core::mem::transmute::<u32, Flags>(mask) }
}

/// Returns the mask of `__GFP_` bits that flags are made of.
///
/// # Context
///
/// Any.
pub(crate) const fn mask(flags: Flags) -> u32 {
    // SAFETY: `Flags` has one field, a `u32`, and is as large as that.
    unsafe { core::mem::transmute::<Flags, u32>(flags) }
}

// The one value that the kernel crate names, too, is the same.
const _: () = assert!(mask(GFP_KERNEL) == raw::RKSM_GFP_KERNEL);

/// For page states, the index, rmap items, slots of mms and buffers, as `alloc_rmap_item()`: may
/// sleep, and never calls the OOM killer.
pub(crate) const GFP_METADATA: Flags = flags(raw::RKSM_GFP_METADATA);

/// For stable nodes, each of which may save many pages, as `alloc_stable_node()`: the same, and
/// may use reserves.
pub(crate) const GFP_NODE: Flags = flags(raw::RKSM_GFP_NODE);
