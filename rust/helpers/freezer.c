// SPDX-License-Identifier: GPL-2.0-only

#include <linux/freezer.h>

bool rksm_freezing(struct task_struct *task)
{
	return freezing(task);
}
