/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Declares what symbols_list.h names. To be included by every helper that uses an
 * unexported function, for those functions that no public header declares.
 */
#ifndef RKSM_SYMBOLS_H
#define RKSM_SYMBOLS_H

#ifndef CONFIG_X86_64
#error "rksm is for x86-64 only: pages of 4 KiB, accessed bits and TLB flushes are as there (no memory tags)"
#endif

#include <linux/btf.h>
#include <linux/kernel.h>
#include <linux/ksm.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/mutex.h>
#include <linux/pagewalk.h>
#include <linux/pid.h>
#include <linux/rbtree.h>
#include <linux/rmap.h>
#include <linux/sched/cputime.h>
#include <linux/spinlock.h>
#include <linux/swap.h>
#include <linux/sysfs.h>
#include <linux/tracepoint.h>
#include <asm/tlbflush.h>

#define F(ret, name, params, args) ret name params;
#define D(type, name) type *rksm_data_##name(void);
#include "symbols_list.h"
#undef F
#undef D

#endif
