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

/* A macro with a cast, which bindgen does not see. */
const size_t RKSM_PMD_SIZE = PMD_SIZE;
