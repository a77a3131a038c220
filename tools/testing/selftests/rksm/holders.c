// SPDX-License-Identifier: GPL-2.0-only
#define _GNU_SOURCE
#include "holders.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define KEPT_FLAGS	(KPF_KSM | KPF_ZERO_PAGE)
#define MPOL_BIND	2
#define MPOL_MF_MOVE_ALL 4

struct start {
	struct holder *holder;
	int node;
};

static int hold(void *arg)
{
	struct start *start = arg;
	struct holder *holder = start->holder;
	unsigned long mask = 1UL << start->node;

	alarm(0);
	if (start->node >= 0 && syscall(SYS_set_mempolicy, MPOL_BIND, &mask, 64))
		die("set_mempolicy: %s", strerror(errno));
	for (size_t i = 0; i < holder->pages; i++)
		fill_page(holder->area + i * PAGE, holder->key[i]);
	syscall(SYS_set_mempolicy, 0, NULL, 0);
	mergeable(holder->area, holder->pages);
	for (;;) {
		pid_t pid;

		child_step();
		/* A child of the test, which waits for it */
		pid = syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
		if (!pid) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			for (;;)
				pause();
		}
		*holder->forked = pid;
	}
}

void holder_start(struct holder *holder, size_t pages, const uint64_t *key, int node)
{
	struct start start = { holder, node };

	if (pages > HOLDER_PAGES)
		die("too many pages");
	holder->area = map_pages(pages);
	holder->pages = pages;
	holder->forked = map_shared(1);
	memcpy(holder->key, key, pages * sizeof(*key));
	holder->child = child_start(hold, &start);
	if (!child_wait_step(&holder->child))
		die("a process ended while it filled its pages");
}

void holder_fork(const struct holder *of, struct holder *holder)
{
	struct child child = of->child;

	child_go(&child);
	if (!child_wait_step(&child) || *of->forked <= 0)
		die("a process cannot fork");
	*holder = *of;
	holder->child = (struct child){ .pid = *of->forked, .go = -1, .there = -1 };
	holder->forked = NULL;
}

void holder_end(struct holder *holder)
{
	child_kill(&holder->child);
	if (!holder->forked)
		return;
	munmap((void *)holder->forked, PAGE);
	munmap(holder->area, holder->pages * PAGE);
}

/* Not process_vm_readv(), which pins pages and so breaks merged ones */
static int open_memory(const struct holder *holder, int flags)
{
	char path[32];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/mem", holder->child.pid);
	fd = open(path, flags | O_CLOEXEC);
	if (fd < 0)
		die("cannot open %s: %s", path, strerror(errno));
	return fd;
}

void holder_write(struct holder *holder, size_t page, uint64_t key)
{
	int fd = open_memory(holder, O_WRONLY);
	uint64_t text[PAGE / 8];

	fill_page(text, key);
	if (pwrite(fd, text, PAGE, (uintptr_t)holder->area + page * PAGE) != PAGE)
		die("cannot write to %d: %s", holder->child.pid, strerror(errno));
	holder->key[page] = key;
	close(fd);
}

bool holders_intact(const struct holder *holder, size_t n)
{
	uint64_t text[PAGE / 8];
	bool ok = true;

	for (size_t h = 0; h < n; h++) {
		int fd = open_memory(&holder[h], O_RDONLY);

		for (size_t i = 0; i < holder[h].pages; i++) {
			off_t at = (uintptr_t)holder[h].area + i * PAGE;

			if (pread(fd, text, PAGE, at) == PAGE && page_holds(text, holder[h].key[i]))
				continue;
			ksft_print_msg("page %zu of process %zu is wrong\n", i, h);
			ok = false;
			break;
		}
		close(fd);
	}
	return ok;
}

