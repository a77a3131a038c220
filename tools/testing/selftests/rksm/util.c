// SPDX-License-Identifier: GPL-2.0-only
#define _GNU_SOURCE
#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define KSM_DIR "/sys/kernel/mm/ksm/"
#define RKSM_DIR "/sys/kernel/mm/rksm/"
/* From one ksm_reset() to the next; RKSM_WATCHDOG=N in the environment has it be longer */
#define WATCHDOG_SECONDS 600

const char *const ksm_files[KSM_FILES] = {
	"pages_scanned", "pages_shared", "pages_sharing", "pages_unshared",
	"pages_volatile", "pages_skipped", "ksm_zero_pages", "full_scans",
	"general_profit", "stable_node_chains", "stable_node_dups",
	/* writable ones; advisor_mode before those that it resets */
	"run", "sleep_millisecs", "advisor_mode", "pages_to_scan",
	"merge_across_nodes", "max_page_sharing", "use_zero_pages", "smart_scan",
	"stable_node_chains_prune_millisecs", "advisor_max_cpu",
	"advisor_min_pages_to_scan", "advisor_max_pages_to_scan",
	"advisor_target_scan_time",
};
const char *module_path;
uint64_t test_seed;
static __thread uint64_t rnd_state;
static pid_t main_pid;
static int step_go = -1, step_there = -1;
static char saved[KSM_FILES][64];

struct monitor {
	volatile bool stop;
	volatile unsigned long polls;
	char problem[160];
};
static struct monitor *monitor;
static pid_t monitor_pid;

void die(const char *fmt, ...)
{
	char text[256];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	if (getpid() == main_pid) {
		ksft_exit_fail_msg("%s\n", text);
	} else {
		fprintf(stderr, "# pid %d: %s\n", getpid(), text);
		_exit(KSFT_FAIL);
	}
}

/* Files */

ssize_t read_file(const char *path, char *buf, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n;

	if (fd < 0)
		return -errno;
	n = read(fd, buf, size - 1);
	if (n < 0)
		n = -errno;
	else
		buf[n] = 0;
	close(fd);
	return n;
}

static int write_errno(const char *path, const char *text)
{
	/* O_TRUNC as a shell has it, which is what empties a trace */
	int fd = open(path, O_WRONLY | O_TRUNC | O_CLOEXEC), err = 0;

	if (fd < 0)
		return -errno;
	if (write(fd, text, strlen(text)) < 0)
		err = -errno;
	close(fd);
	errno = -err;
	return err;
}

bool write_file(const char *path, const char *text)
{
	return write_errno(path, text) == 0;
}

/* Random numbers: splitmix64 */

static uint64_t mix(uint64_t z)
{
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
	return z ^ (z >> 31);
}

uint64_t rnd(void)
{
	return mix(rnd_state += 0x9e3779b97f4a7c15ULL);
}

uint64_t rnd_below(uint64_t n)
{
	return rnd() % n;
}

void rnd_fork(uint64_t salt)
{
	rnd_state = mix(rnd_state ^ mix(salt));
}

/* Knobs and counters */

static const char *ksm_path(const char *file)
{
	static char path[128];
	const char *dir = RKSM_DIR;

	for (int i = 0; i < KSM_FILES; i++)
		if (!strcmp(ksm_files[i], file))
			dir = KSM_DIR;
	snprintf(path, sizeof(path), "%s%s", dir, file);
	return path;
}

long ksm_get(const char *file)
{
	char buf[64];
	ssize_t n = read_file(ksm_path(file), buf, sizeof(buf));

	if (n <= 0)
		die("cannot read %s: %s", file, strerror(n ? -n : EIO));
	return strtol(buf, NULL, 10);
}

int ksm_try(const char *file, const char *value)
{
	return write_errno(ksm_path(file), value);
}

int ksm_try_long(const char *file, long value)
{
	char buf[32];

	snprintf(buf, sizeof(buf), "%ld", value);
	return ksm_try(file, buf);
}

void ksm_set(const char *file, long value)
{
	int err = ksm_try_long(file, value);

	if (err)
		die("cannot write %ld to %s: %s", value, file, strerror(-err));
}

static void watchdog_start(void)
{
	const char *seconds = getenv("RKSM_WATCHDOG");

	alarm(seconds ? strtoul(seconds, NULL, 10) : WATCHDOG_SECONDS);
}

