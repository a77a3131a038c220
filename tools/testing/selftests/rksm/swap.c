// SPDX-License-Identifier: GPL-2.0-only
/*
 * Swap under pressure: merged pages of several processes are pushed out to zram and come
 * back, once and again, with the scanner running; contents and counters hold.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "util.h"

#define PROCESSES	3
#define PAGES		512
#define CONTENTS	16
#define ROUNDS		12

static void **areas;

static int owner(void *arg)
{
	size_t me = (size_t)arg;
	uint64_t *key = malloc(PAGES * sizeof(*key));
	char *area = map_pages(PAGES);

	areas[me] = area;
	for (size_t i = 0; i < PAGES; i++) {
		/* Some are alone, so that pages of all states go out */
		key[i] = i % 8 ? i % CONTENTS : unique_key();
		fill_page(area + i * PAGE, key[i]);
	}
	mergeable(area, PAGES);
	child_step();
	for (int round = 0; round < ROUNDS; round++) {
		for (size_t i = 0; i < PAGES; i++)
			if (!page_holds(area + i * PAGE, key[i]))
				return KSFT_FAIL;
		for (int n = 0; n < 64; n++) {
			size_t i = rnd_below(PAGES);

			key[i] = rnd_below(CONTENTS);
			fill_page(area + i * PAGE, key[i]);
		}
		child_step();
	}
	return KSFT_PASS;
}

int main(int argc, char **argv)
{
	struct child child[PROCESSES];
	long out, in;
	size_t mapped = 0;
	bool ok = true;
	int cgroup;

	test_init(argc, argv);
	if (!swap_on())
		ksft_exit_skip("no zram to swap to\n");
	test_plan(5);
	ksm_reset();
	areas = map_shared(1);
	cgroup = cgroup_own();
	if (cgroup < 0)
		die("no memory cgroup");
	for (size_t p = 0; p < PROCESSES; p++) {
		child[p] = child_start(owner, (void *)p);
		ok &= child_wait_step(&child[p]);
	}
	ksm_start();
	out = vmstat("pswpout");
	in = vmstat("pswpin");
	for (int round = 0; ok && round < ROUNDS; round++) {
		ksm_scans(rnd_below(4));
		cgroup_reclaim(cgroup, PROCESSES * PAGES);
		for (size_t p = 0; ok && p < PROCESSES; p++) {
			child_go(&child[p]);
			ok &= child_wait_step(&child[p]);
		}
	}
	ksft_test_result(ok, "contents after %d rounds out and in\n", ROUNDS);
	ksft_test_result(vmstat("pswpout") > out && vmstat("pswpin") > in,
			 "%ld pages went out, %ld came in\n", vmstat("pswpout") - out,
			 vmstat("pswpin") - in);
	ksm_scans(6);
	ksm_set("run", 0);
	for (size_t p = 0; p < PROCESSES; p++)
		mapped += ksm_mappings(child[p].pid, areas[p], PAGES);
	ksft_test_result(mapped &&
				 ksm_get("pages_shared") + ksm_get("pages_sharing") == (long)mapped,
			 "%zu mappings are counted as %ld + %ld\n", mapped, ksm_get("pages_shared"),
			 ksm_get("pages_sharing"));
	ksm_start();
	for (size_t p = 0; p < PROCESSES; p++)
		ok &= child_end(&child[p]) == 0;
	ksft_test_result(ok, "every process ended well\n");
	ksm_set("run", 2);
	ksft_test_result(ksm_all_zero(), "nothing is left\n");
	test_exit();
}
