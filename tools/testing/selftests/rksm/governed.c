// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory with governor=auto: what is equal is merged, whatever becomes of it and of its processes
 * meanwhile, requests, rules and settings act as ever, no content changes, and switching the
 * governor at any time harms nobody.
 *
 * guest: --no-module --append slab_nomerge
 * runs: none
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "device.h"
#include "holders.h"

#define PAGES		512
#define CONTENTS	16
#define TARGETS		4
#define SECONDS		300	/* no memory waits a quarter of it for its next look */
#define EXITS		150
#define SWITCHES	400

static uint64_t key;	/* another one for each part */

/* A governor that has just begun, for which CPU time is no matter */
static void begin(void)
{
	ksm_reset();
	key = unique_key();
	ksm_set("cpu_percent", 100);
	if (ksm_try("governor", "auto"))
		die("there is no governor");
	ksm_start();
}

static struct target equal_target(void)
{
	return target_start(PAGES, CONTENTS, key, OPT_MADVISE);
}

static void start_targets(struct target *target)
{
	for (int i = 0; i < TARGETS; i++)
		target[i] = equal_target();
}

static void end_targets(struct target *target)
{
	for (int i = 0; i < TARGETS; i++)
		target_end(&target[i]);
}

static bool is_merged(void *target)
{
	return target_merged(target) == PAGES;
}

static bool is_unmerged(void *target)
{
	return !target_merged(target);
}

static bool all_merged(void *arg)
{
	struct target *target = arg;

	for (int i = 0; i < TARGETS; i++)
		if (!is_merged(&target[i]))
			return false;
	return true;
}

static bool all_intact(struct target *target)
{
	for (int i = 0; i < TARGETS; i++)
		if (!target_do(&target[i], OP_INTACT, 0))
			return false;
	return true;
}

static bool targets_merge(struct target *target)
{
	bool merged = holds_late(all_merged, target, SECONDS);

	for (int i = 0; i < TARGETS && !merged; i++)
		ksft_print_msg("%d: %zu of %d pages are merged\n", i, target_merged(&target[i]),
			       PAGES);
	return merged && all_intact(target);
}

static bool merges(struct target *target)
{
	bool merged = holds_late(is_merged, target, SECONDS);

	if (!merged)
		ksft_print_msg("%zu of %d pages are merged\n", target_merged(target), PAGES);
	return merged && target_do(target, OP_INTACT, 0);
}

struct count {
	const char *file;
	long value;
};

static bool is_count(void *arg)
{
	struct count *count = arg;

	return ksm_get(count->file) == count->value;
}

static bool comes_to(const char *file, long value)
{
	if (holds_late(is_count, &(struct count){ file, value }, SECONDS))
		return true;
	ksft_print_msg("%s is %ld, not %ld\n", file, ksm_get(file), value);
	return false;
}

/* Writes */

static void equal(void)
{
	struct target target[TARGETS];
	bool ok;

	begin();
	start_targets(target);
	ok = targets_merge(target);
	ksft_test_result(ok && comes_to("pages_shared", CONTENTS) &&
			 comes_to("pages_sharing", TARGETS * PAGES - CONTENTS),
			 "what is equal in several processes is merged, and counted\n");

	/* The first contents again, and again */
	ok = true;
	for (int n = 0; n < 4; n++) {
		for (int i = 0; i < 2; i++)
			target_do(&target[i], OP_WRITE, PAGES / 3 + n);
		ok &= !target_do(&target[0], OP_INTACT, 0) && target_do(&target[2], OP_INTACT, 0);
		usleep(rnd_below(2000000));
		for (int i = 0; i < 2; i++)
			target_do(&target[i], OP_WRITE, PAGES / 3 + n);
		ok &= all_intact(target);
	}
	ok &= targets_merge(target);
	ksft_test_result(ok && comes_to("pages_shared", CONTENTS),
			 "what is written to is another page, and merges again\n");
	end_targets(target);
	ksft_test_result(comes_to("pages_shared", 0) && comes_to("pages_sharing", 0) &&
			 comes_to("processes", 0), "nothing is left of processes that end\n");
}

static bool is_zeroed(void *arg)
{
	struct target *target = arg;

	return proc_ksm_stat(target->child.pid, "ksm_zero_pages") == PAGES;
}

