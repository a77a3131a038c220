// SPDX-License-Identifier: GPL-2.0-only
/* What a scan costs: unique to rewrite, thp, and the same with several threads. */
#define _GNU_SOURCE
#include "bench.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define KI 1024ul
#define SCAN_LIMIT_S 300
#define MAX_SCANS 64
#define SERIES 400

/* With quick, the same shapes on a quarter of the pages. */
static size_t scaled(size_t pages)
{
	return opt.quick ? pages / 4 : pages;
}

/* Several full scans; the sum, and the CPU of each. */
struct scans {
	struct scan sum;
	uint64_t cpu[MAX_SCANS];
	size_t n;
};

static bool scan_more(struct scans *s)
{
	struct scan one;

	if (s->n == MAX_SCANS)
		die("too many scans");
	if (!scan_once(&one, SCAN_LIMIT_S, NULL, NULL))
		return false;
	s->cpu[s->n++] = one.cpu_ns;
	s->sum.cpu_ns += one.cpu_ns;
	s->sum.wall_ns += one.wall_ns;
	s->sum.scanned += one.scanned;
	s->sum.skipped += one.skipped;
	s->sum.full_scans += one.full_scans;
	return true;
}

static void scan_times(struct scans *s, unsigned int times)
{
	for (unsigned int i = 0; i < times; i++)
		if (!scan_more(s))
			die("no full scan in %d s", SCAN_LIMIT_S);
}

static void print_scans(const struct scans *s, size_t pages)
{
	json_u64("pages", pages);
	json_scan(&s->sum);
	json_list("scan_cpu_ns", s->cpu, s->n);
}

/*
 * Scans and merges some memory that is not measured: an emulator translates code when it
 * first runs, which for the first merges takes longer than the merges.
 */
void warm_up(void)
{
	struct shape shape = {
		.content = COPIES, .pages = 4 * KI, .stride = 1, .distinct = KI / 2,
	};
	uint64_t deadline = now_ns() + SCAN_LIMIT_S * 1000000000ull, from;
	struct worker w;

	ksm_reset();
	worker_start(&w, &shape);
	from = ksm_get("full_scans");
	ksm_run_freely(1u << 20, 1);
	while (ksm_get("full_scans") < from + 4) {
		if (now_ns() > deadline)
			die("no full scan in %d s", SCAN_LIMIT_S);
		sleep_us(2000);
	}
	ksm_stop();
	worker_kill(&w);
	ksm_set("run", "2");
}

/* Fresh memory that never merges, from the first scan to the fourth. */
static void unmergeable(const char *kase, enum content content, size_t pages)
{
	struct shape shape = { .content = content, .pages = pages, .stride = 1 };
	struct scans scans = { 0 };
	struct worker w;
	uint64_t floor;

	ksm_reset();
	worker_start(&w, &shape);
	floor = worker_do(&w, OP_HASH, 0);
	scan_times(&scans, 4);
	ksm_stop();
	if (ksm_get("pages_sharing"))
		die("pages merged that have no equal");
	json_begin(kase);
	print_scans(&scans, pages);
	json_u64("floor_ns", floor);
	json_end();
	worker_kill(&w);
}

void run_unique(void)
{
	static const struct {
		const char *kase;
		size_t pages;
	} sizes[] = {
		{ "4Ki", 4 * KI }, { "16Ki", 16 * KI }, { "64Ki", 64 * KI }, { "256Ki", 256 * KI },
	};
	/* The quick sizes overlap with the full ones where the time allows it. */
	size_t from = opt.quick ? 0 : 1, to = opt.quick ? 3 : 4;

	for (size_t i = from; i < to; i++)
		if (wants(sizes[i].kase))
			unmergeable(sizes[i].kase, UNIQUE, sizes[i].pages);
}

void run_tail(void)
{
	unmergeable(opt.quick ? "16Ki" : "64Ki", TAIL, scaled(64 * KI));
}

/* Merging from nothing to 99 % of what can be saved. */
struct progress {
	uint64_t goal;
	uint64_t cpu_before, wall_before;	/* of the full scans before this one */
	uint64_t cpu_at, wall_at;		/* when the goal was reached; 0: not yet */
	uint64_t series[SERIES][3];		/* ms, CPU ms, pages saved */
	size_t nr_series;
};

