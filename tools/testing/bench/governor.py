#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Plots of simulated hosts under the governor: governor.py DIR, with the CSV files in it."""

import csv
import os
import sys


def load(path):
    with open(path, encoding="utf-8") as f:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(f)]


def rate(rows, key, factor=1.0):
    """What is counted, as a rate from one row to the next."""
    return [(b[key] - a[key]) * factor / (b["seconds"] - a["seconds"]) for a, b in zip(rows, rows[1:])]


def over_time(plt, where, name, rows):
    fig, axes = plt.subplots(2, 2, figsize=(11, 7))
    ts = [row["seconds"] for row in rows]
    curves = (
        (ts, [row["merged_mib"] for row in rows], "merged (MiB)"),
        (ts[1:], rate(rows, "cpu_ms", 0.1), "CPU (% of one)"),
        (ts[1:], rate(rows, "wakeups"), "wake-ups per second"),
        (ts, [row["late_ms"] / 1e3 for row in rows], "latest look (s behind its time)"),
    )
    for ax, (xs, ys, what) in zip(axes.flat, curves):
        ax.plot(xs, ys, lw=1.2)
        ax.set_xlabel("time (s)")
        ax.set_ylabel(what)
        ax.set_ylim(bottom=0)
        ax.grid(True, alpha=0.3)
        short = [row["pressure"] > 0 for row in rows]
        if any(short):
            ax.fill_between(ts, 0, 1, where=short, transform=ax.get_xaxis_transform(), alpha=0.1, label="memory is short")
            ax.legend()
    fig.suptitle(f"{name}: a simulated host, governor=auto")
    fig.tight_layout()
    fig.savefig(os.path.join(where, f"{name}.png"), dpi=120)
    plt.close(fig)


def lives(plt, where, rows):
    fig, axes = plt.subplots(1, 3, figsize=(12, 4))
    for ax, (key, what) in zip(axes, (("merges_per_s", "merges per second"), ("held_percent", "merged (%)"),
                                      ("cpu_percent", "CPU (% of one)"))):
        ax.plot([row["life_s"] for row in rows], [row[key] for row in rows], marker="o")
        ax.set_xscale("log")
        ax.set_xlabel("time for which a page stays as it is (s)")
        ax.set_ylabel(what)
        ax.grid(True, which="both", alpha=0.3)
    fig.suptitle("100 MiB of equal pages that are rewritten: a simulated host, governor=auto")
    fig.tight_layout()
    fig.savefig(os.path.join(where, "lives.png"), dpi=120)
    plt.close(fig)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    where = sys.argv[1]
    for name in sorted(os.listdir(where)):
        if not name.endswith(".csv"):
            continue
        rows = load(os.path.join(where, name))
        if name == "lives.csv":
            lives(plt, where, rows)
        else:
            over_time(plt, where, name[: -len(".csv")], rows)


if __name__ == "__main__":
    main()
