// SPDX-License-Identifier: GPL-2.0-only
/*
 * Everything at once, for a chosen time: processes that write to, move, protect, lock,
 * fork, exec, swap, migrate and free their memory, and compare every byte of it with a copy
 * that KSM never sees; writers of good and bad values to every file, readers of all of
 * them, compaction, reclaim, kill -9, and the module going and coming back.
 *
 * What each process does follows from the seed, its number and how many had that number
 * before it. When they meet each other does not.
 *
 * TORTURE_SECONDS=N in the environment says for how long, TORTURE_UPGRADES=N how often the
 * module goes and comes back in place at least, RKSM_OTHER_KO=FILE which other build of it
 * comes every other time. TORTURE_GOVERNOR=auto has the governor pace the scanner,
 * TORTURE_GOVERNOR=switch now the one and now the other.
 *
 * runs: none
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "util.h"

#define WORKERS		6
#define RUN		16	/* pages that one mapping has, and madvise, mremap … take */
#define RUNS		12
#define PAGES		(RUN * RUNS)
#define PALETTE		6	/* different page contents; 0 is the zero page */
#define MAX_DEPTH	2	/* of forks */
#define SOFT_OFFLINES	32	/* pages that the guest can do without */
#define DEFAULT_SECONDS	60
#define GRACE_SECONDS	540	/* for what is under way when the time is over */

enum op {
	OP_WRITE, OP_VERIFY, OP_DONTNEED, OP_MERGEABLE, OP_UNMERGEABLE, OP_PRCTL, OP_MREMAP,
	OP_MPROTECT, OP_MLOCK, OP_REMAP, OP_HUGE, OP_PAGEOUT, OP_MIGRATE, OP_SOFT_OFFLINE,
	OP_PROC_MEM, OP_FORK, OP_EXEC, OP_PAUSE, WORKER_OPS,
	OP_DIED = WORKER_OPS, OP_KILLED, OP_KNOB, OP_REFUSED_KNOB, OP_RECLAIM, OP_COMPACT,
	OP_READ_PROC, OP_INSMOD, OP_RMMOD, OP_BUSY, OPS,
};

static const struct {
	const char *name;
	unsigned int weight;	/* how often a worker does it */
} ops[OPS] = {
	[OP_WRITE] = { "writes", 40 },
	[OP_VERIFY] = { "pages verified", 12 },
	[OP_DONTNEED] = { "MADV_DONTNEED", 4 },
	[OP_MERGEABLE] = { "MADV_MERGEABLE", 12 },
	[OP_UNMERGEABLE] = { "MADV_UNMERGEABLE", 3 },
	[OP_PRCTL] = { "PR_SET_MEMORY_MERGE", 2 },
	[OP_MREMAP] = { "mremap", 4 },
	[OP_MPROTECT] = { "mprotect", 5 },
	[OP_MLOCK] = { "mlock and munlock", 3 },
	[OP_REMAP] = { "munmap and mmap", 3 },
	[OP_HUGE] = { "MADV_COLLAPSE", 1 },
	[OP_PAGEOUT] = { "MADV_PAGEOUT", 4 },
	[OP_MIGRATE] = { "move_pages and mbind", 5 },
	[OP_SOFT_OFFLINE] = { "pages soft-offlined", 1 },
	[OP_PROC_MEM] = { "writes through /proc/PID/mem", 4 },
	[OP_FORK] = { "fork", 3 },
	[OP_EXEC] = { "exec", 1 },
	[OP_PAUSE] = { "pauses", 12 },
	[OP_DIED] = { "workers ended", 0 },
	[OP_KILLED] = { "workers killed", 0 },
	[OP_KNOB] = { "values written to files", 0 },
	[OP_REFUSED_KNOB] = { "values refused", 0 },
	[OP_RECLAIM] = { "reclaim", 0 },
	[OP_COMPACT] = { "compaction", 0 },
	[OP_READ_PROC] = { "files of /proc read", 0 },
	[OP_INSMOD] = { "insmod", 0 },
	[OP_RMMOD] = { "rmmod", 0 },
	[OP_BUSY] = { "insmod refused", 0 },
};

