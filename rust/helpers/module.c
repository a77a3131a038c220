// SPDX-License-Identifier: GPL-2.0-only

#include <linux/module.h>

/* The module! macro has no version. Kbuild reads RKSM_VERSION from rust/engine/VERSION. */
#ifdef RKSM_VERSION
MODULE_VERSION(RKSM_VERSION);
#endif
