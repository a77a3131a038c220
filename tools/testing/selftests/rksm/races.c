// SPDX-License-Identifier: GPL-2.0-only
/*
 * The five races of Documentation/developing/locking.md, provoked: rksm is loaded with delays where
 * each of them would happen, and processes do what it takes, again and again. What goes
 * wrong is for the kernel's own checks to say, and for invariants and contents to show.
 * Loads the module itself.
 *
 * RACES_SECONDS=N in the environment says for how long each, RACES_ONLY=N that only the Nth is.
 *
 * guest: --no-module --numa 2
 * runs: cloud-amd64 sanitizer
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "util.h"

#define PAGES		24
#define OWNERS		12	/* processes whose memory takes long to unmerge */
#define VMAS		64	/* that each of them has */
#define KILLED		4	/* processes that exit meanwhile */

#define PARAMETERS	"check=1 delay=500"
#define LONG_DELAYS	"check=1 delay=200000"
#define CGROUP		"/sys/fs/cgroup/races"

static struct shared {
	atomic_bool stop;
	atomic_ulong done, loads, refused;
	atomic_bool wrong;
} *shared;
static double limit = 5;
static double end;

static double seconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static bool over(void)
{
	return atomic_load(&shared->stop) || seconds() >= end;
}

static char *filled(void)
{
	char *area = map_pages(PAGES);

	for (size_t i = 0; i < PAGES; i++)
		fill_page(area + i * PAGE, i % 6);
	return area;
}

static bool intact(const char *area)
{
	for (size_t i = 0; i < PAGES; i++)
		if (!page_holds(area + i * PAGE, i % 6))
			return false;
	return true;
}

static void must(bool ok)
{
	if (!ok)
		atomic_store(&shared->wrong, true);
}

/* Waits for a child, which may have been killed on the way */
static void reap(pid_t pid)
{
	int status;

	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		return;
	must(WIFEXITED(status) ? !WEXITSTATUS(status) : WTERMSIG(status) == SIGKILL);
	atomic_fetch_add(&shared->done, 1);
}

/* Processes that register, may be scanned, and go */
static void come_and_go(void)
{
	while (!over()) {
		pid_t pid = fork();

		if (!pid) {
			char *area = filled();

			mergeable(area, PAGES);
			usleep(rnd_below(8000));
			if (rnd_below(2))
				kill(getpid(), SIGKILL);
			_exit(!intact(area));
		}
		reap(pid);
		rnd();
	}
}

/* Processes whose address space goes with an exec, again and again */
static void exec_again(void)
{
	while (!over()) {
		pid_t pid = fork();

		if (!pid) {
			char times[16];
			char *argv[] = { "races", "--exec", times, NULL };

			snprintf(times, sizeof(times), "%d", (int)rnd_below(4));
			prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0);
			must(intact(filled()));
			usleep(rnd_below(4000));
			execv("/proc/self/exe", argv);
			_exit(1);
		}
		reap(pid);
		rnd();
	}
}

static int after_exec(int times)
{
	char *area = filled();
	char text[16];
	char *argv[] = { "races", "--exec", text, NULL };

	rnd_fork(getpid());
	usleep(rnd_below(6000));
	if (!intact(area))
		return 1;
	if (times <= 0)
		return 0;
	snprintf(text, sizeof(text), "%d", times - 1);
	execv("/proc/self/exe", argv);
	return 1;
}

/*
 * What is merged is forked, moved, unmapped and migrated, so that rmap walks meet items of vmas
 * that go
 */
static void fork_and_unmap(void)
{
	while (!over()) {
		pid_t pid = fork();

		if (!pid) {
			char *area = filled(), *to;
			pid_t child;
			void *page;
			int node = rnd_below(2), status;

			mergeable(area, PAGES);
			usleep(rnd_below(6000));
			child = fork();
			if (!child) {
				madvise(area, PAGES / 2 * PAGE, MADV_PAGEOUT);
				_exit(!intact(area));
			}
			page = area;
			syscall(SYS_move_pages, 0, 1, &page, &node, &status, 4);
			to = mremap(area, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
				    map_pages(PAGES));
			if (to == MAP_FAILED)
				to = area;
			must(intact(to));
			/* The child keeps its anon_vma alive, or does not */
			munmap(to, PAGES / 2 * PAGE);
			if (rnd_below(2))
				_exit(0);
			status = 0;
			must(child < 0 || (waitpid(child, &status, 0) == child && !status));
			_exit(0);
		}
		reap(pid);
		rnd();
	}
}

/* Has whoever moves the pages of an area walk their rmap */
static void migrate(char *area)
{
	void *pages[PAGES];
	int nodes[PAGES], status[PAGES];

	for (size_t i = 0; i < PAGES; i++) {
		pages[i] = area + i * PAGE;
		nodes[i] = rnd_below(2);
	}
	/* 4: MPOL_MF_MOVE_ALL, also what others map */
	syscall(SYS_move_pages, 0, PAGES, pages, nodes, status, 4);
}

