// SPDX-License-Identifier: GPL-2.0-only
/*
 * The counters against what is mapped: pages_shared + pages_sharing is the number of
 * mappings of KSM pages, in all processes together and in each, pages_shared the number
 * of pages; nothing is left after unmerging, nor after the processes are gone.
 *
 * runs: cloud-amd64 amd64 sanitizer builtin
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "util.h"

#define PROCESSES	4
#define PAGES		256
#define CONTENTS	24
#define UNIQUE		32	/* of PAGES, in each process */

static uint64_t (*keys)[PAGES];	/* what each process writes, chosen by the parent */
static void **areas;		/* where each process has it */

static int owner(void *arg)
{
	size_t me = (size_t)arg;
	char *area = map_pages(PAGES);

	areas[me] = area;
	for (size_t i = 0; i < PAGES; i++)
		fill_page(area + i * PAGE, keys[me][i]);
	mergeable(area, PAGES);
	child_step();
	for (size_t i = 0; i < PAGES; i++)
		if (!page_holds(area + i * PAGE, keys[me][i]))
			return KSFT_FAIL;
	child_step();
	for (size_t i = 0; i < PAGES; i++)
		if (!page_holds(area + i * PAGE, keys[me][i]))
			return KSFT_FAIL;
	return KSFT_PASS;
}

static int by_pfn(const void *a, const void *b)
{
	const struct mapping *x = a, *y = b;

	return x->pfn < y->pfn ? -1 : x->pfn > y->pfn;
}

static size_t distinct_ksm(struct mapping *maps, size_t n, size_t *mappings)
{
	size_t pages = 0;

	*mappings = 0;
	qsort(maps, n, sizeof(*maps), by_pfn);
	for (size_t i = 0; i < n; i++) {
		if (!(maps[i].flags & KPF_KSM))
			continue;
		++*mappings;
		pages += !i || maps[i].pfn != maps[i - 1].pfn;
	}
	return pages;
}

#define expect_equal(a, b, name) do {						\
	long _a = (a), _b = (b);						\
										\
	if (_a != _b)								\
		ksft_print_msg("%s is %ld, %s is %ld\n", #a, _a, #b, _b);	\
	ksft_test_result(_a == _b, name "\n");					\
} while (0)

int main(int argc, char **argv)
{
	struct child child[PROCESSES];
	struct mapping maps[PROCESSES * PAGES];
	bool used[CONTENTS] = {}, per_process = true, smaps = true, items = true, intact = true;
	size_t distinct = 0, copies = 0, mappings, pages;
	long unshared = 0;

	test_init(argc, argv);
	test_plan(13);
	ksm_reset();

	keys = map_shared((sizeof(*keys) * PROCESSES + PAGE - 1) / PAGE);
	areas = map_shared(1);
	for (size_t p = 0; p < PROCESSES; p++) {
		for (size_t i = 0; i < PAGES; i++) {
			size_t content = rnd_below(CONTENTS);

			if (i < UNIQUE) {
				keys[p][i] = unique_key();
				unshared++;
				continue;
			}
			/* Twice at least, so that none is left alone */
			if (!used[content])
				keys[p][i++] = content;
			used[content] = true;
			if (i == PAGES)
				ksft_exit_fail_msg("no room for a twin, seed it otherwise\n");
			keys[p][i] = content;
		}
	}
	for (size_t p = 0; p < PROCESSES; p++)
		for (size_t i = UNIQUE; i < PAGES; i++)
			copies++;
	for (size_t c = 0; c < CONTENTS; c++)
		distinct += used[c];

	for (size_t p = 0; p < PROCESSES; p++) {
		child[p] = child_start(owner, (void *)p);
		if (!child_wait_step(&child[p]))
			ksft_exit_fail_msg("process %zu could not start\n", p);
	}
	ksm_start();
	ksft_test_result(ksm_until("pages_sharing", copies - distinct, 12),
			 "pages_sharing: every copy but one of each content\n");
	ksft_test_result(ksm_until("pages_shared", distinct, 12),
			 "pages_shared: one page for each content\n");
	ksft_test_result(ksm_until("pages_unshared", unshared, 12),
			 "pages_unshared: every page without a twin\n");
	ksft_test_result(ksm_until("pages_volatile", 0, 12), "pages_volatile: none\n");

	for (size_t p = 0; p < PROCESSES; p++) {
		size_t mine;

		mappings_of(child[p].pid, areas[p], PAGES, maps + p * PAGES);
		mine = ksm_mappings(child[p].pid, areas[p], PAGES);
		per_process &= proc_ksm_stat(child[p].pid, "ksm_merging_pages") == (long)mine;
		items &= proc_ksm_stat(child[p].pid, "ksm_rmap_items") == PAGES;
		smaps &= smaps_ksm_pages(child[p].pid) == (long)mine;
	}
	pages = distinct_ksm(maps, PROCESSES * PAGES, &mappings);
	expect_equal(ksm_get("pages_shared") + ksm_get("pages_sharing"), mappings,
		     "shared + sharing is the number of mappings");
	expect_equal(ksm_get("pages_shared"), pages, "pages_shared is the number of KSM pages");
	ksft_test_result(per_process, "ksm_stat: ksm_merging_pages of each process\n");
	ksft_test_result(items, "ksm_stat: ksm_rmap_items of each process\n");
	ksft_test_result(smaps, "smaps: KSM: of each process\n");

	ksm_set("run", 2);
	ksft_test_result(ksm_all_zero(), "all zero after run=2\n");
	mappings = 0;
	for (size_t p = 0; p < PROCESSES; p++)
		mappings += ksm_mappings(child[p].pid, areas[p], PAGES) +
			    proc_ksm_stat(child[p].pid, "ksm_merging_pages") +
			    proc_ksm_stat(child[p].pid, "ksm_rmap_items");
	expect_equal(mappings, 0, "no process has a KSM page after run=2");

	for (size_t p = 0; p < PROCESSES; p++) {
		child_go(&child[p]);
		intact &= child_wait_step(&child[p]);
	}
	ksm_start();
	intact &= ksm_until("pages_sharing", copies - distinct, 12);
	for (size_t p = 0; p < PROCESSES; p++)
		intact &= child_end(&child[p]) == 0;
	ksft_test_result(intact, "contents as written, merged, unmerged and merged again\n");
	ksft_test_result(ksm_until("pages_shared", 0, 12) && ksm_until("pages_sharing", 0, 12) &&
			 ksm_all_zero(), "all zero after the processes are gone\n");
	test_exit();
}
