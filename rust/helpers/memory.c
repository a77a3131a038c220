// SPDX-License-Identifier: GPL-2.0-only

#include <linux/cpumask.h>
#include <linux/memory.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/notifier.h>
#include <linux/vmstat.h>

int rksm_register_memory_notifier(struct notifier_block *nb, notifier_fn_t call)
{
	nb->notifier_call = call;
	nb->priority = KSM_CALLBACK_PRI;
	return register_memory_notifier(nb);
}

void rksm_unregister_memory_notifier(struct notifier_block *nb)
{
	unregister_memory_notifier(nb);
}

unsigned long rksm_memory_notify_start_pfn(void *arg)
{
	return ((struct memory_notify *)arg)->start_pfn;
}

unsigned long rksm_memory_notify_nr_pages(void *arg)
{
	return ((struct memory_notify *)arg)->nr_pages;
}

#ifdef CONFIG_VM_EVENT_COUNTERS
static unsigned long swapped_on(int cpu)
{
	const struct vm_event_state *state = &per_cpu(vm_event_states, cpu);

	return READ_ONCE(state->event[PSWPIN]) + READ_ONCE(state->event[PSWPOUT]);
}
#else
static unsigned long swapped_on(int cpu)
{
	return 0;
}
#endif

/* Events of CPUs that went offline have been moved to another one. */
unsigned long rksm_swapped_pages(void)
{
	unsigned long pages = 0;
	int cpu;

	for_each_possible_cpu(cpu)
		pages += swapped_on(cpu);
	return pages;
}

unsigned long rksm_available_pages(void)
{
	return max(si_mem_available(), 0L);
}

unsigned long rksm_total_pages(void)
{
	return totalram_pages();
}
