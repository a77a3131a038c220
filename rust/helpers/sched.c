// SPDX-License-Identifier: GPL-2.0-only

#include <linux/cpumask.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>

void rksm_cond_resched(void)
{
	cond_resched();
}

bool rksm_signal_pending(void)
{
	return signal_pending(current);
}

unsigned int rksm_num_online_cpus(void)
{
	return num_online_cpus();
}
