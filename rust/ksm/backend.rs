// SPDX-License-Identifier: GPL-2.0-only

//! Stable nodes and rmap items: merged pages as the core of mm knows them.
//!
//! A merged folio's `mapping` is a pointer to its stable node, marked `FOLIO_MAPPING_KSM`; `rmap_walk_ksm`,
//! `folio_migrate_ksm` and `collect_procs_ksm` follow it to the node's `hlist` of rmap items. So both structs have
//! the fields these functions use where the built-in KSM has them ([`crate::takeover::btf`] compares the layouts with the
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

use crate::engine::{
    content_hash::ContentKey,
    memory::{
        Collected,
        HugeId,
        Look,
        Memory,
        Merged,
        NodeMeta,
        NodeState,
        PageKind,
        Pair,
        Partner,
        Place,
        Refusal,
        Released, //
    },
    registry::PinnedMm as _, //
    types::{
        Fingerprint,
        ItemId,
        NodeId,
        PageId,
        RangeId, //
    },
};
use crate::{
    bindings::raw,
    kernel_ext::{
        folio::{
            self,
            FolioLock,
            FolioRef, //
        },
        mm::{
            self,
            LiveMm,
            MmapReadGuard,
            PinnedMm, //
        },
        module_ref,
        race_window,
        symbols::Symbols,
        tracepoint::Trace, //
    },
    ksm::{
        arena::Arena,
        collect::{
            self,
            Batch, //
        },
        replace_pte::{
            self,
            Target, //
        }, //
    }, //
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
    prelude::*,
    sync::{
        Arc,
        UniqueArc, //
    },
};

const FOLIO_MAPPING_ANON: usize = raw::FOLIO_MAPPING_ANON as usize;

/// Both bits of a `mapping` word are set for a merged page.
const FOLIO_MAPPING_KSM: usize = FOLIO_MAPPING_ANON | raw::FOLIO_MAPPING_ANON_KSM as usize;

/// A merged page: `struct ksm_stable_node` from [`NODE_SKIP`] on.
///
/// The bytes before `hlist` belong, in the built-in, to its trees, which no function but its own scanner looks at.
#[repr(C)]
pub(crate) struct StableNode {
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
/// In the place of `head`, by which the built-in finds the node, are the numbers of the node and of the range that tracks the page.
#[repr(C)]
pub(crate) struct RmapItem {
    /// Owns a reference, taken under the mmap lock before the item could be found; `None` before.
    anon_vma: Option<NonNull<raw::anon_vma>>,
    mm: PinnedMm,
    address: c_ulong,
    linear_page_index: c_ulong,
    node: NodeId,
    /// The range that tracks the page, whose place in it follows from the address.
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
    pub(crate) fn mapping(node: NonNull<Self>) -> usize {
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
    fn page(&self) -> PageId {
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
    key: Arc<ContentKey>,
    zero_hash: u64,
    trace: Trace,
}

// SAFETY: All pointers in it are to objects of the kernel that any thread may use under the locks named above.
unsafe impl Send for StableNodes {}
// SAFETY: As above. With a shared reference nodes and items are only looked at, but for those of merges, each of which has its
// own, and for what the lock of a node's folio protects.
unsafe impl Sync for StableNodes {}

impl StableNodes {
    /// No merged pages.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(trace: Trace) -> Result<Self> {
        let mut key = UniqueArc::new(ContentKey::new([0; ContentKey::WORDS]), GFP_KERNEL)?;
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
            key: key.into(),
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
                race_window::spin();
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
            race_window::sleep();
            let lock = folio.lock();
            // Until it was locked, the page may have been migrated.
            if folio.mapping() == expected {
                return Some(f(&lock));
            }
        }
    }

    /// Makes an rmap item that is on no node yet.
    ///
    /// Not under the mmap lock, which the OOM killer may need to free memory.
    fn new_item(&mut self, at: &Place<'_, PinnedMm>) -> Result<OwnItem, Refusal> {
        let item = RmapItem {
            anon_vma: None,
            mm: at.mm.clone_pin(),
            address: at.addr,
            linear_page_index: 0,
            node: NodeId(0),
            range: at.page.range(),
            next: core::ptr::null_mut(),
        };
        let (_, item) = self.items.insert(item).map_err(|_| Refusal::NoMemory)?;
        // INVARIANT: Nobody else knows of it.
        Ok(OwnItem(item))
    }