void snapshot(struct snapshot *shot, const struct holder *holder, size_t n)
{
	shot->n = n;
	for (size_t h = 0; h < n; h++) {
		pid_t pid = holder[h].child.pid;

		shot->pages[h] = holder[h].pages;
		mappings_of(pid, holder[h].area, holder[h].pages, shot->map[h]);
		for (size_t i = 0; i < holder[h].pages; i++)
			shot->map[h][i].flags &= KEPT_FLAGS;
		shot->merging_of[h] = proc_ksm_stat(pid, "ksm_merging_pages");
		shot->zero_of[h] = proc_ksm_stat(pid, "ksm_zero_pages");
	}
	shot->shared = ksm_get("pages_shared");
	shot->sharing = ksm_get("pages_sharing");
	shot->zero = ksm_get("ksm_zero_pages");
	shot->full_scans = ksm_get("full_scans");
	shot->scanned = ksm_get("pages_scanned");
	shot->skipped = ksm_get("pages_skipped");
	shot->copied = vmstat("cow_ksm") + vmstat("ksm_swpin_copy");
}

bool same_pages(const struct snapshot *was, const struct snapshot *is)
{
	size_t pages = 0, moved = 0, changed = 0;

	for (size_t h = 0; h < was->n; h++) {
		for (size_t i = 0; i < was->pages[h]; i++) {
			const struct mapping *a = &was->map[h][i], *b = &is->map[h][i];

			pages++;
			moved += a->pfn != b->pfn;
			changed += a->flags != b->flags;
			if ((a->pfn != b->pfn || a->flags != b->flags) && moved + changed < 3)
				ksft_print_msg("page %zu of process %zu: pfn %#llx %s, then %#llx %s\n",
					       i, h, (unsigned long long)a->pfn,
					       a->flags & KPF_KSM ? "merged" : "",
					       (unsigned long long)b->pfn,
					       b->flags & KPF_KSM ? "merged" : "");
		}
	}
	if (moved || changed)
		ksft_print_msg("of %zu pages %zu are other ones, and %zu have other flags\n", pages,
			       moved, changed);
	return !moved && !changed;
}

static bool same(const char *what, long was, long is)
{
	if (was != is)
		ksft_print_msg("%s was %ld, and is %ld\n", what, was, is);
	return was == is;
}

bool same_counts(const struct snapshot *was, const struct snapshot *is)
{
	bool ok = same("pages_shared", was->shared, is->shared);

	ok &= same("pages_sharing", was->sharing, is->sharing);
	ok &= same("ksm_zero_pages", was->zero, is->zero);
	ok &= same("the number of copies", was->copied, is->copied);
	for (size_t h = 0; h < was->n; h++) {
		ok &= same("a process's ksm_merging_pages", was->merging_of[h], is->merging_of[h]);
		ok &= same("a process's ksm_zero_pages", was->zero_of[h], is->zero_of[h]);
	}
	return ok;
}

bool same_progress(const struct snapshot *was, const struct snapshot *is)
{
	bool ok = same("full_scans", was->full_scans, is->full_scans);

	ok &= same("pages_scanned", was->scanned, is->scanned);
	return same("pages_skipped", was->skipped, is->skipped) && ok;
}

size_t pages_with(const struct snapshot *shot, uint64_t flags)
{
	size_t n = 0;

	for (size_t h = 0; h < shot->n; h++)
		for (size_t i = 0; i < shot->pages[h]; i++)
			n += !!(shot->map[h][i].flags & flags);
	return n;
}

/* One mapping of each merged page */
struct first {
	size_t h, i;
	int node;	/* where it was */
	int status;
};

static struct first *first_of(struct first *firsts, size_t n, const struct snapshot *shot,
			      uint64_t pfn)
{
	for (size_t f = 0; f < n; f++)
		if (shot->map[firsts[f].h][firsts[f].i].pfn == pfn)
			return &firsts[f];
	return NULL;
}

