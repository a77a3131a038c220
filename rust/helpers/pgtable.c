// SPDX-License-Identifier: GPL-2.0-only

#include <linux/ksm.h>
#include <linux/leafops.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/page_idle.h>
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

/* Whether the page was accessed since its bit was last cleared. */
bool rksm_accessed(struct vm_area_struct *vma, unsigned long addr, pte_t pte)
{
	return pte_young(pte) || mmu_notifier_test_young(vma->vm_mm, addr);
}

/*
 * Whether a page may have been accessed through an entry, now invalid, since its bit was last
 * cleared. What a secondary MMU knew went with the invalidation, and KVM uses a translation without
 * setting the bit again.
 */
bool rksm_may_be_accessed(struct mm_struct *mm, pte_t pte)
{
	return pte_young(pte) || mm_has_notifiers(mm);
}

/* What an entry maps. */
struct rksm_mapped {
	struct page *page;
	struct folio *folio;
	unsigned long mapping;
	int nid;
	bool accessed;
};

/*
 * Finds what a present entry maps, if its kind can be merged. One call returns everything, as
 * nothing here is inlined into Rust. An entry that is not special has a normal page.
 */
bool rksm_pte_mapped(struct vm_area_struct *vma, unsigned long addr, pte_t *ptep,
		     struct rksm_mapped *mapped)
{
	pte_t pte = ptep_get(ptep);

	if (!pte_present(pte) || pte_special(pte))
		return false;
	mapped->page = pte_page(pte);
	mapped->folio = page_folio(mapped->page);
	if (!folio_test_anon(mapped->folio) || folio_is_zone_device(mapped->folio))
		return false;
	mapped->mapping = (unsigned long)READ_ONCE(mapped->folio->mapping);
	mapped->nid = page_to_nid(mapped->page);
	mapped->accessed = rksm_accessed(vma, addr, pte);
	return true;
}

static void rksm_folio_was_young(struct folio *folio)
{
	/* Reclaim and idle page tracking go on seeing that it was in use. */
	folio_clear_idle(folio);
	folio_set_young(folio);
}

/*
 * Clears the accessed bit of a page. As in ptep_clear_flush_young(), no TLB is flushed: the bit is
 * set again once the translation has left the TLBs, at the latest after rksm_flush_tlb_mm().
 */
void rksm_pte_mkold(struct vm_area_struct *vma, unsigned long addr, pte_t *ptep,
		    struct folio *folio)
{
	bool young = ptep_test_and_clear_young(vma, addr, ptep);

	young |= mmu_notifier_clear_young(vma->vm_mm, addr, addr + PAGE_SIZE);
	if (young)
		rksm_folio_was_young(folio);
}

/*
 * Whether any page of a huge mapping was accessed. A secondary MMU may map it by small pages, and
 * only what clears their bits looks at all of them: the answer is kept in the entry.
 */
bool rksm_pmd_young(struct vm_area_struct *vma, unsigned long addr, pmd_t *pmdp)
{
	unsigned long start = addr & PMD_MASK;

	if (pmd_young(pmdp_get(pmdp)))
		return true;
	if (!mmu_notifier_clear_young(vma->vm_mm, start, start + PMD_SIZE))
		return false;
	set_bit(_PAGE_BIT_ACCESSED, (unsigned long *)pmdp);
	return true;
}

/* The same for all of a huge page. */
void rksm_pmd_mkold(struct vm_area_struct *vma, unsigned long addr, pmd_t *pmdp,
		    struct folio *folio)
{
#ifdef CONFIG_TRANSPARENT_HUGEPAGE
	unsigned long start = addr & PMD_MASK;
	bool young = pmdp_test_and_clear_young(vma, start, pmdp);

	young |= mmu_notifier_clear_young(vma->vm_mm, start, start + PMD_SIZE);
	if (young)
		rksm_folio_was_young(folio);
#endif
}

/* Not on CPUs that are idle: they flush before they use the address space again. */
void rksm_flush_tlb_mm(struct mm_struct *mm)
{
	flush_tlb_mm_range(mm, 0, TLB_FLUSH_ALL, PAGE_SHIFT, false);
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
