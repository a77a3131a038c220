/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the rksm selftests share. They judge any KSM: the built-in one and rksm.
 *
 * Nothing here but ksm_standing() waits for a time: progress is counted in full scans, and
 * only a watchdog ends a test that hangs.
 */
#ifndef RKSM_UTIL_H
#define RKSM_UTIL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "kselftest.h"

/* Kernel headers newer than the C library's define these */
#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE	67
#define PR_GET_MEMORY_MERGE	68
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE		25
#endif
#ifndef MADV_SOFT_OFFLINE
#define MADV_SOFT_OFFLINE	101
#endif

#define PAGE		((size_t)4096)
#define HPAGE		((size_t)2 << 20)

/* /proc/kpageflags, Documentation/admin-guide/mm/pagemap.rst */
#define KPF_KSM		(1ULL << 21)
#define KPF_THP		(1ULL << 22)
#define KPF_ZERO_PAGE	(1ULL << 24)

/* The files of /sys/kernel/mm/ksm, read-only ones first */
#define KSM_FIRST_RW	11
#define KSM_FILES	24
extern const char *const ksm_files[KSM_FILES];

/*
 * Parses the options every test has (--seed, --no-module, --module FILE), prints TAP's
 * header, saves all knobs and puts them back at exit, starts the watchdog and a monitor
 * that reads every file until test_exit().
 */
void test_init(int argc, char **argv);
/* Ends the monitor; whether every file could be read and was well-formed all the time */
bool monitor_verdict(void);

/* Inline, as kselftest.h counts for each object file. The monitor's verdict is one case more. */
static inline void test_plan(unsigned int cases)
{
	ksft_set_plan(cases + 1);
}

static inline void __noreturn test_exit(void)
{
	ksft_test_result(monitor_verdict(), "monitor read all files all the time\n");
	ksft_finished();
}

/* The module under test, NULL where none is named */
extern const char *module_path;
bool module_loaded(void);
int module_insert(const char *params);	/* 0 or -errno */
int module_remove(void);		/* 0 or -errno */
/* The same, and print what goes wrong */
/* Whether insmod fails with err, and says in one line why */
bool module_refused(const char *params, int err);
bool module_in(const char *params);
bool module_out(void);
/* From the one KSM to the other, with check=1; nothing to do where no module is named */
bool module_step(void);

/* Seeded random numbers; each process that wants its own sequence calls rnd_fork() */
extern uint64_t test_seed;
uint64_t rnd(void);
uint64_t rnd_below(uint64_t n);
void rnd_fork(uint64_t salt);

/*
 * Knobs and counters: files of /sys/kernel/mm/ksm, or of /sys/kernel/mm/rksm where not one of those
 */
long ksm_get(const char *file);
int ksm_try(const char *file, const char *value);	/* 0 or -errno */
int ksm_try_long(const char *file, long value);
void ksm_set(const char *file, long value);		/* must succeed */
/* run=0, everything unmerged, and settings under which tests are quick and exact */
void ksm_reset(void);
void ksm_start(void);
/* Lets n more full scans pass */
void ksm_scans(int n);
/* Lets the scanner come to its pause, which must be a long one; pages_scanned then */
long ksm_standing(void);
/* Until file has the value with run=1, for at most scans full scans; false where it never had */
bool ksm_until(const char *file, long value, int scans);
/* The same for any condition */
bool ksm_until_true(bool (*cond)(void *arg), void *arg, int scans);
/* Whether nothing is counted as merged or tracked; prints what is */
bool ksm_all_zero(void);
/* The same, whatever ksm_zero_pages says */
bool ksm_all_but_zero_pages(void);
long proc_ksm_stat(pid_t pid, const char *field);
long smaps_ksm_pages(pid_t pid);
long vmstat(const char *field);

/* What is mapped */
struct mapping {
	uint64_t pfn;		/* 0 where nothing is present */
	uint64_t flags;		/* kpageflags */
};
void mappings_of(pid_t pid, const void *addr, size_t pages, struct mapping *out);
size_t ksm_mappings(pid_t pid, const void *addr, size_t pages);
bool page_is_ksm(const void *addr);

/* Memory */
void *map_pages(size_t pages);				/* no huge pages in it */
void *map_at(void *addr, size_t pages);
void *map_shared(size_t pages);
void mergeable(void *addr, size_t pages);
/* Page contents from (kind, key): equal keys, equal pages; every key another page */
void fill_page(void *page, uint64_t key);
bool page_holds(const void *page, uint64_t key);
/* Content with no twin anywhere */
uint64_t unique_key(void);

/*
 * A child that runs in steps with its parent: it waits in child_step() until the parent
 * calls child_go(), and the parent waits in child_wait_step() until it is there again.
 */
struct child {
	pid_t pid;
	int go;
	int there;
};
struct child child_start(int (*fn)(void *arg), void *arg);
void child_step(void);				/* in the child */
bool child_wait_step(struct child *child);	/* false where it ended instead */
void child_go(struct child *child);
int child_end(struct child *child);		/* lets it run to its end; its wait status */
void child_kill(struct child *child);

/* Swap on zram; false where the guest has no zram. On until the guest ends. */
bool swap_on(void);
/* Moves the caller into a memory cgroup of its own; -1, or a descriptor for cgroup_reclaim() */
int cgroup_own(void);
void cgroup_reclaim(int cgroup, size_t pages);

bool write_file(const char *path, const char *text);
ssize_t read_file(const char *path, char *buf, size_t size);
__attribute__((noreturn, format(printf, 1, 2))) void die(const char *fmt, ...);

#endif