/*
 * An anon_vma goes with its only vma, while the rmap items of the pages that were merged there are
 * left
 */
static void unmap_and_migrate(void)
{
	while (!over()) {
		pid_t pid = fork();

		if (!pid) {
			char *area = filled();

			mergeable(area, PAGES);
			for (int i = 0; i < 6 && !over(); i++) {
				/* Neighbours would share the anon_vma */
				char *gap = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS,
						 -1, 0);
				char *twin = filled();

				mergeable(twin, PAGES);
				for (int tries = 0;
				     tries < 50 && !ksm_mappings(getpid(), twin, PAGES); tries++)
					usleep(10000);
				must(intact(twin));
				munmap(twin, PAGES * PAGE);
				munmap(gap, PAGE);
				for (int times = 0; times < 5; times++) {
					migrate(area);
					usleep(rnd_below(10000));
				}
			}
			_exit(!intact(area));
		}
		reap(pid);
		rnd();
	}
}

static void compact(void)
{
	while (!over()) {
		write_file("/proc/sys/vm/compact_memory", "1");
		usleep(50000);
	}
}

/* The owner of merged pages has no room for them unmerged, and is killed for it */
static void outgrow(void)
{
	char pid[16];

	snprintf(pid, sizeof(pid), "%d", getpid());
	if (!write_file(CGROUP "/cgroup.procs", pid))
		return;
	while (!over()) {
		pid_t child = fork();

		if (!child) {
			char *area = map_pages(1024);

			mergeable(area, 1024);
			for (size_t i = 0; i < 1024; i++) {
				fill_page(area + i * PAGE, 1);
				if (i % 256 == 255)
					usleep(rnd_below(30000));
			}
			usleep(rnd_below(100000));
			_exit(0);
		}
		reap(child);
		rnd();
	}
}

static void unmerge_again(void)
{
	while (!over()) {
		int err = ksm_try("run", "2");

		must(!err || err == -ENOMEM || err == -EINTR);
		if (err)
			atomic_fetch_add(&shared->refused, 1);
		usleep(rnd_below(20000));
		ksm_try("run", "1");
		usleep(rnd_below(60000));
	}
}

static void load_again(void)
{
	while (!over()) {
		int err;

		ksm_try("run", "2");
		err = module_remove();
		must(!err || err == -EWOULDBLOCK);
		if (err) {
			atomic_fetch_add(&shared->refused, 1);
			continue;
		}
		do {
			err = module_insert(rnd_below(2) ? PARAMETERS : PARAMETERS " run=1");
			must(!err || err == -EBUSY || err == -EINTR);
		} while (err && !over());
		if (!err) {
			atomic_fetch_add(&shared->loads, 1);
			ksm_try("run", "1");
		}
		usleep(rnd_below(100000));
	}
}

struct race {
	const char *name;
	void (*part[6])(void);
};

static const struct race races[] = {
	{ "1 unlock order against mmput", { come_and_go, come_and_go, come_and_go, come_and_go } },
	{ "2 exit check before the VMA iterator",
	  { exec_again, exec_again, exec_again, come_and_go } },
	{ "3 release against unregister", { load_again, come_and_go, come_and_go, exec_again } },
	{ "4 OOM deadlock", { unmerge_again, outgrow, outgrow, come_and_go } },
	{ "5 anon_vma: reference and lock",
	  { fork_and_unmap, fork_and_unmap, unmap_and_migrate, compact } },
};

static bool provoke(const struct race *race)
{
	pid_t pid[ARRAY_SIZE(race->part)];
	size_t n = 0;

	if (!module_loaded() && module_insert(PARAMETERS))
		die("rksm does not load");
	ksm_reset();
	ksm_set("use_zero_pages", 1);
	ksm_set("max_page_sharing", 3);
	ksm_start();
	memset(shared, 0, sizeof(*shared));
	end = seconds() + limit;
	fflush(NULL);
	for (; n < ARRAY_SIZE(race->part) && race->part[n]; n++) {
		pid[n] = fork();
		if (pid[n])
			continue;
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		/* Adopts what its children leave behind */
		prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
		alarm(0);
		rnd_fork(n);
		race->part[n]();
		while (wait(NULL) > 0)
			;
		_exit(0);
	}
	while (n)
		waitpid(pid[--n], NULL, 0);
	if (!module_loaded() && module_insert(PARAMETERS))
		die("rksm does not load any more");
	ksm_set("run", 2);
	printf("#| race %-40s %6lu processes, %3lu loads, %3lu refusals%s\n", race->name,
	       atomic_load(&shared->done), atomic_load(&shared->loads),
	       atomic_load(&shared->refused), atomic_load(&shared->wrong) ? ", WRONG" : "");
	return !atomic_load(&shared->wrong) && atomic_load(&shared->done) > 0 &&
	       !ksm_get("pages_shared") && !ksm_get("pages_sharing") && !ksm_get("pages_unshared");
}

