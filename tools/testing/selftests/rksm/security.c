// SPDX-License-Identifier: GPL-2.0-only
/*
 * What a user without privileges can do: read the files, not write them; neither stop the
 * scanner nor grow its memory without bound, with contents made to collide, memory that is
 * sparse, or a userfaultfd that never answers.
 *
 * runs: cloud-amd64 builtin
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "util.h"

#define NOBODY		65534
#define FLOOD		1024	/* pages made to collide */
#define HONEST		64	/* pages of another process, two of each */
#define SPARSE		128	/* pages, each in 2 MiB of its own */
#define WATCHED		16
#define WORDS		(PAGE / sizeof(uint64_t))

/* Of "xxHash fast digest algorithm", Yann Collet: the constants of the 64-bit variant */
#define P1		0x9E3779B185EBCA87ULL
#define P2		0xC2B2AE3D27D4EB4FULL
#define P3		0x165667B19E3779F9ULL
#define P4		0x85EBCA77C2B2AE63ULL

static uint64_t rol(uint64_t x, int by)
{
	return x << by | x >> (64 - by);
}

static uint64_t xx_round(uint64_t acc, uint64_t lane)
{
	return rol(acc + lane * P2, 31) * P1;
}

/* The hash of a page, whose length is a multiple of the four lanes */
static uint64_t xx_page(const uint64_t *page, uint64_t seed)
{
	uint64_t acc[4] = { seed + P1 + P2, seed + P2, seed, seed - P1 };
	uint64_t hash;

	for (size_t i = 0; i < WORDS; i++)
		acc[i % 4] = xx_round(acc[i % 4], page[i]);
	hash = rol(acc[0], 1) + rol(acc[1], 7) + rol(acc[2], 12) + rol(acc[3], 18);
	for (int i = 0; i < 4; i++)
		hash = (hash ^ xx_round(0, acc[i])) * P1 + P4;
	hash += PAGE;
	hash = (hash ^ hash >> 33) * P2;
	hash = (hash ^ hash >> 29) * P3;
	return hash ^ hash >> 32;
}

static uint64_t inverse(uint64_t odd)
{
	uint64_t x = odd;

	for (int i = 0; i < 6; i++)
		x *= 2 - odd * x;
	return x;
}

/*
 * The top bit of a lane's input turns exactly one bit of its accumulator, up or down by the
 * seed; the next input of the lane can take that back, with one chance in two. So of pages
 * that differ in two such places one in four has the hash of the others, whatever the seed.
 */
static void make_colliding(uint64_t *page, const uint64_t *base, size_t n)
{
	uint64_t undo = (P1 << 30) * inverse(P2);
	size_t place[2] = { n % 32, 128 + n / 32 % 32 };

	memcpy(page, base, PAGE);
	for (int i = 0; i < 2; i++) {
		/* Pairs of blocks of four lanes: where a lane's word and its successor are */
		size_t at = place[i] / 4 * 8 + place[i] % 4;

		page[at] ^= 1ULL << 63;
		page[at + 4] += undo;
	}
}

static bool drop_privileges(void)
{
	return !setgroups(0, NULL) && !setgid(NOBODY) && !setuid(NOBODY);
}

static bool files_are_roots(void)
{
	for (size_t i = 0; i < KSM_FILES; i++) {
		mode_t mode = S_IFREG | (i < KSM_FIRST_RW ? 0444 : 0644);
		struct stat st;
		char path[128];

		snprintf(path, sizeof(path), "/sys/kernel/mm/ksm/%s", ksm_files[i]);
		if (stat(path, &st) || st.st_uid || st.st_gid || st.st_mode != mode) {
			ksft_print_msg("%s: owner %d:%d, mode %o\n", path, st.st_uid, st.st_gid,
				       st.st_mode);
			return false;
		}
	}
	return true;
}

static int nobody_writes(void *arg)
{
	(void)arg;
	if (!drop_privileges())
		return KSFT_FAIL;
	for (size_t i = 0; i < KSM_FILES; i++) {
		char path[128], text[64];
		int fd;

		snprintf(path, sizeof(path), "/sys/kernel/mm/ksm/%s", ksm_files[i]);
		if (read_file(path, text, sizeof(text)) <= 0)
			return KSFT_FAIL;
		fd = open(path, O_WRONLY | O_CLOEXEC);
		if (fd >= 0 || errno != EACCES)
			return KSFT_FAIL;
	}
	return KSFT_PASS;
}

static int flood(void *arg)
{
	uint64_t *base = map_shared(1);
	char *area;

	(void)arg;
	for (size_t i = 0; i < WORDS; i++)
		base[i] = rnd();
	if (!drop_privileges())
		return KSFT_FAIL;
	area = map_pages(FLOOD);
	for (size_t i = 0; i < FLOOD; i++)
		make_colliding((uint64_t *)(area + i * PAGE), base, i);
	mergeable(area, FLOOD);
	child_step();
	for (size_t i = 0; i < FLOOD; i++) {
		uint64_t page[WORDS];

		make_colliding(page, base, i);
		if (memcmp(page, area + i * PAGE, PAGE))
			return KSFT_FAIL;
	}
	return KSFT_PASS;
}

