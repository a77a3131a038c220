// SPDX-License-Identifier: GPL-2.0

//! Stable nodes and rmap items: merged pages as the core of mm knows them.
//!
//! A merged folio's `mapping` is a pointer to its stable node, marked `FOLIO_MAPPING_KSM`; `rmap_walk_ksm`,
//! `folio_migrate_ksm` and `collect_procs_ksm` follow it to the node's `hlist` of rmap items. So both structs have
//! the fields these functions use where the built-in KSM has them ([`super::btf`] compares the layouts with the
//! running kernel's), and use the rest for their own ends. What comes before the first and after the last such field
//! is left out: a pointer that the core has to either points to where the whole struct would begin.
//!
//! Of an `hlist_node` the core uses `next` only. So the list is singly linked here, and an item is taken off by moving
//! the first item of the list to its place.
//!
//! A node holds no reference to its page, which can so be freed at once. [`StableNodes::get_folio`] finds out
//! whether the page is still the node's.
//!
//! # Locks
//!
//! A node's `hlist` changes only under its folio's lock. All else here belongs to the engine's lock, the
//! `thread_mutex`. The folio lock nests inside the `mmap_lock`; neither is held on return.

use super::{
    arena::Arena,
    delay,
    folio::{
        self,
        FolioLock,
        FolioRef, //
    },
    merge,
    merge::Target,
    module_ref,
    pin::{
        self,
        LiveMm,
        PinnedMm, //
    },
    raw,
    symbols::Symbols,
    tracepoint::Trace,
    walk::{
        self,
        Batch, //
    },
};
use crate::engine::{
    content_hash::ContentKey,
    ids::{
        Fingerprint,
        ItemId,
        NodeId,
        PageRef,
        RangeId, //
    },
    memory::{
        Collected,
        Look,
        Memory,
        NodeMeta,
        NodeState,
        PageKind,
        Pair,
        Place,
        Refusal,
        Released, //
    },
};
use core::{
    ops::Range,
    ptr::NonNull, //
};
use kernel::{
    ffi::{
        c_int,
        c_ulong, //
    },
    mm::virt::VmaRef,
    page::PAGE_SIZE,
    prelude::*, //
};

const FOLIO_MAPPING_ANON: usize = raw::FOLIO_MAPPING_ANON as usize;

/// Both bits of a `mapping` word are set for a merged page.
const FOLIO_MAPPING_KSM: usize = FOLIO_MAPPING_ANON | raw::FOLIO_MAPPING_ANON_KSM as usize;

/// A merged page: `struct ksm_stable_node` from [`NODE_SKIP`] on.
///
/// The bytes before `hlist` belong, in the built-in, to its trees, which no function but its own scanner looks at.
#[repr(C)]
pub(super) struct StableNode {
    /// Fingerprint, and [`HEAD`].
    content: u64,
    next: NodeId,
    prev: NodeId,
    id: NodeId,
    _unused: u32,
    hlist: raw::hlist_head,
    /// Changed by `folio_migrate_ksm`, under the folio's lock.
    kpfn: c_ulong,
    rmap_hlist_len: c_int,
    nid: c_int,
}

/// Where a [`StableNode`] begins in a `struct ksm_stable_node`.
const NODE_SKIP: usize = 16;

/// The node is the head of its ring.
const HEAD: u64 = 1 << 63;

/// A mapping of a merged page: `struct ksm_rmap_item` from its second word to `hlist.next`.
///
/// In the place of `head`, by which the built-in finds the node, are the numbers of node and owner.
#[repr(C)]
pub(super) struct RmapItem {
    /// Owns a reference, taken under the mmap lock before the item could be found.
    anon_vma: NonNull<raw::anon_vma>,
    mm: PinnedMm,
    address: c_ulong,
    linear_page_index: c_ulong,
    node: NodeId,
    /// The range of the owner, whose place in it follows from the address.
    range: RangeId,
    /// Where the next item has its own `next`.
    next: *mut raw::hlist_node,
}

