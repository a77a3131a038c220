// SPDX-License-Identifier: GPL-2.0-only
/* What the command line asks for. */
#include "bench.h"

#include <string.h>

struct options opt = { .impl = "builtin", .round = 1, .seed = 1, .slack_ms = 20 };

bool wants(const char *kase)
{
	return !opt.kase || strcmp(opt.kase, kase) == 0;
}
