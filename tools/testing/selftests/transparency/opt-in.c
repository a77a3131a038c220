// SPDX-License-Identifier: GPL-2.0-only
/*
 * opt-in PROGRAM [ARG]...
 *
 * Runs PROGRAM with all of its memory opted into KSM, which fork and exec keep.
 */

#include <err.h>
#include <sys/prctl.h>
#include <unistd.h>

#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#endif

int main(int argc, char **argv)
{
	if (argc < 2)
		errx(2, "usage: opt-in PROGRAM [ARG]...");
	if (prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0))
		err(2, "prctl(PR_SET_MEMORY_MERGE)");
	execvp(argv[1], argv + 1);
	err(2, "%s", argv[1]);
}
