// SPDX-License-Identifier: GPL-2.0-only
/*
 * sleep_millisecs holds: processes that exit or opt in during the pause between two batches
 * buy no batch, and a new value of sleep_millisecs takes effect at once.
 *
 * runs: cloud-amd64
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "util.h"

#define CHILDREN	100
#define PAGES		16
#define KEPT		8000
#define MSECS		60000

static int child(void *arg)
{
	char *area = map_pages(PAGES);

	for (size_t i = 0; i < PAGES; i++)
		fill_page(area + i * PAGE, (size_t)arg * 1000 + i);
	mergeable(area, PAGES);
	child_step();
	return 0;
}

int main(int argc, char **argv)
{
	static struct child children[CHILDREN];
	long before, after;
	char *area;

	test_init(argc, argv);
	test_plan(3);
	ksm_reset();
	/* Before the memory of this process is there, which they would inherit */
	for (size_t i = 0; i < CHILDREN / 2; i++) {
		children[i] = child_start(child, (void *)i);
		child_wait_step(&children[i]);
	}
	area = map_pages(KEPT);
	for (size_t i = 0; i < KEPT; i++)
		fill_page(area + i * PAGE, 1000000 + i);
	mergeable(area, KEPT);
	ksm_start();
	ksm_scans(3);
	ksm_set("pages_to_scan", 100);
	ksm_set("sleep_millisecs", MSECS);
	before = ksm_standing();
	for (size_t i = 0; i < CHILDREN / 2; i++) {
		child_kill(&children[i]);
		usleep(20000);
	}
	after = ksm_standing();
	ksft_print_msg("%ld pages scanned\n", after - before);
	ksft_test_result(after == before, "%d exits during a pause buy no batch\n", CHILDREN / 2);
	for (size_t i = CHILDREN / 2; i < CHILDREN; i++) {
		children[i] = child_start(child, (void *)i);
		child_wait_step(&children[i]);
		usleep(20000);
	}
	after = ksm_standing();
	ksft_print_msg("%ld pages scanned\n", after - before);
	ksft_test_result(after == before, "nor do %d processes that opt in\n", CHILDREN / 2);
	ksm_set("sleep_millisecs", MSECS + 1);
	after = ksm_standing();
	ksft_test_result(after > before && after - before <= 100,
			 "a new sleep_millisecs begins one batch\n");
	for (size_t i = CHILDREN / 2; i < CHILDREN; i++)
		child_kill(&children[i]);
	test_exit();
}
