// SPDX-License-Identifier: GPL-2.0-only
/*
 * A page that cannot be merged harms no other: it keeps none of its equals apart, no huge page is
 * split for it, and no page is converted and copied back.
 *
 * runs: cloud-amd64 sanitizer
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "util.h"

#define EQUALS	16	/* as many as a pipe holds */
#define SCANS	6	/* twice as many as it takes to merge */
#define HUGE	(HPAGE / PAGE)

/* Holds the pages until the process ends: vmsplice puts them into a pipe */
static void hold(char *area, size_t pages)
{
	struct iovec iov = { area, pages * PAGE };
	int fd[2];

	if (pipe(fd) || vmsplice(fd[1], &iov, 1, 0) != (ssize_t)(pages * PAGE))
		die("vmsplice: %s", strerror(errno));
}

/* Equals of other processes */

static char *equals;
static uint64_t key;

static int victim(void *arg)
{
	for (size_t i = 0; i < EQUALS; i++)
		fill_page(equals + i * PAGE, key + i);
	mergeable(equals, EQUALS);
	if (arg)
		hold(equals, EQUALS);
	child_step();
	return 0;
}

static void between_equals(void)
{
	struct child children[4];
	size_t merged[4];

	equals = map_pages(EQUALS);
	key = unique_key();
	for (int i = 1; i < (int)EQUALS; i++)
		unique_key();
	/* Scanned in the order of their birth: of every two, the second holds its pages */
	for (int i = 0; i < 4; i++) {
		children[i] = child_start(victim, i % 2 ? "" : NULL);
		child_wait_step(&children[i]);
	}
	ksm_start();
	ksm_scans(SCANS);
	for (int i = 0; i < 4; i++)
		merged[i] = ksm_mappings(children[i].pid, equals, EQUALS);
	ksft_print_msg("merged: %zu, %zu of equals; %zu, %zu of those that are held\n",
		       merged[0], merged[2], merged[1], merged[3]);
	ksft_test_result(merged[0] == EQUALS && merged[2] == EQUALS,
			 "held pages between equals do not keep them apart\n");
	ksft_test_result(!merged[1] && !merged[3], "held pages are not merged\n");
	for (int i = 0; i < 4; i++)
		child_kill(&children[i]);
	ksm_reset();
}

/* Equals of a page of a huge one */

static char *map_huge(size_t number)
{
	char *area = map_at(NULL, (number + 1) * HUGE);

	area = (char *)(((uintptr_t)area + HPAGE - 1) & ~(HPAGE - 1));
	madvise(area, number * HPAGE, MADV_HUGEPAGE);
	for (size_t i = 0; i < number * HUGE; i++)
		fill_page(area + i * PAGE, unique_key());
	mergeable(area, number * HUGE);
	return area;
}

static bool is_huge(const char *area)
{
	struct mapping map;

	mappings_of(getpid(), area, 1, &map);
	return map.flags & KPF_THP;
}

static void watch(char *page)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP };
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_WP };
	struct uffdio_writeprotect wp = { .mode = UFFDIO_WRITEPROTECT_MODE_WP };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);

	reg.range = wp.range = (struct uffdio_range){ (uintptr_t)page, PAGE };
	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &reg) ||
	    ioctl(fd, UFFDIO_WRITEPROTECT, &wp))
		die("userfaultfd: %s", strerror(errno));
}

enum harm { WATCHED, IN_HELD_HUGE, CHANGED };

/* A partner of a huge page's page, which cannot be merged, and is known to the scanner first */
static void partner(enum harm harm)
{
	static const char *const names[] = {
		[WATCHED] = "that a userfaultfd protects",
		[IN_HELD_HUGE] = "of a huge page that is held",
		[CHANGED] = "that has changed without a trace",
	};
	long split, copied;
	uint64_t shared = unique_key();
	char *page = harm == IN_HELD_HUGE ? map_huge(1) : map_pages(1), *huge;
	char *other = map_pages(1);
	bool ok;

	fill_page(page, shared);
	mergeable(page, 1);
	if (harm == WATCHED)
		watch(page);
	if (harm == IN_HELD_HUGE)
		hold(page + PAGE, 1);
	ksm_start();
	ksm_scans(3);
	if (harm == CHANGED) {
		int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);

		/* No accessed bit is set where the kernel writes for a debugger */
		fill_page(other, unique_key());
		if (pwrite(fd, other, PAGE, (off_t)page) != (ssize_t)PAGE)
			die("/proc/self/mem: %s", strerror(errno));
		close(fd);
	}
	huge = map_huge(1);
	fill_page(huge + 5 * PAGE, shared);
	ok = is_huge(huge);
	split = vmstat("thp_split_page");
	copied = vmstat("cow_ksm");
	ksm_scans(SCANS);
	if (!ok)
		ksft_test_result_skip("no huge page is split for a page %s\n", names[harm]);
	else
		ksft_test_result(is_huge(huge) && vmstat("thp_split_page") == split,
				 "no huge page is split for a page %s\n", names[harm]);
	ksft_test_result(vmstat("cow_ksm") == copied,
			 "no page is converted and copied back for a page %s\n", names[harm]);
	munmap(huge, HPAGE);
	munmap(page, PAGE);
	munmap(other, PAGE);
	ksm_reset();
}

/* Huge pages beside each other, each a copy of the one before: two are in one batch */
static void beside(void)
{
	const size_t number = 4;
	char *area = map_huge(number);
	long copied;

	for (size_t i = 1; i < number; i += 2)
		memcpy(area + i * HPAGE, area + (i - 1) * HPAGE, HPAGE);
	copied = vmstat("cow_ksm");
	ksm_set("pages_to_scan", 100000);
	ksm_start();
	ksm_scans(SCANS);
	ksft_test_result(ksm_mappings(getpid(), area, number * HUGE) == number * HUGE,
			 "huge pages beside each other are merged\n");
	ksft_test_result(vmstat("cow_ksm") == copied, "and no page is copied back\n");
}

int main(int argc, char **argv)
{
	test_init(argc, argv);
	test_plan(10);
	ksm_reset();
	between_equals();
	partner(WATCHED);
	partner(IN_HELD_HUGE);
	partner(CHANGED);
	beside();
	test_exit();
}
