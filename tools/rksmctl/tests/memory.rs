// SPDX-License-Identifier: GPL-2.0-only
//! `estimate` and `why` over made-up memory.

mod common;

use common::fixture::Proc;
use common::{golden, rksmctl, Fixture};

const PAGE: usize = 4096;
const PRESENT: u64 = 1 << 63;
const EXCLUSIVE: u64 = 1 << 56;
const UFFD_WP: u64 = 1 << 57;

/// A process with a mapping of private memory from page 16 on; each page is full of one byte, and
/// has this entry.
fn memory(fixture: &Fixture, pid: u32, flags: &str, pages: &[(u8, u64)]) {
    let bytes = pages.len() * PAGE;
    let kib = bytes / 1024;
    let start = 16 * PAGE;
    fixture.file(
        &format!("/proc/{pid}/smaps"),
        format!(
            "{start:08x}-{:08x} rw-p 00000000 00:00 0 \n\
             Rss: {kib} kB\nAnonymous: {kib} kB\nKSM: 0 kB\nSwap: 8 kB\n\
             VmFlags: rd wr mr mw me {flags}\n\
             10000000-10001000 r--p 00000000 fe:00 9      /usr/bin/kvm\n\
             Rss: 100 kB\nAnonymous: 0 kB\nVmFlags: rd mr me\n",
            start + bytes
        ),
    );
    let mut mem = vec![0; start];
    let mut entries = vec![0; 16 * 8];
    for (byte, entry) in pages {
        mem.extend([*byte; PAGE]);
        entries.extend(entry.to_ne_bytes());
    }
    fixture.file(&format!("/proc/{pid}/mem"), mem);
    fixture.file(&format!("/proc/{pid}/pagemap"), entries);
}

/// The frames 0 to 63, of which those below 10 are merged ones.
fn frames(fixture: &Fixture) {
    let flags: Vec<u8> = (0..64_u64)
        .flat_map(|frame| (u64::from(frame < 10) << 21).to_ne_bytes())
        .collect();
    fixture.file("/proc/kpageflags", flags);
}

/// Two guests: two pages merged, two equal but not merged, two of zeroes, one shared by fork.
fn guests() -> Fixture {
    let fixture = Fixture::new();
    fixture.builtin();
    fixture.processes();
    frames(&fixture);
    for pid in [4211, 4212] {
        let own = |n| PRESENT | EXCLUSIVE | (u64::from(pid) - 4200 + n);
        memory(
            &fixture,
            pid,
            "ac mg uw",
            &[
                (1, PRESENT | 5),
                (2, own(20) | UFFD_WP),
                (0, own(21)),
                (9, PRESENT | 60),
                (pid as u8, own(23)),
                (3, 0),
            ],
        );
    }
    fixture
}

#[test]
fn estimates() {
    let fixture = guests();
    golden(
        "estimate",
        &fixture,
        "estimate --vm clone1 --settle 0 --seed 1",
    );
    golden(
        "estimate-two",
        &fixture,
        "estimate 4211 4212 --settle 0.01 --seed 1",
    );
    golden(
        "estimate-json",
        &fixture,
        "estimate --unit qemu.slice --settle 0 --seed 1 --json",
    );
    golden(
        "estimate-limit",
        &fixture,
        "estimate 4211 4212 --settle 0 --seed 1 --limit 50%",
    );
    // Not for root.
    fixture.remove("/proc/kpageflags");
    for pid in [4211, 4212] {
        let entry = PRESENT;
        memory(
            &fixture,
            pid,
            "ac",
            &[(1, entry), (0, entry), (2, entry | EXCLUSIVE)],
        );
    }
    golden(
        "estimate-user",
        &fixture,
        "estimate 4211 4212 --settle 0 --seed 1",
    );
}

/// What may not be read: for root nothing is like that but a directory.
#[test]
fn estimate_denied() {
    let fixture = guests();
    fixture.remove("/proc/4212/smaps");
    fixture.file("/proc/4212/smaps/x", "");
    golden(
        "estimate-partial",
        &fixture,
        "estimate 4211 4212 --settle 0 --seed 1",
    );
    golden(
        "estimate-denied",
        &fixture,
        "estimate 4212 --settle 0 --seed 1",
    );
    golden(
        "estimate-ended",
        &fixture,
        "estimate 800 --settle 0 --seed 1",
    );
    golden("why-denied", &fixture, "why 4212");
    golden("why-ended", &fixture, "why 800");
    let output = rksmctl(&fixture, "why 4211 4212 --json");
    assert_eq!(output.status.code(), Some(4));
}

