// SPDX-License-Identifier: GPL-2.0-only

#include <linux/delay.h>

void rksm_udelay(unsigned long usecs)
{
	udelay(usecs);
}

void rksm_usleep(unsigned long usecs)
{
	usleep_range(usecs, usecs + 10);
}
