# SPDX-License-Identifier: GPL-2.0-only
"""What rksmctl does on the built-in KSM and on rksm alike."""

import json
import os
import re
import subprocess

from ctl import (MIB, PAGE, check, check_sum, ctl, ctl_json, end, hold, in_terminal,
                 no_huge_pages, read, saved_pages, say, settle, step, table, until, vmstat, write)
from ksmfs import KSM

CLONES = 20


def knobs(*names, directory=KSM):
    values = {}
    for name in names:
        with open(f"{directory}/{name}") as file:
            text = file.read().strip()
        values[name] = text.split("[")[1].split("]")[0] if "[" in text else text
    return values


def status(name):
    step("status, doctor")
    run = ctl("status", "--no-sample")
    check(run.status == 0 and run.out.startswith(name), "status names the KSM that works", run)
    told = ctl_json("status", "--no-sample")
    check(told["run"] == read("run") and told["saved_bytes"] == saved_pages() * PAGE,
          "status --json has what the files have", told)


def doctor():
    """While nothing is offered and nothing is scanned."""
    found = {f["check"]: f for f in ctl_json("doctor")["findings"]}
    say(found)
    offered, running = found.get("opted_in", {}), found.get("run", {})
    check(offered.get("level") == "problem" and "no process offers" in offered["text"]
          and offered["remedy"], "doctor finds that nobody offers memory", found)
    check(running.get("level") == "problem" and "run" in running["text"]
          and "echo 1" in running["remedy"], "doctor finds that nothing is scanned", found)


def unwritable(path, do):
    """What do() returns while nothing can be written to the file."""
    for command in (["mount", "--bind", path, path], ["mount", "-o", "remount,bind,ro", path]):
        subprocess.run(command, check=True)
    result = do()
    subprocess.run(["umount", path], check=True)
    return result


def tune():
    """Of the built-in: by the knobs."""
    step("tune")
    write("advisor_mode", "scan-time")
    run = ctl("tune", "quiet")
    names = ("advisor_mode", "smart_scan", "sleep_millisecs", "pages_to_scan")
    check(run.status == 0 and list(knobs(*names).values()) == ["none", "1", "200", "100"],
          "tune quiet sets the knobs", run, knobs(*names))
    # One that cannot be written, after some that can.
    before, run = knobs(*names), unwritable(f"{KSM}/pages_to_scan", lambda: ctl("tune", "fast"))
    check(run.status == 1 and "pages_to_scan" in run.err and knobs(*names) == before,
          "where one knob cannot be set, all stay as they were", run, before, knobs(*names))
    run = ctl("tune", "fast", "--json")
    check(run.status == 0 and list(knobs(*names).values()) == ["none", "1", "0", "4096"],
          "tune fast sets the knobs", run)
    run = ctl("tune", "knobs")
    check(run.status == 3 and "needs rksm" in run.err, "tune knobs needs rksm", run)


def tune_governor():
    """Of rksm; leaves the knobs in force, and fast."""
    step("tune")
    own = "/sys/kernel/mm/rksm"
    names = ("governor", "cpu_percent", "pressure_cpu_percent", "cpu_burst_millisecs")

    def values():
        return list(knobs(*names, directory=own).values())

    defaults = values()
    run = ctl("tune", "quiet")
    check(run.status == 0 and values() == ["auto", "1", "2", "500"],
          "tune quiet sets the governor", run, values())
    told = ctl_json("status", "--no-sample")
    check([str(told[name]) for name in names] == values() and told["budget_percent"] in (1, 2),
          "status has its budget", told)
    before, run = values(), unwritable(f"{own}/cpu_burst_millisecs", lambda: ctl("tune", "fast"))
    check(run.status == 1 and "cpu_burst_millisecs" in run.err and values() == before,
          "where one file cannot be set, all stay as they were", run, before, values())
    run = ctl("tune", "fast", "--json")
    check(run.status == 0 and values() == ["auto", "25", "50", "10000"]
          and run.json["governor"] == "auto", "tune fast sets a larger budget", run, values())
    run = ctl("tune", "balanced")
    check(run.status == 0 and values() == ["auto", *defaults[1:]],
          "tune balanced sets the defaults", run, defaults, values())
    write("pages_to_scan", 4096)
    write("sleep_millisecs", 0)
    run = ctl("tune", "knobs")
    names_of_knobs = ("pages_to_scan", "sleep_millisecs")
    check(run.status == 0 and values() == ["knobs", *defaults[1:]]
          and list(knobs(*names_of_knobs).values()) == ["4096", "0"],
          "tune knobs goes back to the knobs, as they are", run, values())


