#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Usage: report.py RAW.JSONL OUTDIR LIST

Tables (report.md, also printed), figures (results.json), plots (*.png) and what was saved over time
(equal-cpu.csv, clones.csv) of what rksm-bench printed. LIST is what rksm-bench --list prints. Works with one side missing and with a run that broke off. Exit
status 1 if a workload failed.
"""

import csv
import json
import os
import statistics
import sys
import textwrap

SIDES = ("builtin", "rksm")
# rksm with governor=auto is a third one for the workloads that are about time.
AUTO = "auto"
NAMES = {"builtin": "built-in", "rksm": "rksm", "auto": "auto", "none": "no KSM", "floor": "floor"}
COLOURS = {"builtin": "tab:red", "rksm": "tab:blue", "auto": "tab:green", "floor": "tab:gray"}
GOVERNOR = ("clones", "quiet", "equal-cpu", "neighbour", "futile", "budget")
WITHOUT_KSM = ("latency", "victim", "neighbour")
# Memory saved against what KSM saves in the same time with the same CPU, as its authors say of UKSM
# (FAST '18).
UKSM = {"static": ("static", 12.6), "clones": ("dynamic", 5), "apps": ("static", 12.6)}
MIB = 256  # pages

class Metric:
    def __init__(self, key, unit, of, more=False, digits=2, ratio=True):
        self.key, self.unit, self.of, self.more, self.digits, self.ratio = key, unit, of, more, digits, ratio


def visits(r):
    """Pages that the scans went over, whether looked at or skipped."""
    if r["workload"] in ("churn", "latency"):
        return r["scanned"] + r["skipped"]
    return r["pages"] * max(r["full_scans"], 1)


def us_per_page(r):
    return r["cpu_ns"] / visits(r) / 1e3


def scan_us(part):
    """CPU per page of some of the full scans."""

    def of(r):
        some = r["scan_cpu_ns"][part]
        return sum(some) / len(some) / r["pages"] / 1e3

    return of


def mib_per_cpu_s(r):
    return r["saved"] / MIB / (r["cpu_at_goal_ns"] / 1e9)


def freed_per_cpu_s(r):
    # Unique pages have nothing to free.
    if not r["possible"]:
        raise KeyError("possible")
    return r["freed"] / MIB / (r["cpu_ns"] / 1e9)


def per_page(key):
    return lambda r: r[key] / r["pages"]


def per_1000(key):
    """For each thousand pages that the scanner went over."""
    return lambda r: r[key] * 1000 / (r["scanned"] + r["skipped"])


def time_to_saving(index):
    """When 90 % of what is saved in the end was saved."""

    def of(r):
        goal = 0.9 * r["saved"]
        return next(row[index] for row in r["series"] if row[2] >= goal) / 1e3

    return of


def latency(op, point):
    key = f"{op}_{point}_ns"
    return Metric(f"{op} {point}", "µs", lambda r: r[key] / 1e3)


def cpu_percent(r):
    return 100 * r["cpu_ns"] / r["wall_ns"]


def per_second(key):
    return lambda r: r[key] / (r["wall_ns"] / 1e9)


def time_to_95(r):
    if not r["reached"]:
        raise KeyError("reached")
    return r["to_goal_ns"] / 1e9


def excess(window):
    key = f"{window}_excess_ms"
    return Metric(f"over the budget, {window}", "ms", lambda r: r[key], digits=1, ratio=False)


def used(window):
    key = f"{window}_cpu_ms"
    return Metric(f"most CPU, {window}", "ms", lambda r: r[key], digits=1)


CPU_PER_PAGE = Metric("CPU per page", "µs", us_per_page, digits=3)
RATE = Metric("pages per second", "1/s", lambda r: r["rate"], digits=0)

METRICS = {
    "unique": [
        CPU_PER_PAGE,
        Metric("of the first scan", "µs", scan_us(slice(0, 1)), digits=3),
        Metric("of later scans", "µs", scan_us(slice(1, None)), digits=3),
    ],
    "tail": [
        CPU_PER_PAGE,
        Metric("of the first scan", "µs", scan_us(slice(0, 1)), digits=3),
        Metric("of later scans", "µs", scan_us(slice(1, None)), digits=3),
    ],
    "copies": [
        Metric("merged per CPU second", "MiB/s", mib_per_cpu_s, more=True, digits=1),
        Metric("CPU to 99 %", "s", lambda r: r["cpu_at_goal_ns"] / 1e9, digits=3),
        Metric("full scans to 99 %", "", lambda r: r["full_scans"], digits=0),
        CPU_PER_PAGE,
    ],
    "steady": [
        CPU_PER_PAGE,
        Metric("CPU per full scan", "ms", lambda r: r["cpu_ns"] / r["full_scans"] / 1e6),
        Metric("saved, of what is possible", "%", lambda r: 100 * r["saved"] / r["goal"], more=True, digits=1),
    ],
    "rewrite": [
        CPU_PER_PAGE,
        Metric("pages merged", "", lambda r: r["merged"], digits=0),
        Metric("merged pages broken", "", lambda r: r["broken"], digits=0),
        Metric("saved at the end", "MiB", lambda r: r["saved"] / MIB, more=True, digits=1),
    ],
    "churn": [
        CPU_PER_PAGE,
        Metric("register, p50", "µs", lambda r: r["register_p50_ns"] / 1e3),
        Metric("leave, p50", "µs", lambda r: r["leave_p50_ns"] / 1e3),
        Metric("fork to exit, p50", "µs", lambda r: r["fork_exit_p50_ns"] / 1e3),
        RATE,
    ],
    "thp": [
        CPU_PER_PAGE,
        Metric("freed per CPU second", "MiB/s", freed_per_cpu_s, more=True, digits=1),
        Metric("freed, of what is possible", "%", lambda r: 100 * r["freed"] / r["possible"], more=True, digits=1),
        Metric("full scans", "", lambda r: r["full_scans"], digits=0),
        Metric("huge pages kept", "%", lambda r: 100 * r["huge_kept"] / r["huge_before"], more=True, digits=1),
    ],
    "apps": [
        Metric("saved at the end", "MiB", lambda r: r["saved"] / MIB, more=True, digits=1),
        Metric("CPU to 90 % of it", "s", time_to_saving(1), digits=3),
        Metric("time to 90 % of it", "s", time_to_saving(0)),
        Metric("CPU in all", "s", lambda r: r["cpu_ns"] / 1e9, digits=3),
        Metric("pages visited", "", lambda r: r["scanned"] + r["skipped"], more=True, digits=0),
    ],
    "latency": [latency(op, p) for op in ("fault", "mmap", "fork") for p in ("p50", "p99", "p999")] + [RATE],
    "victim": [
        Metric("accesses per second", "10^6/s", lambda r: r["accesses"] / r["victim_ns"] * 1e3, more=True, digits=3),
        Metric("its CPU per access", "ns", lambda r: r["victim_cpu_ns"] / r["accesses"], digits=1),
        Metric("TLB shoot-downs", "per 1000 pages", per_1000("shootdowns"), digits=2),
        Metric("its page faults", "per 1000 pages", per_1000("faults"), digits=2),
        RATE,
    ],
    "unmerge": [
        Metric("write to a merged page", "µs/page", lambda r: r["cow_ns"] / r["pages"] / 1e3, digits=3),
        Metric("run=2", "µs/page", lambda r: r["run2_ns"] / r["pages"] / 1e3, digits=3),
        Metric("MADV_UNMERGEABLE", "µs/page", lambda r: r["madvise_ns"] / r["pages"] / 1e3, digits=3),
    ],
    "metadata": [
        Metric("all memory", "B/page", per_page("total_bytes"), digits=1),
        Metric("of it in slabs", "B/page", per_page("slab_bytes"), digits=1),
        Metric("of it in vmalloc", "B/page", per_page("vmalloc_bytes"), digits=1),
    ],
    "in-place": [
        Metric("time", "s", lambda r: r["ns"] / 1e9, digits=3),
        Metric("time per merged page", "µs", lambda r: (r["ns"] - r["empty_ns"]) / r["pages"] / 1e3, digits=3),
        Metric("memory saved", "MiB", lambda r: r["saved"] / MIB, digits=0),
        Metric("time while others run", "s", lambda r: r["watched_ns"] / 1e9, digits=3),
        Metric("extra memory at most", "MiB", lambda r: r["peak_bytes"] / 2**20),
        Metric("extra memory afterwards", "MiB", lambda r: r["kept_bytes"] / 2**20),
        Metric("longest read of pages_shared", "ms", lambda r: r["read_ns"] / 1e6),
        Metric("longest fault", "ms", lambda r: r["fault_ns"] / 1e6),
        Metric("longest fork to exit", "ms", lambda r: r["fork_ns"] / 1e6),
    ],
    "clones": [
        Metric("time to 95 %", "s", time_to_95),
        Metric("merged, of 95 % of what can be", "%", lambda r: min(100, 100 * r["saved"] / r["goal"]), more=True, digits=1),
        Metric("CPU till then", "s", lambda r: r["cpu_ns"] / 1e9),
    ],
    "quiet": [
        Metric("wake-ups per second", "1/s", per_second("sleeps"), digits=2),
        Metric("the same by its own count", "1/s", per_second("own_wakeups"), digits=2),
        Metric("CPU", "% of a CPU", cpu_percent, digits=3),
        Metric("settled for", "s", lambda r: r["settle_s"], digits=0),
    ],
    "equal-cpu": [
        Metric("saved on average", "MiB", lambda r: r["saved_mean"] / MIB, more=True),
        Metric("the same, of what is possible", "%", lambda r: 100 * r["saved_mean"] / r["possible_mean"], more=True, digits=1),
        Metric("saved at the end", "MiB", lambda r: r["saved"] / MIB, more=True),
        Metric("time to 90 % of the possible", "s", lambda r: time_to_90(r), digits=1),
        Metric("CPU used", "% of a CPU", cpu_percent),
    ],
    "neighbour": [Metric(f"request {p}", "ms", (lambda k: lambda r: r[k] / 1e6)(f"request_{p}_ns"), digits=3)
                  for p in ("p50", "p99", "p999")] + [
        Metric("merged, of what is possible", "%", lambda r: 100 * r["merged_share"], more=True, digits=1),
        Metric("scanner's CPU", "% of a CPU", cpu_percent, digits=1),
        Metric("redis's CPU", "µs per request", lambda r: r["redis_cpu_ns"] / r["request_count"] / 1e3, digits=1),
        Metric("its page faults", "per 1000 requests", lambda r: 1000 * r["faults"] / r["request_count"]),
        Metric("its CPU's TLB shoot-downs", "per 1000 requests", lambda r: 1000 * r["shootdowns"] / r["request_count"]),
        Metric("given up", "% of the requests", lambda r: 100 * r["given_up"] / (r["given_up"] + r["request_count"]), digits=1),
    ],
    "futile": [
        Metric("merges", "", lambda r: r["merges"], digits=0),
        Metric("broken again", "", lambda r: r["broken"], digits=0),
        Metric("of these within 10 s", "", lambda r: r["futile"], digits=0),
        Metric("merged on average", "MiB", lambda r: r["merged_mean"] / MIB, more=True),
        Metric("broken, by the kernel's count", "", lambda r: r["cow_ksm"], digits=0),
        Metric("CPU", "% of a CPU", cpu_percent, digits=1),
    ],
    "budget": [used(w) for w in ("500ms", "1000ms", "5000ms", "30000ms")] + [
        excess(w) for w in ("500ms", "1000ms", "5000ms", "30000ms", "any")] + [
        Metric("CPU", "% of a CPU", cpu_percent),
        Metric("CPU by its own count, of what is seen", "%", lambda r: 100 * r["own_cpu_us"] * 1e3 / r["cpu_ns"], digits=1),
    ],
    "threads": [
        Metric("pages per second", "1/s", lambda r: r["pages"] * r["full_scans"] / (r["wall_ns"] / 1e9), more=True, digits=0),
    ],
}


class Figure:
    """Median, minimum and maximum over the rounds."""

    def __init__(self, values):
        self.values = values
        self.median = statistics.median(values)
        self.low, self.high = min(values), max(values)

    def text(self, digits):
        spread = f" [{self.low:.{digits}f} … {self.high:.{digits}f}]" if len(self.values) > 1 else ""
        return f"{self.median:.{digits}f}{spread}"


def load_list(path):
    """What each workload is, by its name, and the names by their aliases."""
    what, names = {}, {}
    with open(path, encoding="utf-8") as f:
        for line in f:
            name, alias, _, _, _, _, _, text = line.rstrip("\n").split(" ", 7)
            what[name] = text
            names[alias] = name
    return what, names


def load(path):
    meta, host, records, failed, not_run = {}, {}, [], [], []
    with open(path, encoding="utf-8") as f:
        for line in f:
            try:
                r = json.loads(line)
            except json.JSONDecodeError:
                # A workload that died in the middle of a line says so in the next.
                continue
            if "meta" in r:
                meta = r["meta"]
            elif "host" in r:
                host = r["host"]
            elif "failed" in r:
                failed.append(r)
            elif "not_run" in r:
                not_run.append(r["not_run"])
            else:
                records.append(r)
    return meta, host, records, failed, sorted(set(not_run))


def same_possible(records):
    """
    What is possible in a scene of equal-cpu is the most that anybody could save in the end, of what
    one process has more of than the next time, too; and when 90 % of it was reached.
    """
    runs = [r for r in records if r["workload"] == "equal-cpu"]
    for r in runs:
        if not r["case"].startswith("clones"):
            r["possible"] = r["possible_mean"] = max(x["possible"] for x in runs if x["case"] == r["case"])
        r["to_90_ms"] = next((row[0] for row in r["series"] if row[2] >= 0.9 * r["possible"]), None)


def lacking(records):
    """Cases that one contender has and another one has not, as where a line was lost on its way."""
    for w in GOVERNOR:
        runs = {(r["case"], r["impl"], r["round"]) for r in records if r["workload"] == w}
        starts = {(impl, number) for _, impl, number in runs}
        for case in sorted({case for case, _, _ in runs}):
            for impl, number in sorted(starts):
                if (case, impl, number) not in runs:
                    yield {"workload": w, "case": case, "impl": impl, "round": number, "failed": "no result"}


def time_to_90(r):
    if r["to_90_ms"] is None:
        raise KeyError("to_90_ms")
    return r["to_90_ms"] / 1e3


class Results:
    def __init__(self, records):
        self.figures = {}
        self.records = records
        self.cases = []
        values = {}
        for r in records:
            case = (r["workload"], r["case"], r["smart_scan"])
            for m in METRICS[r["workload"]]:
                try:
                    value = m.of(r)
                except (KeyError, ZeroDivisionError):
                    continue
                values.setdefault((*case, r["impl"], m.key), []).append(value)
            if "floor_ns" in r:
                values.setdefault((*case, "floor", "CPU per page"), []).append(r["floor_ns"] / r["pages"] / 1e3)
            if case not in self.cases:
                self.cases.append(case)
        self.figures = {k: Figure(v) for k, v in values.items()}
        order = list(METRICS)
        seen = {c: i for i, c in enumerate(self.cases)}
        self.cases.sort(key=lambda c: (order.index(c[0]), c[2], seen[c]))

    def get(self, workload, case, smart, side, key):
        return self.figures.get((workload, case, smart, side, key))

    def ratio(self, workload, case, smart, key, side="rksm", to="builtin"):
        """rksm over built-in."""
        a, b = (self.get(workload, case, smart, s, key) for s in (side, to))
        return a.median / b.median if a and b and b.median else None

    def of_workload(self, workload, smart=None):
        return [c for c in self.cases if c[0] == workload and smart in (None, c[2])]


def times(ratio):
    """A ratio to the built-in as one reads it."""
    if ratio is None:
        return ""
    if 0 < ratio < 0.995:
        return f"1/{1 / ratio:.2f}"
    return f"{ratio:.2f}"


def table(head, rows):
    widths = [max(len(str(r[i])) for r in [head, *rows]) for i in range(len(head))]
    lines = ["| " + " | ".join(str(c).ljust(w) for c, w in zip(r, widths)) + " |" for r in [head, *rows]]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def tables(res, what):
    parts = []
    for w in METRICS:
        cases = res.of_workload(w)
        if not cases:
            continue
        extra = "none" if w in WITHOUT_KSM else "floor"
        sides = (*SIDES, AUTO) if any(res.get(*c, AUTO, m.key) for c in cases for m in METRICS[w]) else SIDES
        with_extra = any(res.get(*c, extra, m.key) for c in cases for m in METRICS[w])
        head = ["case", "smart_scan", "figure", "unit", *(NAMES[s] for s in sides),
                *(f"{NAMES[s]} : built-in" for s in sides[1:])]
        if with_extra:
            head.insert(4, NAMES[extra])
        rows = []
        for c in cases:
            for m in METRICS[w]:
                side = {s: res.get(*c, s, m.key) for s in (*sides, extra)}
                if not any(side.values()):
                    continue
                row = [c[1], c[2], m.key, m.unit]
                if with_extra:
                    row.append(side[extra].text(m.digits) if side[extra] else "")
                row += [side[s].text(m.digits) if side[s] else "" for s in sides]
                row += [times(res.ratio(*c, m.key, side=s)) if m.ratio else "" for s in sides[1:]]
                rows.append(row)
        # The row without any KSM has a smart_scan of its own.
        parts.append(f"## {w}: {what[w]}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


class Targets:
    def __init__(self, res):
        self.res = res
        self.rows = []

    def add(self, what, target, measured, met):
        self.rows.append({"what": what, "target": target, "measured": measured, "met": met})

    def at_most(self, what, case, key, limit, text):
        r = self.res.ratio(*case, key)
        self.add(f"{self.name(case)}: {what}", text, times(r) if r is not None else "not measured",
                 None if r is None else r <= limit)

    def at_least(self, what, case, key, limit, text):
        r = self.res.ratio(*case, key)
        self.add(f"{self.name(case)}: {what}", text, f"{r:.2f} times" if r is not None else "not measured",
                 None if r is None else r >= limit)

    def beside_builtin(self, what, case, key, text, holds):
        """What `holds` says of our figures and of the built-in's."""
        ours, theirs = (self.res.get(*case, s, key) for s in ("rksm", "builtin"))
        if not ours or not theirs:
            self.add(f"{self.name(case)}: {what}", text, "not measured", None)
            return
        self.add(f"{self.name(case)}: {what}", text,
                 f"{ours.median:.2f}, built-in {theirs.median:.2f} [{theirs.low:.2f} … {theirs.high:.2f}]",
                 holds(ours, theirs))

    def no_worse(self, what, case, key):
        """Not above the built-in's median, or within what the built-in itself spread over."""
        self.beside_builtin(what, case, key, "not above the built-in",
                            lambda ours, theirs: ours.median <= max(theirs.median, theirs.high))

    def no_less(self, what, case, key):
        """Not below the built-in's median, or within what the built-in itself spread over."""
        self.beside_builtin(what, case, key, "not below the built-in",
                            lambda ours, theirs: ours.median >= min(theirs.median, theirs.low))

    @staticmethod
    def name(case):
        return f"{case[0]} {case[1]}, smart_scan={case[2]}"

    def floor(self, case, factor, text):
        ours, floor = (self.res.get(*case, s, "CPU per page") for s in ("rksm", "floor"))
        r = ours.median / floor.median if ours and floor else None
        self.add(f"{self.name(case)}: CPU per page against the floor (aim)", text,
                 f"{r:.2f} times" if r is not None else "not measured", None if r is None else r <= factor)


