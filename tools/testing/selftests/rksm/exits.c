// SPDX-License-Identifier: GPL-2.0-only
/*
 * Processes that go at every stage: registered only, scanned, candidate, merged, while
 * unmerging, in the middle of a fork tree, through exec, and at random times while the
 * scanner runs; and the memory of those that die while it is stopped.
 *
 * runs: cloud-amd64 amd64 sanitizer builtin
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "util.h"

#define PAGES	64

static bool gone(void)
{
	bool zero = ksm_until("pages_sharing", 0, 20) && ksm_until("pages_shared", 0, 20) &&
		    ksm_until("pages_unshared", 0, 20) && ksm_until("pages_volatile", 0, 20);

	/* Empty chains may wait for a lookup; unmerging takes them too */
	ksm_set("run", 2);
	zero &= ksm_all_zero();
	ksm_start();
	return zero;
}

/* An mm that stays registered keeps the scanner going, so that it notices the dead. */
static int bystander(void *arg)
{
	(void)arg;
	mergeable(map_pages(1), 1);
	child_step();
	return KSFT_PASS;
}

struct holder_args {
	uint64_t first_key;	/* of the pages, each its own content */
	bool exit_itself;
};

/* Registers, steps, fills, steps, checks, and ends */
static int holder(void *arg)
{
	struct holder_args *args = arg;
	char *area = map_pages(PAGES);

	mergeable(area, PAGES);
	child_step();
	for (size_t i = 0; i < PAGES; i++)
		fill_page(area + i * PAGE, args->first_key + i);
	child_step();
	for (size_t i = 0; i < PAGES; i++)
		if (!page_holds(area + i * PAGE, args->first_key + i))
			return KSFT_FAIL;
	if (!args->exit_itself)
		pause();
	return KSFT_PASS;
}

static bool reap(struct child *child, bool itself)
{
	if (itself)
		return child_end(child) == 0;
	child_kill(child);
	return true;
}

static bool holder_goes_registered(bool itself)
{
	struct holder_args args = { unique_key(), itself };
	struct child child = child_start(holder, &args);

	return child_wait_step(&child) && reap(&child, itself) && gone();
}

static bool holder_goes_scanned(bool itself, int scans)
{
	struct holder_args args = { unique_key(), itself };
	struct child child = child_start(holder, &args);
	bool ok = child_wait_step(&child);

	child_go(&child);
	ok &= child_wait_step(&child);
	if (scans)
		ksm_scans(scans);
	if (scans > 2)
		ok &= ksm_until("pages_unshared", PAGES, 10);
	return reap(&child, itself) && ok && gone();
}

static bool holder_goes_merged(bool itself)
{
	struct holder_args args = { unique_key(), itself };
	struct child child[3];
	bool ok = true;

	for (int c = 0; c < 3; c++) {
		child[c] = child_start(holder, &args);
		ok &= child_wait_step(&child[c]);
		child_go(&child[c]);
		ok &= child_wait_step(&child[c]);
	}
	ok &= ksm_until("pages_sharing", 2 * PAGES, 10);
	ok &= reap(&child[0], itself);
	ok &= ksm_until("pages_sharing", PAGES, 10) && ksm_until("pages_shared", PAGES, 10);
	/* The pages live on in the others */
	ok &= reap(&child[1], itself);
	ok &= ksm_until("pages_sharing", 0, 10) && ksm_until("pages_shared", PAGES, 10);
	ok &= reap(&child[2], itself);
	return ok && gone();
}

static bool goes_while_unmerging(void)
{
	bool ok = true;

	for (int round = 0; round < 8; round++) {
		struct holder_args args = { unique_key(), false };
		struct child child[3];
		int killer;

		for (int c = 0; c < 3; c++) {
			child[c] = child_start(holder, &args);
			ok &= child_wait_step(&child[c]);
			child_go(&child[c]);
			ok &= child_wait_step(&child[c]);
		}
		ok &= ksm_until("pages_sharing", 2 * PAGES, 10);
		killer = fork();
		if (!killer) {
			for (int c = 0; c < 3; c++) {
				usleep(rnd_below(1500));
				kill(child[c].pid, SIGKILL);
			}
			_exit(0);
		}
		ksm_set("run", 2);
		waitpid(killer, NULL, 0);
		for (int c = 0; c < 3; c++)
			child_kill(&child[c]);
		ok &= ksm_all_zero();
		ksm_start();
	}
	return ok && gone();
}

