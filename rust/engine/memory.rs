// SPDX-License-Identifier: GPL-2.0-only

//! What the engine asks of the memory it merges.
//!
//! The engine decides, an implementation of [`Memory`] acts. In the module that is the `mm` layer over the
//! kernel's mm APIs; on the host it is a simulation. No method is called with a spinlock held: each may take
//! the mmap lock of one mm at a time, folio locks and page table locks, and may sleep.
//!
//! What takes long may be done by several threads at once: collecting, hashing, merging, giving up pages. So these take
//! `&self`, and change nothing but what they are given and the pages themselves; what is kept of merged pages changes in
//! the methods that take `&mut self`, which one thread calls while the others do nothing.

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
    /// A page of KSM's that belongs to no stable node: left to be unshared by its owner.
    Orphan,
}

/// Where a walk for pages stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collected {
    /// The batch is full or a bound is reached; go on at this address, which may lie beyond what was asked for.
    More(usize),
    /// No mergeable memory is left in this mm.
    End,
    /// The mm is exiting; nothing was collected.
    Exiting,
}

/// What is to become of a page that a walk comes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Collect it.
    Take,
    /// Leave it, without a reference.
    Pass,
    /// The same, but take the mark away that it was touched.
    Note,
    /// End the walk before it.
    Stop,
}

/// Looks at each page that a walk comes by, in ascending order of the addresses.
///
/// Not shared: each walk has its own.
pub trait Look {
    /// Says what is to become of the page at `addr`, of NUMA node `nid`, with [`Memory::touched`] as it would be if
    /// the page were taken.
    ///
    /// Called with a page table lock held: neither sleeps nor allocates.
    fn look(&mut self, addr: usize, kind: PageKind, nid: u32, touched: bool) -> Interest;
}

/// What the engine keeps in each stable node.
///
/// Nodes of one content form a ring, of which exactly one node, the head, stands in the content index.
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
    /// The page is still the node's.
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
    /// The node's page is unmapped or gone: [`Memory::remove_node`] is due.
    pub due: bool,
    /// The tracked page of another item of the node, which has got the number of the one that is gone.
    pub moved: Option<(PageId, ItemId)>,
}

/// A stable node made from two pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The new node.
    pub node: NodeId,
    /// rmap item of the first page, which has become the merged page.
    pub first: ItemId,
    /// rmap item of the second page, which has been replaced by it.
    pub second: ItemId,
    /// Until it could not change any more, the first page may have been touched after the walk took it.
    pub touched: bool,
}

/// A page by its address, with the reference under which the engine tracks it.
pub struct Place<'a, M> {
    /// The mm that maps the page.
    pub mm: &'a M,
    /// Page-aligned address in it.
    pub addr: usize,
    /// The engine's name for this address; stored in the rmap item.
    pub page: PageId,
}

impl<M> Clone for Place<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for Place<'_, M> {}

/// What a page of a batch is to be merged with.
pub enum Partner<'a, M> {
    /// The zero page.
    Zero,
    /// The merged page of a stable node.
    Node {
        /// The node.
        node: NodeId,
        /// Demands that its page lies on this NUMA node.
        nid: Option<u32>,
    },
    /// Another page that is not merged yet: the page of the batch becomes the merged page of a new node.
    ///
    /// The new node's meta has no fingerprint and the node as its own ring, and is not a head.
    Page {
        /// Where it is.
        other: Place<'a, M>,
        /// Demands that it lies on this NUMA node.
        nid: Option<u32>,
    },
}

/// A huge page, as long as a batch has a reference to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugeId(pub usize);

/// What has come of a merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merged {
    /// The zero page is mapped in the page's place.
    Zero,
    /// The node's page is, with this rmap item.
    Node(ItemId),
    /// There is a new node.
    Pair(Pair),
}

/// A merge that is ready.
pub trait Merge {
    /// Replaces the page, or leaves it and its partner as they were.
    ///
    /// Calls `before_split` before it splits a huge page, for all other references to that to be given up. Merges that are
    /// done at the same time are of different contents, and of small pages only. Meanwhile others may be made ready and
    /// finished.
    fn run(&mut self, before_split: impl FnOnce());

    /// Runs merges of small pages, one after the other.
    fn run_all<'a>(merges: impl Iterator<Item = &'a mut Self>)
    where
        Self: 'a,
    {
        merges.for_each(|merge| merge.run(|| ()));
    }
}

/// The memory that is scanned and merged.
pub trait Memory: Sync {
    /// A pinned mm (`mmgrab`).
    type Mm: MmPin + Send + Sync;
    /// A bounded run of collected pages, each with a reference held.
    type Batch: Send + Sync;
    /// What pages are hashed with.
    type Key: Clone + Send + Sync;
    /// A merge that has been decided on, with all that it needs.
    type Merge: Merge + Send + Unpin;

    /// Adds up to `limit` pages of mergeable vmas of `mm` whose addresses are `within`, of those that `look` takes, to the
    /// `batch`, which has room for them. Other threads may collect beside it, but not within `own`.
    ///
    /// Takes and releases the mmap lock of `mm` once; walks its page tables once.
    fn collect<L: Look>(
        &self,
        mm: &Self::Mm,
        within: Range<usize>,
        limit: usize,
        own: &Range<usize>,
        batch: &mut Self::Batch,
        look: &mut L,
    ) -> Collected;

