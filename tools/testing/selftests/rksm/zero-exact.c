// SPDX-License-Identifier: GPL-2.0-only
/*
 * ksm_zero_pages counts what is there, although the core of mm counts wrongly where memory is not
 * forked, where a fork fails and where UFFDIO_MOVE takes pages; a split of a huge page gives no
 * page of zeroes away unless use_zero_pages says so.
 *
 * runs: cloud-amd64
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "util.h"

#define ZEROES	64
#define MOVED	16
#define SCANS	6
#define HUGE	2
#define AREA	(HUGE * HPAGE / PAGE)
/* Below the program, so that a fork copies it first */
#define LOW	((void *)0x100000)

static size_t on_zero_page(const void *area, size_t n)
{
	static struct mapping maps[AREA];
	size_t zero = 0;

	mappings_of(getpid(), area, n, maps);
	for (size_t i = 0; i < n; i++)
		zero += !!(maps[i].flags & KPF_ZERO_PAGE);
	return zero;
}

static void zeroes(char *area, size_t n)
{
	for (size_t i = 0; i < n; i++)
		fill_page(area + i * PAGE, 0);
	mergeable(area, n);
}

/* Puts zero pages into an area; the caller has ksm_zero_pages at 0 */
static bool placed(char *area, size_t n)
{
	zeroes(area, n);
	return ksm_until("ksm_zero_pages", n, 20);
}

static bool own_count(long n)
{
	long own = proc_ksm_stat(getpid(), "ksm_zero_pages");

	if (own != n)
		ksft_print_msg("ksm_zero_pages of the process is %ld, not %ld\n", own, n);
	return own == n;
}

/* After a full scan from its begin to its end */
static bool exact(long all, long own)
{
	ksm_scans(2);
	return ksm_until("ksm_zero_pages", all, 1) && own_count(own);
}

static int pass_if(bool ok)
{
	/* A child ends by _exit() */
	fflush(stdout);
	return ok ? KSFT_PASS : KSFT_FAIL;
}

static bool passes(int (*fn)(void *arg), void *arg)
{
	struct child child = child_start(fn, arg);
	int status = child_end(&child);

	return WIFEXITED(status) && WEXITSTATUS(status) == KSFT_PASS;
}

/* A grandchild that does not get the zero pages */
static int not_forked(void *advice)
{
	char *area = map_pages(ZEROES);
	int go[2], there[2];
	char byte = 0;
	bool ok = placed(area, ZEROES);
	pid_t pid;

	if (madvise(area, ZEROES * PAGE, *(int *)advice) || pipe(go) || pipe(there))
		die("madvise: %s", strerror(errno));
	pid = fork();
	if (!pid) {
		close(go[1]);
		byte = exact(ZEROES, 0);
		if (write(there[1], &byte, 1) != 1 || read(go[0], &byte, 1) < 0)
			_exit(1);
		_exit(0);
	}
	ok &= read(there[0], &byte, 1) == 1 && byte;
	ok &= exact(ZEROES, ZEROES);
	close(go[1]);
	waitpid(pid, NULL, 0);
	return pass_if(ok && exact(ZEROES, ZEROES));
}

static int moved(void *arg)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_MOVE };
	int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	char *area = map_pages(ZEROES), *to = map_pages(MOVED);
	struct uffdio_register reg = {
		.range = { (uintptr_t)to, MOVED * PAGE },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	struct uffdio_move move = {
		.dst = (uintptr_t)to,
		.src = (uintptr_t)area,
		.len = MOVED * PAGE,
	};
	bool ok = placed(area, ZEROES);

	(void)arg;
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &reg))
		return KSFT_SKIP;
	/* It gives up where a page or the mmap lock is in use for a moment */
	while (ioctl(uffd, UFFDIO_MOVE, &move)) {
		if (errno != EAGAIN)
			die("UFFDIO_MOVE: %s", strerror(errno));
		if (move.move > 0) {
			move.dst += move.move;
			move.src += move.move;
			move.len -= move.move;
		}
	}
	return pass_if(ok && exact(ZEROES - MOVED, ZEROES - MOVED) && page_holds(to, 0));
}

