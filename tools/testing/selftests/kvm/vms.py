#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Usage (in a guest): vms.py [--builtin] [--tap] [--vms N] [--seed SEED] [STEP]...

Real VMs on emulated SVM, whose work verifies its own memory all the time, while KSM merges
it: see scripts/vms. Exit status 0 only if everything that is claimed held.
"""

import argparse
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time

from ksmfs import read, write

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20

RAM = 128  # MiB of a VM
COMMON = 6144  # pages that are the same in all VMs
UNIQUE = 4096  # pages of each VM's own
BALLOON = 8  # MiB

BOOT_LIMIT = 150  # s; all VMs are there after 20 to 60 s where emulation works
BOOT_TRIES = 4
MERGE_LIMIT = 600  # s

START = time.monotonic()
options = None
results = failures = 0


def say(text=""):
    for line in text.split("\n"):
        print(f"# {line}" if options.tap else line, flush=True)


def table(text):
    print(f"#| {text}" if options.tap else f"  {text}", flush=True)


def step(text):
    say(f"{'' if options.tap else chr(10)}[{time.monotonic() - START:3.0f} s] {text}")


def result(held, text):
    global results, failures
    results += 1
    failures += not held
    word = ("ok" if held else "not ok") if options.tap else ("  ok  " if held else "  FAIL")
    print(f"{word} {results} {text}" if options.tap else f"{word} {text}", flush=True)


def mib(pages):
    return pages * PAGE / MIB


def command_of(pid):
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:  # it may be gone
        return ""


class Scanner:
    """The kernel threads of one KSM and the CPU time they took."""

    def __init__(self):
        name = "ksmd" if options.builtin else "rksmd"
        pids = filter(str.isdigit, os.listdir("/proc"))
        self.pids = [pid for pid in pids if command_of(pid).split("/")[0] == name]

    def seconds(self):
        total = 0
        for pid in self.pids:
            with open(f"/proc/{pid}/schedstat") as file:
                total += int(file.read().split()[0])
        return total / 1e9


class Died(Exception):
    pass


class Vm:
    """A QEMU and what is asked of the program in it."""

    def __init__(self, number, incoming=None):
        self.number = number
        self.name = f"VM {number + 1}"
        self.text = ""
        self.monitor = f"/tmp/qmp-{number}{'-to' if incoming else ''}.sock"
        self.errors = self.monitor + ".log"
        if os.path.exists(self.monitor):
            os.unlink(self.monitor)
        parameters = f"seed={options.seed} own={number + 1} common={COMMON} unique={UNIQUE}"
        # What the VM would measure wrong if the host is busy.
        parameters += " tsc=reliable no_timer_check"
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"]
                + ["-no-reboot", "-M", "microvm", "-accel", "kvm", "-cpu", "host,-svm", "-smp", "1"]
                + ["-m", f"{RAM}M", "-kernel", "vmlinuz", "-initrd", "initramfs"]
                + ["-append", f"console=ttyS0 quiet panic=-1 {parameters}", "-serial", "stdio"]
                + ["-device", "virtio-balloon-device"]
                + ["-qmp", f"unix:{self.monitor},server=on,wait=off"]
                + (["-incoming", f"unix:{incoming}"] if incoming else []),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        os.set_blocking(self.process.stdout.fileno(), False)
        self.link = None

    def alive(self):
        return self.process.poll() is None

    def check_alive(self):
        if not self.alive():
            self.pump(0)
            raise self.died(f"QEMU ended with status {self.process.returncode}")

    def pump(self, seconds):
        """Take in what the VM says within so many seconds."""
        select.select([self.process.stdout], [], [], seconds)
        self.text += (self.process.stdout.read() or b"").decode(errors="replace")

    def wait_for(self, word, limit):
        """The numbers of the next line with this word."""
        until = time.monotonic() + limit
        while True:
            before, found, rest = self.text.partition(f"vm: {word} ")
            line, whole, rest = rest.partition("\n")
            if found and whole:
                self.text = rest
                words = line.split()
                return dict(zip(words[::2], map(int, words[1::2])))
            self.check_alive()
            if time.monotonic() > until:
                raise self.died(f"no answer within {limit} s")
            self.pump(1)

    def died(self, how):
        with open(self.errors) as errors:
            said = (self.text[-1500:] + errors.read()[-1500:]).strip()
        return Died(f"{self.name}: {how}: {said or 'it said nothing'}")

    def tell(self, letter):
        try:
            self.process.stdin.write(letter.encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            self.pump(1)
            raise self.died(f"QEMU takes no input, status {self.process.poll()}") from None

    def ask(self, letter="s"):
        self.tell(letter)
        return self.wait_for({"s": "status", "v": "verified"}[letter], 300)

    def qmp(self, execute, **arguments):
        if not self.link:
            self.link = socket.socket(socket.AF_UNIX)
            self.link.settimeout(120)
            self.link.connect(self.monitor)
            self.answers = self.link.makefile("r")
            self.answers.readline()
            self.qmp("qmp_capabilities")
        self.link.sendall(json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self.answers.readline())
            if "return" in answer or "error" in answer:
                return answer.get("return", answer)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def resident(self):
        with open(f"/proc/{self.process.pid}/statm") as file:
            return mib(int(file.read().split()[1]))

    def seconds(self):
        """CPU time of QEMU and of its vCPU."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def flags(self):
        """What smaps says of its memory: the flags of the mapping of RAM MiB."""
        size = 0
        with open(f"/proc/{self.process.pid}/smaps") as file:
            for line in file:
                if line.startswith("Size:"):
                    size = int(line.split()[1]) // 1024
                elif line.startswith("VmFlags:") and size == RAM:
                    return line.split()[1:]
        return []


