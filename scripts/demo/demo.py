# SPDX-License-Identifier: GPL-2.0-only
"""The guest's side of scripts/run: real programs, merged by one KSM and the other, and checked.

Usage: demo.py [--builtin] [--seed SEED] [--governor knobs|auto]

Exit status 0 only if everything that is claimed on the way held.
"""

import argparse
import array
import glob
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import store

KSM = "/sys/kernel/mm/ksm"
RKSM = "/sys/kernel/mm/rksm"
PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20
MODULE = "/rksm.ko"
KPF_KSM = 1 << 21

REDIS_INSTANCES = 4
PYTHON_INSTANCES = 3
KEYS = 4096
# With what redis puts around it, a string of this length fills a page. Shorter ones
# share their page with neighbours that are elsewhere in another instance.
VALUE = PAGE - 6

# The digest of all values in the order of their keys, computed by redis itself.
DIGEST = b"""
local digest = ''
for number = 0, ARGV[1] - 1 do
    local value = redis.call('GET', 'document:' .. number)
    if not value then
        return 'document:' .. number .. ' is gone'
    end
    digest = redis.sha1hex(digest .. value)
end
if redis.call('DBSIZE') ~= tonumber(ARGV[1]) then
    return 'there are keys that nobody set'
end
return digest
"""

OVERWRITE = b"""
for number = 1, ARGV[1] - 1, 2 do
    local key = 'document:' .. number
    redis.call('SETRANGE', key, 0, string.reverse(redis.call('GET', key)))
end
return 'done'
"""

START = time.monotonic()
failures = []
# Who paces the scanner where there is a choice
governor = "knobs"


def say(text=""):
    print(text, flush=True)


def rksmctl(*words):
    return run_command("./rksmctl", *words)


def step(text):
    say(f"\n[{time.monotonic() - START:3.0f} s] {text}")


def check(held, text):
    say(f"  {'ok  ' if held else 'FAIL'} {text}")
    if not held:
        failures.append(text)


def fatal(text):
    say(f"  FAIL {text}")
    sys.exit(1)


def mib(pages):
    return pages * PAGE / MIB


def knob(name):
    with open(f"{KSM}/{name}") as file:
        return file.read().strip()


def count(name):
    return int(knob(name))


def set_knob(name, value, directory=KSM):
    try:
        with open(f"{directory}/{name}", "w") as file:
            file.write(str(value))
    except OSError as error:
        fatal(f"echo {value} > {directory}/{name}: {error.strerror}")


def is_governed():
    return governor == "auto" and os.path.exists(RKSM)


def pace():
    """What paces the scanner."""
    if not is_governed():
        pages, msecs = count("pages_to_scan"), count("sleep_millisecs")
        return f"knobs: {pages} pages, then {msecs} ms of sleep"
    percent, burst = rksm_file("cpu_percent"), rksm_file("cpu_burst_millisecs")
    return f"governor=auto: {percent} % of a CPU, {burst} ms of it at once"


def rksm_file(name):
    with open(f"{RKSM}/{name}") as file:
        return file.read().strip()


def memory():
    """/proc/meminfo in MiB, and what it leaves out: the free pages on per-CPU lists."""
    with open("/proc/meminfo") as file:
        result = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in file}
    with open("/proc/zoneinfo") as file:
        counts = [int(line.split()[1]) for line in file if line.split()[0] == "count:"]
    result["per-CPU free"] = mib(sum(counts))
    return result


def words(path, start=0, number=1 << 40):
    """The 64-bit words of a file from one on, as many as there are."""
    result = array.array("Q")
    with open(path, "rb", buffering=0) as file:
        file.seek(start * 8)
        while data := file.read(min(number - len(result), 1 << 17) * 8):
            result.frombytes(data)
    return result


