// SPDX-License-Identifier: GPL-2.0

#include <linux/list.h>

void rksm_hlist_add_head(struct hlist_node *node, struct hlist_head *head)
{
	hlist_add_head(node, head);
}

void rksm_hlist_del(struct hlist_node *node)
{
	hlist_del(node);
}
