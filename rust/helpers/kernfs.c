// SPDX-License-Identifier: GPL-2.0-only

#include <linux/kernfs.h>

struct kernfs_node *rksm_kernfs_find_and_get(struct kernfs_node *parent, const char *name)
{
	return kernfs_find_and_get(parent, name);
}

/* How many threads are between kernfs_get_active() and kernfs_put_active() of the node. */
int rksm_kernfs_active(struct kernfs_node *node)
{
	return atomic_read(&node->active);
}
