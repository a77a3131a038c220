// SPDX-License-Identifier: GPL-2.0-only

#include <linux/pagemap.h>

#include "compat.h"
#include "symbols.h"

void rksm_folio_lock(struct folio *folio)
{
	folio_lock(folio);
}

bool rksm_folio_test_locked(struct folio *folio)
{
	return folio_test_locked(folio);
}

bool rksm_folio_trylock(struct folio *folio)
{
	return folio_trylock(folio);
}

void rksm_folio_unlock(struct folio *folio)
{
	folio_unlock(folio);
}

unsigned long rksm_linear_anon_page_index(struct vm_area_struct *vma, unsigned long addr)
{
	return linear_anon_page_index(vma, addr);
}
