// SPDX-License-Identifier: GPL-2.0-only
/*
 * Merges that do not last: futile.
 *
 * Each page is followed through /proc/PID/pagemap and /proc/kpageflags. Nothing but a rewrite
 * breaks a merge here, and which pages a rewrite writes is known, so pages are looked at right
 * before it, and twice a second in between: no merge is missed but one that comes and goes while
 * a rewrite runs, and when one broke is exact.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FUTILE_PAGES (16 * 1024ul)
#define LASTING_NS 10000000000ull
#define LOOK_NS 500000000ull
#define PM_PRESENT (1ull << 63)
#define PM_PFN ((1ull << 55) - 1)
#define KPF_KSM (1ull << 21)
/* Flags of so many frames are read at once, whether all are asked for or not. */
#define RUN 256

struct page {
	uint64_t merged_ns;	/* when it was seen to be merged at first; 0: it is not */
};

struct frame {
	uint64_t pfn;
	size_t page;
};

struct seen {
	struct page *pages;
	struct frame *frames;
	uint64_t *entries;
	size_t n;
	int pagemap, kpageflags;
	uint64_t look_ns;	/* the last look */
	uint64_t merges, broken, futile;
	double merged_sum;
	uint64_t looks;
};

static int by_pfn(const void *a, const void *b)
{
	const struct frame *x = a, *y = b;

	return (x->pfn > y->pfn) - (x->pfn < y->pfn);
}

static void see(struct seen *s, size_t page, bool merged, uint64_t now)
{
	struct page *p = &s->pages[page];

	if (merged && !p->merged_ns) {
		/* Some time since the last look. */
		p->merged_ns = s->look_ns ? s->look_ns + (now - s->look_ns) / 2 : now;
		s->merges++;
	} else if (!merged && p->merged_ns) {
		s->broken++;
		s->futile += now - p->merged_ns < LASTING_NS;
		p->merged_ns = 0;
	}
}

/* Finds merges that are new, and those that a rewrite before this has broken. */
static void look(struct seen *s, const char *area, uint64_t when)
{
	static uint64_t flags[RUN];
	uint64_t merged = 0;
	size_t n = 0;

	if (pread(s->pagemap, s->entries, s->n * 8, (uintptr_t)area / PAGE * 8) !=
	    (ssize_t)(s->n * 8))
		die("cannot read pagemap");
	for (size_t i = 0; i < s->n; i++) {
		if (s->entries[i] & PM_PRESENT)
			s->frames[n++] = (struct frame) { s->entries[i] & PM_PFN, i };
		else
			see(s, i, false, when);
	}
	qsort(s->frames, n, sizeof(*s->frames), by_pfn);
	for (size_t i = 0; i < n;) {
		uint64_t first = s->frames[i].pfn;
		ssize_t got = pread(s->kpageflags, flags, sizeof(flags), first * 8);

		if (!first || got < 8)
			die("cannot read the flags of frame %#llx", (unsigned long long)first);
		for (; i < n && s->frames[i].pfn - first < (size_t)got / 8; i++) {
			bool ksm = flags[s->frames[i].pfn - first] & KPF_KSM;

			merged += ksm;
			see(s, s->frames[i].page, ksm, when);
		}
	}
	s->look_ns = when;
	s->merged_sum += merged;
	s->looks++;
}

static void open_all(struct seen *s, const struct worker *w, size_t pages)
{
	char path[64];

	memset(s, 0, sizeof(*s));
	s->n = pages;
	s->pages = calloc(pages, sizeof(*s->pages));
	s->frames = calloc(pages, sizeof(*s->frames));
	s->entries = calloc(pages, sizeof(*s->entries));
	snprintf(path, sizeof(path), "/proc/%d/pagemap", w->pid);
	s->pagemap = open(path, O_RDONLY | O_CLOEXEC);
	s->kpageflags = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
	if (!s->pages || !s->frames || !s->entries || s->pagemap < 0 || s->kpageflags < 0)
		die("cannot look at the pages: %s", strerror(errno));
}

static void close_all(struct seen *s)
{
	free(s->pages);
	free(s->frames);
	free(s->entries);
	close(s->pagemap);
	close(s->kpageflags);
}

static void measure(const char *kase, unsigned int every_s)
{
	size_t pages = opt.quick ? FUTILE_PAGES / 2 : FUTILE_PAGES;
	struct shape shape = {
		.content = MIXED, .pages = pages, .stride = 1, .distinct = pages / 16,
	};
	unsigned int seconds = opt.quick ? 30 : 75;
	/* One full scan for each second, as rewrite has one for each generation. */
	struct rate rate = { .target = pages, .sleep_ms = 20 };
	uint64_t from, next_look, next_write, generation = 0, written = 0, writes = 0;
	long long cow;
	struct scan before, spent;
	struct worker w;
	struct seen s;

	if (!wants(kase))
		return;
	ksm_reset();
	worker_start(&w, &shape);
	open_all(&s, &w, pages);
	if (governed()) {
		ksm_run_untuned();
	} else {
		ksm_set("smart_scan", "1");
		rate_start(&rate);
	}
	cow = field_of("/proc/vmstat", "cow_ksm");
	before = scan_now();
	from = now_ns();
	next_look = from;
	next_write = from + every_s * 1000000000ull;
	while (now_ns() < from + seconds * 1000000000ull) {
		uint64_t now = now_ns();

		if (now >= next_write) {
			look(&s, w.area, now);
			written += worker_do(&w, OP_REWRITE, ++generation);
			writes++;
			/* What is not merged any more broke at the time of the rewrite. */
			look(&s, w.area, now);
			next_write += every_s * 1000000000ull;
			next_look = now + LOOK_NS;
		} else if (now >= next_look) {
			look(&s, w.area, now);
			next_look = now + LOOK_NS;
		}
		if (!governed())
			rate_adjust(&rate);
		sleep_us(20000);
	}
	spent = scan_since(&before);
	cow = field_of("/proc/vmstat", "cow_ksm") - cow;
	ksm_stop();
	json_begin(kase);
	json_scan(&spent);
	print_rate(&spent);
	json_u64("pages", pages);
	json_u64("rewrites", writes);
	json_u64("written", written);
	json_u64("merges", s.merges);
	json_u64("broken", s.broken);
	json_u64("futile", s.futile);
	json_u64("cow_ksm", cow);
	json_f("merged_mean", s.merged_sum / s.looks);
	json_end();
	close_all(&s);
	worker_kill(&w);
}

void run_futile(void)
{
	measure("1s", 1);
	measure("5s", 5);
}
