// SPDX-License-Identifier: GPL-2.0-only
/*
 * Does one thing wrong when it is loaded, which the sanitizer kernel must find. Its name is
 * the parameter.
 */
#include <linux/delay.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/vmalloc.h>

static char *bug = "";
module_param(bug, charp, 0444);

static void use_after_free(void)
{
	u64 *p = kzalloc(sizeof(*p), GFP_KERNEL);

	kfree(p);
	pr_info("read %llu\n", READ_ONCE(*p));
}

static void vmalloc_out_of_bounds(void)
{
	char *p = vmalloc(100);

	if (p)
		pr_info("read %d\n", READ_ONCE(p[100]));
	vfree(p);
}

static void sleep_in_atomic(void)
{
	static DEFINE_SPINLOCK(lock);

	spin_lock(&lock);
	msleep(1);
	spin_unlock(&lock);
}

static void lock_inversion(void)
{
	static DEFINE_MUTEX(a);
	static DEFINE_MUTEX(b);

	mutex_lock(&a);
	mutex_lock(&b);
	mutex_unlock(&b);
	mutex_unlock(&a);

	mutex_lock(&b);
	mutex_lock(&a);
	mutex_unlock(&a);
	mutex_unlock(&b);
}

/* Many, as stale pointers in the slab caches' sheaves hide some from kmemleak. */
static void leak(void)
{
	for (int i = 0; i < 512; i++)
		kmalloc(1000, GFP_KERNEL);
}

static void list_corruption(void)
{
	LIST_HEAD(head);
	struct list_head node;

	list_add(&node, &head);
	list_add(&node, &head);
}

/* A reference given back once more than it was taken. */
static void page_reference(void)
{
	struct page *page = alloc_page(GFP_KERNEL);

	if (!page)
		return;
	__free_page(page);
	put_page(page);
}

static const struct {
	const char *name;
	void (*make)(void);
} bugs[] = {
	{ "use_after_free", use_after_free },
	{ "vmalloc_out_of_bounds", vmalloc_out_of_bounds },
	{ "sleep_in_atomic", sleep_in_atomic },
	{ "lock_inversion", lock_inversion },
	{ "leak", leak },
	{ "list_corruption", list_corruption },
	{ "page_reference", page_reference },
};

static int __init bugs_init(void)
{
	for (int i = 0; i < ARRAY_SIZE(bugs); i++) {
		if (!strcmp(bug, bugs[i].name)) {
			bugs[i].make();
			return 0;
		}
	}
	return -EINVAL;
}
module_init(bugs_init);

static void __exit bugs_exit(void)
{
}
module_exit(bugs_exit);

MODULE_DESCRIPTION("Mistakes that the sanitizer kernel must find");
MODULE_LICENSE("GPL");
