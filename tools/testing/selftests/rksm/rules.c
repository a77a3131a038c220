// SPDX-License-Identifier: GPL-2.0-only
/*
 * The rules of /dev/rksm: for processes and for cgroups, by whatever way a process comes into one.
 * They are applied while nothing is scanned, to no process but those that they are for, to one that
 * is being killed without harm, and they end with the module.
 *
 * guest: --no-module --append slab_nomerge
 * runs: cloud-amd64 sanitizer
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "device.h"
#include "holders.h"

#define PAGES	128
#define SECONDS	20	/* far more than a rule takes */
#define CGROUPS	"/sys/fs/cgroup"
#define KILLS	60
#define LISTED	40

/* Conditions */

static bool is_merge_any(void *target)
{
	return target_do(target, OP_MERGE_ANY, 0);
}

static bool is_merged(void *target)
{
	return target_merged(target) == PAGES;
}

static bool is_unmerged(void *target)
{
	return !target_merged(target);
}

static bool is_excluded(void *pid)
{
	struct rksm_stat_record stat;

	return device_stat(*(pid_t *)pid, &stat) && stat.flags & RKSM_STAT_EXCLUDED;
}

static bool says_any(void *pid)
{
	struct rksm_stat_record stat;

	return device_stat(*(pid_t *)pid, &stat) && stat.flags & RKSM_STAT_MERGE_ANY;
}

static bool is_gone(void *pid)
{
	return rule_processes(*(pid_t *)pid, NULL) < 0;
}

static bool merges_within(struct target *target)
{
	return ksm_until_true(is_merged, target, 200) && target_do(target, OP_INTACT, 0);
}

/* Nothing of it is merged, and stays so */
static bool stays_unmerged(struct target *target)
{
	if (!holds_within(is_unmerged, target, SECONDS))
		return false;
	for (int n = 0; n < 6; n++) {
		ksm_scans(1);
		if (target_merged(target))
			return false;
	}
	return target_do(target, OP_INTACT, 0);
}

/* Cgroups */

static void make_cgroup(const char *path)
{
	char dir[128];

	snprintf(dir, sizeof(dir), CGROUPS "%s", path);
	if (mkdir(dir, 0755))
		die("%s: %s", dir, strerror(errno));
}

static void remove_cgroup(const char *path)
{
	char dir[128];

	snprintf(dir, sizeof(dir), CGROUPS "%s", path);
	/* Who was killed there may take a moment */
	for (int n = 0; rmdir(dir); n++) {
		if (n == 1000)
			die("%s: %s", dir, strerror(errno));
		usleep(10000);
	}
}

static bool try_move_to(const char *path, pid_t pid)
{
	char file[128], text[16];

	snprintf(file, sizeof(file), CGROUPS "%s/cgroup.procs", path);
	snprintf(text, sizeof(text), "%d", pid);
	return write_file(file, text);
}

static void move_to(const char *path, pid_t pid)
{
	if (!try_move_to(path, pid))
		die("cannot move %d to %s: %s", pid, path, strerror(errno));
}

/* A process that begins in a cgroup, without a migration */
static pid_t begin_in(const char *path)
{
	struct clone_args args = { .flags = CLONE_INTO_CGROUP, .exit_signal = SIGCHLD };
	char dir[128];
	pid_t pid;
	int fd;

	snprintf(dir, sizeof(dir), CGROUPS "%s", path);
	fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	args.cgroup = fd;
	fflush(NULL);
	pid = syscall(SYS_clone3, &args, sizeof(args));
	if (pid < 0)
		die("clone3 into %s: %s", path, strerror(errno));
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;)
			pause();
	}
	close(fd);
	return pid;
}

static void end_process(pid_t pid)
{
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
}

/* Rules for processes */

static void always(void)
{
	struct target target = target_start(PAGES, 4, unique_key(), OPT_NONE);
	struct timespec before, after;
	bool ok;

	/* An idle scanner, and one in a long pause, are woken */
	for (int run = 0; run < 2; run++) {
		ksm_set("sleep_millisecs", 10000);
		ksm_set("run", run);
		if (run)
			ksm_standing();
		target_do(&target, OP_PRCTL, 0);
		clock_gettime(CLOCK_MONOTONIC, &before);
		ok = !rule_set(target.pidfd, NULL, RKSM_RULE_ALWAYS) &&
		     holds_within(is_merge_any, &target, SECONDS);
		clock_gettime(CLOCK_MONOTONIC, &after);
		ksft_print_msg("after %ld ms\n", (after.tv_sec - before.tv_sec) * 1000 +
			       (after.tv_nsec - before.tv_nsec) / 1000000);
		ksft_test_result(ok && after.tv_sec - before.tv_sec < 8,
				 "always: all memory is mergeable at once, run is %d\n", run);
		/* And again by itself */
		ok = target_do(&target, OP_PRCTL, 0) &&
		     holds_within(is_merge_any, &target, SECONDS);
		ksft_test_result(ok && !rule_remove(target.pidfd, NULL), "and again, run is %d\n",
				 run);
	}
	ksm_set("run", 0);
	ksm_set("sleep_millisecs", 0);
	target_end(&target);
}

