// SPDX-License-Identifier: GPL-2.0-only
/*
 * Merging and unmerging by /dev/rksm: to the page, with the sums right, and harming nobody,
 * whatever the process does meanwhile.
 *
 * runs: cloud-amd64
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "device.h"

#define PAGES	256
#define MANY	16384
#define TRIES	30

/* Merging, with run=0 */

static long saved_bytes(void)
{
	return (ksm_get("pages_sharing") + ksm_get("ksm_zero_pages")) * (long)PAGE;
}

static void merged_exactly(void)
{
	uint64_t key = unique_key();
	struct target a = target_start(PAGES, 4, key, OPT_MADVISE);
	struct target b = target_start(PAGES, 4, key, OPT_NONE);
	struct target zero = target_start(PAGES, 1, 0, OPT_MADVISE);
	struct rksm_merge merge = { .pidfd = a.pidfd, .start = (uintptr_t)a.area,
				    .end = (uintptr_t)a.area + PAGES / 2 * PAGE };
	long before = saved_bytes();
	bool ok;

	ok = !device_merge(&merge) && merge.at == merge.end && merge.scanned == PAGES / 2 &&
	     merge.merged == PAGES / 2 && !merge.zeroed &&
	     merge.bytes_saved == (PAGES / 2 - 4) * (long)PAGE;
	ok &= merge.bytes_saved == saved_bytes() - before;
	ksft_test_result(ok && target_merged(&a) == PAGES / 2, "a range is merged, and no more\n");

	merge = (struct rksm_merge){ .pidfd = a.pidfd, ALL_MEMORY };
	ok = !device_merge(&merge) && merge.at == ~0ULL && target_merged(&a) == PAGES;
	ksft_test_result(ok && merge.merged == PAGES / 2 &&
			 merge.bytes_saved == PAGES / 2 * (long)PAGE,
			 "all is merged, and what is merged does not count again\n");

	before = saved_bytes();
	merge = (struct rksm_merge){ .pidfd = b.pidfd, .flags = RKSM_MERGE_ENABLE, ALL_MEMORY };
	ok = !target_do(&b, OP_MERGE_ANY, 0) && !device_merge(&merge) &&
	     target_do(&b, OP_MERGE_ANY, 0);
	ksft_print_msg("%llu pages, %llu merged, %lld bytes saved\n", merge.scanned, merge.merged,
		       merge.bytes_saved);
	ksft_test_result(ok && target_merged(&b) == PAGES && merge.merged >= PAGES &&
			 merge.bytes_saved == saved_bytes() - before,
			 "ENABLE makes all mergeable, and merges with the other process\n");

	ksm_set("use_zero_pages", 1);
	before = saved_bytes();
	merge = (struct rksm_merge){ .pidfd = zero.pidfd, ALL_MEMORY };
	ok = !device_merge(&merge) && merge.zeroed == PAGES && !merge.merged &&
	     merge.bytes_saved == PAGES * (long)PAGE &&
	     saved_bytes() - before == PAGES * (long)PAGE;
	ksft_test_result(ok, "zero pages are placed and counted\n");
	ksm_set("use_zero_pages", 0);
	ksft_test_result(target_do(&a, OP_INTACT, 0) && target_do(&b, OP_INTACT, 0) &&
			 target_do(&zero, OP_INTACT, 0), "all contents are as they were\n");
	target_end(&a);
	target_end(&b);
	target_end(&zero);
}

static void pinned(void)
{
	char *area = map_pages(8);
	struct iovec iov = { area + 7 * PAGE, PAGE };
	struct rksm_merge merge = { .pidfd = pidfd_of(getpid()), .start = (uintptr_t)area,
				    .end = (uintptr_t)area + 8 * PAGE };
	int fd[2];
	bool ok;

	for (size_t i = 0; i < 8; i++)
		fill_page(area + i * PAGE, 1);
	mergeable(area, 8);
	if (pipe(fd) || vmsplice(fd[1], &iov, 1, 0) != (ssize_t)PAGE)
		die("vmsplice: %s", strerror(errno));
	ok = !device_merge(&merge) && merge.merged == 7 && merge.refused[PINNED] &&
	     ksm_mappings(getpid(), area, 7) == 7 && !page_is_ksm(area + 7 * PAGE);
	close(fd[0]);
	close(fd[1]);
	ok &= !device_merge(&merge) && merge.merged == 1 && !merge.refused[PINNED] &&
	      page_is_ksm(area + 7 * PAGE);
	ksft_test_result(ok, "a pinned page is refused, counted, and merged when released\n");
	close(merge.pidfd);
	munmap(area, 8 * PAGE);
}