/* A fork that copies the zero pages, and then finds no memory */
static int fork_fails(void *arg)
{
	char *area = mmap(LOW, ZEROES * PAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
	bool ok;
	int err;

	(void)arg;
	if (area != LOW || madvise(area, ZEROES * PAGE, MADV_NOHUGEPAGE))
		die("mmap: %s", strerror(errno));
	ok = placed(area, ZEROES);
	if (!write_file("/proc/sys/vm/overcommit_kbytes", "1") ||
	    !write_file("/proc/sys/vm/overcommit_memory", "2"))
		die("overcommit_memory: %s", strerror(errno));
	err = fork() < 0 ? errno : 0;
	if (!err)
		_exit(0);
	write_file("/proc/sys/vm/overcommit_memory", "0");
	write_file("/proc/sys/vm/overcommit_ratio", "50");
	if (err != ENOMEM)
		ksft_print_msg("the fork failed with %s\n", strerror(err));
	ok &= err == ENOMEM && ksm_get("ksm_zero_pages") == ZEROES;
	return pass_if(ok && exact(ZEROES, ZEROES));
}

/* What the core counts rightly stays right */
static int changed(void *arg)
{
	char *area = map_pages(ZEROES), *to = map_pages(ZEROES);
	bool ok = placed(area, ZEROES);
	pid_t pid = fork();
	long left = ZEROES, now;

	(void)arg;
	if (!pid) {
		execl("/bin/true", "true", NULL);
		_exit(0);
	}
	waitpid(pid, NULL, 0);
	ok &= exact(left, left);
	ksm_set("run", 0);
	madvise(area, 8 * PAGE, MADV_DONTNEED);
	munmap(area + 8 * PAGE, 8 * PAGE);
	left -= 16;
	if (mremap(area + 16 * PAGE, 16 * PAGE, 16 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		die("mremap: %s", strerror(errno));
	/* What is moved is unmerged */
	left -= 16;
	area[40 * PAGE] = 1;
	left--;
	/* Memory that is read only, and has never been written to, is not KSM's */
	for (size_t i = 20; i < 30; i++)
		ok &= page_holds(to + i * PAGE, 0);
	now = ksm_get("ksm_zero_pages");
	if (now != left)
		ksft_print_msg("ksm_zero_pages is %ld, not %ld, at once\n", now, left);
	ok &= now == left;
	ksm_set("run", 1);
	left += 16;
	ok &= ksm_until("ksm_zero_pages", left, 20) && exact(left, left);
	if (madvise(area + 48 * PAGE, 16 * PAGE, MADV_UNMERGEABLE))
		die("MADV_UNMERGEABLE: %s", strerror(errno));
	left -= 16;
	return pass_if(ok && exact(left, left));
}

/* The count of each process may be wrong when the module goes: what the built-in gets is not */
static int handed_back(void *arg)
{
	char *area = map_pages(ZEROES);
	bool ok = placed(area, ZEROES);
	long left;
	pid_t pid;

	(void)arg;
	madvise(area, ZEROES * PAGE, MADV_DONTFORK);
	pid = fork();
	if (!pid)
		_exit(0);
	waitpid(pid, NULL, 0);
	ksm_set("run", 0);
	if (module_remove())
		die("rmmod: %s", strerror(errno));
	left = ksm_get("ksm_zero_pages");
	if (left != ZEROES)
		ksft_print_msg("the built-in shows %ld zero pages, not %d\n", left, ZEROES);
	ok &= left == ZEROES;
	munmap(area, ZEROES * PAGE);
	ok &= ksm_get("ksm_zero_pages") == 0;
	if (module_insert(""))
		die("insmod");
	return pass_if(ok);
}

static char *huge_area(void)
{
	char *map = mmap(NULL, (HUGE + 1) * HPAGE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *area = (char *)(((uintptr_t)map + HPAGE - 1) & ~(HPAGE - 1));
	struct mapping first;

	if (map == MAP_FAILED || madvise(area, HUGE * HPAGE, MADV_HUGEPAGE))
		die("MADV_HUGEPAGE: %s", strerror(errno));
	for (size_t i = 0; i < AREA; i++)
		fill_page(area + i * PAGE, 0);
	mappings_of(getpid(), area, 1, &first);
	if (!(first.flags & KPF_THP)) {
		ksft_print_msg("no huge page to be had\n");
		return NULL;
	}
	return area;
}

static bool rest_is_zero(const char *area)
{
	for (size_t i = 1; i < AREA; i++)
		if (i != HPAGE / PAGE && !page_holds(area + i * PAGE, 0))
			return false;
	return true;
}

static bool both_merged(void *area)
{
	return page_is_ksm(area) && page_is_ksm((char *)area + HPAGE);
}

/* One page of each of two huge pages has an equal, all others are zero */
static int split(void *use_zero_pages)
{
	bool on = *(bool *)use_zero_pages, ok;
	char *area = huge_area();
	uint64_t key = unique_key();
	long left = on ? AREA - 2 : 0;
	size_t zero;

	if (!area)
		return KSFT_SKIP;
	fill_page(area, key);
	fill_page(area + HPAGE, key);
	mergeable(area, AREA);
	ok = ksm_until_true(both_merged, area, 20);
	if (!ok)
		ksft_print_msg("not merged\n");
	if (!on)
		ok &= !on_zero_page(area, AREA) && ksm_get("ksm_zero_pages") == 0;
	ok &= ksm_until("ksm_zero_pages", left, 20) && exact(left, left);
	zero = on_zero_page(area, AREA);
	ok &= zero == (size_t)left && rest_is_zero(area) && page_holds(area, key);
	if (zero != (size_t)left)
		ksft_print_msg("%zu mappings of the zero page, not %ld\n", zero, left);
	ksm_set("run", 2);
	zero = on_zero_page(area, AREA);
	if (zero)
		ksft_print_msg("%zu mappings of the zero page after run=2\n", zero);
	return pass_if(ok && !zero && ksm_all_zero() && rest_is_zero(area));
}

/* Two processes map the huge pages */
static int split_shared(void *arg)
{
	char *area = huge_area();
	uint64_t key = unique_key();
	int status, fd[2];
	bool ok;
	pid_t pid;

	(void)arg;
	if (!area)
		return KSFT_SKIP;
	fill_page(area, key);
	fill_page(area + HPAGE, key);
	mergeable(area, AREA);
	if (pipe(fd))
		die("pipe: %s", strerror(errno));
	ksm_set("run", 0);
	pid = fork();
	if (!pid) {
		char byte;

		close(fd[1]);
		if (read(fd[0], &byte, 1) < 0)
			_exit(1);
		_exit(on_zero_page(area, AREA) || !rest_is_zero(area));
	}
	ksm_set("run", 1);
	ksm_scans(SCANS);
	ok = !on_zero_page(area, AREA) && rest_is_zero(area) && page_holds(area, key);
	close(fd[0]);
	close(fd[1]);
	waitpid(pid, &status, 0);
	ok &= WIFEXITED(status) && !WEXITSTATUS(status);
	/* The other is gone: nothing keeps them whole */
	return pass_if(ok && ksm_until_true(both_merged, area, 20) && !on_zero_page(area, AREA));
}

int main(int argc, char **argv)
{
	bool huge, on;
	int advice;

	test_init(argc, argv);
	test_plan(10);
	ksm_reset();
	ksm_set("use_zero_pages", 1);
	ksm_start();
	advice = MADV_DONTFORK;
	ksft_test_result(passes(not_forked, &advice), "memory that is not forked\n");
	ksft_test_result(ksm_get("ksm_zero_pages") == 0, "nothing is counted when all are gone\n");
	advice = MADV_WIPEONFORK;
	ksft_test_result(passes(not_forked, &advice), "memory that is wiped on fork\n");
	ksft_test_result(passes(moved, NULL), "UFFDIO_MOVE\n");
	ksft_test_result(passes(fork_fails, NULL), "a fork that fails\n");
	ksft_test_result(passes(changed, NULL), "memory that changes\n");
	if (module_path)
		ksft_test_result(passes(handed_back, NULL), "the built-in gets the count\n");
	else
		ksft_test_result_skip("no module to remove\n");
	ksm_set("run", 2);
	ksm_start();
	huge = write_file("/sys/kernel/mm/transparent_hugepage/enabled", "always");
	for (int n = 0; n < 2; n++) {
		on = n;
		ksm_set("run", 2);
		ksm_set("use_zero_pages", on);
		ksm_start();
		if (huge)
			ksft_test_result(passes(split, &on), "split, use_zero_pages=%d\n", on);
		else
			ksft_test_result_skip("split, use_zero_pages=%d\n", on);
	}
	ksm_set("run", 2);
	ksm_set("use_zero_pages", 0);
	ksm_start();
	if (huge)
		ksft_test_result(passes(split_shared, NULL), "split of what two processes map\n");
	else
		ksft_test_result_skip("split of what two processes map\n");
	test_exit();
}
