#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Usage (in a guest): guest.py [--builtin] [--seed SEED] [--seconds N] [GROUP]...

stress-ng's memory and process stressors, all of whose memory is mergeable, while KSM scans
as fast as it can, in TAP. Each group of stressors runs for so many seconds: stress-ng has to
verify what it wrote, and pages have to be merged meanwhile. In the end everything has to be
unmerged, and the module has to go.
"""

import argparse
import contextlib
import ctypes
import os
import random
import re
import subprocess
import sys
import threading
import time

from ksmfs import read, write

NOBODY = 65534
PR_SET_MEMORY_MERGE = 67

# Bytes and numbers are small enough for all of a group to fit into the guest, so that what
# runs out of memory is a failure.
GROUPS = {
    "memory": """
        --vm 2 --vm-bytes 48m --mmap 1 --mmap-bytes 8m --mmap-mergeable --mmap-write-check
        --bigheap 1 --bigheap-bytes 48m --brk 1 --brk-bytes 32m --malloc 1 --malloc-bytes 16m
        --madvise 1 --mlock 1 --mmapmany 1 --mprotect 1 --mremap 1 --mremap-bytes 8m --numa 1
        --numa-bytes 8m --pageswap 1 --stack 1 --tlb-shootdown 1
    """,
    "mappings": """
        --vm 1 --vm-bytes 32m --mincore 1 --mmapaddr 1 --mmapcow 1 --mmapfixed 1 --mmapfork 1
        --mmapfork-bytes 16m --mmaphuge 1 --mmaphuge-mmaps 16 --munmap 1 --pagemove 1
        --pagemove-bytes 8m --remap 1 --rmap 1 --userfaultfd 1 --userfaultfd-bytes 8m
        --vm-addr 1 --vm-rw 1 --vm-rw-bytes 8m --vm-splice 1 --vma 1
    """,
    "processes": """
        --vm 1 --vm-bytes 32m --clone 1 --clone-max 64 --daemon 1 --exec 1 --exec-max 8
        --exit-group 1 --fork 2 --fork-max 4 --fork-vm --forkheavy 1 --forkheavy-procs 64
        --mmapfork 1 --mmapfork-bytes 16m --prctl 1 --spawn 1 --vfork 1 --vm-segv 1 --zombie 1
        --zombie-max 64
    """,
}

# What stress-ng leaves out when it is root.
WITHOUT_PRIVILEGES = {"processes"}

failures = 0
tests = 0


def say(text):
    print(text, flush=True)


def result(held, text):
    global failures, tests
    tests += 1
    failures += not held
    say(f"{'ok' if held else 'not ok'} {tests} {text}")


class Monitor(threading.Thread):
    """What the counters were at most, until it is stopped."""

    FILES = ("full_scans", "pages_scanned", "pages_shared", "pages_sharing", "ksm_zero_pages")

    def __init__(self):
        super().__init__(daemon=True)
        self.most = dict.fromkeys(self.FILES, 0)
        self.over = threading.Event()
        self.start()

    def run(self):
        while not self.over.wait(0.05):
            for name in self.FILES:
                self.most[name] = max(self.most[name], read(name))

    def stop(self):
        self.over.set()
        self.join()
        return self.most


def operations(log):
    """Stressor and bogo operations, from the table of --metrics-brief."""
    row = re.compile(r"stress-ng: metrc: \[\d+\] (\S+)\s+(\d+)\s+\d+\.\d+\s")
    return [(match[1], int(match[2])) for match in map(row.match, log.splitlines()) if match]


def nobody():
    """Its memory is mergeable all the same: who may not ask for that inherits it."""
    if ctypes.CDLL(None).prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0):
        raise OSError("PR_SET_MEMORY_MERGE")
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def stress(group, seed, seconds):
    write("run", 2)
    write("use_zero_pages", int(group == "mappings"))
    write("run", 1)
    monitor = Monitor()
    process = subprocess.run(
        ["stress-ng", "--ksm", "--verify", "--metrics-brief", "--oom-avoid", "--seed", str(seed)]
        + ["--temp-path", "/tmp", "--timeout", f"{seconds}s"] + GROUPS[group].split(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd="/tmp",
        preexec_fn=nobody if group in WITHOUT_PRIVILEGES else None)
    skipped = re.search(r"skipped: (?!0\b).*", process.stdout)
    most = monitor.stop()
    counted = operations(process.stdout)
    for line in process.stdout.splitlines():
        if process.returncode or skipped or ": metrc:" not in line:
            say(f"# {line}")
    say("#| " + f"{group}: " + ", ".join(f"{name} {number}" for name, number in counted))
    say("#| " + f"{group}: {most['full_scans']} full scans, {most['pages_scanned']} pages scanned; at most "
        f"{most['pages_shared']} shared, {most['pages_sharing']} sharing, {most['ksm_zero_pages']} of zeroes")
    result(process.returncode == 0 and counted and not skipped, f"{group}: stress-ng finds what it wrote")
    result(most["full_scans"] > 1 and most["pages_shared"] and most["pages_sharing"],
           f"{group}: pages are merged meanwhile")


def scanner():
    """The process ID of rksmd, or of the built-in's ksmd, which sleeps while there is the other."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        # It may be gone.
        with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as file:
            found[file.read().strip()] = int(pid)
    return found.get("rksmd") or found["ksmd"]


def quiet():
    """Whether nothing is merged or tracked any more; what is just going may take a moment."""
    names = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "stable_node_dups")
    for _ in range(100):
        left = {name: read(name) for name in names if read(name)}
        if not left:
            return True
        time.sleep(0.1)
    say(f"# left: {left}")
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--builtin", action="store_true", help="judge the built-in KSM instead")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--seconds", type=int, default=20, help="for each group (20)")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    options = parser.parse_args()
    groups = options.groups or list(GROUPS)

    say("TAP version 13")
    say(f"# seed {options.seed}; repeat with RKSM_SEED={options.seed}")
    say(f"1..{2 * len(groups) + 1 + (not options.builtin)}")
    subprocess.run("modprobe zram && echo 256M >/sys/block/zram0/disksize && mkswap /dev/zram0",
                   shell=True, check=True, stdout=subprocess.DEVNULL)
    if ctypes.CDLL(None).swapon(b"/dev/zram0", 0):
        raise OSError("swapon")
    if not options.builtin:
        subprocess.run(["insmod", "/rksm.ko", *os.environ.get("RKSM_PARAMETERS", "").split()], check=True)
    write("pages_to_scan", 10000)
    write("sleep_millisecs", 1)
    write("smart_scan", 0)
    # Or it gets no time among so many.
    os.setpriority(os.PRIO_PROCESS, scanner(), -10)
    for group in groups:
        stress(group, options.seed, options.seconds)
    write("run", 2)
    result(quiet(), "nothing is left after run=2")
    if not options.builtin:
        result(subprocess.run(["rmmod", "rksm"]).returncode == 0, "the module goes")
    return 1 if failures else 0


sys.exit(main())
