// SPDX-License-Identifier: GPL-2.0-only

#include <linux/mm.h>
#include <linux/mm_inline.h>
#include <linux/mm_types.h>
#include <linux/mmap_lock.h>
#include <linux/sched/mm.h>

#include "symbols.h"

int rksm_mm_users(struct mm_struct *mm)
{
	return atomic_read(&mm->mm_users);
}

/* As the core shows it; each CPU may keep some to itself. */
unsigned long rksm_mm_anon_pages(struct mm_struct *mm)
{
	return get_mm_counter(mm, MM_ANONPAGES);
}

/* False once exit_mmap() has ended; the mm need only be pinned. */
bool rksm_mm_has_vmas(struct mm_struct *mm)
{
	return READ_ONCE(mm->mm_mt.ma_root);
}

void rksm_mm_add_merging(struct mm_struct *mm, long delta)
{
	WRITE_ONCE(mm->ksm_merging_pages, mm->ksm_merging_pages + delta);
}

void rksm_mm_add_rmap_items(struct mm_struct *mm, long delta)
{
	WRITE_ONCE(mm->ksm_rmap_items, mm->ksm_rmap_items + delta);
}

bool rksm_mm_tlb_flush_pending(struct mm_struct *mm)
{
	return mm_tlb_flush_pending(mm);
}

int rksm_mmap_read_lock_interruptible(struct mm_struct *mm)
{
	return down_read_interruptible(&mm->mmap_lock);
}

int rksm_mmap_write_lock_killable(struct mm_struct *mm)
{
	return mmap_write_lock_killable(mm);
}

bool rksm_mmap_write_trylock(struct mm_struct *mm)
{
	/* mmap_write_lock_killable() without the wait; there is no such inline. */
	if (!down_write_trylock(&mm->mmap_lock))
		return false;
	mm_lock_seqcount_begin(mm);
	return true;
}

void rksm_mmap_write_unlock(struct mm_struct *mm)
{
	mmap_write_unlock(mm);
}

int rksm_ksm_enable_merge_any(struct mm_struct *mm)
{
	return ksm_enable_merge_any(mm);
}

int rksm_ksm_disable(struct mm_struct *mm)
{
	return ksm_disable(mm);
}

bool rksm_mmap_lock_is_contended(struct mm_struct *mm)
{
	return mmap_lock_is_contended(mm);
}

struct anon_vma *rksm_vma_anon_vma(struct vm_area_struct *vma)
{
	return vma->anon_vma;
}

struct folio *rksm_page_folio(struct page *page)
{
	return page_folio(page);
}

struct page *rksm_nth_page(struct page *page, unsigned long n)
{
	return page + n;
}

struct page *rksm_folio_page(struct folio *folio)
{
	return folio_page(folio, 0);
}

unsigned long rksm_folio_nr_pages(struct folio *folio)
{
	return folio_nr_pages(folio);
}

int rksm_folio_mapcount(struct folio *folio)
{
	return folio_mapcount(folio);
}

int rksm_page_to_nid(struct page *page)
{
	return page_to_nid(page);
}

unsigned long rksm_page_to_pfn(struct page *page)
{
	return page_to_pfn(page);
}

bool rksm_page_anon_exclusive(struct page *page)
{
	return PageAnonExclusive(page);
}

struct folio *rksm_pfn_folio(unsigned long pfn)
{
	return pfn_folio(pfn);
}

unsigned long rksm_read_once(const unsigned long *word)
{
	return READ_ONCE(*word);
}

void rksm_smp_mb(void)
{
	/* What it pairs with is said where it is called. */
	smp_mb();
}

void rksm_smp_rmb(void)
{
	/* What it pairs with is said where it is called. */
	smp_rmb();
}

void rksm_folio_get(struct folio *folio)
{
	folio_get(folio);
}

bool rksm_folio_try_get(struct folio *folio)
{
	return folio_try_get(folio);
}

void rksm_folio_put(struct folio *folio)
{
	folio_put(folio);
}

bool rksm_folio_last_ref(struct folio *folio)
{
	return folio_ref_count(folio) == 1;
}

void rksm_folios_put(struct folio **folios, int nr)
{
	release_pages(folios, nr);
}

unsigned long rksm_folio_mapping(struct folio *folio)
{
	return (unsigned long)READ_ONCE(folio->mapping);
}

bool rksm_folio_mapped(struct folio *folio)
{
	return folio_mapped(folio);
}

bool rksm_folio_mergeable(struct folio *folio)
{
	return folio_test_anon(folio) && !folio_is_zone_device(folio);
}

bool rksm_folio_test_ksm(struct folio *folio)
{
	return folio_test_ksm(folio);
}

bool rksm_folio_test_large(struct folio *folio)
{
	return folio_test_large(folio);
}

bool rksm_folio_test_swapcache(struct folio *folio)
{
	return folio_test_swapcache(folio);
}

/* Whether there are references besides those of mappings, the swap cache and `extra`. */
bool rksm_folio_pinned_beyond(struct folio *folio, int extra)
{
	int expected = folio_mapcount(folio) + folio_test_swapcache(folio) + extra;

	return expected != folio_ref_count(folio);
}

/*
 * The same for a large folio: whether a split would fail for references besides `extra`. A split
 * asks this itself, with one for its caller, but only after whoever holds others has let go.
 */
bool rksm_folio_held_beyond(struct folio *folio, int extra)
{
	return folio_expected_ref_count(folio) + extra != folio_ref_count(folio);
}

void rksm_folio_mark_dirty(struct folio *folio)
{
	if (!folio_test_dirty(folio))
		folio_mark_dirty(folio);
}

unsigned int rksm_unshare_fault(struct vm_area_struct *vma, unsigned long addr)
{
	unsigned int flags = FAULT_FLAG_UNSHARE | FAULT_FLAG_REMOTE;

	return (__force unsigned int)handle_mm_fault(vma, addr, flags, NULL);
}
