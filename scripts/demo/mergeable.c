// SPDX-License-Identifier: GPL-2.0-only
/*
 * mergeable COMMAND [ARG]...: run COMMAND with all its anonymous memory offered to KSM,
 * as systemd does for a unit with MemoryKSM=yes.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#endif

int main(int argc, char **argv)
{
	if (argc < 2) {
		fprintf(stderr, "Usage: mergeable COMMAND [ARG]...\n");
		return 2;
	}
	if (prctl(PR_SET_MEMORY_MERGE, 1L, 0L, 0L, 0L)) {
		fprintf(stderr, "mergeable: PR_SET_MEMORY_MERGE: %s%s\n", strerror(errno),
			errno == EINVAL ? " (a kernel without KSM, or older than 6.4)" : "");
		return 126;
	}
	execvp(argv[1], argv + 1);
	fprintf(stderr, "mergeable: %s: %s\n", argv[1], strerror(errno));
	return 127;
}
