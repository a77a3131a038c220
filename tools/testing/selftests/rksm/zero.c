// SPDX-License-Identifier: GPL-2.0-only
/*
 * use_zero_pages: zero-filled pages become the zero page and are counted apart; the count
 * goes down with every write, unmap, unmerge and exit.
 *
 * runs: cloud-amd64 amd64 sanitizer builtin
 */
#define _GNU_SOURCE
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "util.h"

#define ZEROES	64
#define WRITTEN	8
#define UNMAPPED 8
#define OTHERS	4	/* equal pages that are not zero */

static size_t on_zero_page(pid_t pid, const void *area, size_t n)
{
	struct mapping maps[ZEROES];
	size_t zero = 0;

	mappings_of(pid, area, n, maps);
	for (size_t i = 0; i < n; i++)
		zero += !!(maps[i].flags & KPF_ZERO_PAGE);
	return zero;
}

static char *zeroes(void)
{
	char *area = map_pages(ZEROES);

	for (size_t i = 0; i < ZEROES; i++)
		fill_page(area + i * PAGE, 0);
	mergeable(area, ZEROES);
	return area;
}

static bool all_zero_bytes(const char *area, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (!page_holds(area + i * PAGE, 0))
			return false;
	return true;
}

/* ksm_zero_pages of all and of the process pid, with the scanner stopped */
static bool counted(long n, pid_t pid)
{
	long all, own;

	ksm_set("run", 0);
	all = ksm_get("ksm_zero_pages");
	own = proc_ksm_stat(pid, "ksm_zero_pages");
	if (all == n && own == n)
		return true;
	ksft_print_msg("ksm_zero_pages is %ld, of the process %ld, not %ld\n", all, own, n);
	return false;
}

static int zero_child(void *arg)
{
	(void)arg;
	zeroes();
	child_step();
	return KSFT_PASS;
}

int main(int argc, char **argv)
{
	struct child child;
	char *area, *others;
	long profit;

	test_init(argc, argv);
	test_plan(12);
	ksm_reset();
	area = zeroes();
	others = map_pages(OTHERS);
	for (size_t i = 0; i < OTHERS; i++)
		fill_page(others + i * PAGE, 1);
	mergeable(others, OTHERS);

	ksm_start();
	ksft_test_result(ksm_until("pages_sharing", ZEROES - 1 + OTHERS - 1, 20) &&
			 ksm_until("pages_shared", 2, 20) && counted(0, getpid()) &&
			 !on_zero_page(getpid(), area, ZEROES),
			 "use_zero_pages=0: zeroes merge as any content\n");
	ksm_set("run", 2);
	ksm_set("use_zero_pages", 1);
	ksm_start();
	ksft_test_result(ksm_until("ksm_zero_pages", ZEROES, 20) && counted(ZEROES, getpid()) &&
			 on_zero_page(getpid(), area, ZEROES) == ZEROES,
			 "use_zero_pages=1: they become the zero page\n");
	ksm_start();
	ksft_test_result(ksm_until("pages_shared", 1, 20) &&
			 ksm_until("pages_sharing", OTHERS - 1, 20),
			 "they are not counted as shared, others are\n");
	profit = ksm_get("general_profit");
	ksft_test_result(profit > (ZEROES / 2) * (long)PAGE &&
			 profit <= (ZEROES + OTHERS - 1) * (long)PAGE,
			 "general_profit counts them (%ld)\n", profit);
	ksft_test_result(all_zero_bytes(area, ZEROES), "they read as zeroes\n");

	ksm_set("run", 0);
	for (size_t i = 0; i < WRITTEN; i++)
		area[i * PAGE + i] = 1;
	ksft_test_result(counted(ZEROES - WRITTEN, getpid()), "a write counts one down\n");
	for (size_t i = 0; i < WRITTEN; i++)
		area[i * PAGE + i] = 0;
	ksm_start();
	ksft_test_result(ksm_until("ksm_zero_pages", ZEROES, 20) && counted(ZEROES, getpid()),
			 "written back to zero, it is merged again\n");

	munmap(area + (ZEROES - UNMAPPED) * PAGE, UNMAPPED * PAGE);
	ksft_test_result(counted(ZEROES - UNMAPPED, getpid()), "munmap counts down\n");
	madvise(area, UNMAPPED * PAGE, MADV_DONTNEED);
	ksft_test_result(counted(ZEROES - 2 * UNMAPPED, getpid()), "MADV_DONTNEED counts down\n");

	ksm_set("run", 1);
	if (madvise(area, (ZEROES - UNMAPPED) * PAGE, MADV_UNMERGEABLE))
		die("MADV_UNMERGEABLE");
	ksft_test_result(counted(0, getpid()) && !on_zero_page(getpid(), area, UNMAPPED) &&
			 all_zero_bytes(area, ZEROES - UNMAPPED),
			 "MADV_UNMERGEABLE gives each a page of its own\n");

	ksm_start();
	child = child_start(zero_child, NULL);
	child_wait_step(&child);
	if (!ksm_until("ksm_zero_pages", ZEROES, 20))
		ksft_print_msg("the child's pages were not merged\n");
	ksm_set("run", 0);
	child_kill(&child);
	ksft_test_result(ksm_get("ksm_zero_pages") == 0, "exit counts down\n");

	mergeable(area, ZEROES - UNMAPPED);
	ksm_start();
	/* The pages that MADV_DONTNEED took are the zero page without KSM's doing once read */
	ksm_until("ksm_zero_pages", ZEROES - 2 * UNMAPPED, 20);
	ksm_set("run", 2);
	ksft_test_result(ksm_all_zero() && counted(0, getpid()) &&
			 all_zero_bytes(area, ZEROES - UNMAPPED), "run=2 unmerges them\n");
	test_exit();
}
