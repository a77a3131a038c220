// SPDX-License-Identifier: GPL-2.0-only
/*
 * rmmod and insmod again and again while KSM scans, processes write, fork and exit, and memory
 * becomes mergeable and is no longer: pages of processes that do nothing stay where they are,
 * and every byte is right. And with thousands of processes: how long that takes. Without a module
 * the same is expected of a KSM that stays.
 *
 * RKSM_OTHER_KO=FILE in the environment is another build, to which every second insmod goes.
 *
 * guest: --no-module --numa 2 --append slab_nomerge --timeout 1800
 * guest sanitizer: --mem 2G
 * runs: builtin
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "holders.h"

#define UPGRADES	10
#define WORKERS		4
#define PAGES		64
#define PALETTE		12	/* contents; 0 is the zero page */
#define QUIET		2
#define PAIRS		24	/* contents that each of them has once */
#define POPULAR		20	/* copies that each has, more than a page may have */
#define SHARING		8
#define MANY		2000
#define OF_EACH		4
#define SHARED_KEYS	64

static struct shared {
	atomic_bool stop;
	atomic_ulong done[WORKERS];
	atomic_int ready;
} *shared;

static struct holder holder[HOLDERS_MAX];
static size_t holders;
static const char *other_path;

/* Processes that do everything */

static char *area;
static uint64_t key[PAGES];

static void put(size_t i)
{
	key[i] = rnd_below(PALETTE);
	fill_page(area + i * PAGE, key[i]);
}

static bool right(void)
{
	for (size_t i = 0; i < PAGES; i++)
		if (!page_holds(area + i * PAGE, key[i]))
			return false;
	return true;
}

/* A child that writes, compares, and ends in its own time or is killed */
static bool family(void)
{
	bool killed = rnd_below(3) == 0;
	int status;
	pid_t pid = fork();

	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		rnd_fork(getpid());
		for (int n = rnd_below(16); n; n--)
			put(rnd_below(PAGES));
		usleep(rnd_below(20000));
		_exit(right() ? KSFT_PASS : KSFT_FAIL);
	}
	if (pid < 0)
		die("fork: %s", strerror(errno));
	for (int n = rnd_below(8); n; n--)
		put(rnd_below(PAGES));
	if (killed) {
		usleep(rnd_below(10000));
		kill(pid, SIGKILL);
	}
	if (waitpid(pid, &status, 0) != pid)
		return false;
	return !status || (killed && WIFSIGNALED(status));
}

static bool act(void)
{
	size_t first = rnd_below(PAGES), n = 1 + rnd_below(PAGES - first);
	char *at = area + first * PAGE;

	switch (rnd_below(10)) {
	case 0:
		return family();
	case 1:
		/* Unmerging takes memory, and a signal ends it */
		return !madvise(at, n * PAGE, MADV_UNMERGEABLE);
	case 2:
	case 3:
		return !madvise(at, n * PAGE, MADV_MERGEABLE);
	case 4:
		memset(key + first, 0, n * sizeof(*key));
		return !madvise(at, n * PAGE, MADV_DONTNEED);
	case 5:
		usleep(rnd_below(10000));
		return right();
	default:
		put(first);
		return page_holds(at, key[first]);
	}
}

static int worker(void *arg)
{
	atomic_ulong *done = arg;

	alarm(0);
	area = map_pages(PAGES);
	for (size_t i = 0; i < PAGES; i++)
		put(i);
	mergeable(area, PAGES);
	while (!shared->stop) {
		if (!act())
			die("a process does not find what it wrote");
		atomic_fetch_add(done, 1);
	}
	return right() ? KSFT_PASS : KSFT_FAIL;
}

/* And some that do nothing */

static void start_quiet(void)
{
	uint64_t keys[PAIRS + POPULAR], popular = unique_key();

	for (size_t i = 0; i < PAIRS; i++)
		keys[i] = unique_key();
	for (size_t i = 0; i < POPULAR; i++)
		keys[PAIRS + i] = popular;
	while (holders < QUIET)
		holder_start(&holder[holders++], PAIRS + POPULAR, keys, -1);
}

static bool quiet_merged(void *arg)
{
	static struct snapshot shot;

	(void)arg;
	snapshot(&shot, holder, holders);
	return pages_with(&shot, KPF_KSM) == holders * (PAIRS + POPULAR);
}

static double seconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

/* To the other KSM, and says how long it took */
static bool timed_step(void)
{
	static char version[2][32];
	static int inserts;
	const char *first = module_path;
	bool in = !module_loaded(), ok;
	double start = seconds();

	if (!module_path)
		return true;
	if (in && other_path && ++inserts % 2)
		module_path = other_path;
	ok = module_step();
	module_path = first;
	ksft_print_msg("%s took %.3f s\n", in ? "insmod" : "rmmod", seconds() - start);
	if (!in || !ok || !other_path)
		return ok;
	read_file("/sys/module/rksm/version", version[inserts % 2], sizeof(version[0]));
	if (inserts > 1 && !strcmp(version[0], version[1])) {
		ksft_print_msg("both builds are version %s", version[0]);
		return false;
	}
	return true;
}

static bool all_work(unsigned long *before)
{
	bool ok = true;

	for (int w = 0; w < WORKERS; w++) {
		unsigned long done = shared->done[w];

		ok &= done > before[w];
		before[w] = done;
	}
	if (!ok)
		ksft_print_msg("a process stands still\n");
	return ok;
}

static void reset(void)
{
	ksm_reset();
	if (module_path && module_loaded() && !module_out())
		die("the module does not go after run=2");
	ksm_set("max_page_sharing", SHARING);
	ksm_set("sleep_millisecs", 1);
	/* A step waits for what is under way */
	ksm_set("pages_to_scan", 300);
	ksm_start();
}

