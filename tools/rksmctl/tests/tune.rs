// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl tune` on both.

mod common;

use common::{golden, Fixture};

fn knob(fixture: &Fixture, name: &str) -> String {
    let path = fixture.root().join("sys/kernel/mm").join(name);
    std::fs::read_to_string(path).unwrap().trim().to_string()
}

#[test]
fn builtin() {
    let fixture = Fixture::new();
    fixture.builtin();
    fixture.file("/sys/kernel/mm/ksm/advisor_mode", "none [scan-time]\n");
    golden("tune-builtin", &fixture, "tune quiet");
    assert_eq!(knob(&fixture, "ksm/sleep_millisecs"), "200");
    golden("tune-same", &fixture, "tune quiet");
    fixture.file("/sys/kernel/mm/ksm/run", "0\n");
    golden("tune-stopped", &fixture, "tune balanced");
    golden("tune-stopped-json", &fixture, "tune fast --json");
    assert_eq!(knob(&fixture, "ksm/run"), "0");
}

#[test]
fn rksm() {
    let fixture = Fixture::new();
    fixture.rksm();
    fixture.file("/sys/devices/system/cpu/online", "0-7\n");
    golden("tune-rksm", &fixture, "tune fast");
    assert_eq!(knob(&fixture, "rksm/scan_threads"), "4");
}

#[test]
fn none() {
    golden("tune-none", &Fixture::new(), "tune quiet");
}