static void never(void)
{
	struct target target = target_start(PAGES, 4, unique_key(), OPT_MADVISE);
	struct target other = target_start(PAGES, 4, target.state->key, OPT_MADVISE);
	struct rksm_merge merge = { .pidfd = target.pidfd, ALL_MEMORY };
	struct rksm_why why;
	bool ok;

	ksm_set("pages_to_scan", 100000);
	ksm_start();
	ok = merges_within(&target) && merges_within(&other);
	ok &= !rule_set(target.pidfd, NULL, RKSM_RULE_NEVER) && stays_unmerged(&target);
	ksft_test_result(ok && target_merged(&other) == PAGES,
			 "never: its pages are given back and not merged, others' are\n");
	ok = is_excluded(&target.child.pid) && !is_excluded(&other.child.pid) &&
	     !device_why(target.pidfd, &why) && why.flags == RKSM_STAT_EXCLUDED && !why.merged;
	ksft_test_result(ok && device_merge(&merge) == -EPERM && is_unmerged(&target),
			 "it is told, and merging it is refused\n");
	ok = !rule_set(target.pidfd, NULL, RKSM_RULE_DEFAULT) && merges_within(&target);
	ok &= !rule_set(target.pidfd, NULL, RKSM_RULE_NEVER) && stays_unmerged(&target);
	ok &= !rule_remove(target.pidfd, NULL) && merges_within(&target);
	ksft_test_result(ok && !is_excluded(&target.child.pid),
			 "default: it is merged again, and without a rule\n");
	ksm_set("run", 0);
	target_end(&target);
	target_end(&other);
}

static void lasting(void)
{
	struct target target = target_start(PAGES, 4, unique_key(), OPT_PRCTL);
	char file[64], line[64];
	bool ok;

	ok = !rule_set(target.pidfd, NULL, RKSM_RULE_NEVER) &&
	     holds_within(is_excluded, &target.child.pid, SECONDS);
	ok &= target_do(&target, OP_EXEC, 0);
	snprintf(file, sizeof(file), "/proc/%d/cmdline", target.child.pid);
	do
		ok &= read_file(file, line, sizeof(line)) > 0;
	while (ok && strcmp(line, "target"));
	rules_swept();
	ok &= is_excluded(&target.child.pid) && says_any(&target.child.pid);
	ksft_test_result(ok, "a rule survives exec\n");
	ok = rule_processes(target.child.pid, NULL) == 1;
	kill(target.child.pid, SIGKILL);
	waitpid(target.child.pid, NULL, 0);
	ksft_test_result(ok && holds_within(is_gone, &target.child.pid, SECONDS) &&
			 rule_set(target.pidfd, NULL, RKSM_RULE_NEVER) == -ESRCH,
			 "and ends with its process\n");
}

/* Lists */

struct listing {
	int paths[LISTED], pids, others;
};

static void list_one(const void *record, void *arg)
{
	const struct rksm_rule_record *rule = record;
	struct listing *listing = arg;
	char path[64] = "";
	unsigned int n;

	memcpy(path, rule + 1, rule->path_len < 63 ? rule->path_len : 63);
	if (sscanf(path, "/listed/%u", &n) == 1 && n < LISTED && !rule->pid &&
	    rule->action == n % 3)
		listing->paths[n]++;
	else if (rule->pid == getpid() && !rule->path_len)
		listing->pids++;
	else
		listing->others++;
}

static void listed(void)
{
	const size_t least = sizeof(struct rksm_rule_record) + 16;
	int self = pidfd_of(getpid());
	char path[64];
	bool ok = true;

	for (int n = 0; n < LISTED; n++) {
		snprintf(path, sizeof(path), "/listed/%d", n);
		ok &= !rule_set(-1, path, n % 3);
	}
	ok &= !rule_set(self, NULL, RKSM_RULE_DEFAULT);
	for (size_t len = least; len < least * LISTED * 2; len += least * 3 + 8) {
		struct listing listing = {};

		ok &= !device_list(RKSM_IOC_RULES, len, list_one, &listing);
		ok &= listing.pids == 1 && !listing.others;
		for (int n = 0; n < LISTED; n++)
			ok &= listing.paths[n] == 1;
	}
	ksft_test_result(ok, "every rule is listed once, whatever the buffer\n");
	ok = device_list(RKSM_IOC_RULES, sizeof(struct rksm_rule_record), list_one,
			 &(struct listing){}) == -EMSGSIZE;
	for (int n = 0; n < LISTED; n++) {
		snprintf(path, sizeof(path), "/listed/%d", n);
		ok &= rule_processes(0, path) == 0 && !rule_remove(-1, path);
	}
	ok &= !rule_remove(self, NULL) && rule_remove(self, NULL) == -ENOENT;
	ksft_test_result(ok, "EMSGSIZE for a record that has no room; all can be removed\n");
	close(self);
}

