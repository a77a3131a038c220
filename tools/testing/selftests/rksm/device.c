// SPDX-License-Identifier: GPL-2.0-only
#define _GNU_SOURCE
#include "device.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define HELD "--held"

static int device_fd = -1;

int device_call(unsigned int cmd, void *arg)
{
	if (device_fd < 0)
		device_fd = open(DEVICE, O_RDWR | O_CLOEXEC);
	if (device_fd < 0)
		die("%s: %s", DEVICE, strerror(errno));
	return ioctl(device_fd, cmd, arg) ? -errno : 0;
}

void device_close(void)
{
	if (device_fd >= 0)
		close(device_fd);
	device_fd = -1;
}

int device_merge(struct rksm_merge *arg)
{
	arg->size = sizeof(*arg);
	return device_call(RKSM_IOC_MERGE, arg);
}

int device_unmerge(struct rksm_unmerge *arg)
{
	arg->size = sizeof(*arg);
	return device_call(RKSM_IOC_UNMERGE, arg);
}

int device_why(int pidfd, struct rksm_why *why)
{
	*why = (struct rksm_why){ .size = sizeof(*why), .pidfd = pidfd };
	return device_call(RKSM_IOC_WHY, why);
}

int pidfd_of(pid_t pid)
{
	int fd = syscall(SYS_pidfd_open, pid, 0);

	if (fd < 0)
		die("pidfd_open(%d): %s", pid, strerror(errno));
	return fd;
}

/* Lists */

int device_list(unsigned int cmd, size_t len, void (*f)(const void *record, void *arg), void *arg)
{
	/* Bytes behind the buffer must stay as they are */
	char *buf = malloc(len + 8);
	struct rksm_list list = { .size = sizeof(list), .records = (uintptr_t)buf, .len = len };
	int err;

	memset(buf, 0x55, len + 8);
	do {
		const char *at = buf;

		err = device_call(cmd, &list);
		for (uint32_t n = 0; !err && n < list.count; n++) {
			uint32_t size = *(const uint32_t *)at;

			if (size % 8 || at + size > buf + len)
				die("a record of %u bytes in %zu", size, len);
			f(at, arg);
			at += size;
		}
	} while (!err && list.count);
	for (int n = 0; n < 8; n++)
		if (buf[len + n] != 0x55)
			die("something behind the buffer of %zu bytes was written", len);
	free(buf);
	return err;
}

struct found_stat {
	pid_t pid;
	bool found;
	struct rksm_stat_record *record;
};

static void find_stat(const void *record, void *arg)
{
	const struct rksm_stat_record *stat = record;
	struct found_stat *found = arg;

	if (stat->pid != found->pid)
		return;
	*found->record = *stat;
	found->found = true;
}

bool device_stat(pid_t pid, struct rksm_stat_record *record)
{
	struct found_stat found = { pid, false, record };
	int err = device_list(RKSM_IOC_STAT, 1 << 16, find_stat, &found);

	if (err)
		die("RKSM_IOC_STAT: %s", strerror(-err));
	return found.found;
}

unsigned long known_pages(const struct rksm_stat_record *stat)
{
	return stat->merged + stat->unique + stat->changing + stat->fresh;
}

/* Rules */

static int rule_call(int pidfd, const char *path, unsigned int flags, unsigned int action)
{
	struct rksm_rule rule = {
		.size = sizeof(rule),
		.flags = flags,
		.pidfd = pidfd,
		.action = action,
		.path = (uintptr_t)path,
		.path_len = path ? strlen(path) : 0,
	};

	return device_call(RKSM_IOC_RULE, &rule);
}

int rule_set(int pidfd, const char *path, unsigned int action)
{
	return rule_call(pidfd, path, 0, action);
}

int rule_remove(int pidfd, const char *path)
{
	return rule_call(pidfd, path, RKSM_RULE_REMOVE, 0);
}

struct found_rule {
	pid_t pid;
	const char *path;
	long processes;
};

static void find_rule(const void *record, void *arg)
{
	const struct rksm_rule_record *rule = record;
	struct found_rule *found = arg;
	size_t len = found->path ? strlen(found->path) : 0;

	if (rule->pid == found->pid && rule->path_len == len &&
	    (!len || !memcmp(rule + 1, found->path, len)))
		found->processes = rule->processes;
}

long rule_processes(pid_t pid, const char *path)
{
	struct found_rule found = { pid, path, -1 };
	int err = device_list(RKSM_IOC_RULES, 1 << 16, find_rule, &found);

	if (err)
		die("RKSM_IOC_RULES: %s", strerror(-err));
	return found.processes;
}

bool holds_within(bool (*cond)(void *arg), void *arg, int seconds)
{
	for (int n = 0; n < seconds * 100; n++) {
		if (cond(arg))
			return true;
		usleep(10000);
	}
	return false;
}

