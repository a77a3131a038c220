// SPDX-License-Identifier: GPL-2.0-only
/* The command line: one workload, or a list of them. */
#define _GNU_SOURCE
#include "bench.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct options opt = { .impl = "builtin", .round = 1, .seed = 1 };

static const struct workload {
	const char *name;
	void (*run)(void);
	bool smart_scan;	/* both settings are of interest */
	bool none;		/* so is no KSM at all */
	const char *what;
} workloads[] = {
	{ "W1", run_w1, true, false, "unique random pages" },
	{ "W2", run_w2, true, false, "pages that differ in the last 8 bytes" },
	{ "W3", run_w3, true, false, "8 copies of each page, in 1 and 8 processes" },
	{ "W4", run_w4, true, false, "steady state" },
	{ "W5", run_w5, true, false, "a quarter rewritten between scans" },
	{ "W6", run_w6, true, false, "many small processes that come and go" },
	{ "W7", run_w7, true, false, "huge pages" },
	{ "W8", run_w8, false, false, "redis and python" },
	{ "W9", run_w9, false, true, "latency of a process that is scanned" },
	{ "W10", run_w10, false, false, "COW break and unmerge" },
	{ "M", run_m, false, false, "memory of the metadata" },
	{ "S", run_scale, false, false, "1 and 2 scan_threads" },
};

bool wants(const char *kase)
{
	return !opt.kase || strcmp(opt.kase, kase) == 0;
}

static void usage(FILE *f)
{
	fprintf(f,
		"Usage: rksm-bench [OPTION]... WORKLOAD\n"
		"  --impl builtin|rksm|none  whose threads are measured (builtin)\n"
		"  --smart-scan 0|1          (0)\n"
		"  --case NAME               one case of the workload only\n"
		"  --round N                 goes into the output\n"
		"  --seed N                  of all random contents (1)\n"
		"  --knob NAME=VALUE         one more knob of /sys/kernel/mm/ksm; repeatable\n"
		"  --quick                   smaller\n"
		"  --list                    workloads: NAME SMART NONE\n"
		"Workloads:\n");
	for (size_t i = 0; i < ARRAY_SIZE(workloads); i++)
		fprintf(f, "  %-4s %s\n", workloads[i].name, workloads[i].what);
}

int main(int argc, char **argv)
{
	static const struct option long_options[] = {
		{ "impl", required_argument, NULL, 'i' },
		{ "smart-scan", required_argument, NULL, 's' },
		{ "case", required_argument, NULL, 'c' },
		{ "round", required_argument, NULL, 'r' },
		{ "seed", required_argument, NULL, 'e' },
		{ "knob", required_argument, NULL, 'k' },
		{ "quick", no_argument, NULL, 'q' },
		{ "list", no_argument, NULL, 'l' },
		{ "help", no_argument, NULL, 'h' },
		{ 0 },
	};
	int c;

	while ((c = getopt_long(argc, argv, "", long_options, NULL)) != -1) {
		switch (c) {
		case 'i':
			opt.impl = optarg;
			break;
		case 's':
			opt.smart_scan = atoi(optarg);
			break;
		case 'c':
			opt.kase = optarg;
			break;
		case 'r':
			opt.round = atoi(optarg);
			break;
		case 'e':
			opt.seed = strtoull(optarg, NULL, 0);
			break;
		case 'k':
			ksm_knob(optarg);
			break;
		case 'q':
			opt.quick = true;
			break;
		case 'l':
			for (size_t i = 0; i < ARRAY_SIZE(workloads); i++)
				printf("%s %d %d\n", workloads[i].name,
				       workloads[i].smart_scan, workloads[i].none);
			return 0;
		case 'h':
			usage(stdout);
			return 0;
		default:
			usage(stderr);
			return 2;
		}
	}
	if (optind + 1 != argc || (strcmp(opt.impl, "builtin") && strcmp(opt.impl, "rksm") &&
				   strcmp(opt.impl, "none"))) {
		usage(stderr);
		return 2;
	}
	for (size_t i = 0; i < ARRAY_SIZE(workloads); i++) {
		if (strcmp(workloads[i].name, argv[optind]) == 0) {
			opt.workload = workloads[i].name;
			if (strcmp(opt.impl, "none") != 0)
				warm_up();
			workloads[i].run();
			return 0;
		}
	}
	fprintf(stderr, "rksm-bench: no workload is called %s\n", argv[optind]);
	usage(stderr);
	return 2;
}