void ksm_reset(void)
{
	if (getpid() == main_pid)
		watchdog_start();
	ksm_set("run", 2);
	/* Only rksm has it */
	ksm_try("governor", "knobs");
	if (ksm_try("advisor_mode", "none"))
		die("cannot switch the advisor off");
	ksm_set("run", 0);
	ksm_set("sleep_millisecs", 0);
	ksm_set("pages_to_scan", 2000);
	ksm_set("merge_across_nodes", 1);
	ksm_set("max_page_sharing", 256);
	ksm_set("use_zero_pages", 0);
	ksm_set("smart_scan", 0);
	ksm_set("stable_node_chains_prune_millisecs", 0);
}

void ksm_start(void)
{
	ksm_set("run", 1);
}

void ksm_scans(int n)
{
	long end = ksm_get("full_scans") + n;

	while (ksm_get("full_scans") < end)
		usleep(1000);
}

long ksm_standing(void)
{
	long scanned;

	do {
		scanned = ksm_get("pages_scanned");
		sleep(1);
	} while (ksm_get("pages_scanned") != scanned);
	return scanned;
}

bool ksm_until_true(bool (*cond)(void *arg), void *arg, int scans)
{
	long end = ksm_get("full_scans") + scans;

	for (;;) {
		/* Read first: the condition then saw all of the last scan */
		bool last = ksm_get("full_scans") >= end;

		if (cond(arg))
			return true;
		if (last)
			return false;
		usleep(1000);
	}
}

struct file_value {
	const char *file;
	long value;
};

static bool has_value(void *arg)
{
	struct file_value *want = arg;
	bool equal = ksm_get(want->file) == want->value;

	if (!equal) {
		/* A page that is being looked at is counted nowhere: look between two batches */
		ksm_set("run", 0);
		equal = ksm_get(want->file) == want->value;
		ksm_set("run", 1);
	}
	return equal;
}

bool ksm_until(const char *file, long value, int scans)
{
	struct file_value want = { file, value };

	if (ksm_until_true(has_value, &want, scans))
		return true;
	ksft_print_msg("%s is %ld, not %ld, after %d full scans\n", file,
		       ksm_get(file), value, scans);
	return false;
}

static bool all_zero(bool zero_pages, bool print)
{
	static const char *const files[] = {
		"pages_shared", "pages_sharing", "pages_unshared", "pages_volatile",
		"ksm_zero_pages", "stable_node_chains", "stable_node_dups",
	};
	bool zero = true;

	for (size_t i = 0; i < ARRAY_SIZE(files); i++) {
		long value = ksm_get(files[i]);

		if (!zero_pages && !strcmp(files[i], "ksm_zero_pages"))
			continue;
		if (value && print)
			ksft_print_msg("%s is %ld, not 0\n", files[i], value);
		zero &= !value;
	}
	return zero;
}

static bool comes_to_zero(bool zero_pages)
{
	/* The last one to let go of a process may be a moment behind its end, on either KSM */
	for (int i = 0; i < 50 && ksm_get("run") == 2 && !all_zero(zero_pages, false); i++) {
		usleep(100000);
		/* rksm has to let go by itself; the built-in does when it next scans or unmerges */
		if (!module_loaded()) {
			ksm_set("run", 0);
			ksm_set("run", 2);
		}
	}
	return all_zero(zero_pages, true);
}

bool ksm_all_zero(void)
{
	return comes_to_zero(true);
}

bool ksm_all_but_zero_pages(void)
{
	return comes_to_zero(false);
}

/* The number behind "field" in a file of lines such as "field 12" or "field: 12 kB" */
static long field_of(const char *path, const char *field, bool sum)
{
	FILE *f = fopen(path, "re");
	size_t len = strlen(field);
	char line[256];
	long total = -1;

	if (!f)
		return -1;
	while (fgets(line, sizeof(line), f)) {
		if (strncmp(line, field, len) || !strchr(" :\t", line[len]))
			continue;
		if (total < 0)
			total = 0;
		total += strtol(line + len + strspn(line + len, " :\t"), NULL, 10);
		if (!sum)
			break;
	}
	fclose(f);
	return total;
}

long proc_ksm_stat(pid_t pid, const char *field)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/ksm_stat", pid);
	return field_of(path, field, false);
}

long smaps_ksm_pages(pid_t pid)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/smaps", pid);
	return field_of(path, "KSM", true) / (long)(PAGE >> 10);
}

long vmstat(const char *field)
{
	return field_of("/proc/vmstat", field, false);
}

/* What is mapped */

