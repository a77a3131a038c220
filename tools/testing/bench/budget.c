// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the scanner uses in any window of time while others do their worst: budget.
 *
 * A window's CPU time is to be at most the burst and the percentage of its length. The scanning
 * threads are looked at from outside, every 10 ms. A look takes some time itself, and the window
 * counts from before the first look to after the last, so what is found to be too much was.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define LOOK_US 10000
#define LOOKS_PER_FIND 500
#define CHURNERS 32
#define STORM 10
#define KI 1024ul

struct look {
	uint64_t before_ns, after_ns, cpu_ns;
};

static struct look *looks;
static size_t nr_looks, room;

static void look(void)
{
	struct look *l;

	if (nr_looks == room) {
		room = room ? room * 2 : 4096;
		looks = realloc(looks, room * sizeof(*looks));
		if (!looks)
			die("out of memory");
	}
	l = &looks[nr_looks++];
	if (nr_looks % LOOKS_PER_FIND == 0)
		find_threads();
	l->before_ns = now_ns();
	l->cpu_ns = scan_cpu_ns();
	l->after_ns = now_ns();
}

static void churn(struct rnd *rnd, uint64_t until)
{
	struct worker w[CHURNERS];
	struct shape shape = { .content = MIXED, .pages = 256, .stride = 1, .distinct = 128 };

	for (unsigned int i = 0; i < CHURNERS; i++) {
		shape.first = i * shape.pages;
		worker_start(&w[i], &shape);
	}
	while (now_ns() < until) {
		unsigned int i = rnd_next(rnd) % CHURNERS, j = rnd_next(rnd) % CHURNERS;

		worker_kill(&w[i]);
		shape.first = i * shape.pages;
		worker_start(&w[i], &shape);
		worker_do(&w[j], OP_FORK, rnd_next(rnd));
		sleep_us(10000);
	}
	for (unsigned int i = 0; i < CHURNERS; i++)
		worker_kill(&w[i]);
}

/* At once, and gone at once when time is up, or as soon as their memory is there. */
static void storm(struct clones *c, uint64_t until, bool exits)
{
	struct clone clones[STORM];

	do {
		for (unsigned int i = 0; i < STORM; i++)
			clone_start(c, &clones[i], i);
		for (unsigned int i = 0; i < STORM; i++)
			clone_wait(c, &clones[i]);
		while (!exits && now_ns() < until)
			sleep_us(20000);
		sleep_us(300000);
		for (unsigned int i = 0; i < STORM; i++)
			clone_kill(&clones[i]);
	} while (now_ns() < until);
}

static void rewriting(struct worker *w, uint64_t until, unsigned int every_us)
{
	static uint64_t generation;

	while (now_ns() < until) {
		worker_do(w, OP_REWRITE, ++generation);
		sleep_us(every_us);
	}
}

enum phase {
	QUIET,		/* the burst is saved */
	STORMS,		/* and asked for */
	EXITS,
	CHURN,
	SPARSE,
	VOLATILE,
	PHASES
};

static const char *const phase_names[] = {
	"quiet", "storm", "exits", "churn", "sparse", "volatile",
};

/* Each phase comes once, in random order, before any comes again. */
static void __attribute__((noreturn)) torture(void)
{
	size_t pages = opt.quick ? 2 * KI : 8 * KI;
	struct shape sparse_shape = {
		.content = MIXED, .pages = pages / 4, .stride = 64, .first = 1ul << 40,
		.distinct = pages / 32,
	};
	struct shape volatile_shape = {
		.content = MIXED, .pages = pages, .stride = 1, .first = 2ul << 40,
		.distinct = pages / 16,
	};
	/* Two, as how often one is asked depends on time. */
	struct rnd rnd = { mix64(opt.seed) | 1 }, churn_rnd = { mix64(opt.seed + 1) | 1 };
	struct worker sparse, rewritten;
	struct clones c;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	clones_make(&c, pages / 4);
	worker_start(&sparse, &sparse_shape);
	worker_start(&rewritten, &volatile_shape);
	for (;;) {
		enum phase order[PHASES];

		for (unsigned int i = 0; i < PHASES; i++) {
			unsigned int j = rnd_next(&rnd) % (i + 1);

			order[i] = order[j];
			order[j] = i;
		}
		for (unsigned int i = 0; i < PHASES; i++) {
			unsigned int s = (opt.quick ? 2 : 4) + rnd_next(&rnd) % 4;
			uint64_t until = now_ns() + s * 1000000000ull;

			note("budget: %s for %u s", phase_names[order[i]], s);
			switch (order[i]) {
			case STORMS:
			case EXITS:
				storm(&c, until, order[i] == EXITS);
				break;
			case CHURN:
				churn(&churn_rnd, until);
				break;
			case SPARSE:
				rewriting(&sparse, until, 50000);
				break;
			case VOLATILE:
				rewriting(&rewritten, until, 300000);
				break;
			default:
				sleep_us(s * 1000000);
			}
		}
	}
}

