// SPDX-License-Identifier: GPL-2.0-only
/*
 * The knobs, the scanning threads' CPU time, and full scans one at a time.
 *
 * A scanner is made to do exactly one full scan and stop: pages_to_scan is larger than
 * all memory, and the sleep after a batch, which the end of a full scan also ends, is
 * so long that it only ends because sleep_millisecs is changed.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define KSM_DIR "/sys/kernel/mm/ksm/"
#define RKSM_DIR "/sys/kernel/mm/rksm/"
#define LONG_SLEEP_MS 600000u
#define WHOLE_SCAN (1u << 30)
#define POLL_US 2000
/* Looking at the threads costs more than at a file that is open. */
#define POLLS_ASLEEP 10

static pid_t threads[64];
static size_t nr_threads;
static unsigned int sleep_toggle;

/* Written after every reset, as the guest's command line asks. */
static const char *extra_knobs[8];
static size_t nr_extra_knobs;

/* The built-in's files are in one directory, rksm's own in another. */
static const char *path_of(const char *file)
{
	static char path[128];

	snprintf(path, sizeof(path), KSM_DIR "%s", file);
	if (access(path, F_OK))
		snprintf(path, sizeof(path), RKSM_DIR "%s", file);
	return path;
}

uint64_t ksm_get(const char *file)
{
	const char *path = path_of(file);
	char buf[64];

	if (!read_text(path, buf, sizeof(buf)))
		die("cannot read %s", path);
	return strtoull(buf, NULL, 10);
}

void ksm_set(const char *file, const char *value)
{
	const char *path = path_of(file);

	if (!write_text(path, value))
		die("cannot write %s to %s: %s", value, path, strerror(errno));
}

void ksm_set_u64(const char *file, uint64_t value)
{
	char text[32];

	snprintf(text, sizeof(text), "%" PRIu64, value);
	ksm_set(file, text);
}

void ksm_knob(const char *assignment)
{
	if (!strchr(assignment, '='))
		die("%s is not KNOB=VALUE", assignment);
	if (nr_extra_knobs == ARRAY_SIZE(extra_knobs))
		die("too many knobs");
	extra_knobs[nr_extra_knobs++] = assignment;
}

/* ksmd for the built-in; rksmd for rksm. */
static void find_threads(void)
{
	const char *name = strcmp(opt.impl, "rksm") == 0 ? "rksmd" : "ksmd";
	struct dirent *d;
	DIR *proc = opendir("/proc");

	if (!proc)
		die("cannot read /proc");
	nr_threads = 0;
	while ((d = readdir(proc))) {
		char path[300], comm[32];

		if (!isdigit((unsigned char)d->d_name[0]))
			continue;
		snprintf(path, sizeof(path), "/proc/%s/comm", d->d_name);
		if (!read_text(path, comm, sizeof(comm)) ||
		    strncmp(comm, name, strlen(name)) != 0)
			continue;
		if (nr_threads == ARRAY_SIZE(threads))
			die("more scanning threads than expected");
		threads[nr_threads++] = atoi(d->d_name);
	}
	closedir(proc);
	if (!nr_threads)
		die("no thread is called %s: is %s loaded?", name, opt.impl);
}

static bool asleep(void)
{
	for (size_t i = 0; i < nr_threads; i++) {
		char path[64], buf[256], *state;

		snprintf(path, sizeof(path), "/proc/%d/stat", threads[i]);
		if (!read_text(path, buf, sizeof(buf)))
			die("a scanning thread went away");
		state = strrchr(buf, ')');
		if (!state || (state[2] != 'S' && state[2] != 'I' && state[2] != 'D'))
			return false;
	}
	return true;
}

struct scan scan_now(void)
{
	struct scan s = { 0 };

	for (size_t i = 0; i < nr_threads; i++) {
		char path[64], buf[128];

		snprintf(path, sizeof(path), "/proc/%d/schedstat", threads[i]);
		if (!read_text(path, buf, sizeof(buf)))
			die("cannot read %s", path);
		s.cpu_ns += strtoull(buf, NULL, 10);
	}
	s.wall_ns = now_ns();
	s.scanned = ksm_get("pages_scanned");
	s.skipped = ksm_get("pages_skipped");
	s.full_scans = ksm_get("full_scans");
	return s;
}

struct scan scan_since(const struct scan *before)
{
	struct scan s = scan_now();

	s.cpu_ns -= before->cpu_ns;
	s.wall_ns -= before->wall_ns;
	s.scanned -= before->scanned;
	s.skipped -= before->skipped;
	s.full_scans -= before->full_scans;
	return s;
}

void json_scan(const struct scan *s)
{
	json_u64("cpu_ns", s->cpu_ns);
	json_u64("wall_ns", s->wall_ns);
	json_u64("scanned", s->scanned);
	json_u64("skipped", s->skipped);
	json_u64("full_scans", s->full_scans);
	json_u64("threads", nr_threads);
}

void ksm_stop(void)
{
	ksm_set("run", "0");
}