void mappings_of(pid_t pid, const void *addr, size_t pages, struct mapping *out)
{
	static int kpageflags = -1;
	char path[64];
	int fd;

	if (kpageflags < 0)
		kpageflags = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
	snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || kpageflags < 0)
		die("cannot open %s or kpageflags: %s", path, strerror(errno));
	for (size_t i = 0; i < pages; i++) {
		uint64_t entry, where = (uintptr_t)addr / PAGE + i;

		out[i] = (struct mapping){};
		if (pread(fd, &entry, 8, where * 8) != 8)
			die("cannot read %s: %s", path, strerror(errno));
		if (!(entry & (1ULL << 63)))
			continue;
		out[i].pfn = entry & ((1ULL << 55) - 1);
		if (pread(kpageflags, &out[i].flags, 8, out[i].pfn * 8) != 8)
			die("cannot read kpageflags: %s", strerror(errno));
	}
	close(fd);
}

size_t ksm_mappings(pid_t pid, const void *addr, size_t pages)
{
	struct mapping *maps = malloc(pages * sizeof(*maps));
	size_t n = 0;

	mappings_of(pid, addr, pages, maps);
	for (size_t i = 0; i < pages; i++)
		n += !!(maps[i].flags & KPF_KSM);
	free(maps);
	return n;
}

bool page_is_ksm(const void *addr)
{
	return ksm_mappings(getpid(), addr, 1) == 1;
}

/* Memory */

void *map_at(void *addr, size_t pages)
{
	void *p = mmap(addr, pages * PAGE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | (addr ? MAP_FIXED : 0), -1, 0);

	if (p == MAP_FAILED)
		die("cannot map %zu pages: %s", pages, strerror(errno));
	return p;
}

void *map_pages(size_t pages)
{
	void *p = map_at(NULL, pages);

	madvise(p, pages * PAGE, MADV_NOHUGEPAGE);
	return p;
}

void *map_shared(size_t pages)
{
	void *p = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		die("cannot map %zu shared pages: %s", pages, strerror(errno));
	return p;
}

void mergeable(void *addr, size_t pages)
{
	if (madvise(addr, pages * PAGE, MADV_MERGEABLE))
		die("MADV_MERGEABLE: %s", strerror(errno));
}

/*
 * Key 0 is the zero page. Every fourth key differs from the next page of its kind only in
 * the last 8 bytes and every fifth only in the first 8, so that comparing too little shows.
 */
static uint64_t word_of(uint64_t key, size_t i)
{
	size_t last = PAGE / 8 - 1;

	if (!key)
		return 0;
	if (key % 4 == 0)
		return i == last ? mix(key ^ test_seed) | 1 : 0x5a5a5a5a;
	if (key % 5 == 0)
		return i == 0 ? mix(key ^ test_seed) | 1 : 0xa5a5a5a5;
	return mix(key ^ test_seed) * (2 * i + 1) + i;
}

void fill_page(void *page, uint64_t key)
{
	uint64_t *words = page;

	for (size_t i = 0; i < PAGE / 8; i++)
		words[i] = word_of(key, i);
}

bool page_holds(const void *page, uint64_t key)
{
	const volatile uint64_t *words = page;

	for (size_t i = 0; i < PAGE / 8; i++) {
		if (words[i] != word_of(key, i)) {
			ksft_print_msg("word %zu of %p is %#" PRIx64 ", not %#" PRIx64 "\n",
				       i, page, words[i], word_of(key, i));
			return false;
		}
	}
	return true;
}

uint64_t unique_key(void)
{
	return rnd() | (1ULL << 63);
}

/* Children */

struct child child_start(int (*fn)(void *arg), void *arg)
{
	struct child child;
	int go[2], there[2];

	if (pipe2(go, O_CLOEXEC) || pipe2(there, O_CLOEXEC))
		die("pipe: %s", strerror(errno));
	fflush(NULL);
	child.pid = fork();
	if (child.pid < 0)
		die("fork: %s", strerror(errno));
	if (!child.pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(go[1]);
		close(there[0]);
		step_go = go[0];
		step_there = there[1];
		rnd_fork(getpid());
		_exit(fn(arg));
	}
	close(go[0]);
	close(there[1]);
	child.go = go[1];
	child.there = there[0];
	return child;
}

void child_step(void)
{
	char c = 0;

	if (write(step_there, &c, 1) != 1 || read(step_go, &c, 1) != 1)
		_exit(KSFT_FAIL);
}

bool child_wait_step(struct child *child)
{
	char c;

	return read(child->there, &c, 1) == 1;
}