/* The most that was used in windows of at most so many ms; 0: of any length. */
struct most {
	uint64_t cpu_ns, wall_ns;
	double excess_ms;	/* over the burst and the percentage; below 0: it held */
};

static struct most most_of(unsigned int window_ms, unsigned int percent, unsigned int burst_ms)
{
	struct most most = { .excess_ms = -1e9 };
	size_t least = 0, i = 0;
	double least_unpaid = 0;

	for (size_t j = 1; j < nr_looks; j++) {
		size_t from;
		uint64_t cpu, wall;
		double excess;

		if (window_ms) {
			while (looks[j].after_ns - looks[i].before_ns > window_ms * 1000000ull)
				i++;
			from = i;
		} else {
			/* The start that leaves most to be accounted for from then on. */
			double unpaid = looks[j - 1].cpu_ns -
					looks[j - 1].before_ns * (percent / 100.0);

			if (j == 1 || unpaid < least_unpaid) {
				least = j - 1;
				least_unpaid = unpaid;
			}
			from = least;
		}
		if (from >= j)
			continue;
		cpu = looks[j].cpu_ns - looks[from].cpu_ns;
		wall = looks[j].after_ns - looks[from].before_ns;
		excess = cpu / 1e6 - burst_ms - wall / 1e6 * percent / 100;
		if (excess > most.excess_ms)
			most = (struct most){ cpu, wall, excess };
	}
	return most;
}

void run_budget(void)
{
	static const unsigned int windows_ms[] = { 500, 1000, 5000, 30000, 0 };
	unsigned int seconds = opt.minutes ? opt.minutes * 60 : opt.quick ? 45 : 180;
	bool judge = opt.percent || governed(), holds = true;
	unsigned int percent = opt.percent, burst_ms = opt.burst_ms;
	uint64_t until, own = 0;
	struct scan before, spent;
	pid_t pid;

	ksm_reset();
	if (governed()) {
		if (percent)
			ksm_set_u64("cpu_percent", percent);
		if (burst_ms)
			ksm_set_u64("cpu_burst_millisecs", burst_ms);
	}
	/* Who has no governor is only measured, beside the governor's default. */
	percent = governed() ? ksm_get("cpu_percent") : percent ? percent : 5;
	burst_ms = governed() ? ksm_get("cpu_burst_millisecs") : burst_ms ? burst_ms : 1000;
	ksm_run_untuned();
	fflush(stdout);
	pid = fork();
	if (pid < 0)
		die("fork: %s", strerror(errno));
	if (pid == 0)
		torture();
	before = scan_now();
	if (ksm_has("cpu_microsecs"))
		own = ksm_get("cpu_microsecs");
	until = now_ns() + seconds * 1000000000ull;
	while (now_ns() < until) {
		look();
		sleep_us(LOOK_US);
		if (waitpid(pid, NULL, WNOHANG) == pid)
			die("who makes the load died");
	}
	spent = scan_since(&before);
	if (ksm_has("cpu_microsecs"))
		own = ksm_get("cpu_microsecs") - own;
	ksm_stop();
	kill_all(&pid, 1);
	json_begin("torture");
	json_scan(&spent);
	json_u64("percent", percent);
	json_u64("burst_ms", burst_ms);
	json_u64("looks", nr_looks);
	json_u64("judged", judge);
	if (own)
		json_u64("own_cpu_us", own);
	for (size_t i = 0; i < ARRAY_SIZE(windows_ms); i++) {
		struct most m = most_of(windows_ms[i], percent, burst_ms);
		char key[32];

		if (windows_ms[i])
			snprintf(key, sizeof(key), "%ums", windows_ms[i]);
		else
			snprintf(key, sizeof(key), "any");
		note("budget: windows of %s: at most %.1f ms of CPU in %.1f ms, %.1f ms %s", key,
		     m.cpu_ns / 1e6, m.wall_ns / 1e6,
		     m.excess_ms < 0 ? -m.excess_ms : m.excess_ms,
		     m.excess_ms < 0 ? "less than is allowed" : "MORE than is allowed");
		snprintf(key + strlen(key), sizeof(key) - strlen(key), "_cpu_ms");
		json_f(key, m.cpu_ns / 1e6);
		snprintf(strstr(key, "_cpu_ms"), 16, "_excess_ms");
		json_f(key, m.excess_ms);
		if (m.excess_ms > opt.slack_ms)
			holds = false;
	}
	json_u64("slack_ms", opt.slack_ms);
	json_u64("holds", holds);
	json_end();
	if (judge)
		note("budget: %u %% with a burst of %u ms %s (%u ms more are let pass)", percent,
		     burst_ms, holds ? "holds" : "is BROKEN", opt.slack_ms);
	if (judge && !holds)
		exit(1);
}
