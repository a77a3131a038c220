// SPDX-License-Identifier: GPL-2.0-only

#include <linux/ksm.h>
#include <linux/oom.h>

#include "symbols.h"

void rksm_folio_set_mapping(struct folio *folio, unsigned long mapping)
{
	WRITE_ONCE(folio->mapping, (void *)mapping);
}

long rksm_ksm_zero_pages(void)
{
	return atomic_long_read(rksm_data_ksm_zero_pages());
}

void rksm_add_ksm_zero_pages(long delta)
{
	atomic_long_add(delta, rksm_data_ksm_zero_pages());
}

long rksm_mm_zero_pages(struct mm_struct *mm)
{
	return atomic_long_read(&mm->ksm_zero_pages);
}

void rksm_mm_add_zero_pages(struct mm_struct *mm, long delta)
{
	atomic_long_add(delta, &mm->ksm_zero_pages);
}

void rksm_set_current_oom_origin(void)
{
	set_current_oom_origin();
}

void rksm_clear_current_oom_origin(void)
{
	clear_current_oom_origin();
}
