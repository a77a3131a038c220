// SPDX-License-Identifier: GPL-2.0-only

//! The objects by which `mm/ksm.c` knows merged pages, on their way from one KSM to the other.

use crate::bindings::raw::layout;
use core::ptr::NonNull;

/// `STABLE_FLAG` of `mm/ksm.c`: in the address of an rmap item that is on a stable node.
pub(crate) const STABLE_FLAG: usize = 0x200;

/// A stable node of the built-in's, a chain excepted.
///
/// # Invariants
///
/// The node is there, and is not freed while this exists.
pub(crate) struct BuiltinNode(NonNull<layout::ksm_stable_node>);

/// An rmap item of the built-in's that is on a stable node.
///
/// # Invariants
///
/// The item is there, and is not freed while this exists.
pub(crate) struct BuiltinItem(NonNull<layout::ksm_rmap_item>);

impl BuiltinNode {
    /// Makes one of a pointer.
    ///
    /// # Safety
    ///
    /// The node is there, is no chain, and is not freed while the result exists.
    pub(crate) unsafe fn new(node: NonNull<layout::ksm_stable_node>) -> Self {
        // INVARIANT: By the contract.
        Self(node)
    }

    /// The node.
    pub(crate) fn as_non_null(&self) -> NonNull<layout::ksm_stable_node> {
        self.0
    }
}

impl BuiltinItem {
    /// Makes one of a pointer.
    ///
    /// # Safety
    ///
    /// The item is there, on a stable node, and is not freed while the result exists.
    pub(crate) unsafe fn new(item: NonNull<layout::ksm_rmap_item>) -> Self {
        // INVARIANT: By the contract.
        Self(item)
    }

    /// The item.
    pub(crate) fn as_non_null(&self) -> NonNull<layout::ksm_rmap_item> {
        self.0
    }
}
