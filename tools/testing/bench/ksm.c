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
/* What each had used when it was looked at last, and what those had that are gone. */
static uint64_t used_ns[ARRAY_SIZE(threads)], gone_ns;
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

bool governed(void)
{
	return strcmp(opt.impl, "auto") == 0;
}

bool ksm_has(const char *file)
{
	return access(path_of(file), F_OK) == 0;
}

uint64_t ksm_saved(void)
{
	return ksm_get("pages_sharing") + ksm_get("ksm_zero_pages");
}

/* ksmd for the built-in; rksmd for rksm. */
void find_threads(void)
{
	const char *name = strcmp(opt.impl, "builtin") == 0 ? "ksmd" : "rksmd";
	uint64_t were_used[ARRAY_SIZE(threads)];
	pid_t were[ARRAY_SIZE(threads)];
	size_t nr_were = nr_threads;
	struct dirent *d;
	DIR *proc = opendir("/proc");

	if (!proc)
		die("cannot read /proc");
	memcpy(were, threads, sizeof(were));
	memcpy(were_used, used_ns, sizeof(were_used));
	memset(used_ns, 0, sizeof(used_ns));
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
		threads[nr_threads] = atoi(d->d_name);
		for (size_t i = 0; i < nr_were; i++) {
			if (were[i] == threads[nr_threads]) {
				used_ns[nr_threads] = were_used[i];
				were_used[i] = 0;
			}
		}
		nr_threads++;
	}
	closedir(proc);
	for (size_t i = 0; i < nr_were; i++)
		gone_ns += were_used[i];
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

uint64_t scan_cpu_ns(void)
{
	uint64_t sum = gone_ns;

	for (size_t i = 0; i < nr_threads; i++) {
		char path[64], buf[128];

		snprintf(path, sizeof(path), "/proc/%d/schedstat", threads[i]);
		if (read_text(path, buf, sizeof(buf)))
			used_ns[i] = strtoull(buf, NULL, 10);
		else if (!governed())
			die("cannot read %s", path);
		sum += used_ns[i];
	}
	return sum;
}

uint64_t scan_sleeps(void)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < nr_threads; i++) {
		char path[64];
		long long n;

		snprintf(path, sizeof(path), "/proc/%d/status", threads[i]);
		n = field_of(path, "voluntary_ctxt_switches");
		if (n < 0)
			die("no voluntary_ctxt_switches in %s", path);
		sum += n;
	}
	return sum;
}

struct scan scan_now(void)
{
	struct scan s = { .cpu_ns = scan_cpu_ns() };

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
	if (ksm_has("governor"))
		ksm_set("governor", "knobs");
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

/* What the kernel begins with. */
void ksm_run_untuned(void)
{
	ksm_set("smart_scan", "1");
	ksm_set_u64("pages_to_scan", 100);
	ksm_set_u64("sleep_millisecs", 20);
	if (governed())
		ksm_set("governor", "auto");
	ksm_set("run", "1");
}

uint64_t ksm_merge_all(unsigned int limit_s)
{
	uint64_t deadline = now_ns() + limit_s * 1000000000ull, from, before;

	if (governed())
		ksm_set("governor", "knobs");
	ksm_set("smart_scan", "0");
	ksm_run_freely(20000, 1);
	do {
		before = ksm_saved();
		from = ksm_get("full_scans");
		while (ksm_get("full_scans") < from + 3) {
			if (now_ns() > deadline)
				return ksm_saved();
			sleep_us(20000);
		}
	} while (ksm_saved() > before + before / 200);
	return ksm_saved();
}

#define SHARE_PERIOD_NS 250000000ull
/* Few long sleeps: each costs a wake-up, which is dear to who has few pages to look at. */
#define SHARE_SLEEP_MS 100
/*
 * For each percent. Pages that have been passed over for a while cost next to nothing, and merging
 * them a hundred times as much, which is noticed after a batch or two.
 */
#define SHARE_MOST_PAGES 256
/* In which the tokens that are left are to be used up. */
#define SHARE_SOON_NS 2e9
/* What a page is taken to cost until that has been seen. */
#define SHARE_PAGE_NS 20000

static double share_wanted(const struct share *s, double ns)
{
	double want = ns * s->percent / 100 + s->tokens_ns * ns / SHARE_SOON_NS;
	double least = ns * s->percent / 1000;

	return want > least ? want : least;
}

void share_start(struct share *s)
{
	if (governed()) {
		s->was_percent = ksm_get("cpu_percent");
		s->was_burst_ms = ksm_get("cpu_burst_millisecs");
		ksm_set_u64("cpu_percent", s->percent);
		ksm_set_u64("cpu_burst_millisecs", s->burst_ms);
		s->burst_ms = ksm_get("cpu_burst_millisecs");
		ksm_run_untuned();
		return;
	}
	s->tokens_ns = s->burst_ms * 1e6;
	s->pages = share_wanted(s, SHARE_SLEEP_MS * 1e6) / SHARE_PAGE_NS;
	ksm_run_freely(s->pages, SHARE_SLEEP_MS);
	s->wall_ns = now_ns();
	s->cpu_ns = scan_cpu_ns();
}

void share_stop(const struct share *s)
{
	if (governed()) {
		ksm_set_u64("cpu_percent", s->was_percent);
		ksm_set_u64("cpu_burst_millisecs", s->was_burst_ms);
	}
	ksm_stop();
}

void share_adjust(struct share *s)
{
	uint64_t wall = now_ns(), cpu;
	double passed = wall - s->wall_ns, most = s->percent * SHARE_MOST_PAGES, spent, change;

	if (governed())
		return;
	cpu = scan_cpu_ns();
	spent = cpu - s->cpu_ns;
	/* Too much is noticed at once. */
	if (passed < SHARE_PERIOD_NS && spent < 1.5 * share_wanted(s, SHARE_PERIOD_NS))
		return;
	s->tokens_ns += passed * s->percent / 100 - spent;
	if (s->tokens_ns > s->burst_ms * 1e6)
		s->tokens_ns = s->burst_ms * 1e6;
	change = share_wanted(s, passed) / (spent + 1);
	change = change > 2 ? 2 : change < 0.25 ? 0.25 : change;
	s->pages *= change;
	s->pages = s->pages < 1 ? 1 : s->pages > most ? most : s->pages;
	ksm_set_u64("pages_to_scan", s->pages);
	s->wall_ns = wall;
	s->cpu_ns = cpu;
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
