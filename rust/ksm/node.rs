// SPDX-License-Identifier: GPL-2.0-only

//! Stable nodes and rmap items: merged pages as the core of mm and the built-in KSM know them.
//!
//! A merged folio's `mapping` is a pointer to its stable node, marked `FOLIO_MAPPING_KSM`;
//! `rmap_walk_ksm`, `folio_migrate_ksm` and `collect_procs_ksm` follow it to the node's `hlist` of
//! rmap items. Both are the built-in's own objects, from its own slab caches: its merged pages are
//! taken over by taking over the objects, and handed back by leaving them where they are. What
//! these functions use is where the built-in has it, and means what it means there.
//! [`crate::takeover::btf`] compares the layouts with the running kernel's.
//!
//! Of the rest, the bytes by which the built-in's scanner finds an object are rksm's own while it
//! is in charge: the links of a node in a tree or list, and the link of an item in the list of its
//! mm. [`super::handover`] sets them on the way back.
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
        compat,
        folio::{
            FolioLock,
            FolioMapping, //
        },
        ksm_objects::STABLE_FLAG,
        mm::{
            self,
            PinnedMm, //
        }, //
    },
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

/// A merged page: `struct ksm_stable_node`.
#[repr(C)]
pub(super) struct StableNode {
    /// Fingerprint, [`HEAD`] and [`RETIRING`]. From here to `id` the built-in has its links.
    pub(super) content: u64,
    pub(super) next: NodeId,
    pub(super) prev: NodeId,
    pub(super) id: NodeId,
    pub(super) _unused: [u32; 5],
    pub(super) hlist: raw::hlist_head,
    /// Changed by `folio_migrate_ksm`, under the folio's lock.
    pub(super) kpfn: c_ulong,
    /// Changed under the folio's lock, and read without it.
    pub(super) rmap_hlist_len: Atomic<c_int>,
    pub(super) nid: c_int,
}

/// The node is the head of its chain.
pub(super) const HEAD: u64 = 1 << 63;

/// The node's mappings move to another node of the chain.
pub(super) const RETIRING: u64 = 1 << 62;

/// A mapping of a merged page: `struct ksm_rmap_item`.
#[repr(C)]
pub(super) struct RmapItem {
    /// The range that tracks the page, whose place in it follows from the address. The built-in has
    /// its link to the mm's next item here.
    pub(super) range: RangeId,
    pub(super) _unused: u32,
    /// Owns a reference, taken under the mmap lock before the item could be found; `None` before.
    pub(super) anon_vma: Option<NonNull<raw::anon_vma>>,
    pub(super) mm: PinnedMm,
    /// The address of the page, and [`STABLE_FLAG`].
    pub(super) address: c_ulong,
    /// Not used where [`compat::ITEM_HAS_INDEX`] is not set.
    pub(super) linear_page_index: c_ulong,
    /// The node that the item is on; `None` before.
    pub(super) head: Option<NonNull<StableNode>>,
    pub(super) hlist: raw::hlist_node,
}

const _: () = {
    use core::mem::offset_of;
    use raw::layout;
    assert!(size_of::<StableNode>() == size_of::<layout::ksm_stable_node>());
    assert!(size_of::<RmapItem>() == size_of::<layout::ksm_rmap_item>());
    assert!(Fingerprint::BITS < RETIRING.trailing_zeros());
    assert!(offset_of!(StableNode, hlist) == offset_of!(layout::ksm_stable_node, hlist));
    assert!(offset_of!(StableNode, kpfn) == offset_of!(layout::ksm_stable_node, __bindgen_anon_2));
    assert!(
        offset_of!(StableNode, rmap_hlist_len)
            == offset_of!(layout::ksm_stable_node, rmap_hlist_len)
    );
    assert!(offset_of!(RmapItem, range) == offset_of!(layout::ksm_rmap_item, rmap_list));
    assert!(offset_of!(RmapItem, anon_vma) == offset_of!(layout::ksm_rmap_item, __bindgen_anon_1));
    assert!(offset_of!(RmapItem, mm) == offset_of!(layout::ksm_rmap_item, mm));
    assert!(offset_of!(RmapItem, address) == offset_of!(layout::ksm_rmap_item, address));
    assert!(offset_of!(RmapItem, linear_page_index) == compat::ITEM_INDEX.1);
    assert!(offset_of!(RmapItem, head) == compat::ITEM_LINKS);
    // In the last union, after `head`.
    assert!(offset_of!(RmapItem, hlist) == offset_of!(RmapItem, head) + 8);
    // An item's number is its address without the highest bit, which every kernel address has.
    assert!(usize::BITS == ItemId::BITS + 1);
};

impl StableNode {
    /// Returns where a `mapping` word says that a node is.
    pub(super) fn of_mapping(mapping: FolioMapping) -> Option<NonNull<Self>> {
        NonNull::new(mapping.stable_node()? as *mut Self)
    }
}