static void zeroes(void)
{
	struct target target;
	bool ok;

	begin();
	ksm_set("use_zero_pages", 1);
	target = target_start(PAGES, 1, 0, OPT_MADVISE);
	ok = holds_late(is_zeroed, &target, SECONDS) && target_do(&target, OP_INTACT, 0);
	target_do(&target, OP_WRITE, PAGES / 2);
	ok &= !is_zeroed(&target);
	target_do(&target, OP_WRITE, PAGES / 2);
	ok &= holds_late(is_zeroed, &target, SECONDS) && target_do(&target, OP_INTACT, 0);
	ksft_test_result(ok && comes_to("ksm_zero_pages", PAGES),
			 "pages of zeroes become the zero page, and again\n");
	target_end(&target);
}

static void huge(void)
{
	struct target target[2];
	struct mapping map;
	bool ok;

	begin();
	ksm_set("run", 0);
	for (int i = 0; i < 2; i++)
		target[i] = target_start_huge(PAGES, CONTENTS, key, OPT_MADVISE);
	mappings_of(target[0].child.pid, target[0].area, 1, &map);
	ksm_set("run", 1);
	ok = merges(&target[0]) && merges(&target[1]);
	if (map.flags & KPF_THP)
		ksft_test_result(ok, "huge pages are split and merged\n");
	else
		ksft_test_result_skip("huge pages: there are none\n");
	for (int i = 0; i < 2; i++)
		target_end(&target[i]);
}

/* Processes */

static void exits(void)
{
	struct target target[TARGETS];

	begin();
	start_targets(target);
	/* The first one stays */
	for (int n = 0; n < EXITS; n++) {
		int i = 1 + rnd_below(TARGETS - 1);

		/* When half of them die, looks have just begun; some live to be merged */
		usleep(n % 2 ? rnd_below(20000) : rnd_below(400000));
		target_end(&target[i]);
		target[i] = equal_target();
	}
	ksft_test_result(targets_merge(target) && comes_to("pages_shared", CONTENTS) &&
			 comes_to("processes", TARGETS), "processes are killed meanwhile\n");
	end_targets(target);
}

static bool holders_merged(void *arg)
{
	struct holder *holder = arg;

	return ksm_mappings(holder->child.pid, holder->area, holder->pages) == holder->pages;
}

static void forks(void)
{
	uint64_t contents[HOLDER_PAGES];
	struct holder holder[3];
	bool ok;

	begin();
	for (size_t i = 0; i < HOLDER_PAGES; i++)
		contents[i] = key + i % CONTENTS;
	holder_start(&holder[0], HOLDER_PAGES, contents, -1);
	ok = holds_late(holders_merged, &holder[0], SECONDS);
	holder_fork(&holder[0], &holder[1]);
	ok &= holders_merged(&holder[1]);
	for (size_t i = 0; i < HOLDER_PAGES; i += 3)
		holder_write(&holder[i % 2], i, key + (i + 1) % CONTENTS);
	holder_fork(&holder[0], &holder[2]);
	ok &= holders_intact(holder, 3);
	for (int i = 0; i < 3; i++)
		ok &= holds_late(holders_merged, &holder[i], SECONDS);
	ok &= holders_intact(holder, 3);
	/* Who was forked stays, and what it has written to merges, too */
	holder_end(&holder[0]);
	for (size_t i = 0; i < HOLDER_PAGES; i += 2)
		holder_write(&holder[1], i, key + (i + 2) % CONTENTS);
	for (int i = 1; i < 3; i++)
		ok &= holds_late(holders_merged, &holder[i], SECONDS);
	ok &= holders_intact(holder + 1, 2);
	ksft_test_result(ok, "forks keep what is merged, and theirs is merged\n");
	holder_end(&holder[1]);
	holder_end(&holder[2]);
}

static void moved(void)
{
	static const struct {
		enum op op;
		const char *name;
	} ways[] = {
		{ OP_DROP, "MADV_DONTNEED" }, { OP_REMAP, "munmap" }, { OP_MOVE, "mremap" },
	};
	struct target target[TARGETS];
	bool ok;

	begin();
	start_targets(target);
	ok = targets_merge(target);
	for (size_t way = 0; way < ARRAY_SIZE(ways); way++) {
		for (int n = 0; n < 6; n++) {
			int i = rnd_below(TARGETS);

			ok &= target_do(&target[i], ways[way].op, 1 + rnd_below(PAGES));
			ok &= target_do(&target[i], OP_INTACT, 0);
			usleep(rnd_below(500000));
		}
		ok &= targets_merge(target);
		ksft_test_result(ok, "it is merged after %s\n", ways[way].name);
	}
	end_targets(target);
}

