#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Usage: holder.py EQUAL UNIQUE [WORD]...

A process with so many MiB of memory that all others have, too, if they have as many, and so many
that are nobody else's. WORD: "offer" marks both as mergeable, "busy" rewrites the second
part all the time, "tick" breaks the first page of the first part all the time. Says "ready" with
the address and the length; ends with its input, or after ten minutes.
"""

import ctypes
import mmap
import os
import random
import select
import sys
import time

MADV_MERGEABLE = 12
PAGE = 4096

equal, unique = int(sys.argv[1]) << 20, int(sys.argv[2]) << 20
words = sys.argv[3:]
memory = mmap.mmap(-1, equal + unique, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
# Or pages of other processes would not be in the same places of huge pages.
memory.madvise(mmap.MADV_NOHUGEPAGE)
if "offer" in words:
    memory.madvise(MADV_MERGEABLE)
same = random.Random("equal").randbytes(1 << 20)
own = random.Random(os.getpid()).randbytes(1 << 20)
for at in range(0, equal + unique, 1 << 20):
    # Random bytes take long to make. A few bytes further on in them no page is as another.
    block, skip = same if at < equal else own, at >> 16
    memory[at:at + (1 << 20)] = block[skip:] + block[:skip]
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
print("ready", address, equal + unique, flush=True)

end = time.monotonic() + 600
while time.monotonic() < end:
    pause = 0.02 if "busy" in words or "tick" in words else 600
    if select.select([sys.stdin], [], [], pause)[0]:
        break
    if "busy" in words:
        for at in range(equal, equal + unique, PAGE):
            memory[at:at + 8] = time.monotonic_ns().to_bytes(8, "little")
    if "tick" in words:
        memory[0:8] = memory[0:8]
