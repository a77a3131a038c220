// SPDX-License-Identifier: GPL-2.0-only
/* Processes with nearly the same memory, and how long merging them takes: clones. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define UNIQUE_PERCENT 5
#define POLL_US 10000

struct clone_memory {
	volatile uint64_t ready_ns[MAX_CLONES];
};

/* The same pages in each clone. */
static bool is_unique(size_t page)
{
	return mix64(opt.seed ^ mix64(page + 0xc10e)) % 100 < UNIQUE_PERCENT;
}

void clones_make(struct clones *c, size_t pages)
{
	struct shape shape = { .content = UNIQUE, .pages = pages, .stride = 1 };

	memset(c, 0, sizeof(*c));
	c->pages = pages;
	/* Shared, so that a clone's copy is made by a fault of its own, not by fork. */
	c->image = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
			-1, 0);
	c->shared = mmap(NULL, sizeof(*c->shared), PROT_READ | PROT_WRITE,
			 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (c->image == MAP_FAILED || c->shared == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	fill_memory(c->image, &shape);
	for (size_t i = 0; i < pages; i++)
		c->shareable += !is_unique(i);
}

void clones_free(struct clones *c)
{
	munmap(c->image, c->pages * PAGE);
	munmap(c->shared, sizeof(*c->shared));
}

static void __attribute__((noreturn)) be_clone(const struct clones *c, unsigned int slot,
					       uint64_t nr)
{
	struct shape unique = { .content = UNIQUE };
	char *area;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	area = mmap(NULL, c->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		    -1, 0);
	if (area == MAP_FAILED || madvise(area, c->pages * PAGE, MADV_NOHUGEPAGE))
		die("a clone's memory: %s", strerror(errno));
	/* As QEMU does: the memory is mergeable before there is any. */
	if (strcmp(opt.impl, "none") && madvise(area, c->pages * PAGE, MADV_MERGEABLE))
		die("madvise(MADV_MERGEABLE): %s", strerror(errno));
	for (size_t i = 0; i < c->pages; i++) {
		if (is_unique(i))
			fill_page(area + i * PAGE, &unique, (nr + 1) << 32 | i);
		else
			memcpy(area + i * PAGE, c->image + i * PAGE, PAGE);
	}
	c->shared->ready_ns[slot] = now_ns();
	for (;;)
		pause();
}

void clone_start(struct clones *c, struct clone *one, unsigned int slot)
{
	uint64_t nr = c->started++;

	if (slot >= MAX_CLONES)
		die("too many clones");
	one->slot = slot;
	c->shared->ready_ns[slot] = 0;
	fflush(stdout);
	one->pid = fork();
	if (one->pid < 0)
		die("fork: %s", strerror(errno));
	if (one->pid == 0)
		be_clone(c, slot, nr);
}

uint64_t clone_ready_ns(const struct clones *c, const struct clone *one)
{
	return c->shared->ready_ns[one->slot];
}

uint64_t clone_wait(const struct clones *c, const struct clone *one)
{
	uint64_t at;

	while (!(at = clone_ready_ns(c, one))) {
		if (waitpid(one->pid, NULL, WNOHANG) == one->pid)
			die("a clone died");
		sleep_us(2000);
	}
	return at;
}

uint64_t clone_merged(const struct clone *one)
{
	char path[64], buf[32];

	snprintf(path, sizeof(path), "/proc/%d/ksm_merging_pages", one->pid);
	if (!read_text(path, buf, sizeof(buf)))
		die("cannot read %s", path);
	return strtoull(buf, NULL, 10);
}

void clone_kill(struct clone *one)
{
	kill_all(&one->pid, 1);
	one->pid = 0;
}

#define STORM 20
#define STORM_PAGES 5120ul
#define SAMPLES 1024

static uint64_t series[SAMPLES][3];
static size_t samples;

static uint64_t all_saved(const struct clone *unused)
{
	(void)unused;
	return ksm_saved();
}

/* From FROM until so much is there; prints it, and says whether it came to that. */
static bool until_merged(const char *kase, uint64_t goal, uint64_t from, const struct scan *before,
			 uint64_t (*progress)(const struct clone *one), const struct clone *one,
			 size_t pages)
{
	uint64_t limit = (opt.quick ? 90 : 180) * 1000000000ull, every = limit / SAMPLES, have, now;
	uint64_t next = 0;
	struct scan spent;

	samples = 0;
	do {
		have = progress(one);
		now = now_ns();
		if (now - from >= next && samples < SAMPLES) {
			spent = scan_since(before);
			series[samples][0] = (now - from) / 1000000;
			series[samples][1] = spent.cpu_ns / 1000000;
			series[samples++][2] = have;
			next += every;
		}
		if (have >= goal)
			break;
		sleep_us(POLL_US);
	} while (now - from < limit);
	spent = scan_since(before);
	json_begin(kase);
	json_scan(&spent);
	json_u64("pages", pages);
	json_u64("goal", goal);
	json_u64("saved", have);
	json_u64("reached", have >= goal);
	json_u64("to_goal_ns", now - from);
	json_pairs("series", (const uint64_t (*)[3])series, samples);
	json_end();
	return have >= goal;
}

/* Everything merged and, for who is not governed, nothing new to be found at default knobs. */
static void settle(uint64_t goal)
{
	uint64_t deadline = now_ns() + 90000000000ull;

	if (!governed())
		ksm_run_freely(20000, 1);
	while (ksm_saved() < goal && now_ns() < deadline)
		sleep_us(50000);
	if (ksm_saved() < goal)
		note("only %llu of %llu pages are saved when the host is to have settled",
		     (unsigned long long)ksm_saved(), (unsigned long long)goal);
	if (!governed())
		ksm_run_freely(100, 20);
	sleep_us(opt.quick ? 5000000 : 20000000);
}

/* Memory of which a quarter is rewritten every second, by a process of its own. */
static pid_t start_rewriter(size_t pages)
{
	struct shape shape = {
		.content = MIXED, .pages = pages, .stride = 1, .distinct = pages / 16,
		.first = 1ul << 40,
	};
	struct worker w;
	pid_t pid;

	fflush(stdout);
	pid = fork();
	if (pid < 0)
		die("fork: %s", strerror(errno));
	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	worker_start(&w, &shape);
	for (uint64_t generation = 1;; generation++) {
		sleep_us(1000000);
		worker_do(&w, OP_REWRITE, generation);
	}
}

static void one_more(const char *kase, struct clones *c)
{
	struct scan before = scan_now();
	struct clone one;
	uint64_t from;

	clone_start(c, &one, STORM);
	from = clone_wait(c, &one);
	until_merged(kase, c->shareable * 95 / 100, from, &before, clone_merged, &one, c->pages);
	clone_kill(&one);
}

void run_clones(void)
{
	struct clone clones[STORM];
	struct scan before;
	uint64_t last = 0, possible;
	struct clones c;
	pid_t rewriter;

	ksm_reset();
	clones_make(&c, opt.quick ? STORM_PAGES / 4 : STORM_PAGES);
	possible = (STORM - 1) * c.shareable;
	ksm_run_untuned();
	/* As long as a machine has been idle. */
	sleep_us(3000000);
	before = scan_now();
	for (unsigned int i = 0; i < STORM; i++)
		clone_start(&c, &clones[i], i);
	for (unsigned int i = 0; i < STORM; i++) {
		uint64_t at = clone_wait(&c, &clones[i]);

		last = at > last ? at : last;
	}
	until_merged("at-once", possible * 95 / 100, last, &before, all_saved, NULL,
		     STORM * c.pages);
	settle(possible * 99 / 100);
	one_more("one-more", &c);
	rewriter = start_rewriter(c.pages * 2);
	sleep_us(opt.quick ? 3000000 : 10000000);
	one_more("one-more,busy", &c);
	ksm_stop();
	kill_all(&rewriter, 1);
	for (unsigned int i = 0; i < STORM; i++)
		clone_kill(&clones[i]);
	clones_free(&c);
}
