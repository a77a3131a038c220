// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl tune` on both.

mod common;

use common::{golden, rksmctl_at, Fixture};

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
    fixture.file("/sys/kernel/mm/rksm/governor", "[knobs] auto\n");
    golden("tune-rksm", &fixture, "tune fast");
    assert_eq!(knob(&fixture, "rksm/scan_threads"), "4");
    assert_eq!(knob(&fixture, "rksm/governor"), "auto");
    golden("tune-rksm-same", &fixture, "tune fast");
    golden("tune-rksm-json", &fixture, "tune quiet --json");
    // As a kernel has it: tune has written the one word.
    fixture.file("/sys/kernel/mm/rksm/governor", "knobs [auto]\n");
    golden("tune-knobs", &fixture, "tune knobs");
    assert_eq!(knob(&fixture, "rksm/governor"), "knobs");
    // All the time.
    assert_eq!(knob(&fixture, "ksm/pages_to_scan"), "100");
    fixture.file("/sys/kernel/mm/rksm/governor", "[knobs] auto\n");
    fixture.file("/sys/kernel/mm/ksm/run", "0\n");
    golden("tune-knobs-same", &fixture, "tune knobs");
}

#[test]
fn narrow() {
    let fixture = Fixture::new();
    fixture.rksm();
    let output = rksmctl_at(20, &fixture, "tune fast");
    let text = String::from_utf8(output.stdout).unwrap();
    // A single word may be longer.
    let fits = |line: &str| line.chars().count() <= 20 || !line.trim().contains(' ');
    assert!(text.lines().all(fits), "{text}");
}

#[test]
fn large_machine() {
    let fixture = Fixture::new();
    fixture.rksm();
    fixture.file("/sys/devices/system/cpu/online", "0-127\n");
    golden("tune-large", &fixture, "tune balanced");
}

#[test]
fn before_the_governor() {
    let fixture = Fixture::new();
    fixture.rksm_before_governor();
    fixture.file("/sys/devices/system/cpu/online", "0-7\n");
    golden("tune-before", &fixture, "tune fast");
    assert_eq!(knob(&fixture, "rksm/scan_threads"), "4");
    golden("tune-before-knobs", &fixture, "tune knobs");
}

#[test]
fn no_governor() {
    let fixture = Fixture::new();
    fixture.builtin();
    golden("tune-builtin-knobs", &fixture, "tune knobs");
    golden("tune-none", &Fixture::new(), "tune quiet");
}
