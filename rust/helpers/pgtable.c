// SPDX-License-Identifier: GPL-2.0-only

#include <linux/ksm.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/page_idle.h>
#include <linux/pgtable.h>
#include <linux/rmap.h>
#include <asm/tlbflush.h>

#include "compat.h"
#include "pte.h"
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

/* What an entry maps. */
struct rksm_mapped {
	struct page *page;
	struct folio *folio;
	unsigned long mapping;
	int nid;
	bool accessed;
	/* Set where nothing else is: the zero page, placed by KSM */
	bool ksm_zero;
};

/*
 * Finds what a present entry maps, if its kind can be merged. One call returns everything, as
 * nothing here is inlined into Rust. An entry that is not special has a normal page.
 */
bool rksm_pte_mapped(struct vm_area_struct *vma, unsigned long addr, pte_t *ptep,
		     struct rksm_mapped *mapped)
{
	pte_t pte = ptep_get(ptep);

	mapped->ksm_zero = false;
	if (!pte_present(pte) || pte_special(pte)) {
		mapped->ksm_zero = pte_present(pte) && is_ksm_zero_pte(pte);
		return false;
	}
	mapped->page = pte_page(pte);
	mapped->folio = page_folio(mapped->page);
	if (!folio_test_anon(mapped->folio) || folio_is_zone_device(mapped->folio))
		return false;
	mapped->mapping = (unsigned long)READ_ONCE(mapped->folio->mapping);
	mapped->nid = page_to_nid(mapped->page);
	mapped->accessed = rksm_accessed(vma, addr, pte);
	return true;
}

/* How many entries there are that map nothing before one that does, of the first `nr`. */
unsigned long rksm_none_ptes(pte_t *ptep, unsigned long nr)
{
	unsigned long n = 0;

	while (n < nr && pte_none(ptep_get(ptep + n)))
		n++;
	return n;
}

static void rksm_folio_was_young(struct folio *folio)
{
	/* Reclaim and idle page tracking go on seeing that it was in use. */
	folio_clear_idle(folio);
	folio_set_young(folio);
}

/*
 * Clears the accessed bit of a page that was accessed, in the page table. As in
 * ptep_clear_flush_young(), no TLB is flushed: the bit is set again once the translation has left
 * the TLBs, at the latest after rksm_flush_tlb_mm().
 */
void rksm_pte_mkold(struct vm_area_struct *vma, unsigned long addr, pte_t *ptep,
		    struct folio *folio)
{
	ptep_test_and_clear_young(vma, addr, ptep);
	rksm_folio_was_young(folio);
}

/* The same for pages in a row, in secondary MMUs: one call is dearer than the pages. */
void rksm_secondary_mkold(struct vm_area_struct *vma, unsigned long start, unsigned long end)
{
	if (start < end)
		mmu_notifier_clear_young(vma->vm_mm, start, end);
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

/*
 * Finds out which pages of a huge folio the entries of a range map, and sets their bits in `pages`.
 * The folio's first page is `first`, and would be mapped at `base`. Returns how many mappings these
 * are, as folio_mapcount() counts them.
 */
int rksm_find_mappings(struct vm_area_struct *vma, unsigned long start, unsigned long end,
		       struct page *first, unsigned long base, u64 *pages)
{
	unsigned long next, at, n;
	int mappings = 0;

	for (; start < end; start = next) {
		pmd_t *pmdp = mm_find_pmd(vma->vm_mm, start);
		pte_t *table, *ptep;
		spinlock_t *ptl;
		pmd_t pmd;

		next = pmd_addr_end(start, end);
		if (!pmdp)
			continue;
		pmd = pmdp_get_lockless(pmdp);
		if (pmd_present(pmd) && pmd_leaf(pmd)) {
			if (pmd_pfn(pmd) != page_to_pfn(first))
				continue;
			for (at = start; at < next; at += PAGE_SIZE) {
				n = (at - base) >> PAGE_SHIFT;
				pages[n / 64] |= 1ULL << n % 64;
			}
			mappings++;
			continue;
		}
		table = rksm_lock_pte(vma, start, &ptl);
		if (!table)
			continue;
		for (at = start, ptep = table; at < next; at += PAGE_SIZE, ptep++) {
			pte_t pte = ptep_get(ptep);

			n = (at - base) >> PAGE_SHIFT;
			if (!pte_present(pte) || pte_pfn(pte) != page_to_pfn(first) + n)
				continue;
			pages[n / 64] |= 1ULL << n % 64;
			mappings++;
		}
		pte_unmap_unlock(table, ptl);
	}
	return mappings;
}

/*
 * Looks for zero pages that are not KSM's in entries whose bits are set in `pages`. Returns the
 * address of the first, `end` if there is none. With `mark` they become KSM's instead.
 */
unsigned long rksm_zero_pages_of_split(struct vm_area_struct *vma, unsigned long start,
				       unsigned long end, unsigned long base, const u64 *pages,
				       bool mark)
{
	struct mm_struct *mm = vma->vm_mm;
	long marked = 0;

	while (start < end) {
		unsigned long next = pmd_addr_end(start, end);
		pte_t *table, *ptep;
		spinlock_t *ptl;

		table = rksm_lock_pte(vma, start, &ptl);
		if (!table) {
			start = next;
			continue;
		}
		for (ptep = table; start < next; start += PAGE_SIZE, ptep++) {
			unsigned long n = (start - base) >> PAGE_SHIFT;
			pte_t pte = ptep_get(ptep);

			if (!(pages[n / 64] >> n % 64 & 1) || !pte_present(pte) ||
			    !is_zero_pfn(pte_pfn(pte)) || pte_dirty(pte))
				continue;
			if (!mark)
				break;
			/* Read-only, and nothing looks at the accessed bit of the zero page */
			set_pte_at(mm, start, ptep, rksm_pte_as_ksm_zero(pte, pte));
			marked++;
		}
		pte_unmap_unlock(table, ptl);
		if (start < next)
			break;
	}
	atomic_long_add(marked, rksm_data_ksm_zero_pages());
	atomic_long_add(marked, &mm->ksm_zero_pages);
	return start;
}