static struct shared {
	atomic_ulong done[OPS];
	atomic_int worker[WORKERS];	/* pid that may be killed, or 0 */
	atomic_bool failed;
	atomic_bool stop;
	atomic_long most_merged;
	atomic_int soft_offlines;
} *shared;

static bool two_nodes, can_swap, always_auto;
static const char *governor;
static int reclaim = -1;

static void count(enum op op)
{
	atomic_fetch_add(&shared->done[op], 1);
}

static double seconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

/* The workers' memory */

struct area {
	char *run[RUNS];	/* where each run of pages is */
	int prot[RUNS];
	char *shadow;
	int mem;		/* /proc/self/mem */
	const char *who;
};

static char *page_of(struct area *area, size_t i)
{
	return area->run[i / RUN] + i % RUN * PAGE;
}

static void allow(struct area *area, size_t run, int prot)
{
	if (area->prot[run] == prot)
		return;
	if (mprotect(area->run[run], RUN * PAGE, prot)) {
		/* Splitting a vma takes memory, which fault injection may refuse */
		if (errno != ENOMEM)
			die("mprotect: %s", strerror(errno));
		return;
	}
	area->prot[run] = prot;
}

static bool can_write(struct area *area, size_t i)
{
	allow(area, i / RUN, PROT_READ | PROT_WRITE);
	return area->prot[i / RUN] & PROT_WRITE;
}

static void write_some(struct area *area)
{
	size_t i = rnd_below(PAGES), at = 0, n = PAGE;
	char bytes[PAGE];
	uint64_t word = rnd();

	if (!can_write(area, i))
		return;
	switch (rnd_below(6)) {
	case 0:
		at = rnd_below(PAGE);
		n = 1;
		break;
	case 1:
		at = rnd_below(PAGE / 8) * 8;
		n = 8;
		break;
	case 2:
		at = PAGE - 1;
		n = 1;
		break;
	}
	if (n == PAGE)
		fill_page(bytes, rnd_below(PALETTE));
	else
		memcpy(bytes, &word, n);
	memcpy(page_of(area, i) + at, bytes, n);
	memcpy(area->shadow + i * PAGE + at, bytes, n);
}

static bool verify(struct area *area, size_t first, size_t end)
{
	for (size_t i = first; i < end; i++) {
		const unsigned char *is = (void *)page_of(area, i);
		const unsigned char *was = (void *)(area->shadow + i * PAGE);

		if (area->prot[i / RUN] == PROT_NONE)
			allow(area, i / RUN, PROT_READ);
		if (area->prot[i / RUN] == PROT_NONE || !memcmp(is, was, PAGE))
			continue;
		for (size_t b = 0; b < PAGE; b++) {
			if (is[b] == was[b])
				continue;
			printf("# %s: page %zu, byte %zu: %#x, not %#x\n", area->who, i, b, is[b],
			       was[b]);
			break;
		}
		fflush(stdout);
		return false;
	}
	return true;
}

static void new_run(struct area *area, size_t run)
{
	area->run[run] = rnd_below(4) ? map_pages(RUN) : map_at(NULL, RUN);
	area->prot[run] = PROT_READ | PROT_WRITE;
	memset(area->shadow + run * RUN * PAGE, 0, RUN * PAGE);
}

static void area_init(struct area *area, const char *who)
{
	area->who = who;
	/* Shared memory, which KSM never merges */
	area->shadow = map_shared(PAGES);
	area->mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	for (size_t run = 0; run < RUNS; run++)
		new_run(area, run);
	for (size_t i = 0; i < PAGES; i++) {
		fill_page(area->shadow + i * PAGE, rnd_below(PALETTE));
		memcpy(page_of(area, i), area->shadow + i * PAGE, PAGE);
	}
}