void child_go(struct child *child)
{
	char c = 0;

	if (write(child->go, &c, 1) != 1)
		die("child %d is gone: %s", child->pid, strerror(errno));
}

static int child_reap(struct child *child)
{
	int status;

	while (waitpid(child->pid, &status, 0) < 0)
		if (errno != EINTR)
			die("waitpid: %s", strerror(errno));
	close(child->go);
	close(child->there);
	return status;
}

int child_end(struct child *child)
{
	char c = 0;

	signal(SIGPIPE, SIG_IGN);
	do {
		if (write(child->go, &c, 1) != 1)
			break;
	} while (child_wait_step(child));
	return child_reap(child);
}

void child_kill(struct child *child)
{
	kill(child->pid, SIGKILL);
	child_reap(child);
}

/* Swap and memory cgroups */

bool swap_on(void)
{
	char buf[512];

	if (read_file("/proc/swaps", buf, sizeof(buf)) > 0 && strstr(buf, "zram"))
		return true;
	return system("modprobe zram 2>/dev/null && echo 128M >/sys/block/zram0/disksize && "
		      "mkswap /dev/zram0 >/dev/null && swapon /dev/zram0") == 0;
}

int cgroup_own(void)
{
	char path[64], file[96], pid[16];

	write_file("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	snprintf(path, sizeof(path), "/sys/fs/cgroup/test-%d", getpid());
	if (mkdir(path, 0755) && errno != EEXIST)
		return -1;
	snprintf(file, sizeof(file), "%s/cgroup.procs", path);
	snprintf(pid, sizeof(pid), "%d", getpid());
	if (!write_file(file, pid))
		return -1;
	snprintf(file, sizeof(file), "%s/memory.reclaim", path);
	return open(file, O_WRONLY | O_CLOEXEC);
}

void cgroup_reclaim(int cgroup, size_t pages)
{
	char text[32];
	int n = snprintf(text, sizeof(text), "%zuK", pages * PAGE >> 10);

	/* -EAGAIN where less could be reclaimed is no problem */
	if (write(cgroup, text, n) < 0)
		return;
}

/* The module */

bool module_loaded(void)
{
	return access("/sys/module/rksm", F_OK) == 0;
}

int module_insert(const char *params)
{
	int fd = open(module_path, O_RDONLY | O_CLOEXEC), err = 0;
	const char *more = getenv("RKSM_PARAMS");
	char all[256];

	if (fd < 0)
		return -errno;
	/* For parameters that the caller knows nothing of; none may be given twice */
	snprintf(all, sizeof(all), "%s %s", more ? more : "", params);
	if (syscall(SYS_finit_module, fd, all, 0))
		err = -errno;
	close(fd);
	return err;
}

int module_remove(void)
{
	return syscall(SYS_delete_module, "rksm", O_NONBLOCK) ? -errno : 0;
}

bool module_refused(const char *params, int err)
{
	int log = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC), got, lines = 0;
	char line[8192];
	ssize_t n;

	if (log < 0 || lseek(log, 0, SEEK_END) < 0)
		die("cannot read the log: %s", strerror(errno));
	got = module_insert(params);
	while ((n = read(log, line, sizeof(line) - 1)) > 0) {
		line[n] = 0;
		if (!strstr(line, "rksm: cannot load"))
			continue;
		lines++;
		ksft_print_msg("%s", strchr(line, ';') + 1);
	}
	close(log);
	if (got != err || lines != 1)
		ksft_print_msg("insmod: %s, not %s; %d lines\n", strerror(-got), strerror(-err),
			       lines);
	return got == err && lines == 1 && !module_loaded();
}

bool module_in(const char *params)
{
	int err = module_insert(params);

	if (err)
		ksft_print_msg("insmod %s %s: %s\n", module_path, params, strerror(-err));
	return !err && module_loaded();
}

bool module_out(void)
{
	int err = module_remove();

	if (err)
		ksft_print_msg("rmmod: %s\n", strerror(-err));
	return !err && !module_loaded();
}

bool module_step(void)
{
	if (!module_path)
		return true;
	return module_loaded() ? module_out() : module_in("check=1");
}

/* The monitor: what a monitoring daemon does, all the time */

static bool well_formed(const char *file, const char *text)
{
	char *end;

	if (!strcmp(file, "advisor_mode"))
		return !strcmp(text, "[none] scan-time\n") ||
		       !strcmp(text, "none [scan-time]\n");
	strtol(text, &end, 10);
	return end != text && !strcmp(end, "\n");
}

