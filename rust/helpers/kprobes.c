// SPDX-License-Identifier: GPL-2.0-only

#include <linux/kprobes.h>

/* Where the kernel has a function; the kprobe is never armed. 0 if there is no such function. */
unsigned long rksm_kprobe_address(const char *symbol)
{
	struct kprobe probe = { .symbol_name = symbol, .flags = KPROBE_FLAG_DISABLED };
	unsigned long address;

	if (register_kprobe(&probe))
		return 0;
	address = (unsigned long)probe.addr;
	unregister_kprobe(&probe);
	return address;
}