void ksm_reset(void)
{
	char mode[64];

	ksm_set("run", "2");
	ksm_set("run", "0");
	if (read_text(KSM_DIR "advisor_mode", mode, sizeof(mode)) && !strstr(mode, "[none]"))
		ksm_set("advisor_mode", "none");
	ksm_set_u64("smart_scan", opt.smart_scan);
	ksm_set("use_zero_pages", "0");
	ksm_set("merge_across_nodes", "1");
	ksm_set("max_page_sharing", "256");
	for (size_t i = 0; i < nr_extra_knobs; i++) {
		const char *value = strchr(extra_knobs[i], '=');
		char name[64];

		snprintf(name, sizeof(name), "%.*s", (int)(value - extra_knobs[i]), extra_knobs[i]);
		ksm_set(name, value + 1);
	}
	ksm_set_u64("pages_to_scan", WHOLE_SCAN);
	sleep_toggle = 0;
	ksm_set_u64("sleep_millisecs", LONG_SLEEP_MS);
	find_threads();
}

void ksm_run_freely(unsigned int pages, unsigned int sleep_ms)
{
	ksm_set_u64("pages_to_scan", pages);
	ksm_set_u64("sleep_millisecs", sleep_ms);
	if (ksm_get("run") != 1)
		ksm_set("run", "1");
}

static pid_t moved[ARRAY_SIZE(threads)];
static size_t nr_moved;

/* The threads outlive the program. */
static void run_anywhere(void)
{
	cpu_set_t cpus;

	memset(&cpus, 0xff, sizeof(cpus));
	for (size_t i = 0; i < nr_moved; i++)
		sched_setaffinity(moved[i], sizeof(cpus), &cpus);
}

void ksm_run_on(unsigned int cpu)
{
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	memcpy(moved, threads, sizeof(moved));
	nr_moved = nr_threads;
	if (atexit(run_anywhere))
		die("atexit");
	for (size_t i = 0; i < nr_threads; i++)
		if (sched_setaffinity(threads[i], sizeof(cpus), &cpus))
			die("sched_setaffinity of %d: %s", threads[i], strerror(errno));
}

#define RATE_PERIOD_NS 400000000ull

void rate_adjust(struct rate *r)
{
	struct scan spent;
	double change;

	if (now_ns() - r->last.wall_ns < RATE_PERIOD_NS)
		return;
	spent = scan_since(&r->last);
	change = (double)r->target * spent.wall_ns / 1e9 / (spent.scanned + spent.skipped + 1);
	if (change > 4)
		change = 4;
	r->pages *= change;
	if (r->pages < 1)
		r->pages = 1;
	if (r->pages > 1e6)
		r->pages = 1e6;
	ksm_set_u64("pages_to_scan", r->pages);
	r->last = scan_now();
}

void rate_start(struct rate *r)
{
	r->pages = (double)r->target * r->sleep_ms / 1000;
	ksm_run_freely(r->pages, r->sleep_ms);
	r->last = scan_now();
	for (int i = 0; i < 4; i++) {
		sleep_us(RATE_PERIOD_NS / 1000);
		rate_adjust(r);
	}
}

void print_rate(const struct scan *spent)
{
	json_f("rate", (double)(spent->scanned + spent->skipped) * 1e9 / spent->wall_ns);
}

/* As ksm_get("full_scans"), as cheaply as can be: scanning threads may want all CPUs. */
static uint64_t full_scans(void)
{
	static int fd = -1;
	char buf[32] = "";

	if (fd < 0)
		fd = open(KSM_DIR "full_scans", O_RDONLY | O_CLOEXEC);
	if (fd < 0 || pread(fd, buf, sizeof(buf) - 1, 0) <= 0)
		die("cannot read full_scans");
	return strtoull(buf, NULL, 10);
}

static void next_batch(void)
{
	if (ksm_get("run") != 1)
		ksm_set("run", "1");
	sleep_toggle ^= 1;
	ksm_set_u64("sleep_millisecs", LONG_SLEEP_MS + sleep_toggle);
}

bool scan_once(struct scan *spent, unsigned int limit_s, watch_fn watch, void *arg)
{
	struct scan before = scan_now();
	uint64_t deadline = now_ns() + limit_s * 1000000000ull;
	unsigned int idle = 0, polls = 0;
	bool done = true;
	uint64_t end;

	next_batch();
	while (full_scans() == before.full_scans) {
		if (now_ns() > deadline) {
			done = false;
			break;
		}
		if (watch) {
			struct scan sofar = scan_since(&before);

			watch(arg, &sofar);
		}
		sleep_us(POLL_US);
		if (++polls % POLLS_ASLEEP)
			continue;
		/* A batch that ended before the full scan did. */
		idle = asleep() ? idle + 1 : 0;
		if (idle == 3) {
			next_batch();
			idle = 0;
		}
	}
	end = now_ns();
	/* The run time of a thread is exact once it sleeps. */
	for (int i = 0; done && i < 500 && !asleep(); i++)
		sleep_us(POLL_US);
	*spent = scan_since(&before);
	spent->wall_ns = end - before.wall_ns;
	if (watch)
		watch(arg, spent);
	return done;
}