static void watch_progress(void *arg, const struct scan *sofar)
{
	uint64_t saved = ksm_get("pages_sharing") + ksm_get("ksm_zero_pages");
	struct progress *p = arg;
	uint64_t ms = (p->wall_before + sofar->wall_ns) / 1000000;

	if (!p->cpu_at && saved >= p->goal) {
		p->cpu_at = p->cpu_before + sofar->cpu_ns;
		p->wall_at = p->wall_before + sofar->wall_ns;
	}
	if (p->nr_series < SERIES && (!p->nr_series || ms >= p->series[p->nr_series - 1][0] + 20)) {
		uint64_t *row = p->series[p->nr_series++];

		row[0] = ms;
		row[1] = (p->cpu_before + sofar->cpu_ns) / 1000000;
		row[2] = saved;
	}
}

/* Full scans until the goal, at most LIMIT; prints what it took. */
static void merge_and_print(struct progress *p, unsigned int limit, size_t pages)
{
	struct scan one, sum = { 0 };

	while (sum.full_scans < limit && !p->cpu_at) {
		bool done;

		p->cpu_before = sum.cpu_ns;
		p->wall_before = sum.wall_ns;
		done = scan_once(&one, SCAN_LIMIT_S, watch_progress, p);
		sum.cpu_ns += one.cpu_ns;
		sum.wall_ns += one.wall_ns;
		sum.scanned += one.scanned;
		sum.skipped += one.skipped;
		sum.full_scans += done ? one.full_scans : 0;
		if (!done)
			break;
	}
	json_u64("pages", pages);
	json_scan(&sum);
	json_u64("goal", p->goal);
	json_u64("saved", ksm_get("pages_sharing") + ksm_get("ksm_zero_pages"));
	json_u64("reached", p->cpu_at != 0);
	json_u64("cpu_at_goal_ns", p->cpu_at ? p->cpu_at : sum.cpu_ns);
	json_u64("wall_at_goal_ns", p->wall_at ? p->wall_at : sum.wall_ns);
	json_pairs("series", p->series, p->nr_series);
}

static void copies(const char *kase, unsigned int processes)
{
	size_t pages = scaled(64 * KI), distinct = pages / 8;
	struct progress p = { .goal = (pages - distinct) * 99 / 100 };
	struct worker w[8];
	uint64_t floor = 0;

	ksm_reset();
	for (unsigned int i = 0; i < processes; i++) {
		struct shape shape = {
			.content = COPIES, .pages = pages / processes, .stride = 1,
			.first = pages / processes * i, .distinct = distinct,
		};

		worker_start(&w[i], &shape);
		floor += worker_do(&w[i], OP_HASH, 0);
	}
	json_begin(kase);
	merge_and_print(&p, 10, pages);
	json_u64("floor_ns", floor);
	json_u64("processes", processes);
	json_end();
	ksm_stop();
	for (unsigned int i = 0; i < processes; i++)
		worker_kill(&w[i]);
}

void run_copies(void)
{
	if (wants("1process"))
		copies("1process", 1);
	if (wants("8processes"))
		copies("8processes", 8);
}

/*
 * Half copies, half unique, nothing changes. Smart scan looks at an old page every ninth
 * time, so nine scans are one period, and twelve before that make every page old.
 */
void run_steady(void)
{
	size_t pages = scaled(64 * KI), distinct = pages / 16;
	struct shape shape = {
		.content = MIXED, .pages = pages, .stride = 1, .distinct = distinct,
	};
	struct scans warm = { 0 }, scans = { 0 };
	struct worker w;
	uint64_t floor;

	ksm_reset();
	worker_start(&w, &shape);
	floor = worker_do(&w, OP_HASH, 0);
	scan_times(&warm, opt.smart_scan ? 12 : 4);
	scan_times(&scans, opt.smart_scan ? 9 : 4);
	ksm_stop();
	json_begin("steady");
	print_scans(&scans, pages);
	json_u64("saved", ksm_get("pages_sharing"));
	json_u64("goal", pages / 2 - distinct);
	json_u64("floor_ns", floor);
	json_end();
	worker_kill(&w);
}

static uint64_t broken_now(void)
{
	long long n = field_of("/proc/vmstat", "cow_ksm");

	if (n < 0)
		die("no cow_ksm in /proc/vmstat");
	return n;
}

static uint64_t merged_now(void)
{
	return ksm_get("pages_shared") + ksm_get("pages_sharing");
}