class Vms:
    """All VMs, and what is true of them together."""

    def __init__(self):
        self.all = []
        self.scanner = None

    def start(self):
        """Nothing of KSM has run before all VMs are there: what dies is emulation's fault."""
        vms = [Vm(n) for n in range(options.vms)]
        for n in range(options.vms):
            for attempt in range(1, BOOT_TRIES + 1):
                try:
                    vms[n].wait_for("ready", BOOT_LIMIT)
                    break
                except Died as death:
                    say(f"died before its work began, try {attempt} of {BOOT_TRIES}: {death}")
                    vms[n].kill()
                    if attempt == BOOT_TRIES:
                        sys.exit(1)
                    vms[n] = Vm(n)
        self.all = vms

    def check_alive(self):
        for vm in self.all:
            vm.check_alive()

    def stop(self):
        for vm in self.all:
            vm.kill()

    def verify(self, when):
        """Every word of every VM."""
        wrong = [vm.name for vm in self.all if vm.ask("v")["bad"]]
        passes = sum(vm.ask()["passes"] for vm in self.all)
        but = f", but not {', '.join(wrong)}" if wrong else ""
        result(not wrong, f"{when}: {len(self.all)} VMs hold what the seed says{but}")
        say(f"{passes} verifications of {mib(COMMON + UNIQUE):.0f} MiB so far")

    def level(self):
        """What has to be saved again after something was done, with some slack for the kernels."""
        return read("pages_sharing") - int(COMMON * 0.1)

    def merged(self, vm):
        with open(f"/proc/{vm.process.pid}/ksm_stat") as file:
            return int(dict(line.split()[:2] for line in file)["ksm_merging_pages"])

    def merge(self, what, level=None):
        """Until so many pages are saved; the first time, until full scans find nothing more."""
        start, cpu = time.monotonic(), self.scanner.seconds()
        scans, before = first, _ = read("full_scans"), read("pages_sharing")
        next_row, reached, show = 0, None, level is None
        if show:
            # Most of what is equal is the kernels', so each VM has to have its part.
            level = COMMON * (len(self.all) - 1)
            table("  time   shared  sharing  scans  saved MiB  CPU s")
        while True:
            time.sleep(0.5)
            self.check_alive()
            took = time.monotonic() - start
            sharing = read("pages_sharing")
            held = sharing >= level and all(self.merged(vm) >= COMMON for vm in self.all)
            # What else is equal, as the kernels are, takes longer, and is waited for once.
            still = not show or (read("full_scans") >= scans + 2 and sharing <= before * 1.02)
            if held and reached is None:
                reached = took, self.scanner.seconds() - cpu, read("full_scans") - first
            over = (held and still) or took > MERGE_LIMIT
            if show and (took >= next_row or over):
                table(f"{took:4.0f} s {read('pages_shared'):8} {sharing:8}"
                      f" {read('full_scans') - first:6} {mib(sharing):10.1f}"
                      f" {self.scanner.seconds() - cpu:6.2f}")
                next_row = took + 5 if took < 60 else took + 20
            if over:
                break
            if read("full_scans") >= scans + 2:
                scans, before = read("full_scans"), sharing
        result(held, f"{what}: the pages that are equal in {len(self.all)} VMs are merged")
        if reached:
            table(f"{what}: merged after {reached[0]:.0f} s, {reached[1]:.2f} s of CPU and"
                  f" {reached[2]} full scans; {mib(sharing):.1f} MiB saved in the end")

    def full_scans(self, number):
        until, last = read("full_scans") + number, time.monotonic() + MERGE_LIMIT
        while read("full_scans") < until and time.monotonic() < last:
            self.check_alive()
            time.sleep(0.2)

    def speed(self, seconds=10):
        """Verifications a second of all VMs."""
        before = sum(vm.ask()["passes"] for vm in self.all)
        start = time.monotonic()
        time.sleep(seconds)
        return (sum(vm.ask()["passes"] for vm in self.all) - before) / (time.monotonic() - start)


