// SPDX-License-Identifier: GPL-2.0-only

#include <linux/ksm.h>
#include <linux/mm_inline.h>
#include <linux/rmap.h>
#include <linux/swap.h>

#include "pte.h"
#include "symbols.h"

void rksm_get_anon_vma(struct anon_vma *anon_vma)
{
	atomic_inc(&anon_vma->refcount);
}

void rksm_put_anon_vma(struct anon_vma *anon_vma)
{
	if (atomic_dec_and_test(&anon_vma->refcount))
		__put_anon_vma(anon_vma);
}

int rksm_folio_try_share_anon_rmap_pte(struct folio *folio, struct page *page)
{
	return folio_try_share_anon_rmap_pte(folio, page);
}

/*
 * Makes sure that reclaim writes a merged page out. After MADV_FREE by the only process that maps
 * the page, reclaim may drop it instead, and the processes that share it later would lose it.
 *
 * The folio is locked and referenced. MADV_FREE makes a folio clean under that lock, and only while
 * it has one mapping: the folio stays dirty until the lock is released, and then it has two.
 * Reclaim does not drop a dirty folio; it makes it swap-backed if it is not. A folio that is moving
 * between two lists cannot be isolated and is left to reclaim: the flag must not change while a
 * folio is on a list.
 */
void rksm_folio_keep(struct folio *folio)
{
	if (!folio_test_dirty(folio))
		folio_mark_dirty(folio);
	if (!folio_test_swapbacked(folio) && folio_isolate_lru(folio)) {
		folio_set_swapbacked(folio);
		folio_putback_lru(folio);
	}
}

/* The contents of a poisoned page must not be read, nor may it be mapped anywhere else. */
bool rksm_folio_poisoned(struct folio *folio)
{
	return folio_contain_hwpoisoned_page(folio);
}

/*
 * Accounts for a mapping of a merged page in the place of what `old` maps. The caller gives a
 * reference to it.
 */
pte_t rksm_map_ksm_page(struct folio *kfolio, struct vm_area_struct *vma, unsigned long addr,
			pte_t old)
{
	folio_add_anon_rmap_pte(kfolio, &kfolio->page, vma, addr, RMAP_NONE);
	return rksm_pte_as_soft_dirty(mk_pte(&kfolio->page, vma->vm_page_prot), old);
}

/* Accounts for a mapping of the zero page in the place of the anonymous page that `old` maps. */
pte_t rksm_map_ksm_zero_page(struct vm_area_struct *vma, unsigned long addr, pte_t old)
{
	pte_t pte = pte_mkspecial(pfn_pte(page_to_pfn(ZERO_PAGE(addr)), vma->vm_page_prot));

	atomic_long_inc(rksm_data_ksm_zero_pages());
	atomic_long_inc(&vma->vm_mm->ksm_zero_pages);
	dec_mm_counter(vma->vm_mm, MM_ANONPAGES);
	return rksm_pte_as_ksm_zero(pte, old);
}

/* Accounts for a mapping that is gone, and drops its reference. */
void rksm_unmap_anon_page(struct folio *folio, struct page *page, struct vm_area_struct *vma)
{
	folio_remove_rmap_pte(folio, page, vma);
	if (!folio_mapped(folio))
		folio_free_swap(folio);
	folio_put(folio);
}