/* Two runs in one huge page's room: the kernel may make one of it, KSM splits it again */
static void collapse(struct area *area, size_t run)
{
	uintptr_t start = (uintptr_t)area->run[run] & ~(HPAGE - 1);

	madvise((void *)start, HPAGE, MADV_COLLAPSE);
}

static void move_run(struct area *area, size_t run)
{
	char *to = mmap(NULL, (RUN + 1) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (to == MAP_FAILED)
		return;
	/* One page off, so that the offset in a page table is another one too */
	if (mremap(area->run[run], RUN * PAGE, RUN * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
		   to + PAGE) == MAP_FAILED) {
		/* The target may be gone, the source is not */
		munmap(to, (RUN + 1) * PAGE);
		return;
	}
	area->run[run] = to + PAGE;
	munmap(to, PAGE);
}

static void migrate(struct area *area, size_t run)
{
	void *pages[RUN];
	int nodes[RUN], status[RUN];

	for (size_t i = 0; i < RUN; i++) {
		pages[i] = area->run[run] + i * PAGE;
		nodes[i] = rnd_below(1 + two_nodes);
	}
	/* 2: MPOL_MF_MOVE; 4: MPOL_MF_MOVE_ALL, also what others map; MPOL_PREFERRED is 1 */
	if (rnd_below(3)) {
		syscall(SYS_move_pages, 0, RUN, pages, nodes, status, rnd_below(2) ? 2 : 4);
	} else {
		unsigned long mask = 1UL << nodes[0];

		syscall(SYS_mbind, area->run[run], RUN * PAGE, 1, &mask, 8 * sizeof(mask), 2);
	}
}

static void soft_offline(struct area *area, size_t i)
{
	if (atomic_fetch_add(&shared->soft_offlines, 1) >= SOFT_OFFLINES)
		return;
	if (!madvise(page_of(area, i), PAGE, MADV_SOFT_OFFLINE))
		count(OP_SOFT_OFFLINE);
}

static void write_proc_mem(struct area *area, size_t i)
{
	char page[PAGE];

	if (!can_write(area, i))
		return;
	fill_page(page, rnd_below(PALETTE));
	if (pwrite(area->mem, page, PAGE, (uintptr_t)page_of(area, i)) == PAGE)
		memcpy(area->shadow + i * PAGE, page, PAGE);
}

/* The workers */

static bool work(struct area *area, unsigned long n, int depth);

/* Waits for those that have ended, or for all that there are; false where its memory was wrong */
static bool reap_children(bool all)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, all ? 0 : WNOHANG)) > 0)
		if (WIFEXITED(status) && WEXITSTATUS(status))
			return false;
	return true;
}

static void fork_worker(struct area *area, int depth)
{
	atomic_int *copied = (atomic_int *)map_shared(1);
	uint64_t salt = rnd();
	pid_t pid = fork();

	if (!pid) {
		/* The parent goes on writing only when this has its own copy of the copy */
		char *shadow = map_shared(PAGES);

		memcpy(shadow, area->shadow, PAGES * PAGE);
		area->shadow = shadow;
		atomic_store(copied, 1);
		close(area->mem);
		area->mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
		area->who = "forked worker";
		rnd_fork(salt);
		if (!verify(area, 0, PAGES) || !work(area, rnd_below(60), depth + 1))
			_exit(KSFT_FAIL);
		if (rnd_below(4) == 0)
			kill(getpid(), SIGKILL);
		_exit(KSFT_PASS);
	}
	while (pid > 0 && !atomic_load(copied)) {
		int status;

		usleep(200);
		if (waitpid(pid, &status, WNOHANG) == pid) {
			/* The OOM killer's or memory that could not be had: no harm */
			pid = -1;
		}
	}
	munmap((void *)copied, PAGE);
}