def load_kvm():
    for name in sorted(os.listdir("modules")):
        subprocess.run(["insmod", f"modules/{name}"], check=True)


def scan():
    write("pages_to_scan", 5000)
    write("sleep_millisecs", 20)
    write("run", 1)


def full_speed(vms):
    vm = vms.all[0]
    step(f"{vm.name} writes at full speed to what is merged")
    before, sharing, level = vm.ask()["writes"], read("pages_sharing"), vms.level()
    cpu, start = vms.scanner.seconds(), time.monotonic()
    vm.tell("w")
    time.sleep(15)
    writes, took = vm.ask()["writes"] - before, time.monotonic() - start
    least = read("pages_sharing")
    table(f"{writes / took:.0f} writes a second to {COMMON} pages in turn;"
          f" {mib(sharing - least):.1f} MiB less saved;"
          f" the scanner took {100 * (vms.scanner.seconds() - cpu) / took:.0f} % of a CPU")
    result(writes > COMMON and sharing - least > COMMON * 0.9,
           "what is written to is not merged any more")
    vms.verify("while one writes")
    vm.tell("r")
    vms.merge("what was written is as before", level)
    vms.verify("merged again")


def paused(vms):
    vm = vms.all[1]
    step(f"{vm.name} is paused for three full scans")
    vm.qmp("stop")
    status = vm.qmp("query-status")["status"]
    vms.full_scans(3)
    vm.qmp("cont")
    result(status == "paused", "a merged VM is paused and goes on")
    vms.verify("after a pause")


def ballooned(vms):
    vm = vms.all[-1]
    step(f"{vm.name} gives {BALLOON} MiB away and gets them back")

    def actual(goal):
        vm.qmp("balloon", value=goal * MIB)
        for _ in range(300):
            now = vm.qmp("query-balloon").get("actual", 0) // MIB
            if now == goal:
                break
            time.sleep(0.2)
        return now

    before, sharing = vm.resident(), read("pages_sharing")
    small = actual(RAM - BALLOON)
    table(f"{vm.name} has {small} MiB, and {before - vm.resident():.1f} MiB less in its mapping;"
          f" {mib(sharing - read('pages_sharing')):.1f} MiB less saved")
    vms.full_scans(2)
    large = actual(RAM)
    result((small, large) == (RAM - BALLOON, RAM),
           "the balloon of a merged VM is filled and emptied")
    vms.verify("after the balloon")