def run_command():
    step("run")
    run = ctl("run", "--", "python3", "-c",
              "import ctypes; print(ctypes.CDLL(None).prctl(68, 0, 0, 0, 0))")
    check(run.status == 0 and run.out == "1\n", "run: PR_GET_MEMORY_MERGE is 1 in the command", run)
    check(ctl("run", "--", "sh", "-c", "exit 7").status == 7, "run ends as the command")


def estimate(clones):
    """What is estimated, and what merging them saves then."""
    pids = [clone.pid for clone in clones]
    cow = vmstat("cow_ksm")
    told = ctl_json("estimate", *pids, "--settle", "1")
    say(told)
    check(vmstat("cow_ksm") == cow, "an estimate breaks nothing")
    saving, memory = told["saving"]["none"], told["memory_bytes"]
    base = saved_pages()
    check(saving["already_bytes"] < memory / 50, "nothing is said to be merged before", saving)

    step("record, while they are merged")
    file = "/tmp/recording.ndjson"
    if os.path.exists(file):
        os.unlink(file)
    merging = f"echo 1 >{KSM}/run; sleep 4"
    run = ctl("record", "-o", file, "--interval", "0.25", "--", "sh", "-c", merging)
    check(run.status == 0, "record ends as its command", run)
    settle()
    saved = (saved_pages() - base) * PAGE
    apart = 100 * (saving["possible_bytes"] - saved) / memory
    table(f"estimate of {len(clones)} processes, {memory / MIB:.0f} MiB:"
          f" {saving['possible_bytes'] / MIB:.1f} MiB, merged then {saved / MIB:.1f} MiB,"
          f" {apart:+.2f} points of their memory, one content of {told['one_of_contents']}")
    check(saved > memory / 4 and abs(apart) <= 5,
          "what merging saves is within 5 points of the estimate", saving, saved)

    cow, sharing = vmstat("cow_ksm"), read("pages_sharing")
    again = ctl_json("estimate", *pids, "--settle", "1")
    already = 100 * (again["saving"]["none"]["already_bytes"] - saved) / memory
    check(vmstat("cow_ksm") == cow and read("pages_sharing") == sharing,
          "an estimate of what is merged unmerges nothing",
          cow, vmstat("cow_ksm"), sharing, read("pages_sharing"))
    check(abs(already) <= 5, "and sees what is saved already", again, saved)
    return file