/* SIGUSR1 once, at random within so many microseconds; 0: never */
static void signal_within(unsigned int usecs)
{
	static timer_t timer;
	static bool made;
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1 };
	struct itimerspec once = {};

	if (!made && timer_create(CLOCK_MONOTONIC, &event, &timer))
		die("timer: %s", strerror(errno));
	made = true;
	if (usecs)
		once.it_value.tv_nsec = 1000 * (1 + rnd_below(usecs));
	timer_settime(timer, 0, &once, NULL);
}

static void no_action(int sig)
{
	(void)sig;
}

static void interrupted(void)
{
	struct sigaction action = { .sa_handler = no_action };
	struct target target = target_start(MANY, 64, unique_key(), OPT_MADVISE);
	struct rksm_merge merge = { .pidfd = target.pidfd, ALL_MEMORY };
	struct rksm_unmerge unmerge = { .pidfd = target.pidfd, ALL_MEMORY };
	unsigned long scanned = 0, merged = 0, refused = 0, pages = 0, times = 0, partly = 0;
	struct rksm_stat_record stat;
	long before = saved_bytes(), saved = 0;
	bool ok = true;
	int err;

	sigaction(SIGUSR1, &action, NULL);
	do {
		signal_within(times < 100 ? 50000 : 0);
		err = device_merge(&merge);
		signal_within(0);
		times += err == -EINTR;
		partly += err == -EINTR && merge.at > merge.start;
		scanned += merge.scanned;
		merged += merge.merged;
		saved += merge.bytes_saved;
		for (size_t i = 0; i < RKSM_NR_REFUSALS; i++)
			refused += merge.refused[i];
		ok &= merge.at >= merge.start;
		merge.start = merge.at;
	} while (err == -EINTR);
	ksft_print_msg("interrupted %lu times, %lu of them on the way\n", times, partly);
	ksft_print_msg("%lu pages, %lu merged, %lu refused, %ld bytes saved (%ld)\n", scanned,
		       merged, refused, saved, saved_bytes() - before);
	/* Reclaim or migration may have had a page for a moment */
	ksft_test_result(ok && !err && partly && merged + refused >= MANY && refused < MANY / 100 &&
			 scanned == MANY && saved == saved_bytes() - before &&
			 target_merged(&target) == merged,
			 "a merge that signals interrupt goes on, and its sums are right\n");
	times = 0;
	do {
		signal_within(times < 100 ? 50000 : 0);
		err = device_unmerge(&unmerge);
		signal_within(0);
		times += err == -EINTR;
		pages += unmerge.pages;
		unmerge.start = unmerge.at;
	} while (err == -EINTR);
	ksft_print_msg("interrupted %lu times, %lu pages\n", times, pages);
	ksft_test_result(!err && times && pages == merged && !target_merged(&target) &&
			 device_stat(target.child.pid, &stat) && !stat.merged && !stat.broken &&
			 target_do(&target, OP_INTACT, 0), "so does an unmerge\n");
	target_end(&target);
}

static void huge(void)
{
	struct target target = target_start_huge(2 * HPAGE / PAGE, 8, unique_key(), OPT_MADVISE);
	struct rksm_merge merge = { .pidfd = target.pidfd, ALL_MEMORY };
	struct mapping map;

	mappings_of(target.child.pid, target.area, 1, &map);
	if (!(map.flags & KPF_THP))
		ksft_test_result_skip("no huge pages\n");
	else
		ksft_test_result(!device_merge(&merge) && merge.merged == target.pages &&
				 target_merged(&target) == target.pages &&
				 target_do(&target, OP_INTACT, 0), "huge pages are merged\n");
	target_end(&target);
}

/* Merging and unmerging while the scanner and the process itself do what they like */

static bool is_merged(void *target)
{
	return target_merged(target) == ((struct target *)target)->pages;
}

/* Merges all; who is refused for a moment, as reclaim or migration has the page, comes again */
static bool merges_all(struct target *target, struct rksm_merge *merge)
{
	static const char *const names[] = { RKSM_REFUSALS };

	for (int n = 0; n < 10; n++) {
		if (device_merge(merge))
			return false;
		if (is_merged(target))
			return true;
		for (size_t i = 0; i < ARRAY_SIZE(names); i++)
			if (merge->refused[i])
				ksft_print_msg("%llu refused: %s\n", merge->refused[i], names[i]);
	}
	return false;
}

static void beside_scanner(void)
{
	struct target target = target_start(8 * PAGES, 16, unique_key(), OPT_MADVISE);
	bool ok = true;

	ksm_set("pages_to_scan", 100000);
	ksm_start();
	for (int n = 0; n < TRIES / 3; n++) {
		struct rksm_merge merge = { .pidfd = target.pidfd, ALL_MEMORY };
		struct rksm_unmerge unmerge = { .pidfd = target.pidfd, ALL_MEMORY };

		ok &= !device_merge(&merge) && !device_unmerge(&unmerge);
	}
	ok &= target_do(&target, OP_INTACT, 0);
	ksft_test_result(ok && ksm_until_true(is_merged, &target, 12) &&
			 target_do(&target, OP_INTACT, 0), "merging beside a running scanner\n");
	ksm_set("run", 0);
	target_end(&target);
}

