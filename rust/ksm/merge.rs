// SPDX-License-Identifier: GPL-2.0-only

//! Merging: a page joins a stable node, or two pages become the merged page of a new one.

use crate::engine::{
    backend::{
        self,
        HugeFolioRefs,
        StableNodes as _, //
    },
    content_hash::ContentKey,
    types::{
        Refusal,
        Refused, //
    }, //
};
use crate::{
    bindings::raw,
    kernel_ext::{
        folio::{
            FolioRef,
            PageRef, //
        },
        mm::{
            LiveMm,
            MmapReadGuard,
            PinnedMm, //
        },
        race_window, //
    },
    ksm::{
        node::{
            NodeRef,
            StableNode,
            UnlinkedItem, //
        },
        page::{
            self,
            mergeable_at, //
        },
        replace_pte::{
            self,
            MappedVma,
            PteReplacement,
            Split, //
        },
        stable_nodes::StableNodes,
        trace::Trace, //
    }, //
};
use core::ptr::NonNull;
use kernel::{
    mm::virt::VmaRef,
    prelude::*,
    sync::Arc, //
};

/// Finds the mergeable vma at an address and calls `f` with it, under the mmap lock.
///
/// # Context
///
/// May sleep. Takes the mmap lock for reading; `f` runs under it.
///
/// # Errors
///
/// That of `f`, `Gone` without such a vma, `Locked` if the mmap lock cannot be had.
pub(super) fn in_vma<R>(
    mm: &PinnedMm,
    addr: usize,
    f: impl FnOnce(LiveMm<'_>, &VmaRef) -> Result<R, Refusal>,
) -> Result<R, Refusal> {
    let guard = mm.mmap_read_lock_briefly().ok_or(Refusal::Locked)?;
    let live = guard.live().ok_or(Refusal::Gone)?;
    let vma = mergeable_at(live, addr).ok_or(Refusal::Gone)?;
    f(live, vma)
}

/// A prepared merge and its outcome.
///
/// # Invariants
///
/// - There is a reference to the folio of `page`, and items and node have not been freed: the
///   contract of [`Backend`](backend::Backend) has the merge finished before they go.
/// - Without an `outcome` no item has been linked, and no folio names a new node. With a good one
///   all items are on the node; else none is, but for the first one of a new node if that is
///   `converted`.
pub(crate) struct Merge {
    pub(super) trace: Trace,
    pub(super) page: NonNull<raw::page>,
    pub(super) use_zero_pages: bool,
    pub(super) prepared: Prepared,
    /// `None` until it has been run.
    pub(super) outcome: Option<Result<(), Refused>>,
}

// SAFETY: All pointers are to objects of the kernel that any thread may use.
unsafe impl Send for Merge {}

pub(super) enum Prepared {
    ZeroPage {
        mm: PinnedMm,
        addr: usize,
    },
    Join {
        node: NonNull<StableNode>,
        kfolio: FolioRef,
        item: UnlinkedItem,
    },
    NewNode(NewNode),
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
    fn at(&mut self, addr: usize) -> Result<MappedVma<'g>, Refusal> {
        let live = self.live.ok_or(Refusal::Gone)?;
        let near = |vma: &&VmaRef| (vma.start()..vma.end()).contains(&addr);
        if !self.last.as_ref().is_some_and(near) {
            self.last = mergeable_at(live, addr);
        }
        let vma = self.last.ok_or(Refusal::Gone)?;
        Ok(MappedVma { live, vma })
    }
}

impl Merge {
    /// The mm whose mmap lock is the only one that the merge needs.
    fn only_mm(&self) -> Option<&PinnedMm> {
        match &self.prepared {
            Prepared::ZeroPage { mm, .. } => Some(mm),
            Prepared::Join { item, .. } => Some(item.mm()),
            Prepared::NewNode(_) => None,
        }
    }

