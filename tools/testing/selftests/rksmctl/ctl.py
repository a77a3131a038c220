# SPDX-License-Identifier: GPL-2.0-only
"""What the tests of rksmctl have in common: results in TAP, processes that hold memory, and runs
of the program itself."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

from ksmfs import read, write

MIB = 1 << 20
PAGE = 4096
START = time.monotonic()
HOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "holder.py")
# What is waited for may take long on a busy machine; a claim is never about less.
PATIENCE = 60

results = failures = 0


def say(text):
    for line in str(text).splitlines():
        print(f"# {line}", flush=True)


def table(text):
    print(f"#| {text}", flush=True)


def step(text):
    say(f"[{time.monotonic() - START:3.0f} s] {text}")


def check(held, text, *details):
    """One result; the details are printed where it does not hold."""
    global results, failures
    results += 1
    if not held:
        failures += 1
        for detail in details:
            say(detail)
    print(f"{'ok' if held else 'not ok'} {results} {text}", flush=True)
    return held


def finish():
    print(f"1..{results}", flush=True)
    sys.exit(1 if failures else 0)


class Run:
    """How rksmctl ended, and what it said."""

    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err

    def __str__(self):
        return f"status {self.status}\n{self.out}{self.err}"

    @property
    def json(self):
        try:
            return json.loads(self.out)
        except ValueError:
            raise SystemExit(f"Bail out! no JSON: {self}") from None


def ctl(*args, env=None, before=()):
    words = [*before, "rksmctl", *map(str, args)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **(env or {})},
                          stdin=subprocess.DEVNULL, timeout=300)
    return Run(done.returncode, done.stdout, done.stderr)


def ctl_json(*args):
    run = ctl(*args, "--json")
    if run.status not in (0, 4):
        say(f"rksmctl {' '.join(map(str, args))}: {run}")
    return run.json


def says(run, status, *words):
    """Whether it failed with this status and one sentence that has these words."""
    lines = run.err.splitlines()
    return (run.status == status and len(lines) == 1 and lines[0].startswith("rksmctl: ")
            and all(word in run.err for word in words))


def in_terminal(columns, *args):
    """Status and lines of a run in a terminal of so many columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen(["rksmctl", *map(str, args)], stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    text = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:  # nobody has the other end any more
            break
        if not part:
            break
        text += part
    os.close(master)
    # What is written over counts as a line of its own.
    lines = re.split(r"[\r\n]+|\x1b\[[0-9;?]*[A-Za-z]", text.decode())
    return child.wait(), [line for line in lines if line]


class Holder:
    """A process that holds memory."""

    def __init__(self, equal, unique, *words, before=(), cgroup=None):
        enter = None
        if cgroup:
            def enter():
                with open(f"/sys/fs/cgroup{cgroup}/cgroup.procs", "w") as file:
                    file.write("0\n")
        self.process = subprocess.Popen(
            [*before, "python3", "-I", "-S", HOLDER, str(equal), str(unique), *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
        self.pid = self.process.pid
        self.started = time.monotonic()

    def ready(self):
        _, self.address, self.length = self.process.stdout.readline().split()
        self.address, self.length = int(self.address), int(self.length)
        return self

    def range(self):
        return f"{self.address:x}-{self.address + self.length:x}"

    def stat(self, name):
        with open(f"/proc/{self.pid}/ksm_stat") as file:
            for line in file:
                key, value = line.split(maxsplit=1)
                if key.rstrip(":") == name:
                    return value.strip()
        return None

    def merged(self):
        return int(self.stat("ksm_merging_pages"))

    def end(self):
        self.process.kill()
        self.process.wait()


def hold(number, *args, **kwargs):
    """So many of them, started together."""
    holders = [Holder(*args, **kwargs) for _ in range(number)]
    return [holder.ready() for holder in holders]


def end(holders):
    for holder in holders:
        holder.end()


def until(true, seconds=PATIENCE):
    """Waits until it is true; None if that takes too long, or the seconds that it took."""
    begin = time.monotonic()
    while True:
        if true():
            return time.monotonic() - begin
        if time.monotonic() - begin > seconds:
            return None
        time.sleep(0.05)


def rmmod():
    """Whether the module goes; it is in use for a moment after the device was."""
    def gone():
        return subprocess.run(["rmmod", "rksm"], stderr=subprocess.DEVNULL).returncode == 0
    return until(gone, 20) is not None


def full_scans(number):
    goal = read("full_scans") + number
    return until(lambda: read("full_scans") >= goal) is not None


def settle():
    """Scans until a full scan or two find nothing more."""
    write("run", 1)
    before = -1
    for _ in range(30):
        full_scans(2)
        if read("pages_sharing") == before:
            break
        before = read("pages_sharing")
    write("run", 0)


def no_huge_pages():
    """Or khugepaged adds zeroes to memory while it is looked at."""
    with open("/sys/kernel/mm/transparent_hugepage/enabled", "w") as file:
        file.write("never\n")


def saved_pages():
    return read("pages_sharing") + read("ksm_zero_pages")


def vmstat(name):
    with open("/proc/vmstat") as file:
        return int(dict(line.split() for line in file)[name])


def rss(pid):
    with open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def reasons(pid):
    """What why says of one process: its answer, and the bytes by reason."""
    answer = ctl_json("why", pid)["processes"][0]
    rows = answer["resident"] + answer["apart"] + answer["of_it"]
    return answer, {row["reason"]: row["bytes"] for row in rows}


def check_sum(pid, when):
    answer, rows = reasons(pid)
    total, real = sum(row["bytes"] for row in answer["resident"]), rss(pid)
    check(abs(total - real) <= real / 100, f"{when}: the reasons sum to VmRSS within 1 %",
          f"{total} of {real}", rows)
    return rows