static void killed(void)
{
	int gone = 0, partly = 0, done = 0, other = 0;

	for (int n = 0; n < TRIES; n++) {
		struct target target = target_start(MANY / 8, 8, unique_key(), OPT_NONE);
		struct rksm_merge merge = { .pidfd = target.pidfd, .flags = RKSM_MERGE_ENABLE,
					    ALL_MEMORY };
		pid_t killer = fork();
		int err;

		if (!killer) {
			usleep(rnd_below(20000));
			_exit(kill(target.child.pid, SIGKILL));
		}
		err = device_merge(&merge);
		gone += err == -ESRCH;
		partly += err == -ESRCH && merge.scanned;
		done += !err;
		other += err && err != -ESRCH;
		if (err && err != -ESRCH)
			ksft_print_msg("merge: %s\n", strerror(-err));
		waitpid(killer, NULL, 0);
		target_end(&target);
	}
	ksft_print_msg("%d killed before, %d on the way, %d later\n", gone - partly, partly, done);
	ksft_test_result(gone && !other, "a process that is killed meanwhile is ESRCH\n");
}

static char *written;
static volatile bool over, begun;

static void *writer(void *wrong)
{
	uint64_t keys[PAGES] = {};

	for (uint64_t n = 1; !over; n++) {
		size_t i = n * 7919 % PAGES;

		if (!page_holds(written + i * PAGE, keys[i]))
			*(bool *)wrong = true;
		keys[i] = n % 5;
		fill_page(written + i * PAGE, keys[i]);
		begun = n > PAGES;
	}
	for (size_t i = 0; i < PAGES; i++)
		if (!page_holds(written + i * PAGE, keys[i]))
			*(bool *)wrong = true;
	return NULL;
}

static void changing_memory(void)
{
	bool wrong = false, ok = true;
	unsigned long merged = 0;
	pthread_t thread;
	int pidfd = pidfd_of(getpid());

	written = map_pages(PAGES);
	mergeable(written, PAGES);
	ksm_set("use_zero_pages", 1);
	if (pthread_create(&thread, NULL, writer, &wrong))
		die("no thread");
	while (!begun)
		usleep(100);
	/* Until some are merged, however seldom the thread lets go of what it has written */
	for (int n = 0; n < 2 * TRIES || !merged; n++) {
		struct rksm_merge merge = { .pidfd = pidfd, .start = (uintptr_t)written,
					    .end = (uintptr_t)written + PAGES * PAGE };
		struct rksm_unmerge unmerge = { .pidfd = pidfd, ALL_MEMORY };

		ok &= !device_merge(&merge);
		merged += merge.merged + merge.zeroed;
		if (n % 8 == 0)
			ok &= !device_unmerge(&unmerge);
	}
	over = true;
	pthread_join(thread, NULL);
	ksft_print_msg("%lu pages merged\n", merged);
	ksft_test_result(ok && merged && !wrong, "memory that changes all the time stays right\n");
	ksm_set("use_zero_pages", 0);
	munmap(written, PAGES * PAGE);
	close(pidfd);
}

/* A child that runs in its parent's memory */

static void borrowed(void)
{
	struct borrower *borrower = map_shared(1);
	struct child parent = borrower_start(borrower, PAGES);
	struct rksm_merge merge = { .flags = RKSM_MERGE_ENABLE, ALL_MEMORY };
	struct rksm_unmerge unmerge = { .flags = RKSM_UNMERGE_DISABLE, ALL_MEMORY };
	struct rksm_why why;
	bool ok;
	int fd;

	fd = pidfd_of(parent.pid);
	merge.pidfd = fd;
	merge.flags = 0;
	ok = !device_merge(&merge) && merge.merged == PAGES;
	child_go(&parent);
	child_wait_step(&parent);
	merge.pidfd = unmerge.pidfd = pidfd_of(borrower->pid);
	merge.flags = RKSM_MERGE_ENABLE;
	ok &= device_merge(&merge) == -EBUSY && device_unmerge(&unmerge) == -EBUSY &&
	      device_why(merge.pidfd, &why) == -EBUSY;
	/* The parent's own name for it works */
	ok &= !device_why(fd, &why) && why.merged == PAGES * PAGE;
	ok &= ksm_mappings(parent.pid, borrower->area, PAGES) == PAGES;
	ksft_test_result(child_end(&parent) == 0 && ok,
			 "memory is not reached through a child that only borrows it\n");
	close(fd);
	close(merge.pidfd);
}