/* How many pages of a flood collide, for a seed that nobody knows */
static size_t colliding(void)
{
	uint64_t base[WORDS], page[WORDS], seed = rnd(), hash, n = 0;

	for (size_t i = 0; i < WORDS; i++)
		base[i] = rnd();
	hash = xx_page(base, seed);
	for (size_t i = 0; i < FLOOD; i++) {
		make_colliding(page, base, i);
		n += xx_page(page, seed) == hash;
	}
	return n;
}

static int sparse(void *arg)
{
	char *area = map_at(NULL, SPARSE * HPAGE / PAGE);

	(void)arg;
	if (!drop_privileges() || madvise(area, SPARSE * HPAGE, MADV_NOHUGEPAGE))
		return KSFT_FAIL;
	for (size_t i = 0; i < SPARSE; i++)
		fill_page(area + i * HPAGE, unique_key());
	mergeable(area, SPARSE * HPAGE / PAGE);
	child_step();
	return KSFT_PASS;
}

/* Merged pages that a userfaultfd, which nobody reads, protects from writes */
static int watched(void *arg)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP };
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_WP };
	struct uffdio_writeprotect wp = { .mode = UFFDIO_WRITEPROTECT_MODE_WP };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	char *area = map_pages(WATCHED);

	(void)arg;
	for (size_t i = 0; i < WATCHED; i++)
		fill_page(area + i * PAGE, 1);
	mergeable(area, WATCHED);
	child_step();
	reg.range = wp.range = (struct uffdio_range){ (uintptr_t)area, WATCHED * PAGE };
	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &reg) ||
	    ioctl(fd, UFFDIO_WRITEPROTECT, &wp))
		return KSFT_SKIP;
	child_step();
	for (size_t i = 0; i < WATCHED; i++)
		if (!page_holds(area + i * PAGE, 1))
			return KSFT_FAIL;
	return KSFT_PASS;
}

static long metadata(void)
{
	ksm_set("run", 0);
	return ksm_get("pages_sharing") * (long)PAGE - ksm_get("general_profit");
}

int main(int argc, char **argv)
{
	struct child child;
	size_t collide;
	long before, full, bytes;
	char *honest;

	test_init(argc, argv);
	test_plan(9);
	ksm_reset();

	ksft_test_result(files_are_roots(), "the files are root's, for others to read\n");
	child = child_start(nobody_writes, NULL);
	ksft_test_result(!child_end(&child), "nobody else can write them\n");

	collide = colliding();
	ksft_test_result(collide > FLOOD / 16, "%zu of %d pages collide for any seed\n", collide,
			 FLOOD);
	honest = map_pages(HONEST);
	for (size_t i = 0; i < HONEST; i++)
		fill_page(honest + i * PAGE, 1 + i / 2);
	child = child_start(flood, NULL);
	if (!child_wait_step(&child))
		die("a child ended before it was told to");
	ksm_start();
	ksm_scans(6);
	full = ksm_get("full_scans");
	mergeable(honest, HONEST);
	ksft_test_result(ksm_until("pages_sharing", HONEST / 2, 20),
			 "pages of others are merged beside them\n");
	ksft_test_result(ksm_get("pages_shared") == HONEST / 2 && ksm_get("full_scans") > full,
			 "and none of them with each other\n");
	child_go(&child);
	ksft_test_result(!child_end(&child), "they are what they were\n");
	munmap(honest, HONEST * PAGE);

	ksm_reset();
	before = metadata();
	child = child_start(sparse, NULL);
	if (!child_wait_step(&child))
		die("a child ended before it was told to");
	ksm_start();
	ksm_scans(4);
	bytes = metadata() - before;
	/* Less than the page table that the process had to have for each of them */
	ksft_test_result(bytes >= SPARSE * 8 && bytes < SPARSE * 1024,
			 "a lone page costs less than a quarter of its page table (%ld bytes)\n",
			 bytes / SPARSE);
	child_go(&child);
	child_end(&child);

	ksm_reset();
	child = child_start(watched, NULL);
	if (!child_wait_step(&child))
		die("a child ended before it was told to");
	ksm_start();
	if (!ksm_until("pages_sharing", WATCHED - 1, 20))
		ksft_print_msg("nothing merged\n");
	child_go(&child);
	if (child_wait_step(&child)) {
		/* Whether they can be unshared or not: it ends, and so does a scan */
		ksm_try("run", "2");
		ksm_start();
		ksm_scans(2);
		ksft_test_result_pass("a userfaultfd holds up neither run=2 nor the scanner\n");
		child_go(&child);
		ksft_test_result(!child_end(&child), "its pages are what they were\n");
	} else {
		ksft_test_result_skip("no userfaultfd here\n");
		ksft_test_result_skip("no userfaultfd here\n");
		child_end(&child);
	}
	test_exit();
}
