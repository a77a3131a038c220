// SPDX-License-Identifier: GPL-2.0-only
/* What merging costs others: time to undo it (unmerge), memory to remember it (metadata). */
#define _GNU_SOURCE
#include "bench.h"

#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KI 1024ul
#define SCAN_LIMIT_S 300

static void scan_times(unsigned int times)
{
	struct scan one;

	for (unsigned int i = 0; i < times; i++)
		if (!scan_once(&one, SCAN_LIMIT_S, NULL, NULL))
			die("no full scan in %d s", SCAN_LIMIT_S);
}

void merge_all(uint64_t goal)
{
	for (int i = 0; i < 6; i++) {
		scan_times(1);
		if (ksm_get("pages_sharing") >= goal)
			return;
	}
	die("only %llu of %llu pages merged", (unsigned long long)ksm_get("pages_sharing"),
	    (unsigned long long)goal);
}

void run_unmerge(void)
{
	size_t pages = opt.quick ? 16 * KI : 64 * KI, distinct = pages / 8;
	struct shape shape = {
		.content = COPIES, .pages = pages, .stride = 1, .distinct = distinct,
	};
	uint64_t goal = (pages - distinct) * 99 / 100, cow, run2, advice;
	struct worker w;

	ksm_reset();
	worker_start(&w, &shape);
	merge_all(goal);
	cow = worker_do(&w, OP_TOUCH, 0);
	merge_all(goal);
	run2 = now_ns();
	ksm_set("run", "2");
	run2 = now_ns() - run2;
	if (ksm_get("pages_sharing"))
		die("pages are merged after run=2");
	merge_all(goal);
	advice = worker_do(&w, OP_UNMERGE, 0);
	ksm_stop();
	json_begin("unmerge");
	json_u64("pages", pages);
	json_u64("cow_ns", cow);
	json_u64("run2_ns", run2);
	json_u64("madvise_ns", advice);
	json_end();
	worker_kill(&w);
}

struct memory memory_now(void)
{
	struct memory m = { 0 };
	char *line = NULL;
	size_t room = 0;
	FILE *f;

	/* Fold what the CPUs have counted for themselves. */
	if (!write_text("/proc/sys/vm/stat_refresh", "1"))
		die("cannot write /proc/sys/vm/stat_refresh");
	f = fopen("/proc/zoneinfo", "re");
	if (!f)
		die("cannot read /proc/zoneinfo");
	while (getline(&line, &room, f) > 0) {
		long long n;

		if (sscanf(line, " nr_free_pages %lld", &n) == 1 ||
		    sscanf(line, " count: %lld", &n) == 1)
			m.free_pages += n;
	}
	free(line);
	fclose(f);
	m.slab_bytes = field_of("/proc/meminfo", "Slab") * 1024;
	m.vmalloc_bytes = field_of("/proc/meminfo", "VmallocUsed") * 1024;
	return m;
}

void shrink_slabs(void)
{
	glob_t caches;

	if (glob("/sys/kernel/slab/*/shrink", 0, NULL, &caches))
		die("no /sys/kernel/slab/*/shrink");
	for (size_t i = 0; i < caches.gl_pathc; i++)
		write_text(caches.gl_pathv[i], "1");
	globfree(&caches);
}

/* The kernel's memory before and after the scanner knows all these pages. */
static void metadata(const char *kase, const struct shape *shape, uint64_t goal)
{
	struct memory before, after;
	uint64_t sharing;
	struct worker w;
	double total;

	if (!wants(kase))
		return;
	ksm_reset();
	worker_start(&w, shape);
	write_text("/proc/sys/vm/drop_caches", "3");
	shrink_slabs();
	sleep_us(500000);
	before = memory_now();
	if (goal)
		merge_all(goal);
	else
		scan_times(3);
	sleep_us(500000);
	after = memory_now();
	sharing = ksm_get("pages_sharing");
	/* A page that shares another was given back. */
	total = ((double)before.free_pages - after.free_pages + sharing) * PAGE;
	ksm_stop();
	json_begin(kase);
	json_u64("pages", shape->pages);
	json_u64("saved", sharing);
	json_f("total_bytes", total);
	json_f("slab_bytes", after.slab_bytes - before.slab_bytes);
	json_f("vmalloc_bytes", after.vmalloc_bytes - before.vmalloc_bytes);
	json_end();
	worker_kill(&w);
}

void run_metadata(void)
{
	size_t div = opt.quick ? 4 : 1, copies = 64 * KI / div;
	struct shape dense = { .content = UNIQUE, .pages = 256 * KI / div, .stride = 1 };
	struct shape sparse = { .content = UNIQUE,
				.pages = 32 * KI / (opt.quick ? 2 : 1),
				.stride = 64 };
	struct shape merged = {
		.content = COPIES, .pages = copies, .stride = 1, .distinct = copies / 8,
	};

	metadata("dense", &dense, 0);
	metadata("sparse", &sparse, 0);
	metadata("merged", &merged, copies - copies / 8);
}