/* Unmerging */

static bool marked_mergeable(pid_t pid)
{
	char command[64];

	snprintf(command, sizeof(command), "grep -q '^VmFlags:.* mg' /proc/%d/smaps", pid);
	return system(command) == 0;
}

static void unmerged(enum opt opt, const char *by)
{
	struct target target = target_start(PAGES, 4, unique_key(), opt);
	struct rksm_merge merge = { .pidfd = target.pidfd, ALL_MEMORY };
	char *part = target.area + PAGES / 4 * PAGE;
	struct rksm_unmerge unmerge = { .pidfd = target.pidfd, .start = (uintptr_t)part,
					.end = (uintptr_t)part + PAGES / 2 * PAGE };
	struct rksm_stat_record stat;
	bool ok;

	ok = merges_all(&target, &merge);
	ok &= !device_unmerge(&unmerge) && unmerge.pages == PAGES / 2 && unmerge.at == unmerge.end;
	ok &= target_merged(&target) == PAGES / 2 &&
	      !ksm_mappings(target.child.pid, part, PAGES / 2);
	unmerge = (struct rksm_unmerge){ .pidfd = target.pidfd, ALL_MEMORY };
	ok &= !device_unmerge(&unmerge) && unmerge.pages >= PAGES / 2 && unmerge.at == ~0ULL;
	ok &= !target_merged(&target) && target_do(&target, OP_INTACT, 0);
	ok &= device_stat(target.child.pid, &stat) && !stat.merged && !stat.broken;
	ksft_test_result(ok, "%s: a range and all is unmerged, and not counted as broken\n", by);

	ok = merges_all(&target, &merge);
	unmerge.flags = RKSM_UNMERGE_DISABLE;
	ksm_set("pages_to_scan", 100000);
	ksm_start();
	ok &= !device_unmerge(&unmerge) && !target_merged(&target);
	for (int n = 0; n < 8 && ok; n++) {
		ksm_scans(1);
		ok = !target_merged(&target);
	}
	ksm_set("run", 0);
	ok &= !target_do(&target, OP_MERGE_ANY, 0) && !marked_mergeable(target.child.pid);
	ksft_test_result(ok && target_do(&target, OP_INTACT, 0), "%s: DISABLE is for good\n", by);
	target_end(&target);
}

static long microseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* How long another thread of the process waits for its mmap lock, and how long it takes */
static bool disabled(bool outside, long *longest, long *took)
{
	struct target target = target_start(2 * MANY, 256, unique_key(), OPT_NONE);
	struct rksm_merge merge = { .pidfd = target.pidfd, .flags = RKSM_MERGE_ENABLE, ALL_MEMORY };
	struct rksm_unmerge unmerge = { .pidfd = target.pidfd, .flags = RKSM_UNMERGE_DISABLE,
					ALL_MEMORY };
	bool ok = merges_all(&target, &merge) && target_do(&target, OP_CHURN, 0);

	*took = microseconds();
	ok &= outside ? !device_unmerge(&unmerge) : target_do(&target, OP_PRCTL, 0);
	*took = microseconds() - *took;
	ok &= target_do(&target, OP_CHURNED, 0) && !target_merged(&target);
	*longest = target.state->longest;
	target_end(&target);
	return ok;
}

static void large(void)
{
	long longest[2], took[2];
	bool ok = true;

	for (int outside = 0; outside < 2; outside++) {
		ok &= disabled(outside, &longest[outside], &took[outside]);
		ksft_print_msg("%s: %ld us for %zu MiB, others wait for %ld us at most\n",
			       outside ? "from outside" : "prctl", took[outside],
			       2 * MANY * PAGE >> 20, longest[outside]);
	}
	ksft_test_result(ok && longest[1] < took[1] / 4,
			 "a large process goes on while it is disabled\n");
}

int main(int argc, char **argv)
{
	char *page;

	target_main(argc, argv);
	test_init(argc, argv);
	if (!module_loaded())
		ksft_exit_skip("only rksm has " DEVICE "\n");
	test_plan(19);
	ksm_reset();
	merged_exactly();
	pinned();
	interrupted();
	huge();
	/* Something to scan always, as no scan is counted otherwise */
	page = map_pages(1);
	mergeable(page, 1);
	fill_page(page, unique_key());
	madvise(page, PAGE, MADV_DONTFORK);
	beside_scanner();
	killed();
	changing_memory();
	borrowed();
	unmerged(OPT_MADVISE, "madvise");
	unmerged(OPT_PRCTL, "prctl");
	large();
	ksm_set("run", 2);
	ksft_test_result(ksm_all_zero(), "nothing stays\n");
	test_exit();
}
