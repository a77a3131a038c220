// SPDX-License-Identifier: GPL-2.0-only

#include <linux/slab.h>

void *rksm_kmem_cache_alloc(struct kmem_cache *cache, gfp_t flags)
{
	return kmem_cache_alloc(cache, flags);
}
