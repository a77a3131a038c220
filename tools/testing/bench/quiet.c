// SPDX-License-Identifier: GPL-2.0-only
/* What a scanner costs that has nothing to do: quiet. */
#include "bench.h"

#define QUIET_PAGES 25600ul

static void watch(const char *kase, size_t pages, unsigned int settle_s)
{
	unsigned int window_s = opt.quick ? 10 : 60;
	uint64_t sleeps, wakeups = 0;
	struct scan before, spent;

	sleep_us(settle_s * 1000000);
	sleeps = scan_sleeps();
	if (ksm_has("wakeups"))
		wakeups = ksm_get("wakeups");
	before = scan_now();
	sleep_us(window_s * 1000000);
	spent = scan_since(&before);
	sleeps = scan_sleeps() - sleeps;
	json_begin(kase);
	json_scan(&spent);
	json_u64("pages", pages);
	json_u64("saved", ksm_saved());
	json_u64("settle_s", settle_s);
	/* Who has gone to sleep by himself so often has been woken as often. */
	json_u64("sleeps", sleeps);
	if (ksm_has("wakeups"))
		json_u64("own_wakeups", ksm_get("wakeups") - wakeups);
	json_end();
}

static void quiet(const char *kase, enum content content, uint64_t goal)
{
	struct shape shape = {
		.content = content, .pages = QUIET_PAGES, .stride = 1,
		.distinct = QUIET_PAGES / 8,
	};
	uint64_t deadline = now_ns() + 120000000000ull;
	struct worker w;

	if (!wants(kase))
		return;
	ksm_reset();
	worker_start(&w, &shape);
	ksm_run_untuned();
	if (goal && !governed())
		ksm_run_freely(20000, 1);
	while (ksm_saved() < goal && now_ns() < deadline)
		sleep_us(100000);
	if (ksm_saved() < goal)
		note("only %llu of %llu pages are saved", (unsigned long long)ksm_saved(),
		     (unsigned long long)goal);
	if (goal && !governed())
		ksm_run_freely(100, 20);
	watch(kase, shape.pages, opt.quick ? 20 : 120);
	ksm_stop();
	worker_kill(&w);
}

void run_quiet(void)
{
	if (wants("nothing")) {
		ksm_reset();
		ksm_run_untuned();
		watch("nothing", 0, opt.quick ? 5 : 20);
		ksm_stop();
	}
	quiet("unique", UNIQUE, 0);
	quiet("merged", COPIES, (QUIET_PAGES - QUIET_PAGES / 8) * 99 / 100);
}
