// SPDX-License-Identifier: GPL-2.0-only
/*
 * Processes whose memory is scanned. Each holds one mergeable area and does what it is
 * told over a socket.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
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

#define FORK_WRITES 16

struct request {
	uint64_t op, arg;
};

static void fill_random(uint64_t *words, uint64_t id)
{
	struct rnd r = { mix64(opt.seed ^ mix64(id)) | 1 };

	for (size_t i = 0; i < PAGE / 8; i++)
		words[i] = rnd_next(&r);
}

void fill_page(void *page, const struct shape *shape, size_t nr)
{
	static uint64_t template[PAGE / 8];

	switch (shape->content) {
	case UNIQUE:
		fill_random(page, nr);
		break;
	case TAIL:
		if (!template[0])
			fill_random(template, 0);
		memcpy(page, template, PAGE - 8);
		((uint64_t *)page)[PAGE / 8 - 1] = mix64(nr);
		break;
	case COPIES:
		fill_random(page, nr % shape->distinct);
		break;
	case MIXED:
		fill_random(page, nr - shape->first < shape->pages / 2 ? nr % shape->distinct : nr);
		break;
	case HUGE_ZERO:
		if (nr % (HUGE / PAGE) == 0)
			fill_random(page, nr);
		break;
	}
}

void fill_memory(char *area, const struct shape *shape)
{
	for (size_t i = 0; i < shape->pages; i++)
		fill_page(area + i * shape->stride * PAGE, shape, shape->first + i);
}

static char *make_area(const struct shape *shape)
{
	size_t size = shape->pages * shape->stride * PAGE;
	char *map, *area;

	map = mmap(NULL, size + HUGE, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (map == MAP_FAILED)
		die("mmap of %zu MiB: %s", size >> 20, strerror(errno));
	area = (char *)(((uintptr_t)map + HUGE - 1) & ~(HUGE - 1));
	if (madvise(area, size, shape->huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE))
		die("madvise for%s huge pages: %s", shape->huge ? "" : " no", strerror(errno));
	fill_memory(area, shape);
	return area;
}

/* The least of three passes: what a floor is for. */
static uint64_t hash_all(const char *area, const struct shape *shape)
{
	static volatile uint64_t sink;
	uint64_t least = UINT64_MAX;

	if (xxh64("a", 1, 0) != 0xd24ec4f1a98c6e5bull)
		die("xxh64 is not xxh64");
	for (int pass = 0; pass < 3; pass++) {
		struct timespec from, to;
		uint64_t took;

		clock_gettime(CLOCK_THREAD_CPUTIME_ID, &from);
		for (size_t i = 0; i < shape->pages; i++)
			sink += xxh64(area + i * shape->stride * PAGE, PAGE, 0);
		clock_gettime(CLOCK_THREAD_CPUTIME_ID, &to);
		took = (to.tv_sec - from.tv_sec) * 1000000000ll + to.tv_nsec - from.tv_nsec;
		if (took < least)
			least = took;
	}
	return least;
}

/* Half of what is rewritten becomes a copy among copies, half becomes unique. */
static uint64_t rewrite(char *area, const struct shape *shape, uint64_t generation)
{
	uint64_t written = 0;

	for (size_t i = 0; i < shape->pages; i++) {
		uint64_t r = mix64(opt.seed ^ mix64(generation << 32 ^ (shape->first + i)));
		uint64_t *page = (void *)(area + i * shape->stride * PAGE);

		if (r & 3)
			continue;
		written++;
		if (r & 4)
			fill_random(page, (r >> 8) % shape->distinct);
		else
			fill_random(page, generation << 32 | (shape->first + i));
	}
	return written;
}

static uint64_t touch(char *area, const struct shape *shape)
{
	uint64_t from = now_ns();

	for (size_t i = 0; i < shape->pages; i++) {
		volatile char *p = area + i * shape->stride * PAGE;

		*p = *p;
	}
	return now_ns() - from;
}

