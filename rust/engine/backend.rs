// SPDX-License-Identifier: GPL-2.0-only

//! What the engine asks of the kernel.
//!
//! The engine decides, an implementation of [`Backend`] acts. In the module that is `rust/ksm`; on
//! the host it is a simulation. Three traits share the work: a [`Batch`] holds references to
//! collected pages, [`StableNodes`] keeps the merged pages and their mappings, and the [`Backend`]
//! itself collects and merges.
//!
//! # Context
//!
//! No method is called with a spinlock held, except [`WalkFilter::filter`]. Where it is not said
//! otherwise a method may sleep, and takes the mmap lock of one mm at a time, folio locks and page
//! table locks. `thread_mutex` is held throughout.
//!
//! Several threads collect, hash, merge and release pages at once. These methods take `&self` and
//! change only what they are given and the pages themselves. Stable nodes and rmap items change in
//! the methods that take `&mut self`, which one thread calls while the others do not call any.

use super::types::{
    Fingerprint,
    ItemId,
    MmPin,
    NodeId,
    PageId,
    Refusal,
    Refused, //
};
use core::ops::Range;
use kernel::alloc::Flags;

/// What a collected page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// An anonymous page that is not merged.
    Plain,
    /// A merged page with its stable node.
    Ksm(NodeId),
    /// A KSM page that belongs to no stable node: it stays until its mapping is broken.
    Orphan,
}

/// Where a walk stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collected {
    /// The batch is full or a bound is reached. The next walk starts at this address, which may lie
    /// beyond the range that was asked for.
    More(usize),
    /// No mergeable memory is left in this mm.
    End,
    /// The mm is exiting; nothing was collected.
    Exiting,
    /// Another task holds the mmap lock; nothing was collected.
    Busy,
}

/// What a walk does between the pages it reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkStep {
    /// Looks at the next vma, mergeable or not.
    Vma,
    /// Enters a page table, of any level, to look at so many of its entries.
    Table(usize),
}

/// What a walk does with a page it has reached; compare `enum page_walk_action`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkAction {
    /// Collects the page and clears its accessed bit.
    Collect,
    /// Collects the page, but leaves its accessed bit.
    CollectUntouched,
    /// Leaves the page as it is.
    Skip,
    /// Leaves the page, but clears its accessed bit.
    SkipClearAccessed,
    /// Ends the walk before the page.
    Stop,
}

/// Decides how far a walk goes, and for each page that it reaches, in ascending order of the
/// addresses.
///
/// Each walk has a filter of its own.
pub trait WalkFilter {
    /// Returns whether the walk may take this step. If not, it ends there.
    ///
    /// # Context
    ///
    /// May sleep.
    fn step(&mut self, step: WalkStep) -> bool;

    /// Returns what the walk does with the page at `addr`, which lies on NUMA node `nid`.
    /// `accessed` is what [`Batch::accessed`] would return if the page were collected.
    ///
    /// # Context
    ///
    /// Atomic: called with a page table lock held.
    fn filter(&mut self, addr: usize, kind: PageKind, nid: u32, accessed: bool) -> WalkAction;

    /// Counts a mapping of the zero page that KSM has placed, at an address that the walk passes.
    ///
    /// # Context
    ///
    /// As [`WalkFilter::filter`].
    fn ksm_zero_page(&mut self);
}

/// What the engine keeps in each stable node.
///
/// Nodes of one content form a chain, whose head is in the content index; the others are its dups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeMeta {
    /// The content's fingerprint, with the NUMA node mixed in where merging across nodes is off.
    pub fingerprint: Fingerprint,
    /// Next node of the same content; the node itself where there is no other.
    pub next: NodeId,
    /// Previous node of the same content.
    pub prev: NodeId,
    /// Whether the content index refers to this node.
    pub head: bool,
    /// Whether its mappings move to another node of the chain, one by one, until it is gone.
    pub retiring: bool,
}

/// State of a stable node's page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeState {
    /// The page still belongs to the node.
    Alive,
    /// The page is gone, and the node can be removed.
    Stale,
}

/// What releasing an rmap item left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Released {
    /// The stable node that the item was on.
    pub node: NodeId,
    /// rmap items that remain on it.
    pub remaining: u32,
    /// The node's page is unmapped or gone: the caller has to call [`StableNodes::remove`].
    pub due: bool,
}

/// A page by its address, with the id under which the engine tracks it.
pub struct PageAddr<'a, M> {
    /// The mm that maps the page.
    pub mm: &'a M,
    /// Page-aligned address in it.
    pub addr: usize,
    /// The tracked page; stored in the rmap item.
    pub page: PageId,
}

impl<M> Clone for PageAddr<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for PageAddr<'_, M> {}

