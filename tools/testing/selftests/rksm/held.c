// SPDX-License-Identifier: GPL-2.0-only
/*
 * A reader that waits for files which a module that is being removed holds can be killed.
 * The module is loaded with delays, so that it now and then holds them for seconds.
 *
 * guest: --no-module
 * runs: cloud-amd64
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "util.h"

#define TRIES		60
#define MSEC		1000
#define ENOUGH		3	/* readers that were killed while they waited */

/* Whether the child ends within so many milliseconds */
static bool ends(pid_t pid, int msecs, int *status)
{
	for (; msecs > 0; msecs--) {
		if (waitpid(pid, status, WNOHANG) == pid)
			return true;
		usleep(MSEC);
	}
	return false;
}

static pid_t reader(void)
{
	pid_t pid = fork();

	if (!pid) {
		char buf[64];
		int fd = open("/sys/kernel/mm/ksm/full_scans", O_RDONLY | O_CLOEXEC);

		_exit(read(fd, buf, sizeof(buf)) <= 0);
	}
	return pid;
}

int main(int argc, char **argv)
{
	int killed = 0, late = 0;

	test_init(argc, argv);
	if (!module_path)
		ksft_exit_skip("no module named\n");
	test_plan(1);
	ksm_reset();
	for (int n = 0; n < TRIES && killed < ENOUGH; n++) {
		pid_t remover, pid;
		int status;

		if (module_insert("delay=4000000"))
			die("insmod");
		remover = fork();
		if (!remover)
			_exit(-module_remove());
		usleep(100 * MSEC);
		pid = reader();
		/* It waits, and the one that it waits for is not done */
		if (!ends(pid, 100, &status)) {
			bool dead, held;

			kill(pid, SIGKILL);
			dead = ends(pid, 1000, &status);
			held = module_loaded();
			killed += dead && held;
			late += !dead;
			if (!dead)
				waitpid(pid, &status, 0);
		}
		waitpid(remover, &status, 0);
		if (status)
			die("rmmod: %d", status);
	}
	ksft_print_msg("%d readers killed while they waited, %d did not die\n", killed, late);
	ksft_test_result(killed == ENOUGH && !late, "a reader that waits can be killed\n");
	test_exit();
}