def in_place(t, case, limit):
    """Time for a mebi of merged pages, and memory meanwhile."""
    took, each, empty, peak, saved = (
        t.res.get("in-place", c, 0, "rksm", key)
        for c, key in ((case, "time"), (case, "time per merged page"), (f"{case}, nothing merged", "time"),
                       (case, "extra memory at most"), (case, "memory saved"))
    )
    pages = next(r["pages"] for r in t.res.records if (r["workload"], r["case"]) == ("in-place", case))
    seconds, text = took.median, f"{took.text(2)} s"
    if pages != 2**20:
        seconds = empty.median + each.median * 2**20 / 1e6
        text = f"{seconds:.2f} s, reckoned from {pages // 1024} Ki"
    t.add(f"in-place {case}: time for 1 Mi merged pages", f"at most {limit} s", text, seconds <= limit)
    most = max(16, saved.median / 100)
    t.add(f"in-place {case}: extra memory", f"at most 1 % of what is saved, or 16 MiB ({most:.1f} MiB)",
          f"{peak.text(1)} MiB", peak.median <= most)


def governor_targets(t, res):
    """What is asked of governor=auto; there are no rows without it."""

    def runs(case, side):
        return [r for r in res.records if (r["workload"], r["case"], r["smart_scan"], r["impl"]) == (*case, side)]

    def limit(what, case, key, most, unit, digits=2, grain=0):
        f = res.get(*case, AUTO, key)
        if runs(case, AUTO):
            t.add(f"{case[0]} {case[1]}, auto: {what}", f"at most {most} {unit}",
                  f"{f.text(digits)} {unit}" if f else "not reached", f is not None and f.median <= most + grain)

    for c in res.of_workload("clones"):
        limit("time to 95 %", c, "time to 95 %", 2, "s")
    for c in res.of_workload("quiet"):
        # A window of 60 s can have 61 of what comes every second.
        grain = max((1e9 / r["wall_ns"] for r in runs(c, AUTO) if r["pages"]), default=0)
        limit("wake-ups", c, "wake-ups per second", 0 if c[1] == "nothing" else 1, "1/s", grain=grain)
        limit("CPU", c, "CPU", 0.1, "% of a CPU", 3)
    for c in res.of_workload("equal-cpu"):
        kind, factor = UKSM[c[1].split(",")[0]]
        for side in ("rksm", AUTO):
            r = res.ratio(*c, "saved on average", side=side)
            cpu = res.ratio(*c, "CPU used", side=side)
            share = res.get(*c, "builtin", "the same, of what is possible")
            if r is not None and cpu and share and share.median:
                # Who saves half of what there is cannot be beaten by more than two times, and who has used
                # more CPU has not beaten anybody.
                t.add(f"equal-cpu {c[1]}, {NAMES[side]}: saved on average, against the built-in",
                      f"more than {factor} times, which UKSM claims ({kind})",
                      f"{r:.2f} times, of at most {100 / share.median:.2f}, with {cpu:.2f} times the CPU",
                      r > factor if side == AUTO and cpu <= 1.15 else None)
            ours, theirs = (res.get(*c, s, "time to 90 % of the possible") for s in (side, "builtin"))
            window = [r["window_ms"] / 1e3 for r in runs(c, "builtin")]
            if ours and window:
                r = (theirs.median if theirs else window[0]) / max(ours.median, 0.5)
                t.add(f"equal-cpu {c[1]}, {NAMES[side]}: time to 90 %, the built-in's against it", "-",
                      f"{'' if theirs else 'more than '}{r:.1f} times", None)
    for c in res.of_workload("neighbour"):
        for key, most in (("request p99", 1.1), ("request p999", 1.2)):
            for side in (*SIDES, AUTO):
                r = res.ratio(*c, key, side=side, to="none")
                if r is not None:
                    t.add(f"neighbour {c[1]}, {NAMES[side]}: {key} against no KSM",
                          f"at most {most} times" if side == AUTO else "-", f"{r:.2f} times",
                          r <= most if side == AUTO else None)
    for c in res.of_workload("futile"):
        for side in ("rksm", AUTO):
            r = res.ratio(*c, "of these within 10 s", side=side)
            if r is not None:
                t.add(f"futile {c[1]}, {NAMES[side]}: merges that last less than 10 s, against the built-in",
                      "at most 1/2" if side == AUTO else "-", times(r), r <= 0.5 if side == AUTO else None)
    for r in res.records:
        if r["workload"] == "budget" and r["judged"]:
            t.add(f"budget, {NAMES[r['impl']]}, round {r['round']}: at most {r['burst_ms']} ms and {r['percent']} % in any window",
                  f"holds but for {r['slack_ms']} ms", f"{r['any_excess_ms']:+.1f} ms", bool(r["holds"]))