/// An agent that holds memory of each kind.
const SMAPS: &str = "\
7f0000000000-7f0040000000 rw-s 00000000 00:01 1024        /memfd:ram (deleted)
Rss: 1048576 kB
Anonymous: 0 kB
VmFlags: rd wr sh mr mw me ms sd
7f0050000000-7f0060000000 rw-p 00000000 00:00 0
Rss: 102400 kB
Anonymous: 102400 kB
KSM: 40960 kB
AnonHugePages: 20480 kB
VmFlags: rd wr mr mw me ac mg
7f0070000000-7f0080000000 rw-p 00000000 00:0f 77          /anon_hugepage (deleted)
Rss: 0 kB
Private_Hugetlb: 2048 kB
VmFlags: rd wr mr mw me de ht
7f0090000000-7f0098000000 rw-p 00000000 00:00 0           [heap]
Rss: 51200 kB
Anonymous: 51200 kB
Swap: 4096 kB
VmFlags: rd wr mr mw me ac
7f00a0000000-7f00a1000000 r-xp 00000000 fe:00 3           /usr/bin/cloud-hypervisor
Rss: 8192 kB
Anonymous: 1024 kB
VmFlags: rd ex mr mw me
7f00b0000000-7f00b0004000 r--p 00000000 00:00 0           [vvar]
Rss: 4 kB
VmFlags: rd mr pf io de dd sd
";

fn hypervisor(fixture: &Fixture) {
    fixture.process(&Proc {
        pid: 5873,
        comm: "cloud-hyperviso",
        cmdline: "/usr/bin/cloud-hypervisor --api-socket /run/ch/db.sock",
        rss_kib: 1_210_372,
        merging_pages: 10_240,
        zero_pages: 256,
        rmap_items: 20_480,
        merge_any: false,
        ..Proc::default()
    });
    fixture.file("/proc/5873/smaps", SMAPS);
}

#[test]
fn reasons() {
    let fixture = guests();
    hypervisor(&fixture);
    golden("why", &fixture, "why 5873");
    golden("why-json", &fixture, "why 5873 --json");
    golden("why-several", &fixture, "why --unit qemu.slice");
    fixture.file("/sys/kernel/mm/ksm/run", "0\n");
    golden("why-stopped", &fixture, "why --vm db");
}

/// rksm without its device: what it knows itself is missing.
#[test]
fn reasons_without_device() {
    let fixture = guests();
    fixture.rksm();
    hypervisor(&fixture);
    golden("why-no-device", &fixture, "why 5873");
}

#[test]
fn narrow() {
    let fixture = guests();
    hypervisor(&fixture);
    for line in ["why 5873", "estimate 4211 4212 --settle 0 --seed 1"] {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_rksmctl"))
            .arg("--root")
            .arg(fixture.root())
            .args(line.split(' '))
            .env("COLUMNS", "20")
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        for line in text.lines() {
            assert!(line.chars().count() <= 20, "{line}");
        }
    }
}

/// Of a process of this machine, where its kernel has KSM.
#[test]
fn real_process_sums_to_rss() {
    let mut child = std::process::Command::new("sleep")
        .arg("60")
        .spawn()
        .unwrap();
    // Until it has become that program.
    let comm = format!("/proc/{}/comm", child.id());
    while std::fs::read_to_string(&comm).unwrap() != "sleep\n" {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    std::thread::sleep(std::time::Duration::from_millis(100));
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_rksmctl"))
        .args(["why", "--json", &child.id().to_string()])
        .output()
        .unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    if errors.contains("this kernel has no KSM") {
        return;
    }
    assert_eq!(errors, "");
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let process = &found["processes"][0];
    let rss = process["rss_bytes"].as_u64().unwrap();
    let rows = process["resident"].as_array().unwrap();
    let sum: u64 = rows.iter().map(|r| r["bytes"].as_u64().unwrap()).sum();
    assert!(sum.abs_diff(rss) <= rss / 100, "{sum} of {rss}");
}
