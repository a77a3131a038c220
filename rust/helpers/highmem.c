// SPDX-License-Identifier: GPL-2.0-only

#include <linux/highmem.h>
#include <linux/string.h>

void *rksm_kmap_local_page(struct page *page)
{
	return kmap_local_page(page);
}

void rksm_kunmap_local(const void *addr)
{
	kunmap_local(addr);
}

struct page *rksm_zero_page(void)
{
	return ZERO_PAGE(0);
}

/* Several words a step: most pages that get here are the same to the end. */
static bool rksm_same_words(const u64 *a, const u64 *b)
{
	unsigned int i;

	for (i = 0; i < PAGE_SIZE / sizeof(u64); i += 8) {
		u64 differing = (a[i] ^ b[i]) | (a[i + 1] ^ b[i + 1]) |
				(a[i + 2] ^ b[i + 2]) | (a[i + 3] ^ b[i + 3]) |
				(a[i + 4] ^ b[i + 4]) | (a[i + 5] ^ b[i + 5]) |
				(a[i + 6] ^ b[i + 6]) | (a[i + 7] ^ b[i + 7]);

		if (differing)
			return false;
	}
	return true;
}

bool rksm_pages_identical(struct page *a, struct page *b)
{
	void *addr_a = kmap_local_page(a);
	void *addr_b = kmap_local_page(b);
	bool same = rksm_same_words(addr_a, addr_b);

	kunmap_local(addr_b);
	kunmap_local(addr_a);
	return same;
}

int rksm_memcmp_pages(struct page *a, struct page *b)
{
	void *addr_a = kmap_local_page(a);
	void *addr_b = kmap_local_page(b);
	int order = memcmp(addr_a, addr_b, PAGE_SIZE);

	kunmap_local(addr_b);
	kunmap_local(addr_a);
	return order;
}

bool rksm_page_is_zero(struct page *page)
{
	void *addr = kmap_local_page(page);
	bool zero = !memchr_inv(addr, 0, PAGE_SIZE);

	kunmap_local(addr);
	return zero;
}

unsigned long rksm_zero_pfn(void)
{
	return page_to_pfn(ZERO_PAGE(0));
}