def report(file):
    step("report")
    with open(file) as lines:
        records = [json.loads(line) for line in lines]
    check(len(records) > 5 and records[0].get("format") and
          records[-1]["counters"]["pages_sharing"] > records[1]["counters"]["pages_sharing"],
          "a recording has a header and counters that grow", records[:2])
    page = "/tmp/report.html"
    run = ctl("report", file, "-o", page)
    text = open(page).read() if os.path.exists(page) else ""
    check(run.status == 0 and text.count("<svg") >= 2 and "http://" not in
          re.sub(r'"http://www\.w3\.org/[^"]*"', "", text), "report makes one page with plots", run)
    with open(file, "rb") as whole, open("/tmp/cut.ndjson", "wb") as cut:
        data = whole.read()
        cut.write(data[:len(data) * 2 // 3])
    run = ctl("report", "/tmp/cut.ndjson", "-o", "/tmp/cut.html")
    check(run.status in (0, 4) and "<svg" in open("/tmp/cut.html").read(),
          "a recording that was cut off has a report, too", run)
    run = ctl("report", "/etc/passwd", "-o", "/tmp/no.html")
    check(run.status == 1 and run.err.startswith("rksmctl: ")
          and not os.path.exists("/tmp/no.html"), "what is no recording is an error", run)


SAMPLE = re.compile(r'[a-z_]+(\{([a-z_]+="(\\.|[^"\\\n])*",?)+\})? -?[0-9.e+-]+')


def export(implementation):
    step("export")
    run = ctl("export")
    lines = run.out.splitlines()
    bad = [line for line in lines if not line.startswith("# ") and not SAMPLE.fullmatch(line)]
    check(run.status == 0 and lines[-1:] == ["# EOF"] and not bad,
          "export prints OpenMetrics that can be parsed", run, bad)
    value = [line.split()[1] for line in lines if line.startswith("ksm_saved_bytes ")]
    check(value and float(value[0]) == saved_pages() * PAGE,
          "and they are what the files have", value, saved_pages() * PAGE)
    info = [line for line in lines if line.startswith("ksm_build_info")]
    check(info and f'implementation="{implementation}"' in info[0], "and name the KSM", info)


def narrow(pid):
    """All that is printed in a terminal of 20 columns."""
    step("20 columns")
    for words in (["status", "--no-sample"], ["why", pid], ["doctor"], ["top", "--once"],
                  ["estimate", pid, "--settle", "0"], ["tune", "fast"]):
        code, lines = in_terminal(20, *words)
        # A single word may be longer, as a path is: it can be copied still.
        wide = [line for line in lines if len(line) > 20 and " " in line.strip()]
        check(code == 0 and lines and not wide and "panicked" not in "".join(lines),
              f"{words[0]} in 20 columns", code, "\n".join(lines), wide)


def errors():
    run = ctl("why", 4194303)
    check(run.status == 1 and "no process 4194303" in run.err,
          "a process that is not there is an error", run)
    run = ctl("estimate", "--cgroup", "/none")
    check(run.status == 1 and "no cgroup /none" in run.err, "so is a cgroup that is not there", run)
    run = ctl("frobnicate")
    check(run.status == 2, "what is no verb is a usage error", run)


def all_of_it(name, implementation, rksm, equal, unique):
    """The part that both have in common; leaves run = 0 and nothing merged. Clones have so many MiB
    that are equal, and so many that are not."""
    write("run", 0)
    no_huge_pages()
    status(name)
    doctor()
    if rksm:
        tune_governor()
    else:
        tune()
    run_command()
    errors()
    step(f"{CLONES} processes")
    clones = hold(CLONES, equal, unique, before=["rksmctl", "run", "--"])
    check(clones[0].stat("ksm_merge_any") == "yes", "what run starts is mergeable", clones[0].pid)
    file = estimate(clones)
    rows = check_sum(clones[0].pid, "merged")
    check(abs(rows.get("merged", 0) - clones[0].merged() * PAGE) <= 1 * MIB and rows["merged"],
          "why has as much merged as ksm_stat", rows, clones[0].merged())
    told = ctl_json("top", "--once")
    saved = {p["pid"]: p["saved_bytes"] for unit in told for p in unit["processes"]}
    check(all(saved.get(clone.pid, 0) >= equal * MIB * 0.95 for clone in clones),
          "top has what is merged in each", told)
    export(implementation)
    report(file)
    narrow(clones[0].pid)
    if rksm:
        ctl("tune", "knobs")
    end(clones)
    write("run", 2)
    check(until(lambda: read("pages_sharing") == 0) is not None, "nothing is left of it")
    write("run", 0)