/// A stable node. Others may hold pointers to it, so it is accessed by raw pointers, and only what
/// no one else changes.
///
/// # Invariants
///
/// The node is not freed for `'a`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct NodeRef<'a>(NonNull<StableNode>, PhantomData<&'a StableNode>);

impl NodeRef<'_> {
    /// Makes a reference of a pointer.
    ///
    /// # Safety
    ///
    /// The node is not freed for as long as the result is used.
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

    /// Whether the node's chain has no other. To be asked by the holder of the engine's lock.
    pub(super) fn is_alone(self) -> bool {
        // SAFETY: By the invariant the node is there. The engine changes the field under its lock.
        unsafe { (*self.as_ptr()).next == (*self.as_ptr()).id }
    }

    /// The `mapping` word of the node's folio.
    pub(super) fn mapping(self) -> FolioMapping {
        FolioMapping::ksm(self.as_ptr() as usize)
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
    /// The item is on no node, and is not freed while it is on this one. The node's folio is
    /// locked, or no folio names the node.
    unsafe fn push(self, item: NonNull<RmapItem>) {
        // SAFETY: By the contract both are valid, and nothing else changes the list or the item.
        unsafe {
            (*item.as_ptr()).head = Some(self.0);
            (*item.as_ptr()).address |= STABLE_FLAG;
            raw::rksm_hlist_add_head(
                &raw mut (*item.as_ptr()).hlist,
                &raw mut (*self.as_ptr()).hlist,
            );
        }
        self.len().store(self.len().load(Relaxed) + 1, Relaxed);
    }

    /// The first item of the node.
    ///
    /// # Safety
    ///
    /// The node's folio is locked, or no folio names the node.
    pub(super) unsafe fn first(self) -> Option<NonNull<RmapItem>> {
        // SAFETY: By the contract nothing else changes the node's list.
        let link = NonNull::new(unsafe { (*self.as_ptr()).hlist.first })?;
        // SAFETY: The list links the `hlist` of items, as `push` and the built-in do.
        NonNull::new(unsafe { kernel::container_of!(link.as_ptr(), RmapItem, hlist) })
    }

    /// Removes an item from the node.
    ///
    /// # Context
    ///
    /// Any.
    ///
    /// # Safety
    ///
    /// `item` is on the node. The node's folio is locked, or no folio names the node.
    pub(super) unsafe fn unlink(self, item: NonNull<RmapItem>) {
        // SAFETY: By the contract the item is on the list, and nothing else changes that.
        unsafe {
            raw::rksm_hlist_del(&raw mut (*item.as_ptr()).hlist);
            (*item.as_ptr()).head = None;
            (*item.as_ptr()).address &= !STABLE_FLAG;
        }
        self.len().store(self.len().load(Relaxed) - 1, Relaxed);
    }
}

impl RmapItem {
    /// The number by which the engine names an item.
    pub(super) fn id(item: NonNull<Self>) -> ItemId {
        ItemId::new(item.as_ptr() as u64)
    }

    /// The item with this number.
    pub(super) fn of_id(id: ItemId) -> Option<NonNull<Self>> {
        NonNull::new((id.get() | 1 << ItemId::BITS) as *mut Self)
    }

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
/// The item has not been freed. Until [`UnlinkedItem::link`] it is on no node, and nothing else
/// uses it.
pub(super) struct UnlinkedItem(NonNull<RmapItem>);

impl UnlinkedItem {
    /// Makes one of a pointer.
    ///
    /// # Safety
    ///
    /// The item is not freed for as long as the result is used. It is on no node, and nothing else
    /// uses it.
    pub(super) unsafe fn new(item: NonNull<RmapItem>) -> Self {
        // INVARIANT: By the contract.
        Self(item)
    }

    /// The item.
    pub(super) fn as_non_null(&self) -> NonNull<RmapItem> {
        self.0
    }

    pub(super) fn id(&self) -> ItemId {
        RmapItem::id(self.0)
    }

    /// The mm of the mapping.
    pub(super) fn mm(&self) -> &PinnedMm {
        // SAFETY: By the invariant the item is there. An rmap walk does not change the field.
        unsafe { &(*self.0.as_ptr()).mm }
    }

    /// The address of the mapping.
    pub(super) fn addr(&self) -> usize {
        // SAFETY: By the invariant the item is there. An rmap walk does not change the field.
        unsafe { (*self.0.as_ptr()).address & !STABLE_FLAG }
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
            if compat::ITEM_HAS_INDEX {
                let vma = vma.as_ptr().cast();
                item.linear_page_index = raw::rksm_linear_anon_page_index(vma, item.address);
            }
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
        // SAFETY: By the invariant the item is there, on no node; the rest is the contract.
        unsafe { node.push(self.0) };
    }
}
