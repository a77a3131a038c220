#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Usage (in a guest): on_vm.py

rksmctl with QEMU's VMs: found by their names, enabled, merged, and told why not. The VMs run their
firmware, on TCG; a device has filled a part of their memory before.
"""

import os
import random
import subprocess
import time

from ctl import (MIB, PAGE, Holder, check, ctl, ctl_json, finish, no_huge_pages, read, reasons,
                 rmmod, saved_pages, step, table, until)

RAM = 64  # MiB of a VM
DATA = 24  # MiB that all have


class Vm(Holder):
    def __init__(self, name, *words):
        self.name = name
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", "-name", f"guest={name},debug-threads=on", "-nodefaults",
             "-no-user-config", "-display", "none", "-accel", "tcg", "-smp", "1", "-m", f"{RAM}M",
             "-device", f"loader,file=/tmp/data,addr={16 * MIB},force-raw=on", *words])
        self.pid = self.process.pid

    def memory(self):
        """What is resident of the mapping that is its RAM."""
        with open(f"/proc/{self.pid}/smaps") as file:
            size = 0
            for line in file:
                words = line.split()
                if words[0] == "Size:":
                    size = int(words[1])
                elif words[0] == "Rss:" and size == RAM * 1024:
                    return int(words[1]) * 1024
        return 0

    def seconds(self):
        """CPU time, in tenths of a second."""
        with open(f"/proc/{self.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) // 10

    def ready(self):
        """Its firmware has nothing to boot in the end, and waits."""
        check(until(lambda: self.memory() >= DATA * MIB) is not None, f"{self.name} has its memory")
        before = -1
        while before != self.seconds():
            before = self.seconds()
            time.sleep(1)
        return self


def merge_all(vms):
    return [ctl_json("merge", vm.pid) for vm in vms]


with open("/tmp/data", "wb") as data:
    data.write(random.Random(1).randbytes(DATA * MIB))
subprocess.run(["insmod", "/rksm.ko"], check=True)
until(lambda: os.path.exists("/dev/rksm"), 10)

no_huge_pages()

step("two VMs whose memory QEMU does not offer")
private = [Vm(name, "-machine", "pc,mem-merge=off") for name in ("web1", "web2")]
for vm in private:
    vm.ready()
run = ctl("why", "--vm", "web1")
check(run.status == 0 and run.out.startswith(f"web1 ({private[0].pid})")
      and "not opted in" in run.out and "rksmctl enable" in run.out,
      "why --vm says that it is not opted in, and what to do", run)
estimate = ctl_json("estimate", *[vm.pid for vm in private], "--settle", "1")
possible = estimate["saving"]["none"]["possible_bytes"]
one = ctl_json("estimate", "--vm", "web1", "--settle", "0")
check(one["processes"] == 1 and one["memory_bytes"] >= DATA * MIB, "estimate --vm finds it", one)
for name in ("web1", "web2"):
    run = ctl("enable", "--vm", name)
    check(run.status == 0, f"enable --vm {name}", run)
check(all(vm.stat("ksm_merge_any") == "yes" for vm in private),
      "all their memory is open to merging")
before = saved_pages()
first, second = merge_all(private)
saved = (saved_pages() - before) * PAGE
# They run, and may write to what is merged.
told = first["saved_bytes"] + second["saved_bytes"]
check(abs(told - saved) < MIB and saved >= DATA * MIB * 0.95,
      "merge saves what it says", first, second, saved)
table(f"two VMs: {possible / MIB:.1f} MiB estimated, {saved / MIB:.1f} MiB saved by merge")
apart = abs(possible - saved) / estimate["memory_bytes"]
check(apart <= 0.05, "which is within 5 points of the estimate", estimate, saved)
answer, rows = reasons(private[1].pid)
check(answer["title"] == "web2" and rows["merged"] >= DATA * MIB * 0.95,
      "why has it as merged", rows)

step("a VM with shared memory")
shared = Vm("net1", "-object", f"memory-backend-memfd,id=m,size={RAM}M,share=on", "-machine",
            "pc,memory-backend=m").ready()
ctl("enable", "--vm", "net1")
for words in (["--vm", "net1"], [shared.pid]):
    run = ctl("why", *words)
    check(run.status == 0 and "shared memory (memfd, shm)" in run.out
          and "memory-backend-ram" in run.out and "share=on" in run.out,
          f"why {'--vm' if len(words) > 1 else 'PID'} names shared memory and the remedy", run)
_, rows = reasons(shared.pid)
check(rows["shared_memory"] >= DATA * MIB and rows.get("merged", 0) < DATA * MIB / 2,
      "all of its memory is that", rows)
found = [f for f in ctl_json("doctor")["findings"] if "net1" in f["text"]]
check(found and found[0]["level"] == "warning", "doctor finds it as well", found)
run = ctl("enable", "--vm", "nobody")
check(run.status == 1 and "no VM named nobody" in run.err,
      "a VM that is not there is an error", run)
check(all(vm.process.poll() is None for vm in [*private, shared]), "all VMs still run")
for vm in [*private, shared]:
    vm.end()
check(until(lambda: read("pages_sharing") == 0) is not None, "nothing is left of them")
check(rmmod(), "the module goes")
finish()
