// SPDX-License-Identifier: GPL-2.0-only
/* What a process that is busy with its memory loses while that is scanned: victim. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define VICTIM_PAGES (64 * 1024ul)
#define VICTIM_RATE 20000
#define VICTIM_CPU 1
#define SCANNER_CPU 0
#define BURST 1024

struct shared {
	bool ready;
	unsigned int write_every;	/* 0: only reads */
	uint64_t accesses;
};

/* What has been seen of the victim up to now. */
struct sample {
	uint64_t accesses, wall_ns, cpu_ns, faults, shootdowns;
};

void run_on(pid_t pid, unsigned int cpu)
{
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	if (sched_setaffinity(pid, sizeof(cpus), &cpus))
		die("sched_setaffinity: %s", strerror(errno));
}

static void __attribute__((noreturn)) be_victim(volatile struct shared *shared, size_t pages)
{
	struct shape shape = { .content = UNIQUE, .pages = pages, .stride = 1 };
	struct rnd rnd = { opt.seed | 1 };
	size_t words = pages * PAGE / sizeof(uint64_t);
	static volatile uint64_t sink;
	volatile uint64_t *area;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	run_on(0, VICTIM_CPU);
	area = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (area == MAP_FAILED || madvise((void *)area, pages * PAGE, MADV_NOHUGEPAGE))
		die("the victim's memory: %s", strerror(errno));
	fill_memory((char *)area, &shape);
	if (strcmp(opt.impl, "none") && madvise((void *)area, pages * PAGE, MADV_MERGEABLE))
		die("madvise(MADV_MERGEABLE): %s", strerror(errno));
	shared->ready = true;
	for (;;) {
		unsigned int write_every = shared->write_every;

		for (unsigned int i = 0; i < BURST; i++) {
			uint64_t r = rnd_next(&rnd);
			volatile uint64_t *word = area + r % words;

			if (write_every && i % write_every == 0)
				*word = r;
			else
				sink += *word;
		}
		shared->accesses += BURST;
	}
}

/* The shoot-downs of its TLB that the victim's CPU was interrupted for. */
uint64_t shootdowns(void)
{
	char *line = NULL;
	size_t room = 0;
	uint64_t value = 0;
	FILE *f = fopen("/proc/interrupts", "re");

	if (!f)
		die("cannot read /proc/interrupts");
	while (getline(&line, &room, f) > 0) {
		char *at = strstr(line, "TLB:");

		if (!at)
			continue;
		at += strlen("TLB:");
		for (unsigned int cpu = 0; cpu <= VICTIM_CPU; cpu++)
			value = strtoull(at, &at, 10);
	}
	free(line);
	fclose(f);
	return value;
}

void process_costs(pid_t pid, uint64_t *cpu_ns, uint64_t *faults)
{
	char path[64], buf[1024], *at;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	if (!read_text(path, buf, sizeof(buf)))
		die("the victim died");
	at = strrchr(buf, ')');
	/* State, six numbers, and then the minor faults. */
	if (!at || sscanf(at, ") %*c %*d %*d %*d %*d %*d %*u %lu", faults) != 1)
		die("no faults in %s", path);
	snprintf(path, sizeof(path), "/proc/%d/schedstat", pid);
	if (!read_text(path, buf, sizeof(buf)))
		die("the victim died");
	*cpu_ns = strtoull(buf, NULL, 10);
}

static struct sample sample_now(pid_t pid, const volatile struct shared *shared)
{
	struct sample s = { .shootdowns = shootdowns() };

	process_costs(pid, &s.cpu_ns, &s.faults);
	s.accesses = shared->accesses;
	s.wall_ns = now_ns();
	return s;
}

static void measure(const char *kase, pid_t pid, volatile struct shared *shared, struct rate *rate,
		    uint64_t seconds)
{
	struct scan before, spent = { 0 };
	struct sample from, to;
	uint64_t until;

	/* As many full scans as it takes until they are all alike. */
	for (unsigned int i = 0; i < 10; i++) {
		sleep_us(seconds * 50000);
		if (rate)
			rate_adjust(rate);
	}
	if (rate)
		before = scan_now();
	from = sample_now(pid, shared);
	until = from.wall_ns + seconds * 1000000000;
	while (now_ns() < until) {
		sleep_us(50000);
		if (rate)
			rate_adjust(rate);
	}
	to = sample_now(pid, shared);
	json_begin(kase);
	if (rate) {
		spent = scan_since(&before);
		json_scan(&spent);
		print_rate(&spent);
	}
	json_u64("accesses", to.accesses - from.accesses);
	json_u64("victim_ns", to.wall_ns - from.wall_ns);
	json_u64("victim_cpu_ns", to.cpu_ns - from.cpu_ns);
	json_u64("faults", to.faults - from.faults);
	json_u64("shootdowns", to.shootdowns - from.shootdowns);
	json_end();
}

void run_victim(void)
{
	volatile struct shared *shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
					      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	size_t pages = opt.quick ? VICTIM_PAGES / 4 : VICTIM_PAGES;
	struct rate rate = { .target = VICTIM_RATE, .sleep_ms = 20 };
	bool scanning = strcmp(opt.impl, "none");
	uint64_t seconds = opt.quick ? 2 : 8;
	pid_t pid;

	if (shared == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	if (scanning)
		ksm_reset();
	run_on(0, SCANNER_CPU);
	if (scanning)
		ksm_run_on(SCANNER_CPU);
	fflush(stdout);
	pid = fork();
	if (pid < 0)
		die("fork: %s", strerror(errno));
	if (pid == 0)
		be_victim(shared, pages);
	wait_ready(pid, &shared->ready);
	if (scanning)
		rate_start(&rate);
	measure("reads", pid, shared, scanning ? &rate : NULL, seconds);
	shared->write_every = 5;
	measure("writes", pid, shared, scanning ? &rate : NULL, seconds);
	if (scanning)
		ksm_stop();
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	munmap((void *)shared, sizeof(*shared));
}
