// SPDX-License-Identifier: GPL-2.0-only
/*
 * Exit latency: from kill -9 to the memory being free, for a process with merged pages and
 * candidates while the scanner works on it, the built-in KSM and rksm in turns. Loads the
 * module itself.
 *
 * guest: --no-module
 * runs: cloud-amd64
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "util.h"

#define PAGES	4096	/* half of them merged, half unique */
#define SLACK	512	/* pages by which the kernel's counter may be off */
#define TURNS	4
#define KILLS	6	/* in a turn */
#define ALL	(TURNS * KILLS)

static double milliseconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static int victim(void *arg)
{
	char *area = map_pages(PAGES);
	uint64_t key = unique_key();

	(void)arg;
	for (size_t i = 0; i < PAGES; i++)
		fill_page(area + i * PAGE, i % 2 ? 1 + i % 64 : key + i);
	mergeable(area, PAGES);
	child_step();
	return pause();
}

static bool memory_is_back(long before)
{
	return vmstat("nr_anon_pages") <= before + SLACK;
}

/* Milliseconds until the memory was free, negative where it never was */
static double one_kill(double *reaped)
{
	long before = vmstat("nr_anon_pages");
	struct child child = child_start(victim, NULL);
	double start;

	if (!child_wait_step(&child))
		die("the victim is gone");
	/* In the middle of a full scan, wherever that is */
	if (!ksm_until("pages_unshared", PAGES / 2, 20))
		die("the victim's pages are not what they should be");
	usleep(rnd_below(20000));
	start = milliseconds();
	child_kill(&child);
	*reaped = milliseconds() - start;
	while (!memory_is_back(before))
		if (milliseconds() - start > 60000)
			return -1;
	return milliseconds() - start;
}

static int ascending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

/*
 * Whether all of it happened. How long it took is a figure, and nothing that a slow host could
 * fail.
 */
static bool report(const char *who, const char *what, double *ms)
{
	qsort(ms, ALL, sizeof(*ms), ascending);
	printf("#| kill -9 to %s, %s: quarter %.2f ms, median %.2f, %.2f to %.2f (%d kills)\n",
	       what, who, ms[ALL / 4], ms[ALL / 2], ms[0], ms[ALL - 1], ALL);
	return ms[0] >= 0;
}

int main(int argc, char **argv)
{
	static double reaped[2][ALL], freed[2][ALL];
	static const char *const who[2] = { "built-in", "rksm" };

	test_init(argc, argv);
	if (!module_path) {
		monitor_verdict();
		ksft_exit_skip("no module named\n");
	}
	test_plan(2);
	if (module_loaded() && (ksm_try("run", "2") || module_remove()))
		die("rksm does not go");
	for (int turn = 0; turn < TURNS; turn++) {
		for (int rksm = 0; rksm < 2; rksm++) {
			int err = rksm ? module_insert("") : 0;

			if (err)
				die("insmod: %s", strerror(-err));
			ksm_reset();
			ksm_set("pages_to_scan", 500);
			/* Something to scan always, as no scan is counted otherwise */
			mergeable(map_pages(1), 1);
			ksm_start();
			for (int n = 0; n < KILLS; n++)
				freed[rksm][turn * KILLS + n] =
					one_kill(&reaped[rksm][turn * KILLS + n]);
			ksm_set("run", 2);
			if (rksm && module_remove())
				die("rksm does not go");
		}
	}
	for (int rksm = 0; rksm < 2; rksm++)
		report(who[rksm], "reaped", reaped[rksm]);
	for (int rksm = 0; rksm < 2; rksm++)
		ksft_test_result(report(who[rksm], "memory free", freed[rksm]),
				 "%s: the memory of each came free\n", who[rksm]);
	test_exit();
}
