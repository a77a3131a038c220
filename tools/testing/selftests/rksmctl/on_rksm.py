#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Usage (in a guest without rksm): on_rksm.py

rksmctl on rksm: rules, merging on request, and why, which only this has.
"""

import json
import os
import signal
import subprocess

import shared
from ctl import (MIB, PAGE, Holder, check, check_sum, ctl, ctl_json, end, finish, full_scans, hold,
                 in_terminal, reasons, rmmod, saved_pages, says, settle, step, table, until, write)

RULES = "/etc/rksm/rules.d"


def cgroup(path):
    os.makedirs(f"/sys/fs/cgroup{path}", exist_ok=True)


def rules():
    """Those that hold, by what they are for."""
    return {r["cgroup"] or r["pid"]: r for r in ctl_json("rules") if r["in_force"]}


def clean():
    for rule in ctl_json("rules"):
        ctl("rules", "remove", *(["--cgroup", rule["cgroup"]] if rule["cgroup"] else [rule["pid"]]))
    check(ctl("rules").out == "no rules\n", "all rules are removed", ctl("rules"))


def enabling():
    step("enable, merge, unmerge, disable")
    write("run", 0)
    a, b = holders = hold(2, 8, 2)
    run = ctl("merge", a.pid)
    check(run.status == 1 and run.err.startswith("rksmctl: "),
          "what offers nothing is not merged without --enable", run)
    run = ctl("enable", a.pid)
    check(run.status == 0 and a.stat("ksm_merge_any") == "yes"
          and rules()[a.pid]["action"] == "always", "enable PID opens all its memory", run)
    first = ctl_json("merge", a.pid)
    before = saved_pages()
    second = ctl_json("merge", b.pid, "--enable")
    merged = (saved_pages() - before) * PAGE
    check(second["saved_bytes"] == merged and merged >= 8 * MIB,
          "merge --enable with run = 0 saves what it says", first, second, merged)
    check(b.stat("ksm_merge_any") == "yes", "and opens all its memory")
    for holder in holders:
        rows = check_sum(holder.pid, "merged on request")
        check(rows["merged"] >= 8 * MIB and rows.get("unique", 0) + rows.get("fresh", 0) >= 2 * MIB,
              "why has the module's reasons", rows)
    before = b.merged()
    run = ctl("unmerge", b.pid, b.range(), "--json")
    left = b.merged()
    check(run.status == 0 and run.json["unmerged_pages"] == before - left
          and run.json["unmerged_pages"] * PAGE >= 7 * MIB,
          "unmerge a range gives pages of its own", run, before, left)
    run = ctl("unmerge", b.pid, "--json")
    check(run.json["unmerged_pages"] == left and b.merged() == 0,
          "unmerge gives all", run, left, b.merged(), first, second, reasons(b.pid)[1])
    ctl("merge", b.pid)
    run = ctl("disable", b.pid, "--json")
    check(run.status == 0 and b.merged() == 0 and b.stat("ksm_merge_any") == "no"
          and run.json["unmerged_bytes"] >= 7 * MIB, "disable unmerges, and takes all back", run)
    end(holders)
    check(until(lambda: a.pid not in rules()) is not None, "a rule ends with its process", rules())


def never():
    step("never")
    a, b = holders = hold(2, 4, 1, "offer")
    settle()
    check(a.merged() * PAGE >= 4 * MIB, "two that offer their memory are merged", a.merged())
    run = ctl("never", a.pid)
    check(run.status == 0 and until(lambda: a.merged() == 0) is not None,
          "never unmerges it, with run = 0", run, a.merged())
    write("run", 1)
    check(full_scans(4) and a.merged() == 0 and a.stat("ksm_mergeable") == "yes",
          "and it is not merged again, though it offers its memory", a.merged())
    write("run", 0)
    rows = check_sum(a.pid, "excluded")
    check(rows.get("excluded", 0) >= 5 * MIB, "why says that it is excluded", rows)
    run = ctl("merge", a.pid)
    check(run.status == 1 and run.err.count("\n") == 1, "merging it on request is an error", run)
    run = ctl("rules", "remove", a.pid)
    write("run", 1)
    check(run.status == 0 and until(lambda: a.merged() * PAGE >= 4 * MIB) is not None,
          "without the rule it is merged again", run, a.merged())
    write("run", 0)
    end(holders)


def top():
    step("top")
    busy, tick = Holder(0, 4, "offer", "busy").ready(), Holder(2, 0, "offer", "tick").ready()
    still = Holder(2, 3, "offer").ready()
    write("sleep_millisecs", 100)
    write("run", 1)
    full_scans(4)

    def lines():
        told = ctl("top", "--batch", "2", "--interval", "1", "--json").out
        # Two documents, one behind the other.
        last = told[told.index("\n]\n") + 3:]
        return {p["pid"]: p for unit in json.loads(last) for p in unit["processes"]}

    seen = {}

    def right():
        nonlocal seen
        seen = lines()
        return (seen[still.pid]["unique_bytes"] >= 3 * MIB
                and seen[still.pid]["saved_bytes"] >= 1 * MIB
                and seen[busy.pid]["changing_bytes"] >= 3 * MIB
                and seen[tick.pid]["broken_per_second"] > 0)

    check(until(right) is not None, "top has what is unique, changing and broken", seen)
    # Two looks may be nearer to each other than two changes.
    changes = until(lambda: reasons(busy.pid)[1].get("changing", 0) >= 2 * MIB)
    check(changes is not None, "why says that it changes", reasons(busy.pid))
    check_sum(busy.pid, "changing")
    write("run", 0)
    end([busy, tick, still])


def cgroups():
    step("rules of cgroups")
    cgroup("/t/inner")
    run = ctl("enable", "--cgroup", "/t")
    check(run.status == 0 and "/t" in rules() and os.path.exists(f"{RULES}/90-rksmctl.rules"),
          "enable --cgroup sets a rule and saves it", run)
    late = Holder(2, 0, cgroup="/t/inner")
    took = until(lambda: late.stat("ksm_merge_any") == "yes", 10)
    check(took is not None, "a process that joins later is covered")
    table(f"a process that joined a cgroup was covered after {took or 99:.1f} s")
    late.ready()
    run = ctl("never", "--cgroup", "/t/inner")
    write("run", 1)
    other = Holder(2, 0, "offer").ready()
    full_scans(4)
    check(run.status == 0 and late.merged() == 0 and rules()["/t/inner"]["processes"] == 1,
          "the innermost rule holds", run, late.merged(), rules())
    write("run", 0)
    end([late, other])
    with open(f"{RULES}/10-test.rules", "w") as file:
        file.write("# a test's\nalways /later.slice\nsometimes /t\n")
    run = ctl("rules", "apply")
    check(run.status == 4 and "10-test.rules:3" in run.err
          and rules()["/later.slice"]["action"] == "always",
          "rules apply sets what is saved, and says what is wrong", run)
    os.unlink(f"{RULES}/10-test.rules")
    run = ctl("rules", "list")
    check(run.status == 0 and all(p in run.out for p in ("/t", "/t/inner", "/later.slice")),
          "rules list has them all", run)
    clean()


def interrupted():
    step("a long merge")
    big, twin = hold(2, 64, 0)
    ctl("merge", twin.pid, "--enable")
    before = saved_pages()
    merge = subprocess.Popen(["rksmctl", "merge", str(big.pid), "--enable", "--json"],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: saved_pages() > before + 500)
    merge.send_signal(signal.SIGINT)
    out, err = merge.communicate(timeout=60)
    saved = (saved_pages() - before) * PAGE
    told = json.loads(out)
    table(f"interrupted after {told['seconds']} s and {told['scanned_pages']} pages")
    check(merge.returncode == 4 and "ended early" in err and 0 < saved < 60 * MIB
          and told["saved_bytes"] == saved, "Ctrl-C ends it, and what it says is right",
          merge.returncode, out, err, saved)
    ctl("unmerge", big.pid)
    before = saved_pages()
    merge = subprocess.Popen(["rksmctl", "merge", str(big.pid)],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: saved_pages() > before + 500)
    big.end()
    out, err = merge.communicate(timeout=60)
    check(merge.returncode in (1, 4) and err.startswith("rksmctl: ") and "panicked" not in err,
          "a process that ends meanwhile ends it", merge.returncode, out, err)
    twin.end()


def refused():
    step("without permission, and without the device")
    holder = hold(1, 1, 0)[0]
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    for words in (["merge", holder.pid], ["enable", holder.pid], ["rules"]):
        run = ctl(*words, before=nobody)
        check(run.status == 1 and run.err.count("\n") == 1 and "root" in run.err,
              f"{words[0]} as nobody is refused, and says why", run)
    for words in (["why", holder.pid], ["estimate", holder.pid, "--settle", "0"]):
        run = ctl(*words, before=nobody)
        check(run.status in (1, 4) and run.err.startswith("rksmctl: "),
              f"{words[0]} as nobody says what it may not look at", run)
    run = ctl("status", "--no-sample", before=nobody)
    check(run.status == 0, "status as nobody works", run)
    os.rename("/dev/rksm", "/dev/elsewhere")
    run, why = ctl("enable", holder.pid), ctl("why", holder.pid)
    os.rename("/dev/elsewhere", "/dev/rksm")
    check(run.status == 1 and "no /dev/rksm" in run.err, "without the device that is said", run)
    check(why.status == 4 and "resident" in why.out, "and why tells what can be told", why)
    code, lines = in_terminal(20, "merge", holder.pid, "--enable")
    check(code == 0 and "panicked" not in "".join(lines), "merge in 20 columns", code, lines)
    holder.end()


check(says(ctl("rules"), 3, "needs rksm"), "before insmod it needs rksm")
subprocess.run(["insmod", "/rksm.ko"], check=True)
check(until(lambda: os.path.exists("/dev/rksm"), 5) is not None
      and os.stat("/dev/rksm").st_mode & 0o777 == 0o600, "/dev/rksm is root's")
# So much that a part is sampled only.
shared.all_of_it("rksm ", "rksm", True, 20, 8)
enabling()
never()
top()
cgroups()
interrupted()
refused()
step("rmmod")
check(rmmod(), "the module goes")
run = ctl("rules")
check(says(run, 3, "needs rksm, which is not loaded"), "and rksmctl needs it", run)
finish()
