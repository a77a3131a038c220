// SPDX-License-Identifier: GPL-2.0-only

#include <linux/mm.h>

#include "symbols.h"

int rksm_split_huge_page(struct page *page)
{
	return split_huge_page(page);
}

/*
 * The page that a huge mapping has at `addr`, NULL if it is not a normal page. Where the entry is a
 * huge mapping it is left locked, with the lock in *ptlp; else *ptlp is NULL.
 */
struct page *rksm_pmd_page_locked(struct vm_area_struct *vma, pmd_t *pmdp, unsigned long addr,
				  spinlock_t **ptlp)
{
#ifdef CONFIG_TRANSPARENT_HUGEPAGE
	struct page *page;
	spinlock_t *ptl;
	pmd_t pmd;

	*ptlp = NULL;
	if (!pmd_leaf(pmdp_get_lockless(pmdp)))
		return NULL;
	ptl = pmd_lock(vma->vm_mm, pmdp);
	pmd = pmdp_get(pmdp);
	if (pmd_present(pmd) && !pmd_leaf(pmd)) {
		spin_unlock(ptl);
		return NULL;
	}
	*ptlp = ptl;
	page = pmd_present(pmd) ? vm_normal_page_pmd(vma, addr & PMD_MASK, pmd) : NULL;
	return page ? page + ((addr & ~PMD_MASK) >> PAGE_SHIFT) : NULL;
#else
	*ptlp = NULL;
	return NULL;
#endif
}
