// SPDX-License-Identifier: GPL-2.0-only
/*
 * What it takes to load and unload the module while pages are merged: in-place.
 *
 * The module is not loaded when this begins and ends.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define KI 1024ul
#define COPIES_OF_EACH 8
#define PROCESSES 8
#define FAULTS 16
#define IDLE_US 2000000
#define SETTLE_US 500000
#define MODULE "/rksm.ko"
#define PAGES_SHARED "/sys/kernel/mm/ksm/pages_shared"
#define INITSTATE "/sys/module/rksm/initstate"

enum watcher {
	READER,		/* of a file that changes hands */
	BYSTANDER,	/* faults pages of mergeable memory, and forks */
	SAMPLER,	/* of free memory, while the module's functions run */
	WATCHERS,
};

/* What the watchers have seen since a step began. */
struct seen {
	uint64_t rounds[WATCHERS];
	uint64_t expected;	/* of pages_shared */
	bool differed;
	bool idle;		/* the module's functions do not run */
	uint64_t read_ns, fault_ns, fork_ns;	/* the longest */
	long long least_free;
};

/* NULL: nobody watches. */
static volatile struct seen *seen;
static pid_t watchers[WATCHERS];

enum {
	UNLOAD = 1,
	LOAD = 2,
	UPGRADE = UNLOAD | LOAD,
};

/* What a step takes with nothing merged. */
static uint64_t empty_ns[UPGRADE + 1];

static void longest(volatile uint64_t *max, uint64_t from)
{
	uint64_t took = now_ns() - from;

	if (took > *max)
		*max = took;
}

static void read_file(void)
{
	uint64_t from = now_ns();
	char buf[64];

	if (!read_text(PAGES_SHARED, buf, sizeof(buf)))
		die("cannot read %s", PAGES_SHARED);
	longest(&seen->read_ns, from);
	if (strtoull(buf, NULL, 10) != seen->expected)
		seen->differed = true;
}

