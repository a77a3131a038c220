// SPDX-License-Identifier: GPL-2.0-only
/* What scanners save that use the same share of a CPU: equal-cpu. */
#define _GNU_SOURCE
#include "bench.h"

#include <stdio.h>

#define SAMPLES 512
#define SAMPLE_NS 500000000ull
#define POLL_US 50000
/* What 5 s of the share come to. */
#define BURST_S 5
#define COMERS 12
#define COMER_PAGES 8192ul
#define STATIC_PROCESSES 4
#define STATIC_PAGES (256 * 1024ul)

/* What goes on meanwhile. */
struct scene {
	const char *name;
	void (*start)(void);
	/* What could be saved just now; 0: what is saved in the end. */
	uint64_t (*go_on)(uint64_t ns);
	void (*end)(void);
};

static pid_t apps[2 * APPS_EACH];

static void apps_start(void)
{
	start_apps(apps);
}

static void apps_end(void)
{
	kill_all(apps, ARRAY_SIZE(apps));
}

static struct clones image;
static struct clone comers[COMERS];
static struct rnd choice;
static uint64_t replaced;

static void comers_start(void)
{
	choice.s = mix64(opt.seed) | 1;
	replaced = 0;
	clones_make(&image, opt.quick ? COMER_PAGES / 4 : COMER_PAGES);
	for (unsigned int i = 0; i < COMERS; i++)
		clone_start(&image, &comers[i], i);
	for (unsigned int i = 0; i < COMERS; i++)
		clone_wait(&image, &comers[i]);
}

/* One is replaced every two seconds, so that each lives for 24 s on average. */
static uint64_t comers_go_on(uint64_t ns)
{
	uint64_t ready = 0;

	while (ns / 2000000000 > replaced) {
		unsigned int i = rnd_next(&choice) % COMERS;

		clone_kill(&comers[i]);
		clone_start(&image, &comers[i], i);
		replaced++;
	}
	for (unsigned int i = 0; i < COMERS; i++)
		ready += clone_ready_ns(&image, &comers[i]) != 0;
	return ready ? (ready - 1) * image.shareable : 0;
}

static void comers_end(void)
{
	for (unsigned int i = 0; i < COMERS; i++)
		clone_kill(&comers[i]);
	clones_free(&image);
}

static struct worker still[STATIC_PROCESSES];

static void static_start(void)
{
	size_t pages = (opt.quick ? STATIC_PAGES / 4 : STATIC_PAGES) / STATIC_PROCESSES;

	for (unsigned int i = 0; i < STATIC_PROCESSES; i++) {
		struct shape shape = {
			.content = MIXED, .pages = pages, .stride = 1, .first = i * pages,
			.distinct = pages / 4,
		};

		worker_start(&still[i], &shape);
	}
}

static void static_end(void)
{
	for (unsigned int i = 0; i < STATIC_PROCESSES; i++)
		worker_kill(&still[i]);
}

static void measure(const struct scene *scene, unsigned int percent)
{
	uint64_t window = (opt.quick ? 20 : 90) * 1000000000ull, from, now, possible = 0;
	struct share share = { .percent = percent, .burst_ms = percent * BURST_S * 10 };
	double saved_sum = 0, possible_sum = 0;
	static uint64_t series[SAMPLES][3];
	struct scan before, spent;
	size_t samples = 0;
	char kase[64];

	snprintf(kase, sizeof(kase), "%s,%u%%", scene->name, percent);
	if (!wants(kase))
		return;
	ksm_reset();
	ksm_set("smart_scan", "1");
	scene->start();
	before = scan_now();
	share_start(&share);
	from = now_ns();
	do {
		uint64_t could = scene->go_on ? scene->go_on(now_ns() - from) : 0;

		share_adjust(&share);
		now = now_ns();
		if (now - from >= samples * SAMPLE_NS && samples < SAMPLES) {
			uint64_t *row = series[samples++];

			row[0] = (now - from) / 1000000;
			row[1] = (scan_cpu_ns() - before.cpu_ns) / 1000000;
			row[2] = ksm_saved();
			saved_sum += row[2];
			possible_sum += could;
			possible = could;
		}
		sleep_us(POLL_US);
	} while (now - from < window);
	spent = scan_since(&before);
	if (!scene->go_on)
		possible = ksm_merge_all(120);
	share_stop(&share);
	json_begin(kase);
	json_scan(&spent);
	json_u64("percent", percent);
	json_u64("burst_ms", share.burst_ms);
	json_u64("possible", possible);
	json_u64("saved", series[samples - 1][2]);
	json_f("saved_mean", saved_sum / samples);
	json_f("possible_mean", scene->go_on ? possible_sum / samples : possible);
	json_u64("window_ms", window / 1000000);
	json_pairs("series", (const uint64_t (*)[3])series, samples);
	json_end();
	scene->end();
}

void run_equal_cpu(void)
{
	static const struct scene scenes[] = {
		{ "static", static_start, NULL, static_end },
		{ "clones", comers_start, comers_go_on, comers_end },
		{ "apps", apps_start, NULL, apps_end },
	};
	static const unsigned int percents[] = { 2, 5 };

	for (size_t i = 0; i < ARRAY_SIZE(scenes); i++)
		for (size_t j = 0; j < ARRAY_SIZE(percents); j++)
			measure(&scenes[i], percents[j]);
}
