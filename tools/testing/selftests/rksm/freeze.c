// SPDX-License-Identifier: GPL-2.0-only
/*
 * The freezers: tasks stop and go on while the scanner runs and while memory is unmerged,
 * and the scanner stops with the tasks where the whole system is frozen.
 *
 * runs: cloud-amd64 sanitizer
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "util.h"

#define CGROUP	"/sys/fs/cgroup/freeze"
#define DELAY	"/sys/module/suspend/parameters/pm_test_delay"
#define PAGES	2048
#define ROUNDS	6

static char *area;

static bool intact(void)
{
	for (size_t i = 0; i < PAGES; i++)
		if (!page_holds(area + i * PAGE, 1 + i % 16))
			return false;
	return true;
}

static bool merges(void)
{
	ksm_start();
	return ksm_until("pages_sharing", PAGES - 16, 20) && intact();
}

/* Freezes everything for a second, rksmd too, and thaws it */
static bool suspend_test(void)
{
	return write_file("/sys/power/pm_test", "freezer") &&
	       write_file("/sys/power/state", "freeze");
}

static pid_t unmerger(void)
{
	pid_t pid = fork();

	if (!pid) {
		/* Freezing is no signal to the program: the call begins anew */
		_exit(-ksm_try("run", "2"));
	}
	return pid;
}

static bool frozen(void)
{
	char buf[256];

	for (int tries = 0; tries < 3000; tries++) {
		if (read_file(CGROUP "/cgroup.events", buf, sizeof(buf)) > 0 &&
		    strstr(buf, "frozen 1"))
			return true;
		usleep(10000);
	}
	return false;
}

/* A task in the middle of run=2 freezes, and the others' files answer meanwhile */
static bool unmerger_freezes(void)
{
	bool ok = true;

	if (mkdir(CGROUP, 0755) && errno != EEXIST)
		return false;
	for (int round = 0; round < ROUNDS; round++) {
		char text[16];
		int status;
		pid_t pid;

		ok &= merges();
		pid = unmerger();
		snprintf(text, sizeof(text), "%d", pid);
		/* It may have ended already */
		if (write_file(CGROUP "/cgroup.procs", text)) {
			usleep(rnd_below(10000));
			ok &= write_file(CGROUP "/cgroup.freeze", "1") && frozen();
			ksm_get("pages_sharing");
			ok &= !ksm_try("run", "0");
			ok &= write_file(CGROUP "/cgroup.freeze", "0");
		}
		waitpid(pid, &status, 0);
		ok &= WIFEXITED(status) && (!WEXITSTATUS(status) || WEXITSTATUS(status) == EINTR);
		ok &= intact();
	}
	rmdir(CGROUP);
	return ok;
}

int main(int argc, char **argv)
{
	bool can_suspend, ok = true;

	test_init(argc, argv);
	can_suspend = !access("/sys/power/pm_test", W_OK);
	if (can_suspend)
		write_file(DELAY, "1");
	test_plan(5);
	ksm_reset();
	area = map_pages(PAGES);
	for (size_t i = 0; i < PAGES; i++)
		fill_page(area + i * PAGE, 1 + i % 16);
	mergeable(area, PAGES);

	if (can_suspend) {
		ksm_start();
		for (int round = 0; round < 2; round++)
			ok &= suspend_test();
		ksft_test_result(ok && intact(), "all freezes and thaws while the scanner runs\n");
		ok = merges();
		for (int round = 0; round < 3; round++) {
			pid_t pid = unmerger();
			int status;

			usleep(rnd_below(10000));
			ok &= suspend_test();
			waitpid(pid, &status, 0);
			ok &= WIFEXITED(status) && !WEXITSTATUS(status) && ksm_get("run") == 2;
			ok &= intact() && merges();
		}
		ksft_test_result(ok, "all freezes and thaws while memory is unmerged\n");
	} else {
		ksft_test_result_skip("no /sys/power/pm_test\n");
		ksft_test_result_skip("no /sys/power/pm_test\n");
	}
	ksft_test_result(unmerger_freezes(), "a cgroup with who unmerges freezes and thaws\n");
	ksft_test_result(merges(), "everything merges again\n");
	ksm_set("run", 2);
	ksft_test_result(ksm_all_zero(), "all zero after run=2\n");
	test_exit();
}
