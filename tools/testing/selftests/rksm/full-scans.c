// SPDX-License-Identifier: GPL-2.0-only
/*
 * Full scans with governor=auto: all memory is looked at in one, also what was no growth, and they
 * are short while memory is.
 *
 * guest: --no-module
 * runs: none
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "device.h"

#define PAGES		256
#define SECONDS		300	/* no memory waits a quarter of it for its next look */
#define SETTLED		15	/* a process is young for less */
#define UNSEEN		32	/* so few pages are no growth */

static bool is_at(void *pressure)
{
	return ksm_get("memory_pressure") == *(long *)pressure;
}

/* Takes memory until less than a tenth is available */
static int hog(void *arg)
{
	long total = 0, available = 0;

	(void)arg;
	device_close();
	for (;;) {
		char text[256];

		if (read_file("/proc/meminfo", text, sizeof(text)) < 0 ||
		    sscanf(text, "MemTotal: %ld kB MemFree: %*d kB MemAvailable: %ld kB", &total,
			   &available) != 2)
			die("meminfo");
		if (available < total / 10)
			break;
		memset(map_pages(1024), 1, 1024 * PAGE);
	}
	child_step();
	return KSFT_PASS;
}

static bool scanned_till(void *scans)
{
	return ksm_get("full_scans") >= *(long *)scans;
}

static bool full_scans_pass(int n)
{
	long scans = ksm_get("full_scans") + n;

	return holds_late(scanned_till, &scans, n * SECONDS);
}

static void meaning(void)
{
	long pressure = 1;
	struct rksm_stat_record stat;
	struct target target;
	struct child child;
	bool ok;

	ksm_reset();
	if (ksm_try("governor", "auto"))
		die("there is no governor");
	ksm_start();
	target = target_start(PAGES, PAGES, unique_key(), OPT_MADVISE);
	ok = full_scans_pass(1);
	ksft_test_result(ok, "full scans are counted\n");
	sleep(SETTLED);
	/* Pauses are short while memory is, and so are full scans */
	child = child_start(hog, NULL);
	child_wait_step(&child);
	ok = holds_late(is_at, &pressure, SECONDS);
	target_do(&target, OP_TOUCH, UNSEEN);
	/* One may be under way */
	ok &= full_scans_pass(2);
	stat = target_stat(&target);
	ksft_print_msg("%lu pages known, %llu looked at once\n", known_pages(&stat), stat.fresh);
	ok &= known_pages(&stat) == PAGES + UNSEEN;
	ok &= full_scans_pass(1);
	stat = target_stat(&target);
	ok &= known_pages(&stat) == PAGES + UNSEEN && stat.unique == PAGES + UNSEEN;
	ksft_test_result(ok, "in a full scan all memory is looked at, also what nobody told of\n");
	child_end(&child);
	pressure = 0;
	ksft_test_result(holds_late(is_at, &pressure, SECONDS),
			 "memory is short, and then it is not\n");
	target_end(&target);
}

int main(int argc, char **argv)
{
	target_main(argc, argv);
	test_init(argc, argv);
	if (!module_path)
		ksft_exit_skip("no module named\n");
	test_plan(4);
	if (!module_in(""))
		die("insmod");
	meaning();
	ksm_reset();
	device_close();
	ksft_test_result(ksm_all_zero() && module_out(), "nothing stays\n");
	test_exit();
}