    /// What a split of the page needs, as long as the batch alone holds the page.
    fn split<'h, H: HugeFolioRefs>(&self, huge: &'h mut H) -> Split<'h, H> {
        Split {
            huge,
            guards: 0,
            use_zero_pages: self.use_zero_pages,
        }
    }

    /// Runs a merge that needs only the mmap lock of one mm, which is held.
    fn run_in(&mut self, vmas: &mut Vmas<'_>, huge: &mut impl HugeFolioRefs) {
        if self.outcome.is_some() {
            return;
        }
        let trace = self.trace;
        // SAFETY: By the invariant the page is referenced.
        let page = unsafe { PageRef::new(self.page) };
        let mut split = self.split(huge);
        match &self.prepared {
            Prepared::ZeroPage { mm, addr } => {
                let target = PteReplacement::ZeroPage;
                let share = |place| replace_pte::share(place, *addr, page, &target, &mut split);
                let result = vmas.at(*addr).and_then(share);
                // SAFETY: The zero page is always there.
                let pfn = unsafe { raw::rksm_zero_pfn() };
                trace.merge_one_page(pfn, 0, mm.as_mm(), outcome(&result));
                self.outcome = Some(result.map_err(charge));
            }
            Prepared::Join { node, kfolio, item } => {
                let merged = MergedPage {
                    // SAFETY: By the invariant the node has not been freed.
                    node: unsafe { NodeRef::new(*node) },
                    kfolio,
                };
                let result = vmas.at(item.addr()).and_then(|place| {
                    // SAFETY: By the invariant the item has not been linked.
                    unsafe { share_with(place, page, merged, item, &mut split) }
                });
                trace_merge(trace, page, Some(kfolio.page()), item, &result);
                self.outcome = Some(result.map_err(charge));
            }
            Prepared::NewNode(_) => {}
        }
    }

    /// Does not run a merge, since the mmap lock cannot be had.
    fn refuse_locked(&mut self) {
        // INVARIANT: The outcome of a merge that has been run stays.
        self.outcome
            .get_or_insert(Err(Refused::Page(Refusal::Locked)));
    }

    /// Merges two pages, neither of which is a merged page yet.
    fn run_new_node(&mut self, huge: &mut impl HugeFolioRefs) {
        if self.outcome.is_some() {
            return;
        }
        let trace = self.trace;
        // SAFETY: By the invariant the page is referenced.
        let page = unsafe { PageRef::new(self.page) };
        let mut split = self.split(huge);
        let Prepared::NewNode(new) = &mut self.prepared else {
            return;
        };
        let first = new
            .check_both(page, &mut split)
            // This splits a huge page; the first page keeps its frame.
            // SAFETY: By the invariant the first item has not been linked.
            .and_then(|()| unsafe { new.share_first(page, &mut split) }.map_err(Refused::Page));
        let traced = first.map_err(Refused::reason);
        trace_merge(trace, page, None, &new.first, &traced);
        self.outcome = Some(first.and_then(|()| {
            // It is a small folio now.
            let kfolio = page.get();
            race_window::sleep();
            // SAFETY: By the invariant the second item has not been linked.
            let second = unsafe { new.share_second(&kfolio, trace, &mut split.guarded()) };
            second.map_err(Refused::Target)?;
            new.hash = page::content_hash(&new.key, page);
            Ok(())
        }));
    }
}

impl backend::Merge for Merge {
    fn run(&mut self, huge: &mut impl HugeFolioRefs) {
        match self.only_mm().cloned() {
            Some(mm) => match mm.mmap_read_lock_briefly() {
                Some(guard) => self.run_in(&mut Vmas::new(&guard), huge),
                None => self.refuse_locked(),
            },
            None => self.run_new_node(huge),
        }
    }

    /// Takes the mmap lock once for consecutive merges of one mm, unless another task waits for it.
    fn run_all<'a>(merges: impl Iterator<Item = &'a mut Self>) {
        let mut merges = merges.peekable();
        while let Some(first) = merges.next() {
            let Some(mm) = first.only_mm().cloned() else {
                first.run_new_node(&mut ());
                continue;
            };
            let same =
                |merge: &&'a mut Self| merge.only_mm().map(PinnedMm::as_ptr) == Some(mm.as_ptr());
            let Some(guard) = mm.mmap_read_lock_briefly() else {
                first.refuse_locked();
                while let Some(next) = merges.next_if(same) {
                    next.refuse_locked();
                }
                continue;
            };
            let mut vmas = Vmas::new(&guard);
            first.run_in(&mut vmas, &mut ());
            let uncontended = |merge: &&'a mut Self| same(merge) && !mm.mmap_lock_is_contended();
            while let Some(next) = merges.next_if(uncontended) {
                // SAFETY: May sleep: no spinlock is held.
                unsafe { raw::rksm_cond_resched() };
                next.run_in(&mut vmas, &mut ());
            }
        }
    }
}

/// Two pages that are to become the merged page of a node that no folio names yet.
///
/// # Invariants
///
/// Items and node have not been freed.
pub(super) struct NewNode {
    pub(super) node: NonNull<StableNode>,
    pub(super) first: UnlinkedItem,
    pub(super) second: UnlinkedItem,
    pub(super) nid: Option<u32>,
    pub(super) key: Arc<ContentKey>,
    /// The first page has become the merged page.
    pub(super) converted: bool,
    /// The hash of the merged page, once both have been merged.
    pub(super) hash: u64,
}

/// Charges the refusal of a merge with the zero page or a merged page.
fn charge(refusal: Refusal) -> Refused {
    match refusal {
        Refusal::Busy | Refusal::Same | Refusal::Differs => Refused::Target(refusal),
        _ => Refused::Page(refusal),
    }
}

