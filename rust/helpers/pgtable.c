// SPDX-License-Identifier: GPL-2.0

#include <linux/mm.h>
#include <linux/ksm.h>
#include <linux/leafops.h>
#include <linux/pgtable.h>
#include <linux/rmap.h>
#include <asm/tlbflush.h>

#include "symbols.h"

pte_t rksm_ptep_get(pte_t *ptep)
{
	return ptep_get(ptep);
}

bool rksm_pte_write(pte_t pte)
{
	return pte_write(pte);
}

bool rksm_pte_dirty(pte_t pte)
{
	return pte_dirty(pte);
}

bool rksm_pte_uffd(pte_t pte)
{
	return pte_uffd(pte);
}

bool rksm_pte_maps(pte_t pte, struct page *page)
{
	return pte_present(pte) && pte_pfn(pte) == page_to_pfn(page);
}

pte_t rksm_pte_wrprotect_clean(pte_t pte)
{
	pte = pte_mkclean(pte);
	return pte_write(pte) ? pte_wrprotect(pte) : pte;
}

/* The page of a present entry, NULL if there is none or none with a normal struct page. */
struct page *rksm_pte_normal_page(struct vm_area_struct *vma, unsigned long addr, pte_t pte)
{
	return pte_present(pte) ? vm_normal_page(vma, addr, pte) : NULL;
}

/* Whether the entry refers to a merged page, or to a zero page that KSM has put there. */
bool rksm_pte_is_ksm(struct vm_area_struct *vma, unsigned long addr, pte_t pte)
{
	struct folio *folio = NULL;

	if (pte_present(pte)) {
		if (is_ksm_zero_pte(pte))
			return true;
		folio = vm_normal_folio(vma, addr, pte);
	} else if (!pte_none(pte)) {
		const softleaf_t entry = softleaf_from_pte(pte);

		if (softleaf_is_migration(entry))
			folio = softleaf_to_folio(entry);
	}
	return folio && folio_test_ksm(folio);
}

/* Maps and locks the entry of `addr`; NULL where there is no table of small pages. */
pte_t *rksm_lock_pte(struct vm_area_struct *vma, unsigned long addr, spinlock_t **ptlp)
{
	pmd_t *pmd = mm_find_pmd(vma->vm_mm, addr);
	pmd_t pmdval;

	if (!pmd)
		return NULL;
	pmdval = pmdp_get_lockless(pmd);
	if (!pmd_present(pmdval) || pmd_leaf(pmdval))
		return NULL;
	return pte_offset_map_lock(vma->vm_mm, pmd, addr, ptlp);
}

pte_t *rksm_pte_offset_map_lock(struct vm_area_struct *vma, pmd_t *pmd, unsigned long addr,
				spinlock_t **ptlp)
{
	return pte_offset_map_lock(vma->vm_mm, pmd, addr, ptlp);
}

void rksm_pte_unmap_unlock(pte_t *ptep, spinlock_t *ptl)
{
	pte_unmap_unlock(ptep, ptl);
}

pte_t rksm_ptep_clear_flush(struct vm_area_struct *vma, unsigned long addr, pte_t *ptep)
{
	flush_cache_page(vma, addr, pte_pfn(ptep_get(ptep)));
	return ptep_clear_flush(vma, addr, ptep);
}

void rksm_set_pte_at(struct vm_area_struct *vma, unsigned long addr, pte_t *ptep, pte_t pte)
{
	set_pte_at(vma->vm_mm, addr, ptep, pte);
}