/* Settings */

static void stopped(void)
{
	struct target target[TARGETS], late;
	bool ok;

	begin();
	start_targets(target);
	ok = targets_merge(target);
	ksm_set("run", 0);
	late = equal_target();
	ksm_standing();
	sleep(3);
	ksft_test_result(ok && !target_merged(&late) && all_merged(target),
			 "run=0: nothing is merged any more, what is stays\n");
	ksm_set("run", 2);
	ok = ksm_all_zero() && is_unmerged(&target[0]) && all_intact(target);
	ksft_test_result(ok, "run=2: all pages are given back\n");
	ksm_start();
	ksft_test_result(targets_merge(target) && merges(&late), "run=1: they are merged again\n");
	target_end(&late);
	end_targets(target);
}

static bool nearly_merged(void *arg)
{
	struct target *target = arg;
	size_t merged = 0;

	for (int i = 0; i < TARGETS; i++)
		merged += target_merged(&target[i]);
	/* What is left of a content when all copies are full has no partner */
	return merged >= TARGETS * PAGES - CONTENTS;
}

static void limited(void)
{
	struct target target[TARGETS];
	bool ok;

	begin();
	start_targets(target);
	ok = targets_merge(target);
	ok &= ksm_try("max_page_sharing", "8") == -EBUSY &&
	      ksm_try("merge_across_nodes", "0") == -EBUSY;
	ksm_set("run", 2);
	ksm_set("max_page_sharing", 8);
	ksm_set("merge_across_nodes", 0);
	ksm_start();
	ok &= holds_late(nearly_merged, target, SECONDS) && all_intact(target);
	ksft_print_msg("%ld chains of %ld pages\n", ksm_get("stable_node_chains"),
		       ksm_get("stable_node_dups"));
	ok &= ksm_get("pages_shared") >= TARGETS * PAGES / 8 - CONTENTS &&
	      ksm_get("stable_node_chains") == CONTENTS;
	ksm_set("run", 2);
	ksm_set("max_page_sharing", 256);
	ksm_set("merge_across_nodes", 1);
	ksm_start();
	ok &= targets_merge(target) && comes_to("pages_shared", CONTENTS);
	ksft_test_result(ok, "max_page_sharing and merge_across_nodes hold\n");
	end_targets(target);
}

static void threads(void)
{
	struct target target[TARGETS];

	begin();
	ksm_set("scan_threads", 2);
	start_targets(target);
	ksft_test_result(targets_merge(target) && comes_to("pages_shared", CONTENTS) &&
			 comes_to("pages_sharing", TARGETS * PAGES - CONTENTS),
			 "two threads merge the same\n");
	for (int n = 0; n < 60; n++) {
		int i = rnd_below(TARGETS);
		size_t pages = rnd_below(PAGES);

		ksm_set("scan_threads", 1 + rnd_below(2));
		target_do(&target[i], OP_WRITE, pages);
		usleep(rnd_below(50000));
		target_do(&target[i], OP_WRITE, pages);
	}
	ksft_test_result(targets_merge(target), "they come and go meanwhile\n");
	ksm_set("scan_threads", 1);
	end_targets(target);
}

/* Rules and requests */

static void ruled(void)
{
	struct target target, other;
	struct rksm_stat_record stat;
	bool ok;

	begin();
	target = equal_target();
	other = equal_target();
	ok = merges(&target) && merges(&other);
	ok &= !rule_set(target.pidfd, NULL, RKSM_RULE_NEVER);
	ok &= holds_late(is_unmerged, &target, SECONDS);
	sleep(3);
	ok &= is_unmerged(&target) && is_merged(&other) && device_stat(target.child.pid, &stat) &&
	      stat.flags == RKSM_STAT_EXCLUDED;
	ksft_test_result(ok && target_do(&target, OP_INTACT, 0),
			 "never: its pages are given back, and not merged\n");
	ok = !rule_remove(target.pidfd, NULL) && merges(&target) && is_merged(&other);
	ksft_test_result(ok, "without the rule it is merged again\n");
	target_end(&target);
	target_end(&other);
}

