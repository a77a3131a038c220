/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Processes whose pages hold what is known. They sleep, and are looked at and written to from
 * outside. Their memory is at the same address in the test, where it is never touched.
 */
#ifndef RKSM_HOLDERS_H
#define RKSM_HOLDERS_H

#include "util.h"

#define HOLDERS_MAX	8
#define HOLDER_PAGES	128	/* at most */

struct holder {
	struct child child;
	char *area;
	size_t pages;
	uint64_t key[HOLDER_PAGES];
	volatile pid_t *forked;		/* the last fork it made */
};

/* Mergeable pages of these contents, on this node; -1: any */
void holder_start(struct holder *holder, size_t pages, const uint64_t *key, int node);
/* Another one, which maps what the first one maps */
void holder_fork(const struct holder *of, struct holder *holder);
/* Killed, and its memory is gone */
void holder_end(struct holder *holder);
/* Breaks a merged page, as any write does */
void holder_write(struct holder *holder, size_t page, uint64_t key);
/* Whether all pages hold what they should. Maps nothing, and breaks no merged page. */
bool holders_intact(const struct holder *holder, size_t n);

/* What is mapped by each, and what is counted */
struct snapshot {
	size_t n, pages[HOLDERS_MAX];
	struct mapping map[HOLDERS_MAX][HOLDER_PAGES];
	long shared, sharing, zero;
	long copied;			/* merged pages, when written to or swapped in */
	long full_scans, scanned, skipped;
	long merging_of[HOLDERS_MAX], zero_of[HOLDERS_MAX];
};
void snapshot(struct snapshot *shot, const struct holder *holder, size_t n);
/* Whether each page is where it was, and merged if it was; prints what has changed since */
bool same_pages(const struct snapshot *was, const struct snapshot *is);
bool same_counts(const struct snapshot *was, const struct snapshot *is);
bool same_progress(const struct snapshot *was, const struct snapshot *is);
/* How many of the pages have one of the flags */
size_t pages_with(const struct snapshot *shot, uint64_t flags);

/* Moves all merged pages to the other one of two nodes; whether every mapping followed its page */
bool holders_move(const struct holder *holder, size_t n);

/* Objects of a slab cache; less than 0 where it has no name of its own, see below */
long slab_objects(const char *cache);
/* Whether it has so many within so many ms; prints how many it has */
bool slab_comes_to(const char *cache, long objects, int msecs);

/*
 * KSM's caches have no object left, or all have some. They must have names of their own:
 * slab_nomerge.
 */
bool slabs_empty(void);
bool slabs_used(void);

#endif
