#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Usage (in a guest whose first process is systemd): on_systemd.py

rksmctl with real units: rules and drop-ins for them, rules that come back with the module, and
the live table in a terminal.
"""

import os
import subprocess

from ctl import (HOLDER, MIB, PAGE, check, ctl, ctl_json, finish, full_scans, rmmod, say, step,
                 table, until, write)

OWN_RULES = "/etc/rksm/rules.d/90-rksmctl.rules"


def systemctl(*args):
    done = subprocess.run(["systemctl", *args], capture_output=True, text=True, timeout=120)
    if done.returncode and args[0] not in ("is-active", "is-system-running"):
        say(f"systemctl {' '.join(args)}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def make_unit(name, equal, unique):
    with open(f"/etc/systemd/system/{name}.service", "w") as file:
        # Its input stays open, and it says nothing that anybody reads.
        file.write("[Service]\n"
                   "ExecStart=/bin/sh -c 'sleep infinity |"
                   f" exec python3 -I -S {HOLDER} {equal} {unique}'\n"
                   f"StandardOutput=file:/run/{name}.out\nKillSignal=SIGKILL\n")


def pid_of(name):
    """That of the process of a unit that holds memory, once it does."""
    def ready():
        try:
            with open(f"/run/{name}.out") as file:
                return "ready" in file.read()
        except OSError:
            return False

    if until(ready) is None:
        return 0
    with open(f"/sys/fs/cgroup/system.slice/{name}.service/cgroup.procs") as file:
        for pid in map(int, file.read().split()):
            with open(f"/proc/{pid}/comm") as comm:
                if comm.read().startswith("python3"):
                    return pid
    return 0


def start(name):
    if os.path.exists(f"/run/{name}.out"):
        os.unlink(f"/run/{name}.out")
    systemctl("restart", name)
    return pid_of(name)


def ksm_stat(pid, name):
    with open(f"/proc/{pid}/ksm_stat") as file:
        for line in file:
            key, value = line.split(maxsplit=1)
            if key.rstrip(":") == name:
                return value.strip()
    return ""


def merged(pid):
    return int(ksm_stat(pid, "ksm_merging_pages"))


def rules():
    return {r["cgroup"]: r for r in ctl_json("rules") if r["in_force"]}


def path(name):
    return f"/system.slice/{name}.service"


def units():
    step("enable --unit")
    for name in ("one", "two"):
        make_unit(name, 6, 2)
    systemctl("daemon-reload")
    one, two = start("one"), start("two")
    check(one and two, "two units hold memory", one, two)
    drop_in = "/etc/systemd/system/one.service.d/50-rksm.conf"
    run = ctl("enable", "--unit", "one")
    text = open(drop_in).read() if os.path.exists(drop_in) else ""
    check(run.status == 0 and path("one") in rules() and "MemoryKSM=yes" in text
          and "systemd has read it" in run.out,
          "enable --unit sets a rule and writes a drop-in", run)
    check(systemctl("show", "-p", "MemoryKSM", "one") == "MemoryKSM=yes",
          "systemd has read it", systemctl("show", "-p", "MemoryKSM,DropInPaths", "one"))
    run = ctl("enable", "--unit", "two.service")
    covered = until(lambda: ksm_stat(two, "ksm_merge_any") == "yes", 10)
    check(run.status == 0 and covered is not None, "what runs in it is covered", run)

    told = ctl_json("estimate", "--unit", "one", "--settle", "0")
    check(told["memory_bytes"] >= 8 * MIB, "estimate --unit looks at it", told)
    write("run", 1)
    check(until(lambda: min(merged(one), merged(two)) * PAGE >= 6 * MIB) is not None,
          "the two units are merged", merged(one), merged(two))
    run = ctl("why", "--unit", "one")
    check(run.status == 0 and "merged" in run.out and "file mappings" in run.out,
          "why --unit tells of it", run)

    step("restart")
    with open(f"/proc/{one}/cgroup") as file:
        before = file.read()
    inode = os.stat(f"/sys/fs/cgroup{path('one')}").st_ino
    systemctl("stop", "one")
    gone = not os.path.exists(f"/sys/fs/cgroup{path('one')}")
    # The rule alone is to cover it.
    os.unlink(drop_in)
    systemctl("daemon-reload")
    again = start("one")
    check(gone and again != one and os.stat(f"/sys/fs/cgroup{path('one')}").st_ino != inode,
          "a restarted unit has another cgroup", before, again)
    took = until(lambda: ksm_stat(again, "ksm_merge_any") == "yes", 10)
    check(took is not None and until(lambda: merged(again) * PAGE >= 6 * MIB) is not None,
          "and is covered again", took)
    with open(drop_in, "w") as file:
        file.write(text)
    systemctl("daemon-reload")

    step("never, disable")
    run = ctl("never", "--unit", "two")
    check(run.status == 0 and until(lambda: merged(two) == 0) is not None
          and rules()[path("two")]["action"] == "never", "never --unit unmerges it", run)
    check(not os.path.exists("/etc/systemd/system/two.service.d/50-rksm.conf"),
          "and takes the drop-in away")
    full_scans(3)
    check(merged(two) == 0, "and it is not merged again", merged(two))
    run = ctl("disable", "--unit", "one")
    check(run.status == 0 and path("one") not in rules() and not os.path.exists(drop_in)
          and merged(again) == 0 and ksm_stat(again, "ksm_merge_any") == "no",
          "disable --unit takes rule and drop-in away, and unmerges", run)
    check(systemctl("show", "-p", "MemoryKSM", "one") == "MemoryKSM=no",
          "systemd has read that, too")
    run = ctl("enable", "--unit", "nowhere")
    check(run.status == 1 and "knows no unit nowhere.service" in run.err,
          "a unit that is not there is an error", run)


def saved_rules():
    step("rules that come back with the module")
    ctl("enable", "--unit", "one")
    with open(OWN_RULES) as file:
        text = file.read()
    lines = [line.split() for line in text.splitlines()]
    check(["always", path("one")] in lines and ["never", path("two")] in lines,
          "rules are saved", text)
    check(rmmod(), "the module goes")
    until(lambda: systemctl("is-active", "rksm-rules") != "active", 20)
    insmod()
    took = until(lambda: len(rules()) == 2, 30)
    check(took is not None and rules()[path("two")]["action"] == "never"
          and systemctl("is-active", "rksm-rules") == "active",
          "udev has rksm-rules.service apply them when it comes again",
          systemctl("status", "rksm-rules", "dev-rksm.device"), rules())
    table(f"saved rules were in force {took or 99:.1f} s after insmod")


def insmod():
    subprocess.run(["insmod", "/rksm.ko"], check=True)


class Screen:
    """rksmctl in tmux."""

    def __init__(self, columns, rows, *words):
        self.tmux("-f", "/dev/null", "new-session", "-d", "-s", "t", "-x", str(columns), "-y",
                  str(rows), "rksmctl " + " ".join(words) + "; echo ended with $?; sleep 600")
        self.tmux("set", "-g", "status", "off")
        self.tmux("resize-window", "-t", "t", "-x", str(columns), "-y", str(rows))

    @staticmethod
    def tmux(*args):
        return subprocess.run(["tmux", *args], capture_output=True, text=True, timeout=60,
                              env={**os.environ, "LC_ALL": "C.UTF-8", "TERM": "screen-256color"})

    def lines(self):
        return self.tmux("capture-pane", "-p", "-t", "t").stdout.splitlines()

    def keys(self, *keys):
        self.tmux("send-keys", "-t", "t", *keys)

    def wait(self, right, text, seconds=30):
        """One result: that the screen becomes right."""
        held = until(lambda: right(self.lines()), seconds) is not None
        check(held, text, "\n".join(self.lines()))

    def end(self):
        self.tmux("kill-server")


def first_with(lines, word):
    return next((n for n, line in enumerate(lines) if word in line), 99)


def top():
    step("top")
    write("run", 1)
    # More is merged in the one, more is unique in the other.
    for name, equal, unique in (("many", 8, 0), ("few", 3, 20)):
        make_unit(name, equal, unique)
        systemctl("daemon-reload")
        start(name)
        ctl("enable", "--unit", name)
    many, few = pid_of("many"), pid_of("few")
    until(lambda: merged(many) * PAGE >= 8 * MIB and merged(few) * PAGE >= 3 * MIB)
    full_scans(3)
    screen = Screen(100, 24, "top", "--interval", "0.5")

    def before(first, second):
        return lambda lines: first_with(lines, first) < first_with(lines, second) < 99

    screen.wait(lambda lines: lines[0].startswith("rksm") and lines[1].startswith("UNIT / PID")
                and before("many.service", "few.service")(lines), "top sorts by what is saved")
    screen.keys("u")
    screen.wait(before("few.service", "many.service"), "u sorts by what is unique")
    screen.keys("s")
    screen.wait(before("many.service", "few.service"), "s sorts by what is saved")
    screen.keys("Home", "Space")

    def is_folded(lines):
        unit = lines[2].split()[1] if lines[2].startswith("+ ") else ""
        return unit and not lines[3].startswith("   ")

    screen.wait(is_folded, "space folds a unit")
    screen.keys("Space")
    screen.wait(lambda lines: lines[2].startswith("- ") and lines[3].startswith("   "),
                "and unfolds it")
    screen.keys("Down", "w")
    screen.wait(lambda lines: " resident: " in lines[1] and any("merged" in l for l in lines[2:])
                and any("file mappings" in l for l in lines), "w says why")
    screen.keys("w")
    screen.wait(lambda lines: lines[1].startswith("UNIT / PID"), "and goes back")
    screen.tmux("resize-window", "-t", "t", "-x", "20", "-y", "8")
    screen.wait(lambda lines: lines[1] == "UNIT / PID     SAVED" and lines[7] == "s c u b  w why  q"
                and max(map(len, lines)) <= 20, "20 columns have name and savings")
    screen.keys("w")
    screen.wait(lambda lines: "resident" in " ".join(lines) and max(map(len, lines)) <= 20,
                "and why")
    screen.keys("q")
    screen.wait(lambda lines: any("ended with 0" in line for line in lines), "q ends it")
    screen.end()


check(until(lambda: systemctl("is-system-running") in ("running", "degraded"), 120) is not None,
      "systemd is up", systemctl("list-jobs"), systemctl("--failed"))
say(systemctl("--version").splitlines()[0])
with open("/proc/1/comm") as comm:
    check(comm.read() == "systemd\n", "and the first process")
insmod()
check(until(lambda: os.path.exists("/dev/rksm"), 10) is not None, "rksm is loaded")
units()
saved_rules()
top()
finish()