/// Checks the page of the batch for all that shows without a look at its entry.
fn check_first(page: PageRef<'_>, split: &Split<'_, impl HugeFolioRefs>) -> Result<(), Refusal> {
    // SAFETY: The page is referenced.
    let mergeable = unsafe { raw::rksm_folio_mergeable(page.folio()) };
    if !mergeable || page.is_ksm() {
        return Err(Refusal::Gone);
    }
    // SAFETY: The page is referenced.
    if !page.is_large() && !unsafe { raw::rksm_page_anon_exclusive(page.as_ptr()) } {
        // Who holds a page that is read-only does not matter.
        return Ok(());
    }
    check_holders(page, split)
}

/// Checks that nobody holds a page who would keep it from being merged.
fn check_holders(page: PageRef<'_>, split: &Split<'_, impl HugeFolioRefs>) -> Result<(), Refusal> {
    let folio = page.folio();
    // SAFETY: The page is referenced.
    if unsafe { raw::rksm_folio_test_locked(folio) } {
        return Err(Refusal::Locked);
    }
    if page.is_large() {
        return match split.is_blocked(page) {
            true => Err(Refusal::Unsplit),
            false => Ok(()),
        };
    }
    // SAFETY: The page is referenced.
    match unsafe { raw::rksm_folio_pinned_beyond(folio, 1) } {
        true => Err(Refusal::Pinned),
        false => Ok(()),
    }
}

/// A merged page: its node and its folio.
#[derive(Clone, Copy)]
struct MergedPage<'a> {
    node: NodeRef<'a>,
    kfolio: &'a FolioRef,
}

/// Replaces the page at an address by a merged page.
///
/// # Safety
///
/// The item has not been linked.
unsafe fn share_with(
    place: MappedVma<'_>,
    page: PageRef<'_>,
    merged: MergedPage<'_>,
    item: &UnlinkedItem,
    split: &mut Split<'_, impl HugeFolioRefs>,
) -> Result<(), Refusal> {
    let MergedPage { node, kfolio } = merged;
    if kfolio.page() == page {
        return Err(Refusal::Same);
    }
    // Both folios are locked at once, but neither is waited for.
    let lock = kfolio.trylock().ok_or(Refusal::Busy)?;
    // Until it was locked, the page may have been migrated.
    if kfolio.mapping() != node.mapping() {
        return Err(Refusal::Busy);
    }
    // SAFETY: By the contract.
    unsafe { item.set_anon_vma(place.vma) }?;
    race_window::sleep();
    let target = PteReplacement::KsmPage(kfolio);
    replace_pte::share(place, item.addr(), page, &target, split)?;
    race_window::sleep();
    // SAFETY: The node's folio is locked, and names it. The engine frees the item only after it has
    // left the node.
    unsafe { item.link(node, Some(&lock)) };
    Ok(())
}