def forked(vms):
    vm = vms.all[0]
    step(f"the QEMU of {vm.name} forks, as for a network helper; its memory is MADV_DONTFORK")
    flags = vm.flags()
    say(f"its flags in smaps: {' '.join(flags)}")
    result("mg" in flags and "dc" in flags, "its memory is mergeable and not forked")
    with open("/tmp/helper", "w") as file:
        file.write("#!/bin/sh\necho $PPID >/tmp/forked\nexit 1\n")
    os.chmod("/tmp/helper", 0o755)
    before = read("pages_sharing"), read("general_profit")
    for n in range(8):
        answer = vm.qmp("netdev_add", type="bridge", id=f"n{n}", br="none", helper="/tmp/helper")
    after = read("pages_sharing"), read("general_profit")
    parent = None
    if os.path.exists("/tmp/forked"):
        with open("/tmp/forked") as file:
            parent = int(file.read())
    say(f"the helper's parent was {parent}; QEMU said {json.dumps(answer)}")
    table(f"before 8 forks {before[0]} pages_sharing, after them {after[0]}")
    result(parent == vm.process.pid and abs(after[0] - before[0]) < before[0] * 0.02,
           "a fork of QEMU adds nothing to what is merged")
    vms.verify("after the forks")


def migrated(vms):
    old = vms.all[1]
    step(f"{old.name} moves to another QEMU while it works and is merged")
    path = "/tmp/migration.sock"
    new = Vm(old.number, incoming=path)
    while not os.path.exists(path) and new.alive():
        time.sleep(0.1)
    passes, merged, level = old.ask()["passes"], vms.merged(old), vms.level()
    start = time.monotonic()
    old.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 34, "downtime-limit": 2000})
    old.qmp("migrate", uri=f"unix:{path}")
    info = {}
    while time.monotonic() - start < MERGE_LIMIT:
        info = old.qmp("query-migrate")
        if info.get("status") in ("completed", "failed", "cancelled"):
            break
        time.sleep(0.2)
    result(info.get("status") == "completed", f"a merged VM is live-migrated: {info.get('status')}")
    ram = info.get("ram", {})
    table(f"migrated in {time.monotonic() - start:.0f} s, with {merged} of its pages merged:"
          f" {ram.get('normal')} pages sent, {ram.get('duplicate')} of zeroes,"
          f" {ram.get('dirty-sync-count')} rounds, {info.get('downtime')} ms down")
    for _ in range(300):
        if new.qmp("query-status").get("status") == "running":
            break
        time.sleep(0.2)
    old.kill()
    vms.all[1] = new
    result(new.ask("v")["passes"] > passes, "it goes on where it was")
    # Pages of zeroes that the other side has not touched are none there.
    vms.merge("migrated", level - ram.get("duplicate", 0))
    vms.verify("after the migration")


def killed(vms):
    vm = vms.all[-1]
    step(f"{vm.name} is killed")
    sharing, start = read("pages_sharing"), time.monotonic()
    vm.process.send_signal(signal.SIGKILL)
    vm.process.wait()
    took = time.monotonic() - start
    vms.all.remove(vm)
    vms.full_scans(2)
    left = read("pages_sharing")
    table(f"gone after {took:.2f} s; {mib(sharing - left):.1f} MiB less saved")
    result(sharing - left >= COMMON * 0.9,
           "a merged VM is killed, its part is not counted any more")
    vms.verify("after one was killed")


def cost(vms):
    step("what scanning costs the VMs")
    with_scanner = vms.speed()
    write("run", 0)
    without = vms.speed()
    write("run", 1)
    table(f"{without:.1f} verifications a second while nothing is scanned, {with_scanner:.1f} while"
          f" it is ({100 * with_scanner / without:.0f} %)")


