/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * bindgen's input: the headers of what kernel::bindings lacks. The functions of
 * rust/helpers come in addition, with no need to name them here.
 */

#include <linux/btf.h>
#include <linux/kernfs.h>
#include <linux/kobject.h>
#include <linux/kthread.h>
#include <linux/memory.h>
#include <linux/pgtable.h>
#include <linux/sysfs.h>
#include <linux/tracepoint.h>
#include <linux/wait.h>

#include "../helpers/symbols.h"

/* Macros with casts, which bindgen does not see. */
const size_t RKSM_PMD_SIZE = PMD_SIZE;
const gfp_t RKSM_GFP_KERNEL = GFP_KERNEL;
const gfp_t RKSM_GFP_METADATA = GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN;
const gfp_t RKSM_GFP_NODE = GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN | __GFP_HIGH;
