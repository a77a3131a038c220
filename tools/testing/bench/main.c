// SPDX-License-Identifier: GPL-2.0-only
/* The command line: one workload, or a list of them. */
#define _GNU_SOURCE
#include "bench.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct workload {
	const char *name;
	const char *alias;	/* by which older results know it */
	void (*run)(void);
	bool smart_scan;	/* both settings are of interest */
	bool none;		/* so is no KSM at all */
	bool loads;		/* it loads and unloads rksm itself */
	bool governor;		/* so is rksm with governor=auto; default knobs otherwise */
	unsigned int rounds;	/* at most, where all are run, as it takes long; 0: all */
	const char *what;
} workloads[] = {
	{ "unique", "W1", run_unique, true, false, false, false, 0,
	  "unique random pages: scanner CPU per page and full scan, over the first "
	  "4 full scans of fresh memory" },
	{ "tail", "W2", run_tail, true, false, false, false, 0,
	  "pages that differ only in their last 8 bytes: the same figure" },
	{ "copies", "W3", run_copies, true, false, false, false, 0,
	  "8 copies of each page: until 99 % of the possible saving is there" },
	{ "steady", "W4", run_steady, true, false, false, false, 0,
	  "steady state, half of the pages copies (8 each), half unique, nothing "
	  "changes" },
	{ "rewrite", "W5", run_rewrite, true, false, false, false, 0,
	  "as steady, but a random quarter of the pages is rewritten before each "
	  "of 6 full scans" },
	{ "churn", "W6", run_churn, true, false, false, false, 0,
	  "processes of 1 MiB, one replaced and one forking every 10 ms, scanned "
	  "at an equal rate" },
	{ "thp", "W7", run_thp, true, false, false, false, 0,
	  "huge pages: unique, 8 copies of each 4 KiB, and zeros but for 4 KiB in "
	  "2 MiB" },
	{ "apps", "W8", run_apps, false, false, false, false, 0,
	  "3 redis-server and 3 Python processes, each kind with the same data (2 "
	  "x 16 MB a pair)" },
	{ "latency", "W9", run_latency, false, true, false, false, 0,
	  "latency seen by a process that faults, mmaps and forks while its 32 MiB "
	  "are scanned at an equal rate" },
	{ "unmerge", "W10", run_unmerge, false, false, false, false, 0,
	  "time to undo merging of 256 MiB: a write to every page, run=2, "
	  "MADV_UNMERGEABLE" },
	{ "metadata", "M", run_metadata, false, false, false, false, 0,
	  "kernel memory that the scanner's knowledge takes: dense, one page "
	  "present of 64, and merged (8 copies)" },
	{ "in-place", "I", run_in_place, false, false, true, false, 0,
	  "time to load and unload the module while pages are merged (8 copies), which "
	  "change hands in place" },
	{ "victim", "V", run_victim, false, true, false, false, 0,
	  "what a process on the other CPU gets done, random accesses to 256 MiB, while "
	  "it is scanned at an equal rate" },
	{ "threads", "S", run_threads, false, false, false, false, 0,
	  "full scans with 1 and 2 scan_threads" },
	{ "clones", "G1", run_clones, false, false, false, true, 2,
	  "20 processes of 20 MiB, 95 % of it the same, that start at once, and one more: "
	  "time until 95 % of the possible saving" },
	{ "quiet", "G2", run_quiet, false, false, false, true, 1,
	  "wake-ups and CPU where nothing is registered, and with 100 MiB that nobody "
	  "touches, unique or merged" },
	{ "equal-cpu", "G3", run_equal_cpu, false, false, false, true, 1,
	  "memory saved over time with 2 % and 5 % of a CPU: apps, clones that come and "
	  "go, and a static set" },
	{ "neighbour", "G4", run_neighbour, false, true, false, true, 2,
	  "latency of a redis-server on the other CPU while clones come and go, scanned "
	  "at the rate that saves as much" },
	{ "futile", "G5", run_futile, false, false, false, true, 2,
	  "as rewrite, but every second and every five seconds: merges that are broken "
	  "within 10 s" },
	{ "budget", "G6", run_budget, false, false, false, true, 1,
	  "the scanner's CPU in sliding windows under churn, exits, sparse and volatile "
	  "memory, against cpu_percent and cpu_burst_millisecs" },
};

static const struct workload *find(const char *name)
{
	for (size_t i = 0; i < ARRAY_SIZE(workloads); i++)
		if (!strcmp(workloads[i].name, name) || !strcmp(workloads[i].alias, name))
			return &workloads[i];
	return NULL;
}

static void usage(FILE *f)
{
	fprintf(f,
		"Usage: rksm-bench [OPTION]... WORKLOAD\n"
		"  --impl builtin|rksm|auto|none  whose threads are measured (builtin)\n"
		"  --smart-scan 0|1          (0)\n"
		"  --case NAME               one case of the workload only\n"
		"  --round N                 goes into the output\n"
		"  --seed N                  of all random contents (1)\n"
		"  --knob NAME=VALUE         one more knob of /sys/kernel/mm/ksm; repeatable\n"
		"  --quick                   smaller\n"
		"  --minutes N               how long budget watches (3)\n"
		"  --percent N --burst MS    what budget holds any scanner to, not the files' values\n"
		"  --slack MS                more than that is let pass (20)\n"
		"  --list                    workloads: NAME ALIAS SMART NONE LOADS GOVERNOR ROUNDS\n"
		"                            WHAT\n"
		"Workloads:\n");
	for (size_t i = 0; i < ARRAY_SIZE(workloads); i++)
		fprintf(f, "  %-9s %-3s %s\n", workloads[i].name, workloads[i].alias,
			workloads[i].what);
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
		{ "minutes", required_argument, NULL, 'm' },
		{ "percent", required_argument, NULL, 'p' },
		{ "burst", required_argument, NULL, 'b' },
		{ "slack", required_argument, NULL, 'a' },
		{ "list", no_argument, NULL, 'l' },
		{ "help", no_argument, NULL, 'h' },
		{ 0 },
	};
	const struct workload *workload;
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
		case 'm':
			opt.minutes = atoi(optarg);
			break;
		case 'p':
			opt.percent = atoi(optarg);
			break;
		case 'b':
			opt.burst_ms = atoi(optarg);
			break;
		case 'a':
			opt.slack_ms = atoi(optarg);
			break;
		case 'l':
			for (size_t i = 0; i < ARRAY_SIZE(workloads); i++)
				printf("%s %s %d %d %d %d %u %s\n", workloads[i].name,
				       workloads[i].alias, workloads[i].smart_scan,
				       workloads[i].none, workloads[i].loads, workloads[i].governor,
				       workloads[i].rounds, workloads[i].what);
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
				   strcmp(opt.impl, "auto") && strcmp(opt.impl, "none"))) {
		usage(stderr);
		return 2;
	}
	workload = find(argv[optind]);
	if (workload) {
		opt.workload = workload->name;
		if (strcmp(opt.impl, "none") != 0 && !workload->loads)
			warm_up();
		workload->run();
		return 0;
	}
	fprintf(stderr, "rksm-bench: no workload is called %s\n", argv[optind]);
	usage(stderr);
	return 2;
}