static void exec_worker(void)
{
	char seed[32], contents[32];
	char *argv[] = { "torture", "--exec", seed, contents, NULL };
	uint64_t own = rnd();
	pid_t pid = fork();

	if (pid)
		return;
	snprintf(seed, sizeof(seed), "%#" PRIx64, own);
	snprintf(contents, sizeof(contents), "%#" PRIx64, test_seed);
	prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0);
	execv("/proc/self/exe", argv);
	_exit(KSFT_PASS);
}

static int after_exec(uint64_t seed, uint64_t contents)
{
	struct area area;

	test_seed = contents;
	rnd_fork(seed);
	if (prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0) != 1)
		return KSFT_FAIL;
	/* Counts nothing: what its parent shares is gone */
	shared = map_shared(1);
	area_init(&area, "worker after exec");
	atomic_store(&shared->soft_offlines, SOFT_OFFLINES);
	return work(&area, 20 + rnd_below(60), MAX_DEPTH) ? KSFT_PASS : KSFT_FAIL;
}

static enum op random_op(void)
{
	unsigned int sum = 0, at;
	int op;

	for (op = 0; op < WORKER_OPS; op++)
		sum += ops[op].weight;
	at = rnd_below(sum);
	for (op = 0; at >= ops[op].weight; op++)
		at -= ops[op].weight;
	return op;
}

/* Does n things; false where a byte was not what it has to be */
static bool work(struct area *area, unsigned long n, int depth)
{
	while (n-- && !atomic_load(&shared->stop)) {
		enum op op = random_op();
		size_t i = rnd_below(PAGES), run = i / RUN;

		if (op != OP_SOFT_OFFLINE && op != OP_VERIFY)
			count(op);
		switch (op) {
		case OP_VERIFY:
			if (!verify(area, run * RUN, (run + 1) * RUN))
				return false;
			atomic_fetch_add(&shared->done[OP_VERIFY], RUN);
			break;
		case OP_DONTNEED:
			if (!madvise(page_of(area, i), PAGE, MADV_DONTNEED))
				memset(area->shadow + i * PAGE, 0, PAGE);
			break;
		case OP_MERGEABLE:
			madvise(area->run[run], RUN * PAGE, MADV_MERGEABLE);
			break;
		case OP_UNMERGEABLE:
			madvise(area->run[run], RUN * PAGE, MADV_UNMERGEABLE);
			break;
		case OP_PRCTL:
			prctl(PR_SET_MEMORY_MERGE, rnd_below(4) > 0, 0, 0, 0);
			break;
		case OP_MREMAP:
			move_run(area, run);
			break;
		case OP_MPROTECT:
			allow(area, run, rnd_below(2) ? PROT_READ : PROT_NONE);
			break;
		case OP_MLOCK:
			if (rnd_below(2))
				mlock(area->run[run], RUN * PAGE);
			else
				munlock(area->run[run], RUN * PAGE);
			break;
		case OP_REMAP:
			munmap(area->run[run], RUN * PAGE);
			new_run(area, run);
			break;
		case OP_HUGE:
			collapse(area, run);
			break;
		case OP_PAGEOUT:
			madvise(area->run[run], RUN * PAGE, MADV_PAGEOUT);
			break;
		case OP_MIGRATE:
			migrate(area, run);
			break;
		case OP_SOFT_OFFLINE:
			soft_offline(area, i);
			break;
		case OP_PROC_MEM:
			write_proc_mem(area, i);
			break;
		case OP_FORK:
			if (depth < MAX_DEPTH)
				fork_worker(area, depth);
			break;
		case OP_EXEC:
			if (depth < MAX_DEPTH)
				exec_worker();
			break;
		case OP_PAUSE:
			usleep(rnd_below(20000));
			if (!reap_children(false))
				return false;
			break;
		default:
			write_some(area);
		}
	}
	/* All of it in the end, children first: they may still change what they share */
	return reap_children(true) && verify(area, 0, PAGES);
}

