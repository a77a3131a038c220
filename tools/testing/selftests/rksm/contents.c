// SPDX-License-Identifier: GPL-2.0-only
/*
 * Contents never change for anyone: processes with memory of every kind write to it, with
 * few different contents so that most of it is merged again and again, and compare every
 * byte with a copy that KSM never sees.
 *
 * runs: cloud-amd64 amd64 builtin
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "util.h"

#define PAGES		128
#define PALETTE		6	/* different page contents, 0 is the zero page */
#define ROUNDS		16
#define OPS		48
#define RUN		16	/* pages that mremap, mlock … take at once */

struct area {
	size_t pages;
	char **page;		/* where each page is */
	char *shadow;
	int fd;			/* of the kind's own, where it needs one */
	size_t special;		/* how often the kind's own operation worked */
};

struct kind {
	const char *name;
	void (*map)(struct area *area);
	void (*special)(struct area *area);
	bool (*possible)(void);
	size_t pages;
};

static struct result {
	bool intact;
	bool merged;
	size_t special;
} *results;

static char *shadow_of(struct area *area, size_t i)
{
	return area->shadow + i * PAGE;
}

/* Writing, to the memory and to its shadow */

static void write_bytes(struct area *area, size_t i, size_t at, const void *bytes, size_t n)
{
	memcpy(area->page[i] + at, bytes, n);
	memcpy(shadow_of(area, i) + at, bytes, n);
}

static void random_write(struct area *area, size_t i)
{
	char page[PAGE];
	uint64_t word = rnd();

	switch (rnd_below(8)) {
	case 0:
		write_bytes(area, i, rnd_below(PAGE), &word, 1);
		break;
	case 1:
		write_bytes(area, i, rnd_below(PAGE / 8) * 8, &word, 8);
		break;
	case 2:
		/* The last byte of all, the first a lazy comparison forgets */
		write_bytes(area, i, PAGE - 1, &word, 1);
		break;
	case 3:
		if (!madvise(area->page[i], PAGE, MADV_DONTNEED))
			memset(shadow_of(area, i), 0, PAGE);
		break;
	default:
		fill_page(page, rnd_below(PALETTE));
		write_bytes(area, i, 0, page, PAGE);
	}
}

static bool verify(struct area *area, const char *who)
{
	for (size_t i = 0; i < area->pages; i++) {
		const unsigned char *is = (void *)area->page[i];
		const unsigned char *was = (void *)shadow_of(area, i);

		if (!memcmp(is, was, PAGE))
			continue;
		for (size_t b = 0; b < PAGE; b++) {
			if (is[b] == was[b])
				continue;
			printf("# %s: page %zu, byte %zu: %#x, not %#x\n", who, i, b, is[b],
			       was[b]);
			return false;
		}
	}
	return true;
}

/* The kinds of memory */

static void map_private(struct area *area)
{
	char *p = map_pages(area->pages);

	for (size_t i = 0; i < area->pages; i++)
		area->page[i] = p + i * PAGE;
	mergeable(p, area->pages);
}

static void map_prctl(struct area *area)
{
	if (prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0))
		die("PR_SET_MEMORY_MERGE: %s", strerror(errno));
	map_private(area);
}

static void map_private_file(struct area *area)
{
	char *p;

	area->fd = memfd_create("contents", MFD_CLOEXEC);
	if (area->fd < 0 || ftruncate(area->fd, area->pages * PAGE))
		die("memfd: %s", strerror(errno));
	p = mmap(NULL, area->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, area->fd, 0);
	if (p == MAP_FAILED)
		die("private file mapping: %s", strerror(errno));
	for (size_t i = 0; i < area->pages; i++)
		area->page[i] = p + i * PAGE;
	mergeable(p, area->pages);
}

static void map_huge(struct area *area)
{
	char *p = map_at(NULL, area->pages + HPAGE / PAGE);

	p = (char *)(((uintptr_t)p + HPAGE - 1) & ~(HPAGE - 1));
	if (madvise(p, area->pages * PAGE, MADV_HUGEPAGE))
		die("MADV_HUGEPAGE: %s", strerror(errno));
	for (size_t i = 0; i < area->pages; i++)
		area->page[i] = p + i * PAGE;
	mergeable(p, area->pages);
}

static void collapse(struct area *area)
{
	size_t first = rnd_below(area->pages * PAGE / HPAGE) * (HPAGE / PAGE);
	char *huge = area->page[first];
	struct mapping map;

	if (!madvise(huge, HPAGE, MADV_COLLAPSE)) {
		area->special++;
		return;
	}
	/* Merged pages can keep it from being collapsed: have the fault make a huge page */
	if (madvise(huge, HPAGE, MADV_DONTNEED))
		return;
	memcpy(huge, shadow_of(area, first), HPAGE);
	mappings_of(getpid(), huge, 1, &map);
	area->special += !!(map.flags & KPF_THP);
}