/* Rules for cgroups */

static void joining(void)
{
	struct target inside = target_start(PAGES, 4, unique_key(), OPT_NONE);
	struct target later = target_start(PAGES, 4, unique_key(), OPT_NONE);
	struct target outside = target_start(PAGES, 4, unique_key(), OPT_NONE);
	pid_t begun, forked;
	bool ok;

	/* The rule is there first */
	ok = !rule_set(-1, "/rksm", RKSM_RULE_ALWAYS);
	rules_swept();
	ok &= rule_processes(0, "/rksm") == 0;
	make_cgroup("/rksm");
	move_to("/rksm", inside.child.pid);
	ksft_test_result(ok && holds_within(is_merge_any, &inside, SECONDS),
			 "a rule for a cgroup that is made later\n");
	move_to("/rksm", later.child.pid);
	ksft_test_result(holds_within(is_merge_any, &later, SECONDS), "a process that moves in\n");
	begun = begin_in("/rksm");
	ksft_test_result(holds_within(says_any, &begun, SECONDS), "one that begins there\n");
	ok = target_do(&inside, OP_PRCTL, 0) && target_do(&inside, OP_FORK, 0);
	forked = inside.state->forked;
	ksft_test_result(ok && holds_within(says_any, &forked, SECONDS), "one forked there\n");
	rules_swept();
	ksft_test_result(rule_processes(0, "/rksm") == 4 && !is_merge_any(&outside),
			 "they are counted, and nobody else is touched\n");

	if (forked > 0)
		kill(forked, SIGKILL);
	end_process(begun);
	move_to("", later.child.pid);
	target_end(&inside);
	remove_cgroup("/rksm");
	rules_swept();
	ok = rule_processes(0, "/rksm") == 0 && target_do(&later, OP_PRCTL, 0);
	make_cgroup("/rksm");
	move_to("/rksm", later.child.pid);
	ksft_test_result(ok && holds_within(is_merge_any, &later, SECONDS),
			 "a cgroup that is made again under its name\n");
	ok = !rule_remove(-1, "/rksm");
	target_end(&later);
	target_end(&outside);
	remove_cgroup("/rksm");
}

static void innermost(void)
{
	struct target outer = target_start(PAGES, 4, unique_key(), OPT_MADVISE);
	struct target inner = target_start(PAGES, 4, unique_key(), OPT_MADVISE);
	bool ok;

	make_cgroup("/rksm");
	make_cgroup("/rksm/in");
	make_cgroup("/rksm/in/most");
	move_to("/rksm", outer.child.pid);
	move_to("/rksm/in/most", inner.child.pid);
	ksm_start();
	ok = merges_within(&outer) && merges_within(&inner);
	/* The inner one first: a rule holds at once */
	ok &= !rule_set(-1, "/rksm/in", RKSM_RULE_NEVER) &&
	      !rule_set(-1, "/rksm", RKSM_RULE_ALWAYS);
	ksft_test_result(ok && holds_within(is_merge_any, &outer, SECONDS) &&
			 stays_unmerged(&inner) && !is_merge_any(&inner) && is_merged(&outer),
			 "never below always\n");
	ok = !rule_set(-1, "/rksm", RKSM_RULE_NEVER) && !rule_set(-1, "/rksm/in", RKSM_RULE_ALWAYS);
	ksft_test_result(ok && stays_unmerged(&outer) &&
			 holds_within(is_merge_any, &inner, SECONDS) &&
			 merges_within(&inner), "always below never\n");
	ok = !rule_set(-1, "/rksm/in/most", RKSM_RULE_NEVER) && stays_unmerged(&inner) &&
	     !rule_set(inner.pidfd, NULL, RKSM_RULE_DEFAULT) && merges_within(&inner);
	ksft_test_result(ok && stays_unmerged(&outer), "a process's own rule before all others\n");
	ok = !rule_remove(inner.pidfd, NULL) && stays_unmerged(&inner);
	ok &= !rule_remove(-1, "/rksm/in/most") && merges_within(&inner);
	ok &= !rule_remove(-1, "/rksm/in") && stays_unmerged(&inner);
	ok &= !rule_remove(-1, "/rksm") && merges_within(&inner) && merges_within(&outer);
	ksft_test_result(ok, "when a rule goes, the next one outside holds\n");
	ksm_set("run", 0);
	target_end(&outer);
	target_end(&inner);
	remove_cgroup("/rksm/in/most");
	remove_cgroup("/rksm/in");
	remove_cgroup("/rksm");
}

