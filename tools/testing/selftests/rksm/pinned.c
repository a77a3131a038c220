// SPDX-License-Identifier: GPL-2.0-only
/*
 * A page that the kernel holds for I/O is never merged, as its holder would go on using
 * the old page: held by vmsplice, by a registered io_uring buffer, and by O_DIRECT.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "util.h"

#define TWINS	8
#define SCANS	6	/* twice as many as it takes to merge */

/*
 * TWINS equal pages; the last is the one that gets pinned: where a pinned page comes first,
 * its twins may have to wait for it.
 */
static char *twins(uint64_t key)
{
	char *area = map_pages(TWINS);

	for (size_t i = 0; i < TWINS; i++)
		fill_page(area + i * PAGE, key);
	mergeable(area, TWINS);
	return area;
}

static uint64_t pfn_of(const void *page)
{
	struct mapping map;

	mappings_of(getpid(), page, 1, &map);
	return map.pfn;
}

static bool others_merged(void *area)
{
	return ksm_mappings(getpid(), area, TWINS - 1) == TWINS - 1;
}

static bool all_merged(void *area)
{
	return ksm_mappings(getpid(), area, TWINS) == TWINS;
}

/* Neither another page nor one that changed into a KSM page */
static bool stays(char *page, uint64_t pfn)
{
	for (int n = 0; n < SCANS; n++) {
		ksm_scans(1);
		if (pfn_of(page) != pfn || page_is_ksm(page)) {
			ksft_print_msg("the pinned page was merged\n");
			return false;
		}
	}
	return true;
}

static void with_vmsplice(void)
{
	char *area = twins(unique_key()), *pinned = area + (TWINS - 1) * PAGE, seen[16];
	struct iovec iov = { pinned, PAGE };
	uint64_t pfn;
	int fd[2];
	bool ok;

	if (pipe(fd) || vmsplice(fd[1], &iov, 1, 0) != (ssize_t)PAGE)
		die("vmsplice: %s", strerror(errno));
	pfn = pfn_of(pinned);
	ksm_start();
	ok = ksm_until_true(others_merged, area, 12);
	ksft_test_result(ok && stays(pinned, pfn),
			 "vmsplice: the page is not merged, its twins are\n");

	/* What the pipe's reader sees is this very page */
	memcpy(pinned, "rksm selftest", 14);
	ok = read(fd[0], seen, sizeof(seen)) == sizeof(seen) && !strcmp(seen, "rksm selftest");
	ksft_test_result(ok, "vmsplice: the reader sees what is written later\n");
	close(fd[0]);
	close(fd[1]);
	memcpy(pinned, area, PAGE);
	ksft_test_result(ksm_until_true(all_merged, area, 12), "vmsplice: merged when released\n");
	munmap(area, TWINS * PAGE);
}

static void with_io_uring(void)
{
	static const char *const names[] = {
		"io_uring: a registered page is not merged, its twins are",
		"io_uring: registering a merged page gives it a page of its own",
		"io_uring: merged when released",
	};
	char *area = twins(unique_key()), *pinned = area + (TWINS - 1) * PAGE;
	struct io_uring_params params = {};
	int ring = syscall(SYS_io_uring_setup, 4, &params);
	struct iovec iov = { pinned, PAGE };
	uint64_t pfn;
	bool ok;

	if (ring < 0) {
		for (size_t n = 0; n < ARRAY_SIZE(names); n++)
			ksft_test_result_skip("%s: no io_uring\n", names[n]);
		return;
	}
	if (syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &iov, 1))
		die("IORING_REGISTER_BUFFERS: %s", strerror(errno));
	pfn = pfn_of(pinned);
	ok = ksm_until_true(others_merged, area, 12);
	ksft_test_result(ok && stays(pinned, pfn), "%s\n", names[0]);

	if (syscall(SYS_io_uring_register, ring, IORING_UNREGISTER_BUFFERS, NULL, 0) ||
	    !ksm_until_true(all_merged, area, 12) ||
	    syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &iov, 1))
		die("IORING_REGISTER_BUFFERS of a merged page: %s", strerror(errno));
	pfn = pfn_of(pinned);
	ksft_test_result(!page_is_ksm(pinned) && stays(pinned, pfn), "%s\n", names[1]);
	syscall(SYS_io_uring_register, ring, IORING_UNREGISTER_BUFFERS, NULL, 0);
	ksft_test_result(ksm_until_true(all_merged, area, 12), "%s\n", names[2]);
	close(ring);
	munmap(area, TWINS * PAGE);
}

/* O_DIRECT reads into memory that the scanner would like to merge, all the time */

static const char *disk;

static bool direct_io(void)
{
	char *area = map_pages(TWINS), *expected = map_shared(TWINS);
	int fd = open(disk, O_RDWR | O_DIRECT | O_CLOEXEC);
	bool merged = false;

	if (fd < 0)
		die("%s: %s", disk, strerror(errno));
	mergeable(area, TWINS);
	for (int round = 0; round < 400; round++) {
		size_t n = 1 + rnd_below(TWINS), at = rnd_below(TWINS - n + 1);

		for (size_t i = 0; i < n; i++)
			fill_page(area + (at + i) * PAGE, rnd_below(3));
		memcpy(expected + at * PAGE, area + at * PAGE, n * PAGE);
		if (rnd_below(4) == 0)
			ksm_scans(3);
		merged |= ksm_mappings(getpid(), area, TWINS) > 0;
		/* Out to the disk, over it with another content, and in again */
		if (pwrite(fd, area + at * PAGE, n * PAGE, at * PAGE) != (ssize_t)(n * PAGE))
			die("O_DIRECT write: %s", strerror(errno));
		for (size_t i = 0; i < n; i++)
			fill_page(area + (at + i) * PAGE, 4);
		if (rnd_below(4) == 0)
			ksm_scans(3);
		if (pread(fd, area + at * PAGE, n * PAGE, at * PAGE) != (ssize_t)(n * PAGE))
			die("O_DIRECT read: %s", strerror(errno));
		if (memcmp(area + at * PAGE, expected + at * PAGE, n * PAGE)) {
			ksft_print_msg("round %d: the bytes read are not those written\n", round);
			return false;
		}
	}
	close(fd);
	return merged;
}

int main(int argc, char **argv)
{
	test_init(argc, argv);
	test_plan(7);
	ksm_reset();
	with_vmsplice();
	with_io_uring();
	if (!system("modprobe zram num_devices=2 2>/dev/null; "
		    "{ test -e /dev/zram1 || cat /sys/class/zram-control/hot_add; } >/dev/null && "
		    "echo 1M >/sys/block/zram1/disksize 2>/dev/null"))
		disk = "/dev/zram1";
	if (disk)
		ksft_test_result(direct_io(), "O_DIRECT reads and writes what it should\n");
	else
		ksft_test_result_skip("O_DIRECT: no zram to do it on\n");
	test_exit();
}