bool holds_late(bool (*cond)(void *arg), void *arg, int seconds)
{
	struct timespec begun, now;
	bool held;

	clock_gettime(CLOCK_MONOTONIC, &begun);
	do {
		held = cond(arg);
		if (!held)
			usleep(50000);
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while (!held && now.tv_sec - begun.tv_sec <= seconds);
	if (now.tv_sec - begun.tv_sec > 5)
		ksft_print_msg("%s after %ld s\n", held ? "held" : "did not hold",
			       (long)(now.tv_sec - begun.tv_sec));
	return held;
}

/* A rule that has just been made has applied to a process when a whole sweep has seen it */
void rules_swept(void)
{
	int pidfd = pidfd_of(getpid());

	for (int n = 0; n < 2; n++) {
		if (rule_set(pidfd, NULL, RKSM_RULE_DEFAULT))
			die("cannot set a rule");
		while (rule_processes(getpid(), NULL) != 1)
			usleep(1000);
		if (rule_remove(pidfd, NULL))
			die("cannot remove a rule");
	}
	close(pidfd);
}

/* Targets */

static volatile bool begun, stop;
static pthread_t thread;

/* No two pages are ever the same, wherever the thread stands still for a while */
static void *hammer(void *arg)
{
	struct target_state *state = arg;
	uint64_t value = 1;

	while (!stop) {
		for (size_t i = state->pages - state->n; i < state->pages; i++)
			*(volatile uint64_t *)(state->area + i * PAGE + 64) = value++;
		begun = true;
	}
	return NULL;
}

static long microseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static void *churn(void *arg)
{
	struct target_state *state = arg;

	state->longest = 0;
	while (!stop) {
		long before = microseconds(), took;
		void *p = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		munmap(p, PAGE);
		took = microseconds() - before;
		if (took > state->longest)
			state->longest = took;
		begun = true;
		usleep(500);
	}
	return NULL;
}

/* Waits until it has gone round once */
static bool begin_thread(void *(*fn)(void *arg), struct target_state *state)
{
	begun = stop = false;
	if (pthread_create(&thread, NULL, fn, state))
		return false;
	while (!begun)
		usleep(100);
	return true;
}

static bool end_thread(void)
{
	stop = true;
	return !pthread_join(thread, NULL);
}

static char *more_pages(size_t n, bool zero)
{
	char *more = map_pages(n);

	for (size_t i = 0; i < n; i++)
		fill_page(more + i * PAGE, zero ? 0 : unique_key());
	mergeable(more, n);
	return more;
}

static bool hold(char *pages, size_t n)
{
	struct iovec iov = { pages, n * PAGE };
	int fd[2];

	return !pipe(fd) && vmsplice(fd[1], &iov, 1, 0) == (ssize_t)(n * PAGE);
}

static bool hold_huge(void)
{
	char *huge = map_at(NULL, 2 * HPAGE / PAGE);
	struct mapping map;

	huge = (char *)(((uintptr_t)huge + HPAGE - 1) & ~(HPAGE - 1));
	madvise(huge, HPAGE, MADV_HUGEPAGE);
	for (size_t i = 0; i < HPAGE / PAGE; i++)
		fill_page(huge + i * PAGE, unique_key());
	mappings_of(getpid(), huge, 1, &map);
	mergeable(huge, HPAGE / PAGE);
	return map.flags & KPF_THP && hold(huge, 1);
}

static void fill(struct target_state *state, size_t pages)
{
	for (size_t i = 0; i < pages; i++)
		fill_page(state->area + i * PAGE, state->key + i % state->contents);
}

/* One page off, so that the offset in a page table is another one too */
static bool move(struct target_state *state)
{
	size_t size = state->pages * PAGE;
	char *to = mmap(NULL, size + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (to == MAP_FAILED || mremap(state->area, size, size, MREMAP_MAYMOVE | MREMAP_FIXED,
				       to + PAGE) == MAP_FAILED)
		return false;
	state->area = to + PAGE;
	return true;
}

static bool carry_out(struct target_state *state)
{
	bool ok = true;
	pid_t pid;

	switch (state->op) {
	case OP_INTACT:
		for (size_t i = 0; i < state->pages && ok; i++)
			ok = page_holds(state->area + i * PAGE, state->key + i % state->contents);
		return ok;
	case OP_WRITE:
		for (size_t i = 0; i < state->n; i++)
			state->area[i * PAGE + 100] ^= 1;
		return true;
	case OP_ALIKE:
		state->contents = 1;
		for (size_t i = 0; i < state->pages; i++)
			fill_page(state->area + i * PAGE, state->key);
		return true;
	case OP_READ:
		for (size_t i = 0; i < state->n; i++)
			(void)*(volatile char *)(state->area + i * PAGE);
		return true;
	case OP_HAMMER:
		return begin_thread(hammer, state);
	case OP_CHURN:
		return begin_thread(churn, state);
	case OP_STOP:
	case OP_CHURNED:
		return end_thread();
	case OP_TOUCH:
	case OP_ZERO:
		return more_pages(state->n, state->op == OP_ZERO);
	case OP_PIN:
		return hold(more_pages(state->n, false), state->n);
	case OP_PIN_HUGE:
		return hold_huge();
	case OP_MERGE_ANY:
		return prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0) == 1;
	case OP_PRCTL:
		return !prctl(PR_SET_MEMORY_MERGE, state->n, 0, 0, 0);
	case OP_DROP:
		ok = !madvise(state->area, state->n * PAGE, MADV_DONTNEED);
		fill(state, state->n);
		return ok;
	case OP_REMAP:
		munmap(state->area, state->n * PAGE);
		map_at(state->area, state->n);
		madvise(state->area, state->n * PAGE, MADV_NOHUGEPAGE);
		fill(state, state->n);
		mergeable(state->area, state->n);
		return true;
	case OP_MOVE:
		return move(state);
	case OP_FORK:
		/* Only the parent may say so: both see the state */
		pid = fork();
		if (!pid) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			pause();
		}
		state->forked = pid;
		return pid > 0;
	case OP_EXEC:
		/* PR_SET_PDEATHSIG stays */
		execl("/proc/self/exe", "target", HELD, NULL);
		break;
	}
	return false;
}