/// What a page is merged with.
#[derive(Clone, Copy)]
pub enum MergeTarget<C> {
    /// The zero page.
    ZeroPage,
    /// The KSM page of a stable node.
    StableNode(NodeId),
    /// Another page that is not merged yet: the page of the batch becomes the KSM page of a new
    /// node, whose meta has no fingerprint and is a chain of its own without a head.
    Candidate(C),
}

impl<M> MergeTarget<PageAddr<'_, M>> {
    /// Names a candidate by its id.
    pub fn by_id(&self) -> MergeTarget<PageId> {
        match self {
            Self::ZeroPage => MergeTarget::ZeroPage,
            Self::StableNode(node) => MergeTarget::StableNode(*node),
            Self::Candidate(other) => MergeTarget::Candidate(other.page),
        }
    }
}

/// Result of a merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merged {
    /// The zero page is mapped in place of the page.
    ZeroPage,
    /// The KSM page of the stable node is mapped in place of the page, by this rmap item.
    Joined(ItemId),
    /// The page and the candidate are mappings of a new node's KSM page.
    NewNode {
        /// The new node.
        node: NodeId,
        /// rmap item of the page, which has become the KSM page.
        first: ItemId,
        /// rmap item of the candidate, which has been replaced by it.
        second: ItemId,
        /// Hash of the KSM page, made after its contents could no longer change.
        hash: u64,
    },
}

/// A huge folio, valid while a batch holds a reference to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugeId(pub usize);

/// Pages found by walks of one mm, in ascending order of the addresses, each with a reference held.
///
/// Page numbers are below [`Batch::nr_pages`].
pub trait Batch: Send + Sync {
    /// What pages are hashed with.
    type Key: Clone + Send + Sync;

    /// Returns the number of pages.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn nr_pages(&self) -> usize;

    /// Returns the address of page `i`.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn addr(&self, i: usize) -> usize;

    /// Returns whether page `i` may have been accessed through an address space since a walk last
    /// cleared its accessed bit.
    ///
    /// A hint: devices write without setting the bit, and reclaim clears it.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn accessed(&self, i: usize) -> bool;

    /// Returns the addresses of a mapping that has one accessed bit, which a walk has cleared, for
    /// pages some of which the walk may not have reached; empty if there is none.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn cleared_beyond(&self) -> Range<usize>;

    /// Returns the NUMA node of page `i`.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn nid(&self, i: usize) -> u32;

    /// Returns the huge folio that page `i` is part of; it has to be split before a merge.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn huge(&self, i: usize) -> Option<HugeId>;

    /// Hashes the contents of page `i` as they are now.
    ///
    /// # Context
    ///
    /// May sleep. Takes no lock. Several threads hash pages of one batch at once.
    fn hash(&self, i: usize, key: &Self::Key) -> u64;

    /// Returns whether somebody else holds a reference to the folio of page `i`, so that it can
    /// neither be merged nor, where it is huge, be split.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn is_pinned(&self, i: usize) -> bool;

    /// Returns how many references the batch holds to a huge folio.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn huge_refs(&self, huge: HugeId) -> usize;

    /// Drops the batch's reference to page `i`.
    ///
    /// While it is held, any other merge of the page sees it as pinned.
    ///
    /// # Context
    ///
    /// May sleep: the last reference frees the page.
    fn release(&mut self, i: usize);

    /// Drops all references to a huge folio except one for page `keep`.
    ///
    /// A folio can be split only while nothing else holds a reference. [`Backend::reacquire`] takes
    /// the references again.
    ///
    /// # Context
    ///
    /// May sleep. Called by [`Merge::run`], which holds mmap lock and folio lock.
    fn release_huge_folio(&mut self, huge: HugeId, keep: Option<usize>);

    /// Drops all references that are still held, and empties the batch.
    ///
    /// # Context
    ///
    /// May sleep. Several threads clear batches at once, each its own.
    fn clear(&mut self);
}

/// The references that the batches of a pass hold to huge folios.
pub trait HugeFolioRefs {
    /// Returns how many there are to this folio.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn count(&self, huge: HugeId) -> usize;

    /// Drops them, except for one to the page that is merged.
    ///
    /// # Context
    ///
    /// May sleep. Called by [`Merge::run`], which holds mmap lock and folio lock.
    fn release(&mut self, huge: HugeId);
}

/// There are none.
impl HugeFolioRefs for () {
    fn count(&self, _: HugeId) -> usize {
        0
    }

    fn release(&mut self, _: HugeId) {}
}