const _: () = {
    use core::mem::offset_of;
    use raw::layout;
    /// Where an [`RmapItem`] begins in a `struct ksm_rmap_item`.
    const ITEM_SKIP: usize = 8;
    assert!(size_of::<StableNode>() == 48 && size_of::<RmapItem>() == 48);
    assert!(Fingerprint::BITS < u64::BITS);
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
    /// What the core of mm takes for the node's address.
    fn as_core(node: NonNull<Self>) -> usize {
        node.as_ptr() as usize - NODE_SKIP
    }

    /// The `mapping` word of the node's folio.
    pub(super) fn mapping(node: NonNull<Self>) -> usize {
        Self::as_core(node) | FOLIO_MAPPING_KSM
    }

    /// Puts an item on the node.
    ///
    /// # Safety
    ///
    /// Both are in their arenas, and the item is on no node. The node's folio is locked, or no folio names the node.
    unsafe fn push(node: NonNull<Self>, item: NonNull<RmapItem>) {
        // SAFETY: By the contract.
        unsafe {
            (*item.as_ptr()).node = (*node.as_ptr()).id;
            (*item.as_ptr()).next = (*node.as_ptr()).hlist.first;
            (*node.as_ptr()).hlist.first = (&raw mut (*item.as_ptr()).next).cast();
            (*node.as_ptr()).rmap_hlist_len += 1;
        }
    }

    /// Takes the first item off the node.
    ///
    /// # Safety
    ///
    /// The node is in its arena, as are the items on it. Its folio is locked, or no folio names the node.
    unsafe fn pop(node: NonNull<Self>) -> Option<NonNull<RmapItem>> {
        // SAFETY: By the contract.
        let link = NonNull::new(unsafe { (*node.as_ptr()).hlist.first })?;
        // SAFETY: The list links `RmapItem`s by their `next`.
        unsafe {
            let item =
                kernel::container_of!(link.as_ptr().cast::<*mut raw::hlist_node>(), RmapItem, next);
            (*node.as_ptr()).hlist.first = (*item).next;
            (*node.as_ptr()).rmap_hlist_len -= 1;
            NonNull::new(item)
        }
    }

    /// Takes an item off the node: another comes to its place, if it was not the first. Returns the place that is free
    /// now, with the item that is gone in it.
    ///
    /// # Safety
    ///
    /// As for [`StableNode::pop`]; `item` is on the node.
    unsafe fn unlink(node: NonNull<Self>, item: NonNull<RmapItem>) -> NonNull<RmapItem> {
        // SAFETY: By the contract.
        let Some(first) = (unsafe { Self::pop(node) }) else {
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
    fn owner(&self) -> PageRef {
        PageRef::new(self.range, self.address / PAGE_SIZE)
    }
}

impl Drop for RmapItem {
    fn drop(&mut self) {
        // SAFETY: The item owns a reference by its description.
        unsafe { raw::rksm_put_anon_vma(self.anon_vma.as_ptr()) };
    }
}

/// Merged pages in existence, and the memory operations of the engine.
///
/// # Invariants
///
/// - Every node in `nodes` has its own number in `id`. A node's `hlist` holds `rmap_hlist_len` items of `items`, all of
///   which name it as their `node`.
/// - While there are nodes, the module holds a reference to itself.
pub(crate) struct StableNodes {
    nodes: Arena<StableNode>,
    items: Arena<RmapItem>,
    key: KBox<ContentKey>,
    zero_hash: u64,
    trace: Trace,
}

// SAFETY: All pointers in it are to objects of the kernel that any thread may use under the locks named above.
unsafe impl Send for StableNodes {}

impl StableNodes {
    /// No merged pages.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(trace: Trace) -> Result<Self> {
        let mut key = KBox::new(ContentKey::new([0; ContentKey::WORDS]), GFP_KERNEL)?;
        let words = key.words_mut();
        // SAFETY: The words are ours, and any bytes make words.
        unsafe { raw::get_random_bytes(words.as_mut_ptr().cast(), size_of_val(words)) };
        // SAFETY: The zero page is always there.
        let zero = unsafe { NonNull::new(raw::rksm_zero_page()) }.ok_or(EINVAL)?;
        // SAFETY: As above.
        let zero_hash = unsafe { hash(&key, zero) };
        Ok(Self {
            nodes: Arena::new(),
            items: Arena::new(),
            key,
            zero_hash,
            trace,
        })
    }

    fn node(&self, id: NodeId) -> Option<NonNull<StableNode>> {
        self.nodes.get(id.0)
    }

    fn item(&self, id: ItemId) -> Option<NonNull<RmapItem>> {
        self.items.get(id.0)
    }

    /// The node of ours that a `mapping` word names.
    fn node_of_mapping(&self, mapping: usize) -> Option<NodeId> {
        let base = Some(mapping & !FOLIO_MAPPING_KSM).filter(|base| *base != 0)?;
        let node = NonNull::new((base + NODE_SKIP) as *mut StableNode)?;
        // SAFETY: The built-in KSM had no page left when we took over, so every node that a folio names is ours, and a
        // node is freed only after its folio has been freed or has ceased to name it.
        let id = unsafe { (*node.as_ptr()).id };
        (self.node(id) == Some(node)).then_some(id)
    }

    /// What a page is whose folio has this `mapping` word and is mapped or referenced.
    fn kind_of(&self, mapping: usize) -> PageKind {
        match mapping & FOLIO_MAPPING_KSM {
            FOLIO_MAPPING_ANON => PageKind::Plain,
            FOLIO_MAPPING_KSM => self
                .node_of_mapping(mapping)
                .map_or(PageKind::Orphan, PageKind::Ksm),
            _ => PageKind::Orphan,
        }
    }

    /// The node's folio, if it is still the node's.
    ///
    /// The node holds no reference: its folio may be freed, or move to another frame, at any time. So the frame's
    /// `mapping` is looked at before and after a reference is taken. A folio that is being migrated has its count
    /// frozen, or a `mapping` of 0, and the node names the new frame before the old one ceases to name the node:
    /// hence the barrier, which pairs with the one in `folio_migrate_ksm`.
    fn get_folio(&self, node: NonNull<StableNode>) -> Option<FolioRef> {
        let expected = StableNode::mapping(node);
        loop {
            let frame = kpfn(node);
            // SAFETY: `frame` is one that held our page; frames that are taken offline are pruned before.
            let folio = unsafe { NonNull::new_unchecked(raw::rksm_pfn_folio(frame)) };
            if folio::mapping(folio) == expected {
                delay::spin();
                let reference = loop {
                    // SAFETY: As above.
                    match unsafe { FolioRef::try_get(folio) } {
                        Some(reference) => break Some(reference),
                        // A count of 0 means that the folio has been freed, or that migration has frozen it, which it
                        // does to a folio in the swap cache only.
                        // SAFETY: As above.
                        None if unsafe { raw::rksm_folio_test_swapcache(folio.as_ptr()) } => {
                            core::hint::spin_loop()
                        }
                        None => break None,
                    }
                };
                if let Some(reference) = reference.filter(|r| r.mapping() == expected) {
                    return Some(reference);
                }
            }
            // SAFETY: A barrier.
            unsafe { raw::rksm_smp_rmb() };
            if kpfn(node) == frame {
                return None;
            }
        }
    }

    /// The node's folio, locked, if it is still the node's. May sleep.
    fn with_locked<R>(
        &self,
        node: NonNull<StableNode>,
        f: impl FnOnce(&FolioLock<'_>) -> R,
    ) -> Option<R> {
        let expected = StableNode::mapping(node);
        loop {
            let folio = self.get_folio(node)?;
            delay::sleep();
            let lock = folio.lock();
            // Until it was locked, the page may have been migrated.
            if folio.mapping() == expected {
                return Some(f(&lock));
            }
        }
    }

    /// Makes an rmap item that is on no node yet.
    ///
    /// The `anon_vma` is referenced here, under the mmap lock: once the item is on a node, an rmap walk follows it
    /// whatever has become of the vma.
    fn new_item(&mut self, at: &Place<'_, PinnedMm>, vma: &VmaRef) -> Result<ItemId, Refusal> {
        let anon_vma = NonNull::new(pin::anon_vma(vma)).ok_or(Refusal::Gone)?;
        // SAFETY: The vma, whose mm's lock is held, has this `anon_vma`; the address lies in the vma.
        let linear_page_index = unsafe {
            raw::rksm_get_anon_vma(anon_vma.as_ptr());
            raw::rksm_linear_anon_page_index(vma.as_ptr().cast(), at.addr)
        };
        let item = RmapItem {
            anon_vma,
            mm: crate::engine::registry::PinnedMm::clone_pin(at.mm),
            address: at.addr,
            linear_page_index,
            node: NodeId(0),
            range: at.owner.range(),
            next: core::ptr::null_mut(),
        };
        let (id, _) = self.items.insert(item).map_err(|_| Refusal::NoMemory)?;
        Ok(ItemId(id))
    }

    /// Puts an item on a node.
    ///
    /// `lock` is the lock of the node's folio, or shows that no folio names the node yet.
    fn append(&mut self, id: ItemId, node: NonNull<StableNode>, _lock: Option<&FolioLock<'_>>) {
        let Some(item) = self.item(id) else { return };
        // SAFETY: Both are in their arenas; the list is ours to change by the lock. The item pins its mm.
        unsafe {
            StableNode::push(node, item);
            raw::rksm_mm_add_merging((*item.as_ptr()).mm.as_ptr(), 1);
        }
    }

    /// Accounts for an item that leaves its node, and frees it.
    fn free_item(&mut self, id: ItemId) {
        if let Some(item) = self.items.remove(id.0) {
            // SAFETY: The item pins its mm.
            unsafe { raw::rksm_mm_add_merging(item.mm.as_ptr(), -1) };
        }
    }

    /// Frees an item that has been on no node.
    fn discard_item(&mut self, id: ItemId) {
        drop(self.items.remove(id.0));
    }

    /// Adds a node without items and without a page. Takes a module reference for the first one.
    fn new_node(
        &mut self,
        fingerprint: Fingerprint,
        nid: c_int,
    ) -> Result<NonNull<StableNode>, Refusal> {
        if self.nodes.len() == 0 && !module_ref::get() {
            return Err(Refusal::Unloading);
        }
        let node = StableNode {
            content: fingerprint.to_bits(),
            next: NodeId(0),
            prev: NodeId(0),
            id: NodeId(0),
            _unused: 0,
            hlist: raw::hlist_head::default(),
            kpfn: 0,
            rmap_hlist_len: 0,
            nid,
        };
        match self.nodes.insert(node) {
            Ok((id, node)) => {
                let id = NodeId(id);
                // SAFETY: Just inserted, and known to nobody else.
                // INVARIANT: The node gets its own number.
                unsafe {
                    (*node.as_ptr()).id = id;
                    (*node.as_ptr()).next = id;
                    (*node.as_ptr()).prev = id;
                }
                Ok(node)
            }
            Err(_) => {
                self.put_module();
                Err(Refusal::NoMemory)
            }
        }
    }

    fn put_module(&self) {
        if self.nodes.len() == 0 {
            module_ref::put();
        }
    }

    /// Frees a node that no folio names.
    fn free_node(&mut self, node: NonNull<StableNode>, orphan: &mut dyn FnMut(PageRef)) {
        // SAFETY: The node is in the arena.
        let (id, kpfn) = unsafe { ((*node.as_ptr()).id, (*node.as_ptr()).kpfn) };
        // SAFETY: No folio names the node, so nobody else looks at its list; items are freed after they left it.
        while let Some(item) = unsafe { StableNode::pop(node) } {
            // SAFETY: The item is in the arena still.
            let (id, owner, more) = unsafe {
                let more = !(*node.as_ptr()).hlist.first.is_null();
                (Arena::number_of(item), (*item.as_ptr()).owner(), more)
            };
            if more {
                // SAFETY: As above.
                let mm = unsafe { (*item.as_ptr()).mm.as_mm() };
                self.trace
                    .remove_rmap_item(kpfn, item.as_ptr() as usize, mm);
            }
            self.free_item(ItemId(id));
            orphan(owner);
        }
        self.trace.remove_ksm_page(kpfn);
        self.discard_node(id);
    }

    /// Frees a node without items that no folio names.
    fn discard_node(&mut self, id: NodeId) {
        let _ = self.nodes.remove(id.0);
        self.put_module();
    }

    /// Finds the mergeable vma at a place and calls `f` with it, under the mmap lock.
    fn in_vma<R>(
        at: &Place<'_, PinnedMm>,
        f: impl FnOnce(LiveMm<'_>, &VmaRef) -> Result<R, Refusal>,
    ) -> Result<R, Refusal> {
        let guard = at.mm.mmap_read_lock();
        let live = guard.live().ok_or(Refusal::Gone)?;
        let vma = live.mergeable_at(at.addr).ok_or(Refusal::Gone)?;
        f(live, vma)
    }

    /// Makes the page at a place the merged page of `node`, on which nothing is yet. Returns its rmap item, and whether
    /// the page may have been touched after the walk took it.
    fn share_itself(
        &mut self,
        at: &Place<'_, PinnedMm>,
        page: NonNull<raw::page>,
        node: NonNull<StableNode>,
        before_split: impl FnOnce(),
    ) -> Result<(ItemId, bool), Refusal> {
        // Not under the mmap lock, which the OOM killer may need to free memory.
        self.items.reserve().map_err(|_| Refusal::NoMemory)?;
        Self::in_vma(at, |live, vma| {
            let item = self.new_item(at, vma)?;
            delay::sleep();
            // The page becomes findable with its item on the node: no folio names the node yet.
            self.append(item, node, None);
            let target = Target::Itself(node);
            merge::share(live, vma, at.addr, page, &target, before_split)
                .map(|touched| (item, touched))
                .inspect_err(|_| {
                    // SAFETY: Both are in their arenas, and no folio names the node.
                    let _ = unsafe { StableNode::pop(node) };
                    self.free_item(item);
                })
        })
    }

    /// Replaces the page at a place by the merged page of `node`, whose folio is `kfolio`. Returns its rmap item.
    fn share_with(
        &mut self,
        (live, vma): (LiveMm<'_>, &VmaRef),
        at: &Place<'_, PinnedMm>,
        page: NonNull<raw::page>,
        (node, kfolio): (NonNull<StableNode>, &FolioRef),
        before_split: impl FnOnce(),
    ) -> Result<ItemId, Refusal> {
        if kfolio.page() == page {
            return Err(Refusal::Same);
        }
        // Both folios are locked at once, but neither is waited for.
        let lock = kfolio.trylock().ok_or(Refusal::Busy)?;
        // Until it was locked, the page may have been migrated.
        if kfolio.mapping() != StableNode::mapping(node) {
            return Err(Refusal::Busy);
        }
        let item = self.new_item(at, vma)?;
        delay::sleep();
        let target = Target::Page(kfolio);
        match merge::share(live, vma, at.addr, page, &target, before_split) {
            Ok(_) => {
                delay::sleep();
                self.append(item, node, Some(&lock));
                Ok(item)
            }
            Err(refusal) => {
                self.discard_item(item);
                Err(refusal)
            }
        }
    }

    fn trace_merge(
        &self,
        at: &Place<'_, PinnedMm>,
        page: NonNull<raw::page>,
        kpage: *mut raw::page,
        result: &Result<ItemId, Refusal>,
    ) {
        let item = result.as_ref().ok().and_then(|id| self.item(*id));
        // SAFETY: Both pages are referenced.
        let pfn = unsafe {
            raw::rksm_page_to_pfn(if kpage.is_null() {
                page.as_ptr()
            } else {
                kpage
            })
        };
        self.trace.merge_with_ksm_page(
            kpage as usize,
            pfn,
            item.map_or(0, |item| item.as_ptr() as usize),
            at.mm.as_mm(),
            outcome(result),
        );
    }
}

/// What the trace events show for a refusal.
fn outcome<T>(result: &Result<T, Refusal>) -> Result {
    result.as_ref().map(|_| ()).map_err(|_| EFAULT)
}

/// The frame of a node of the arena, which `folio_migrate_ksm` may change any time.
fn kpfn(node: NonNull<StableNode>) -> usize {
    // SAFETY: The caller has the node from the arena.
    unsafe { raw::rksm_read_once(&raw const (*node.as_ptr()).kpfn) }
}

/// Hash of the contents of a page, as they are now.
///
/// # Safety
///
/// The page is referenced, or reserved. It may change meanwhile.
unsafe fn hash(key: &ContentKey, page: NonNull<raw::page>) -> u64 {
    // SAFETY: By the contract the page is there.
    let words = unsafe { raw::rksm_kmap_local_page(page.as_ptr()) }.cast::<u64>();
    // SAFETY: The page is mapped until below, and `hash` asks for words that lie in it. Whoever writes to it at the same
    // time can only make the hash useless.
    let hash = key.hash(|i| unsafe { words.add(i).read_volatile() });
    // SAFETY: Mapped above.
    unsafe { raw::rksm_kunmap_local(words.cast()) };
    hash
}

/// Mappings of the zero page that KSM, built-in or not, has placed. The core of mm counts them down.
pub(crate) fn zero_pages(_symbols: Symbols) -> i64 {
    // SAFETY: The counter has been resolved.
    unsafe { raw::rksm_ksm_zero_pages() as i64 }
}

/// NUMA node of a page, which need not be referenced.
fn page_nid(page: NonNull<raw::page>) -> u32 {
    // SAFETY: The memory map is readable; a page does not change its node.
    unsafe { raw::rksm_page_to_nid(page.as_ptr()) as u32 }
}

impl Memory for StableNodes {
    type Mm = PinnedMm;
    type Batch = Batch;

    fn collect<L: Look>(
        &self,
        mm: &PinnedMm,
        start: usize,
        limit: usize,
        batch: &mut Batch,
        look: &mut L,
    ) -> Collected {
        batch.set_limit(limit);
        delay::sleep();
        let guard = mm.mmap_read_lock();
        let Some(live) = guard.live() else {
            return Collected::Exiting;
        };
        let mut look = |addr, mapped: &raw::rksm_mapped| {
            let kind = self.kind_of(mapped.mapping);
            look.look(addr, kind, mapped.nid as u32, mapped.touched)
        };
        match walk::collect(live, start, batch, &mut look) {
            Some(next) => Collected::More(next),
            None => Collected::End,
        }
    }

    fn len(&self, batch: &Batch) -> usize {
        batch.len()
    }

    fn addr(&self, batch: &Batch, i: usize) -> usize {
        batch.addr(i)
    }

    fn kind(&self, batch: &Batch, i: usize) -> PageKind {
        let Some(page) = batch.page(i) else {
            return PageKind::Orphan;
        };
        // SAFETY: The batch holds a reference to the page.
        self.kind_of(unsafe { raw::rksm_folio_mapping(raw::rksm_page_folio(page.as_ptr())) })
    }

    fn touched(&self, batch: &Batch, i: usize) -> bool {
        batch.touched(i)
    }

    fn hash(&self, batch: &Batch, i: usize) -> u64 {
        batch.page(i).map_or(0, |page| {
            // SAFETY: The batch holds a reference to the page.
            unsafe { hash(&self.key, page) }
        })
    }

    fn nid(&self, batch: &Batch, i: usize) -> u32 {
        batch.page(i).map_or(0, page_nid)
    }

    fn release(&mut self, batch: &mut Batch, i: usize) {
        batch.release(i);
    }

    fn clear(&mut self, batch: &mut Batch) {
        batch.clear();
    }

    fn zero_hash(&self) -> u64 {
        self.zero_hash
    }

    fn merge_with_node(
        &mut self,
        at: Place<'_, PinnedMm>,
        batch: &mut Batch,
        i: usize,
        node: NodeId,
        nid: Option<u32>,
    ) -> Result<ItemId, Refusal> {
        let page = batch.page(i).ok_or(Refusal::Gone)?;
        let node = self.node(node).ok_or(Refusal::Stale)?;
        let kfolio = self.get_folio(node).ok_or(Refusal::Stale)?;
        if nid.is_some_and(|nid| nid != page_nid(kfolio.page())) {
            return Err(Refusal::FarNode);
        }
        // Not under the mmap lock, which the OOM killer may need to free memory.
        self.items.reserve().map_err(|_| Refusal::NoMemory)?;
        let result = Self::in_vma(&at, |live, vma| {
            self.share_with((live, vma), &at, page, (node, &kfolio), || {
                batch.truncate_after(i)
            })
        });
        self.trace_merge(&at, page, kfolio.page().as_ptr(), &result);
        result
    }

    fn merge_pair(
        &mut self,
        at: Place<'_, PinnedMm>,
        batch: &mut Batch,
        i: usize,
        other: Place<'_, PinnedMm>,
        nid: Option<u32>,
        fingerprint: Fingerprint,
    ) -> Result<Pair, Refusal> {
        let page = batch.page(i).ok_or(Refusal::Gone)?;
        // Look at the other page first: most refusals show here, before anything has been touched.
        Self::in_vma(&other, |_, vma| {
            let held = walk::page_at(vma, other.addr).ok_or(Refusal::Gone)?;
            let second = held.page();
            if second == page {
                return Err(Refusal::Same);
            }
            if held.is_ksm() {
                return Err(Refusal::Gone);
            }
            if nid.is_some_and(|nid| nid != page_nid(second)) {
                return Err(Refusal::FarNode);
            }
            // Nor is a page worth a merge that is to be taken back.
            if held.is_pinned() {
                return Err(Refusal::Pinned);
            }
            // One that nothing has touched is still what it was when it became a candidate.
            if held.touched() && !merge::pages_identical(page, second) {
                return Err(Refusal::Differs);
            }
            Ok(())
        })?;

        let node = self.new_node(fingerprint, page_nid(page) as c_int)?;
        // SAFETY: The node is ours alone until a folio names it.
        let node_id = unsafe {
            (*node.as_ptr()).kpfn = raw::rksm_page_to_pfn(page.as_ptr());
            (*node.as_ptr()).id
        };
        // A huge page is split by this, and the first page's frame stays.
        let first = self.share_itself(&at, page, node, || batch.truncate_after(i));
        self.trace_merge(
            &at,
            page,
            core::ptr::null_mut(),
            &first.map(|(item, _)| item),
        );
        let (first, touched) = match first {
            Ok(first) => first,
            Err(refusal) => {
                self.discard_node(node_id);
                return Err(refusal);
            }
        };

        // SAFETY: The batch's reference keeps the page; it is a small folio now.
        let kfolio = unsafe {
            let folio = raw::rksm_page_folio(page.as_ptr());
            raw::rksm_folio_get(folio);
            FolioRef::from_raw(NonNull::new_unchecked(folio))
        };
        delay::sleep();
        let second = self.merge_second(&other, node, &kfolio);
        match second {
            Ok(second) => Ok(Pair {
                node: node_id,
                first,
                second,
                touched,
            }),
            Err(refusal) => {
                drop(kfolio);
                self.undo_first(&at, first);
                Err(refusal)
            }
        }
    }

    fn merge_with_zero(
        &mut self,
        at: Place<'_, PinnedMm>,
        batch: &mut Batch,
        i: usize,
    ) -> Result<(), Refusal> {
        let page = batch.page(i).ok_or(Refusal::Gone)?;
        let result = Self::in_vma(&at, |live, vma| {
            merge::share(live, vma, at.addr, page, &Target::Zero, || {
                batch.truncate_after(i)
            })
            .map(|_| ())
        });
        // SAFETY: The zero page is always there.
        let pfn = unsafe { raw::rksm_zero_pfn() };
        self.trace
            .merge_one_page(pfn, 0, at.mm.as_mm(), outcome(&result));
        result
    }

    fn adopt(
        &mut self,
        at: Place<'_, PinnedMm>,
        batch: &mut Batch,
        i: usize,
        node: NodeId,
    ) -> Result<ItemId, Refusal> {
        let page = batch.page(i).ok_or(Refusal::Gone)?;
        let node = self.node(node).ok_or(Refusal::Stale)?;
        // SAFETY: The batch holds a reference to the page.
        let folio = unsafe { NonNull::new_unchecked(raw::rksm_page_folio(page.as_ptr())) };
        // SAFETY: As above.
        let folio = unsafe { FolioRef::try_get(folio) }.ok_or(Refusal::Stale)?;
        self.items.reserve().map_err(|_| Refusal::NoMemory)?;
        let item = Self::in_vma(&at, |_, vma| self.new_item(&at, vma))?;
        delay::sleep();
        let lock = folio.lock();
        let expected = StableNode::mapping(node);
        if folio.mapping() != expected {
            self.discard_item(item);
            return Err(Refusal::Stale);
        }
        self.append(item, node, Some(&lock));
        Ok(item)
    }

    fn node_of(&self, item: ItemId) -> Option<NodeId> {
        // SAFETY: The item is in the arena.
        self.item(item).map(|item| unsafe { (*item.as_ptr()).node })
    }

    fn release_item(&mut self, id: ItemId) -> Option<Released> {
        let item = self.item(id)?;
        let node_id = self.node_of(id)?;
        let node = self.node(node_id)?;
        // SAFETY: Both are in their arenas; the folio is locked, or names the node no more.
        let unlink = || unsafe { StableNode::unlink(node, item) };
        let locked = self.with_locked(node, |lock| (unlink(), lock.folio().mapped()));
        let (gone, mapped) = match locked {
            Some((gone, mapped)) => (gone, Some(mapped)),
            None => (unlink(), None),
        };
        // SAFETY: The item is in the arena still, and pins its mm.
        let mm = unsafe { (*gone.as_ptr()).mm.as_mm() };
        self.trace
            .remove_rmap_item(kpfn(node), item.as_ptr() as usize, mm);
        // SAFETY: As above.
        self.free_item(ItemId(unsafe { Arena::number_of(gone) }));
        let remaining = self.mappings(node_id);
        Some(Released {
            node: node_id,
            remaining,
            due: match mapped {
                None => true,
                Some(mapped) => remaining == 0 && !mapped,
            },
            moved: (gone != item).then(|| {
                // SAFETY: Another item has come to this place, which is in the arena.
                (unsafe { (*item.as_ptr()).owner() }, id)
            }),
        })
    }

    fn meta(&self, node: NodeId) -> Option<NodeMeta> {
        let node = self.node(node)?.as_ptr();
        // SAFETY: The node is in the arena; only the engine, whose lock is held, looks at these.
        let (content, next, prev) = unsafe { ((*node).content, (*node).next, (*node).prev) };
        Some(NodeMeta {
            fingerprint: Fingerprint::from_bits(content),
            next,
            prev,
            head: content & HEAD != 0,
        })
    }

    fn set_meta(&mut self, node: NodeId, meta: NodeMeta) {
        let Some(node) = self.node(node) else { return };
        let head = if meta.head { HEAD } else { 0 };
        // SAFETY: As above.
        unsafe {
            (*node.as_ptr()).content = meta.fingerprint.to_bits() | head;
            (*node.as_ptr()).next = meta.next;
            (*node.as_ptr()).prev = meta.prev;
        }
    }

    fn node_nid(&self, node: NodeId) -> u32 {
        self.node(node).map_or(0, |node| {
            // SAFETY: The node is in the arena; only the engine, whose lock is held, changes `nid`.
            unsafe { (*node.as_ptr()).nid as u32 }
        })
    }

    fn set_node_nid(&mut self, node: NodeId, nid: u32) {
        if let Some(node) = self.node(node) {
            // SAFETY: As above.
            unsafe { (*node.as_ptr()).nid = nid as c_int };
        }
    }

    fn mappings(&self, node: NodeId) -> u32 {
        self.node(node).map_or(0, |node| {
            // SAFETY: The node is in the arena; only the engine, whose lock is held, changes the length.
            unsafe { (*node.as_ptr()).rmap_hlist_len as u32 }
        })
    }

    fn state(&self, node: NodeId) -> NodeState {
        match self.node(node).and_then(|node| self.get_folio(node)) {
            None => NodeState::Stale,
            Some(_) => NodeState::Alive,
        }
    }

    fn remove_node(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageRef)) -> bool {
        let Some(node) = self.node(node) else {
            return true;
        };
        let mapped = self.with_locked(node, |lock| {
            let mapped = lock.folio().mapped();
            if !mapped {
                // SAFETY: The folio is locked, and nobody maps it: it may end its days without a node.
                unsafe { raw::rksm_folio_set_mapping(lock.folio().as_ptr(), FOLIO_MAPPING_KSM) };
            }
            mapped
        });
        if mapped == Some(true) {
            return false;
        }
        self.free_node(node, orphan);
        true
    }

    fn next_node_in(&self, after: Option<NodeId>, frames: Range<usize>) -> Option<NodeId> {
        let mut at = after;
        while let Some(id) = self.next_node(at) {
            let kpfn = self.node(id).map(kpfn);
            if kpfn.is_some_and(|kpfn| frames.contains(&kpfn)) {
                return Some(id);
            }
            at = Some(id);
        }
        None
    }

    fn forget_node(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageRef)) {
        if let Some(node) = self.node(node) {
            self.free_node(node, orphan);
        }
    }

    fn next_node(&self, after: Option<NodeId>) -> Option<NodeId> {
        self.nodes.next(after.map(|id| id.0)).map(NodeId)
    }

    fn nodes(&self) -> usize {
        self.nodes.len()
    }

    fn account_tracked(&mut self, mm: &PinnedMm, delta: isize) {
        // SAFETY: The mm is pinned; only the engine, whose lock is held, changes the field.
        unsafe { raw::rksm_mm_add_rmap_items(mm.as_ptr(), delta) };
    }

    fn bytes(&self) -> usize {
        self.nodes.bytes() + self.items.bytes()
    }

    fn breathe(&mut self) -> bool {
        // SAFETY: The engine's lock is a mutex; no spinlock is held.
        unsafe {
            raw::rksm_cond_resched();
            raw::rksm_freezing(kernel::task::Task::current_raw()) || raw::rksm_kthread_stopping()
        }
    }
}

impl StableNodes {
    /// Puts the merged page of `node`, which is `kfolio`, in the place of the page at `other`.
    fn merge_second(
        &mut self,
        other: &Place<'_, PinnedMm>,
        node: NonNull<StableNode>,
        kfolio: &FolioRef,
    ) -> Result<ItemId, Refusal> {
        self.items.reserve().map_err(|_| Refusal::NoMemory)?;
        Self::in_vma(other, |live, vma| {
            // Referenced only now, so that a huge page of which both are part could be split for the first.
            let held = walk::page_at(vma, other.addr).ok_or(Refusal::Gone)?;
            let page = held.page();
            let result = self.share_with((live, vma), other, page, (node, kfolio), || {});
            self.trace_merge(other, page, kfolio.page().as_ptr(), &result);
            result
        })
    }

    /// Unshares a page that has just become a merged page alone.
    fn undo_first(&mut self, at: &Place<'_, PinnedMm>, first: ItemId) {
        let node = self.node_of(first);
        if let Some(_user) = at.mm.mmget_not_zero() {
            delay::sleep();
            merge::break_one(&at.mm.mmap_read_lock(), at.addr);
        }
        let _ = self.release_item(first);
        if let Some(node) = node {
            let _ = self.remove_node(node, &mut |_| {});
        }
    }
}