/* Fork trees: everyone writes some pages, checks all, and goes in any order */

#define DEPTH	3
#define FANOUT	3

static int tree_member(char *area, uint64_t *key, int depth)
{
	pid_t child[FANOUT];
	int status, bad = 0;

	rnd_fork(getpid());
	for (int n = 0; n < 8; n++) {
		size_t i = rnd_below(PAGES);

		key[i] = rnd_below(4);
		fill_page(area + i * PAGE, key[i]);
	}
	for (int c = 0; depth && c < FANOUT; c++) {
		child[c] = fork();
		if (!child[c])
			_exit(tree_member(area, key, depth - 1));
		if (child[c] < 0)
			return KSFT_FAIL;
	}
	/* Some leave their children behind, to whom it must not matter */
	if (depth && depth < DEPTH && rnd_below(4) == 0)
		return KSFT_PASS;
	ksm_scans(rnd_below(3));
	for (size_t i = 0; i < PAGES; i++)
		bad |= !page_holds(area + i * PAGE, key[i]);
	for (int c = 0; depth && c < FANOUT; c++) {
		if (waitpid(child[c], &status, 0) < 0 || status)
			bad = 1;
	}
	return bad ? KSFT_FAIL : KSFT_PASS;
}

static int tree_root(void *arg)
{
	char *area = map_pages(PAGES);
	static uint64_t key[PAGES];

	(void)arg;
	/* Adopts the orphans and waits for them, so that none outlives the test */
	prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
	mergeable(area, PAGES);
	for (size_t i = 0; i < PAGES; i++) {
		key[i] = rnd_below(4);
		fill_page(area + i * PAGE, key[i]);
	}
	if (!ksm_until("pages_shared", 4, 10))
		return KSFT_FAIL;
	if (tree_member(area, key, DEPTH))
		return KSFT_FAIL;
	for (int status; waitpid(-1, &status, 0) > 0;)
		if (status)
			return KSFT_FAIL;
	return errno == ECHILD ? KSFT_PASS : KSFT_FAIL;
}

/* exec: what is mergeable by prctl stays so, with a new mm and none of the old pages */

static int exec_other(void *arg)
{
	char key[32];
	char *argv[] = { "exits", "--after-exec", key, NULL };

	snprintf(key, sizeof(key), "%#lx", *(unsigned long *)arg);
	if (prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0))
		return KSFT_FAIL;
	fill_page(map_pages(1), 1);
	execv("/proc/self/exe", argv);
	return KSFT_FAIL;
}

static int after_exec(uint64_t first_key)
{
	char *area = map_pages(PAGES);

	if (prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0) != 1)
		return KSFT_FAIL;
	for (size_t i = 0; i < PAGES; i++)
		fill_page(area + i * PAGE, first_key + i);
	/* All of it, in both of the pair, and nobody called madvise */
	for (int scans = 0; scans < 20; scans++) {
		if (ksm_mappings(getpid(), area, PAGES) == PAGES)
			break;
		ksm_scans(1);
	}
	if (ksm_mappings(getpid(), area, PAGES) != PAGES)
		return KSFT_FAIL;
	for (size_t i = 0; i < PAGES; i++)
		if (!page_holds(area + i * PAGE, first_key + i))
			return KSFT_FAIL;
	/* Stays, as the other of the pair looks for the same pages */
	ksm_scans(3);
	return KSFT_PASS;
}

static bool exec_keeps_merging(void)
{
	bool ok = true;

	for (int round = 0; round < 4; round++) {
		unsigned long key = unique_key();
		pid_t pid[2];
		int status;

		for (int c = 0; c < 2; c++) {
			fflush(NULL);
			pid[c] = fork();
			if (!pid[c])
				_exit(exec_other(&key));
		}
		for (int c = 0; c < 2; c++)
			ok &= waitpid(pid[c], &status, 0) == pid[c] && !status;
	}
	return ok && gone();
}

