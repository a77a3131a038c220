// SPDX-License-Identifier: GPL-2.0
/*
 * Memory hot-remove: blocks with merged pages go offline while KSM runs, and come back.
 * Needs movable memory (movablecore= on the kernel's command line).
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "util.h"

#define DIR_MEMORY "/sys/devices/system/memory/"
#define PAGES	2048
#define CONTENTS 512
#define UNIQUE	256
#define ROUNDS	4
#define BLOCKS	1024

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
	if (!find_blocks() || !(area = area_in_blocks(per_block))) {
		monitor_verdict();
		ksft_exit_skip("no memory block can go offline; boot with movablecore=\n");
	}
	test_plan(8);
	for (size_t i = 0; i < PAGES; i++)
		fill_page(area + i * PAGE, key_of(i));
	mergeable(area, PAGES);
	ksm_start();
	if (!ksm_until("pages_sharing", PAGES - UNIQUE - CONTENTS, 20))
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
