// SPDX-License-Identifier: GPL-2.0-only
/* Processes that come, go and suffer: churn, apps, latency. */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#endif

#define CHURN_PROCESSES 256
#define CHURN_PAGES 256
#define CHURN_RATE 30000

static struct shape w6_shape(size_t nr)
{
	return (struct shape) {
		.content = MIXED, .pages = CHURN_PAGES, .stride = 1,
		.first = nr * CHURN_PAGES, .distinct = CHURN_PAGES / 2,
	};
}

void run_churn(void)
{
	unsigned int processes = opt.quick ? CHURN_PROCESSES / 4 : CHURN_PROCESSES;
	uint64_t until, seconds = opt.quick ? 3 : 8;
	struct times enter = { 0 }, leave = { 0 }, forks = { 0 };
	struct worker w[CHURN_PROCESSES];
	struct rate rate = { .target = opt.quick ? CHURN_RATE / 4 : CHURN_RATE, .sleep_ms = 20 };
	struct rnd rnd = { opt.seed | 1 };
	struct scan before, spent;

	ksm_reset();
	for (unsigned int i = 0; i < processes; i++) {
		struct shape shape = w6_shape(i);

		worker_start(&w[i], &shape);
	}
	rate_start(&rate);
	before = scan_now();
	until = now_ns() + seconds * 1000000000;
	for (uint64_t n = 0; now_ns() < until; n++) {
		unsigned int i = rnd_next(&rnd) % processes, j = rnd_next(&rnd) % processes;
		struct shape shape = w6_shape(i);

		times_add(&leave, worker_kill(&w[i]));
		worker_start(&w[i], &shape);
		times_add(&enter, w[i].register_ns);
		times_add(&forks, worker_do(&w[j], OP_FORK, n));
		rate_adjust(&rate);
		sleep_us(10000);
	}
	spent = scan_since(&before);
	ksm_stop();
	json_begin("churn");
	json_u64("pages", processes * CHURN_PAGES);
	json_scan(&spent);
	print_rate(&spent);
	json_times("register", &enter);
	json_times("leave", &leave);
	json_times("fork_exit", &forks);
	json_end();
	for (unsigned int i = 0; i < processes; i++)
		worker_kill(&w[i]);
}

#define LATENCY_PAGES (8 * 1024ul)
#define LATENCY_RATE 20000
#define LATENCY_CHUNK 16

struct victim {
	bool ready, go;
	size_t n[3];
	uint64_t at[3][1 << 18];
};

static const char *const victim_ops[] = { "fault", "mmap", "fork" };

static void victim_add(struct victim *v, unsigned int op, uint64_t from)
{
	uint64_t took = now_ns() - from;

	if (v->n[op] < ARRAY_SIZE(v->at[op]))
		v->at[op][v->n[op]++] = took;
}

