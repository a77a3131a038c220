/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * /dev/rksm: control of samepage merging from outside of the processes.
 *
 * Documentation/ABI/testing/dev-rksm says what each call does and which errors it returns.
 *
 * Every argument begins with its size, which a program sets to sizeof() of what it knows. A larger
 * argument than the module knows must have nothing but zeroes behind what it does know (E2BIG);
 * a shorter one than here is EINVAL. Fields that are not described and unknown flags must be zero
 * (EINVAL).
 */
#ifndef _UAPI_LINUX_RKSM_H
#define _UAPI_LINUX_RKSM_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define RKSM_IOC_MAGIC 0xBD

#define RKSM_IOC_RULE _IO(RKSM_IOC_MAGIC, 0)
#define RKSM_IOC_RULES _IO(RKSM_IOC_MAGIC, 1)
#define RKSM_IOC_MERGE _IO(RKSM_IOC_MAGIC, 2)
#define RKSM_IOC_UNMERGE _IO(RKSM_IOC_MAGIC, 3)
#define RKSM_IOC_STAT _IO(RKSM_IOC_MAGIC, 4)
#define RKSM_IOC_WHY _IO(RKSM_IOC_MAGIC, 5)

/* What a rule says. */
#define RKSM_RULE_DEFAULT 0 /* as the processes themselves say */
#define RKSM_RULE_ALWAYS 1 /* as after prctl(PR_SET_MEMORY_MERGE) */
#define RKSM_RULE_NEVER 2 /* nothing is merged, whatever they say */

/* RKSM_IOC_RULE: the rule is removed. */
#define RKSM_RULE_REMOVE (1 << 0)

struct rksm_rule {
	__u32 size;
	__u32 flags;
	__s32 pidfd; /* or -1: the rule is for a cgroup */
	__u32 action;
	__u64 path; /* address of the path below the cgroup v2 mount, beginning with '/' */
	__u32 path_len; /* bytes, without a NUL; 0 for a process */
	__u32 reserved;
};

/*
 * RKSM_IOC_RULES and RKSM_IOC_STAT: fill a buffer with records, beginning at a cursor, which is 0
 * at first and then what the last call has left there. There are no more where count is 0.
 */
struct rksm_list {
	__u32 size;
	__u32 flags;
	__u64 cursor;
	__u64 records; /* address of the buffer */
	__u32 len; /* its length in bytes */
	__u32 count; /* out: records */
};

/* A rule; the path follows, and zeroes up to a multiple of 8 bytes. */
struct rksm_rule_record {
	__u32 size; /* of this record with its path and zeroes */
	__u32 action;
	__s32 pid; /* 0 where the rule is for a cgroup */
	__u32 path_len;
	__u32 processes; /* to which it applied when the rules were last applied */
	__u32 reserved;
};

#define RKSM_NR_REFUSALS 16

/* A process whose memory is registered. */
struct rksm_stat_record {
	__u32 size;
	__u32 flags; /* RKSM_STAT_ */
	__s32 pid; /* in the reader's pid namespace; 0 where there is none */
	__u32 reserved;
	/* Pages of 4096 bytes that the scanner knows, each in one of the four. */
	__u64 merged;
	__u64 unique; /* unchanged, and no equal page has been found */
	__u64 changing; /* changed between the last two looks */
	__u64 fresh; /* looked at once, or not yet */
	__u64 zero; /* mappings of the zero page placed by KSM */
	__u64 broken; /* merged pages found written to, since it came or was last unmerged */
	__u64 refused[RKSM_NR_REFUSALS]; /* in the order of RKSM_REFUSALS */
};

#define RKSM_STAT_EXCLUDED (1 << 0) /* a rule says never */
#define RKSM_STAT_MERGE_ANY (1 << 1) /* all its memory is mergeable, not only what it marked */

/* The names of the files in /sys/kernel/mm/rksm/refused, in the order of `refused`. */
#define RKSM_REFUSALS \
	"gone", "locked", "pinned", "differs", "unsplit", "same", "no_memory", "busy", "stale", \
	"far_node", "userfault"

/* RKSM_IOC_MERGE: all memory of the process is made mergeable before. */
#define RKSM_MERGE_ENABLE (1 << 0)

struct rksm_merge {
	__u32 size;
	__u32 flags;
	__s32 pidfd;
	__u32 reserved;
	__u64 start; /* page-aligned address; 0 and ~0 for all */
	__u64 end;
	/* out, also with EINTR and ENOMEM: call again with start = at */
	__u64 at;
	__u64 scanned; /* pages */
	__u64 merged; /* pages that have become mappings of a merged page */
	__u64 zeroed; /* pages that have become mappings of the zero page */
	__s64 bytes_saved;
	__u64 refused[RKSM_NR_REFUSALS];
};

/* RKSM_IOC_UNMERGE: and none of its memory is mergeable afterwards. */
#define RKSM_UNMERGE_DISABLE (1 << 0)

struct rksm_unmerge {
	__u32 size;
	__u32 flags;
	__s32 pidfd;
	__u32 reserved;
	__u64 start;
	__u64 end;
	__u64 at; /* out */
	__u64 pages; /* out: pages that have been given a copy of their own */
};

/* The present pages of a process's mergeable memory, in bytes, each counted once. */
struct rksm_why {
	__u32 size;
	__u32 flags; /* out: RKSM_STAT_ */
	__s32 pidfd;
	__u32 reserved;
	__u64 at; /* in: the address to begin at; out: to go on at, ~0 at the end */
	__u64 merged;
	__u64 zero;
	__u64 pinned; /* somebody holds a reference: I/O is under way, or a device uses them */
	__u64 unsplit; /* the same of huge pages, which cannot be split then */
	__u64 unique;
	__u64 changing;
	__u64 fresh;
};

#endif
