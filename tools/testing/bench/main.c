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
	const char *what;
} workloads[] = {
	{ "unique", "W1", run_unique, true, false, false,
	  "unique random pages: scanner CPU per page and full scan, over the first "
	  "4 full scans of fresh memory" },
	{ "tail", "W2", run_tail, true, false, false,
	  "pages that differ only in their last 8 bytes: the same figure" },
	{ "copies", "W3", run_copies, true, false, false,
	  "8 copies of each page: until 99 % of the possible saving is there" },
	{ "steady", "W4", run_steady, true, false, false,
	  "steady state, half of the pages copies (8 each), half unique, nothing "
	  "changes" },
	{ "rewrite", "W5", run_rewrite, true, false, false,
	  "as steady, but a random quarter of the pages is rewritten before each "
	  "of 6 full scans" },
	{ "churn", "W6", run_churn, true, false, false,
	  "processes of 1 MiB, one replaced and one forking every 10 ms, scanned "
	  "at an equal rate" },
	{ "thp", "W7", run_thp, true, false, false,
	  "huge pages: unique, 8 copies of each 4 KiB, and zeros but for 4 KiB in "
	  "2 MiB" },
	{ "apps", "W8", run_apps, false, false, false,
	  "3 redis-server and 3 Python processes, each kind with the same data (2 "
	  "x 16 MB a pair)" },
	{ "latency", "W9", run_latency, false, true, false,
	  "latency seen by a process that faults, mmaps and forks while its 32 MiB "
	  "are scanned at an equal rate" },
	{ "unmerge", "W10", run_unmerge, false, false, false,
	  "time to undo merging of 256 MiB: a write to every page, run=2, "
	  "MADV_UNMERGEABLE" },
	{ "metadata", "M", run_metadata, false, false, false,
	  "kernel memory that the scanner's knowledge takes: dense, one page "
	  "present of 64, and merged (8 copies)" },
	{ "in-place", "I", run_in_place, false, false, true,
	  "time to load and unload the module while pages are merged (8 copies), which "
	  "change hands in place" },
	{ "victim", "V", run_victim, false, true, false,
	  "what a process on the other CPU gets done, random accesses to 256 MiB, while "
	  "it is scanned at an equal rate" },
	{ "threads", "S", run_threads, false, false, false,
	  "full scans with 1 and 2 scan_threads" },
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
		"  --impl builtin|rksm|none  whose threads are measured (builtin)\n"
		"  --smart-scan 0|1          (0)\n"
		"  --case NAME               one case of the workload only\n"
		"  --round N                 goes into the output\n"
		"  --seed N                  of all random contents (1)\n"
		"  --knob NAME=VALUE         one more knob of /sys/kernel/mm/ksm; repeatable\n"
		"  --quick                   smaller\n"
		"  --list                    workloads: NAME ALIAS SMART NONE LOADS WHAT\n"
		"Workloads:\n");
	for (size_t i = 0; i < ARRAY_SIZE(workloads); i++)
		fprintf(f, "  %-8s %-3s %s\n", workloads[i].name, workloads[i].alias,
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
		case 'l':
			for (size_t i = 0; i < ARRAY_SIZE(workloads); i++)
				printf("%s %s %d %d %d %s\n", workloads[i].name, workloads[i].alias,
				       workloads[i].smart_scan, workloads[i].none,
				       workloads[i].loads, workloads[i].what);
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
