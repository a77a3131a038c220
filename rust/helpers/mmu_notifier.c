// SPDX-License-Identifier: GPL-2.0-only

#include <linux/mmu_notifier.h>

#include "symbols.h"

/* The inline of the header names the map itself, which is not exported. */
#ifdef CONFIG_LOCKDEP
static void rksm_acquire_map(void)
{
	lock_map_acquire(rksm_data___mmu_notifier_invalidate_range_start_map());
}

static void rksm_release_map(void)
{
	lock_map_release(rksm_data___mmu_notifier_invalidate_range_start_map());
}
#else
static void rksm_acquire_map(void)
{
}

static void rksm_release_map(void)
{
}
#endif

void rksm_mmu_notifier_invalidate_page_start(struct mmu_notifier_range *range, struct mm_struct *mm,
					     unsigned long addr)
{
	mmu_notifier_range_init(range, MMU_NOTIFY_CLEAR, 0, mm, addr, addr + PAGE_SIZE);
	might_sleep();
	rksm_acquire_map();
	if (mm_has_notifiers(mm)) {
		range->flags |= MMU_NOTIFIER_RANGE_BLOCKABLE;
		__mmu_notifier_invalidate_range_start(range);
	}
	rksm_release_map();
}

void rksm_mmu_notifier_invalidate_page_end(struct mmu_notifier_range *range)
{
	mmu_notifier_invalidate_range_end(range);
}
