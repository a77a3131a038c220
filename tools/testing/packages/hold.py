#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Usage: hold.py SEED

Holds 8 MiB that are mergeable and the same for each SEED; says so, and whether they still are at
each line of its input."""

import mmap
import random
import sys

size = 8 << 20
random = random.Random(int(sys.argv[1]))
wanted = random.randbytes(size)
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
memory.madvise(mmap.MADV_MERGEABLE)
memory[:] = wanted
print("holds", flush=True)
for _ in sys.stdin:
    print("same" if memory[:] == wanted else "changed", flush=True)
