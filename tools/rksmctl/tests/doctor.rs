// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl doctor`: a machine without and with each trouble.

mod common;

use common::fixture::Proc;
use common::{golden, golden_text, rksmctl, rksmctl_at, Fixture};
use std::fmt::Write;

const RELEASE: &str = "7.3.4+deb13-amd64";

/// A machine with rksm on which nothing is wrong.
fn healthy() -> Fixture {
    let fixture = Fixture::new();
    fixture.rksm();
    fixture.processes();
    fixture.file("/proc/sys/vm/max_map_count", "65530\n");
    fixture.file("/sys/kernel/mm/ksm/use_zero_pages", "1\n");
    fixture.file("/sys/devices/system/node/online", "0\n");
    thp(&fixture, "always [madvise] never");
    maps(&fixture, 4211, "rw-p", 10);
    fixture
}

/// The same with the built-in.
fn builtin() -> Fixture {
    let fixture = healthy();
    std::fs::remove_dir_all(fixture.root().join("sys/kernel/mm/rksm")).unwrap();
    fixture
}

fn thp(fixture: &Fixture, value: &str) {
    let path = "/sys/kernel/mm/transparent_hugepage/enabled";
    fixture.file(path, format!("{value}\n"));
}

/// So many mappings of 256 MiB.
fn maps(fixture: &Fixture, pid: u32, flags: &str, n: u64) {
    let mut text = String::new();
    for i in 0..n {
        let start = 0x7f00_0000_0000 + i * 0x1000_0000;
        let end = start + 0x1000_0000;
        writeln!(
            text,
            "{start:x}-{end:x} {flags} 00000000 00:01 7 /memfd:ram (deleted)"
        )
        .unwrap();
    }
    fixture.file(&format!("/proc/{pid}/maps"), text);
}

fn module(fixture: &Fixture, release: &str, content: &[u8]) {
    fixture.file(
        &format!("/lib/modules/{release}/updates/dkms/rksm.ko"),
        content,
    );
}

fn locked_down(fixture: &Fixture) {
    fixture.file(
        "/sys/kernel/security/lockdown",
        "none [integrity] confidentiality\n",
    );
    fixture.file(
        "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c",
        [6, 0, 0, 0, 1],
    );
}

fn ksm(fixture: &Fixture, name: &str, value: &str) {
    fixture.file(&format!("/sys/kernel/mm/ksm/{name}"), format!("{value}\n"));
}

fn own(fixture: &Fixture, name: &str, value: &str) {
    fixture.file(&format!("/sys/kernel/mm/rksm/{name}"), format!("{value}\n"));
}

fn ksmtuned(fixture: &Fixture) {
    fixture.process(&Proc {
        pid: 700,
        comm: "ksmtuned",
        cmdline: "/bin/bash /usr/sbin/ksmtuned",
        cgroup: "/system.slice/ksmtuned.service",
        ..Proc::default()
    });
}

/// A check, and what is to be wrong for it.
type Case = (&'static str, &'static str, fn() -> Fixture, fn(&Fixture));

