// SPDX-License-Identifier: GPL-2.0-only

//! The pages that a walk has collected, and the references to them.

use crate::engine::{
    backend::{
        self,
        HugeId, //
    },
    content_hash::ContentKey, //
};
use crate::{
    bindings::raw,
    kernel_ext::{
        folio::PageRef,
        gfp::GFP_METADATA, //
    },
    ksm::page::{
        self,
        Mapped,
        PageGuard, //
    }, //
};
use core::{
    ops::Range,
    ptr::NonNull, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// The number of folios freed at a time.
const FOLIOS: usize = 64;

#[derive(Clone, Copy)]
struct Collected {
    addr: usize,
    /// `None` once the page has been released.
    page: Option<NonNull<raw::page>>,
    /// This entry owns a reference to the page's folio.
    holds_ref: bool,
    /// The page was released so that its huge page could be split.
    released_for_split: bool,
    /// The page may have been accessed since a walk last cleared its accessed bit.
    accessed: bool,
}

/// The pages found by a walk, in ascending order of their addresses.
///
/// # Invariants
///
/// For every entry that has a page, the batch owns a reference to the page's folio. Either the
/// entry itself owns it, or the next later entry that has a page and owns a reference, which is of
/// the same folio. So a huge page costs one reference per batch.
pub(crate) struct Batch {
    entries: KVec<Collected>,
    /// The number of entries at which the batch is full.
    limit: usize,
    /// Entries before this one have no page any more.
    released: usize,
    /// The addresses at which no other batch collects pages of the same mm.
    pub(super) own: Range<usize>,
    /// The huge mapping whose accessed bit was cleared last for this batch. The bit covers all of
    /// it, so that its other pages count as accessed.
    pub(super) huge: Range<usize>,
    /// References to folios that have no other reference, to be dropped together.
    last_refs: KVec<*mut raw::folio>,
}

// SAFETY: References to folios may be dropped on any CPU.
unsafe impl Send for Batch {}
// SAFETY: A shared reference gives read access only.
unsafe impl Sync for Batch {}

impl Batch {
    /// Creates an empty batch with room for `pages` pages.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(pages: usize) -> Result<Self> {
        Ok(Self {
            entries: KVec::with_capacity(pages, GFP_METADATA)?,
            limit: 0,
            released: 0,
            own: 0..0,
            huge: 0..0,
            last_refs: KVec::with_capacity(pages, GFP_METADATA)?,
        })
    }

    /// Makes the batch full after `limit` more pages. Other threads may walk the same mm, but not
    /// at the addresses in `own`.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn set_limit(&mut self, limit: usize, own: &Range<usize>) {
        self.limit = (self.entries.len() + limit).min(self.entries.capacity());
        self.own = own.clone();
    }

    pub(super) fn full(&self) -> bool {
        self.entries.len() >= self.limit
    }

    fn entry(&self, i: usize) -> Option<&Collected> {
        self.entries.get(i)
    }

    /// Returns page `i`, if it has not been released.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn page(&self, i: usize) -> Option<PageRef<'_>> {
        let page = self.entry(i)?.page?;
        // SAFETY: The page is referenced by the invariant, and the result borrows the batch.
        Some(unsafe { PageRef::new(page) })
    }

    /// Returns the folio of page `i`, if it is a large folio.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn huge_folio(&self, i: usize) -> Option<*mut raw::folio> {
        let page = self.page(i)?;
        page.is_large().then(|| page.folio())
    }

    /// Adds the page that is mapped at `addr`.
    ///
    /// # Context
    ///
    /// Atomic. The page table lock is held, as `mapped` shows.
    pub(super) fn push(&mut self, addr: usize, mapped: &Mapped<'_>) {
        let Some((page, folio)) = mapped.page() else {
            return;
        };
        let last = self.entries.last_mut();
        // SAFETY: The page in `last` is referenced by the invariant.
        let same = |last: &Collected| unsafe {
            last.page
                .is_some_and(|page| raw::rksm_page_folio(page.as_ptr()) == folio.as_ptr())
        };
        let shares = match last {
            Some(last) if last.holds_ref && same(last) => {
                last.holds_ref = false;
                true
            }
            _ => false,
        };
        if !shares {
            // SAFETY: The folio is mapped, as `mapped` shows, so its count is not zero.
            unsafe { raw::rksm_folio_get(folio.as_ptr()) };
        }
        // INVARIANT: The new entry owns the reference just taken, or the one the entry before it
        // had. There is room, as the batch is not full.
        let _ = self.entries.push_within_capacity(Collected {
            addr,
            page: Some(page),
            holds_ref: true,
            released_for_split: false,
            accessed: mapped.accessed(),
        });
    }

    /// Drops a reference to the folio that a page is now part of: at once, or when the batch is
    /// cleared if it is the last one. Freeing many folios at a time takes the locks of LRU lists
    /// and of free lists once.
    ///
    /// # Safety
    ///
    /// The caller owns the reference.
    unsafe fn put(&mut self, page: NonNull<raw::page>) {
        // SAFETY: By the contract the page is referenced, so its folio does not change meanwhile.
        let (folio, last) = unsafe {
            let folio = raw::rksm_page_folio(page.as_ptr());
            (folio, raw::rksm_folio_last_ref(folio))
        };
        if !last || self.last_refs.push_within_capacity(folio).is_err() {
            // SAFETY: The caller owns the reference and passes it on.
            unsafe { raw::rksm_folio_put(folio) };
        }
    }

    /// Returns whether `release_huge_folio` has released page `i`.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn released_for_split(&self, i: usize) -> bool {
        self.entry(i).is_some_and(|entry| entry.released_for_split)
    }

    /// Gives page `i` back to the batch after `release_huge_folio`.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn reacquire(&mut self, i: usize, held: PageGuard) {
        let released = |entry: &&mut Collected| entry.page.is_none();
        if let Some(entry) = self.entries.get_mut(i).filter(released) {
            // INVARIANT: The entry takes over the reference.
            (entry.page, entry.holds_ref, entry.released_for_split) =
                (Some(held.into_page()), true, false);
            self.released = self.released.min(i);
        }
    }
}