static void map_proc_mem(struct area *area)
{
	map_private(area);
	area->fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	if (area->fd < 0)
		die("/proc/self/mem: %s", strerror(errno));
}

static void write_proc_mem(struct area *area)
{
	size_t i = rnd_below(area->pages);

	fill_page(shadow_of(area, i), rnd_below(PALETTE));
	if (pwrite(area->fd, shadow_of(area, i), PAGE, (uintptr_t)area->page[i]) != PAGE)
		die("/proc/self/mem: %s", strerror(errno));
	area->special++;
}

static void forked_writer(struct area *area)
{
	pid_t pid[2];
	int status;

	for (int c = 0; c < 2; c++) {
		pid[c] = fork();
		if (pid[c])
			continue;
		rnd_fork(getpid());
		for (int op = 0; op < OPS; op++)
			random_write(area, rnd_below(area->pages));
		ksm_scans(1);
		_exit(!verify(area, "forked child"));
	}
	for (int op = 0; op < OPS; op++)
		random_write(area, rnd_below(area->pages));
	for (int c = 0; c < 2; c++) {
		if (pid[c] < 0 || waitpid(pid[c], &status, 0) < 0 || status)
			die("a forked child failed");
	}
	area->special++;
}

/* Runs are aligned, so that each is in one mapping even after some were moved */
static size_t random_run(struct area *area)
{
	return rnd_below(area->pages / RUN) * RUN;
}

static void move(struct area *area)
{
	size_t run = random_run(area);
	char *to = map_pages(RUN + 1);

	/* One page off, so that the offset in a page table is another one too */
	if (mremap(area->page[run], RUN * PAGE, RUN * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
		   to + PAGE) == MAP_FAILED)
		die("mremap: %s", strerror(errno));
	for (size_t i = 0; i < RUN; i++)
		area->page[run + i] = to + (i + 1) * PAGE;
	area->special++;
}

static void lock_some(struct area *area)
{
	size_t run = random_run(area);

	if (rnd_below(2))
		area->special += !mlock(area->page[run], RUN * PAGE);
	else
		munlock(area->page[run], RUN * PAGE);
}

static void protect_some(struct area *area)
{
	size_t run = random_run(area);
	int prot = rnd_below(2) ? PROT_READ : PROT_NONE;

	if (mprotect(area->page[run], RUN * PAGE, prot))
		die("mprotect: %s", strerror(errno));
	ksm_scans(1);
	if (mprotect(area->page[run], RUN * PAGE, PROT_READ | PROT_WRITE))
		die("mprotect: %s", strerror(errno));
	area->special++;
}

static void map_swapped(struct area *area)
{
	area->fd = cgroup_own();
	if (area->fd < 0)
		die("no memory cgroup: %s", strerror(errno));
	map_private(area);
}

static void swap_out(struct area *area)
{
	long before = vmstat("pswpout");

	cgroup_reclaim(area->fd, area->pages / 2);
	area->special += vmstat("pswpout") > before;
}

static bool soft_offline_possible(void)
{
	void *p = map_pages(1);
	bool can;

	*(volatile char *)p = 1;
	can = !madvise(p, PAGE, MADV_SOFT_OFFLINE) || errno == EBUSY;
	munmap(p, PAGE);
	return can;
}

static void soft_offline(struct area *area)
{
	if (area->special < 24)
		area->special += !madvise(area->page[rnd_below(area->pages)], PAGE,
					  MADV_SOFT_OFFLINE);
}

static void migrate(struct area *area)
{
	void *pages[RUN];
	int nodes[RUN], status[RUN];
	size_t run = random_run(area);
	bool two_nodes = !access("/sys/devices/system/node/node1", F_OK);

	if (!two_nodes) {
		area->special += write_file("/proc/sys/vm/compact_memory", "1");
		return;
	}
	for (size_t i = 0; i < RUN; i++) {
		pages[i] = area->page[run + i];
		nodes[i] = rnd_below(2);
	}
	/* 2: MPOL_MF_MOVE; 4: MPOL_MF_MOVE_ALL, also what others map */
	area->special += syscall(SYS_move_pages, 0, RUN, pages, nodes, status,
				 rnd_below(2) ? 2 : 4) >= 0;
}

static void *writer_thread(void *arg)
{
	struct area *area = arg;

	rnd_fork(1);
	for (int op = 0; op < OPS * 4; op++)
		random_write(area, rnd_below(area->pages / 2) * 2 + 1);
	return NULL;
}

/* Odd pages are another thread's, so that this one writes and verifies at the same time */
static void write_in_thread(struct area *area)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, writer_thread, area))
		die("no thread");
	for (int op = 0; op < OPS; op++)
		random_write(area, rnd_below(area->pages / 2) * 2);
	pthread_join(thread, NULL);
	area->special++;
}

