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
    Refusal, //
};
use core::ops::Range;

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
}

/// What a walk does with a page it has reached; compare `enum page_walk_action`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkAction {
    /// Collects the page and clears its accessed bit.
    Collect,
    /// Leaves the page as it is.
    Skip,
    /// Leaves the page, but clears its accessed bit.
    SkipClearAccessed,
    /// Ends the walk before the page.
    Stop,
}

/// Decides for each page that a walk reaches, in ascending order of the addresses.
///
/// Each walk has a filter of its own.
pub trait WalkFilter {
    /// Returns what the walk does with the page at `addr`, which lies on NUMA node `nid`.
    /// `accessed` is what [`Batch::accessed`] would return if the page were collected.
    ///
    /// # Context
    ///
    /// Atomic: called with a page table lock held.
    fn filter(&mut self, addr: usize, kind: PageKind, nid: u32, accessed: bool) -> WalkAction;
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
    /// The node's page is unmapped or gone: [`StableNodes::remove`] is due.
    pub due: bool,
    /// Another item of the node took over the number of the released one: its page.
    pub moved: Option<(PageId, ItemId)>,
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
        /// Until it was write-protected, the page may have been accessed after it was collected.
        accessed: bool,
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
    fn nr_pages(&self) -> usize;

    /// Returns the address of page `i`.
    fn addr(&self, i: usize) -> usize;

    /// Returns whether page `i` may have been accessed through an address space since a walk last
    /// cleared its accessed bit.
    ///
    /// A hint: devices write without setting the bit, and reclaim clears it.
    fn accessed(&self, i: usize) -> bool;

    /// Returns the NUMA node of page `i`.
    fn nid(&self, i: usize) -> u32;

    /// Returns the huge folio that page `i` is part of; it has to be split before a merge.
    fn huge(&self, i: usize) -> Option<HugeId>;

    /// Hashes the contents of page `i` as they are now.
    fn hash(&self, i: usize, key: &Self::Key) -> u64;

    /// Drops the batch's reference to page `i`. While it is held, any other merge of the page sees
    /// it as pinned.
    fn release(&mut self, i: usize);

    /// Drops all references to a huge folio except one for page `keep`: a folio can be split only
    /// if no other reference is held. The pages can be had again by [`Backend::reacquire`].
    fn release_huge_folio(&mut self, huge: HugeId, keep: Option<usize>);

    /// Drops all references that are still held, and empties the batch.
    fn clear(&mut self);
}

/// A merge that is ready.
pub trait Merge {
    /// Replaces the page, or leaves it and its target as they were.
    ///
    /// Calls `before_split` before it splits a huge folio, so that all other references to it can
    /// be dropped. Merges that run at the same time have different contents, and are of small pages
    /// only. Others may be prepared and finished meanwhile.
    fn run(&mut self, before_split: impl FnOnce());

    /// Runs merges of small pages, one after the other.
    fn run_all<'a>(merges: impl Iterator<Item = &'a mut Self>)
    where
        Self: 'a,
    {
        merges.for_each(|merge| merge.run(|| ()));
    }
}

/// The stable nodes and their rmap items.
pub trait StableNodes {
    /// Returns the node that an rmap item is on.
    fn node_of(&self, item: ItemId) -> Option<NodeId>;

    /// Takes an rmap item off its node and frees it.
    fn release_item(&mut self, item: ItemId) -> Option<Released>;

    /// Returns what the engine keeps in a node.
    fn meta(&self, node: NodeId) -> Option<NodeMeta>;

    /// Changes what the engine keeps in a node.
    fn set_meta(&mut self, node: NodeId, meta: NodeMeta);

    /// Returns the NUMA node that the node's page was on when its fingerprint was made.
    fn nid(&self, node: NodeId) -> u32;

    /// Changes [`StableNodes::nid`].
    fn set_nid(&mut self, node: NodeId, nid: u32);

    /// Returns the number of rmap items on a node.
    fn mappings(&self, node: NodeId) -> u32;

