// SPDX-License-Identifier: GPL-2.0-only
/*
 * The scan-time advisor: it, and nobody else, sets pages_to_scan, up when full scans take
 * too long, and never above its limit. What it chooses follows from the scan time and the
 * CPU use that its trace event tells by the rule of Documentation/admin-guide/mm/ksm.rst,
 * worked out here again.
 *
 * runs: cloud-amd64 builtin
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "util.h"

#define TRACING "/sys/kernel/tracing/"
#define PAGES	4096
#define LOW	40
#define HIGH	3000
#define MAX_CPU	60
#define MIN_CPU	10	/* per cent; the kernel's own */
#define NEW_WEIGHT 30	/* per cent; of the newest scan time in the average */

static bool rises(void *arg)
{
	return ksm_get("pages_to_scan") > *(long *)arg;
}

static uint64_t least(uint64_t value, uint64_t floor)
{
	return value > floor ? value : floor;
}

static uint64_t most(uint64_t value, uint64_t ceiling)
{
	return value < ceiling ? value : ceiling;
}

/* The events since the advisor was switched on with LOW, all with one target */
static bool follows_the_rule(uint64_t target)
{
	uint64_t pages = LOW, change = 0, last_time = 0;
	FILE *f = fopen(TRACING "trace", "re");
	char line[512];
	int events = 0;

	if (!f)
		die("no " TRACING "trace");
	while (fgets(line, sizeof(line), f)) {
		uint64_t time, chosen, cpu, factor, cost, expected;
		char *at = strstr(line, "ksm_advisor: ");

		if (!at)
			continue;
		if (sscanf(at, "ksm_advisor: ksm scan time %" SCNu64 " pages_to_scan %" SCNu64
			   " cpu percent %" SCNu64, &time, &chosen, &cpu) != 3)
			die("not understood: %s", at);
		factor = least(target * 100 / time, 1);
		if (!last_time)
			last_time = time;
		change = ((100 - NEW_WEIGHT) * change +
			  NEW_WEIGHT * least(time * 100 / last_time, 1)) / 100;
		expected = pages * 100 / factor * change / 100;
		cost = least(pages / cpu, 1);
		expected = most(expected, cost * MAX_CPU);
		expected = least(expected, cost * MIN_CPU);
		expected = most(expected, HIGH);
		if (chosen != expected) {
			ksft_print_msg("scan %d: %" PRIu64 ", not %" PRIu64 ": %s", events, chosen,
				       expected, at);
			fclose(f);
			return false;
		}
		pages = chosen;
		last_time = time;
		events++;
	}
	fclose(f);
	ksft_print_msg("%d decisions, the last for %" PRIu64 " pages\n", events, pages);
	return events > 0;
}

static void trace_from_here(void)
{
	if (!write_file(TRACING "trace", "") ||
	    !write_file(TRACING "events/ksm/ksm_advisor/enable", "1") ||
	    !write_file(TRACING "tracing_on", "1"))
		die("cannot trace ksm_advisor");
}

static void switch_on(long target)
{
	ksm_set("run", 0);
	if (ksm_try("advisor_mode", "none") || ksm_try("advisor_mode", "scan-time"))
		die("no advisor");
	ksm_set("advisor_target_scan_time", target);
	trace_from_here();
	ksm_start();
}

int main(int argc, char **argv)
{
	char *area;
	long before;
	bool limited = true;

	test_init(argc, argv);
	if (access(TRACING "events/ksm/ksm_advisor/enable", W_OK))
		ksft_exit_skip("no tracefs at " TRACING " or no ksm events\n");
	test_plan(9);
	ksm_reset();
	area = map_pages(PAGES);
	for (size_t i = 0; i < PAGES; i++)
		fill_page(area + i * PAGE, unique_key());
	mergeable(area, PAGES);

	ksm_set("advisor_min_pages_to_scan", LOW);
	ksm_set("advisor_max_pages_to_scan", HIGH);
	ksm_set("advisor_max_cpu", MAX_CPU);
	ksft_test_result(!ksm_try("advisor_mode", "scan-time") && ksm_get("pages_to_scan") == LOW,
			 "scan-time starts at its lower limit\n");
	ksft_test_result(ksm_try_long("pages_to_scan", 1234) == -EINVAL,
			 "pages_to_scan is the advisor's\n");

	switch_on(3);
	ksm_scans(6);
	ksm_set("run", 0);
	ksft_test_result(follows_the_rule(3), "what it chooses follows its rule\n");

	/* Sleeping, a full scan takes several times the second that it may */
	ksm_set("sleep_millisecs", 50);
	switch_on(1);
	before = LOW;
	ksft_test_result(ksm_until_true(rises, &before, 4),
			 "pages_to_scan goes up when scans take too long\n");
	ksm_scans(2);
	ksm_set("run", 0);
	ksft_test_result(follows_the_rule(1), "what it chooses then follows its rule\n");
	ksm_set("sleep_millisecs", 0);

	ksm_set("advisor_max_pages_to_scan", LOW / 2);
	ksm_start();
	ksm_scans(1);
	for (int n = 0; n < 3; n++) {
		ksm_scans(1);
		limited &= ksm_get("pages_to_scan") <= LOW / 2;
	}
	ksft_test_result(limited, "it stays below its upper limit\n");

	ksft_test_result(ksm_try_long("advisor_target_scan_time", 0) == -EINVAL &&
			 ksm_get("advisor_target_scan_time") == 1,
			 "a target of 0 is refused\n");
	ksft_test_result(!ksm_try("advisor_mode", "none") && ksm_get("pages_to_scan") == 100,
			 "without an advisor pages_to_scan is the default again\n");
	ksft_test_result(!ksm_try_long("pages_to_scan", 1234) &&
			 ksm_get("pages_to_scan") == 1234, "pages_to_scan is the user's again\n");
	write_file(TRACING "events/ksm/ksm_advisor/enable", "0");
	test_exit();
}