static uint64_t advise(char *area, const struct shape *shape, int advice)
{
	uint64_t from = now_ns();

	if (madvise(area, shape->pages * shape->stride * PAGE, advice))
		die("madvise(%d): %s", advice, strerror(errno));
	return now_ns() - from;
}

static uint64_t fork_and_leave(char *area, const struct shape *shape, uint64_t nr)
{
	uint64_t from = now_ns();
	pid_t pid = fork();

	if (pid < 0)
		die("fork: %s", strerror(errno));
	if (pid == 0) {
		for (uint64_t i = 0; i < FORK_WRITES; i++)
			area[mix64(nr << 8 | i) % shape->pages * shape->stride * PAGE] ^= 1;
		_exit(0);
	}
	while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
	return now_ns() - from;
}

static void __attribute__((noreturn)) serve(int fd, const struct shape *shape)
{
	struct request request;
	uint64_t answer;
	char *area;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	area = make_area(shape);
	answer = (uintptr_t)area;
	if (write(fd, &answer, sizeof(answer)) != sizeof(answer))
		_exit(1);
	answer = advise(area, shape, MADV_MERGEABLE);
	while (write(fd, &answer, sizeof(answer)) == sizeof(answer) &&
	       read(fd, &request, sizeof(request)) == sizeof(request)) {
		switch ((enum op)request.op) {
		case OP_HASH:
			answer = hash_all(area, shape);
			break;
		case OP_REWRITE:
			answer = rewrite(area, shape, request.arg);
			break;
		case OP_TOUCH:
			answer = touch(area, shape);
			break;
		case OP_UNMERGE:
			answer = advise(area, shape, MADV_UNMERGEABLE);
			break;
		case OP_MERGE:
			answer = advise(area, shape, MADV_MERGEABLE);
			break;
		case OP_FORK:
			answer = fork_and_leave(area, shape, request.arg);
			break;
		}
	}
	_exit(0);
}

static uint64_t answer_of(const struct worker *w)
{
	uint64_t answer;

	if (read(w->fd, &answer, sizeof(answer)) != sizeof(answer))
		die("a worker process died");
	return answer;
}

void worker_start(struct worker *w, const struct shape *shape)
{
	int fds[2];

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds))
		die("socketpair: %s", strerror(errno));
	fflush(stdout);
	w->pid = fork();
	if (w->pid < 0)
		die("fork: %s", strerror(errno));
	if (w->pid == 0) {
		close(fds[0]);
		serve(fds[1], shape);
	}
	close(fds[1]);
	w->fd = fds[0];
	w->area = (const char *)(uintptr_t)answer_of(w);
	w->register_ns = answer_of(w);
}

uint64_t worker_do(const struct worker *w, enum op op, uint64_t arg)
{
	struct request request = { op, arg };

	if (write(w->fd, &request, sizeof(request)) != sizeof(request))
		die("a worker process died");
	return answer_of(w);
}

uint64_t worker_kill(struct worker *w)
{
	uint64_t from = now_ns(), took;

	kill(w->pid, SIGKILL);
	while (waitpid(w->pid, NULL, 0) < 0 && errno == EINTR)
		;
	took = now_ns() - from;
	close(w->fd);
	w->pid = 0;
	return took;
}

static uint64_t rollup(const struct worker *w, const char *key)
{
	char path[64];
	long long kb;

	snprintf(path, sizeof(path), "/proc/%d/smaps_rollup", w->pid);
	kb = field_of(path, key);
	if (kb < 0)
		die("no %s in %s", key, path);
	return kb * 1024 / PAGE;
}

uint64_t worker_huge_pages(const struct worker *w)
{
	return rollup(w, "AnonHugePages");
}

uint64_t worker_pages_held(const struct worker *w)
{
	return rollup(w, "Pss_Anon");
}

void wait_ready(pid_t pid, const volatile bool *ready)
{
	while (!*ready) {
		if (waitpid(pid, NULL, WNOHANG) == pid)
			die("the victim died");
		sleep_us(1000);
	}
}
