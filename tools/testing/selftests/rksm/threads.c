// SPDX-License-Identifier: GPL-2.0-only
/*
 * scan_threads: what the file takes, that there are so many threads, that they merge what
 * one merges and count each page once, and that their number can change at any time.
 *
 * runs: cloud-amd64 sanitizer
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

#define PAGES		8192
#define CONTENTS	1024
#define CHANGES		200
#define TRACING		"/sys/kernel/tracing/"

static char *area;

static unsigned int threads_there(void)
{
	DIR *proc = opendir("/proc");
	struct dirent *entry;
	unsigned int n = 0;

	if (!proc)
		die("/proc: %s", strerror(errno));
	while ((entry = readdir(proc))) {
		char path[300], comm[32] = "";

		snprintf(path, sizeof(path), "/proc/%s/comm", entry->d_name);
		if (read_file(path, comm, sizeof(comm)) > 0 && !strncmp(comm, "rksmd", 5))
			n++;
	}
	closedir(proc);
	return n;
}

static void fill(void)
{
	for (size_t i = 0; i < PAGES; i++)
		fill_page(area + i * PAGE, i % 2 ? 1 + i % CONTENTS : 1000000 + i);
}

static bool intact(void)
{
	for (size_t i = 0; i < PAGES; i++)
		if (!page_holds(area + i * PAGE, i % 2 ? 1 + i % CONTENTS : 1000000 + i))
			return false;
	return true;
}

/* Has the scanner, which sleeps, scan the memory once, and waits until it sleeps again */
static long scan_once(void)
{
	static long msecs = 3600000;
	long before = ksm_get("full_scans");

	/* A new value that comes before the sleep has begun ends none */
	do {
		ksm_set("sleep_millisecs", ++msecs);
		sleep(1);
	} while (ksm_get("full_scans") == before);
	return ksm_standing();
}

/* How many pages one full scan counts, which is one batch here */
static long scan_count(void)
{
	long scans, scanned;

	ksm_set("run", 0);
	ksm_set("pages_to_scan", 1 << 30);
	ksm_set("run", 1);
	scanned = scan_once();
	scans = ksm_get("full_scans");
	scanned = scan_once() - scanned;
	return scanned / (ksm_get("full_scans") - scans);
}

static void merges_with(unsigned int threads)
{
	bool merged;
	long counted;

	ksm_reset();
	ksm_set("smart_scan", 0);
	ksm_set("scan_threads", threads);
	fill();
	ksm_start();
	merged = ksm_until("pages_sharing", PAGES / 2 - CONTENTS / 2, 20);
	ksft_test_result(merged && ksm_get("pages_shared") == CONTENTS / 2,
			 "%u threads: every copy is merged, and nothing else\n", threads);
	merged = ksm_until("pages_unshared", PAGES / 2, 20);
	ksft_test_result(merged && ksm_get("pages_volatile") == 0,
			 "%u threads: every page without a twin is a candidate\n", threads);
	counted = scan_count();
	if (counted != PAGES)
		ksft_print_msg("%ld pages counted for %d\n", counted, PAGES);
	ksft_test_result(counted == PAGES, "%u threads: each page is counted once a full scan\n",
			 threads);
	ksft_test_result(threads_there() == threads, "%u threads are there\n", threads);
	ksft_test_result(intact(), "%u threads: contents as written\n", threads);
}

/*
 * The share of the CPU that the advisor takes the scanner to have had in each full scan, at most.
 * The CPU time of threads that have ended must not be missing, or it wraps around.
 */
static unsigned long most_cpu_percent(void)
{
	static const char mark[] = "cpu percent ";
	static char text[1 << 16];
	unsigned long most = 0;
	ssize_t len = read_file(TRACING "trace", text, sizeof(text));

	for (char *at = text; len > 0 && (at = strstr(at, mark)); at++) {
		unsigned long percent = strtoul(at + strlen(mark), NULL, 10);

		most = percent > most ? percent : most;
	}
	return most;
}

static void advised(long cpus)
{
	unsigned long most;

	if (!write_file(TRACING "events/ksm/ksm_advisor/enable", "1")) {
		ksft_test_result_skip("the advisor counts threads that have ended: no tracing\n");
		return;
	}
	ksm_reset();
	ksm_set("scan_threads", cpus);
	ksm_start();
	ksm_scans(20);
	if (ksm_try("advisor_mode", "scan-time"))
		die("advisor_mode: %s", strerror(errno));
	/* The first counts what was before the advisor. */
	ksm_scans(2);
	write_file(TRACING "trace", "");
	ksm_set("scan_threads", 1);
	ksm_scans(3);
	most = most_cpu_percent();
	write_file(TRACING "events/ksm/ksm_advisor/enable", "0");
	ksft_print_msg("at most %lu %% of a CPU\n", most);
	/* The advisor counts whole seconds of a full scan: two may count as one. */
	ksft_test_result(most > 0 && most <= 200UL * cpus,
			 "the advisor counts threads that have ended\n");
	ksm_try("advisor_mode", "none");
}

int main(int argc, char **argv)
{
	static const char *const bad[] = { "0", "-1", "x", "4294967296", "1 1" };
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	char text[32];
	bool ok = true;

	test_init(argc, argv);
	if (!module_loaded())
		ksft_exit_skip("the built-in KSM has no scan_threads\n");
	test_plan(4 + 5 * 2);
	area = map_pages(PAGES);
	fill();
	mergeable(area, PAGES);

	ksm_reset();
	ksm_set("scan_threads", 1);
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
		ok &= ksm_try("scan_threads", bad[i]) == -EINVAL;
	snprintf(text, sizeof(text), "%ld", cpus + 1);
	ok &= ksm_try("scan_threads", text) == -EINVAL && ksm_get("scan_threads") == 1;
	ksft_test_result(ok, "less than one thread, or more than CPUs, are EINVAL\n");

	merges_with(1);
	merges_with(cpus);

	/* While they scan, and somebody writes */
	ksm_reset();
	ksm_start();
	for (unsigned int i = 0; i < CHANGES; i++) {
		size_t page = rnd_below(PAGES);

		ksm_set("scan_threads", 1 + rnd_below(cpus));
		fill_page(area + page * PAGE, 5);
		usleep(rnd_below(5000));
		fill_page(area + page * PAGE, page % 2 ? 1 + page % CONTENTS : 1000000 + page);
	}
	ksft_test_result(intact(), "contents as written while the threads came and went\n");
	ksm_set("scan_threads", 1);
	ksm_scans(2);
	ksft_test_result(threads_there() == 1, "the others are gone when one is enough\n");
	advised(cpus);
	ksm_set("run", 2);
	test_exit();
}
