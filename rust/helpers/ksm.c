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

void rksm_set_current_oom_origin(void)
{
	set_current_oom_origin();
}

void rksm_clear_current_oom_origin(void)
{
	clear_current_oom_origin();
}
