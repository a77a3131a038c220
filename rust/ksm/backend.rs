// SPDX-License-Identifier: GPL-2.0-only

//! The engine's [`Backend`], implemented with the other files of this folder.

use crate::engine::{
    backend::{
        Backend,
        Batch as _,
        Collected,
        MergeTarget,
        Merged,
        PageAddr,
        PageKind,
        WalkAction,
        WalkFilter,
        WalkStep, //
    },
    content_hash::ContentKey,
    types::{
        ItemId,
        NodeId,
        Refusal,
        Refused, //
    },
};
use crate::{
    bindings::raw,
    kernel_ext::{
        gfp::GFP_METADATA,
        mm::{
            LiveMm,
            PinnedMm, //
        },
        race_window,
        symbols::Symbols, //
    },
    ksm::{
        batch::Batch,
        collect::{
            self,
            MappedFilter, //
        },
        merge::{
            in_vma,
            Merge,
            NewNode,
            Prepared, //
        },
        page::{
            self,
            Mapped, //
        },
        stable_nodes::StableNodes, //
    }, //
};
use core::ops::Range;
use kernel::{
    alloc::Flags,
    mm::virt::VmaRef,
    prelude::*,
    sync::Arc, //
};

/// Returns how many mappings of the zero page KSM has placed in an mm, as the core of mm counts
/// them.
///
/// An mm whose memory is gone has none, whatever its count says.
///
/// # Context
///
/// Any.
pub(crate) fn zero_pages(mm: &PinnedMm) -> isize {
    // SAFETY: The mm is pinned.
    unsafe {
        match raw::rksm_mm_has_vmas(mm.as_ptr()) {
            true => raw::rksm_mm_zero_pages(mm.as_ptr()).max(0),
            false => 0,
        }
    }
}

/// Returns the core's count for all mms. What shows it is the built-in.
///
/// # Context
///
/// Any.
pub(crate) fn all_zero_pages(_symbols: Symbols) -> isize {
    // SAFETY: The counter has been resolved.
    unsafe { raw::rksm_ksm_zero_pages() }
}

/// Adds `delta` to the core's count for all mms.
///
/// # Context
///
/// Any.
pub(crate) fn correct_all_zero_pages(_symbols: Symbols, delta: isize) {
    // SAFETY: The counter has been resolved.
    unsafe { raw::rksm_add_ksm_zero_pages(delta) };
}

/// A filter of the engine, which is told the kind of each page.
struct KindFilter<'a, F> {
    nodes: &'a StableNodes,
    filter: &'a mut F,
}

impl<F: WalkFilter> MappedFilter for KindFilter<'_, F> {
    fn step(&mut self, step: WalkStep) -> bool {
        self.filter.step(step)
    }

    fn filter(&mut self, addr: usize, mapped: &Mapped<'_>) -> WalkAction {
        if mapped.ksm_zero() {
            self.filter.ksm_zero_page();
            return WalkAction::Skip;
        }
        // SAFETY: The folio is mapped, as `mapped` shows.
        let kind = unsafe { self.nodes.kind_of(mapped.mapping()) };
        self.filter
            .filter(addr, kind, mapped.nid(), mapped.accessed())
    }
}

impl Backend for StableNodes {
    type Mm = PinnedMm;
    type Batch = Batch;
    type Merge = Merge;

    const GFP: Flags = GFP_METADATA;

    fn collect<F: WalkFilter>(
        &self,
        mm: &PinnedMm,
        within: Range<usize>,
        limit: usize,
        own: &Range<usize>,
        batch: &mut Batch,
        filter: &mut F,
    ) -> Collected {
        batch.set_limit(limit, own);
        race_window::sleep();
        // A process that holds its lock for long keeps others from being scanned if it is waited
        // for here.
        let Some(guard) = mm.mmap_read_trylock() else {
            return Collected::Busy;
        };
        let Some(live) = guard.live() else {
            return Collected::Exiting;
        };
        let mut filter = KindFilter {
            nodes: self,
            filter,
        };
        match collect::collect(live, within, batch, &mut filter) {
            Some(next) => Collected::More(next),
            None => Collected::End,
        }
    }

    fn flush_tlb(&self, mm: &PinnedMm) {
        mm.flush_tlb();
    }

    fn kind(&self, batch: &Batch, i: usize) -> PageKind {
        let Some(page) = batch.page(i) else {
            return PageKind::Orphan;
        };
        // SAFETY: The page is referenced.
        unsafe { self.kind_of(page.mapping()) }
    }

    fn reacquire(&self, mm: &PinnedMm, batch: &mut Batch, i: usize) -> bool {
        if !batch.released_for_split(i) {
            return true;
        }
        let addr = batch.addr(i);
        let held = in_vma(mm, addr, |_, vma| {
            page::page_at(vma, addr).ok_or(Refusal::Gone)
        });
        held.map(|held| batch.reacquire(i, held)).is_ok()
    }

    fn key(&self) -> Arc<ContentKey> {
        self.key.clone()
    }

    fn zero_hash(&self) -> u64 {
        self.zero_hash
    }

    fn set_use_zero_pages(&mut self, on: bool) {
        self.use_zero_pages = on;
    }

