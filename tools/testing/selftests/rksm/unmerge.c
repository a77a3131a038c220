// SPDX-License-Identifier: GPL-2.0-only
/*
 * Every way back: MADV_UNMERGEABLE of a part, prctl, and run=2, also when a signal stops
 * it half-way, or somebody who waits for it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "util.h"

#define PAGES	256
#define MANY	8192
#define TRIES	20
#define ENOUGH	3

static volatile sig_atomic_t alarms;

static void on_alarm(int sig)
{
	(void)sig;
	alarms++;
}

static bool intact(const char *area, size_t n, uint64_t contents)
{
	for (size_t i = 0; i < n; i++)
		if (!page_holds(area + i * PAGE, 1 + i % contents))
			return false;
	return true;
}

static char *filled(size_t n, uint64_t contents)
{
	char *area = map_pages(n);

	for (size_t i = 0; i < n; i++)
		fill_page(area + i * PAGE, 1 + i % contents);
	return area;
}

static void with_madvise(void)
{
	char *area = filled(PAGES, 4);

	mergeable(area, PAGES);
	ksm_start();
	if (!ksm_until("pages_sharing", PAGES - 4, 12))
		ksft_print_msg("it was not merged\n");
	ksm_set("run", 0);
	if (madvise(area + PAGES / 4 * PAGE, PAGES / 2 * PAGE, MADV_UNMERGEABLE))
		die("MADV_UNMERGEABLE: %s", strerror(errno));
	ksft_test_result(!ksm_mappings(getpid(), area + PAGES / 4 * PAGE, PAGES / 2) &&
			 ksm_mappings(getpid(), area, PAGES) == PAGES / 2,
			 "MADV_UNMERGEABLE unmerges its range and no more\n");
	ksft_test_result(intact(area, PAGES, 4), "MADV_UNMERGEABLE keeps the contents\n");
	ksm_start();
	ksft_test_result(ksm_until("pages_sharing", PAGES / 2 - 4, 12) &&
			 ksm_until("pages_unshared", 0, 12) &&
			 !ksm_mappings(getpid(), area + PAGES / 4 * PAGE, PAGES / 2),
			 "the range is not looked at any more\n");
	mergeable(area, PAGES);
	ksft_test_result(ksm_until("pages_sharing", PAGES - 4, 12) && intact(area, PAGES, 4),
			 "MADV_MERGEABLE merges it again\n");
	munmap(area, PAGES * PAGE);
	ksft_test_result(ksm_until("pages_sharing", 0, 12) && ksm_until("pages_shared", 0, 12),
			 "munmap lets go of the pages\n");
}

static int prctl_child(void *arg)
{
	char *area = filled(PAGES, 4);

	(void)arg;
	if (prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0))
		return KSFT_FAIL;
	while (ksm_mappings(getpid(), area, PAGES) < PAGES)
		ksm_scans(1);
	if (prctl(PR_SET_MEMORY_MERGE, 0, 0, 0, 0) || prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0))
		return KSFT_FAIL;
	if (ksm_mappings(getpid(), area, PAGES) || !intact(area, PAGES, 4))
		return KSFT_FAIL;
	ksm_scans(4);
	if (ksm_mappings(getpid(), area, PAGES) || smaps_ksm_pages(getpid()))
		return KSFT_FAIL;
	return KSFT_PASS;
}

static int writer(void *run)
{
	child_step();
	return ksm_try("run", run) != 0;
}

/* Somebody else's run=2 takes its time, and a second writer waits for it */
static void while_it_waits(char *area)
{
	const char *last = area + (MANY - 1) * PAGE;
	int killed = 0;

	if (!module_loaded()) {
		ksft_test_result_skip("the built-in KSM lets nobody be killed who waits\n");
		return;
	}
	/* The area is not to be merged in the children, too */
	if (madvise(area, MANY * PAGE, MADV_DONTFORK))
		die("MADV_DONTFORK: %s", strerror(errno));
	for (int n = 0; n < TRIES && killed < ENOUGH; n++) {
		struct child first = child_start(writer, "2"), second = child_start(writer, "0");

		ksm_start();
		if (!ksm_until("pages_sharing", MANY - 64, 12))
			ksft_print_msg("it was not merged\n");
		child_wait_step(&first);
		child_wait_step(&second);
		child_go(&first);
		while (ksm_get("run") != 2)
			usleep(100);
		child_go(&second);
		usleep(rnd_below(10000));
		child_kill(&second);
		/* What is merged to the end shows that the first has not ended */
		killed += ksm_mappings(getpid(), last, 1) > 0;
		child_end(&first);
	}
	ksft_test_result(killed == ENOUGH, "who waits for a run=2 can be killed\n");
}

/* The sysfs write is interrupted again and again, and goes on where it was written again */
static void with_signals(void)
{
	char *area = filled(MANY, 64);
	struct sigaction action = { .sa_handler = on_alarm };
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1 };
	struct itimerspec period = { { 0, 10000000 }, { 0, 10000000 } };
	timer_t timer;
	int interrupted = 0, err;
	bool stopped = true;

	mergeable(area, MANY);
	ksm_start();
	if (!ksm_until("pages_sharing", MANY - 64, 12))
		ksft_print_msg("it was not merged\n");
	sigaction(SIGUSR1, &action, NULL);
	if (timer_create(CLOCK_MONOTONIC, &event, &timer) ||
	    timer_settime(timer, 0, &period, NULL))
		die("timer: %s", strerror(errno));
	while ((err = ksm_try("run", "2")) == -EINTR) {
		interrupted++;
		stopped &= ksm_get("run") == 0;
	}
	timer_delete(timer);
	ksft_print_msg("interrupted %d times by %d signals\n", interrupted, (int)alarms);
	ksft_test_result(interrupted > 0, "a signal interrupts run=2\n");
	ksft_test_result(stopped, "run is 0 then\n");
	ksft_test_result(!err && ksm_get("run") == 2 && ksm_all_zero() &&
			 !ksm_mappings(getpid(), area, MANY), "run=2 completes in the end\n");
	ksft_test_result(intact(area, MANY, 64), "all contents are as they were\n");
	ksm_start();
	ksft_test_result(ksm_until("pages_sharing", MANY - 64, 12),
			 "everything merges again\n");
	while_it_waits(area);
	ksm_set("run", 2);
	munmap(area, MANY * PAGE);
}

int main(int argc, char **argv)
{
	struct child child;

	test_init(argc, argv);
	test_plan(12);
	ksm_reset();
	/* Something to scan always, as no scan is counted otherwise */
	mergeable(map_pages(1), 1);
	with_madvise();
	child = child_start(prctl_child, NULL);
	ksft_test_result(child_end(&child) == 0, "prctl off unmerges all, and for good\n");
	with_signals();
	test_exit();
}