static int worker(uint64_t number, uint64_t generation)
{
	struct area area;

	rnd_fork(number);
	rnd_fork(generation);
	if (rnd_below(3) == 0)
		prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0);
	area_init(&area, "worker");
	atomic_store(&shared->worker[number], getpid());
	if (!work(&area, 50 + rnd_below(600), 0))
		return KSFT_FAIL;
	atomic_store(&shared->worker[number], 0);
	return KSFT_PASS;
}

/* Starts workers with one number, one after the other, until the time is over */
static int supervisor(uint64_t number)
{
	for (uint64_t generation = 0; !atomic_load(&shared->stop); generation++) {
		int status;
		pid_t pid = fork();

		if (!pid) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			_exit(worker(number, generation));
		}
		if (pid < 0) {
			usleep(10000);
			continue;
		}
		while (waitpid(pid, &status, 0) < 0)
			;
		atomic_store(&shared->worker[number], 0);
		count(WIFSIGNALED(status) ? OP_KILLED : OP_DIED);
		if (WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status) != SIGKILL) {
			printf("# worker %" PRIu64 ".%" PRIu64 " ended with status %#x\n", number,
			       generation, status);
			fflush(stdout);
			atomic_store(&shared->failed, true);
			return KSFT_FAIL;
		}
		/* What the worker left behind is this process's now */
		if (!reap_children(true)) {
			atomic_store(&shared->failed, true);
			return KSFT_FAIL;
		}
	}
	return KSFT_PASS;
}

/* The helpers */

static void write_knobs(void)
{
	static const struct {
		const char *file;
		const char *values[10];
	} tries[] = {
		{ "run", { "1", "1", "1", "1", "1", "0", "2", "3", "-1", "x" } },
		{ "sleep_millisecs",
		  { "0", "0", "1", "5", "20", "-1", "4294967296", "", "a", "1 2" } },
		{ "pages_to_scan",
		  { "1", "64", "100", "500", "5000", "2000", "-5", "y", "", "1e3" } },
		{ "merge_across_nodes", { "0", "1", "2", "-1", "z" } },
		{ "max_page_sharing", { "2", "3", "8", "256", "1", "0", "-3", "q", "4294967299" } },
		{ "use_zero_pages", { "0", "1", "true", "7", "" } },
		{ "smart_scan", { "0", "1", "maybe", "9" } },
		{ "stable_node_chains_prune_millisecs", { "0", "1", "200", "-1", "w" } },
		{ "advisor_mode", { "none", "none", "scan-time", "Scan-time", "none scan-time" } },
		{ "advisor_max_cpu", { "10", "70", "100", "0", "101", "-" } },
		{ "advisor_min_pages_to_scan", { "10", "500", "4294967296", "-1" } },
		{ "advisor_max_pages_to_scan", { "1000", "30000", "x", "-1" } },
		{ "advisor_target_scan_time", { "1", "200", "0", "99999999999" } },
		{ "scan_threads", { "1", "2", "4", "0", "1000000" } },
		{ "pages_shared", { "1", "0" } },
		{ "full_scans", { "0" } },
		/* The governor's own, its file last */
		{ "cpu_percent", { "1", "5", "50", "100", "0", "-1" } },
		{ "pressure_cpu_percent", { "1", "10", "100", "0", "x" } },
		{ "cpu_burst_millisecs", { "1", "100", "2000", "60000", "0", "60001" } },
		{ "governor", { "auto", "knobs", "auto", "knobs", "Auto" } },
	};
	size_t files = ARRAY_SIZE(tries) - (governor ? always_auto : 4);

	while (!atomic_load(&shared->stop)) {
		size_t file = rnd_below(2) ? 0 : rnd_below(files), n = 0;
		int err;

		/* Anew after each insmod, and where nothing is loaded for nothing */
		if (always_auto)
			ksm_try("governor", "auto");
		while (n < ARRAY_SIZE(tries[0].values) && tries[file].values[n])
			n++;
		err = ksm_try(tries[file].file, tries[file].values[rnd_below(n)]);
		count(err ? OP_REFUSED_KNOB : OP_KNOB);
		usleep(rnd_below(40000));
	}
}