const CASES: [Case; 31] = [
    ("kernel", "no KSM", builtin, |f| {
        std::fs::remove_dir_all(f.root().join("sys/kernel/mm/ksm")).unwrap();
    }),
    ("module", "not installed", builtin, |_| {}),
    ("module", "not loaded", builtin, |f| module(f, RELEASE, b"")),
    ("module", "another kernel's", builtin, |f| {
        module(f, "6.12.1", b"")
    }),
    ("secure_boot", "not installed", builtin, locked_down),
    ("secure_boot", "not signed", builtin, |f| {
        locked_down(f);
        module(f, RELEASE, b"ELF");
    }),
    ("secure_boot", "signed", builtin, |f| {
        locked_down(f);
        module(f, RELEASE, b"ELF~Module signature appended~\n");
    }),
    ("secure_boot", "loaded", healthy, locked_down),
    ("secure_boot", "enforced", builtin, |f| {
        f.file("/sys/module/module/parameters/sig_enforce", "Y\n");
    }),
    ("run", "stopped", healthy, |f| ksm(f, "run", "0")),
    ("run", "unmerging", healthy, |f| ksm(f, "run", "2")),
    ("permission", "some hidden", healthy, |f| {
        f.file("/proc/1/ksm_stat", "");
    }),
    ("permission", "old kernel", healthy, |f| {
        for pid in [1, 800, 4211, 4212] {
            f.remove(&format!("/proc/{pid}/ksm_stat"));
        }
    }),
    ("opted_in", "nobody", healthy, |f| {
        for pid in [4211, 4212] {
            f.process(&Proc {
                pid,
                ..Proc::default()
            });
        }
    }),
    ("guests", "shared", healthy, |f| maps(f, 4212, "rw-s", 4)),
    ("guests", "two shared", healthy, |f| {
        maps(f, 4211, "rw-s", 4);
        maps(f, 4212, "rw-s", 4);
    }),
    ("governor", "pressure", healthy, |f| {
        own(f, "memory_pressure", "1");
    }),
    ("governor", "default knobs", healthy, |f| {
        own(f, "governor", "[knobs] auto");
    }),
    ("governor", "knobs", healthy, |f| {
        own(f, "governor", "[knobs] auto");
        ksm(f, "pages_to_scan", "1000");
    }),
    ("tuners", "ksmtuned", healthy, ksmtuned),
    ("tuners", "ksmtuned without governor", builtin, ksmtuned),
    ("thp", "always", healthy, |f| {
        thp(f, "[always] madvise never")
    }),
    ("map_count", "near the limit", healthy, |f| {
        f.file("/proc/sys/vm/max_map_count", "12\n");
    }),
    ("zero_pages", "off", healthy, |f| {
        ksm(f, "use_zero_pages", "0")
    }),
    ("sharing", "low", healthy, |f| {
        ksm(f, "max_page_sharing", "16")
    }),
    ("sharing", "chains", healthy, |f| {
        ksm(f, "stable_node_chains", "20");
        ksm(f, "stable_node_dups", "300");
    }),
    ("nodes", "across", healthy, |f| {
        f.file("/sys/devices/system/node/online", "0-1\n");
    }),
    ("nodes", "apart", healthy, |f| {
        f.file("/sys/devices/system/node/online", "0-1\n");
        ksm(f, "merge_across_nodes", "0");
    }),
    ("smart_scan", "off", builtin, |f| ksm(f, "smart_scan", "0")),
    ("memory", "short", healthy, |f| {
        f.file(
            "/proc/meminfo",
            "MemTotal: 16777216 kB\nMemAvailable: 1048576 kB\n\
             SwapTotal: 4194304 kB\nSwapFree: 1048576 kB\n",
        );
    }),
    ("memory", "no room", healthy, |f| {
        ksm(f, "pages_sharing", "9000000");
    }),
];

/// The finding of a check, as one line.
fn finding(fixture: &Fixture, check: &str) -> String {
    let output = rksmctl(fixture, "doctor --json");
    assert_eq!(output.status.code(), Some(0));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let found = report["findings"].as_array().unwrap();
    let Some(finding) = found.iter().find(|f| f["check"] == check) else {
        return "nothing".into();
    };
    let word = |name: &str| finding[name].as_str().unwrap_or("-").to_string();
    format!(
        "{}: {}\n    {}",
        word("level"),
        word("text"),
        word("remedy")
    )
}

#[test]
fn each_finding() {
    let mut text = String::new();
    for (check, case, machine, spoil) in CASES {
        let fixture = machine();
        let before = finding(&fixture, check);
        spoil(&fixture);
        let after = finding(&fixture, check);
        assert!(
            before != after || case == "not installed" && check == "module",
            "{check} {case}"
        );
        writeln!(text, "{check}, {case}: {after}").unwrap();
    }
    golden_text("doctor-findings", &text);
}

#[test]
fn healthy_machine() {
    golden("doctor-healthy", &healthy(), "doctor");
    golden("doctor-healthy-json", &healthy(), "doctor --json");
    golden("doctor-builtin", &builtin(), "doctor");
}

/// Little memory is scanned soon enough, and who has set the knobs wants them.
#[test]
fn knobs_that_are_wanted() {
    let governor = |spoil: fn(&Fixture)| {
        let fixture = healthy();
        own(&fixture, "governor", "[knobs] auto");
        spoil(&fixture);
        finding(&fixture, "governor")
    };
    let fine = "ok: the knobs pace the scanner (governor=knobs)\n    -";
    assert!(governor(|_| {}).starts_with("warning: a full scan of the 7.81 GiB"));
    assert_eq!(governor(|f| ksm(f, "sleep_millisecs", "10")), fine);
    assert_eq!(
        governor(|f| ksm(f, "advisor_mode", "none [scan-time]")),
        fine
    );
    let small = |f: &Fixture| {
        for pid in [4211, 4212] {
            f.process(&Proc {
                pid,
                anon_kib: 1 << 20,
                merge_any: true,
                ..Proc::default()
            });
        }
    };
    assert_eq!(governor(small), fine);
    let fixture = Fixture::new();
    fixture.rksm_before_governor();
    assert_eq!(finding(&fixture, "governor"), "nothing");
}

#[test]
fn nothing_to_look_at() {
    golden("doctor-none", &Fixture::new(), "doctor");
}

#[test]
fn narrow() {
    let output = rksmctl_at(20, &healthy(), "doctor");
    golden_text("doctor-narrow", &String::from_utf8(output.stdout).unwrap());
}

#[test]
fn status_names_problems() {
    let fixture = healthy();
    ksm(&fixture, "run", "0");
    golden("status-problem", &fixture, "status --no-sample");
}
