// SPDX-License-Identifier: GPL-2.0-only
/*
 * The nine ksm:* trace events fire, and say as much as happened.
 *
 * runs: cloud-amd64 builtin
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "util.h"

#define TRACING "/sys/kernel/tracing/"
#define COPIES	40
#define ZEROES	4	/* of the copies; what ksm_merge_one_page is about */

static int short_lived(void *arg)
{
	char *area = map_pages(COPIES);

	(void)arg;
	for (size_t i = 0; i < COPIES; i++)
		fill_page(area + i * PAGE, i >= ZEROES);
	mergeable(area, COPIES);
	child_step();
	return KSFT_PASS;
}

static const char *const events[] = {
	"ksm_start_scan", "ksm_stop_scan", "ksm_enter", "ksm_exit", "ksm_merge_one_page",
	"ksm_merge_with_ksm_page", "ksm_remove_ksm_page", "ksm_remove_rmap_item", "ksm_advisor",
};
static long count[ARRAY_SIZE(events)];
static long merged;	/* merges without an error */

static void read_trace(void)
{
	FILE *f = fopen(TRACING "trace", "re");
	char line[512];

	if (!f)
		die("no " TRACING "trace");
	while (fgets(line, sizeof(line), f)) {
		for (size_t e = 0; e < ARRAY_SIZE(events); e++) {
			char name[40], *at;

			snprintf(name, sizeof(name), " %s: ", events[e]);
			at = strstr(line, name);
			if (!at)
				continue;
			count[e]++;
			if (!strncmp(events[e], "ksm_merge", 9)) {
				at = strstr(at, "error ");
				merged += at && !strtol(at + 6, NULL, 10);
			}
		}
	}
	fclose(f);
}

int main(int argc, char **argv)
{
	struct child child[2];
	long sharing;
	bool ok = true;

	test_init(argc, argv);
	if (access(TRACING "events/ksm/enable", W_OK))
		ksft_exit_skip("no tracefs at " TRACING " or no ksm events\n");
	test_plan(ARRAY_SIZE(events) + 2);
	ksm_reset();
	ksm_set("use_zero_pages", 1);
	if (ksm_try("advisor_mode", "scan-time"))
		die("no advisor");
	ok &= write_file(TRACING "trace", "") && write_file(TRACING "buffer_size_kb", "8192") &&
	      write_file(TRACING "events/ksm/enable", "1") &&
	      write_file(TRACING "tracing_on", "1");
	if (!ok)
		die("cannot set up tracing");

	for (int c = 0; c < 2; c++) {
		child[c] = child_start(short_lived, NULL);
		child_wait_step(&child[c]);
	}
	ksm_start();
	ok = ksm_until("ksm_zero_pages", 2 * ZEROES, 40) &&
	     ksm_until("pages_sharing", 2 * (COPIES - ZEROES) - 1, 40);
	sharing = ksm_get("pages_sharing");
	ksm_scans(2);
	/* While the scanner stops: it then finds pages that vanished with all their mappings */
	ksm_set("run", 0);
	for (int c = 0; c < 2; c++)
		child_end(&child[c]);
	ksm_start();
	ok &= ksm_until("pages_shared", 0, 40);
	ksm_set("run", 2);
	write_file(TRACING "events/ksm/enable", "0");
	read_trace();

	ksft_test_result(ok, "there was something to trace\n");
	for (size_t e = 0; e < ARRAY_SIZE(events); e++) {
		long least = 1;

		if (!strcmp(events[e], "ksm_enter") || !strcmp(events[e], "ksm_exit"))
			least = 2;
		ksft_test_result(count[e] >= least, "%s fired %ld times\n", events[e], count[e]);
	}
	/* One for each mapping that was changed; the page that becomes the KSM page may count */
	sharing += 2 * ZEROES;
	ksft_test_result(merged == sharing || merged == sharing + 1,
			 "%ld merges traced for %ld merged pages\n", merged, sharing);
	test_exit();
}
