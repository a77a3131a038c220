// SPDX-License-Identifier: GPL-2.0

#include <linux/mmu_notifier.h>

#include "symbols.h"

void rksm_mmu_notifier_invalidate_page_start(struct mmu_notifier_range *range, struct mm_struct *mm,
					     unsigned long addr)
{
	mmu_notifier_range_init(range, MMU_NOTIFY_CLEAR, 0, mm, addr, addr + PAGE_SIZE);
	mmu_notifier_invalidate_range_start(range);
}

void rksm_mmu_notifier_invalidate_page_end(struct mmu_notifier_range *range)
{
	mmu_notifier_invalidate_range_end(range);
}
