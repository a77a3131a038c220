/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * /dev/rksm, and processes whose memory it is asked about.
 */
#ifndef RKSM_DEVICE_H
#define RKSM_DEVICE_H

#include <linux/rksm.h>

#include "util.h"

#define DEVICE		"/dev/rksm"
#define PINNED		2	/* in RKSM_REFUSALS */
#define ALL_MEMORY	.end = ~0ULL

/* All return 0 or -errno, and open the device when they are first called */
int device_call(unsigned int cmd, void *arg);
void device_close(void);
int device_merge(struct rksm_merge *arg);
int device_unmerge(struct rksm_unmerge *arg);
/* From the beginning */
int device_why(int pidfd, struct rksm_why *why);
int pidfd_of(pid_t pid);

/* The record of a process, if there is one */
bool device_stat(pid_t pid, struct rksm_stat_record *record);
/* Pages that the record counts */
unsigned long known_pages(const struct rksm_stat_record *stat);
/*
 * Calls f with each record of RKSM_IOC_STAT or RKSM_IOC_RULES, as many at a time as have room in
 * so many bytes. Returns 0 or -errno.
 */
int device_list(unsigned int cmd, size_t len, void (*f)(const void *record, void *arg), void *arg);

/* Rules for a process, and for a cgroup where pidfd is -1 */
int rule_set(int pidfd, const char *path, unsigned int action);
int rule_remove(int pidfd, const char *path);
/* To how many processes it applied; -1 where there is no such rule. For a process, path is NULL. */
long rule_processes(pid_t pid, const char *path);
/* All rules have been applied twice when this returns, and what the first has found is done */
void rules_swept(void);
/* Until cond holds, for at most so many seconds; false where it never did */
bool holds_within(bool (*cond)(void *arg), void *arg, int seconds);
/* The same with fewer looks; prints how long it took where that was more than a few seconds */
bool holds_late(bool (*cond)(void *arg), void *arg, int seconds);

enum opt {
	OPT_NONE,
	OPT_MADVISE,
	OPT_PRCTL
};

/* What a target does when it is told */
enum op {
	OP_INTACT,	/* whether its memory is as it should be */
	OP_WRITE,	/* flips a byte of so many of its first pages */
	OP_ALIKE,	/* gives all its pages the first one's content */
	OP_READ,	/* looks at so many of its first pages */
	OP_HAMMER,	/* writes to so many of its last pages until OP_STOP */
	OP_STOP,
	OP_TOUCH,	/* maps so many pages more, each of its own content, mergeable */
	OP_ZERO,	/* the same, all zeroes */
	OP_PIN,		/* as OP_TOUCH, and holds them */
	OP_PIN_HUGE,	/* the same with a huge page, and fails where there is none */
	OP_MERGE_ANY,	/* whether prctl says that all its memory is mergeable */
	OP_PRCTL,	/* has prctl say so, or no longer */
	OP_CHURN,	/* maps and unmaps in another thread until OP_CHURNED */
	OP_CHURNED,
	OP_DROP,	/* MADV_DONTNEED on so many of its first pages, which are filled again */
	OP_REMAP,	/* the same by munmap and mmap */
	OP_MOVE,	/* moves all its memory; target->area is then the new place */
	OP_FORK,	/* forks; the child sleeps */
	OP_EXEC		/* becomes a program that sleeps */
};

/* A process; page i of its memory has the content key + i % contents */
struct target {
	struct child child;
	int pidfd;
	char *area;
	size_t pages;
	struct target_state {
		size_t pages, contents;
		uint64_t key;
		bool huge;
		enum opt opt;
		char *area;
		enum op op;
		size_t n;
		bool ok;
		long longest;		/* microseconds, of OP_CHURNED */
		volatile pid_t forked;
	} *state;
};

struct target target_start(size_t pages, size_t contents, uint64_t key, enum opt opt);
struct target target_start_huge(size_t pages, size_t contents, uint64_t key, enum opt opt);
bool target_do(struct target *target, enum op op, size_t n);
size_t target_merged(const struct target *target);
/* Its record; all zeroes where there is none */
struct rksm_stat_record target_stat(const struct target *target);
void target_end(struct target *target);

/*
 * A process whose memory a child of it runs in, as one of posix_spawn() does before exec. At first
 * the process takes a step, which is when its area can be merged, then the child; its exit status
 * says whether all that memory is mergeable.
 */
struct borrower {
	pid_t pid;	/* of the child */
	char *area;
	size_t pages;
};
struct child borrower_start(struct borrower *borrower, size_t pages);

/* Becomes the program that OP_EXEC wants, if this is it */
void target_main(int argc, char **argv);

#endif
