// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory hot-remove: blocks with merged pages go offline while KSM runs, and come back, also
 * while some of the kernel's allocations for it fail, where there is fault injection.
 * Needs movable memory (movablecore= on the kernel's command line).
 *
 * What cannot go offline is said page by page in the kernel's log, and so is what was tried
 * in vain.
 *
 * guest: --append movablecore=512M
 * guest: --allow 'page dumped because: (unmovable page|migration failure)'
 * runs: cloud-amd64 builtin
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "util.h"

#define DIR_MEMORY "/sys/devices/system/memory/"
#define PAGES	2048
#define CONTENTS 512
#define UNIQUE	256
#define ROUNDS	4
#define BLOCKS	1024
#define DIR_DEBUG "/sys/kernel/debug/"

static char *area;
static uint64_t unique;
static bool can_go[BLOCKS];	/* blocks without a hole and without memory of early boot */

static uint64_t key_of(size_t i)
{
	return i < UNIQUE ? unique + i : 1 + i % CONTENTS;
}

static bool intact(void)
{
	for (size_t i = 0; i < PAGES; i++)
		if (!page_holds(area + i * PAGE, key_of(i)))
			return false;
	return true;
}

static size_t block_pages(void)
{
	char text[32];

	if (read_file(DIR_MEMORY "block_size_bytes", text, sizeof(text)) <= 0)
		return 0;
	return strtoull(text, NULL, 16) / PAGE;
}

static bool movable(size_t block)
{
	char path[96], zones[64];

	snprintf(path, sizeof(path), DIR_MEMORY "memory%zu/valid_zones", block);
	return read_file(path, zones, sizeof(zones)) > 0 && !strncmp(zones, "Movable", 7);
}

static bool try_state(size_t block, const char *state)
{
	char path[96];

	snprintf(path, sizeof(path), DIR_MEMORY "memory%zu/state", block);
	return write_file(path, state);
}

static bool set_state(size_t block, const char *state)
{
	/* EBUSY and EAGAIN are for pages that are in use for a moment */
	for (int tries = 0; tries < 50; tries++) {
		if (try_state(block, state))
			return true;
		usleep(20000);
	}
	ksft_print_msg("memory%zu does not go %s: %s\n", block, state, strerror(errno));
	return false;
}

/* Merged pages in the block */
static size_t merged_in(size_t block, size_t per_block)
{
	static struct mapping maps[PAGES];
	size_t n = 0;

	mappings_of(getpid(), area, PAGES, maps);
	for (size_t i = 0; i < PAGES; i++)
		n += (maps[i].flags & KPF_KSM) && maps[i].pfn / per_block == block;
	return n;
}

/* The block that can go with most merged pages */
static long best_block(size_t per_block)
{
	static struct mapping maps[PAGES];
	size_t most = 0;
	long best = -1;

	mappings_of(getpid(), area, PAGES, maps);
	for (size_t i = 0; i < PAGES; i++) {
		size_t block = maps[i].pfn / per_block, n;

		if (!maps[i].pfn || (long)block == best || !can_go[block % BLOCKS])
			continue;
		n = merged_in(block, per_block);
		if (n > most) {
			most = n;
			best = block;
		}
	}
	ksft_print_msg("memory%ld has %zu mappings of merged pages\n", best, most);
	return best;
}

/* Which blocks can go at all, before anything of ours is in them */
static int find_blocks(void)
{
	int found = 0;

	for (size_t block = 0; block < BLOCKS; block++) {
		can_go[block] = movable(block) && try_state(block, "offline") &&
				set_state(block, "online_movable");
		found += can_go[block];
	}
	return found;
}

/* Fresh pages that are in such blocks; others are used up until there are some */
static char *area_in_blocks(size_t per_block)
{
	static struct mapping maps[PAGES];

	for (int tries = 0; tries < 100; tries++) {
		char *p = map_pages(PAGES);
		size_t there = 0;

		for (size_t i = 0; i < PAGES; i++)
			p[i * PAGE] = 1;
		mappings_of(getpid(), p, PAGES, maps);
		for (size_t i = 0; i < PAGES; i++)
			there += can_go[maps[i].pfn / per_block % BLOCKS];
		if (there > PAGES / 2)
			return p;
	}
	return NULL;
}

/* Merged pages that are in such blocks */
static bool fresh_area(size_t per_block)
{
	char *old = area;

	area = area_in_blocks(per_block);
	if (old)
		munmap(old, PAGES * PAGE);
	if (!area)
		die("no fresh pages in blocks that can go offline");
	for (size_t i = 0; i < PAGES; i++)
		fill_page(area + i * PAGE, key_of(i));
	mergeable(area, PAGES);
	ksm_start();
	return ksm_until("pages_sharing", PAGES - UNIQUE - CONTENTS, 20);
}

static bool balanced(void)
{
	long counted, mapped;

	ksm_set("run", 0);
	counted = ksm_get("pages_shared") + ksm_get("pages_sharing");
	mapped = ksm_mappings(getpid(), area, PAGES);
	ksm_start();
	if (counted != mapped)
		ksft_print_msg("%ld are counted, %ld mapped\n", counted, mapped);
	return counted == mapped;
}

#define MOST_FAULTS 1000000

static const char *const kinds[] = { "failslab", "fail_page_alloc" };

/*
 * Of the tasks that ask for it, this part of the allocations fails, in percent; false where there
 * is no such thing
 */
static bool set_faults(const char *percent)
{
	const char *const settings[][2] = {
		{ "probability", percent }, { "interval", "1" },
		{ "times", "1000000" },	    { "space", "0" },
		{ "verbose", "0" },	    { "task-filter", "Y" },
		{ "ignore-gfp-wait", "N" }, { "ignore-gfp-highmem", "N" },
		{ "min-order", "0" },
	};
	char path[96];

	for (size_t k = 0; k < ARRAY_SIZE(kinds); k++) {
		for (size_t i = 0; i < ARRAY_SIZE(settings); i++) {
			snprintf(path, sizeof(path), DIR_DEBUG "%s/%s", kinds[k], settings[i][0]);
			if (access(path, F_OK) ? !i : !write_file(path, settings[i][1]))
				return false;
		}
	}
	return true;
}

/* How many have failed since */
static long faults(void)
{
	char path[96], text[32];
	long n = 0;

	for (size_t k = 0; k < ARRAY_SIZE(kinds); k++) {
		snprintf(path, sizeof(path), DIR_DEBUG "%s/times", kinds[k]);
		if (read_file(path, text, sizeof(text)) > 0)
			n += MOST_FAULTS - strtol(text, NULL, 0);
	}
	return n;
}

/* Whether it went, or every try was refused for a good reason */
static bool offline_with_faults(size_t block, int *went)
{
	int status;
	pid_t pid;

	fflush(stdout);
	pid = fork();
	if (!pid) {
		if (!write_file("/proc/self/make-it-fail", "1"))
			_exit(3);
		for (int tries = 0; tries < 50; tries++) {
			if (try_state(block, "offline"))
				_exit(0);
			/* EINTR and EINVAL: what else has a say in it had no memory */
			if (errno != ENOMEM && errno != EBUSY && errno != EAGAIN &&
			    errno != EINTR && errno != EINVAL)
				_exit(2);
		}
		_exit(1);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		return false;
	*went += !status;
	return WIFEXITED(status) && WEXITSTATUS(status) < 2;
}

static void with_faults(size_t per_block)
{
	bool clean = true, right = true;
	long failed = 0;
	int went = 0;

	if (!set_faults("0")) {
		ksft_test_result_skip("this kernel has no fault injection\n");
		ksft_test_result_skip("this kernel has no fault injection\n");
		return;
	}
	for (int round = 0; round < ROUNDS; round++) {
		long block;
		int before = went;

		/* What was migrated before need not be in a block that can go */
		right &= fresh_area(per_block);
		block = best_block(per_block);
		if (block < 0)
			break;
		set_faults(round % 2 ? "20" : "5");
		clean &= offline_with_faults(block, &went);
		failed += faults();
		set_faults("0");
		right &= intact();
		if (went > before)
			clean &= set_state(block, "online_movable");
		ksm_scans(3);
		right &= balanced() && intact();
	}
	ksft_print_msg("%d blocks of %d went offline, %ld allocations failed\n", went, ROUNDS,
		       failed);
	ksft_test_result(clean && went && failed,
			 "with some allocations failing they go, or it is a clean error\n");
	ksft_test_result(right, "contents and counters are right then, too\n");
}

int main(int argc, char **argv)
{
	size_t per_block = block_pages();
	bool offline = true, online = true, contents = true, counters = true, empty = true;
	long block = -1;
	int done = 0;

	test_init(argc, argv);
	if (!per_block)
		ksft_exit_skip("no memory blocks in sysfs\n");
	ksm_reset();
	unique = unique_key();
	if (!find_blocks()) {
		monitor_verdict();
		ksft_exit_skip("no memory block can go offline; boot with movablecore=\n");
	}
	test_plan(10);
	if (!fresh_area(per_block))
		die("pages do not merge");

	for (int round = 0; round < ROUNDS; round++) {
		/* Stopped or running, and once with the pages fresh from a migration */
		ksm_set("run", round % 2);
		block = best_block(per_block);
		if (block < 0)
			break;
		if (!set_state(block, "offline")) {
			offline = false;
			break;
		}
		done++;
		empty &= merged_in(block, per_block) == 0;
		contents &= intact();
		ksm_start();
		ksm_scans(3);
		counters &= balanced();
		online &= set_state(block, "online_movable");
		ksm_scans(2);
		contents &= intact();
	}
	ksft_test_result(offline && done, "%d blocks with merged pages went offline\n", done);
	ksft_test_result(empty, "no merged page is left in them\n");
	ksft_test_result(online, "they came back\n");
	ksft_test_result(contents, "contents are as they were\n");
	ksft_test_result(counters, "every merged page is counted\n");
	with_faults(per_block);
	ksft_test_result(ksm_until("pages_sharing", PAGES - UNIQUE - CONTENTS, 20) &&
			 ksm_until("pages_shared", CONTENTS, 20), "all stay merged\n");

	/* New copies find the pages that were migrated */
	{
		char *twins = map_pages(CONTENTS);

		for (size_t i = 0; i < CONTENTS; i++)
			fill_page(twins + i * PAGE, 1 + i);
		mergeable(twins, CONTENTS);
		ksft_test_result(ksm_until("pages_sharing", PAGES - UNIQUE, 20) &&
				 ksm_until("pages_shared", CONTENTS, 20),
				 "pages that were migrated are found again\n");
	}
	ksm_set("run", 2);
	ksft_test_result(ksm_all_zero() && intact(), "all zero after run=2\n");
	test_exit();
}