    /// Pages in the batch.
    fn len(&self, batch: &Self::Batch) -> usize;
    /// Address of the `i`th page; ascending in `i`.
    fn addr(&self, batch: &Self::Batch, i: usize) -> usize;
    /// What the `i`th page is now.
    fn kind(&self, batch: &Self::Batch, i: usize) -> PageKind;
    /// Whether the `i`th page may have been read or written through an address space since a walk last took or noted it.
    ///
    /// Where it is false, the contents are most likely what they were then, but not surely: a device may have written to
    /// them, and others forget of a page that it was touched.
    fn touched(&self, batch: &Self::Batch, i: usize) -> bool;
    /// Hash of the contents of the `i`th page, as they are now.
    fn hash(&self, batch: &Self::Batch, i: usize) -> u64 {
        Self::hash_by(&self.key(), batch, i)
    }
    /// What [`Memory::hash`] uses, for threads that hash while others change what is kept here.
    fn key(&self) -> Self::Key;
    /// [`Memory::hash`] with such a key.
    fn hash_by(key: &Self::Key, batch: &Self::Batch, i: usize) -> u64;
    /// NUMA node of the `i`th page.
    fn nid(&self, batch: &Self::Batch, i: usize) -> u32;
    /// The huge page that the `i`th page is part of, which has to be split before that is merged.
    fn huge(&self, batch: &Self::Batch, i: usize) -> Option<HugeId>;
    /// Takes note that nothing more is to be done with the `i`th page.
    fn done(&self, _batch: &Self::Batch, _i: usize) {}
    /// Gives up the reference to the `i`th page: as long as there is one, the page cannot be merged, but by who has it.
    fn release(&self, batch: &mut Self::Batch, i: usize);
    /// Gives up all references to a huge page, but one for the page `keep`: it can be split only if there are no others.
    fn make_way(&self, batch: &mut Self::Batch, huge: HugeId, keep: Option<usize>);
    /// Takes a reference again to what is now mapped at the address of the `i`th page, if [`Memory::make_way`] has given that
    /// up. Returns whether the batch has one.
    fn regain(&self, mm: &Self::Mm, batch: &mut Self::Batch, i: usize) -> bool;
    /// Gives up all references that are still held, and empties the batch.
    fn clear(&self, batch: &mut Self::Batch);
    /// The same, for a walk that is to be done anew.
    fn discard(&self, batch: &mut Self::Batch) {
        self.clear(batch);
    }
    /// Hash of a page of zeroes.
    fn zero_hash(&self) -> u64;

    /// Makes ready to replace the `i`th page of the batch, which stays there until [`Memory::finish`].
    ///
    /// # Errors
    ///
    /// Nothing has changed.
    fn prepare(
        &mut self,
        at: Place<'_, Self::Mm>,
        batch: &Self::Batch,
        i: usize,
        partner: Partner<'_, Self::Mm>,
    ) -> Result<Self::Merge, Refusal>;

    /// Takes note of what has come of a merge, and frees what it has not used.
    ///
    /// # Errors
    ///
    /// The pages' contents and mappings are for their users what they were.
    fn finish(&mut self, merge: &mut Self::Merge) -> Result<Merged, Refusal>;

    /// Records that `at` maps the merged page of `node`, as it does after a fork.
    ///
    /// # Errors
    ///
    /// `Gone` where it does not.
    fn adopt(
        &mut self,
        at: Place<'_, Self::Mm>,
        batch: &Self::Batch,
        i: usize,
        node: NodeId,
    ) -> Result<ItemId, Refusal>;

    /// The node that an rmap item is on.
    fn node_of(&self, item: ItemId) -> Option<NodeId>;
    /// Takes an rmap item off its node and frees it.
    fn release_item(&mut self, item: ItemId) -> Option<Released>;

    /// What the engine keeps in a node.
    fn meta(&self, node: NodeId) -> Option<NodeMeta>;
    /// Changes what the engine keeps in a node.
    fn set_meta(&mut self, node: NodeId, meta: NodeMeta);
    /// The NUMA node that the node's page was on when its fingerprint was made.
    fn node_nid(&self, node: NodeId) -> u32;
    /// Changes [`Memory::node_nid`].
    fn set_node_nid(&mut self, node: NodeId, nid: u32);
    /// rmap items on a node.
    fn mappings(&self, node: NodeId) -> u32;
    /// Whether the node's page still exists. Takes no lock that sleeps.
    fn state(&self, node: NodeId) -> NodeState;
    /// Frees a node whose page is unmapped or gone, calling `orphan` with the tracked page of each rmap item that was
    /// still on it. Returns whether it was freed: a node whose page is mapped is not.
    fn remove_node(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageId)) -> bool;
    /// The first node after `after` whose page frame number lies in `frames`.
    fn next_node_in(&self, after: Option<NodeId>, frames: Range<usize>) -> Option<NodeId>;
    /// Frees a node without looking at its page.
    fn forget_node(&mut self, node: NodeId, orphan: &mut dyn FnMut(PageId));
    /// The first node after `after` in the order of their numbers; `None` at the end.
    fn next_node(&self, after: Option<NodeId>) -> Option<NodeId>;
    /// Nodes in existence.
    fn nodes(&self) -> usize;

    /// Adds `delta` to the mm's count of tracked pages (`ksm_rmap_items` of `/proc/PID/ksm_stat`).
    fn account_tracked(&mut self, mm: &Self::Mm, delta: isize);

    /// Bytes of memory that nodes and rmap items take.
    fn bytes(&self) -> usize;

    /// Called between pages: a chance to reschedule. Returns whether the scan should pause (freezer, stop).
    fn breathe(&mut self) -> bool;
}