def hints(vms):
    """Accessed bits count as hints only where merge_across_nodes is 1."""
    step("what accessed bits are worth")
    write("smart_scan", 0)
    level = vms.level()
    table("accessed bits  VMs        us of CPU for 1000 pages   until merged again")
    for across in (1,) if options.builtin else (1, 0):
        write("run", 2)
        write("merge_across_nodes", across)
        scan()
        vms.merge(f"merge_across_nodes={across}", level)
        for state in "idle", "busy", "writing":
            for vm in vms.all:
                vm.tell(state[0])
            vms.full_scans(2)
            pages, cpu = read("pages_scanned"), vms.scanner.seconds()
            vms.full_scans(4)
            pages, cpu = read("pages_scanned") - pages, vms.scanner.seconds() - cpu
            again = ""
            if state == "writing":
                before = read("full_scans")
                for vm in vms.all:
                    vm.tell("r")
                until = time.monotonic() + MERGE_LIMIT
                while time.monotonic() < until and read("pages_sharing") < level:
                    time.sleep(0.1)
                again = f"{read('full_scans') - before:6} full scans"
            used = "none" if options.builtin else "used" if across else "ignored"
            table(f"{used:13}  {state:8} {1e9 * cpu / max(pages, 1):26.0f}   {again}")
    vms.verify("with and without hints")
    write("run", 2)
    write("merge_across_nodes", 1)
    write("smart_scan", 1)
    scan()
    vms.merge("hints again", level)


STEPS = {
    "cost": cost,
    "hints": hints,
    "writes": full_speed,
    "pause": paused,
    "balloon": ballooned,
    "fork": forked,
    "migration": migrated,
    "kill": killed,
}


def main():
    global options
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--builtin", action="store_true", help="the built-in KSM instead")
    parser.add_argument("--tap", action="store_true", help="results in TAP")
    parser.add_argument("--vms", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    options = parser.parse_args()
    if not set(options.steps) <= set(STEPS):
        parser.error(f"the steps are {', '.join(STEPS)}")

    step(f"{options.vms} VMs of {RAM} MiB on KVM, seed {options.seed}:"
         f" {mib(COMMON):.0f} MiB in each are equal, {mib(UNIQUE):.0f} MiB are not")
    load_kvm()
    vms = Vms()
    vms.start()
    # scripts/vms looks for this: what ends before it is repeated.
    say("the VMs work")
    vms.verify("at the start")

    if not options.builtin:
        step("rksm takes over from the built-in KSM")
        subprocess.run(["insmod", "/rksm.ko"], check=True)
    vms.scanner = Scanner()
    # Or it gets no time among so many.
    for pid in vms.scanner.pids:
        os.setpriority(os.PRIO_PROCESS, int(pid), -10)
    try:
        step("scanning begins")
        cpu = [vm.seconds() for vm in vms.all]
        before = time.monotonic()
        scan()
        vms.merge("three VMs" if options.vms == 3 else "the VMs")
        took = time.monotonic() - before
        for vm, had in zip(vms.all, cpu):
            table(f"{vm.name}: {vms.merged(vm)} pages merged,"
                  f" {100 * (vm.seconds() - had) / took:.0f} % of a CPU meanwhile")
        vms.verify("merged")
        for name in options.steps or STEPS:
            STEPS[name](vms)
        step("run=2")
        write("run", 2)
        result(not read("pages_shared") and not read("pages_sharing"),
               "nothing is merged after run=2")
        vms.verify("unmerged")
    except Died as death:
        result(False, f"no VM dies: {str(death).splitlines()[0]}")
        say(str(death))
        write("run", 2)
    vms.stop()
    if not options.builtin:
        for _ in range(50):
            gone = subprocess.run(["rmmod", "rksm"], stderr=subprocess.DEVNULL).returncode == 0
            if gone:
                break
            time.sleep(0.2)
        result(gone, "the module goes")
    if options.tap:
        print(f"1..{results}", flush=True)
    return 1 if failures else 0


sys.exit(main())
