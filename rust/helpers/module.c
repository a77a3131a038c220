// SPDX-License-Identifier: GPL-2.0-only

#include <linux/module.h>
#include <linux/moduleparam.h>

/* The module! macro has no version. Kbuild reads RKSM_VERSION from rust/engine/VERSION. */
#ifdef RKSM_VERSION
MODULE_VERSION(RKSM_VERSION);
#endif

/* The module! macro of 7.2 has no parameters of this type. */
static bool rksm_adopt = true;
module_param_named(adopt, rksm_adopt, bool, 0);
MODULE_PARM_DESC(adopt, "adopt: take over what the built-in has merged, 1 (default); 0 unmerges it");

static bool rksm_check;
module_param_named(check, rksm_check, bool, 0);
MODULE_PARM_DESC(check,
		 "check: test all invariants after each full scan, which takes long (default 0)");

bool rksm_param_adopt(void)
{
	return rksm_adopt;
}

bool rksm_param_check(void)
{
	return rksm_check;
}
