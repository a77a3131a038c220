// SPDX-License-Identifier: GPL-2.0-only
/*
 * merge_across_nodes: 1 merges equal pages of all nodes into one, 0 into one of each node,
 * and neither changes while pages are merged. Merged pages that are migrated are found
 * again. Needs a guest with two nodes.
 *
 * guest: --numa 2
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "util.h"

#define COPIES	16	/* of each content on each node */
#define CONTENTS 3

static char *on_node[2];

static void bind_to(void *area, size_t pages, int node)
{
	unsigned long mask = 1UL << node;

	/* 2: MPOL_BIND; 1: MPOL_MF_STRICT */
	if (syscall(SYS_mbind, area, pages * PAGE, 2, &mask, 64, 1))
		die("mbind: %s", strerror(errno));
}

/* Moves what is mapped in all of the area, for everyone, and says where it is then */
static bool move_to(char *area, size_t pages, int node)
{
	void *page[COPIES * CONTENTS];
	int nodes[COPIES * CONTENTS], status[COPIES * CONTENTS];

	for (size_t i = 0; i < pages; i++) {
		page[i] = area + i * PAGE;
		nodes[i] = node;
	}
	/* 4: MPOL_MF_MOVE_ALL. A page may be in use for a moment, by the scanner for one. */
	for (int tries = 0; tries < 20; tries++) {
		long left = syscall(SYS_move_pages, 0, pages, page, nodes, status, 4);

		if (left < 0)
			die("move_pages: %s", strerror(errno));
		if (!left)
			break;
		ksft_print_msg("%ld pages were in use\n", left);
		usleep(1000);
	}
	syscall(SYS_move_pages, 0, pages, page, NULL, status, 0);
	for (size_t i = 0; i < pages; i++) {
		if (status[i] != node) {
			ksft_print_msg("page %zu is on node %d\n", i, status[i]);
			return false;
		}
	}
	return true;
}

static bool intact(void)
{
	for (int n = 0; n < 2; n++)
		for (size_t i = 0; i < CONTENTS * COPIES; i++)
			if (!page_holds(on_node[n] + i * PAGE, 1 + i / COPIES))
				return false;
	return true;
}

static bool all_on(int node, const char *area)
{
	void *page[COPIES * CONTENTS];
	int status[COPIES * CONTENTS];

	for (size_t i = 0; i < COPIES * CONTENTS; i++)
		page[i] = (char *)area + i * PAGE;
	if (syscall(SYS_move_pages, 0, COPIES * CONTENTS, page, NULL, status, 0))
		return false;
	for (size_t i = 0; i < COPIES * CONTENTS; i++)
		if (status[i] != node)
			return false;
	return true;
}

static bool is_merged(void *twin)
{
	return ksm_mappings(getpid(), twin, CONTENTS) == CONTENTS;
}

int main(int argc, char **argv)
{
	bool ok;

	test_init(argc, argv);
	if (access("/sys/devices/system/node/node1", F_OK))
		ksft_exit_skip("one NUMA node only\n");
	test_plan(9);
	ksm_reset();
	/* Or the kernel would move pages by itself */
	write_file("/proc/sys/kernel/numa_balancing", "0");
	for (int n = 0; n < 2; n++) {
		on_node[n] = map_pages(CONTENTS * COPIES);
		bind_to(on_node[n], CONTENTS * COPIES, n);
		for (size_t i = 0; i < CONTENTS * COPIES; i++)
			fill_page(on_node[n] + i * PAGE, 1 + i / COPIES);
		/* From now on pages may be moved */
		syscall(SYS_mbind, on_node[n], CONTENTS * COPIES * PAGE, 0, NULL, 0, 0);
		mergeable(on_node[n], CONTENTS * COPIES);
	}

	ksm_start();
	ksft_test_result(ksm_until("pages_shared", CONTENTS, 20) &&
			 ksm_until("pages_sharing", CONTENTS * (2 * COPIES - 1), 20) && intact(),
			 "merge_across_nodes=1: one page for both nodes\n");
	ksft_test_result(ksm_try("merge_across_nodes", "0") == -EBUSY &&
			 ksm_get("merge_across_nodes") == 1,
			 "merge_across_nodes cannot change while pages are merged\n");
	ksm_set("run", 2);
	ksft_test_result(!ksm_try("merge_across_nodes", "0"), "merge_across_nodes=0 after run=2\n");
	/* Unmerging allocated the pages anew, wherever it was called */
	for (int n = 0; n < 2; n++)
		move_to(on_node[n], CONTENTS * COPIES, n);
	ksm_start();
	ok = ksm_until("pages_shared", 2 * CONTENTS, 20) &&
	     ksm_until("pages_sharing", 2 * CONTENTS * (COPIES - 1), 20);
	ksft_test_result(ok && all_on(0, on_node[0]) && all_on(1, on_node[1]) && intact(),
			 "merge_across_nodes=0: one page for each node, on it\n");

	/* All merged pages of node 0 go to node 1, where there are others like them */
	ok = move_to(on_node[0], CONTENTS * COPIES, 1);
	ksft_test_result(ok && all_on(1, on_node[0]) && intact(), "merged pages migrate\n");
	ksm_scans(8);
	ok = ksm_get("pages_shared") + ksm_get("pages_sharing") == 2 * CONTENTS * COPIES;
	ksft_test_result(ok && intact(), "they stay merged\n");

	{
		char *twin = map_pages(CONTENTS);

		bind_to(twin, CONTENTS, 1);
		for (size_t i = 0; i < CONTENTS; i++)
			fill_page(twin + i * PAGE, 1 + i);
		mergeable(twin, CONTENTS);
		ksft_test_result(ksm_until_true(is_merged, twin, 20) && intact(),
				 "they are found again on their new node\n");
	}

	ksm_set("run", 2);
	ksft_test_result(ksm_all_zero() && intact(), "all zero after run=2\n");
	ksft_test_result(!ksm_try("merge_across_nodes", "1"), "merge_across_nodes=1 again\n");
	test_exit();
}
