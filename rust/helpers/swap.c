// SPDX-License-Identifier: GPL-2.0-only

#include <linux/swap.h>

#include "symbols.h"

void rksm_folio_mark_accessed(struct folio *folio)
{
	folio_mark_accessed(folio);
}

void rksm_lru_add_drain_all(void)
{
	lru_add_drain_all();
}