static void fault_and_fork(void)
{
	volatile char *area = mmap(NULL, FAULTS * PAGE, PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t from;
	pid_t pid;

	if (area == MAP_FAILED || madvise((void *)area, FAULTS * PAGE, MADV_MERGEABLE))
		die("mergeable memory: %s", strerror(errno));
	for (size_t i = 0; i < FAULTS; i++) {
		from = now_ns();
		area[i * PAGE] = 1;
		longest(&seen->fault_ns, from);
	}
	from = now_ns();
	pid = fork();
	if (pid < 0)
		die("fork: %s", strerror(errno));
	if (pid == 0) {
		area[0] = 2;
		_exit(0);
	}
	while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
	longest(&seen->fork_ns, from);
	munmap((void *)area, FAULTS * PAGE);
}

/* Before its function runs, the kernel holds the module's whole file for a moment. */
static void sample(void)
{
	static unsigned int running;
	long long free_pages;
	char state[16];

	free_pages = memory_now().free_pages;
	if (read_text(INITSTATE, state, sizeof(state)) && strcmp(state, "live\n"))
		running++;
	else
		running = 0;
	if ((seen->idle || running > 1) && free_pages < seen->least_free)
		seen->least_free = free_pages;
}

static void start_watchers(void)
{
	/* They are to take little CPU time from what they watch. */
	static const struct {
		void (*round)(void);
		unsigned int pause_us;
	} does[WATCHERS] = {
		[READER] = { read_file, 2000 },
		[BYSTANDER] = { fault_and_fork, 5000 },
		[SAMPLER] = { sample, 10000 },
	};

	seen = mmap(NULL, sizeof(*seen), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (seen == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	fflush(stdout);
	for (size_t i = 0; i < WATCHERS; i++) {
		watchers[i] = fork();
		if (watchers[i] < 0)
			die("fork: %s", strerror(errno));
		if (watchers[i])
			continue;
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;) {
			does[i].round();
			seen->rounds[i]++;
			sleep_us(does[i].pause_us);
		}
	}
}

static void stop_watchers(void)
{
	for (size_t i = 0; i < WATCHERS; i++) {
		kill(watchers[i], SIGKILL);
		waitpid(watchers[i], NULL, 0);
	}
	munmap((void *)seen, sizeof(*seen));
	seen = NULL;
}

/* Until what the watchers had begun before has been counted. */
static void let_watchers_end(void)
{
	uint64_t goal[WATCHERS];

	for (size_t i = 0; i < WATCHERS; i++)
		goal[i] = seen->rounds[i] + 2;
	for (size_t i = 0; i < WATCHERS; i++) {
		while (seen->rounds[i] < goal[i]) {
			if (waitpid(watchers[i], NULL, WNOHANG) == watchers[i])
				die("a watcher died");
			sleep_us(1000);
		}
	}
}

static uint64_t load(void)
{
	const char *args = getenv("RKSM_ARGS");
	uint64_t from = now_ns();
	int fd = open(MODULE, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || syscall(SYS_finit_module, fd, args ? args : "", 0))
		die("cannot load %s: %s", MODULE, strerror(errno));
	close(fd);
	return now_ns() - from;
}

static uint64_t unload(void)
{
	uint64_t from = now_ns();

	if (syscall(SYS_delete_module, "rksm", O_NONBLOCK))
		die("cannot unload rksm: %s", strerror(errno));
	return now_ns() - from;
}

static void check_same(uint64_t shared, uint64_t sharing, const char *after)
{
	uint64_t shared_now = ksm_get("pages_shared"), sharing_now = ksm_get("pages_sharing");

	if (shared_now != shared || sharing_now != sharing)
		die("after %s: pages_shared is %llu, not %llu, pages_sharing %llu, not %llu", after,
		    (unsigned long long)shared_now, (unsigned long long)shared,
		    (unsigned long long)sharing_now, (unsigned long long)sharing);
}

static void take(unsigned int what, uint64_t *ns)
{
	uint64_t shared = ksm_get("pages_shared"), sharing = ksm_get("pages_sharing");

	*ns = 0;
	if (what & UNLOAD) {
		*ns += unload();
		check_same(shared, sharing, "rmmod");
	}
	if (what & LOAD) {
		*ns += load();
		check_same(shared, sharing, "insmod");
	}
	if (!what)
		sleep_us(IDLE_US);
}

/* Nobody else wants the CPUs. */
static void measure_time(const char *kase, unsigned int what, size_t pages)
{
	uint64_t ns;

	sleep_us(SETTLE_US);
	take(what, &ns);
	json_begin(kase);
	json_u64("pages", pages);
	json_u64("ns", ns);
	if (pages)
		json_u64("empty_ns", empty_ns[what]);
	else
		empty_ns[what] = ns;
	json_end();
}

static void measure_others(const char *kase, unsigned int what, size_t pages)
{
	long long before;
	uint64_t ns;

	shrink_slabs();
	sleep_us(SETTLE_US);
	seen->expected = ksm_get("pages_shared");
	let_watchers_end();
	before = memory_now().free_pages;
	seen->idle = !what;
	seen->differed = false;
	seen->read_ns = 0;
	seen->fault_ns = 0;
	seen->fork_ns = 0;
	seen->least_free = before;
	take(what, &ns);
	let_watchers_end();
	if (seen->differed)
		die("%s: a reader saw another number of pages_shared meanwhile", kase);
	json_begin(kase);
	json_u64("pages", pages);
	json_u64("saved", ksm_get("pages_sharing"));
	if (what)
		json_u64("watched_ns", ns);
	json_u64("read_ns", seen->read_ns);
	json_u64("fault_ns", seen->fault_ns);
	json_u64("fork_ns", seen->fork_ns);
	json_f("peak_bytes", (double)(before - seen->least_free) * PAGE);
	sleep_us(SETTLE_US);
	json_f("kept_bytes", (double)(before - memory_now().free_pages) * PAGE);
	json_end();
}

void run_in_place(void)
{
	size_t pages = opt.quick ? 64 * KI : 1024 * KI, each = pages / PROCESSES;
	struct shape shape = {
		.content = COPIES, .pages = each, .stride = 1, .distinct = pages / COPIES_OF_EACH,
	};
	struct worker w[PROCESSES];

	ksm_set("run", "2");
	ksm_stop();
	/* What is set up once and for all is no part of it. */
	load();
	unload();
	measure_time("insmod, nothing merged", LOAD, 0);
	measure_time("upgrade, nothing merged", UPGRADE, 0);
	measure_time("rmmod, nothing merged", UNLOAD, 0);
	start_watchers();
	measure_others("insmod, nothing merged", LOAD, 0);
	measure_others("upgrade, nothing merged", UPGRADE, 0);
	measure_others("rmmod, nothing merged", UNLOAD, 0);
	stop_watchers();

	load();
	ksm_reset();
	for (size_t i = 0; i < PROCESSES; i++) {
		shape.first = i * each;
		worker_start(&w[i], &shape);
	}
	merge_all(pages - shape.distinct);
	ksm_stop();
	write_text("/proc/sys/vm/drop_caches", "3");
	start_watchers();
	measure_others("idle", 0, pages);
	stop_watchers();
	measure_time("rmmod", UNLOAD, pages);
	measure_time("insmod", LOAD, pages);
	measure_time("upgrade", UPGRADE, pages);
	start_watchers();
	measure_others("rmmod", UNLOAD, pages);
	measure_others("insmod", LOAD, pages);
	measure_others("upgrade", UPGRADE, pages);
	stop_watchers();
	/* With the built-in, what belongs to processes that are gone stays until it scans. */
	for (size_t i = 0; i < PROCESSES; i++)
		worker_kill(&w[i]);
	unload();
}
