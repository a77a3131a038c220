// SPDX-License-Identifier: GPL-2.0-only

#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/pagewalk.h>

#include "compat.h"
#include "symbols.h"

typedef int rksm_p4d_entry_t(p4d_t *p4d, unsigned long addr, unsigned long next,
			     struct mm_walk *walk);
typedef int rksm_pud_entry_t(pud_t *pud, unsigned long addr, unsigned long next,
			     struct mm_walk *walk);
typedef int rksm_pmd_entry_t(pmd_t *pmd, unsigned long addr, unsigned long next,
			     struct mm_walk *walk);

/* The functions are called for entries that are there: a hole costs what the levels above it do. */
int rksm_walk_page_range_vma(struct vm_area_struct *vma, unsigned long start, unsigned long end,
			     rksm_p4d_entry_t *p4d_entry, rksm_pud_entry_t *pud_entry,
			     rksm_pmd_entry_t *pmd_entry, void *private)
{
	const struct mm_walk_ops ops = {
		.p4d_entry = p4d_entry,
		.pud_entry = pud_entry,
		.pmd_entry = pmd_entry,
		.walk_lock = PGWALK_RDLOCK,
	};

	return walk_page_range_vma(vma, start, end, &ops, private);
}

struct vm_area_struct *rksm_walk_vma(struct mm_walk *walk)
{
	return walk->vma;
}

void *rksm_walk_private(struct mm_walk *walk)
{
	return walk->private;
}

/*
 * Returns the folio of the page at `addr` with a reference, if it is anonymous memory, and whether
 * the entry is protected for a userfaultfd.
 */
struct folio *rksm_folio_walk_get(struct vm_area_struct *vma, unsigned long addr,
				  struct page **page, bool *uffd)
{
	struct folio_walk fw;
	struct folio *folio = folio_walk_start(&fw, vma, addr, 0);

	if (!folio)
		return NULL;
	if (folio_test_anon(folio) && !folio_is_zone_device(folio)) {
		*page = fw.page;
		*uffd = fw.level == FW_LEVEL_PTE ? pte_uffd(fw.pte) :
			fw.level == FW_LEVEL_PMD && pmd_uffd(fw.pmd);
		folio_get(folio);
	} else {
		folio = NULL;
	}
	folio_walk_end(&fw, vma);
	return folio;
}
