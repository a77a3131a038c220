// SPDX-License-Identifier: GPL-2.0-only
/*
 * Counts are exact three full scans after memory has come to rest, whatever was written while the
 * scanner ran beside: each content is one merged page, and nothing counts as volatile.
 *
 * Three processes fill their memory byte by byte, with huge pages and without. So a page is written
 * to between the time it is read and the time it is merged, and two of them become a merged page of
 * contents that are merged already.
 *
 * Two threads that never sleep write to a page each, again and again, through translations that
 * their CPUs remember, and stop at any moment of a full scan.
 *
 * guest: --mem 2G --smp 4
 * runs: cloud-amd64
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "util.h"

#define PROCESSES	3
#define PAGES		(12 * HPAGE / PAGE)
#define ROUNDS		8

#define HOT_WRITERS	2
#define HOT_PAGES	8192
#define HOT_ROUNDS	24

static const struct step {
	/* What each process fills its memory with; with E its last page begins with another byte */
	char fill[PROCESSES + 1];
	long shared, unshared;
} steps[] = {
	{ "caa", 2, 0 },
	{ "cba", 3, 0 },
	{ "ddd", 1, 0 },
	{ "ddE", 1, 1 },
	{ "aab", 2, 0 },
};

/* Shared: what to do next */
static char (*orders)[PROCESSES];

struct writer {
	int number;
	bool huge;
};

static void fill(volatile char *area, char with)
{
	for (volatile char *p = area; p < area + PAGES * PAGE; p++)
		*p = with == 'E' ? 'd' : with;
	if (with == 'E')
		area[(PAGES - 1) * PAGE] = 'e';
}

static int writer(void *arg)
{
	const struct writer *writer = arg;
	char *area = map_at(NULL, PAGES);

	madvise(area, PAGES * PAGE, writer->huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	mergeable(area, PAGES);
	for (;;) {
		char with = (*orders)[writer->number];

		if (!with)
			return 0;
		fill(area, with);
		child_step();
	}
}

static void wait_for(struct child *children, int number)
{
	for (int i = 0; i < number; i++)
		if (!child_wait_step(&children[i]))
			die("a writer has ended");
}

static bool is(const char *file, long expected, const char *fill)
{
	long value = ksm_get(file);

	if (value != expected)
		ksft_print_msg("%s: %s is %ld, not %ld\n", fill, file, value, expected);
	return value == expected;
}

static bool exact(const struct step *step)
{
	const long pages = PROCESSES * PAGES;
	const char *fill = step->fill;
	bool ok = true;

	ok &= is("pages_shared", step->shared, fill);
	ok &= is("pages_sharing", pages - step->shared - step->unshared, fill);
	ok &= is("pages_unshared", step->unshared, fill);
	ok &= is("pages_volatile", 0, fill);
	return ok;
}

/* The first count of fresh memory is where a wrong one was seen, so most rounds end after it */
static bool round_of(bool huge, size_t nr_steps)
{
	static struct writer writers[PROCESSES];
	struct child children[PROCESSES];
	bool ok = true;

	memcpy(*orders, steps[0].fill, PROCESSES);
	for (int i = 0; i < PROCESSES; i++) {
		writers[i] = (struct writer){ i, huge };
		children[i] = child_start(writer, &writers[i]);
	}
	for (size_t n = 0; n < nr_steps; n++) {
		wait_for(children, PROCESSES);
		ksm_scans(3);
		ok &= exact(&steps[n]);
		if (n + 1 == nr_steps)
			break;
		memcpy(*orders, steps[n + 1].fill, PROCESSES);
		for (int i = 0; i < PROCESSES; i++)
			child_go(&children[i]);
	}
	memset(*orders, 0, PROCESSES);
	for (int i = 0; i < PROCESSES; i++)
		child_end(&children[i]);
	return ok;
}

/* Shared: whether the hot pages are written to */
static volatile bool *hot;

static int hot_writer(void *arg)
{
	char *area = map_at(NULL, HOT_PAGES);
	volatile char *page = area;

	(void)arg;
	for (size_t n = 0; n < HOT_PAGES; n++)
		fill_page(area + n * PAGE, n);
	mergeable(area, HOT_PAGES);
	for (char last = 1; last; last++) {
		while (*hot)
			for (size_t i = 0; i < PAGE; i++)
				page[i]++;
		for (size_t i = 0; i < PAGE; i++)
			page[i] = last;
		child_step();
	}
	return 0;
}

static bool hot_rounds(void)
{
	struct child children[HOT_WRITERS];
	bool ok = true;

	*hot = true;
	for (int i = 0; i < HOT_WRITERS; i++)
		children[i] = child_start(hot_writer, NULL);
	for (int n = 0; n < HOT_ROUNDS; n++) {
		ksm_scans(2);
		usleep(rnd_below(4096));
		*hot = false;
		wait_for(children, HOT_WRITERS);
		/* One more than above: a merge can be refused once */
		ksm_scans(4);
		ok &= is("pages_shared", HOT_PAGES, "hot");
		ok &= is("pages_sharing", (HOT_WRITERS - 1) * HOT_PAGES, "hot");
		*hot = true;
		for (int i = 0; i < HOT_WRITERS; i++)
			child_go(&children[i]);
	}
	for (int i = 0; i < HOT_WRITERS; i++)
		child_kill(&children[i]);
	return ok;
}

int main(int argc, char **argv)
{
	bool ok = true;

	test_init(argc, argv);
	test_plan(4);
	ksm_reset();
	orders = map_shared(1);
	hot = map_shared(1);
	/* One page for each content, and a full scan in one batch */
	ksm_set("max_page_sharing", PROCESSES * PAGES);
	ksm_set("pages_to_scan", PROCESSES * PAGES);
	ksm_set("sleep_millisecs", 0);
	ksm_start();

	ksft_test_result(round_of(false, ARRAY_SIZE(steps)), "counts are exact, small pages\n");
	ksft_test_result(round_of(true, ARRAY_SIZE(steps)), "counts are exact, huge pages\n");
	for (int n = 0; n < ROUNDS; n++)
		ok &= round_of(true, 1);
	ksft_test_result(ok, "counts are exact each time that huge pages were filled\n");
	ksft_test_result(hot_rounds(), "counts are exact when pages that were written all the time rest\n");
	test_exit();
}
