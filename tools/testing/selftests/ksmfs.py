# SPDX-License-Identifier: GPL-2.0-only
"""The files of /sys/kernel/mm/ksm."""

KSM = "/sys/kernel/mm/ksm"


def read(name):
    with open(f"{KSM}/{name}") as file:
        return int(file.read().split()[0])


def write(name, value):
    with open(f"{KSM}/{name}", "w") as file:
        file.write(f"{value}\n")
