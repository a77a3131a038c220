// SPDX-License-Identifier: GPL-2.0-only
/*
 * What /dev/rksm tells of processes: RKSM_IOC_STAT lists each once, and it and RKSM_IOC_WHY are
 * exact to the page, agree with /proc, and change nothing.
 *
 * runs: cloud-amd64 sanitizer
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "device.h"

#define LISTED		6
#define AREA		16	/* pages of AREA / CONTENTS contents */
#define CONTENTS	4
#define CHANGING	4
#define MERGED		(AREA - CHANGING)
#define UNIQUE		5
#define ZERO		6
#define FRESH		7
#define HELD_PAGES	3
#define MANY		16384
#define SCANS		2000

/* The list */

static struct target listed[LISTED];

struct seen {
	int times[LISTED], wrong;
};

static void see(const void *record, void *arg)
{
	const struct rksm_stat_record *stat = record;
	struct seen *seen = arg;

	seen->wrong += stat->size != sizeof(*stat) || stat->reserved;
	for (int i = 0; i < LISTED; i++) {
		if (stat->pid != listed[i].child.pid)
			continue;
		seen->times[i]++;
		seen->wrong += stat->flags != (i % 2 ? RKSM_STAT_MERGE_ANY : 0);
	}
}

static int come_and_go(void *arg)
{
	(void)arg;
	for (;;) {
		pid_t pid = fork();

		if (!pid) {
			mergeable(map_pages(1), 1);
			usleep(rnd_below(5000));
			_exit(0);
		}
		if (rnd_below(2))
			waitpid(pid, NULL, 0);
	}
	return 0;
}

static void list(void)
{
	struct child child = child_start(come_and_go, NULL);
	bool ok = true;

	for (int i = 0; i < LISTED; i++)
		listed[i] = target_start(4, 1, 1, i % 2 ? OPT_PRCTL : OPT_MADVISE);
	for (int n = 0; n < 200; n++) {
		struct seen seen = {};
		size_t len = (1 + n % 9) * sizeof(struct rksm_stat_record) + n % 8;

		ok &= !device_list(RKSM_IOC_STAT, len, see, &seen) && !seen.wrong;
		for (int i = 0; i < LISTED; i++)
			ok &= seen.times[i] == 1;
	}
	child_kill(&child);
	ksft_test_result(ok, "every process is listed once, whatever the buffer, who comes or goes\n");
	for (int i = 0; i < LISTED; i++)
		target_end(&listed[i]);
}

/* One process with pages of all kinds */

static bool counted(const struct target *target, struct rksm_stat_record *stat)
{
	return device_stat(target->child.pid, stat) && stat->merged == MERGED &&
	       stat->unique == UNIQUE && stat->changing == CHANGING && stat->zero == ZERO &&
	       !stat->fresh;
}

static bool is_sorted(void *target)
{
	struct rksm_stat_record stat;
	bool ok;

	/* Look between two batches, and leave it so: a writer may stand still for a few of them */
	ksm_set("run", 0);
	ok = counted(target, &stat);
	if (!ok)
		ksm_set("run", 1);
	return ok;
}

static void print(const struct rksm_stat_record *stat)
{
	ksft_print_msg("%llu merged, %llu unique, %llu changing, %llu fresh, %llu zero, %llu broken\n",
		       stat->merged, stat->unique, stat->changing, stat->fresh, stat->zero,
		       stat->broken);
}

static void counts(struct target *target)
{
	struct rksm_stat_record stat = {};
	pid_t pid = target->child.pid;
	bool ok;

	target_do(target, OP_TOUCH, UNIQUE);
	target_do(target, OP_ZERO, ZERO);
	target_do(target, OP_HAMMER, CHANGING);
	ksm_set("use_zero_pages", 1);
	ksm_start();
	ok = ksm_until_true(is_sorted, target, SCANS);
	ksm_set("run", 0);
	target_do(target, OP_STOP, 0);
	ok &= counted(target, &stat);
	print(&stat);
	ksft_test_result(ok && !stat.broken, "each page is counted as what it is\n");
	ksft_test_result((long)(stat.merged + stat.unique + stat.changing + stat.fresh) ==
				 proc_ksm_stat(pid, "ksm_rmap_items") &&
			 (long)stat.merged == proc_ksm_stat(pid, "ksm_merging_pages") &&
			 (long)stat.zero == proc_ksm_stat(pid, "ksm_zero_pages"),
			 "the counts agree with /proc\n");
}

/* kB that have been accessed, of the memory that is mergeable: what else it has it may be using */
static long referenced(pid_t pid)
{
	char path[64], line[256];
	long sum = 0, kb = 0;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/smaps", pid);
	f = fopen(path, "re");
	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, "Referenced: %ld kB", &kb) != 1 && !strncmp(line, "VmFlags:", 8) &&
		    strstr(line, " mg"))
			sum += kb;
	if (f)
		fclose(f);
	return sum;
}

static bool same_why(const struct rksm_why *a, const struct rksm_why *b)
{
	return !memcmp(a, b, sizeof(*a));
}