def targets(res):
    t = Targets(res)
    cpu = "CPU per page"
    for smart in (0, 1):
        sizes = {c[1]: c for c in res.of_workload("unique", smart)}
        for size, limit in (("64Ki", 6), ("256Ki", 7)):
            if size in sizes:
                t.at_most(cpu, sizes[size], cpu, 1 / limit, f"at most 1/{limit}")
        small, large = (res.get("unique", s, smart, "rksm", cpu) for s in ("16Ki", "256Ki"))
        if small and large:
            g = large.median / small.median
            t.add(f"unique, smart_scan={smart}: 256 Ki against 16 Ki", "at most 1.15", f"{g:.2f}", g <= 1.15)
        for c in sizes.values():
            t.floor(c, 1.5, "at most 1.5 times")
        for c in res.of_workload("tail", smart):
            t.at_most(cpu, c, cpu, 1 / 12, "at most 1/12")
        for c in res.of_workload("copies", smart):
            t.at_least("merged per CPU second", c, "merged per CPU second", 3, "at least 3 times")
            t.no_worse("full scans to 99 %", c, "full scans to 99 %")
        for c in res.of_workload("steady", smart):
            t.at_most(cpu, c, cpu, 1 / 5, "at most 1/5")
            t.floor(c, 1, "below it")
        for c in res.of_workload("rewrite", smart):
            t.at_most(cpu, c, cpu, 1 / 4, "at most 1/4")
            t.no_worse("merged pages broken again", c, "merged pages broken")
        for c in res.of_workload("churn", smart):
            t.at_most(cpu, c, cpu, 1 / 3, "at most 1/3")
        for c in res.of_workload("thp", smart):
            # A scan that frees memory does more than one that does not: there it counts what is freed for the CPU.
            if c[1] != "unique":
                t.at_least("freed per CPU second", c, "freed per CPU second", 1, "not less")
            else:
                t.no_worse(cpu, c, cpu)
                kept = res.get(*c, "rksm", "huge pages kept")
                t.add(f"{t.name(c)}: huge pages kept", "all", kept.text(1) + " %" if kept else "not measured",
                      kept.low >= 100 if kept else None)
            if c[1] == "zeros":
                freed = res.get(*c, "rksm", "freed, of what is possible")
                t.add(f"{t.name(c)}: freed with use_zero_pages=0 (no collapse)", "at least 99 %",
                      freed.text(1) + " %" if freed else "not measured", freed.low >= 99 if freed else None)
    for c in res.of_workload("latency"):
        if res.get(*c, "rksm", "fault p50") or res.get(*c, "builtin", "fault p50"):
            for m in METRICS["latency"][:-1]:
                t.no_worse(m.key + ", µs", c, m.key)
    for c in res.of_workload("victim"):
        t.no_less("accesses per second", c, "accesses per second")
        f = res.get(*c, "rksm", "TLB shoot-downs")
        t.add(f"{t.name(c)}: TLB shoot-downs per 1000 pages", "at most 1", f.text(2) if f else "not measured",
              f.median <= 1 if f else None)
    for c in res.of_workload("unmerge"):
        for m in METRICS["unmerge"]:
            t.no_worse(m.key + ", µs/page", c, m.key)
    for case, limit, of in (("dense", 20, "tracked"), ("sparse", 96, "tracked"), ("merged", 84, "merged")):
        if ("metadata", case, 0) in res.cases:
            f = res.get("metadata", case, 0, "rksm", "all memory")
            t.add(f"metadata {case}: bytes per {of} page", f"at most {limit}", f.text(1) if f else "not measured",
                  f.median <= limit if f else None)
    for case, limit in (("insmod", 2), ("rmmod", 2), ("upgrade", 4)):
        if ("in-place", case, 0) in res.cases:
            in_place(t, case, limit)
    for c in {x[1].split(",")[0]: x for x in res.of_workload("threads")}:
        for smart in (0, 1):
            one, two = (res.get("threads", f"{c},{n}", smart, "rksm", "pages per second") for n in (1, 2))
            if one and two:
                r = two.median / one.median
                t.add(f"threads {c}: pages per second, 2 threads against 1", "at least 1.7 times", f"{r:.2f} times", r >= 1.7)
    governor_targets(t, res)
    return t.rows