static void read_proc(void)
{
	static char buf[65536];
	long merged;

	while (!atomic_load(&shared->stop)) {
		static const char *const files[] = {
			"ksm_stat", "ksm_merging_pages", "smaps", "smaps_rollup", "pagemap", "maps",
		};
		pid_t pid = atomic_load(&shared->worker[rnd_below(WORKERS)]);
		char path[64];

		merged = ksm_get("pages_sharing");
		if (merged > atomic_load(&shared->most_merged))
			atomic_store(&shared->most_merged, merged);
		if (pid) {
			snprintf(path, sizeof(path), "/proc/%d/%s", pid,
				 files[rnd_below(ARRAY_SIZE(files))]);
			if (read_file(path, buf, sizeof(buf)) >= 0)
				count(OP_READ_PROC);
		}
		usleep(rnd_below(10000));
	}
}

static void shake_memory(void)
{
	while (!atomic_load(&shared->stop)) {
		if (rnd_below(2)) {
			write_file("/proc/sys/vm/compact_memory", "1");
			count(OP_COMPACT);
		} else if (reclaim >= 0 && can_swap) {
			cgroup_reclaim(reclaim, 1 + rnd_below(PAGES));
			count(OP_RECLAIM);
		}
		usleep(rnd_below(200000));
	}
}

static void kill_workers(void)
{
	while (!atomic_load(&shared->stop)) {
		pid_t pid;

		usleep(rnd_below(1500000));
		pid = atomic_load(&shared->worker[rnd_below(WORKERS)]);
		if (pid)
			kill(pid, SIGKILL);
	}
}

static long limit = DEFAULT_SECONDS;

/* How many upgrades there are to be, at least */
static unsigned long upgrades;

/* Two builds of the module in turn, where there is another one */
static int load(const char *other)
{
	static const char *const params[] = { "check=1", "run=1 check=1", "adopt=0 check=1" };
	static unsigned int loads;
	const char *own = module_path;
	int err;

	if (other && ++loads % 2)
		module_path = other;
	/* Upgrades are in place */
	err = module_insert(params[rnd_below(upgrades ? 2 : 3)]);
	module_path = own;
	return err;
}

static void load_and_unload(void)
{
	const char *other = getenv("RKSM_OTHER_KO");
	/* An upgrade is an insmod and an rmmod, with as much time between them */
	unsigned long pause = upgrades ? limit * 250000UL / upgrades : 1000000;

	while (!atomic_load(&shared->stop) || atomic_load(&shared->done[OP_RMMOD]) < upgrades) {
		int err = module_loaded() ? module_remove() : load(other);

		if (!err)
			count(module_loaded() ? OP_INSMOD : OP_RMMOD);
		else if (module_loaded())
			die("rmmod: %s", strerror(-err));
		/* Memory that the built-in cannot let go of right now, or that there is not */
		else if (err != -EBUSY && err != -EAGAIN && err != -EINTR && err != -ENOMEM)
			die("insmod: %s", strerror(-err));
		else
			count(OP_BUSY);
		usleep(rnd_below(2 * pause));
	}
}

static pid_t start(uint64_t salt, void (*helper)(void), int (*of)(uint64_t), uint64_t number)
{
	pid_t pid;

	fflush(NULL);
	pid = fork();
	if (pid < 0)
		die("fork: %s", strerror(errno));
	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	alarm(0);
	if (of) {
		prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
		_exit(of(number));
	}
	rnd_fork(salt);
	helper();
	_exit(KSFT_PASS);
}

