// SPDX-License-Identifier: GPL-2.0-only

//! Stable nodes and rmap items: merged pages as the core of mm knows them.
//!
//! A merged folio's `mapping` is a pointer to its stable node, marked `FOLIO_MAPPING_KSM`;
//! `rmap_walk_ksm`, `folio_migrate_ksm` and `collect_procs_ksm` follow it to the node's `hlist` of
//! rmap items. Both structs have the fields that these functions use where the built-in KSM has
//! them; [`crate::takeover::btf`] compares the layouts with the running kernel's. The other fields
//! are rksm's own. What lies before the first and after the last shared field is left out: a
//! pointer that the core has to either struct points to where the whole struct would begin.
//!
//! The core uses only `next` of an `hlist_node`. So the list is singly linked here, and an item is
//! removed by moving the first item of the list to its place.
//!
//! A node holds no reference to its page, so the page can be freed at any time.
//! [`super::stable_nodes::StableNodes::get_folio`] checks whether the page is still the node's.
//!
//! # Locks
//!
//! A node's `hlist` changes only under its folio's lock. Everything else here is protected by the
//! engine's lock, the `thread_mutex`. The folio lock nests inside the `mmap_lock`; neither is held
//! on return.

use crate::engine::types::{
    Fingerprint,
    ItemId,
    NodeId,
    PageId,
    RangeId,
    Refusal, //
};
use crate::{
    bindings::raw,
    kernel_ext::{
        folio::{
            FolioLock,
            FolioMapping, //
        },
        mm::{
            self,
            PinnedMm, //
        }, //
    },
    ksm::arena::ObjectArena, //
};
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    mm::virt::VmaRef,
    page::PAGE_SIZE,
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// A merged page: `struct ksm_stable_node` from [`NODE_SKIP`] on.
///
/// The built-in keeps its tree links in the bytes before `hlist`; only its own scanner reads them.
#[repr(C)]
pub(super) struct StableNode {
    /// Fingerprint, [`HEAD`] and [`RETIRING`].
    pub(super) content: u64,
    pub(super) next: NodeId,
    pub(super) prev: NodeId,
    pub(super) id: NodeId,
    pub(super) _unused: u32,
    pub(super) hlist: raw::hlist_head,
    /// Changed by `folio_migrate_ksm`, under the folio's lock.
    pub(super) kpfn: c_ulong,
    /// Changed under the folio's lock, and read without it.
    pub(super) rmap_hlist_len: Atomic<c_int>,
    pub(super) nid: c_int,
}

/// Where a [`StableNode`] begins in a `struct ksm_stable_node`.
const NODE_SKIP: usize = 16;

/// The node is the head of its chain.
pub(super) const HEAD: u64 = 1 << 63;

/// The node's mappings move to another node of the chain.
pub(super) const RETIRING: u64 = 1 << 62;

/// A mapping of a merged page: `struct ksm_rmap_item` from its second word to `hlist.next`.
///
/// The numbers of the node and of the range that tracks the page take the place of `head`, by which
/// the built-in finds the node.
#[repr(C)]
pub(super) struct RmapItem {
    /// Owns a reference, taken under the mmap lock before the item could be found; `None` before.
    pub(super) anon_vma: Option<NonNull<raw::anon_vma>>,
    pub(super) mm: PinnedMm,
    pub(super) address: c_ulong,
    pub(super) linear_page_index: c_ulong,
    pub(super) node: NodeId,
    /// The range that tracks the page, whose place in it follows from the address.
    pub(super) range: RangeId,
    /// Where the next item has its own `next`.
    pub(super) next: *mut raw::hlist_node,
}

const _: () = {
    use core::mem::offset_of;
    use raw::layout;
    /// Where an [`RmapItem`] begins in a `struct ksm_rmap_item`.
    const ITEM_SKIP: usize = 8;
    assert!(size_of::<StableNode>() == 48 && size_of::<RmapItem>() == 48);
    assert!(Fingerprint::BITS < RETIRING.trailing_zeros());
    assert!(
        NODE_SKIP + offset_of!(StableNode, hlist) == offset_of!(layout::ksm_stable_node, hlist)
    );
    assert!(
        NODE_SKIP + offset_of!(StableNode, kpfn)
            == offset_of!(layout::ksm_stable_node, __bindgen_anon_2)
    );
    assert!(
        NODE_SKIP + offset_of!(StableNode, rmap_hlist_len)
            == offset_of!(layout::ksm_stable_node, rmap_hlist_len)
    );
    assert!(
        ITEM_SKIP + offset_of!(RmapItem, anon_vma)
            == offset_of!(layout::ksm_rmap_item, __bindgen_anon_1)
    );
    assert!(ITEM_SKIP + offset_of!(RmapItem, mm) == offset_of!(layout::ksm_rmap_item, mm));
    assert!(
        ITEM_SKIP + offset_of!(RmapItem, address) == offset_of!(layout::ksm_rmap_item, address)
    );
    assert!(
        ITEM_SKIP + offset_of!(RmapItem, linear_page_index)
            == offset_of!(layout::ksm_rmap_item, __bindgen_anon_2)
    );
    // In the last union, after `head`.
    assert!(
        ITEM_SKIP + offset_of!(RmapItem, next)
            == offset_of!(layout::ksm_rmap_item, __bindgen_anon_3) + 8
    );
};

