// SPDX-License-Identifier: GPL-2.0-only

#include <linux/mutex.h>

int rksm_mutex_lock_killable(struct mutex *lock)
{
	return mutex_lock_killable(lock);
}

int rksm_mutex_lock_interruptible(struct mutex *lock)
{
	return mutex_lock_interruptible(lock);
}
