// SPDX-License-Identifier: GPL-2.0-only

#include <linux/memory.h>
#include <linux/notifier.h>

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