impl StableNode {
    /// Returns where a `mapping` word says that a node is.
    pub(super) fn of_mapping(mapping: FolioMapping) -> Option<NonNull<Self>> {
        let base = mapping.stable_node().filter(|base| *base != 0)?;
        NonNull::new((base + NODE_SKIP) as *mut Self)
    }
}

/// A stable node in its arena. Others may hold pointers to it, so it is accessed by raw pointers,
/// and only what no one else changes.
///
/// # Invariants
///
/// The node stays in its arena for `'a`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct NodeRef<'a>(NonNull<StableNode>, PhantomData<&'a StableNode>);

impl NodeRef<'_> {
    /// Makes a reference of a pointer.
    ///
    /// # Safety
    ///
    /// The node stays in its arena for as long as the result is used.
    pub(super) unsafe fn new(node: NonNull<StableNode>) -> Self {
        // INVARIANT: By the contract.
        Self(node, PhantomData)
    }

    /// The node.
    pub(super) fn as_non_null(self) -> NonNull<StableNode> {
        self.0
    }

    /// The node.
    pub(super) fn as_ptr(self) -> *mut StableNode {
        self.0.as_ptr()
    }

    /// The node's number.
    pub(super) fn id(self) -> NodeId {
        // SAFETY: By the invariant the node is there. Nobody changes the number of one.
        unsafe { (*self.as_ptr()).id }
    }

    /// The `mapping` word of the node's folio.
    pub(super) fn mapping(self) -> FolioMapping {
        FolioMapping::ksm(self.as_ptr() as usize - NODE_SKIP)
    }

    /// The frame of the node's folio. `folio_migrate_ksm` may change it at any time.
    pub(super) fn kpfn(self) -> usize {
        // SAFETY: By the invariant the node is there; this is `READ_ONCE`.
        unsafe { raw::rksm_read_once(&raw const (*self.as_ptr()).kpfn) }
    }

    /// How many items are on the node.
    fn len(&self) -> &Atomic<c_int> {
        // SAFETY: By the invariant the node is there. The field is an atomic, and may be shared.
        unsafe { &(*self.as_ptr()).rmap_hlist_len }
    }

    /// How many items are on the node. Only the folio lock keeps the answer from changing.
    pub(super) fn items(self) -> u32 {
        self.len().load(Relaxed) as u32
    }

    /// Adds an item to the node.
    ///
    /// # Context
    ///
    /// Any.
    ///
    /// # Safety
    ///
    /// The item is in its arena, on no node, and stays there while it is on this one. The node's
    /// folio is locked, or no folio names the node.
    unsafe fn push(self, item: NonNull<RmapItem>) {
        // SAFETY: By the contract both are valid, and nothing else accesses the list or the item.
        unsafe {
            (*item.as_ptr()).node = self.id();
            (*item.as_ptr()).next = (*self.as_ptr()).hlist.first;
            (*self.as_ptr()).hlist.first = (&raw mut (*item.as_ptr()).next).cast();
        }
        self.len().store(self.len().load(Relaxed) + 1, Relaxed);
    }

    /// Removes the first item from the node.
    ///
    /// # Context
    ///
    /// Any.
    ///
    /// # Safety
    ///
    /// The node's folio is locked, or no folio names the node.
    pub(super) unsafe fn pop(self) -> Option<NonNull<RmapItem>> {
        // SAFETY: By the contract nothing else changes the node's list.
        let link = NonNull::new(unsafe { (*self.as_ptr()).hlist.first })?;
        // SAFETY: The list links `RmapItem`s by their `next`, which stay in their arena while they
        // are on it, as `push` demands; by the contract nothing else changes the list.
        let item = unsafe {
            let item =
                kernel::container_of!(link.as_ptr().cast::<*mut raw::hlist_node>(), RmapItem, next);
            (*self.as_ptr()).hlist.first = (*item).next;
            item
        };
        self.len().store(self.len().load(Relaxed) - 1, Relaxed);
        NonNull::new(item)
    }

    /// Removes an item from the node. Unless it was the first, the first item moves to its place.
    /// Returns the place that is now unused, which holds the removed item.
    ///
    /// # Context
    ///
    /// Any.
    ///
    /// # Safety
    ///
    /// `item` is on the node. The node's folio is locked, or no folio names the node. Nothing else
    /// uses items of the node.
    pub(super) unsafe fn unlink(self, item: NonNull<RmapItem>) -> NonNull<RmapItem> {
        // SAFETY: The contract of `pop` is part of this function's.
        let Some(first) = (unsafe { self.pop() }) else {
            return item;
        };
        if first != item {
            // SAFETY: Both are valid, and differ. The list goes on from `item` as before.
            unsafe {
                let next = (*item.as_ptr()).next;
                core::ptr::swap(first.as_ptr(), item.as_ptr());
                (*item.as_ptr()).next = next;
            }
        }
        first
    }
}