static void monitor_loop(void)
{
	int fd[KSM_FILES];
	char buf[128];

	for (int i = 0; i < KSM_FILES; i++)
		fd[i] = open(ksm_path(ksm_files[i]), O_RDONLY | O_CLOEXEC);
	while (!monitor->stop) {
		for (int i = 0; i < KSM_FILES; i++) {
			ssize_t n = pread(fd[i], buf, sizeof(buf) - 1, 0);

			if (n > 0) {
				buf[n] = 0;
				if (well_formed(ksm_files[i], buf))
					continue;
			}
			snprintf(monitor->problem, sizeof(monitor->problem),
				 "%s: read gave %zd (%s), text '%s'", ksm_files[i], n,
				 strerror(errno), n > 0 ? buf : "");
			return;
		}
		monitor->polls++;
		usleep(2000);
	}
}

static void monitor_start(void)
{
	monitor = map_shared(1);
	fflush(NULL);
	monitor_pid = fork();
	if (!monitor_pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		alarm(0);
		monitor_loop();
		_exit(0);
	}
}

/* Test frame */

static void restore_knobs(void)
{
	if (getpid() != main_pid)
		return;
	if (monitor_pid > 0)
		kill(monitor_pid, SIGKILL);
	ksm_try("run", "2");
	/* Twice: the advisor's mode decides what else can be written, and resets it */
	for (int pass = 0; pass < 2; pass++)
		for (int i = KSM_FIRST_RW; i < KSM_FILES; i++)
			if (strcmp(ksm_files[i], "run"))
				ksm_try(ksm_files[i], saved[i]);
	ksm_try("run", saved[KSM_FIRST_RW]);
}

static void watchdog(int sig)
{
	static const char text[] = "Bail out! the test hangs\n";

	if (write(1, text, sizeof(text) - 1) < 0 || sig)
		restore_knobs();
	_exit(KSFT_FAIL);
}

static void usage(const char *name)
{
	printf("usage: %s [--seed N] [--no-module | --module FILE]\n"
	       "  --seed N       repeat a run; the seed is printed\n"
	       "  --no-module    judge the KSM that is there\n"
	       "  --module FILE  where rksm.ko is, for the tests that load it\n", name);
	exit(KSFT_PASS);
}

void test_init(int argc, char **argv)
{
	static const struct option options[] = {
		{ "seed", required_argument, NULL, 's' },
		{ "no-module", no_argument, NULL, 'n' },
		{ "module", required_argument, NULL, 'm' },
		{ "help", no_argument, NULL, 'h' },
		{},
	};
	bool no_module = false;
	int opt;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (getrandom(&test_seed, sizeof(test_seed), 0) < 0)
		test_seed = time(NULL);
	test_seed &= 0xffffffff;
	module_path = getenv("RKSM_KO");
	if (!module_path && !access("/rksm.ko", R_OK))
		module_path = "/rksm.ko";
	while ((opt = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (opt) {
		case 's':
			test_seed = strtoull(optarg, NULL, 0);
			break;
		case 'n':
			no_module = true;
			break;
		case 'm':
			module_path = optarg;
			break;
		default:
			usage(argv[0]);
		}
	}
	if (no_module)
		module_path = NULL;
	rnd_state = mix(test_seed);
	main_pid = getpid();

	ksft_print_header();
	ksft_print_msg("seed %" PRIu64 ", KSM is %s\n", test_seed,
		       module_loaded() ? "rksm" : "built-in");
	if (access(KSM_DIR "run", W_OK))
		ksft_exit_skip("this kernel has no KSM, or the test is not run by root\n");
	for (int i = KSM_FIRST_RW; i < KSM_FILES; i++)
		read_file(ksm_path(ksm_files[i]), saved[i], sizeof(saved[i]));
	/* Writing what was read back must mean the same: "[none] scan-time" */
	strcpy(saved[KSM_FIRST_RW + 2],
	       strstr(saved[KSM_FIRST_RW + 2], "[none]") ? "none" : "scan-time");
	atexit(restore_knobs);
	signal(SIGALRM, watchdog);
	watchdog_start();
	monitor_start();
}

bool monitor_verdict(void)
{
	int status;

	monitor->stop = true;
	waitpid(monitor_pid, &status, 0);
	monitor_pid = 0;
	if (monitor->problem[0])
		ksft_print_msg("%s\n", monitor->problem);
	return !monitor->problem[0] && monitor->polls > 0;
}
