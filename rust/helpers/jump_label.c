// SPDX-License-Identifier: GPL-2.0-only

#include <linux/jump_label.h>

/* The static key of rust/kernel_ext/race_window.rs; kernel::jump_label wants one in a struct. */
struct rksm_static_key {
	struct static_key_false key;
};

struct rksm_static_key rksm_race_windows = { .key = STATIC_KEY_FALSE_INIT };

/* Patches the code of the module. Context: May sleep. */
void rksm_race_windows_enable(void)
{
	static_branch_enable(&rksm_race_windows.key);
}