/* A random quarter is rewritten while the scanner sleeps between two full scans. */
void run_rewrite(void)
{
	size_t pages = scaled(64 * KI), distinct = pages / 16;
	struct shape shape = {
		.content = MIXED, .pages = pages, .stride = 1, .distinct = distinct,
	};
	struct scans warm = { 0 }, scans = { 0 };
	uint64_t broken, kept, written = 0, floor;
	struct worker w;

	ksm_reset();
	worker_start(&w, &shape);
	floor = worker_do(&w, OP_HASH, 0);
	scan_times(&warm, 3);
	broken = broken_now();
	kept = merged_now();
	for (unsigned int i = 0; i < 6; i++) {
		written += worker_do(&w, OP_REWRITE, i + 1);
		scan_times(&scans, 1);
	}
	/* Every page broken before a scan is off the counters after it. */
	broken = broken_now() - broken;
	ksm_stop();
	json_begin("quarter");
	print_scans(&scans, pages);
	json_u64("written", written);
	json_u64("broken", broken);
	json_u64("merged", merged_now() + broken - kept);
	json_u64("saved", ksm_get("pages_sharing"));
	json_u64("floor_ns", floor);
	json_end();
	worker_kill(&w);
}

/*
 * What is saved of huge pages does not all show in KSM's counters: where the kernel
 * splits one, it maps the zeros in it to the zero page. So the memory is looked at.
 */
static void huge(const char *kase, enum content content, bool use_zero_pages)
{
	size_t pages = scaled(64 * KI), distinct = pages / 8, unique = pages;
	struct shape shape = {
		.content = content, .pages = pages, .stride = 1, .distinct = distinct, .huge = true,
	};
	struct scans scans = { 0 };
	uint64_t before, freed = 0, goal, floor;
	struct worker w;

	if (!wants(kase))
		return;
	ksm_reset();
	ksm_set_u64("use_zero_pages", use_zero_pages);
	worker_start(&w, &shape);
	floor = worker_do(&w, OP_HASH, 0);
	before = worker_huge_pages(&w);
	if (before != pages)
		die("only %" PRIu64 " of %zu pages are in huge ones", before, pages);
	if (content == COPIES)
		unique = distinct;
	else if (content == HUGE_ZERO)
		unique = pages / (HUGE / PAGE);
	goal = (pages - unique) * 99 / 100;
	while (scans.n < (content == UNIQUE ? 4 : 8)) {
		uint64_t held;

		if (!scan_more(&scans))
			break;
		held = worker_pages_held(&w);
		freed = held < pages ? pages - held : 0;
		if (goal && freed >= goal)
			break;
	}
	ksm_stop();
	json_begin(kase);
	print_scans(&scans, pages);
	json_u64("floor_ns", floor);
	json_u64("possible", pages - unique);
	json_u64("freed", freed);
	json_u64("huge_before", before);
	json_u64("huge_kept", worker_huge_pages(&w));
	json_end();
	worker_kill(&w);
}

void run_thp(void)
{
	huge("unique", UNIQUE, false);
	huge("copies", COPIES, false);
	huge("zeros", HUGE_ZERO, false);
	huge("zeros,use_zero_pages", HUGE_ZERO, true);
}

/* As many full scans of fresh memory as unique does, with so many threads */
static void scale(const char *kase, enum content content, unsigned int processes,
		  unsigned int nr_threads)
{
	size_t pages = scaled(64 * KI);
	struct shape shape = {
		.content = content, .pages = pages / processes, .stride = 1, .distinct = pages / 8,
	};
	struct worker w[8];
	struct scans scans = { 0 };
	char name[64];

	snprintf(name, sizeof(name), "%s,%u", kase, nr_threads);
	if (!wants(name))
		return;
	ksm_set_u64("scan_threads", nr_threads);
	/* Also has the threads be there. */
	warm_up();
	ksm_reset();
	for (size_t i = 0; i < processes; i++) {
		shape.first = pages / processes * i;
		worker_start(&w[i], &shape);
	}
	scan_times(&scans, 4);
	ksm_stop();
	json_begin(name);
	print_scans(&scans, pages);
	json_u64("saved", ksm_get("pages_sharing"));
	json_end();
	for (size_t i = 0; i < processes; i++)
		worker_kill(&w[i]);
	ksm_set("run", "2");
	ksm_set_u64("scan_threads", 1);
}

void run_threads(void)
{
	char value[32];

	if (!read_text("/sys/kernel/mm/rksm/scan_threads", value, sizeof(value))) {
		note("S: this KSM has no scan_threads");
		return;
	}
	for (unsigned int n = 1; n <= 2; n++) {
		scale("unique", UNIQUE, 1, n);
		scale("copies1", COPIES, 1, n);
		scale("copies8", COPIES, 8, n);
	}
}