static void upgrades(void)
{
	static struct snapshot was, is;
	unsigned long before[WORKERS] = {};
	struct child child[WORKERS];
	bool still = true, ok = true, good = true;
	long quiet = (QUIET + 1) * (PAIRS + POPULAR);
	bool others = false;	/* whether anything of the others was merged */
	int steps = 0;

	reset();
	start_quiet();
	if (!ksm_until_true(quiet_merged, NULL, 60))
		die("pages do not merge");
	holder_fork(&holder[0], &holder[holders++]);
	ksm_scans(3);
	snapshot(&was, holder, holders);
	for (int w = 0; w < WORKERS; w++)
		child[w] = child_start(worker, &shared->done[w]);
	while (steps < 2 * UPGRADES && ok) {
		usleep(rnd_below(200000));
		ok = timed_step();
		steps += ok;
		snapshot(&is, holder, holders);
		still &= same_pages(&was, &is);
		others |= is.shared + is.sharing > quiet;
	}
	/* The last one leaves the built-in to it */
	ksm_scans(5);
	snapshot(&is, holder, holders);
	still &= same_pages(&was, &is) && steps;
	good = all_work(before) && others;
	shared->stop = true;
	for (int w = 0; w < WORKERS; w++)
		good &= child_end(&child[w]) == 0;
	ksft_print_msg("%lu, %lu, %lu and %lu times something was done\n", before[0], before[1],
		       before[2], before[3]);
	ksft_test_result(ok, "%d times in and out under load\n", steps / 2);
	ksft_test_result(still, "nothing of those that do nothing has moved\n");
	ksft_test_result(good && holders_intact(holder, holders), "every byte is right\n");
}

static void end_upgrades(void)
{
	bool ok;

	ksm_set("run", 2);
	ok = ksm_all_zero() && holders_intact(holder, holders);
	if (module_path && module_loaded()) {
		ksft_print_msg("the module was left loaded\n");
		ok = false;
	}
	while (holders)
		holder_end(&holder[--holders]);
	ksm_set("run", 0);
	ksm_set("run", 2);
	ksft_test_result((module_loaded() || slabs_empty()) && ok, "nothing stays\n");
}

/* Many */

static pid_t many[MANY];
static struct mapping mapped[2][MANY][OF_EACH];
static uint64_t keys_of[MANY][OF_EACH];

static void start_many(void)
{
	area = map_pages(OF_EACH);
	fflush(NULL);
	for (int n = 0; n < MANY; n++) {
		for (int i = 0; i < OF_EACH; i++)
			keys_of[n][i] = i ? 1 + rnd_below(SHARED_KEYS) : unique_key();
		many[n] = fork();
		if (many[n] < 0)
			die("fork: %s", strerror(errno));
		if (many[n])
			continue;
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (int i = 0; i < OF_EACH; i++)
			fill_page(area + i * PAGE, keys_of[n][i]);
		mergeable(area, OF_EACH);
		atomic_fetch_add(&shared->ready, 1);
		for (;;)
			pause();
	}
	while (shared->ready < MANY)
		usleep(10000);
}

static void end_many(void)
{
	for (int n = 0; n < MANY; n++)
		kill(many[n], SIGKILL);
	for (int n = 0; n < MANY; n++)
		waitpid(many[n], NULL, 0);
	munmap(area, OF_EACH * PAGE);
}

static long look_at_many(struct mapping (*map)[OF_EACH])
{
	long merged = 0;

	for (int n = 0; n < MANY; n++) {
		mappings_of(many[n], area, OF_EACH, map[n]);
		for (int i = 0; i < OF_EACH; i++)
			merged += !!(map[n][i].flags & KPF_KSM);
	}
	return merged;
}

static bool many_merged(void *arg)
{
	(void)arg;
	/* Of each content one copy may find no other with room */
	return ksm_get("pages_shared") + ksm_get("pages_sharing") >=
	       MANY * (OF_EACH - 1) - SHARED_KEYS;
}

static bool many_unmoved(long merged)
{
	long moved = 0, is = look_at_many(mapped[1]), counted;

	for (int n = 0; n < MANY; n++)
		for (int i = 0; i < OF_EACH; i++)
			moved += mapped[0][n][i].pfn != mapped[1][n][i].pfn;
	counted = ksm_get("pages_shared") + ksm_get("pages_sharing");
	if (moved || is != merged || counted != merged)
		ksft_print_msg("%ld pages have moved; %ld were merged, %ld are, %ld are counted\n",
			       moved, merged, is, counted);
	return !moved && is == merged && counted == merged;
}

static void with_many(void)
{
	bool ok[2] = { true, true };
	long merged;

	reset();
	ksm_set("pages_to_scan", 20000);
	start_many();
	if (!ksm_until_true(many_merged, NULL, 60))
		die("pages of many processes do not merge");
	ksm_set("run", 0);
	merged = look_at_many(mapped[0]);
	for (int n = 0; n < 4; n++) {
		bool out = n % 2;

		ok[out] = ok[out] && timed_step() && many_unmoved(merged);
	}
	ksft_test_result(ok[0], "insmod with %d processes\n", MANY);
	ksft_test_result(ok[1], "rmmod with %d processes\n", MANY);
	end_many();
}

int main(int argc, char **argv)
{
	test_init(argc, argv);
	if (module_path && module_loaded())
		ksft_exit_fail_msg("rksm is loaded already\n");
	other_path = getenv("RKSM_OTHER_KO");
	test_plan(7);
	write_file("/proc/sys/kernel/numa_balancing", "0");
	write_file("/proc/sys/vm/compaction_proactiveness", "0");
	shared = map_shared(1);

	upgrades();
	end_upgrades();
	with_many();
	end_upgrades();
	test_exit();
}
