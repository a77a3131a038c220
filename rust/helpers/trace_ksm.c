// SPDX-License-Identifier: GPL-2.0-only

#include <linux/srcu.h>
#include <linux/tracepoint.h>
#include <trace/events/ksm.h>

#include "symbols.h"

/* As trace_NAME() does it, without the static branch that only the kernel's own code has. */
#define RKSM_TRACE(name, params, ...)						\
	void rksm_trace_##name params						\
	{									\
		struct tracepoint *tp = rksm_data___tracepoint_##name();	\
										\
		if (!static_key_enabled(&tp->key))				\
			return;							\
		guard(srcu_fast_notrace)(&tracepoint_srcu);			\
		if (rcu_dereference_raw(tp->funcs))				\
			__traceiter_##name(NULL, __VA_ARGS__);			\
	}

RKSM_TRACE(ksm_start_scan, (int seq, u32 rmap_entries), seq, rmap_entries)
RKSM_TRACE(ksm_stop_scan, (int seq, u32 rmap_entries), seq, rmap_entries)
RKSM_TRACE(ksm_merge_one_page, (unsigned long pfn, void *rmap_item, void *mm, int err),
	   pfn, rmap_item, mm, err)
RKSM_TRACE(ksm_merge_with_ksm_page,
	   (void *ksm_page, unsigned long pfn, void *rmap_item, void *mm, int err),
	   ksm_page, pfn, rmap_item, mm, err)
RKSM_TRACE(ksm_remove_ksm_page, (unsigned long pfn), pfn)
RKSM_TRACE(ksm_remove_rmap_item, (unsigned long pfn, void *rmap_item, void *mm),
	   pfn, rmap_item, mm)
RKSM_TRACE(ksm_advisor, (s64 scan_time, unsigned long pages_to_scan, unsigned int cpu_percent),
	   scan_time, pages_to_scan, cpu_percent)

void rksm_tracepoint_synchronize_unregister(void)
{
	tracepoint_synchronize_unregister();
}