static bool enough_merged(void *arg)
{
	(void)arg;
	return ksm_get("pages_sharing") >= OWNERS / 2;
}

/* Has pages that can be merged, in many vmas */
static int owner(void *arg)
{
	char *area = map_pages(VMAS);

	(void)arg;
	for (size_t i = 0; i < VMAS; i++) {
		fill_page(area + i * PAGE, i ? unique_key() : 1);
		if (i % 2)
			mprotect(area + i * PAGE, PAGE, PROT_READ);
	}
	mergeable(area, VMAS);
	child_step();
	return page_holds(area, 1) ? KSFT_PASS : KSFT_FAIL;
}

/*
 * Race 4 once more: whoever writes run=2 holds the engine's lock until all is unmerged, which
 * takes long here. Processes that are killed meanwhile are gone before that.
 */
static bool exits_while_unmerging(void)
{
	struct child owners[OWNERS], killed[KILLED];
	bool ok = true;
	long merged;
	pid_t writer;
	int status = 0;

	if (module_loaded() && (ksm_try("run", "2") || module_remove()))
		die("rksm does not go");
	if (module_insert(LONG_DELAYS))
		die("rksm does not load");
	ksm_reset();
	for (size_t c = 0; c < OWNERS; c++) {
		owners[c] = child_start(owner, NULL);
		ok &= child_wait_step(&owners[c]);
	}
	for (size_t c = 0; c < KILLED; c++) {
		killed[c] = child_start(owner, NULL);
		ok &= child_wait_step(&killed[c]);
	}
	ksm_start();
	ok &= ksm_until_true(enough_merged, NULL, 50);
	merged = ksm_get("pages_sharing");
	writer = fork();
	if (!writer)
		_exit(-ksm_try("run", "2"));
	/* The lock is held: something is unmerged */
	while (ksm_get("pages_sharing") >= merged && waitpid(writer, &status, WNOHANG) != writer)
		usleep(1000);
	for (size_t c = 0; c < KILLED; c++)
		child_kill(&killed[c]);
	if (waitpid(writer, &status, WNOHANG)) {
		ksft_print_msg("%d exits took as long as to unmerge %d processes\n", KILLED,
			       OWNERS);
		ok = false;
	} else {
		kill(writer, SIGKILL);
		waitpid(writer, &status, 0);
	}
	for (size_t c = 0; c < OWNERS; c++)
		ok &= !child_end(&owners[c]);
	if (ksm_try("run", "2") || module_remove() || module_insert(PARAMETERS))
		die("rksm does not load any more");
	return ok;
}

static bool all_merged(void *area)
{
	/* Zero pages are not known as KSM's here */
	return ksm_mappings(getpid(), area, PAGES) >= PAGES - PAGES / 6;
}

int main(int argc, char **argv)
{
	size_t only = 0;

	if (argc == 3 && !strcmp(argv[1], "--exec"))
		return after_exec(atoi(argv[2]));
	if (getenv("RACES_SECONDS"))
		limit = atof(getenv("RACES_SECONDS"));
	if (getenv("RACES_ONLY"))
		only = atoi(getenv("RACES_ONLY"));
	/* As in torture.c: or what is shared since a fork stays merged */
	prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0);
	test_init(argc, argv);
	if (!module_path) {
		monitor_verdict();
		ksft_exit_skip("no module named\n");
	}
	if (module_loaded() && (ksm_try("run", "2") || module_remove()))
		die("rksm does not go");
	test_plan((only ? 1 : ARRAY_SIZE(races)) + (!only || only == 4) + 1);
	shared = map_shared(1);
	swap_on();
	write_file("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	mkdir(CGROUP, 0755);
	write_file(CGROUP "/memory.max", "3M");
	write_file(CGROUP "/memory.swap.max", "0");
	for (size_t r = 0; r < ARRAY_SIZE(races); r++) {
		if (only && only != r + 1)
			continue;
		ksft_test_result(provoke(&races[r]), "race %s\n", races[r].name);
		if (r + 1 == 4)
			ksft_test_result(exits_while_unmerging(),
					 "exits do not wait for who unmerges\n");
	}
	/* As if nothing had been */
	{
		char *area = filled();

		ksm_reset();
		mergeable(area, PAGES);
		ksm_start();
		ksft_test_result(ksm_until_true(all_merged, area, 30) && intact(area),
				 "it merges still\n");
		ksm_set("run", 2);
	}
	test_exit();
}
