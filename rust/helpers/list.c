// SPDX-License-Identifier: GPL-2.0-only

#include <linux/list.h>

void rksm_hlist_add_head(struct hlist_node *node, struct hlist_head *head)
{
	hlist_add_head(node, head);
}

void rksm_hlist_del(struct hlist_node *node)
{
	hlist_del(node);
}

void rksm_init_list_head(struct list_head *head)
{
	INIT_LIST_HEAD(head);
}

void rksm_list_add_tail(struct list_head *entry, struct list_head *head)
{
	list_add_tail(entry, head);
}

void rksm_list_del(struct list_head *entry)
{
	list_del(entry);
}
