/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef RKSM_PTE_H
#define RKSM_PTE_H

#include <linux/pgtable.h>

/* Whether a program has written to a page says its entry, whatever page is mapped. */
static inline pte_t rksm_pte_as_soft_dirty(pte_t pte, pte_t old)
{
	return pte_soft_dirty(old) ? pte_mksoft_dirty(pte) : pte_clear_soft_dirty(pte);
}

/*
 * The core of mm recognizes KSM's zero pages by the dirty bit. Setting it sets the soft-dirty bit,
 * too.
 */
static inline pte_t rksm_pte_as_ksm_zero(pte_t pte, pte_t old)
{
	return rksm_pte_as_soft_dirty(pte_mkdirty(pte), old);
}

#endif