def merged_frames(programs):
    """The frame of every merged page of the programs, by process and address."""
    flags = words("/proc/kpageflags")
    frames = {}
    for program in programs.everyone():
        pid = program.process.pid
        with open(f"/proc/{pid}/maps") as file:
            areas = [line.split()[0].split("-") for line in file if "vsyscall" not in line]
        for start, end in areas:
            first, last = int(start, 16) // PAGE, int(end, 16) // PAGE
            for at, word in enumerate(words(f"/proc/{pid}/pagemap", first, last - first)):
                frame = word & ((1 << 55) - 1)
                if word >> 63 and frame < len(flags) and flags[frame] & KPF_KSM:
                    frames[pid, first + at] = frame
    return frames


def in_place(programs, *argv):
    """Runs a command that changes which KSM there is, and no page."""
    set_knob("run", 0)
    # Their own writes would be seen as changes.
    programs.signal(signal.SIGSTOP)
    before, counted = merged_frames(programs), (count("pages_shared"), count("pages_sharing"))
    begun = time.monotonic()
    held = run_command(*argv) == 0
    took = time.monotonic() - begun
    after, now = merged_frames(programs), (count("pages_shared"), count("pages_sharing"))
    programs.signal(signal.SIGCONT)
    say("                 merged pages  in frames   shared  sharing")
    for when, frames, (shared, sharing) in ("before", before, counted), ("after", after, now):
        say(f"  {when:14} {len(frames):12} {len(set(frames.values())):10} {shared:8} {sharing:8}")
    moved = len(before.items() ^ after.items())
    # Who counts may not have noticed yet that a merged page is gone. Who comes looks at all.
    gone = all(new <= old for new, old in zip(now, counted)) and now[0] == len(set(after.values()))
    check(
        held and bool(before) and not moved and (counted == now or gone),
        f"{argv[0]}: {moved} of {len(before)} merged pages changed ({took:.2f} s)",
    )
    start_scanning()


class Log:
    """The kernel's log from the time this object was made."""

    def __init__(self):
        self.fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self.fd, 0, os.SEEK_END)

    def show(self):
        """What rksm has said since the last time."""
        while True:
            try:
                record = os.read(self.fd, 8192).decode(errors="replace")
            except BlockingIOError:
                return
            except BrokenPipeError:  # older records have been overwritten
                continue
            text = record.split(";", 1)[1].split("\n")[0]
            if text.startswith("rksm: "):
                say(f"  | {text}")


class Scanner:
    """The kernel threads of one KSM and the CPU time they took."""

    def __init__(self, name):
        self.name = name
        self.stats = []
        for path in glob.glob("/proc/[0-9]*/comm"):
            with open(path) as file:
                comm = file.read().strip()
            if comm == name or comm.startswith(name + "/"):
                self.stats.append(os.path.dirname(path) + "/schedstat")
        if not self.stats:
            fatal(f"no kernel thread is called {name}")

    def seconds(self):
        total = 0
        for path in self.stats:
            with open(path) as file:
                total += int(file.read().split()[0])
        return total / 1e9


