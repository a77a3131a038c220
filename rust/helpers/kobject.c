// SPDX-License-Identifier: GPL-2.0-only

#include <linux/kobject.h>
#include <linux/sysfs.h>

typedef ssize_t rksm_show_t(struct kobject *kobj, struct kobj_attribute *attr, char *buf);
typedef ssize_t rksm_store_t(struct kobject *kobj, struct kobj_attribute *attr, const char *buf,
			     size_t count);

struct kobj_attribute *rksm_kobj_attribute(struct attribute *attr)
{
	return container_of(attr, struct kobj_attribute, attr);
}

rksm_show_t *rksm_kobj_attribute_show(struct kobj_attribute *attr)
{
	return READ_ONCE(attr->show);
}

rksm_store_t *rksm_kobj_attribute_store(struct kobj_attribute *attr)
{
	return READ_ONCE(attr->store);
}

void rksm_kobj_attribute_set(struct kobj_attribute *attr, rksm_show_t *show, rksm_store_t *store)
{
	WRITE_ONCE(attr->show, show);
	WRITE_ONCE(attr->store, store);
}

void rksm_sysfs_attr_init(struct attribute *attr)
{
	sysfs_attr_init(attr);
}
