// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/rksm is opened by those who may only, and refuses what is no proper request.
 *
 * runs: cloud-amd64 sanitizer
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "device.h"

/* Who may open it */

static int opens(void *how)
{
	struct __user_cap_header_struct head = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[2] = {};
	int fd;

	if (how == opens && unshare(CLONE_NEWUSER))
		return KSFT_SKIP;
	if (!how) {
		syscall(SYS_capget, &head, data);
		data[CAP_SYS_ADMIN / 32].effective &= ~(1U << CAP_SYS_ADMIN % 32);
		if (syscall(SYS_capset, &head, data))
			return KSFT_FAIL;
	}
	fd = open(DEVICE, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return errno;
	return 0;
}

static void opened(void)
{
	struct child child = child_start(opens, NULL);
	struct stat stat;
	int status;

	ksft_test_result(WEXITSTATUS(child_end(&child)) == EPERM,
			 "without CAP_SYS_ADMIN the device cannot be opened\n");
	child = child_start(opens, opens);
	status = WEXITSTATUS(child_end(&child));
	if (status == KSFT_SKIP)
		ksft_test_result_skip("no user namespaces here\n");
	else
		ksft_test_result(status == EPERM, "nor by root of another user namespace\n");
	ksft_test_result(!lstat(DEVICE, &stat) && S_ISCHR(stat.st_mode) &&
			 (stat.st_mode & 07777) == 0600 && !stat.st_uid, "its mode is 0600\n");
}

/* What it refuses */

union argument {
	__u32 size;
	struct rksm_rule rule;
	struct rksm_list list;
	struct rksm_merge merge;
	struct rksm_unmerge unmerge;
	struct rksm_why why;
	char bytes[8192];
};

struct bad {
	const char *name;
	unsigned int cmd;
	int err;
	union argument arg;
};

static struct rksm_stat_record records[4];
static const char path[] = "/no-such-cgroup";

#define PATH(p) .pidfd = -1, .path = (uintptr_t)(p), .path_len = sizeof(p) - 1
#define BUFFER .records = (uintptr_t)records, .len = sizeof(records)

#define RULE_(e, ...) RKSM_IOC_RULE, e, { .rule = { 32, __VA_ARGS__ } }
#define LIST_(c, e, ...) RKSM_IOC_##c, e, { .list = { 32, __VA_ARGS__ } }
#define MERGE_(e, ...) RKSM_IOC_MERGE, e, { .merge = { 200, __VA_ARGS__ } }
#define UNMERGE_(e, ...) RKSM_IOC_UNMERGE, e, { .unmerge = { 48, __VA_ARGS__ } }
#define WHY_(e, ...) RKSM_IOC_WHY, e, { .why = { 80, __VA_ARGS__ } }

/* pidfd: of this process, of one that has ended, and a descriptor that is none */
static void refused(int own, int ended, int other)
{
	const struct bad table[] = {
		{ "an unknown call", _IO(RKSM_IOC_MAGIC, 6), ENOTTY, {} },
		{ "another magic", _IO(0x12, 2), ENOTTY, {} },
		{ "a size encoded", _IOWR(RKSM_IOC_MAGIC, 2, struct rksm_merge), ENOTTY, {} },
		{ "rule: size 0", RKSM_IOC_RULE, EINVAL, {} },
		{ "rule: too small", RKSM_IOC_RULE, EINVAL, { 31 } },
		{ "rules: too small", RKSM_IOC_RULES, EINVAL, { 24 } },
		{ "merge: too small", RKSM_IOC_MERGE, EINVAL, { 199 } },
		{ "unmerge: too small", RKSM_IOC_UNMERGE, EINVAL, { 40 } },
		{ "stat: too small", RKSM_IOC_STAT, EINVAL, { 31 } },
		{ "why: too small", RKSM_IOC_WHY, EINVAL, { 79 } },
		{ "more than a page", RKSM_IOC_WHY, E2BIG, { 4097 } },
		{ "size ~0", RKSM_IOC_WHY, E2BIG, { ~0U } },
		{ "rule: flag", RULE_(EINVAL, .flags = 2, PATH(path)) },
		{ "rule: action", RULE_(EINVAL, .action = 3, PATH(path)) },
		{ "rule: reserved", RULE_(EINVAL, .reserved = 1, PATH(path)) },
		{ "rule: remove and always", RULE_(EINVAL, .flags = 1, .action = 1, PATH(path)) },
		{ "rule: pidfd -2", RULE_(EINVAL, .pidfd = -2) },
		{ "rule: neither", RULE_(EINVAL, .pidfd = -1) },
		{ "rule: both", RULE_(EINVAL, .pidfd = own, .path = 1, .path_len = 1) },
		{ "rule: length without path", RULE_(EINVAL, .pidfd = -1, .path_len = 1) },
		{ "rule: long path", RULE_(EINVAL, .pidfd = -1, .path = 1, .path_len = 4096) },
		{ "rule: path unmapped", RULE_(EFAULT, .pidfd = -1, .path = 8, .path_len = 9) },
		{ "rule: relative path", RULE_(EINVAL, PATH("a")) },
		{ "rule: slash at the end", RULE_(EINVAL, PATH("/a/")) },
		{ "rule: two slashes", RULE_(EINVAL, PATH("//a")) },
		{ "rule: dot", RULE_(EINVAL, PATH("/./a")) },
		{ "rule: dots", RULE_(EINVAL, PATH("/a/..")) },
		{ "rule: NUL", RULE_(EINVAL, PATH("/a\0b")) },
		{ "rule: ended process", RULE_(ESRCH, .pidfd = ended) },
		{ "rule: not a pidfd", RULE_(EBADF, .pidfd = other) },
		{ "rule: closed descriptor", RULE_(EBADF, .pidfd = 1000) },
		{ "rule: remove none", RULE_(ENOENT, .flags = 1, PATH(path)) },
		{ "rule: remove none of a process", RULE_(ENOENT, .flags = 1, .pidfd = own) },
		{ "rules: flag", LIST_(RULES, EINVAL, .flags = 1, BUFFER) },
		{ "rules: no buffer", LIST_(RULES, EINVAL, .len = 0) },
		{ "rules: small buffer",
		  LIST_(RULES, EINVAL, .records = 8, .len = sizeof(struct rksm_rule_record) - 1) },
		{ "stat: flag", LIST_(STAT, EINVAL, .flags = 1, BUFFER) },
		{ "stat: small buffer",
		  LIST_(STAT, EINVAL, .records = 8, .len = sizeof(struct rksm_stat_record) - 1) },
		{ "merge: flag", MERGE_(EINVAL, .pidfd = own, .flags = 2, ALL_MEMORY) },
		{ "merge: reserved", MERGE_(EINVAL, .pidfd = own, .reserved = 1, ALL_MEMORY) },
		{ "merge: start", MERGE_(EINVAL, .pidfd = own, .start = 1, ALL_MEMORY) },
		{ "merge: end", MERGE_(EINVAL, .pidfd = own, .end = PAGE + 1) },
		{ "merge: nothing", MERGE_(EINVAL, .pidfd = own, .start = PAGE, .end = PAGE) },
		{ "merge: backwards",
		  MERGE_(EINVAL, .pidfd = own, .start = 2 * PAGE, .end = PAGE) },
		{ "merge: pidfd -1", MERGE_(EINVAL, .pidfd = -1, ALL_MEMORY) },
		{ "merge: not a pidfd", MERGE_(EBADF, .pidfd = other, ALL_MEMORY) },
		{ "merge: ended process", MERGE_(ESRCH, .pidfd = ended, ALL_MEMORY) },
		{ "merge: nothing mergeable", MERGE_(ENODATA, .pidfd = own, ALL_MEMORY) },
		{ "unmerge: flag", UNMERGE_(EINVAL, .pidfd = own, .flags = 2, ALL_MEMORY) },
		{ "unmerge: reserved", UNMERGE_(EINVAL, .pidfd = own, .reserved = 1, ALL_MEMORY) },
		{ "unmerge: start", UNMERGE_(EINVAL, .pidfd = own, .start = 8, ALL_MEMORY) },
		{ "unmerge: nothing", UNMERGE_(EINVAL, .pidfd = own) },
		{ "unmerge: disable a range",
		  UNMERGE_(EINVAL, .pidfd = own, .flags = 1, .end = PAGE) },
		{ "unmerge: not a pidfd", UNMERGE_(EBADF, .pidfd = other, ALL_MEMORY) },
		{ "unmerge: ended process", UNMERGE_(ESRCH, .pidfd = ended, ALL_MEMORY) },
		{ "why: flag", WHY_(EINVAL, .pidfd = own, .flags = 4) },
		{ "why: reserved", WHY_(EINVAL, .pidfd = own, .reserved = 1) },
		{ "why: at", WHY_(EINVAL, .pidfd = own, .at = 1) },
		{ "why: not a pidfd", WHY_(EBADF, .pidfd = other) },
		{ "why: ended process", WHY_(ESRCH, .pidfd = ended) },
		{ "why: nothing mergeable", WHY_(ENODATA, .pidfd = own) },
	};
	bool ok = true;

	for (size_t i = 0; i < ARRAY_SIZE(table); i++) {
		union argument arg = table[i].arg;
		int err = -device_call(table[i].cmd, &arg);

		if (err != table[i].err)
			ksft_print_msg("%s: %s, not %s\n", table[i].name, strerror(err),
				       strerror(table[i].err));
		ok &= err == table[i].err;
	}
	ksft_test_result(ok, "%zu bad arguments are refused as they should\n", ARRAY_SIZE(table));
}

/* Arguments longer than the module knows, and such as are not there */
static void sizes(int own)
{
	static const struct {
		unsigned int cmd;
		size_t size;
		union argument arg;
	} known[] = {
		{ RKSM_IOC_RULES, 32, { .list = { BUFFER } } },
		{ RKSM_IOC_STAT, 32, { .list = { BUFFER } } },
		{ RKSM_IOC_MERGE, 200, { .merge = { ALL_MEMORY } } },
		{ RKSM_IOC_UNMERGE, 48, { .unmerge = { ALL_MEMORY } } },
		{ RKSM_IOC_WHY, 80, {} },
	};
	char *last = map_pages(2) + PAGE;
	bool ok = true;

	mprotect(last, PAGE, PROT_NONE);
	for (size_t i = 0; i < ARRAY_SIZE(known); i++) {
		size_t longer[] = { known[i].size + 1, known[i].size + 8, 4096 };

		for (size_t n = 0; n < ARRAY_SIZE(longer); n++) {
			union argument arg = known[i].arg;
			int zero, more;

			arg.size = longer[n];
			if (i > 1)
				arg.merge.pidfd = own;
			zero = device_call(known[i].cmd, &arg);
			arg.bytes[longer[n] - 1] = 1;
			more = device_call(known[i].cmd, &arg);
			if (zero || more != -E2BIG)
				ksft_print_msg("call %zu of %zu bytes: %s, %s\n", i, longer[n],
					       strerror(-zero), strerror(-more));
			ok &= !zero && more == -E2BIG;
		}
		memcpy(last - 4, &(__u32){ known[i].size }, 4);
		ok &= device_call(known[i].cmd, last - 4) == -EFAULT &&
		      device_call(known[i].cmd, last - 2) == -EFAULT &&
		      device_call(known[i].cmd, NULL) == -EFAULT;
	}
	ksft_test_result(ok, "longer arguments work if they end in zeroes; EFAULT\n");
	munmap(last - PAGE, 2 * PAGE);
}

static void bad_input(void)
{
	struct target target = target_start(1, 1, 1, OPT_NONE);
	struct rksm_list list = { .size = sizeof(list), .records = 8, .len = 1 << 16 };
	int own = pidfd_of(getpid()), ended = target.pidfd;
	struct rksm_merge merge = { .pidfd = own, ALL_MEMORY };
	char *page = map_pages(1);

	child_kill(&target.child);
	refused(own, ended, device_call(0, NULL) ? open("/dev/null", O_RDWR | O_CLOEXEC) : -1);
	mergeable(page, 1);
	*page = 1;
	sizes(own);
	ksft_test_result(device_call(RKSM_IOC_STAT, &list) == -EFAULT,
			 "EFAULT for a buffer that is not mapped\n");
	ksm_set("run", 2);
	ksft_test_result(device_merge(&merge) == -EBUSY, "nothing is merged while run is 2\n");
	ksm_set("run", 0);
	munmap(page, PAGE);
	close(own);
}

int main(int argc, char **argv)
{
	test_init(argc, argv);
	if (!module_loaded())
		ksft_exit_skip("only rksm has " DEVICE "\n");
	test_plan(7);
	ksm_reset();
	opened();
	bad_input();
	test_exit();
}