/* A child that runs in its parent's memory, as posix_spawn has it, in another cgroup */

static void borrowed(unsigned int action, const char *name)
{
	struct borrower *borrower = map_shared(1);
	struct child parent = borrower_start(borrower, PAGES);
	struct rksm_merge merge = { ALL_MEMORY };
	bool ok;

	make_cgroup("/rksm");
	merge.pidfd = pidfd_of(parent.pid);
	ok = !device_merge(&merge) && merge.merged == PAGES;
	child_go(&parent);
	child_wait_step(&parent);
	move_to("/rksm", borrower->pid);
	ok &= !rule_set(-1, "/rksm", action);
	rules_swept();
	ok &= rule_processes(0, "/rksm") == 1 && !is_excluded(&parent.pid);
	ok &= ksm_mappings(parent.pid, borrower->area, PAGES) == PAGES;
	ok &= child_end(&parent) == 0 && !rule_remove(-1, "/rksm");
	ksft_test_result(ok, "%s does not act on the memory that a child borrows\n", name);
	close(merge.pidfd);
	remove_cgroup("/rksm");
}

/* A process that is being killed while a rule or a call makes its memory mergeable */
static void killed(void)
{
	bool ok = true;

	make_cgroup("/rksm");
	ok &= !rule_set(-1, "/rksm", RKSM_RULE_ALWAYS);
	for (int n = 0; n < KILLS; n++) {
		struct target target = target_start(PAGES, 4, unique_key(), OPT_NONE);
		struct rksm_merge merge = { .pidfd = target.pidfd, .flags = RKSM_MERGE_ENABLE,
					    ALL_MEMORY };
		pid_t killer;
		int err = 0;

		killer = fork();
		if (!killer) {
			usleep(rnd_below(6000));
			_exit(kill(target.child.pid, SIGKILL));
		}
		if (n % 2) {
			err = device_merge(&merge);
		} else {
			try_move_to("/rksm", target.child.pid);
			err = rule_set(target.pidfd, NULL, RKSM_RULE_ALWAYS);
			rules_swept();
		}
		if (err && err != -ESRCH)
			ksft_print_msg("%s\n", strerror(-err));
		ok &= !err || err == -ESRCH;
		waitpid(killer, NULL, 0);
		target_end(&target);
	}
	ok &= !rule_remove(-1, "/rksm");
	ksft_test_result(ok, "%d processes are killed while they are enabled\n", KILLS);
	remove_cgroup("/rksm");
}

/* The module goes */

static void unloaded(void)
{
	struct target target = target_start(PAGES, 4, unique_key(), OPT_MADVISE);
	struct listing listing = {};
	bool ok;

	ksm_start();
	ok = merges_within(&target) && !rule_set(target.pidfd, NULL, RKSM_RULE_NEVER) &&
	     !rule_set(-1, "/", RKSM_RULE_DEFAULT) && stays_unmerged(&target);
	ksft_test_result(ok && module_remove() == -EWOULDBLOCK && module_loaded(),
			 "an open descriptor keeps the module\n");
	device_close();
	ksft_test_result(module_out() && access(DEVICE, F_OK), "closed, it does not\n");
	ksft_test_result(merges_within(&target), "the built-in merges who was excluded\n");
	ok = module_in("") && !device_list(RKSM_IOC_RULES, 4096, list_one, &listing) &&
	     !listing.pids && !listing.others && !is_excluded(&target.child.pid);
	ksft_test_result(ok && merges_within(&target), "no rule is there when it is loaded again\n");
	ksm_set("run", 2);
	target_end(&target);
	device_close();
}

int main(int argc, char **argv)
{
	struct target keeper;

	target_main(argc, argv);
	test_init(argc, argv);
	if (!module_path)
		ksft_exit_skip("no module named\n");
	test_plan(29);
	ksm_reset();
	if (!module_in("check=1"))
		die("insmod");
	killed();
	always();
	lasting();
	listed();
	joining();
	borrowed(RKSM_RULE_ALWAYS, "always");
	borrowed(RKSM_RULE_NEVER, "never");
	/* Something to scan always, as no scan is counted otherwise */
	keeper = target_start(1, 1, unique_key(), OPT_MADVISE);
	never();
	innermost();
	unloaded();
	target_end(&keeper);
	ksft_test_result(ksm_all_zero() && module_out() && slabs_empty(), "nothing stays\n");
	test_exit();
}