class Redis:
    """A redis-server with KEYS strings."""

    def __init__(self, number):
        self.name = f"redis-server {number}"
        self.path = f"/tmp/redis-{number}.sock"
        self.process = subprocess.Popen(
            ["./mergeable", "redis-server", "--port", "0", "--unixsocket", self.path]
            + ["--save", "", "--appendonly", "no", "--loglevel", "warning"],
            stdout=subprocess.DEVNULL,
        )

    def connect(self):
        for _ in range(600):
            try:
                link = socket.socket(socket.AF_UNIX)
                link.connect(self.path)
                return link
            except OSError:
                link.close()
                if self.process.poll() is not None:
                    break
                time.sleep(0.1)
        fatal(f"{self.name} does not answer")

    def load(self, commands):
        """Start a redis-cli that sends a file of commands."""
        self.connect().close()
        with open(commands, "rb") as file:
            self.loader = subprocess.Popen(
                ["redis-cli", "-s", self.path, "--pipe"],
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def loaded(self, replies):
        output, _ = self.loader.communicate()
        if f"errors: 0, replies: {replies}" not in output:
            fatal(f"{self.name} did not take all its data:\n{output}")

    def ask(self, question):
        self.link = self.connect()
        script = {"digest": DIGEST, "overwrite": OVERWRITE}[question]
        self.link.sendall(command(b"EVAL", script, b"0", b"%d" % KEYS))

    def answer(self):
        with self.link, self.link.makefile("r") as reader:
            first = reader.readline()
            return (reader.readline() if first.startswith("$") else first).strip()


class Python:
    """A store.py with its table."""

    def __init__(self, number, seed):
        self.name = f"python3 {number}"
        self.process = subprocess.Popen(
            ["./mergeable", "python3", "store.py", str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def ask(self, question):
        try:
            self.process.stdin.write(question + "\n")
        except OSError:
            pass

    def answer(self):
        return self.process.stdout.readline().strip()


def command(*words):
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words)


def chained_sha1(values):
    """What DIGEST gives for these values."""
    digest = ""
    for value in values:
        digest = hashlib.sha1(digest.encode() + value).hexdigest()
    return digest


class Programs:
    """All the programs and what their data has to be."""

    def __init__(self, seed):
        self.seed = seed
        self.redis = []
        self.python = []

    def everyone(self):
        return self.redis + self.python

    def start_redis(self):
        self.redis = [Redis(n + 1) for n in range(REDIS_INSTANCES)]
        data = random.Random(f"{self.seed}/redis").randbytes(KEYS * VALUE)
        self.documents = [data[at : at + VALUE] for at in range(0, len(data), VALUE)]
        path = "/tmp/documents"
        with open(path, "wb") as file:
            for number, value in enumerate(self.documents):
                file.write(command(b"SET", b"document:%d" % number, value))
        for program in self.redis:
            program.load(path)
        for program in self.redis:
            program.loaded(KEYS)
        os.unlink(path)

    def start_python(self):
        self.python = [Python(n + 1, self.seed) for n in range(PYTHON_INSTANCES)]
        self.columns = [store.column(self.seed, n) for n in range(store.COLUMNS)]
        for program in self.python:
            if program.answer() != "ready":
                fatal(f"{program.name} did not start")

    def overwrite_half(self):
        """Every second document and half of every column, in place."""
        for program in self.everyone():
            program.ask("overwrite")
        self.documents[1::2] = [value[::-1] for value in self.documents[1::2]]
        for values in self.columns:
            store.overwrite(values)
        for program in self.everyone():
            if program.answer() != "done":
                fatal(f"{program.name} did not overwrite its data")

    def prove(self, when):
        """Every program's digest of its data against that of the data from the seed."""
        for program in self.everyone():
            program.ask("digest")
        want = {Redis: chained_sha1(self.documents), Python: store.digest_of(self.columns)}
        wrong = [p.name for p in self.everyone() if p.answer() != want[type(p)]]
        check(
            not wrong,
            f"{when}: {REDIS_INSTANCES} x {KEYS} keys and {PYTHON_INSTANCES} x "
            f"{store.COLUMNS} columns are what the seed says"
            + (f", but not those of {', '.join(wrong)}" if wrong else ""),
        )

    def possible(self):
        """The pages that can be saved: all copies of the data but one."""
        redis = KEYS * max(len(self.redis) - 1, 0)
        python = store.COLUMNS * store.ROWS * 8 // PAGE * max(len(self.python) - 1, 0)
        return redis + python

    def anonymous(self):
        """Pages of anonymous memory that are mapped, merged ones included."""
        total = 0
        for program in self.everyone():
            with open(f"/proc/{program.process.pid}/status") as file:
                status = dict(line.split(":", 1) for line in file)
            total += int(status["RssAnon"].split()[0]) * 1024 // PAGE
        return total

    def signal(self, number):
        for program in self.everyone():
            program.process.send_signal(number)

    def stop(self):
        for program in self.everyone():
            program.process.kill()
            program.process.wait()


class Table:
    """One line a second on what the scanner does."""

    HEAD = "   time   shared  sharing unshared volatile  scans  saved MiB   CPU s  CPU %"

    def __init__(self, scanner):
        self.scanner = scanner
        self.start = self.last = time.monotonic()
        self.base = self.cpu = scanner.seconds()
        say(f"  {pace()}")
        say(self.HEAD)

    def line(self):
        now, cpu = time.monotonic(), self.scanner.seconds()
        percent = 100 * (cpu - self.cpu) / max(now - self.last, 1e-9)
        self.last, self.cpu = now, cpu
        say(
            f"  {now - self.start:4.0f} s {count('pages_shared'):8} {count('pages_sharing'):8}"
            f" {count('pages_unshared'):8} {count('pages_volatile'):8} {count('full_scans'):6}"
            f" {mib(count('pages_sharing')):10.1f} {cpu - self.base:7.2f} {percent:6.0f}"
        )

    def watch(self, goal):
        """Until GOAL pages are saved and a full scan finds nothing more.

        With governor=auto a full scan of what is quiet takes a minute: a few seconds then.
        """
        scans, before = count("full_scans"), count("pages_sharing")
        until = time.monotonic() + (300 if is_governed() else 120)
        tick = self.start
        lines = 0
        while time.monotonic() < until:
            tick = max(tick + 1, time.monotonic())
            time.sleep(max(tick - time.monotonic(), 0))
            self.line()
            lines += 1
            sharing = count("pages_sharing")
            if lines % 3 == 0 if is_governed() else count("full_scans") > scans:
                if sharing >= goal and sharing <= before * 1.01:
                    return
                scans, before = count("full_scans"), sharing


def run_command(*words):
    """Run a command that is shown; its status and what it said."""
    say(f"  # {' '.join(words)}")
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for text in done.stdout.splitlines():
        say(f"  {text}")
    return done.returncode


def estimate(programs):
    """What rksmctl says that merging would save, in pages, of how many, and those there are."""
    pids = [str(program.process.pid) for program in programs.everyone()]
    argv = ["./rksmctl", "estimate", "--json", "--settle", "0", "--seed", "1", *pids]
    said = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout)
    pages, possible = said["memory_bytes"] // PAGE, said["saving"]["none"]["possible_bytes"] // PAGE
    say(f"  rksmctl estimate: {mib(possible):.1f} MiB of {mib(pages):.1f} MiB can be saved")
    return pages, possible, programs.anonymous()


def check_estimate(programs, estimated):
    pages, possible, before = estimated
    # Pages of zeroes in huge pages that are split are freed, which nobody counts.
    saved = count("pages_sharing") + before - programs.anonymous()
    points = 100 * (possible - saved) / pages
    check(
        abs(points) <= 5,
        f"rksmctl estimate was {points:+.1f} percent points from what merging has saved",
    )


def show_processes(programs):
    rksmctl("status", "--no-sample")
    rksmctl("top", "--once")
    rksmctl("why", str(programs.everyone()[-1].process.pid))
    for program in programs.everyone():
        with open(f"/proc/{program.process.pid}/ksm_stat") as file:
            stat = dict(line.replace(":", "").split() for line in file)
        merged = int(stat["ksm_merging_pages"])
        data = KEYS if program in programs.redis else store.COLUMNS * store.ROWS * 8 // PAGE
        if merged < data * 0.9 or stat["ksm_merge_any"] != "yes":
            check(False, f"{program.name} has {data} pages of data, not nearly all merged")


def show_memory(before, after):
    say("  MiB                before    after   change")
    for name in "MemFree", "per-CPU free", "MemAvailable", "AnonPages":
        change = after[name] - before[name]
        say(f"  {name:15} {before[name]:9.1f} {after[name]:8.1f} {change:+8.1f}")
    return sum(after[name] - before[name] for name in ("MemFree", "per-CPU free"))


def start_scanning():
    # About a second for each full scan of what runs here.
    set_knob("pages_to_scan", 2000)
    set_knob("sleep_millisecs", 20)
    if is_governed():
        set_knob("governor", governor, RKSM)
    set_knob("run", 1)


def merge(programs, scanner):
    goal = int(programs.possible() * 0.95)
    table = Table(scanner)
    table.watch(goal)
    sharing = count("pages_sharing")
    check(
        sharing >= goal,
        f"{mib(sharing):.1f} MiB saved; the data alone has {mib(programs.possible()):.1f} MiB of copies",
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--builtin", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--governor", choices=["knobs", "auto"], default="knobs")
    options = parser.parse_args()
    global governor
    governor = options.governor
    name = "ksmd" if options.builtin else "rksmd"
    log = Log()

    step(f"{REDIS_INSTANCES} redis-server with one data set (seed {options.seed}), mergeable by prctl")
    say(f"  Linux {os.uname().release}, {len(os.sched_getaffinity(0))} CPUs")
    programs = Programs(options.seed)
    programs.start_redis()
    say(f"  {KEYS} documents of {VALUE} bytes in each")

    before = memory()
    step(f"echo 1 > {KSM}/run: the built-in KSM merges" + (", for comparison" * options.builtin))
    estimated = estimate(programs)
    start_scanning()
    merge(programs, Scanner("ksmd"))
    check_estimate(programs, estimated)
    if not options.builtin:
        step("rksm takes over what the built-in has merged")
        in_place(programs, "insmod", MODULE)
        log.show()

    step(f"{PYTHON_INSTANCES} Python programs with one table, mergeable by prctl: {name} merges more")
    programs.start_python()
    say(f"  {store.COLUMNS} columns of {store.ROWS} numbers in each")
    estimated = estimate(programs)
    scanner = Scanner(name)
    merge(programs, scanner)
    check_estimate(programs, estimated)

    step("what that gave")
    show_memory(before, memory())
    show_processes(programs)
    say(
        f"  general_profit {count('general_profit') / MIB:.1f} MiB;"
        f" {name} took {scanner.seconds():.2f} s of CPU for {count('pages_scanned')} pages"
    )

    step("the data, read back through the programs")
    programs.prove("merged")

    step("half of it overwritten in place, while the scanner runs")
    programs.overwrite_half()
    programs.prove("overwritten")
    merge(programs, scanner)

    if not options.builtin:
        step("rksm goes, and the built-in goes on with what rksm has merged")
        in_place(programs, "rmmod", "rksm")
        log.show()
        check(not os.path.exists("/sys/module/rksm"), "the module is gone")
        merge(programs, Scanner("ksmd"))
        programs.prove("handed back")

        step("rksm comes again, as another build of it would")
        in_place(programs, "insmod", MODULE)
        scanner = Scanner(name)
        merge(programs, scanner)

    step(f"echo 2 > {KSM}/run")
    merged = memory()
    set_knob("run", 2)
    left = count("pages_shared"), count("pages_sharing")
    check(left == (0, 0), f"pages_shared {left[0]}, pages_sharing {left[1]}")
    lost = -show_memory(merged, memory())
    check(lost >= 0.9 * mib(programs.possible()), f"{lost:.1f} MiB fewer are free")
    say(f"  {name} took {scanner.seconds():.2f} s of CPU in all")
    programs.prove("unmerged")
    set_knob("run", 0)
    if not options.builtin:
        check(run_command("rmmod", "rksm") == 0, "rmmod")
        log.show()
    programs.stop()

    if failures:
        say(f"\n{len(failures)} of the above did not hold:")
        for text in failures:
            say(f"  {text}")
        sys.exit(1)


main()
