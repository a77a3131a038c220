// SPDX-License-Identifier: GPL-2.0

#include <linux/freezer.h>

bool rksm_freezing(struct task_struct *task)
{
	return freezing(task);
}
