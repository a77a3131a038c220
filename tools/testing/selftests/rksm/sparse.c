// SPDX-License-Identifier: GPL-2.0-only
/*
 * Address space without memory: processes with huge mergeable vmas that have a page here and
 * there, or none. Scanning them costs what there is, not what there could be, and an unmerge
 * can be interrupted.
 *
 * runs: cloud-amd64
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "util.h"

#define PROCESSES	40
#define SPAN		((size_t)100 << 40)
#define WINDOWS		10
#define MSECS		500	/* of each */
#define PAUSE		20	/* ms between two batches of 100 pages */
#define BATCHES		4	/* that a full scan takes at least: each process is a part of one */
#define WRITES		9
#define PROMPT		100	/* ms in which a write to run has ended */

static double milliseconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static int ascending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

/* CPU time of rksmd and its helpers, or of ksmd, in ns */
static uint64_t scanner_time(void)
{
	DIR *proc = opendir("/proc");
	struct dirent *entry;
	uint64_t total = 0;

	while (proc && (entry = readdir(proc))) {
		char path[300], text[128];

		snprintf(path, sizeof(path), "/proc/%s/comm", entry->d_name);
		if (read_file(path, text, sizeof(text)) <= 0 ||
		    (strncmp(text, "rksmd", 5) && strcmp(text, "ksmd\n")))
			continue;
		snprintf(path, sizeof(path), "/proc/%s/schedstat", entry->d_name);
		if (read_file(path, text, sizeof(text)) <= 0)
			die("no %s", path);
		total += strtoull(text, NULL, 10);
	}
	if (proc)
		closedir(proc);
	return total;
}

static int sparse(void *arg)
{
	bool empty = arg;
	char *area = mmap(NULL, SPAN, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (area == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	/* Without its first page it would not be looked at. One page is enough. */
	if (madvise(area, SPAN, MADV_NOHUGEPAGE))
		die("madvise: %s", strerror(errno));
	area[0] = 1;
	if (empty)
		madvise(area, PAGE, MADV_DONTNEED);
	mergeable(area, SPAN / PAGE);
	child_step();
	return KSFT_PASS;
}

static void start_all(struct child *child, bool empty)
{
	ksm_reset();
	ksm_set("pages_to_scan", 100);
	ksm_set("sleep_millisecs", PAUSE);
	for (int c = 0; c < PROCESSES; c++) {
		child[c] = child_start(sparse, (void *)(uintptr_t)empty);
		if (!child_wait_step(&child[c]))
			die("a process is gone");
	}
}

/*
 * What bounds the CPU time is that processes without pages are paid out of pages_to_scan. The CPU
 * time itself is a figure, as a guest on a busy host takes longer: the least of several windows.
 */
static void scanned(bool empty)
{
	static struct child child[PROCESSES];
	double least = 100, begun;
	long scans;

	start_all(child, empty);
	ksm_start();
	ksm_scans(2);
	scans = ksm_get("full_scans");
	begun = milliseconds();
	for (int n = 0; n < WINDOWS; n++) {
		uint64_t before = scanner_time();
		double start = milliseconds(), percent;

		usleep(MSECS * 1000);
		percent = (scanner_time() - before) / 1e4 / (milliseconds() - start);
		least = percent < least ? percent : least;
	}
	scans = ksm_get("full_scans") - scans;
	ksft_print_msg("%ld full scans, at least %.1f %% of a CPU\n", scans, least);
	ksft_test_result(scans > 0 && scans * BATCHES * PAUSE <= milliseconds() - begun + PAUSE,
			 "%d processes of 100 TiB with %s take %d batches of a full scan\n",
			 PROCESSES, empty ? "nothing" : "a page", BATCHES);
	ksm_set("run", 0);
	for (int c = 0; c < PROCESSES; c++)
		child_kill(&child[c]);
}

/* How long a write to run takes, in ms: the median */
static double write_takes(const char *value)
{
	double took[WRITES];

	for (int n = 0; n < WRITES; n++) {
		double start;

		ksm_try("run", "1");
		usleep(30000 + rnd_below(20000));
		start = milliseconds();
		ksm_try("run", value);
		took[n] = milliseconds() - start;
	}
	qsort(took, WRITES, sizeof(took[0]), ascending);
	return took[WRITES / 2];
}

static void interrupted(int sig)
{
	(void)sig;
}

/* The scanner lets others in at once, and a signal ends an unmerge also where nothing is mapped */
static void written(void)
{
	static struct child child[PROCESSES];
	struct sigaction action = { .sa_handler = interrupted };
	struct itimerval timer = { { 0, 10000 }, { 0, 10000 } }, off = { 0 };
	double took;

	start_all(child, true);
	took = write_takes("0");
	ksft_test_result(took < PROMPT, "run=0 takes %.2f ms\n", took);
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &timer, NULL);
	took = write_takes("2");
	setitimer(ITIMER_REAL, &off, NULL);
	ksft_test_result(took < PROMPT, "run=2 ends %.2f ms after a signal, or without it\n", took);
	for (int c = 0; c < PROCESSES; c++)
		child_kill(&child[c]);
}

int main(int argc, char **argv)
{
	test_init(argc, argv);
	test_plan(4);
	scanned(false);
	scanned(true);
	written();
	test_exit();
}