static void requested(void)
{
	struct target target, other;
	struct rksm_merge merge = { ALL_MEMORY };
	struct rksm_unmerge unmerge = { ALL_MEMORY };
	struct rksm_why why;
	bool ok;

	begin();
	ksm_set("run", 0);
	target = equal_target();
	other = equal_target();
	merge.pidfd = target.pidfd;
	unmerge.pidfd = target.pidfd;
	ok = !device_merge(&merge) && merge.merged == PAGES && is_merged(&target) &&
	     is_unmerged(&other);
	ok &= !device_why(target.pidfd, &why) && why.merged == PAGES * PAGE && !why.unique;
	ok &= !device_unmerge(&unmerge) && unmerge.pages == PAGES && is_unmerged(&target);
	ksft_test_result(ok && target_do(&target, OP_INTACT, 0), "merge and unmerge with run=0\n");
	ksm_start();
	/* While the scanner is at it */
	ok = true;
	for (int n = 0; n < 30; n++) {
		struct target *one = rnd_below(2) ? &target : &other;

		if (rnd_below(2)) {
			merge = (struct rksm_merge){ .pidfd = one->pidfd, ALL_MEMORY };
			ok &= !device_merge(&merge) && is_merged(one);
		} else {
			unmerge = (struct rksm_unmerge){ .pidfd = one->pidfd, ALL_MEMORY };
			ok &= !device_unmerge(&unmerge);
		}
		ok &= !device_why(one->pidfd, &why) && why.merged + why.unique + why.changing +
		      why.fresh + why.pinned == PAGES * PAGE;
		usleep(rnd_below(300000));
	}
	ksft_test_result(ok && merges(&target) && merges(&other),
			 "merge, unmerge and why beside the scanner\n");
	target_end(&target);
	target_end(&other);
}

/* Switching */

static void switched(void)
{
	struct target target[TARGETS];
	unsigned int changes = 0;
	bool ok = true;

	begin();
	start_targets(target);
	for (int n = 0; n < SWITCHES; n++) {
		int i = rnd_below(TARGETS);
		size_t pages = 1 + rnd_below(PAGES);

		switch (rnd_below(8)) {
		case 0:
			target_end(&target[i]);
			target[i] = equal_target();
			break;
		case 1:
			target_do(&target[i], OP_WRITE, pages);
			usleep(rnd_below(100000));
			target_do(&target[i], OP_WRITE, pages);
			break;
		case 2:
			target_do(&target[i], rnd_below(2) ? OP_REMAP : OP_DROP, pages);
			break;
		case 3:
			ksm_set("pages_to_scan", 1 + rnd_below(3000));
			ksm_set("sleep_millisecs", rnd_below(30));
			break;
		case 4:
			ksm_set("scan_threads", 1 + rnd_below(2));
			break;
		case 5:
			ksm_set("run", rnd_below(10) ? 0 : 2);
			break;
		default:
			ok &= target_do(&target[i], OP_INTACT, 0);
		}
		if (rnd_below(2)) {
			ok &= !ksm_try("governor", rnd_below(2) ? "auto" : "knobs");
			changes++;
		}
		/* Some last for a sweep, or a full scan; most do not */
		usleep(rnd_below(rnd_below(8) ? 10000 : 600000));
		ksm_set("run", 1);
	}
	ksft_print_msg("written %u times\n", changes);
	ksft_test_result(ok && all_intact(target), "contents are as written, whoever governs\n");
	ksm_set("scan_threads", 1);
	ok = !ksm_try("governor", "auto") && targets_merge(target);
	ksft_test_result(ok && comes_to("pages_sharing", TARGETS * PAGES - CONTENTS),
			 "in the end auto merges all\n");
	ksm_set("run", 2);
	ksm_set("pages_to_scan", 2000);
	ksm_set("sleep_millisecs", 0);
	ok = !ksm_try("governor", "knobs") && is_unmerged(&target[0]);
	ksm_start();
	ksft_test_result(ok && ksm_until_true(all_merged, target, 100) && all_intact(target),
			 "and so does knobs\n");
	end_targets(target);
}

int main(int argc, char **argv)
{
	target_main(argc, argv);
	test_init(argc, argv);
	if (!module_path)
		ksft_exit_skip("no module named\n");
	test_plan(24);
	if (!module_in("check=1"))
		die("insmod");
	equal();
	zeroes();
	huge();
	exits();
	forks();
	moved();
	stopped();
	limited();
	threads();
	ruled();
	requested();
	switched();
	ksm_reset();
	device_close();
	ksft_test_result(ksm_all_zero() && module_out() && slabs_empty(), "nothing stays\n");
	test_exit();
}
