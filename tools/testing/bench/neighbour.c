// SPDX-License-Identifier: GPL-2.0-only
/*
 * What a redis-server on the other CPU notices of a scanner: neighbour.
 *
 * It and its client have one CPU, the scanner and the clones that it merges the other one. The
 * client sends at fixed times, whatever became of the requests before, and a latency counts from
 * the time at which its request was due. Who is a second behind gives up what has been due: such a
 * machine is too slow, and would only show by how much.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SCANNER_CPU 0
#define REDIS_CPU 1
#define REDIS_PORT 7710
#define REQUESTS_PER_S 150
#define BEHIND_NS 1000000000ull
#define VALUE 960
#define CLONES 8
#define CLONE_PAGES 2048ul
#define REPLACE_NS 2000000000ull
#define LOOK_NS 250000000ull
#define POLL_US 20000
/* What is to be saved where no governor has said what it saves. */
#define DEFAULT_GOAL 0.7

struct client {
	bool ready, go, stop, done;
	size_t n;
	uint64_t given_up;
	uint64_t at[1 << 16];
};

static int connect_redis(void)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(REDIS_PORT) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;

	to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof(to)) ||
	    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)))
		die("cannot connect to redis: %s", strerror(errno));
	return fd;
}

/* A fifth of them write. */
static void request(int fd, struct rnd *rnd, unsigned int rows)
{
	static char out[VALUE + 128], in[VALUE + 128];
	unsigned int row = rnd_next(rnd) % rows;
	size_t len, have = 0, want = 5;	/* +OK\r\n */
	ssize_t n;

	if (rnd_next(rnd) % 5 == 0) {
		len = snprintf(out, sizeof(out), "*3\r\n$3\r\nSET\r\n$11\r\nkey:%07u\r\n$%u\r\n",
			       row, VALUE);
		for (unsigned int i = 0; i < VALUE; i += 16, len += 16)
			snprintf(out + len, 17, "%016llx", (unsigned long long)rnd_next(rnd));
		out[len++] = '\r';
		out[len++] = '\n';
	} else {
		len = snprintf(out, sizeof(out), "*2\r\n$3\r\nGET\r\n$11\r\nkey:%07u\r\n", row);
		/* $960\r\n, the value, \r\n */
		want = VALUE + 8;
	}
	if (write(fd, out, len) != (ssize_t)len)
		die("redis does not listen");
	while (have < want && (n = read(fd, in + have, sizeof(in) - have)) > 0)
		have += n;
	if (have != want || (in[0] != '+' && in[0] != '$'))
		die("redis answers %zu bytes of %zu: %.20s", have, want, in);
}

static void __attribute__((noreturn)) be_client(struct client *c, unsigned int rows)
{
	volatile struct client *shared = c;
	struct rnd rnd = { mix64(opt.seed) | 1 };
	uint64_t due;
	int fd;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	run_on(0, REDIS_CPU);
	fd = connect_redis();
	for (int i = 0; i < REQUESTS_PER_S; i++)
		request(fd, &rnd, rows);
	shared->ready = true;
	while (!shared->go)
		sleep_us(1000);
	due = now_ns();
	while (!shared->stop && c->n < ARRAY_SIZE(c->at)) {
		struct timespec at = { due / 1000000000, due % 1000000000 };

		while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL) == EINTR)
			;
		request(fd, &rnd, rows);
		c->at[c->n++] = now_ns() - due;
		due += 1000000000 / REQUESTS_PER_S;
		while (now_ns() > due + BEHIND_NS) {
			due += 1000000000 / REQUESTS_PER_S;
			c->given_up++;
		}
	}
	shared->done = true;
	_exit(0);
}

/* What is merged of what could be, now. */
static double share_merged(const struct clones *c, const struct clone *clones)
{
	uint64_t merged = 0, could = 0;

	for (unsigned int i = 0; i < CLONES; i++) {
		if (!clone_ready_ns(c, &clones[i]))
			continue;
		merged += clone_merged(&clones[i]);
		could += c->shareable;
	}
	return could ? (double)merged / could : 0;
}

static const char *goal_path(const char *kase)
{
	static char path[64];

	snprintf(path, sizeof(path), "/tmp/rksm-bench-neighbour-%s", kase);
	return path;
}

/* The clones as they come and go, and the rate of who has no governor. */
struct scene {
	struct clones image;
	struct clone clones[CLONES];
	struct rnd choice;
	double goal, pages;
	uint64_t from, replaced, looked_ns;
	/* Of the looks since the last change of the rate, and of all that are measured. */
	double recent_sum, sum;
	unsigned int recent, looks;
};

