// SPDX-License-Identifier: GPL-2.0-only
/*
 * max_page_sharing: a content with more copies than one page may have is merged into
 * several pages, none of which is mapped more often than allowed, and the chain counters
 * tell of it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "util.h"

#define LIMIT	4
#define MANY	64	/* copies of each content that overflows */
#define FEW	3	/* copies of one that does not */
#define CONTENTS 3

static int by_pfn(const void *a, const void *b)
{
	const struct mapping *x = a, *y = b;

	return x->pfn < y->pfn ? -1 : x->pfn > y->pfn;
}

/* The number of different pages; -1 where one is mapped more often than allowed */
static long pages_of(const void *area, size_t n, long limit)
{
	struct mapping maps[MANY];
	long pages = 0, mapped = 0;

	mappings_of(getpid(), area, n, maps);
	qsort(maps, n, sizeof(*maps), by_pfn);
	for (size_t i = 0; i < n; i++) {
		if (!(maps[i].flags & KPF_KSM)) {
			ksft_print_msg("page %zu is not merged\n", i);
			return -1;
		}
		if (!i || maps[i].pfn != maps[i - 1].pfn) {
			pages++;
			mapped = 0;
		}
		if (++mapped > limit) {
			ksft_print_msg("pfn %#llx is mapped more than %ld times\n",
				       (unsigned long long)maps[i].pfn, limit);
			return -1;
		}
	}
	return pages;
}

static bool intact(const char *area, size_t n, uint64_t key)
{
	for (size_t i = 0; i < n; i++)
		if (!page_holds(area + i * PAGE, key))
			return false;
	return true;
}

static char *filled(size_t n, uint64_t key)
{
	char *area = map_pages(n);

	for (size_t i = 0; i < n; i++)
		fill_page(area + i * PAGE, key);
	mergeable(area, n);
	return area;
}

int main(int argc, char **argv)
{
	char *many[CONTENTS], *few, *twin;
	long pages = 0;
	bool ok = true;
	long nodes = MANY / LIMIT;

	test_init(argc, argv);
	test_plan(12);
	ksm_reset();
	ksm_set("max_page_sharing", LIMIT);
	for (int c = 0; c < CONTENTS; c++)
		many[c] = filled(MANY, c + 1);
	few = filled(FEW, 99);
	ksm_start();

	ksft_test_result(ksm_until("pages_shared", CONTENTS * nodes + 1, 60),
			 "pages_shared: as few pages as the limit allows\n");
	ksft_test_result(ksm_until("pages_sharing", CONTENTS * (MANY - nodes) + FEW - 1, 60),
			 "pages_sharing: all the other mappings\n");
	for (int c = 0; c < CONTENTS; c++) {
		long n = pages_of(many[c], MANY, LIMIT);

		ok &= n == nodes;
		pages += n;
		ok &= intact(many[c], MANY, c + 1);
	}
	ksft_test_result(ok, "no page is mapped more often than max_page_sharing\n");
	ksft_test_result(ksm_until("stable_node_chains", CONTENTS, 10),
			 "stable_node_chains: the contents with more than one page\n");
	ksft_test_result(ksm_until("stable_node_dups", pages, 10),
			 "stable_node_dups: their pages\n");
	ksft_test_result(pages_of(few, FEW, LIMIT) == 1 && intact(few, FEW, 99),
			 "a content below the limit has one page and no chain\n");

	ksft_test_result(ksm_try_long("max_page_sharing", LIMIT + 1) == -EBUSY &&
			 ksm_get("max_page_sharing") == LIMIT,
			 "max_page_sharing cannot change while pages are merged\n");
	ksft_test_result(ksm_try_long("max_page_sharing", LIMIT) == 0,
			 "max_page_sharing can be set to what it is\n");

	/* Of one content only two copies stay: what the others had must be given back */
	if (munmap(many[0] + 2 * PAGE, (MANY - 2) * PAGE))
		die("munmap");
	twin = filled(1, 1);
	ksft_test_result(ksm_until("pages_sharing",
				   (CONTENTS - 1) * (MANY - nodes) + FEW - 1 +
				   (3 - pages_of(many[0], 2, LIMIT)), 60) &&
			 intact(many[0], 2, 1) && intact(twin, 1, 1),
			 "a new twin joins what is left of a chain\n");

	ksm_set("run", 2);
	ok = ksm_all_zero();
	for (int c = 1; c < CONTENTS; c++)
		ok &= intact(many[c], MANY, c + 1) &&
		      !ksm_mappings(getpid(), many[c], MANY);
	ksft_test_result(ok, "all zero after run=2\n");
	ksft_test_result(!ksm_try_long("max_page_sharing", 2),
			 "max_page_sharing can change then\n");
	ksm_start();
	/* Two of the three few, and two of the three that are left of the first content */
	ok = ksm_until("pages_shared", (CONTENTS - 1) * MANY / 2 + 2, 80);
	for (int c = 1; c < CONTENTS; c++)
		ok &= pages_of(many[c], MANY, 2) == MANY / 2 && intact(many[c], MANY, c + 1);
	ksft_test_result(ok, "pairs, with the lowest max_page_sharing\n");
	test_exit();
}