    /// Returns whether the node's page still exists.
    ///
    /// # Context
    ///
    /// Takes no lock.
    fn state(&self, node: NodeId) -> NodeState;

    /// Frees a node whose page is unmapped or gone, and calls `orphan` with the page of each rmap
    /// item that was still on it. Returns whether it was freed: a node whose page is mapped is not.
    fn remove(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageId)) -> bool;

    /// Frees a node without looking at its page.
    fn forget(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageId));

    /// Returns the first node after `after` in the order of their numbers; `None` at the end.
    fn next(&self, after: Option<NodeId>) -> Option<NodeId>;

    /// Returns the first node after `after` whose page frame number lies in `frames`.
    fn next_in(&self, after: Option<NodeId>, frames: Range<usize>) -> Option<NodeId>;

    /// Returns the number of nodes.
    fn count(&self) -> usize;

    /// Returns how many bytes of memory nodes and rmap items take.
    fn bytes(&self) -> usize;
}

/// The memory that is scanned and merged.
pub trait Backend: StableNodes + Sync {
    /// A pinned mm (`mmgrab`).
    type Mm: MmPin + Send + Sync;
    /// Collected pages.
    type Batch: Batch;
    /// A merge that has been decided on, with all that it needs.
    type Merge: Merge + Send + Unpin;

    /// Adds up to `limit` pages of mergeable vmas of `mm` whose addresses are `within`, as far as
    /// `filter` collects them, to the batch, which has room for them. Other threads may collect at
    /// the same time, but not within `own`.
    ///
    /// # Context
    ///
    /// May sleep. Takes the mmap lock of `mm` once, and walks its page tables once.
    fn collect<F: WalkFilter>(
        &self,
        mm: &Self::Mm,
        within: Range<usize>,
        limit: usize,
        own: &Range<usize>,
        batch: &mut Self::Batch,
        filter: &mut F,
    ) -> Collected;

    /// Returns what page `i` of the batch is now.
    fn kind(&self, batch: &Self::Batch, i: usize) -> PageKind;

    /// Takes a reference again to the page that is mapped at the address of page `i` now, if
    /// [`Batch::release_huge_folio`] has dropped it. Returns whether the batch holds one.
    fn reacquire(&self, mm: &Self::Mm, batch: &mut Self::Batch, i: usize) -> bool;

    /// Returns what [`Batch::hash`] needs.
    fn key(&self) -> <Self::Batch as Batch>::Key;

    /// Returns the hash of a page of zeroes.
    fn zero_hash(&self) -> u64;

    /// Prepares the merge of page `i` of the batch, whose reference stays there until
    /// [`Backend::finish`]. With `nid` the target has to lie on that NUMA node.
    ///
    /// # Errors
    ///
    /// Nothing has changed.
    fn prepare(
        &mut self,
        page: PageAddr<'_, Self::Mm>,
        batch: &Self::Batch,
        i: usize,
        target: MergeTarget<PageAddr<'_, Self::Mm>>,
        nid: Option<u32>,
    ) -> Result<Self::Merge, Refusal>;

    /// Records the result of a merge, and frees what it has not used.
    ///
    /// # Errors
    ///
    /// For their users, contents and mappings of the pages are unchanged.
    fn finish(&mut self, merge: &mut Self::Merge) -> Result<Merged, Refusal>;

    /// Records that `page` maps the KSM page of `node`, as it does after a fork.
    ///
    /// # Errors
    ///
    /// `Gone` where it does not.
    fn adopt(
        &mut self,
        page: PageAddr<'_, Self::Mm>,
        batch: &Self::Batch,
        i: usize,
        node: NodeId,
    ) -> Result<ItemId, Refusal>;

    /// Adds `delta` to the mm's count of tracked pages (`ksm_rmap_items` of `/proc/PID/ksm_stat`).
    fn account_tracked(&mut self, mm: &Self::Mm, delta: isize);

    /// Reschedules if that is due.
    fn cond_resched(&self);

    /// Returns whether the scan pauses (freezer, stop). Asked once after each pass.
    fn should_pause(&self) -> bool;
}