static bool all_merged(void *area)
{
	return ksm_mappings(getpid(), area, PAGES) == PAGES;
}

/* One set of equal pages merges, as if nothing had been */
static bool merges_still(void)
{
	char *area = map_pages(PAGES);
	bool ok;

	ksm_reset();
	for (size_t i = 0; i < PAGES; i++)
		fill_page(area + i * PAGE, 1 + i % 4);
	mergeable(area, PAGES);
	ksm_start();
	ok = ksm_until_true(all_merged, area, 50);
	for (size_t i = 0; i < PAGES; i++)
		ok &= page_holds(area + i * PAGE, 1 + i % 4);
	ksm_set("run", 2);
	/* Zero pages are not asserted, see contents.c */
	ok &= !ksm_get("pages_shared") && !ksm_get("pages_sharing") && !ksm_get("stable_node_dups");
	return ok;
}

int main(int argc, char **argv)
{
	static void (*const helpers[])(void) = {
		write_knobs, write_knobs, read_proc, shake_memory, kill_workers, load_and_unload,
	};
	pid_t pid[WORKERS + ARRAY_SIZE(helpers)];
	char *option = getenv("TORTURE_SECONDS");
	double end;
	size_t n = 0;
	bool intact = true, helped = true;

	if (argc == 4 && !strcmp(argv[1], "--exec"))
		return after_exec(strtoull(argv[2], NULL, 0), strtoull(argv[3], NULL, 0));

	if (option)
		limit = strtol(option, NULL, 10);
	option = getenv("TORTURE_UPGRADES");
	if (option)
		upgrades = strtoul(option, NULL, 10);
	governor = getenv("TORTURE_GOVERNOR");
	always_auto = governor && !strcmp(governor, "auto");
	/*
	 * Pages that are shared since a fork become KSM pages for both, also where only one side
	 * takes part, and then nobody unmerges the other side's: so all take part.
	 */
	prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0);
	test_init(argc, argv);
	test_plan(5);
	shared = map_shared(1);
	ksm_reset();
	alarm(limit + GRACE_SECONDS);
	two_nodes = !access("/sys/devices/system/node/node1", F_OK);
	can_swap = swap_on();
	reclaim = cgroup_own();
	ksm_start();

	for (uint64_t number = 0; number < WORKERS; number++)
		pid[n++] = start(0, NULL, supervisor, number);
	for (size_t h = 0; h < ARRAY_SIZE(helpers); h++) {
		if (helpers[h] == load_and_unload && !module_path)
			continue;
		pid[n++] = start(1000 + h, helpers[h], NULL, 0);
	}
	for (end = seconds() + limit; seconds() < end && !atomic_load(&shared->failed);)
		usleep(100000);
	atomic_store(&shared->stop, true);
	for (size_t p = 0; p < n; p++) {
		int status;

		waitpid(pid[p], &status, 0);
		if (status && p < WORKERS)
			intact = false;
		else if (status)
			helped = false;
	}

	for (int op = 0; op < OPS; op++)
		ksft_print_msg("%9lu %s\n", atomic_load(&shared->done[op]), ops[op].name);
	ksft_print_msg("%ld pages saved at most\n", atomic_load(&shared->most_merged));
	ksft_test_result(intact && !atomic_load(&shared->failed),
			 "every byte of every process was what it had to be\n");
	ksft_test_result(helped, "everything else went as it has to\n");
	ksft_test_result(atomic_load(&shared->done[OP_RMMOD]) >= upgrades,
			 "%lu upgrades at least\n", upgrades);
	ksft_test_result(atomic_load(&shared->most_merged) > 0 &&
				 atomic_load(&shared->done[OP_VERIFY]) > 0,
			 "pages were merged meanwhile\n");
	if (module_path && !module_loaded() && module_insert("check=1"))
		die("rksm does not load any more");
	ksft_test_result(merges_still(), "it merges and unmerges as if nothing had been\n");
	test_exit();
}