def write_csv(res, where):
    """What was saved over time, for who wants to draw it otherwise."""
    for workload in ("equal-cpu", "clones"):
        runs = [r for r in res.records if r["workload"] == workload]
        if not runs:
            continue
        with open(os.path.join(where, f"{workload}.csv"), "w", encoding="utf-8", newline="") as f:
            out = csv.writer(f, lineterminator="\n")
            out.writerow(["case", "side", "round", "seed", "ms", "cpu_ms", "saved_pages"])
            for r in runs:
                for row in r["series"]:
                    out.writerow([r["case"], NAMES[r["impl"]], r["round"], r["seed"], *row])


def plots(res, where, caption):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = []

    def save(fig, name, title):
        fig.suptitle(title)
        # Two lines, so that what it says of emulation is there on narrow plots too.
        fig.text(0.5, 0.005, textwrap.fill(caption, len(caption) // 2 + 12), ha="center", fontsize=7)
        fig.tight_layout(rect=(0, 0.05, 1, 0.98))
        path = os.path.join(where, name)
        fig.savefig(path, dpi=120)
        plt.close(fig)
        made.append(path)

    def pages_of(case):
        return next(r["pages"] for r in res.records if (r["workload"], r["case"], r["smart_scan"]) == case)

    for smart in (0, 1):
        cases = sorted(res.of_workload("unique", smart), key=pages_of)
        if not cases:
            continue
        fig, ax = plt.subplots(figsize=(8, 5))
        for side in (*SIDES, "floor"):
            points = [(pages_of(c), res.get(*c, side, "CPU per page")) for c in cases]
            points = [(x, f) for x, f in points if f]
            if points:
                ys = [f.median for _, f in points]
                ax.errorbar([x for x, _ in points], ys,
                            yerr=[[f.median - f.low for _, f in points], [f.high - f.median for _, f in points]],
                            marker="o", capsize=3, label=NAMES[side], color=COLOURS[side])
        ax.set_xscale("log", base=2)
        ax.set_xticks([pages_of(c) for c in cases], [c[1] for c in cases])
        ax.set_yscale("log")
        ax.set_xlabel("unique pages")
        ax.set_ylabel("scanner CPU per page and full scan (µs)")
        ax.grid(True, which="both", alpha=0.3)
        ax.legend()
        save(fig, f"unique-cost-smart{smart}.png", f"unique: cost per page against size, smart_scan={smart} (median, min to max)")

    def over_time(workload, case, smart, name, title):
        runs = [r for r in res.records if (r["workload"], r["case"], r["smart_scan"]) == (workload, case, smart)]
        if not runs:
            return
        fig, (saved, cpu) = plt.subplots(1, 2, figsize=(11, 5))
        labelled = set()
        for r in runs:
            if not r["series"]:
                continue
            label = None if r["impl"] in labelled else NAMES[r["impl"]]
            labelled.add(r["impl"])
            style = {"color": COLOURS[r["impl"]], "alpha": 0.7, "lw": 1.2}
            ts = [row[0] / 1e3 for row in r["series"]]
            saved.plot(ts, [row[2] / MIB for row in r["series"]], label=label, **style)
            cpu.plot(ts, [row[1] / 1e3 for row in r["series"]], label=label, **style)
        for ax, what in ((saved, "memory saved (MiB)"), (cpu, "scanner CPU (s)")):
            ax.set_xlabel("time (s)")
            ax.set_ylabel(what)
            ax.grid(True, alpha=0.3)
            ax.legend()
        save(fig, name, title + " (one line per round)")

    for c in res.of_workload("apps"):
        over_time(*c, "apps-time.png", "apps: redis and Python, memory saved and CPU against time")
    for c in res.of_workload("equal-cpu"):
        over_time(*c, f"equal-cpu-{c[1].replace(',', '-').rstrip('%')}.png",
                  f"equal-cpu, {c[1]} of a CPU: memory saved and CPU against time")
    for c in res.of_workload("clones"):
        over_time(*c, f"clones-{c[1].replace(',', '-')}.png", f"clones, {c[1]}: memory merged and CPU since the last one's start")
    for c in res.of_workload("copies", 0):
        over_time(*c, f"copies-time-{c[1]}.png", f"copies, {c[1]}: memory saved and CPU against time, smart_scan=0")
    return made


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    raw, where, list_path = sys.argv[1:]
    what, names = load_list(list_path)
    meta, host, records, failed, not_run = load(raw)
    if not records:
        sys.exit(f"{raw}: no result at all")
    for r in records:
        r["workload"] = names.get(r["workload"], r["workload"])
        if r["workload"] in WITHOUT_KSM and r["impl"] == "none":
            r["smart_scan"] = int(r["workload"] in GOVERNOR)
    failed += lacking(records)
    same_possible(records)
    res = Results(records)
    how = {
        "tcg": "software emulation (QEMU TCG), not hardware",
        "icount": "software emulation (QEMU TCG) that counts instructions: a nanosecond is one instruction, not time",
    }.get(host.get("accel", "tcg"), "QEMU with KVM")
    caption = (f"Linux {meta.get('release', '?')}, {meta.get('cpus', '?')} CPUs, "
               f"{meta.get('mem_kb', 0) / 1048576:.1f} GiB, run under {how}; "
               f"median [min … max] of {meta.get('rounds', '?')} rounds, sides by turns in one boot")
    seeds = sorted({r["seed"] for r in records if "seed" in r})
    caption += f"; seed {', '.join(map(str, seeds))}" if seeds else ""
    if meta.get("quick"):
        caption += "; quick sizes"
        if any(r["workload"] == "quiet" for r in records):
            caption += ", quiet after 20 s instead of two minutes"
    rows = targets(res)
    text = [
        "# rksm against the built-in KSM",
        caption + ".",
        f"The machine's load was {host.get('load_before', '?')} before and {host.get('load_after', '?')} after "
        f"(on {host.get('cpus', '?')} CPUs; the guest alone makes about 1); it took {host.get('seconds', '?')} s. "
        "CPU is the run time of the scanning threads from /proc/PID/schedstat. The floor is one xxh64, by a program, "
        "of each page of the same memory. A page counts once for each full scan that goes over it.",
        tables(res, what),
        "## Targets (issue: ratios to the built-in of the same boot)",
        table(["what", "target", "measured", "met"],
              [[r["what"], r["target"], r["measured"], {True: "yes", False: "NO", None: "-"}[r["met"]]] for r in rows]),
    ]
    if not_run:
        text.append("## Not run\n\n" + "\n".join(f"- {s}" for s in not_run))
    if failed:
        text.append("## Failed\n\n" + "\n".join(f"- {json.dumps(f)}" for f in failed))
    text = "\n\n".join(text) + "\n"
    sys.stdout.write(text)
    with open(os.path.join(where, "report.md"), "w", encoding="utf-8") as f:
        f.write(text)
    units = {(w, m.key): m.unit for w, ms in METRICS.items() for m in ms}
    with open(os.path.join(where, "results.json"), "w", encoding="utf-8") as f:
        json.dump({
            "caption": caption, "guest": meta, "host": host, "failed": failed, "targets": rows,
            "figures": [
                {"workload": w, "case": c, "smart_scan": s, "impl": i, "figure": k, "what": what[w],
                 "unit": units[w, k], "median": v.median, "min": v.low, "max": v.high, "rounds": v.values}
                for (w, c, s, i, k), v in res.figures.items()
            ],
        }, f, indent=1, ensure_ascii=False)
    write_csv(res, where)
    plots(res, where, caption)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
