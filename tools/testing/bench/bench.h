/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * rksm-bench: the workloads of the benchmark, run in a guest by guest.sh.
 *
 * One run of the program is one workload, once, with the KSM that is loaded. It prints
 * one JSON object a line; report.py makes tables and plots of them.
 */
#ifndef BENCH_H
#define BENCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PAGE 4096ul
#define HUGE (2ul << 20)
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

/* What to run, from the command line. */
struct options {
	const char *workload;
	const char *kase;	/* the case of the workload; NULL: all */
	const char *impl;	/* builtin, rksm, auto (rksm with governor=auto) or none */
	int smart_scan;
	int round;
	bool quick;
	uint64_t seed;
	unsigned int minutes;	/* how long budget watches; 0: as long as it does by itself */
	unsigned int percent, burst_ms;	/* that budget is to hold; 0: what the files say */
	unsigned int slack_ms;	/* more than that, for a slice of work and for the clock */
};

extern struct options opt;

/* Whether the command line asks for this case. */
bool wants(const char *kase);

/* util.c */

void die(const char *fmt, ...) __attribute__((format(printf, 1, 2), noreturn));
void note(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
uint64_t now_ns(void);
void sleep_us(unsigned int us);
uint64_t mix64(uint64_t x);

/* An xorshift generator; any seed but 0. */
struct rnd {
	uint64_t s;
};

static inline uint64_t rnd_next(struct rnd *r)
{
	r->s ^= r->s << 13;
	r->s ^= r->s >> 7;
	r->s ^= r->s << 17;
	return r->s;
}

bool read_text(const char *path, char *buf, size_t size);
bool write_text(const char *path, const char *text);
/* The number behind KEY in a file of "KEY: NUMBER" or "KEY NUMBER" lines; -1: none. */
long long field_of(const char *path, const char *key);

/* One line of output: the options, then what is added, then the end. */
void json_begin(const char *kase);
void json_u64(const char *key, uint64_t value);
void json_f(const char *key, double value);
void json_str(const char *key, const char *value);
void json_list(const char *key, const uint64_t *values, size_t n);
void json_pairs(const char *key, const uint64_t (*rows)[3], size_t n);
void json_end(void);

/* A growing list of times. */
struct times {
	uint64_t *at;
	size_t n, room;
};

void times_add(struct times *t, uint64_t value);
void times_sort(struct times *t);
/* Of a sorted list; per_mille of 500 is the median. */
uint64_t times_at(const struct times *t, unsigned int per_mille);
void json_times(const char *name, struct times *t);

/* ksm.c */

uint64_t ksm_get(const char *file);
void ksm_set(const char *file, const char *value);
void ksm_set_u64(const char *file, uint64_t value);
void ksm_knob(const char *assignment);
/* Everything unmerged and stopped, knobs at what the benchmark uses. */
void ksm_reset(void);
void ksm_stop(void);
/* pages and sleep for a scanner that runs by itself. */
void ksm_run_freely(unsigned int pages, unsigned int sleep_ms);
/* After ksm_reset(): as who tunes nothing gets it, default knobs or the governor. */
void ksm_run_untuned(void);
bool governed(void);
/* Whether the KSM that is loaded has such a file. */
bool ksm_has(const char *file);
uint64_t ksm_saved(void);
/*
 * Has everything merged that can be, at any price, by knobs in every case; returns what is
 * saved then.
 */
uint64_t ksm_merge_all(unsigned int limit_s);

struct scan {
	uint64_t cpu_ns;	/* of all scanning threads */
	uint64_t wall_ns;
	uint64_t scanned, skipped;
	uint64_t full_scans;
};

/* How often the scanning threads have gone to sleep by themselves. */
uint64_t scan_sleeps(void);
uint64_t scan_cpu_ns(void);
/* The scanning threads that are there now; what others have used is kept. */
void find_threads(void);
struct scan scan_now(void);
struct scan scan_since(const struct scan *before);

/*
 * Called every few milliseconds of a full scan, with what was spent since it began.
 * Not called often enough to cost the scanner its CPU.
 */
typedef void (*watch_fn)(void *arg, const struct scan *sofar);

/* One full scan from one end of the list to the other; false after limit_s seconds. */
bool scan_once(struct scan *spent, unsigned int limit_s, watch_fn watch, void *arg);
void json_scan(const struct scan *s);

/* Has the scanning threads run on one CPU until the program ends. */
void ksm_run_on(unsigned int cpu);

/*
 * The scanner runs by itself at a given rate, whatever a page costs it: its
 * pages_to_scan follows from what it did in the time before.
 */
struct rate {
	unsigned int target, sleep_ms;	/* pages a second, between batches */
	double pages;
	struct scan last;
};

void rate_start(struct rate *r);
void rate_adjust(struct rate *r);
void print_rate(const struct scan *spent);

/*
 * A share of a CPU that the scanner is to use: what is left of it may be used later, as far as
 * the burst goes. The governor keeps to it by itself, others are made to.
 */
struct share {
	unsigned int percent, burst_ms;
	double pages, tokens_ns;
	uint64_t wall_ns, cpu_ns;	/* when it was adjusted last */
	uint64_t was_percent, was_burst_ms;
};

void share_start(struct share *s);
/* To be called several times a second. */
void share_adjust(struct share *s);
void share_stop(const struct share *s);

/* worker.c: processes with memory */

enum content {
	UNIQUE,		/* random, every page another */
	TAIL,		/* equal but for the last 8 bytes */
	COPIES,		/* random, shape.distinct different pages */
	MIXED,		/* the first half COPIES, the second UNIQUE */
	HUGE_ZERO,	/* the first page of each 2 MiB unique, all others zero */
};

struct shape {
	enum content content;
	size_t pages;		/* of this process */
	size_t first;		/* number of its first page among all processes' */
	size_t distinct;	/* contents of COPIES and of the half of MIXED */
	size_t stride;		/* 1, or 64: one page present of 64 */
	bool huge;
};

struct worker {
	pid_t pid;
	int fd;
	uint64_t register_ns;	/* what madvise(MADV_MERGEABLE) took */
	const char *area;	/* where its memory is in its address space */
};

enum op {
	OP_HASH,	/* xxh64 over each page; returns CPU ns */
	OP_REWRITE,	/* a random quarter, arg is the generation; returns pages written */
	OP_TOUCH,	/* write every page without changing it; returns ns */
	OP_UNMERGE,	/* madvise(MADV_UNMERGEABLE); returns ns */
	OP_MERGE,	/* madvise(MADV_MERGEABLE) */
	OP_FORK,	/* a child that writes a few pages and exits; returns ns till it is gone */
};

void worker_start(struct worker *w, const struct shape *shape);
uint64_t worker_do(const struct worker *w, enum op op, uint64_t arg);
/* Kill it and wait until its memory is gone; returns how long that took. */
uint64_t worker_kill(struct worker *w);
/* Of one process, the pages that huge mappings hold. */
uint64_t worker_huge_pages(const struct worker *w);
/* The anonymous memory it holds, a page that it maps several times counted once. */
uint64_t worker_pages_held(const struct worker *w);
void fill_page(void *page, const struct shape *shape, size_t nr);
void fill_memory(char *area, const struct shape *shape);
/* Until a victim, which shares `ready`, has set that. */
void wait_ready(pid_t pid, const volatile bool *ready);

/* clones.c: processes with nearly the same memory, as machines of one image have */

struct clones {
	size_t pages, shareable;	/* of each */
	char *image;			/* the memory that they copy */
	struct clone_memory *shared;
	uint64_t started;		/* the number of the next one */
};

struct clone {
	pid_t pid;
	unsigned int slot;
};

#define MAX_CLONES 32

/* Of the pages, 95 % are the same in all. */
void clones_make(struct clones *c, size_t pages);
void clones_free(struct clones *c);
/* It makes its memory mergeable, then writes to it, and then does nothing. */
void clone_start(struct clones *c, struct clone *one, unsigned int slot);
/* When all its memory was there; 0: not yet. */
uint64_t clone_ready_ns(const struct clones *c, const struct clone *one);
uint64_t clone_wait(const struct clones *c, const struct clone *one);
/* Of its pages, those that are merged. */
uint64_t clone_merged(const struct clone *one);
void clone_kill(struct clone *one);

/* victim.c */

void run_on(pid_t pid, unsigned int cpu);
/* What the first thread of a process has used, and its page faults that needed no I/O. */
void process_costs(pid_t pid, uint64_t *cpu_ns, uint64_t *faults);
/* Interrupts of CPU 1 to flush its TLB */
uint64_t shootdowns(void);

/* processes.c */

/* Programs of the apps workload. */
#define APPS_EACH 3
pid_t launch(char *const argv[], bool mergeable);
pid_t start_redis(unsigned int port, unsigned int rows, bool mergeable);
void start_apps(pid_t pids[2 * APPS_EACH]);
void kill_all(const pid_t *pids, size_t n);

/* costs.c */

/* Full scans until so many pages are shared. */
void merge_all(uint64_t goal);

struct memory {
	long long free_pages;	/* on the free lists and on the CPUs' own */
	long long slab_bytes, vmalloc_bytes;
};

struct memory memory_now(void);
/* Give back the empty slabs that earlier work left. */
void shrink_slabs(void);

uint64_t xxh64(const void *input, size_t len, uint64_t seed);

/* The workloads. */
void run_unique(void);
void run_tail(void);
void run_copies(void);
void warm_up(void);
void run_steady(void);
void run_rewrite(void);
void run_churn(void);
void run_thp(void);
void run_apps(void);
void run_latency(void);
void run_unmerge(void);
void run_metadata(void);
void run_in_place(void);
void run_threads(void);
void run_victim(void);
void run_clones(void);
void run_quiet(void);
void run_equal_cpu(void);
void run_neighbour(void);
void run_futile(void);
void run_budget(void);

#endif