static void __attribute__((noreturn)) be_victim(volatile struct victim *shared, uint64_t seconds)
{
	struct shape shape = { .content = UNIQUE, .pages = LATENCY_PAGES, .stride = 1 };
	struct victim *v = (struct victim *)shared;
	char *area = mmap(NULL, LATENCY_PAGES * PAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t until;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (area == MAP_FAILED || madvise(area, LATENCY_PAGES * PAGE, MADV_NOHUGEPAGE))
		die("the victim's memory: %s", strerror(errno));
	fill_memory(area, &shape);
	if (strcmp(opt.impl, "none") && madvise(area, LATENCY_PAGES * PAGE, MADV_MERGEABLE))
		die("madvise(MADV_MERGEABLE): %s", strerror(errno));
	shared->ready = true;
	while (!shared->go)
		sleep_us(1000);
	until = now_ns() + seconds * 1000000000;
	for (unsigned int i = 0; now_ns() < until; i++) {
		uint64_t from = now_ns();
		char *chunk = mmap(NULL, LATENCY_CHUNK * PAGE, PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		victim_add(v, 1, from);
		if (chunk == MAP_FAILED || madvise(chunk, LATENCY_CHUNK * PAGE, MADV_NOHUGEPAGE))
			die("mmap: %s", strerror(errno));
		for (size_t j = 0; j < LATENCY_CHUNK; j++) {
			from = now_ns();
			*(volatile char *)(chunk + j * PAGE) = 1;
			victim_add(v, 0, from);
		}
		if (munmap(chunk, LATENCY_CHUNK * PAGE))
			die("munmap: %s", strerror(errno));
		if (i % 8 == 0) {
			pid_t pid;

			from = now_ns();
			pid = fork();
			if (pid == 0)
				_exit(0);
			if (pid < 0)
				die("fork: %s", strerror(errno));
			victim_add(v, 2, from);
			waitpid(pid, NULL, 0);
		}
		/* Some time for the scanner, or it is only CPU that is fought over. */
		sleep_us(500);
	}
	_exit(0);
}

void run_latency(void)
{
	struct victim *shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
				     MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	volatile struct victim *v = shared;
	bool scanning = strcmp(opt.impl, "none");
	uint64_t seconds = opt.quick ? 3 : 8;
	struct rate rate = { .target = LATENCY_RATE, .sleep_ms = 20 };
	struct scan before = { 0 }, spent = { 0 };
	int status;
	pid_t pid;

	if (shared == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	if (scanning)
		ksm_reset();
	fflush(stdout);
	pid = fork();
	if (pid < 0)
		die("fork: %s", strerror(errno));
	if (pid == 0)
		be_victim(v, seconds);
	wait_ready(pid, &v->ready);
	if (scanning) {
		rate_start(&rate);
		before = scan_now();
	}
	v->go = true;
	while (waitpid(pid, &status, WNOHANG) != pid) {
		sleep_us(50000);
		if (scanning)
			rate_adjust(&rate);
	}
	if (!WIFEXITED(status) || WEXITSTATUS(status))
		die("the victim died");
	json_begin("victim");
	if (scanning) {
		spent = scan_since(&before);
		ksm_stop();
		json_scan(&spent);
		print_rate(&spent);
	}
	for (size_t i = 0; i < ARRAY_SIZE(victim_ops); i++) {
		struct times t = { .at = shared->at[i], .n = shared->n[i] };

		json_times(victim_ops[i], &t);
	}
	json_end();
	munmap(shared, sizeof(*shared));
}

/* Programs that are opted in as systemd's MemoryKSM= does, each with the same data. */
#define APPS_PORT 7700
#define APPS_SAMPLES 128

static const char python_program[] =
	"import random, sys, time\n"
	"rnd = random.Random(7)\n"
	"rows = {i: rnd.randbytes(1000) for i in range(int(sys.argv[1]))}\n"
	"open(sys.argv[2], 'w').close()\n"
	"time.sleep(100000)\n";

pid_t launch(char *const argv[], bool mergeable)
{
	pid_t pid;

	fflush(stdout);
	pid = fork();
	if (pid < 0)
		die("fork: %s", strerror(errno));
	if (pid == 0) {
		int null = open("/dev/null", O_RDWR);

		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (mergeable && prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0))
			die("prctl(PR_SET_MEMORY_MERGE): %s", strerror(errno));
		dup2(null, 0);
		dup2(null, 1);
		execvp(argv[0], argv);
		die("cannot run %s: %s", argv[0], strerror(errno));
	}
	return pid;
}

static void load_redis(unsigned int port, unsigned int rows)
{
	struct rnd rnd = { 7 };
	char command[128];
	FILE *pipe;

	snprintf(command, sizeof(command), "redis-cli -p %u ping 2>/dev/null | grep -q PONG", port);
	for (int i = 0; system(command); i++) {
		if (i == 300)
			die("redis-server does not answer");
		sleep_us(100000);
	}
	snprintf(command, sizeof(command), "redis-cli -p %u --pipe >/dev/null", port);
	pipe = popen(command, "w");
	if (!pipe)
		die("popen: %s", strerror(errno));
	for (unsigned int i = 0; i < rows; i++) {
		fprintf(pipe, "*3\r\n$3\r\nSET\r\n$11\r\nkey:%07u\r\n$960\r\n", i);
		for (int j = 0; j < 60; j++)
			fprintf(pipe, "%016" PRIx64, rnd_next(&rnd));
		fputs("\r\n", pipe);
	}
	if (pclose(pipe))
		die("redis-cli could not load the data");
}

pid_t start_redis(unsigned int port, unsigned int rows, bool mergeable)
{
	char text[16], *redis[] = {
		"redis-server", "--port", text, "--save", "", "--appendonly", "no",
		"--daemonize", "no", NULL,
	};
	pid_t pid;

	if (system("command -v redis-server redis-cli >/dev/null"))
		die("needs redis: boot with --root demo");
	snprintf(text, sizeof(text), "%u", port);
	pid = launch(redis, mergeable);
	load_redis(port, rows);
	return pid;
}

void start_apps(pid_t pids[2 * APPS_EACH])
{
	unsigned int rows = opt.quick ? 4000 : 16000;
	char text[32], ready[32];

	if (system("command -v python3 >/dev/null"))
		die("needs python: boot with --root demo");
	snprintf(text, sizeof(text), "%u", rows);
	for (unsigned int i = 0; i < APPS_EACH; i++) {
		char *python[] = {
			"python3", "-c", (char *)python_program, text, ready, NULL,
		};

		pids[2 * i] = start_redis(APPS_PORT + i, rows, true);
		snprintf(ready, sizeof(ready), "/tmp/python-%u", i);
		unlink(ready);
		pids[2 * i + 1] = launch(python, true);
		for (int tries = 0; access(ready, F_OK); tries++) {
			if (tries == 600)
				die("python does not get ready");
			sleep_us(100000);
		}
	}
}

void kill_all(const pid_t *pids, size_t n)
{
	for (size_t i = 0; i < n; i++) {
		kill(pids[i], SIGKILL);
		while (waitpid(pids[i], NULL, 0) < 0 && errno == EINTR)
			;
	}
}

void run_apps(void)
{
	uint64_t series[APPS_SAMPLES][3], seconds = opt.quick ? 6 : 20;
	struct scan before, spent;
	pid_t pids[2 * APPS_EACH];
	size_t samples = 0;

	ksm_reset();
	start_apps(pids);
	before = scan_now();
	ksm_run_freely(1000, 20);
	do {
		uint64_t *row = series[samples++];

		sleep_us(250000);
		spent = scan_since(&before);
		row[0] = spent.wall_ns / 1000000;
		row[1] = spent.cpu_ns / 1000000;
		row[2] = ksm_saved();
	} while (spent.wall_ns < seconds * 1000000000 && samples < APPS_SAMPLES);
	ksm_stop();
	json_begin("programs");
	json_scan(&spent);
	json_u64("saved", series[samples - 1][2]);
	json_pairs("series", series, samples);
	json_end();
	kill_all(pids, ARRAY_SIZE(pids));
}
