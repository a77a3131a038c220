// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl status` on both, and where there is nothing to show.

mod common;

use common::{golden, rksmctl_at, Fixture};

#[test]
fn builtin() {
    let fixture = Fixture::new();
    fixture.builtin();
    fixture.processes();
    golden("status-builtin", &fixture, "status --no-sample");
    golden("status-builtin-json", &fixture, "status --no-sample --json");
}

#[test]
fn rksm() {
    let fixture = Fixture::new();
    fixture.rksm();
    fixture.processes();
    golden("status-rksm", &fixture, "status");
    golden("status-rksm-json", &fixture, "status --no-sample --json");
}

#[test]
fn governor() {
    let fixture = Fixture::new();
    fixture.rksm();
    fixture.processes();
    // Neither has an effect then.
    fixture.file("/sys/kernel/mm/ksm/advisor_mode", "none [scan-time]\n");
    fixture.file("/sys/kernel/mm/ksm/smart_scan", "0\n");
    fixture.file("/sys/kernel/mm/rksm/memory_pressure", "1\n");
    golden("status-pressure", &fixture, "status --no-sample");
    fixture.file("/sys/kernel/mm/rksm/governor", "[knobs] auto\n");
    golden("status-knobs", &fixture, "status --no-sample");
    fixture.rksm_before_governor();
    golden("status-before", &fixture, "status --no-sample");
    golden("status-before-json", &fixture, "status --no-sample --json");
}

#[test]
fn trouble() {
    let fixture = Fixture::new();
    golden("status-none", &fixture, "status");
    fixture.builtin();
    fixture.file("/sys/kernel/mm/ksm/run", "0\n");
    // An older kernel without these, and less saved than its metadata takes.
    for name in [
        "smart_scan",
        "advisor_mode",
        "pages_scanned",
        "ksm_zero_pages",
    ] {
        fixture.remove(&format!("/sys/kernel/mm/ksm/{name}"));
    }
    fixture.file("/sys/kernel/mm/ksm/general_profit", "-5000000\n");
    golden("status-stopped", &fixture, "status --no-sample");
}

#[test]
fn narrow() {
    let fixture = Fixture::new();
    fixture.rksm();
    fixture.processes();
    let output = rksmctl_at(20, &fixture, "status --no-sample");
    let text = String::from_utf8(output.stdout).unwrap();
    for line in text.lines() {
        assert!(line.chars().count() <= 20, "{text}");
    }
}