void target_main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], HELD))
		for (;;)
			pause();
}

static int target_child(void *arg)
{
	struct target_state *state = arg;

	/* An open descriptor keeps the module */
	device_close();
	if (state->huge) {
		char *area = map_at(NULL, state->pages + HPAGE / PAGE);

		state->area = (char *)(((uintptr_t)area + HPAGE - 1) & ~(HPAGE - 1));
		madvise(state->area, state->pages * PAGE, MADV_HUGEPAGE);
	} else {
		state->area = map_pages(state->pages);
	}
	fill(state, state->pages);
	if (state->opt == OPT_MADVISE)
		mergeable(state->area, state->pages);
	else if (state->opt == OPT_PRCTL && prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0))
		die("PR_SET_MEMORY_MERGE: %s", strerror(errno));
	for (;;) {
		child_step();
		state->ok = carry_out(state);
	}
	return KSFT_FAIL;
}

static struct target start(size_t pages, size_t contents, uint64_t key, enum opt opt, bool huge)
{
	struct target target = { .pages = pages, .state = map_shared(1) };

	target.state->pages = pages;
	target.state->contents = contents;
	target.state->key = key;
	target.state->huge = huge;
	target.state->opt = opt;
	target.child = child_start(target_child, target.state);
	if (!child_wait_step(&target.child))
		die("a target has ended");
	target.area = target.state->area;
	target.pidfd = pidfd_of(target.child.pid);
	return target;
}

struct target target_start(size_t pages, size_t contents, uint64_t key, enum opt opt)
{
	return start(pages, contents, key, opt, false);
}

struct target target_start_huge(size_t pages, size_t contents, uint64_t key, enum opt opt)
{
	return start(pages, contents, key, opt, true);
}

bool target_do(struct target *target, enum op op, size_t n)
{
	target->state->op = op;
	target->state->n = n;
	child_go(&target->child);
	/* After exec its end of the pipe is closed */
	if (!child_wait_step(&target->child))
		return op == OP_EXEC;
	target->area = target->state->area;
	return target->state->ok;
}

struct rksm_stat_record target_stat(const struct target *target)
{
	struct rksm_stat_record stat = {};

	device_stat(target->child.pid, &stat);
	return stat;
}

size_t target_merged(const struct target *target)
{
	return ksm_mappings(target->child.pid, target->area, target->pages);
}

void target_end(struct target *target)
{
	child_kill(&target->child);
	close(target->pidfd);
	munmap(target->state, PAGE);
}

/* Borrowed memory */

static int in_parents_memory(void *arg)
{
	((struct borrower *)arg)->pid = getpid();
	child_step();
	_exit(prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0));
}

static int vforks(void *arg)
{
	struct borrower *borrower = arg;
	char *stack = map_pages(16);
	int status;
	pid_t pid;

	borrower->area = map_pages(borrower->pages);
	for (size_t i = 0; i < borrower->pages; i++)
		fill_page(borrower->area + i * PAGE, 1 + i % 4);
	mergeable(borrower->area, borrower->pages);
	child_step();
	pid = clone(in_parents_memory, stack + 16 * PAGE, CLONE_VM | CLONE_VFORK | SIGCHLD, arg);
	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		return KSFT_FAIL;
	return WEXITSTATUS(status);
}

struct child borrower_start(struct borrower *borrower, size_t pages)
{
	struct child parent;

	borrower->pages = pages;
	parent = child_start(vforks, borrower);
	child_wait_step(&parent);
	return parent;
}