    /// Accounts for an item that has been put on a node.
    fn added(&self, item: &OwnItem) -> ItemId {
        // SAFETY: The item pins its mm.
        unsafe { raw::rksm_mm_add_merging(item.mm().as_ptr(), 1) };
        item.id()
    }

    /// Accounts for an item that leaves its node, and frees it.
    fn free_item(&mut self, id: ItemId) {
        if let Some(item) = self.items.remove(id.0) {
            // SAFETY: The item pins its mm.
            unsafe { raw::rksm_mm_add_merging(item.mm.as_ptr(), -1) };
        }
    }

    /// Frees an item that has been on no node.
    fn discard_item(&mut self, item: &OwnItem) {
        drop(self.items.remove(item.id().0));
    }

    /// Adds a node without items and without a page. Takes a module reference for the first one.
    fn new_node(&mut self, nid: c_int) -> Result<NonNull<StableNode>, Refusal> {
        if self.nodes.len() == 0 && !module_ref::get() {
            return Err(Refusal::Unloading);
        }
        let node = StableNode {
            content: Fingerprint::NONE.to_bits(),
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
    fn free_node(&mut self, node: NonNull<StableNode>, orphan: &mut dyn FnMut(PageId)) {
        // SAFETY: The node is in the arena.
        let (id, kpfn) = unsafe { ((*node.as_ptr()).id, (*node.as_ptr()).kpfn) };
        // SAFETY: No folio names the node, so nobody else looks at its list; items are freed after they left it.
        while let Some(item) = unsafe { StableNode::pop(node) } {
            // SAFETY: The item is in the arena still.
            let (id, page, more) = unsafe {
                let more = !(*node.as_ptr()).hlist.first.is_null();
                (Arena::number_of(item), (*item.as_ptr()).page(), more)
            };
            if more {
                // SAFETY: As above.
                let mm = unsafe { (*item.as_ptr()).mm.as_mm() };
                self.trace
                    .remove_rmap_item(kpfn, item.as_ptr() as usize, mm);
            }
            self.free_item(ItemId(id));
            orphan(page);
        }
        self.trace.remove_ksm_page(kpfn);
        self.discard_node(id);
    }

    /// Frees a node without items that no folio names.
    fn discard_node(&mut self, id: NodeId) {
        let _ = self.nodes.remove(id.0);
        self.put_module();
    }
}

/// Finds the mergeable vma at an address and calls `f` with it, under the mmap lock.
fn in_vma<R>(
    mm: &PinnedMm,
    addr: usize,
    f: impl FnOnce(LiveMm<'_>, &VmaRef) -> Result<R, Refusal>,
) -> Result<R, Refusal> {
    let guard = mm.mmap_read_lock();
    let live = guard.live().ok_or(Refusal::Gone)?;
    let vma = live.mergeable_at(addr).ok_or(Refusal::Gone)?;
    f(live, vma)
}

/// An rmap item that is on no node yet.
///
/// # Invariants
///
/// The item is in the arena, and nobody else uses it.
struct OwnItem(NonNull<RmapItem>);

impl OwnItem {
    fn id(&self) -> ItemId {
        // SAFETY: By the invariant.
        ItemId(unsafe { Arena::number_of(self.0) })
    }

    /// The mm of the mapping.
    fn mm(&self) -> &PinnedMm {
        // SAFETY: By the invariant; and who walks a node's items does not change the field.
        unsafe { &(*self.0.as_ptr()).mm }
    }

    /// The address of the mapping.
    fn addr(&self) -> usize {
        // SAFETY: As above.
        unsafe { (*self.0.as_ptr()).address }
    }

    /// Gives the item what an rmap walk needs to know of its vma.
    ///
    /// The `anon_vma` is referenced here, under the mmap lock: once the item is on a node, an rmap walk follows it
    /// whatever has become of the vma.
    fn place_in(&self, vma: &VmaRef) -> Result<(), Refusal> {
        let anon_vma = NonNull::new(mm::anon_vma(vma)).ok_or(Refusal::Gone)?;
        // SAFETY: The vma, whose mm's lock is held, has this `anon_vma`; the address lies in the vma. The item is ours by
        // the invariant.
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

    /// Puts the item on a node.
    ///
    /// # Safety
    ///
    /// The node is in its arena. `lock` is the lock of the node's folio, or no folio names the node yet. The item is used as
    /// one of the node's from now on.
    unsafe fn append(&self, node: NonNull<StableNode>, _lock: Option<&FolioLock<'_>>) {
        // SAFETY: The item is in its arena; the rest is the contract.
        unsafe { StableNode::push(node, self.0) };
    }
}

/// A merge that is ready, and what has come of it.
///
/// # Invariants
///
/// The batch of which `page` is keeps its reference until the merge is finished, and the engine's lock is held for as long.
/// Until then neither the items are freed, nor the node.
pub(crate) struct Merge {
    trace: Trace,
    page: NonNull<raw::page>,
    with: With,
    outcome: Result<(), Refusal>,
}

// SAFETY: All pointers are to objects of the kernel that any thread may use.
unsafe impl Send for Merge {}

enum With {
    Zero {
        mm: PinnedMm,
        addr: usize,
    },
    Node {
        node: NonNull<StableNode>,
        kfolio: FolioRef,
        item: OwnItem,
    },
    Page(Couple),
}

/// The vmas of an mm whose mmap lock is held for several merges.
struct Vmas<'g> {
    live: Option<LiveMm<'g>>,
    last: Option<&'g VmaRef>,
}

impl<'g> Vmas<'g> {
    fn new(guard: &'g MmapReadGuard<'_>) -> Self {
        Self {
            live: guard.live(),
            last: None,
        }
    }

    /// The mergeable vma at an address.
    fn at(&mut self, addr: usize) -> Result<(LiveMm<'g>, &'g VmaRef), Refusal> {
        let live = self.live.ok_or(Refusal::Gone)?;
        let near = |vma: &&VmaRef| (vma.start()..vma.end()).contains(&addr);
        if !self.last.as_ref().is_some_and(near) {
            self.last = live.mergeable_at(addr);
        }
        Ok((live, self.last.ok_or(Refusal::Gone)?))
    }
}

impl Merge {
    /// The mm whose mmap lock is the only one that the merge needs.
    fn only_mm(&self) -> Option<&PinnedMm> {
        match &self.with {
            With::Zero { mm, .. } => Some(mm),
            With::Node { item, .. } => Some(item.mm()),
            With::Page(_) => None,
        }
    }

    /// Does a merge that needs the mmap lock of one mm only, which is held.
    fn run_in(&mut self, vmas: &mut Vmas<'_>, before_split: impl FnOnce()) {
        let (trace, page) = (self.trace, self.page);
        match &self.with {
            With::Zero { mm, addr } => {
                self.outcome = vmas.at(*addr).and_then(|(live, vma)| {
                    replace_pte::share(live, vma, *addr, page, &Target::Zero, before_split)
                        .map(|_| ())
                });
                // SAFETY: The zero page is always there.
                let pfn = unsafe { raw::rksm_zero_pfn() };
                trace.merge_one_page(pfn, 0, mm.as_mm(), outcome(&self.outcome));
            }
            With::Node { node, kfolio, item } => {
                self.outcome = vmas
                    .at(item.addr())
                    .and_then(|place| share_with(place, page, (*node, kfolio), item, before_split));
                let kpage = kfolio.page().as_ptr();
                trace_merge(trace, page, kpage, item, &self.outcome);
            }
            With::Page(_) => {}
        }
    }

    /// Merges two pages, neither of which is a merged page yet.
    fn run_couple(&mut self, before_split: impl FnOnce()) {
        let (trace, page) = (self.trace, self.page);
        let With::Page(couple) = &mut self.with else {
            return;
        };
        let first = couple
            .look(page)
            // A huge page is split by this, and the first page's frame stays.
            .and_then(|()| couple.share_first(page, before_split));
        let kpage = core::ptr::null_mut();
        trace_merge(trace, page, kpage, &couple.first, &first);
        self.outcome = first.and_then(|()| {
            // SAFETY: The batch's reference keeps the page; it is a small folio now.
            let kfolio = unsafe {
                let folio = raw::rksm_page_folio(page.as_ptr());
                raw::rksm_folio_get(folio);
                FolioRef::from_raw(NonNull::new_unchecked(folio))
            };
            race_window::sleep();
            couple.share_second(&kfolio, trace)
        });
    }
}

impl crate::engine::memory::Merge for Merge {
    fn run(&mut self, before_split: impl FnOnce()) {
        match self.only_mm().map(|mm| mm.clone_pin()) {
            Some(mm) => {
                let guard = mm.mmap_read_lock();
                self.run_in(&mut Vmas::new(&guard), before_split);
            }
            None => self.run_couple(before_split),
        }
    }

    /// Takes the mmap lock once for merges of one mm that follow each other, unless somebody waits for it.
    fn run_all<'a>(merges: impl Iterator<Item = &'a mut Self>) {
        let mut merges = merges.peekable();
        while let Some(first) = merges.next() {
            let Some(mm) = first.only_mm().map(|mm| mm.clone_pin()) else {
                first.run_couple(|| ());
                continue;
            };
            let guard = mm.mmap_read_lock();
            let mut vmas = Vmas::new(&guard);
            first.run_in(&mut vmas, || ());
            let same = |merge: &&'a mut Self| {
                let other = merge.only_mm().map(PinnedMm::as_ptr);
                other == Some(mm.as_ptr()) && !mm.mmap_lock_is_contended()
            };
            while let Some(next) = merges.next_if(same) {
                // SAFETY: May sleep: no spinlock is held.
                unsafe { raw::rksm_cond_resched() };
                next.run_in(&mut vmas, || ());
            }
        }
    }
}

/// Two pages that are to become the merged page of a node that no folio names yet.
struct Couple {
    node: NonNull<StableNode>,
    first: OwnItem,
    second: OwnItem,
    nid: Option<u32>,
    /// The first page has become the merged page: whether it may have been touched until then.
    shared: Option<bool>,
}

/// Replaces the page at an address by the merged page of `node`, whose folio is `kfolio`.
fn share_with(
    (live, vma): (LiveMm<'_>, &VmaRef),
    page: NonNull<raw::page>,
    (node, kfolio): (NonNull<StableNode>, &FolioRef),
    item: &OwnItem,
    before_split: impl FnOnce(),
) -> Result<(), Refusal> {
    if kfolio.page() == page {
        return Err(Refusal::Same);
    }
    // Both folios are locked at once, but neither is waited for.
    let lock = kfolio.trylock().ok_or(Refusal::Busy)?;
    // Until it was locked, the page may have been migrated.
    if kfolio.mapping() != StableNode::mapping(node) {
        return Err(Refusal::Busy);
    }
    item.place_in(vma)?;
    race_window::sleep();
    let target = Target::Page(kfolio);
    replace_pte::share(live, vma, item.addr(), page, &target, before_split)?;
    race_window::sleep();
    // SAFETY: The node's folio is locked, and names it, so that the node is there.
    unsafe { item.append(node, Some(&lock)) };
    Ok(())
}

impl Couple {
    /// Looks at the other page: most refusals show here, before anything has been touched.
    fn look(&self, page: NonNull<raw::page>) -> Result<(), Refusal> {
        let addr = self.second.addr();
        in_vma(self.second.mm(), addr, |_, vma| {
            let held = collect::page_at(vma, addr).ok_or(Refusal::Gone)?;
            let second = held.page();
            if second == page {
                return Err(Refusal::Same);
            }
            if held.is_ksm() {
                return Err(Refusal::Gone);
            }
            if self.nid.is_some_and(|nid| nid != page_nid(second)) {
                return Err(Refusal::FarNode);
            }
            // Nor is a page worth a merge that is to be taken back.
            if held.is_pinned() {
                return Err(Refusal::Pinned);
            }
            // One that nothing has touched is still what it was when it became a candidate.
            if held.touched() && !replace_pte::pages_identical(page, second) {
                return Err(Refusal::Differs);
            }
            Ok(())
        })
    }

    /// Makes the first page the merged page.
    fn share_first(
        &mut self,
        page: NonNull<raw::page>,
        before_split: impl FnOnce(),
    ) -> Result<(), Refusal> {
        let (node, addr) = (self.node, self.first.addr());
        let touched = in_vma(self.first.mm(), addr, |live, vma| {
            self.first.place_in(vma)?;
            race_window::sleep();
            // The page becomes findable with its item on the node.
            // SAFETY: The node is in its arena, and no folio names it.
            unsafe { self.first.append(node, None) };
            let target = Target::Itself(node);
            replace_pte::share(live, vma, addr, page, &target, before_split).inspect_err(|_| {
                // SAFETY: Both are in their arenas, and no folio names the node.
                let _ = unsafe { StableNode::pop(node) };
            })
        })?;
        self.shared = Some(touched);
        Ok(())
    }

    /// Puts the merged page, which is `kfolio`, in the place of the second page.
    fn share_second(&self, kfolio: &FolioRef, trace: Trace) -> Result<(), Refusal> {
        let (node, addr) = (self.node, self.second.addr());
        in_vma(self.second.mm(), addr, |live, vma| {
            // Referenced only now, so that a huge page of which both are part could be split for the first.
            let held = collect::page_at(vma, addr).ok_or(Refusal::Gone)?;
            let page = held.page();
            // It may have migrated since it was looked at.
            if self.nid.is_some_and(|nid| nid != page_nid(page)) {
                return Err(Refusal::FarNode);
            }
            let result = share_with((live, vma), page, (node, kfolio), &self.second, || {});
            let kpage = kfolio.page().as_ptr();
            trace_merge(trace, page, kpage, &self.second, &result);
            result
        })
    }
}

fn trace_merge(
    trace: Trace,
    page: NonNull<raw::page>,
    kpage: *mut raw::page,
    item: &OwnItem,
    result: &Result<(), Refusal>,
) {
    // SAFETY: Both pages are referenced.
    let pfn = unsafe {
        raw::rksm_page_to_pfn(if kpage.is_null() {
            page.as_ptr()
        } else {
            kpage
        })
    };
    let (mm, item) = (item.mm().as_mm(), item.0.as_ptr() as usize);
    let item = result.map_or(0, |()| item);
    trace.merge_with_ksm_page(kpage as usize, pfn, item, mm, outcome(result));
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
    type Key = Arc<ContentKey>;
    type Merge = Merge;

    fn collect<L: Look>(
        &self,
        mm: &PinnedMm,
        within: Range<usize>,
        limit: usize,
        own: &Range<usize>,
        batch: &mut Batch,
        look: &mut L,
    ) -> Collected {
        batch.set_limit(limit, own);
        race_window::sleep();
        let guard = mm.mmap_read_lock();
        let Some(live) = guard.live() else {
            return Collected::Exiting;
        };
        let mut look = |addr, mapped: &raw::rksm_mapped| {
            let kind = self.kind_of(mapped.mapping);
            look.look(addr, kind, mapped.nid as u32, mapped.touched)
        };
        match collect::collect(live, within, batch, &mut look) {
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

    fn key(&self) -> Arc<ContentKey> {
        self.key.clone()
    }

    fn hash_by(key: &Arc<ContentKey>, batch: &Batch, i: usize) -> u64 {
        batch.page(i).map_or(0, |page| {
            // SAFETY: The batch holds a reference to the page.
            unsafe { hash(key, page) }
        })
    }

    fn nid(&self, batch: &Batch, i: usize) -> u32 {
        batch.page(i).map_or(0, page_nid)
    }

    fn huge(&self, batch: &Batch, i: usize) -> Option<HugeId> {
        batch.huge_folio(i).map(|folio| HugeId(folio as usize))
    }

    fn release(&self, batch: &mut Batch, i: usize) {
        batch.release(i);
    }

    fn make_way(&self, batch: &mut Batch, huge: HugeId, keep: Option<usize>) {
        batch.make_way(huge.0 as *mut raw::folio, keep);
    }

    fn regain(&self, mm: &PinnedMm, batch: &mut Batch, i: usize) -> bool {
        if !batch.lost(i) {
            return true;
        }
        let addr = batch.addr(i);
        let held = in_vma(mm, addr, |_, vma| {
            collect::page_at(vma, addr).ok_or(Refusal::Gone)
        });
        held.map(|held| batch.regain(i, held)).is_ok()
    }

    fn clear(&self, batch: &mut Batch) {
        batch.clear();
    }

    fn zero_hash(&self) -> u64 {
        self.zero_hash
    }

    fn prepare(
        &mut self,
        at: Place<'_, PinnedMm>,
        batch: &Batch,
        i: usize,
        partner: Partner<'_, PinnedMm>,
    ) -> Result<Merge, Refusal> {
        let page = batch.page(i).ok_or(Refusal::Gone)?;
        let with = match partner {
            Partner::Zero => With::Zero {
                mm: at.mm.clone_pin(),
                addr: at.addr,
            },
            Partner::Node { node, nid } => {
                let node = self.node(node).ok_or(Refusal::Stale)?;
                let kfolio = self.get_folio(node).ok_or(Refusal::Stale)?;
                if nid.is_some_and(|nid| nid != page_nid(kfolio.page())) {
                    return Err(Refusal::FarNode);
                }
                With::Node {
                    node,
                    kfolio,
                    item: self.new_item(&at)?,
                }
            }
            Partner::Page { other, nid } => {
                let first = self.new_item(&at)?;
                let second = self
                    .new_item(&other)
                    .inspect_err(|_| self.discard_item(&first))?;
                let node = self.new_node(page_nid(page) as c_int).inspect_err(|_| {
                    self.discard_item(&first);
                    self.discard_item(&second);
                })?;
                // SAFETY: The node is ours alone until a folio names it. The page is referenced.
                unsafe { (*node.as_ptr()).kpfn = raw::rksm_page_to_pfn(page.as_ptr()) };
                With::Page(Couple {
                    node,
                    first,
                    second,
                    nid,
                    shared: None,
                })
            }
        };
        // INVARIANT: The caller does so.
        Ok(Merge {
            trace: self.trace,
            page,
            with,
            outcome: Err(Refusal::Gone),
        })
    }

    fn finish(&mut self, merge: &mut Merge) -> Result<Merged, Refusal> {
        match (&merge.with, merge.outcome) {
            (With::Zero { .. }, outcome) => outcome.map(|()| Merged::Zero),
            (With::Node { item, .. }, Ok(())) => Ok(Merged::Node(self.added(item))),
            (With::Node { item, .. }, Err(refusal)) => {
                self.discard_item(item);
                Err(refusal)
            }
            (With::Page(couple), Ok(())) => Ok(Merged::Pair(Pair {
                // SAFETY: The node is in the arena.
                node: unsafe { (*couple.node.as_ptr()).id },
                first: self.added(&couple.first),
                second: self.added(&couple.second),
                touched: couple.shared.unwrap_or(true),
            })),
            (With::Page(couple), Err(refusal)) => {
                self.discard_item(&couple.second);
                if couple.shared.is_some() {
                    self.added(&couple.first);
                    self.undo_first(&couple.first);
                } else {
                    self.discard_item(&couple.first);
                    // SAFETY: The node is in the arena.
                    self.discard_node(unsafe { (*couple.node.as_ptr()).id });
                }
                Err(refusal)
            }
        }
    }

    fn adopt(
        &mut self,
        at: Place<'_, PinnedMm>,
        batch: &Batch,
        i: usize,
        node: NodeId,
    ) -> Result<ItemId, Refusal> {
        let page = batch.page(i).ok_or(Refusal::Gone)?;
        let node = self.node(node).ok_or(Refusal::Stale)?;
        // SAFETY: The batch holds a reference to the page.
        let folio = unsafe { NonNull::new_unchecked(raw::rksm_page_folio(page.as_ptr())) };
        // SAFETY: As above.
        let folio = unsafe { FolioRef::try_get(folio) }.ok_or(Refusal::Stale)?;
        let item = self.new_item(&at)?;
        let adopted = in_vma(at.mm, at.addr, |_, vma| item.place_in(vma)).and_then(|()| {
            race_window::sleep();
            let lock = folio.lock();
            if folio.mapping() != StableNode::mapping(node) {
                return Err(Refusal::Stale);
            }
            // SAFETY: The node's folio is locked, and names it.
            unsafe { item.append(node, Some(&lock)) };
            Ok(())
        });
        match adopted {
            Ok(()) => Ok(self.added(&item)),
            Err(refusal) => {
                self.discard_item(&item);
                Err(refusal)
            }
        }
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
                (unsafe { (*item.as_ptr()).page() }, id)
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

    fn remove_node(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageId)) -> bool {
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

    fn forget_node(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageId)) {
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
    /// Unshares a page that has just become a merged page alone.
    fn undo_first(&mut self, first: &OwnItem) {
        let (mm, addr, first) = (first.mm(), first.addr(), first.id());
        let node = self.node_of(first);
        if let Some(_user) = mm.mmget_not_zero() {
            race_window::sleep();
            replace_pte::break_one(&mm.mmap_read_lock(), addr);
        }
        let _ = self.release_item(first);
        if let Some(node) = node {
            let _ = self.remove_node(node, &mut |_| {});
        }
    }
}