/* Asks where they are, or moves those that are not on the other node yet; how many failed */
static size_t move(struct first *firsts, size_t n, const struct holder *holder, bool ask)
{
	void *page[HOLDER_PAGES];
	int node[HOLDER_PAGES], status[HOLDER_PAGES];
	size_t failed = 0;

	for (size_t f = 0, count; f < n; f += count) {
		const struct holder *of = &holder[firsts[f].h];

		for (count = 0; f + count < n && firsts[f + count].h == firsts[f].h; count++) {
			page[count] = of->area + firsts[f + count].i * PAGE;
			node[count] = 1 - firsts[f + count].node;
			status[count] = -EIO;
		}
		if (syscall(SYS_move_pages, of->child.pid, count, page, ask ? NULL : node, status,
			    MPOL_MF_MOVE_ALL) < 0)
			die("move_pages: %s", strerror(errno));
		for (size_t i = 0; i < count; i++) {
			firsts[f + i].status = status[i];
			failed += status[i] < 0;
		}
	}
	return failed;
}

bool holders_move(const struct holder *holder, size_t n)
{
	static struct first firsts[HOLDERS_MAX * HOLDER_PAGES];
	static struct snapshot was, is;
	size_t count = 0, stuck = 0, astray = 0;

	snapshot(&was, holder, n);
	for (size_t h = 0; h < n; h++)
		for (size_t i = 0; i < was.pages[h]; i++)
			if ((was.map[h][i].flags & KPF_KSM) &&
			    !first_of(firsts, count, &was, was.map[h][i].pfn))
				firsts[count++] = (struct first){ .h = h, .i = i };
	if (move(firsts, count, holder, true))
		die("pages are on no node");
	for (size_t f = 0; f < count; f++)
		firsts[f].node = firsts[f].status;
	/* A page may be in use for a moment */
	for (int tries = 0; tries < 20 && move(firsts, count, holder, false); tries++)
		usleep(1000);
	move(firsts, count, holder, true);
	for (size_t f = 0; f < count; f++)
		stuck += firsts[f].status != 1 - firsts[f].node;
	snapshot(&is, holder, n);
	for (size_t h = 0; h < n; h++) {
		for (size_t i = 0; i < was.pages[h]; i++) {
			struct first *first;

			if (!(was.map[h][i].flags & KPF_KSM))
				continue;
			first = first_of(firsts, count, &was, was.map[h][i].pfn);
			astray += is.map[h][i].pfn == was.map[h][i].pfn ||
				  !(is.map[h][i].flags & KPF_KSM) ||
				  is.map[h][i].pfn != is.map[first->h][first->i].pfn;
		}
	}
	if (stuck || astray || !count)
		ksft_print_msg("of %zu merged pages %zu did not move, %zu mappings did not follow\n",
			       count, stuck, astray);
	return count && !stuck && !astray && same_counts(&was, &is);
}

/* Slabs */

static const char *const caches[] = { "ksm_rmap_item", "ksm_stable_node", "ksm_mm_slot" };

long slab_objects(const char *cache)
{
	char path[96], text[512];

	/* Takes back what CPUs keep for the next allocation, and what KASAN keeps */
	snprintf(path, sizeof(path), "/sys/kernel/slab/%s/shrink", cache);
	if (!write_file(path, "1"))
		return -1;
	snprintf(path, sizeof(path), "/sys/kernel/slab/%s/objects", cache);
	if (read_file(path, text, sizeof(text)) <= 0)
		return -1;
	return strtol(text, NULL, 10);
}

bool slab_comes_to(const char *cache, long objects, int msecs)
{
	long now;

	while ((now = slab_objects(cache)) != objects && msecs > 0) {
		usleep(50000);
		msecs -= 50;
	}
	if (now != objects)
		ksft_print_msg("%s has %ld objects, not %ld\n", cache, now, objects);
	return now == objects;
}

bool slabs_empty(void)
{
	bool empty = true;

	/* What RCU or rksm's thread frees takes a moment */
	for (size_t c = 0; c < ARRAY_SIZE(caches); c++)
		empty &= slab_comes_to(caches[c], 0, 19800);
	return empty;
}

bool slabs_used(void)
{
	bool used = true;

	for (size_t c = 0; c < ARRAY_SIZE(caches); c++) {
		long objects = slab_objects(caches[c]);

		if (objects <= 0)
			ksft_print_msg("%s has %ld objects\n", caches[c], objects);
		used &= objects > 0;
	}
	return used;
}
