// SPDX-License-Identifier: GPL-2.0-only

#include <linux/kthread.h>
#include <linux/sched.h>

/* Whether the current task is a kthread that is to stop. */
bool rksm_kthread_stopping(void)
{
	return (current->flags & PF_KTHREAD) && kthread_should_stop();
}