    fn prepare(
        &mut self,
        page: PageAddr<'_, PinnedMm>,
        batch: &Batch,
        i: usize,
        target: MergeTarget<PageAddr<'_, PinnedMm>>,
        nid: Option<u32>,
    ) -> Result<Merge, Refused> {
        let own = batch.page(i).ok_or(Refused::Page(Refusal::Gone))?;
        let prepared = match target {
            MergeTarget::ZeroPage => Prepared::ZeroPage {
                mm: page.mm.clone(),
                addr: page.addr,
            },
            MergeTarget::StableNode(node) => {
                let stale = Refused::Target(Refusal::Stale);
                let node = self.node(node).ok_or(stale)?;
                let kfolio = self.get_folio(node).ok_or(stale)?;
                if nid.is_some_and(|nid| nid != kfolio.page().nid()) {
                    return Err(Refused::Target(Refusal::FarNode));
                }
                Prepared::Join {
                    node: node.as_non_null(),
                    kfolio,
                    item: self.new_item(&page).map_err(Refused::Page)?,
                }
            }
            MergeTarget::Candidate(other) => {
                // Neither page is to blame for a lack of memory; another candidate would not help.
                let first = self.new_item(&page).map_err(Refused::Page)?;
                let second = match self.new_item(&other) {
                    Ok(second) => second,
                    Err(refusal) => {
                        self.discard_item(first);
                        return Err(Refused::Page(refusal));
                    }
                };
                let node = match self.new_node(own) {
                    Ok(node) => node,
                    Err(refusal) => {
                        self.discard_item(first);
                        self.discard_item(second);
                        return Err(Refused::Page(refusal));
                    }
                };
                // INVARIANT: They have just been allocated.
                Prepared::NewNode(NewNode {
                    node,
                    first,
                    second,
                    nid,
                    key: self.key.clone(),
                    converted: false,
                    hash: 0,
                })
            }
        };
        // INVARIANT: The batch references the page. Nothing has been linked.
        Ok(Merge {
            trace: self.trace,
            page: own.as_non_null(),
            use_zero_pages: self.use_zero_pages,
            prepared,
            outcome: None,
        })
    }

    fn finish(&mut self, merge: Merge) -> Result<Merged, Refused> {
        let outcome = merge.outcome.unwrap_or(Err(Refused::Page(Refusal::Gone)));
        match (merge.prepared, outcome) {
            (Prepared::ZeroPage { .. }, outcome) => outcome.map(|()| Merged::ZeroPage),
            (Prepared::Join { item, .. }, Ok(())) => Ok(Merged::Joined(self.added(&item))),
            (Prepared::Join { item, .. }, Err(refused)) => {
                self.discard_item(item);
                Err(refused)
            }
            (Prepared::NewNode(new), Ok(())) => Ok(Merged::NewNode {
                node: new.node().id(),
                first: self.added(&new.first),
                second: self.added(&new.second),
                hash: new.hash,
            }),
            (Prepared::NewNode(new), Err(refused)) => {
                let node = new.node().id();
                self.discard_item(new.second);
                if new.converted {
                    self.added(&new.first);
                    self.unmerge_first(&new.first);
                } else {
                    self.discard_item(new.first);
                    // SAFETY: By the invariant of `Merge` no item is on the node, and no folio
                    // names it.
                    unsafe { self.discard_node(node) };
                }
                Err(refused)
            }
        }
    }

    fn adopt(
        &mut self,
        page: PageAddr<'_, PinnedMm>,
        batch: &Batch,
        i: usize,
        node: NodeId,
    ) -> Result<ItemId, Refusal> {
        let own = batch.page(i).ok_or(Refusal::Gone)?;
        self.node(node).ok_or(Refusal::Stale)?;
        let folio = own.get();
        let item = self.new_item(&page)?;
        // SAFETY: The item has not been linked.
        let set_anon_vma = |_: LiveMm<'_>, vma: &VmaRef| unsafe { item.set_anon_vma(vma) };
        let adopted = in_vma(page.mm, page.addr, set_anon_vma).and_then(|()| {
            race_window::sleep();
            let lock = folio.lock();
            let node = self.node(node).ok_or(Refusal::Stale)?;
            if folio.mapping() != node.mapping() {
                return Err(Refusal::Stale);
            }
            // SAFETY: The item has not been linked. The node's folio is locked, and names it. The
            // item is freed here only where this was not reached.
            unsafe { item.link(node, Some(&lock)) };
            Ok(())
        });
        match adopted {
            Ok(()) => Ok(self.added(&item)),
            Err(refusal) => {
                self.discard_item(item);
                Err(refusal)
            }
        }
    }

    fn account_tracked(&mut self, mm: &PinnedMm, delta: isize) {
        // SAFETY: The mm is pinned; only the engine, whose lock is held, changes the field.
        unsafe { raw::rksm_mm_add_rmap_items(mm.as_ptr(), delta) };
    }

    fn zero_pages(&self, mm: &PinnedMm) -> isize {
        // SAFETY: The mm is pinned.
        unsafe { raw::rksm_mm_zero_pages(mm.as_ptr()) }
    }

    fn correct_zero_pages(&self, mm: &PinnedMm, delta: isize) {
        // SAFETY: The mm is pinned. The counter of all mms is resolved, as there is a `Trace`.
        unsafe {
            raw::rksm_mm_add_zero_pages(mm.as_ptr(), delta);
            raw::rksm_add_ksm_zero_pages(delta);
        }
    }

    fn cond_resched(&self) {
        // SAFETY: The engine's lock is a mutex; no spinlock is held.
        unsafe { raw::rksm_cond_resched() };
    }
}