/* Random lifetimes, so that death meets the scanner wherever it is */

static int storm(void *arg)
{
	(void)arg;
	for (int n = 0; n < 150; n++) {
		pid_t pid = fork();

		if (!pid) {
			char *area = map_pages(PAGES);

			rnd_fork(n);
			mergeable(area, PAGES);
			for (size_t i = 0; i < PAGES; i++)
				fill_page(area + i * PAGE, rnd_below(8));
			usleep(rnd_below(60000));
			if (rnd_below(2))
				_exit(0);
			kill(getpid(), SIGKILL);
		}
		if (n % 8 == 7)
			waitpid(-1, NULL, 0);
	}
	while (waitpid(-1, NULL, 0) > 0)
		;
	return KSFT_PASS;
}

static bool storm_leaves_nothing(void)
{
	struct child child = child_start(storm, NULL);

	return child_end(&child) == 0 && gone();
}

/*
 * A dead mm that is still pinned keeps its top-level page table, which the kernel counts.
 * The built-in KSM keeps it until it scans again; rksm must not.
 */
#define DEAD_MMS 120

static long dead_mms_held(void)
{
	struct holder_args args = { unique_key(), false };
	struct child child[DEAD_MMS];
	long before, held;

	/* Registered only, tracked and merged ones: all must be let go */
	before = vmstat("nr_page_table_pages");
	for (int c = 0; c < DEAD_MMS; c++) {
		child[c] = child_start(holder, &args);
		child_wait_step(&child[c]);
		if (c % 4) {
			child_go(&child[c]);
			child_wait_step(&child[c]);
		}
	}
	ksm_scans(3);
	ksm_set("run", 0);
	for (int c = 0; c < DEAD_MMS; c++)
		child_kill(&child[c]);
	/* Generously more than the seconds that it may take */
	for (int tries = 0; tries < 300; tries++) {
		held = vmstat("nr_page_table_pages") - before;
		if (held < DEAD_MMS / 10)
			break;
		usleep(100000);
		if (!module_loaded() && tries == 30)
			break;
	}
	return held;
}

int main(int argc, char **argv)
{
	struct child watcher, tree;
	long held;

	if (argc == 3 && !strcmp(argv[1], "--after-exec"))
		return after_exec(strtoull(argv[2], NULL, 0));

	test_init(argc, argv);
	test_plan(15);
	ksm_reset();
	ksm_start();
	watcher = child_start(bystander, NULL);
	child_wait_step(&watcher);

	for (int itself = 0; itself < 2; itself++) {
		const char *how = itself ? "exits" : "is killed";

		ksft_test_result(holder_goes_registered(itself), "%s when registered only\n", how);
		ksft_test_result(holder_goes_scanned(itself, 0), "%s before a scan\n", how);
		ksft_test_result(holder_goes_scanned(itself, 1), "%s after one scan\n", how);
		ksft_test_result(holder_goes_scanned(itself, 4), "%s when candidate\n", how);
		ksft_test_result(holder_goes_merged(itself), "%s when merged\n", how);
	}
	ksft_test_result(goes_while_unmerging(), "killed while unmerging\n");
	ksft_test_result(exec_keeps_merging(), "exec after prctl\n");

	tree = child_start(tree_root, NULL);
	ksft_test_result(child_end(&tree) == 0 && gone(), "fork tree\n");
	ksft_test_result(storm_leaves_nothing(), "random lifetimes\n");

	held = dead_mms_held();
	ksft_print_msg("%ld page tables held for %d dead mms with run=0\n", held, DEAD_MMS);
	if (module_loaded())
		ksft_test_result(held < DEAD_MMS / 10, "dead mms are freed with run=0\n");
	else
		ksft_test_result(held >= DEAD_MMS / 10,
				 "dead mms are kept with run=0, as this test can tell\n");
	child_end(&watcher);
	test_exit();
}