static void go_on(struct scene *s, bool scanning)
{
	uint64_t now = now_ns();
	unsigned int i;

	if ((now - s->from) / REPLACE_NS > s->replaced) {
		i = rnd_next(&s->choice) % CLONES;
		clone_kill(&s->clones[i]);
		clone_start(&s->image, &s->clones[i], i);
		s->replaced++;
	}
	if (!scanning || now - s->looked_ns < LOOK_NS)
		return;
	s->looked_ns = now;
	s->recent_sum += share_merged(&s->image, s->clones);
	s->recent++;
	if (s->recent * LOOK_NS < REPLACE_NS)
		return;
	if (!governed()) {
		double share = s->recent_sum / s->recent;

		/* Too little has to be made up for soon; too much costs others. */
		s->pages *= share < s->goal - 0.1 ? 1.5 : share < s->goal ? 1.1 :
			    share > s->goal + 0.1 ? 0.8 : 0.95;
		s->pages = s->pages < 10 ? 10 : s->pages > 20000 ? 20000 : s->pages;
		ksm_set_u64("pages_to_scan", s->pages);
	}
	s->sum += s->recent_sum;
	s->looks += s->recent;
	s->recent_sum = s->recent = 0;
}

static void run_for(struct scene *s, bool scanning, unsigned int seconds)
{
	uint64_t until = now_ns() + seconds * 1000000000ull;

	while (now_ns() < until) {
		go_on(s, scanning);
		sleep_us(POLL_US);
	}
}

static void measure(const char *kase, bool mergeable)
{
	struct client *c = mmap(NULL, sizeof(*c), PROT_READ | PROT_WRITE,
				MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	volatile struct client *shared = c;
	bool scanning = strcmp(opt.impl, "none");
	unsigned int rows = opt.quick ? 4000 : 16000;
	struct scene s = {
		.choice = { mix64(opt.seed) | 1 }, .goal = DEFAULT_GOAL, .pages = 300,
	};
	uint64_t cpu_ns, faults, flushes, cpu_after, faults_after;
	struct scan before = { 0 }, spent = { 0 };
	pid_t redis, client;
	struct times t;
	char text[32];

	if (!wants(kase))
		return;
	if (c == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	if (scanning) {
		ksm_reset();
		ksm_run_on(SCANNER_CPU);
	}
	run_on(0, REDIS_CPU);
	redis = start_redis(REDIS_PORT, rows, mergeable && scanning);
	run_on(0, SCANNER_CPU);
	fflush(stdout);
	client = fork();
	if (client < 0)
		die("fork: %s", strerror(errno));
	if (client == 0)
		be_client(c, rows);
	wait_ready(client, &shared->ready);
	clones_make(&s.image, CLONE_PAGES);
	for (unsigned int i = 0; i < CLONES; i++)
		clone_start(&s.image, &s.clones[i], i);
	for (unsigned int i = 0; i < CLONES; i++)
		clone_wait(&s.image, &s.clones[i]);
	if (scanning)
		ksm_run_untuned();
	if (read_text(goal_path(kase), text, sizeof(text)))
		s.goal = atof(text);
	s.from = now_ns();
	/* Until the rate is found. */
	run_for(&s, scanning, opt.quick ? 16 : 40);
	s.sum = s.looks = 0;
	if (scanning)
		before = scan_now();
	process_costs(redis, &cpu_ns, &faults);
	flushes = shootdowns();
	shared->go = true;
	run_for(&s, scanning, opt.quick ? 15 : 60);
	shared->stop = true;
	while (!shared->done)
		sleep_us(10000);
	flushes = shootdowns() - flushes;
	process_costs(redis, &cpu_after, &faults_after);
	if (scanning) {
		spent = scan_since(&before);
		ksm_stop();
	}
	json_begin(kase);
	if (scanning) {
		json_scan(&spent);
		json_f("merged_share", s.sum / s.looks);
		if (governed()) {
			FILE *f = fopen(goal_path(kase), "we");

			if (!f || fprintf(f, "%.3f\n", s.sum / s.looks) < 0 || fclose(f))
				die("cannot write %s", goal_path(kase));
		} else {
			json_f("goal", s.goal);
			json_f("pages_to_scan", s.pages);
		}
	}
	t = (struct times){ .at = c->at, .n = c->n };
	json_times("request", &t);
	json_u64("given_up", c->given_up);
	json_u64("redis_cpu_ns", cpu_after - cpu_ns);
	json_u64("faults", faults_after - faults);
	json_u64("shootdowns", flushes);
	json_end();
	kill_all(&client, 1);
	kill_all(&redis, 1);
	for (unsigned int i = 0; i < CLONES; i++)
		clone_kill(&s.clones[i]);
	clones_free(&s.image);
	munmap(c, sizeof(*c));
}

void run_neighbour(void)
{
	measure("apart", false);
	measure("scanned", true);
}