/// A merge that is ready.
pub trait Merge {
    /// Replaces the page, or leaves it and its target unchanged; compare `try_to_merge_one_page()`.
    ///
    /// Whatever can be known before anything changes is looked at before, in the page and in its
    /// target: locks, references, marks, contents. In particular no huge folio is split before
    /// that. Before a split the references of the batches to the folio are released.
    ///
    /// Merges that run at the same time have different contents, and no batch holds references to
    /// a huge folio that they split. Other merges may be prepared and finished meanwhile.
    ///
    /// # Context
    ///
    /// May sleep. Takes the mmap lock of one mm at a time, then folio locks, then page table locks.
    /// Several threads run merges at once, each its own.
    fn run(&mut self, huge: &mut impl HugeFolioRefs);

    /// Runs merges one after the other. No batch holds references to huge folios that they split.
    ///
    /// # Context
    ///
    /// As [`Merge::run`].
    fn run_all<'a>(merges: impl Iterator<Item = &'a mut Self>)
    where
        Self: 'a,
    {
        merges.for_each(|merge| merge.run(&mut ()));
    }
}

/// The stable nodes and their rmap items.
pub trait StableNodes {
    /// Returns the node that an rmap item is on.
    ///
    /// # Context
    ///
    /// Any: [`WalkFilter::filter`] calls it. Takes no lock.
    fn node_of(&self, item: ItemId) -> Option<NodeId>;

    /// Removes an rmap item from its node and frees it; compare `remove_rmap_item_from_tree()`.
    ///
    /// # Context
    ///
    /// May sleep. Takes the lock of the folio that the node names.
    fn release_item(&mut self, item: ItemId) -> Option<Released>;

    /// Returns what the engine keeps in a node.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn meta(&self, node: NodeId) -> Option<NodeMeta>;

    /// Changes what the engine keeps in a node.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn set_meta(&mut self, node: NodeId, meta: NodeMeta);

    /// Returns the NUMA node that the node's page was on when its fingerprint was made.
    ///
    /// # Context
    ///
    /// Any: [`WalkFilter::filter`] calls it. Takes no lock.
    fn nid(&self, node: NodeId) -> u32;

    /// Changes [`StableNodes::nid`].
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn set_nid(&mut self, node: NodeId, nid: u32);

    /// Returns the number of rmap items on a node.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn mappings(&self, node: NodeId) -> u32;

    /// Returns the hash of the contents of a node's page; `None` if it is gone, or not readable.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn content_hash(&self, node: NodeId) -> Option<u64>;

    /// Returns whether the node's page still exists; compare `ksm_get_folio()`.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn state(&self, node: NodeId) -> NodeState;

    /// Frees a node whose page is unmapped or gone; compare `remove_stable_node()`.
    ///
    /// Calls `orphan` with the page of each rmap item that was still on it. Returns whether the
    /// node was freed: a node whose page is mapped is not.
    ///
    /// # Context
    ///
    /// May sleep. Takes the lock of the folio that the node names.
    fn remove(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageId)) -> bool;

    /// Frees a node without looking at its page.
    ///
    /// # Context
    ///
    /// May sleep. Takes no folio lock: the frame of the page may be gone.
    fn forget(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageId));

    /// Returns the first node after `after` in the order of their numbers; `None` at the end.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn next(&self, after: Option<NodeId>) -> Option<NodeId>;

    /// Returns the first node after `after` whose page frame number lies in `frames`.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn next_in(&self, after: Option<NodeId>, frames: Range<usize>) -> Option<NodeId>;

    /// Returns the number of nodes.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn count(&self) -> usize;

    /// Returns how many bytes of memory nodes and rmap items take.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn bytes(&self) -> usize;
}

/// The memory that is scanned and merged.
///
/// # Contract
///
/// Its users have no `unsafe`, and yet the soundness of an implementation may rest on what they do.
/// They keep this:
///
/// - A merge is finished before the batch that its page belongs to drops its reference to that page
///   (other than for the split of [`HugeFolioRefs::release`], which leaves one), and before the
///   backend is dropped.
/// - From [`Backend::prepare`] until [`Backend::finish`] no rmap item is released from the node
///   that is merged with, and the node is not removed. Merges that run at the same time have
///   different contents.
/// - [`StableNodes::forget`] is called for nodes whose page frames have gone offline, and
///   no function that looks at page frames between their going offline and that.
/// - Numbers of items and nodes are those that these functions have given out. An item is not used
///   once it has been released, or its node has been freed.
pub trait Backend: StableNodes + Sync {
    /// A pinned mm (`mmgrab`).
    type Mm: MmPin + Send + Sync;
    /// Collected pages.
    type Batch: Batch;
    /// A merge that has been decided on, with all that it needs.
    type Merge: Merge + Send + Unpin;

    /// Flags of allocations for what is known of pages. They never call the OOM killer.
    const GFP: Flags;