static void reasons(struct target *target)
{
	pid_t pid = target->child.pid;
	struct rksm_stat_record before = {}, after = {};
	struct rksm_why why, again;
	char path[64];
	size_t huge;
	long kb;
	bool ok;

	target_do(target, OP_TOUCH, FRESH);
	ok = target_do(target, OP_PIN, HELD_PAGES);
	huge = target_do(target, OP_PIN_HUGE, 0) ? HPAGE / PAGE : 0;
	ok &= device_stat(pid, &before) && !device_why(target->pidfd, &why);
	ksft_print_msg("kB: %llu merged, %llu zero, %llu pinned, %llu unsplit\n", why.merged >> 10,
		       why.zero >> 10, why.pinned >> 10, why.unsplit >> 10);
	ksft_print_msg("kB: %llu unique, %llu changing, %llu fresh\n", why.unique >> 10,
		       why.changing >> 10, why.fresh >> 10);
	ok &= why.merged == MERGED * PAGE && why.zero == ZERO * PAGE &&
	      why.pinned == HELD_PAGES * PAGE && why.unsplit == huge * PAGE &&
	      why.unique == UNIQUE * PAGE && why.changing == CHANGING * PAGE &&
	      why.fresh == FRESH * PAGE && why.at == ~0ULL && !why.flags;
	ksft_test_result(ok, "each reason is told to the page%s\n",
			 huge ? "" : ", without huge pages");

	ok = !device_why(target->pidfd, &again) && same_why(&why, &again);
	snprintf(path, sizeof(path), "/proc/%d/clear_refs", pid);
	for (int accessed = 0; accessed < 2; accessed++) {
		ok &= write_file(path, "1");
		ok &= target_do(target, OP_READ, accessed ? AREA : 0);
		kb = referenced(pid);
		ok &= !accessed || kb >= (long)(AREA * PAGE >> 10);
		ok &= !device_why(target->pidfd, &again) && same_why(&why, &again);
		if (referenced(pid) != kb)
			ksft_print_msg("%ld kB referenced, then %ld\n", kb, referenced(pid));
		ok &= referenced(pid) == kb;
	}
	ok &= device_stat(pid, &after) && !memcmp(&before, &after, sizeof(before));
	ksft_test_result(ok, "asking changes nothing\n");
}

static bool all_unique(void *target)
{
	struct rksm_stat_record stat;

	return device_stat(((struct target *)target)->child.pid, &stat) && stat.unique == AREA * 4;
}

static bool all_merged(void *target)
{
	return target_merged(target) == AREA * 4;
}

/* A scanner that trusts accessed bits sees what was written to before somebody asked */
static void hints(void)
{
	struct target target = target_start(AREA * 4, AREA * 4, unique_key(), OPT_MADVISE);
	struct rksm_why why;
	bool ok;

	ksm_start();
	ok = ksm_until_true(all_unique, &target, SCANS);
	ksm_scans(2);
	ksm_set("run", 0);
	ok &= target_do(&target, OP_ALIKE, 0) && !device_why(target.pidfd, &why);
	ksm_set("run", 1);
	ok &= ksm_until_true(all_merged, &target, 5) && target_do(&target, OP_INTACT, 0);
	ksm_set("run", 0);
	ksft_test_result(ok, "the scanner looks at what was written to before\n");
	target_end(&target);
}

static bool has_broken(void *target)
{
	struct rksm_stat_record stat;

	return device_stat(((struct target *)target)->child.pid, &stat) && stat.broken == 3;
}

static void writes(struct target *target)
{
	struct rksm_stat_record stat;
	bool ok = target_do(target, OP_WRITE, 3);

	ksm_start();
	ok &= ksm_until_true(has_broken, target, SCANS);
	ksm_scans(4);
	ksm_set("run", 0);
	ok &= has_broken(target) && device_stat(target->child.pid, &stat);
	print(&stat);
	ksft_test_result(ok, "writes to merged pages are counted\n");
}

static void no_action(int sig)
{
	(void)sig;
}

/* The sums of what was told before and after signals */
static void interrupted(void)
{
	struct sigaction action = { .sa_handler = no_action };
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1 };
	struct target target = target_start(MANY, 64, unique_key(), OPT_MADVISE);
	unsigned long times = 0, partly = 0;
	timer_t timer;
	bool ok = true;

	sigaction(SIGUSR1, &action, NULL);
	if (timer_create(CLOCK_MONOTONIC, &event, &timer))
		die("timer: %s", strerror(errno));
	/* Until a signal has come on the way a few times */
	for (int n = 0; n < 200 && partly < 5; n++) {
		struct rksm_why why = { .size = sizeof(why), .pidfd = target.pidfd };
		struct itimerspec once = { .it_value.tv_nsec = 1 + rnd_below(30000000) };
		unsigned long fresh = 0, pinned = 0;
		int err;

		timer_settime(timer, 0, &once, NULL);
		do {
			unsigned long long from = why.at;

			err = device_call(RKSM_IOC_WHY, &why);
			times += err == -EINTR;
			partly += err == -EINTR && why.at > from;
			fresh += why.fresh;
			pinned += why.pinned;
		} while (err == -EINTR);
		/* A page that is on its way to an LRU list counts as pinned */
		if (err || fresh + pinned != MANY * PAGE || why.at != ~0ULL) {
			ksft_print_msg("%s; %lu kB fresh, %lu kB pinned, of %lu; at %llx\n",
				       strerror(-err), fresh / 1024, pinned / 1024,
				       MANY * PAGE / 1024, (unsigned long long)why.at);
			ok = false;
		}
	}
	timer_delete(timer);
	ksft_print_msg("interrupted %lu times, %lu of them on the way\n", times, partly);
	ksft_test_result(ok && partly, "what signals interrupt goes on\n");
	target_end(&target);
}

int main(int argc, char **argv)
{
	struct target target;

	target_main(argc, argv);
	test_init(argc, argv);
	if (!module_loaded())
		ksft_exit_skip("only rksm has " DEVICE "\n");
	test_plan(9);
	ksm_reset();
	list();
	target = target_start(AREA, CONTENTS, unique_key(), OPT_MADVISE);
	counts(&target);
	reasons(&target);
	hints();
	writes(&target);
	target_end(&target);
	interrupted();
	ksm_set("run", 2);
	ksft_test_result(ksm_all_zero(), "nothing stays\n");
	test_exit();
}