impl backend::Batch for Batch {
    type Key = Arc<ContentKey>;

    fn nr_pages(&self) -> usize {
        self.entries.len()
    }

    fn addr(&self, i: usize) -> usize {
        self.entry(i).map_or(0, |e| e.addr)
    }

    fn accessed(&self, i: usize) -> bool {
        self.entry(i).is_none_or(|e| e.accessed)
    }

    fn cleared_beyond(&self) -> Range<usize> {
        self.huge.clone()
    }

    fn nid(&self, i: usize) -> u32 {
        self.page(i).map_or(0, PageRef::nid)
    }

    fn huge(&self, i: usize) -> Option<HugeId> {
        self.huge_folio(i).map(|folio| HugeId(folio as usize))
    }

    fn hash(&self, i: usize, key: &Arc<ContentKey>) -> u64 {
        self.page(i).map_or(0, |page| page::content_hash(key, page))
    }

    fn is_pinned(&self, i: usize) -> bool {
        let Some(page) = self.page(i) else {
            return false;
        };
        let own = match self.huge(i) {
            Some(huge) => self.huge_refs(huge),
            None => 1,
        };
        // SAFETY: The page is referenced by the invariant.
        unsafe {
            match page.is_large() {
                true => raw::rksm_folio_held_beyond(page.folio(), own as c_int),
                false => raw::rksm_folio_pinned_beyond(page.folio(), own as c_int),
            }
        }
    }

    fn huge_refs(&self, huge: HugeId) -> usize {
        let huge = huge.0 as *mut raw::folio;
        let holds = |entry: &&Collected| {
            // SAFETY: The page is referenced by the invariant.
            let of = |page: NonNull<raw::page>| unsafe { raw::rksm_page_folio(page.as_ptr()) };
            entry.holds_ref && entry.page.is_some_and(|page| of(page) == huge)
        };
        self.entries.iter().filter(holds).count()
    }

    fn release(&mut self, i: usize) {
        let Some(entry) = self.entries.get_mut(i) else {
            return;
        };
        let (page, owns) = (entry.page.take(), core::mem::take(&mut entry.holds_ref));
        if let (Some(page), true) = (page, owns) {
            let mut before = self.entries[self.released.min(i)..i].iter_mut().rev();
            match before.find(|entry| entry.page.is_some()) {
                // INVARIANT: It relied on this entry's reference, and is of the same folio.
                Some(before) if !before.holds_ref => before.holds_ref = true,
                // SAFETY: The entry owned the reference, and has given it up.
                _ => unsafe { self.put(page) },
            }
        }
        if self.released == i {
            self.released += 1;
        }
    }

    fn release_huge_folio(&mut self, huge: HugeId, keep: Option<usize>) {
        let huge = huge.0 as *mut raw::folio;
        let mut references = 0;
        for (i, entry) in self.entries.iter_mut().enumerate() {
            let Some(page) = entry.page else { continue };
            // SAFETY: The page is referenced by the invariant: references are dropped below only.
            if unsafe { raw::rksm_page_folio(page.as_ptr()) } != huge {
                continue;
            }
            references += usize::from(core::mem::take(&mut entry.holds_ref));
            if Some(i) == keep {
                // INVARIANT: The page had a reference, of this entry or of one after it.
                entry.holds_ref = true;
            } else {
                (entry.page, entry.released_for_split) = (None, true);
            }
        }
        let kept = keep.is_some_and(|i| self.page(i).is_some());
        for _ in usize::from(kept)..references {
            // SAFETY: No entry owns these references any more.
            unsafe { raw::rksm_folio_put(huge) };
        }
    }

    fn clear(&mut self) {
        for i in self.released..self.entries.len() {
            self.release(i);
        }
        for folios in self.last_refs.chunks_mut(FOLIOS) {
            // SAFETY: The batch owns one reference to each of these folios, and passes it on.
            unsafe { raw::rksm_folios_put(folios.as_mut_ptr(), folios.len() as c_int) };
        }
        self.last_refs.clear();
        self.entries.clear();
        self.released = 0;
        self.huge = 0..0;
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        backend::Batch::clear(self);
    }
}