    /// Adds pages of mergeable vmas of `mm` to the batch; compare `scan_get_next_rmap_item()`.
    ///
    /// Adds up to `limit` pages whose addresses are `within` and that `filter` collects. The batch
    /// has room for them. Other threads may collect at the same time, but not within `own`.
    ///
    /// The walk may also end early because another task waits for the mmap lock, but not before it
    /// has taken some steps.
    ///
    /// # Context
    ///
    /// May sleep. Takes the mmap lock of `mm` once, if it need not wait for it, and under it page
    /// table locks.
    fn collect<F: WalkFilter>(
        &self,
        mm: &Self::Mm,
        within: Range<usize>,
        limit: usize,
        own: &Range<usize>,
        batch: &mut Self::Batch,
        filter: &mut F,
    ) -> Collected;

    /// Has every later access to the mm set the accessed bit of its page, if a walk has cleared
    /// that. Until then a CPU may use a translation that it remembers, and set none.
    ///
    /// # Context
    ///
    /// May sleep. Takes no lock.
    fn flush_tlb(&self, mm: &Self::Mm);

    /// Returns what page `i` of the batch is now.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn kind(&self, batch: &Self::Batch, i: usize) -> PageKind;

    /// Replaces the reference to page `i` that [`Batch::release_huge_folio`] has dropped, by one to
    /// the page that is mapped at its address now. Returns whether the batch holds one.
    ///
    /// # Context
    ///
    /// May sleep. Takes the mmap lock of `mm`. No mmap lock is held.
    fn reacquire(&self, mm: &Self::Mm, batch: &mut Self::Batch, i: usize) -> bool;

    /// Returns what [`Batch::hash`] needs.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn key(&self) -> <Self::Batch as Batch>::Key;

    /// Returns the hash of a page of zeroes.
    ///
    /// # Context
    ///
    /// Any: [`WalkFilter::filter`] calls it. Takes no lock.
    fn zero_hash(&self) -> u64;

    /// Sets `use_zero_pages` for merges that are prepared from now on: whether pages of zeroes that
    /// a split replaces by the zero page count as placed by KSM, or get pages of their own.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn set_use_zero_pages(&mut self, on: bool);

    /// Prepares the merge of page `i` of the batch. With `nid` the target has to lie on that NUMA
    /// node. If the page is a KSM page itself, its mapping moves to the target, which is another
    /// stable node.
    ///
    /// The batch keeps its reference to the page until [`Backend::finish`].
    ///
    /// # Context
    ///
    /// May sleep. Takes no mmap lock and no folio lock. Other merges may be running.
    ///
    /// # Errors
    ///
    /// Why the page cannot be merged, and whose fault it is. Nothing has changed.
    fn prepare(
        &mut self,
        page: PageAddr<'_, Self::Mm>,
        batch: &Self::Batch,
        i: usize,
        target: MergeTarget<PageAddr<'_, Self::Mm>>,
        nid: Option<u32>,
    ) -> Result<Self::Merge, Refused>;

    /// Records the result of a merge, and frees the objects that it has not used.
    ///
    /// Takes the merge, so that it ends once.
    ///
    /// # Context
    ///
    /// May sleep. Takes mmap lock and folio lock of the first page if its merge has to be undone.
    ///
    /// # Errors
    ///
    /// Why the page was not merged, and whose fault that is. Every process reads the same contents
    /// as before.
    fn finish(&mut self, merge: Self::Merge) -> Result<Merged, Refused>;

    /// Creates the rmap item of a page that maps the KSM page of `node` without one, as after a
    /// fork; compare `stable_tree_append()`.
    ///
    /// # Context
    ///
    /// May sleep. Takes the mmap lock of the mm, and after that the lock of the folio.
    ///
    /// # Errors
    ///
    /// `Stale` if the page does not map it, and what else keeps the item from being created.
    fn adopt(
        &mut self,
        page: PageAddr<'_, Self::Mm>,
        batch: &Self::Batch,
        i: usize,
        node: NodeId,
    ) -> Result<ItemId, Refusal>;

    /// Adds `delta` to the mm's count of tracked pages (`ksm_rmap_items` of `/proc/PID/ksm_stat`).
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn account_tracked(&mut self, mm: &Self::Mm, delta: isize);

    /// Returns how many mappings of the zero page KSM has placed in the mm, as the core of mm
    /// counts them (`ksm_zero_pages` of `/proc/PID/ksm_stat`). The count may be wrong.
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn zero_pages(&self, mm: &Self::Mm) -> isize;

    /// Adds `delta` to the count of [`Backend::zero_pages`].
    ///
    /// # Context
    ///
    /// Any. Takes no lock.
    fn correct_zero_pages(&self, mm: &Self::Mm, delta: isize);

    /// Reschedules if necessary.
    ///
    /// # Context
    ///
    /// May sleep. No lock is held except `thread_mutex`.
    fn cond_resched(&self);
}
