// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory failure of merged pages: every process that maps the page is told, nobody else is,
 * and the others' contents stay. A process injects it for its own page by madvise, and then
 * for a frame through debugfs, as a machine check would. Needs CONFIG_MEMORY_FAILURE, and for
 * the frame CONFIG_HWPOISON_INJECT.
 *
 * runs: cloud-amd64 sanitizer
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "util.h"

#define PAGES	8
#define HIT	3	/* the page that fails */
#define VICTIMS	3
#define OTHERS	2

#ifndef MADV_HWPOISON
#define MADV_HWPOISON	100
#endif

#define CORRUPT_PFN	"/sys/kernel/debug/hwpoison/corrupt-pfn"

enum means { BY_MADVISE, BY_FRAME, MEANS };

static const char *const means_names[MEANS] = { "by madvise", "by frame" };

struct role {
	uint64_t first_key;
	bool injects;
	enum means means;
};

static volatile sig_atomic_t told;
static char *told_of;
static char *area;

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	(void)sig;
	(void)context;
	if (info->si_code == BUS_MCEERR_AO || info->si_code == BUS_MCEERR_AR) {
		told++;
		told_of = info->si_addr;
	}
}

static bool fail_page(void *page, enum means means)
{
	struct mapping mapping;
	char pfn[32];

	if (means == BY_MADVISE)
		return !madvise(page, PAGE, MADV_HWPOISON);
	mappings_of(getpid(), page, 1, &mapping);
	snprintf(pfn, sizeof(pfn), "%#" PRIx64, mapping.pfn);
	return mapping.pfn && write_file(CORRUPT_PFN, pfn);
}

/* Exit status: 1 where contents are wrong, 2 where it was told of the failure, 4 of another page */
static int process(void *arg)
{
	struct role *role = arg;
	struct sigaction action = { .sa_sigaction = on_sigbus,
				    .sa_flags = SA_SIGINFO | SA_RESTART };
	int result = 0;

	sigaction(SIGBUS, &action, NULL);
	/* At once, not when the page is touched */
	prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0);
	area = map_pages(PAGES);
	for (size_t i = 0; i < PAGES; i++)
		fill_page(area + i * PAGE, role->first_key + i);
	mergeable(area, PAGES);
	child_step();
	if (role->injects && !fail_page(area + HIT * PAGE, role->means))
		return 64;
	child_step();
	if (told)
		result |= told_of == area + HIT * PAGE ? 2 : 4;
	for (size_t i = 0; i < PAGES; i++)
		if (!(told && i == HIT) && !page_holds(area + i * PAGE, role->first_key + i))
			result |= 1;
	return result;
}

static bool merged(void *arg)
{
	struct child *child = arg;

	(void)child;
	return ksm_get("pages_sharing") == (VICTIMS - 1 + OTHERS - 1) * PAGES;
}

static void page_fails(enum means means)
{
	struct role role[VICTIMS + OTHERS];
	struct child child[VICTIMS + OTHERS];
	const char *name = means_names[means];
	uint64_t key = 1000 * (means + 1);
	bool right = true, others = true, injected = true;

	ksm_reset();
	ksm_start();
	for (int c = 0; c < VICTIMS + OTHERS; c++) {
		/* Others share pages of other contents */
		role[c] = (struct role){ c < VICTIMS ? key : key + PAGES, c == 1, means };
		child[c] = child_start(process, &role[c]);
		if (!child_wait_step(&child[c]))
			die("a process is gone");
	}
	ksft_test_result(ksm_until_true(merged, NULL, 20), "%s: merged\n", name);
	for (int c = 0; c < VICTIMS + OTHERS; c++) {
		child_go(&child[c]);
		if (!child_wait_step(&child[c]))
			injected = false;
	}
	ksft_test_result(injected, "%s: a merged page fails\n", name);
	ksm_scans(3);
	for (int c = 0; c < VICTIMS + OTHERS; c++) {
		int status = child_end(&child[c]);
		int result = WIFEXITED(status) ? WEXITSTATUS(status) : 128;

		if (result != (c < VICTIMS ? 2 : 0))
			ksft_print_msg("process %d ended with %d\n", c, result);
		if (c < VICTIMS)
			right &= result == 2;
		else
			others &= result == 0;
	}
	ksft_test_result(right, "%s: every process that maps it is told, and has its other pages\n",
			 name);
	ksft_test_result(others, "%s: nobody else is\n", name);
	/* Its contents merge again, in another page */
	area = map_pages(2);
	fill_page(area, key + HIT);
	fill_page(area + PAGE, key + HIT);
	mergeable(area, 2);
	ksft_test_result(ksm_until("pages_sharing", 1, 20) && page_holds(area, key + HIT),
			 "%s: its contents merge again\n", name);
	ksm_set("run", 2);
	munmap(area, 2 * PAGE);
	ksft_test_result(ksm_all_zero(), "%s: all zero after run=2\n", name);
}

int main(int argc, char **argv)
{
	test_init(argc, argv);
	if (access("/proc/sys/vm/memory_failure_early_kill", F_OK)) {
		monitor_verdict();
		ksft_exit_skip("this kernel does not handle memory failure\n");
	}
	test_plan(2 * 6);
	page_fails(BY_MADVISE);
	if (system("modprobe -q hwpoison-inject") || access(CORRUPT_PFN, W_OK)) {
		for (int i = 0; i < 6; i++)
			ksft_test_result_skip("%s: this kernel has no hwpoison-inject\n",
					      means_names[BY_FRAME]);
	} else {
		page_fails(BY_FRAME);
	}
	test_exit();
}