static const struct kind kinds[] = {
	{ "private", map_private, NULL, NULL, PAGES },
	{ "prctl", map_prctl, NULL, NULL, PAGES },
	{ "private file", map_private_file, NULL, NULL, PAGES },
	{ "huge pages", map_huge, collapse, NULL, 2 * HPAGE / PAGE },
	{ "written through /proc/PID/mem", map_proc_mem, write_proc_mem, NULL, PAGES },
	{ "forked", map_private, forked_writer, NULL, PAGES },
	{ "mremapped", map_private, move, NULL, PAGES },
	{ "mlocked", map_private, lock_some, NULL, PAGES },
	{ "mprotected", map_private, protect_some, NULL, PAGES },
	{ "swapped out and in", map_swapped, swap_out, swap_on, PAGES },
	{ "migrated", map_private, migrate, NULL, PAGES },
	{ "soft-offlined", map_private, soft_offline, soft_offline_possible, PAGES },
	{ "two threads", map_private, write_in_thread, NULL, PAGES },
};

static int worker(void *arg)
{
	size_t me = (size_t)arg;
	const struct kind *kind = &kinds[me];
	struct area area = { .pages = kind->pages, .fd = -1 };

	area.page = calloc(area.pages, sizeof(*area.page));
	/* Shared memory, which KSM never merges, but for children that want their own */
	area.shadow = kind->special == forked_writer ? map_pages(area.pages) :
						       map_shared(area.pages);
	kind->map(&area);
	for (size_t i = 0; i < area.pages; i++) {
		fill_page(shadow_of(&area, i), rnd_below(PALETTE));
		memcpy(area.page[i], shadow_of(&area, i), PAGE);
	}
	/* Rounds go on until the kind had its chance: merged, and its operation done */
	for (int round = 0; round < ROUNDS || (round < 8 * ROUNDS &&
	     !(results[me].merged && (area.special || !kind->special))); round++) {
		for (int op = 0; op < OPS; op++)
			random_write(&area, rnd_below(area.pages));
		if (kind->special)
			kind->special(&area);
		if (rnd_below(2))
			ksm_scans(1 + rnd_below(3));
		if (proc_ksm_stat(getpid(), "ksm_merging_pages") > 0)
			results[me].merged = true;
		if (!verify(&area, kind->name))
			return KSFT_FAIL;
	}
	results[me].special = area.special;
	results[me].intact = true;
	return KSFT_PASS;
}

static const struct setting {
	int use_zero_pages, smart_scan, max_page_sharing;
} settings[] = {
	{ 0, 0, 256 }, { 1, 0, 4 }, { 0, 1, 2 },
};

int main(int argc, char **argv)
{
	bool possible[ARRAY_SIZE(kinds)];

	test_init(argc, argv);
	test_plan(ARRAY_SIZE(kinds) * ARRAY_SIZE(settings) + 1);
	results = map_shared(1);
	for (size_t k = 0; k < ARRAY_SIZE(kinds); k++)
		possible[k] = !kinds[k].possible || kinds[k].possible();

	for (size_t s = 0; s < ARRAY_SIZE(settings); s++) {
		struct child child[ARRAY_SIZE(kinds)];

		ksm_reset();
		ksm_set("use_zero_pages", settings[s].use_zero_pages);
		ksm_set("smart_scan", settings[s].smart_scan);
		ksm_set("max_page_sharing", settings[s].max_page_sharing);
		ksm_start();
		memset(results, 0, PAGE);
		for (size_t k = 0; k < ARRAY_SIZE(kinds); k++)
			if (possible[k])
				child[k] = child_start(worker, (void *)k);
		for (size_t k = 0; k < ARRAY_SIZE(kinds); k++) {
			const struct kind *kind = &kinds[k];
			bool done;

			if (!possible[k]) {
				ksft_test_result_skip("%s: not possible in this guest\n",
						      kind->name);
				continue;
			}
			done = !child_end(&child[k]) && results[k].intact;
			if (done && !results[k].merged)
				ksft_print_msg("%s: nothing was ever merged\n", kind->name);
			if (done && kind->special && !results[k].special)
				ksft_print_msg("%s: never happened\n", kind->name);
			ksft_test_result(
				done && results[k].merged && (!kind->special || results[k].special),
				"%s, use_zero_pages %d, smart_scan %d, max_page_sharing %d\n",
				kind->name, settings[s].use_zero_pages, settings[s].smart_scan,
				settings[s].max_page_sharing);
		}
	}
	ksm_set("run", 2);
	ksft_test_result(ksm_all_but_zero_pages(), "nothing is left of it\n");
	/*
	 * Not asserted: fork copies the count of the mm before it locks the page tables, so
	 * zero pages that are merged between the two are counted once too few. zero.c has
	 * no forks and asserts it.
	 */
	ksft_print_msg("ksm_zero_pages is %ld\n", ksm_get("ksm_zero_pages"));
	test_exit();
}