impl NewNode {
    pub(super) fn node(&self) -> NodeRef<'_> {
        // SAFETY: By the invariant the node has not been freed.
        unsafe { NodeRef::new(self.node) }
    }

    /// Checks both pages, and splits the huge page that the second is part of: all that can be
    /// known shows here, before either page has been changed.
    ///
    /// The entry of the first page is looked at here only if its page does not go first.
    fn check_both(
        &self,
        page: PageRef<'_>,
        split: &mut Split<'_, impl HugeFolioRefs>,
    ) -> Result<(), Refused> {
        check_first(page, split).map_err(Refused::Page)?;
        let split = &mut split.guarded();
        let huge = self.with_second(|_, held| self.check_second(page, held, split));
        if huge.map_err(Refused::Target)? {
            self.check_first_entry(page).map_err(Refused::Page)?;
            // The page may be another one by now.
            let result = self.with_second(|place, held| {
                if self.check_second(page, held, split)? {
                    replace_pte::split(place, self.second.addr(), held.page(), split)?;
                }
                Ok(())
            });
            result.map_err(Refused::Target)?;
        }
        Ok(())
    }

    /// Checks the entry of the first page.
    fn check_first_entry(&self, page: PageRef<'_>) -> Result<(), Refusal> {
        let addr = self.first.addr();
        in_vma(self.first.mm(), addr, |_, vma| {
            match page::page_at(vma, addr) {
                Some(held) if held.page() == page => match held.uffd() {
                    true => Err(Refusal::Userfault),
                    false => Ok(()),
                },
                _ => Err(Refusal::Gone),
            }
        })
    }

    /// Calls `f` with the second page, under the mmap lock of its mm.
    fn with_second<R>(
        &self,
        f: impl FnOnce(MappedVma<'_>, &page::PageGuard) -> Result<R, Refusal>,
    ) -> Result<R, Refusal> {
        let addr = self.second.addr();
        in_vma(self.second.mm(), addr, |live, vma| {
            let place = MappedVma { live, vma };
            f(place, &page::page_at(vma, addr).ok_or(Refusal::Gone)?)
        })
    }

    /// Checks the second page. Returns whether it is part of a huge page that the first page is no
    /// part of.
    fn check_second(
        &self,
        page: PageRef<'_>,
        held: &page::PageGuard,
        split: &Split<'_, impl HugeFolioRefs>,
    ) -> Result<bool, Refusal> {
        let second = held.page();
        if second == page {
            return Err(Refusal::Same);
        }
        if second.is_ksm() {
            return Err(Refusal::Gone);
        }
        if self.nid.is_some_and(|nid| nid != second.nid()) {
            return Err(Refusal::FarNode);
        }
        if held.uffd() {
            return Err(Refusal::Userfault);
        }
        check_holders(second, split)?;
        if !replace_pte::pages_identical(page, second) {
            return Err(Refusal::Differs);
        }
        // If both are of one huge page, it is split for the first.
        Ok(second.is_large() && second.folio() != page.folio())
    }

    /// Turns the first page into the merged page.
    ///
    /// # Safety
    ///
    /// The first item has not been linked, and no folio names the node.
    unsafe fn share_first(
        &mut self,
        page: PageRef<'_>,
        split: &mut Split<'_, impl HugeFolioRefs>,
    ) -> Result<(), Refusal> {
        let (node, addr) = (self.node(), self.first.addr());
        in_vma(self.first.mm(), addr, |live, vma| {
            // SAFETY: By the contract.
            unsafe { self.first.set_anon_vma(vma) }?;
            race_window::sleep();
            // The item must be on the node before a folio names the node: rmap walks follow it
            // then.
            // SAFETY: By the contract.
            unsafe { self.first.link(node, None) };
            let target = PteReplacement::InPlace(node);
            let place = MappedVma { live, vma };
            replace_pte::share(place, addr, page, &target, split).inspect_err(|_| {
                // SAFETY: The item is on the node, which no folio names.
                unsafe { node.unlink(self.first.as_non_null()) };
            })
        })?;
        self.converted = true;
        Ok(())
    }

    /// Replaces the second page by the merged page `kfolio`.
    ///
    /// # Safety
    ///
    /// The second item has not been linked.
    unsafe fn share_second(
        &self,
        kfolio: &FolioRef,
        trace: Trace,
        split: &mut Split<'_, impl HugeFolioRefs>,
    ) -> Result<(), Refusal> {
        let (node, addr) = (self.node(), self.second.addr());
        in_vma(self.second.mm(), addr, |live, vma| {
            // Referenced only now: a reference would have kept a huge page that holds both pages
            // from being split for the first.
            let held = page::page_at(vma, addr).ok_or(Refusal::Gone)?;
            let page = held.page();
            // The page may have been migrated since it was checked.
            if self.nid.is_some_and(|nid| nid != page.nid()) {
                return Err(Refusal::FarNode);
            }
            let place = MappedVma { live, vma };
            let merged = MergedPage { node, kfolio };
            // SAFETY: By the contract.
            let result = unsafe { share_with(place, page, merged, &self.second, split) };
            trace_merge(trace, page, Some(kfolio.page()), &self.second, &result);
            result
        })
    }
}

fn trace_merge(
    trace: Trace,
    page: PageRef<'_>,
    kpage: Option<PageRef<'_>>,
    item: &UnlinkedItem,
    result: &Result<(), Refusal>,
) {
    let pfn = kpage.unwrap_or(page).pfn();
    let kpage = kpage.map_or(0, |kpage| kpage.as_ptr() as usize);
    let (mm, item) = (item.mm().as_mm(), item.as_non_null().as_ptr() as usize);
    let item = result.map_or(0, |()| item);
    trace.merge_with_ksm_page(kpage, pfn, item, mm, outcome(result));
}

/// Returns what the trace events show as `err`.
fn outcome(result: &Result<(), Refusal>) -> Result {
    (*result).map_err(|refusal| Error::from_errno(refusal.trace_code()))
}

impl StableNodes {
    /// Unshares the first page of a new node whose second page was refused.
    ///
    /// # Context
    ///
    /// May sleep. The engine's lock is held. Takes the mmap lock for reading, and then the folio
    /// lock.
    pub(super) fn unmerge_first(&mut self, first: &UnlinkedItem) {
        let (mm, addr, first) = (first.mm(), first.addr(), first.id());
        let node = self.node_of(first);
        if let Some(user) = mm.mmget_not_zero() {
            race_window::sleep();
            replace_pte::unmerge_one(&user, addr);
        }
        let _ = self.release_item(first);
        if let Some(node) = node {
            let _ = self.remove(node, &mut |_| {});
        }
    }
}
