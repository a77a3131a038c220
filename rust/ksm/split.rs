// SPDX-License-Identifier: GPL-2.0-only

//! Splitting a huge page, and what a split does with its pages of zeroes.
//!
//! The core of mm maps the zero page in the place of each page of a huge one that holds nothing but
//! zeroes, if the huge page is split. Nothing tells these mappings from those of memory that has
//! never been written to. So they are looked for at once, where the huge page has been mapped: with
//! `use_zero_pages` they become zero pages that KSM has placed; without it each gets a page of its
//! own again.
//!
//! Only one mmap lock is held. Where a huge page is also mapped anywhere else than around the
//! address that is merged, by another process or after `mremap`, the zero pages of those mappings
//! are not found. Without `use_zero_pages` such a huge page is split only if no page of it holds
//! nothing but zeroes; with it, what is mapped elsewhere is not counted, as if it had never been
//! written to.

use crate::engine::types::Refusal;
use crate::{
    bindings::raw,
    kernel_ext::{
        folio::PageRef,
        mm::LiveMm, //
    },
    ksm::page::mergeable, //
};
use core::{
    ops::Range,
    ptr::NonNull, //
};
use kernel::page::PAGE_SIZE;

const WORDS: usize = (raw::RKSM_PMD_SIZE / PAGE_SIZE).div_ceil(u64::BITS as usize);

/// The addresses at which an mm maps a huge page that is to be split.
pub(super) struct HugeMappings<'g> {
    mm: LiveMm<'g>,
    /// Where its first page is or would be mapped.
    start: usize,
    end: usize,
    /// The pages that are mapped.
    pages: [u64; WORDS],
    use_zero_pages: bool,
}

impl<'g> HugeMappings<'g> {
    /// Finds where a huge page is mapped whose page `page` is mapped at `addr`.
    ///
    /// # Context
    ///
    /// The mmap lock is held. Takes page table locks. The huge page is referenced and locked.
    ///
    /// # Errors
    ///
    /// `Unsplit` where it holds a page of zeroes that is mapped elsewhere, and none may be given
    /// away.
    pub(super) fn find(
        mm: LiveMm<'g>,
        addr: usize,
        page: PageRef<'_>,
        use_zero_pages: bool,
    ) -> Result<Self, Refusal> {
        let folio = page.folio();
        // SAFETY: The page is referenced.
        let (first, before, pages) = unsafe {
            let first = raw::rksm_folio_page(folio);
            let before = page.pfn() - raw::rksm_page_to_pfn(first);
            (first, before, raw::rksm_folio_nr_pages(folio))
        };
        let start = addr.checked_sub(before * PAGE_SIZE);
        let start = start.filter(|_| pages <= WORDS * u64::BITS as usize);
        let start = start.ok_or(Refusal::Unsplit)?;
        let mut huge = Self {
            mm,
            start,
            end: start + pages * PAGE_SIZE,
            pages: [0; WORDS],
            use_zero_pages,
        };
        let mut mappings = 0;
        for (vma, part) in mm.vmas(start..huge.end) {
            // SAFETY: The vma is valid, its mm's lock is held, and the range lies in it and in the
            // huge page, for each page of which there is a bit.
            mappings += unsafe {
                raw::rksm_find_mappings(
                    vma.as_ptr().cast(),
                    part.start,
                    part.end,
                    first,
                    start,
                    huge.pages.as_mut_ptr(),
                )
            };
        }
        // SAFETY: The folio is referenced, and so are its pages.
        let refuse = unsafe {
            !use_zero_pages
                && mappings != raw::rksm_folio_mapcount(folio)
                && (0..pages)
                    .filter_map(|n| NonNull::new(raw::rksm_nth_page(first, n)))
                    .any(|page| raw::rksm_page_is_zero(page.as_ptr()))
        };
        if refuse {
            return Err(Refusal::Unsplit);
        }
        Ok(huge)
    }

    /// Looks for pages of zeroes that the split has replaced by the zero page.
    ///
    /// Without `use_zero_pages` they get pages of their own. Those for which there is no memory,
    /// although the split has just freed as much, become zero pages of KSM: they are counted, and
    /// `run`=2 gives them pages.
    ///
    /// # Context
    ///
    /// May sleep. The mmap lock is held, no folio lock.
    pub(super) fn take_back_zero_pages(self) {
        let mut user = None;
        for (vma, part) in self.mm.vmas(self.start..self.end) {
            let Range { start: mut at, end } = part;
            let mut mark = self.use_zero_pages && mergeable(vma);
            while at < end {
                // SAFETY: The vma is valid, its mm's lock is held, and the range lies in it and in
                // what was the huge page, for each page of which there is a bit.
                at = unsafe {
                    raw::rksm_zero_pages_of_split(
                        vma.as_ptr().cast(),
                        at,
                        end,
                        self.start,
                        self.pages.as_ptr(),
                        mark,
                    )
                };
                if at >= end {
                    break;
                }
                // Without a user the memory is being freed, and nothing may be mapped there.
                if user.is_none() {
                    user = self.mm.mm().mmget_not_zero();
                    if user.is_none() {
                        return;
                    }
                }
                // SAFETY: The vma is valid, its mm's lock and its users are held.
                let fault = unsafe { raw::rksm_unshare_fault(vma.as_ptr().cast(), at) };
                // SAFETY: No spinlock is held.
                unsafe { raw::rksm_cond_resched() };
                if fault & raw::vm_fault_reason_VM_FAULT_OOM != 0 {
                    if !mergeable(vma) {
                        break;
                    }
                    mark = true;
                } else {
                    at += PAGE_SIZE;
                }
            }
        }
    }
}