impl RmapItem {
    pub(super) fn page(&self) -> PageId {
        PageId::new(self.range, self.address / PAGE_SIZE)
    }
}

impl Drop for RmapItem {
    fn drop(&mut self) {
        if let Some(anon_vma) = self.anon_vma {
            // SAFETY: The item owns a reference by its description.
            unsafe { raw::rksm_put_anon_vma(anon_vma.as_ptr()) };
        }
    }
}

/// An rmap item that is not the engine's yet.
///
/// # Invariants
///
/// The item is in its arena. Until [`UnlinkedItem::link`] it is on no node, and nothing else uses
/// it.
pub(super) struct UnlinkedItem(NonNull<RmapItem>);

impl UnlinkedItem {
    /// Makes one of a pointer.
    ///
    /// # Safety
    ///
    /// The item is in its arena, and stays there for as long as the result is used. It is on no
    /// node, and nothing else uses it.
    pub(super) unsafe fn new(item: NonNull<RmapItem>) -> Self {
        // INVARIANT: By the contract.
        Self(item)
    }

    /// Where the item is.
    pub(super) fn address(&self) -> usize {
        self.0.as_ptr() as usize
    }

    pub(super) fn id(&self) -> ItemId {
        // SAFETY: By the invariant.
        ItemId(unsafe { ObjectArena::number_of(self.0) })
    }

    /// The mm of the mapping.
    pub(super) fn mm(&self) -> &PinnedMm {
        // SAFETY: By the invariant the item is in its arena. An rmap walk does not change the
        // field.
        unsafe { &(*self.0.as_ptr()).mm }
    }

    /// The address of the mapping.
    pub(super) fn addr(&self) -> usize {
        // SAFETY: By the invariant the item is in its arena. An rmap walk does not change the
        // field.
        unsafe { (*self.0.as_ptr()).address }
    }

    /// Sets what an rmap walk needs to know of the item's vma.
    ///
    /// The `anon_vma` is referenced here, under the mmap lock: once the item is on a node, an rmap
    /// walk follows it whatever has become of the vma.
    ///
    /// # Context
    ///
    /// Any. The mmap lock of the vma is held.
    ///
    /// # Safety
    ///
    /// The item has not been linked.
    pub(super) unsafe fn set_anon_vma(&self, vma: &VmaRef) -> Result<(), Refusal> {
        let anon_vma = NonNull::new(mm::anon_vma(vma)).ok_or(Refusal::Gone)?;
        // SAFETY: The vma, whose mm's lock is held, has this `anon_vma`; the page index is that of
        // an address, whatever that is. By the contract and the invariant nothing else uses the
        // item.
        unsafe {
            let item = &mut *self.0.as_ptr();
            if item.anon_vma.is_none() {
                raw::rksm_get_anon_vma(anon_vma.as_ptr());
                item.anon_vma = Some(anon_vma);
            }
            let vma = vma.as_ptr().cast();
            item.linear_page_index = raw::rksm_linear_anon_page_index(vma, item.address);
        }
        Ok(())
    }

    /// Adds the item to a node.
    ///
    /// # Context
    ///
    /// Any.
    ///
    /// # Safety
    ///
    /// The item has not been linked. `lock` is the lock of the node's folio, or no folio names the
    /// node yet. From now on the item is freed only after it has left the node.
    pub(super) unsafe fn link(&self, node: NodeRef<'_>, _lock: Option<&FolioLock<'_>>) {
        // SAFETY: By the invariant the item is in its arena, on no node; the rest is the contract.
        unsafe { node.push(self.0) };
    }
}
