// SPDX-License-Identifier: GPL-2.0-only

#include <linux/ksm.h>
#include <linux/mm_inline.h>
#include <linux/rmap.h>
#include <linux/swap.h>

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

/* Accounts for a mapping of a merged page, for which the caller gives a reference. */
pte_t rksm_map_ksm_page(struct folio *kfolio, struct vm_area_struct *vma, unsigned long addr)
{
	folio_add_anon_rmap_pte(kfolio, &kfolio->page, vma, addr, RMAP_NONE);
	return mk_pte(&kfolio->page, vma->vm_page_prot);
}

/* Accounts for a mapping of the zero page in the place of an anonymous page. */
pte_t rksm_map_ksm_zero_page(struct vm_area_struct *vma, unsigned long addr)
{
	atomic_long_inc(rksm_data_ksm_zero_pages());
	atomic_long_inc(&vma->vm_mm->ksm_zero_pages);
	dec_mm_counter(vma->vm_mm, MM_ANONPAGES);
	return pte_mkdirty(pte_mkspecial(pfn_pte(page_to_pfn(ZERO_PAGE(addr)), vma->vm_page_prot)));
}

/* Accounts for a mapping that is gone, and drops its reference. */
void rksm_unmap_anon_page(struct folio *folio, struct page *page, struct vm_area_struct *vma)
{
	folio_remove_rmap_pte(folio, page, vma);
	if (!folio_mapped(folio))
		folio_free_swap(folio);
	folio_put(folio);
}
