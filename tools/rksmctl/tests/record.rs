// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl record`.

mod common;

use common::{rksmctl, Fixture};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::Value;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn machine() -> Fixture {
    let fixture = Fixture::new();
    fixture.rksm();
    fixture.processes();
    fixture
}

fn command(fixture: &Fixture, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rksmctl"));
    command
        .arg("--root")
        .arg(fixture.root())
        .arg("record")
        .args(arguments)
        .current_dir(fixture.root());
    command
}

fn run(fixture: &Fixture, arguments: &[&str]) -> Output {
    command(fixture, arguments).output().unwrap()
}

fn lines(file: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(file).unwrap();
    assert!(text.ends_with('\n'), "{text}");
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until a recording has so many lines.
fn until_lines(file: &Path, n: usize) {
    let began = Instant::now();
    while std::fs::read_to_string(file).map_or(0, |text| text.lines().count()) < n {
        assert!(began.elapsed() < Duration::from_secs(20), "no {n} lines");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
}

#[test]
fn a_command() {
    let fixture = machine();
    let arguments = [
        "-o",
        "f",
        "--interval",
        "0.05",
        "--",
        "sh",
        "-c",
        "sleep 0.4; echo out",
    ];
    let output = run(&fixture, &arguments);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(output.stdout, b"out\n");
    let lines = lines(&fixture.root().join("f"));
    let header = &lines[0];
    assert_eq!(header["format"], "rksmctl-recording");
    assert_eq!(header["version"], 1);
    assert_eq!(header["rksmctl"], env!("CARGO_PKG_VERSION"));
    assert_eq!(header["backend"], "rksm");
    assert_eq!(header["backend_version"], "0.4.0");
    assert_eq!(header["kernel"], "7.3.4+deb13-amd64");
    assert_eq!(header["interval_seconds"], 0.05);
    assert_eq!(header["memory_bytes"], 16u64 << 30);
    assert_eq!(header["command"][0], "sh");
    assert!(header["started_seconds"].as_f64().unwrap() > 1.6e9);
    assert!(lines.len() > 4, "{}", lines.len());
    let last = lines.last().unwrap();
    assert!(last["seconds"].as_f64().unwrap() >= 0.4);
    assert_eq!(last["counters"]["pages_sharing"], 3000);
    assert_eq!(last["knobs"]["run"], 1);
    assert_eq!(last["own"]["refused"]["pinned"], 113);
    assert_eq!(last["cpu_seconds"], 5.6);
    assert_eq!(last["available_bytes"], 10u64 << 30);
    assert_eq!(last["units"]["100.scope"]["merging_pages"], 2000);
    assert_eq!(last["units"]["100.scope"]["zero_pages"], 48);
    assert_eq!(last["units"]["100.scope"]["anon_bytes"], 4000u64 << 20);
}

#[test]
fn exit_status_is_passed_on() {
    let fixture = machine();
    let code = |file: &str, script: &str| {
        let output = run(&fixture, &["-o", file, "--json", "--", "sh", "-c", script]);
        let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(summary["exit_status"], output.status.code().unwrap());
        assert_eq!(summary["records"], 2);
        output.status.code()
    };
    assert_eq!(code("a", "exit 0"), Some(0));
    assert_eq!(code("b", "exit 42"), Some(42));
    assert_eq!(code("c", "kill -9 $$"), Some(137));
    // Signals are not held back in it.
    assert_eq!(code("d", "kill -TERM $$"), Some(143));
}

#[test]
fn until_told_to_end() {
    for end in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let fixture = machine();
        let file = fixture.root().join("f");
        let child = command(&fixture, &["-o", "f", "--interval", "0.05"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        until_lines(&file, 4);
        signal(&child, end);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{end}: {}", stderr(&output));
        assert!(lines(&file).len() > 4);
    }
}

#[test]
fn signals_go_to_the_command() {
    let fixture = machine();
    let script = "trap 'exit 7' TERM; while :; do sleep 0.05; done";
    let child = command(
        &fixture,
        &["-o", "f", "--interval", "0.05", "--", "sh", "-c", script],
    )
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    until_lines(&fixture.root().join("f"), 5);
    signal(&child, Signal::SIGTERM);
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(7));
}

#[test]
fn nothing_is_overwritten_unasked() {
    let fixture = machine();
    fixture.file("/f", "precious");
    let output = run(&fixture, &["-o", "f", "--", "touch", "ran"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        stderr(&output),
        "rksmctl: f exists; --force would replace it\n"
    );
    assert_eq!(
        std::fs::read(fixture.root().join("f")).unwrap(),
        b"precious"
    );
    assert!(!fixture.root().join("ran").exists());
    let output = run(&fixture, &["-o", "f", "--force", "--", "touch", "ran"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(lines(&fixture.root().join("f")).len(), 3);
}

#[test]
fn a_command_that_is_not_there() {
    let fixture = machine();
    let output = run(&fixture, &["-o", "f", "--", "/none"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        stderr(&output),
        "rksmctl: cannot run /none: No such file or directory\n"
    );
    assert!(!fixture.root().join("f").exists());
}

#[test]
fn a_full_disk() {
    let fixture = machine();
    let output = run(&fixture, &["-o", "/dev/full"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        stderr(&output),
        "rksmctl: cannot write /dev/full: No space left on device\n"
    );
    // The limit is met in the middle of a line, and what was written stays whole.
    let script = format!(
        "trap '' XFSZ; ulimit -f 8; exec {} --root . record -o f --interval 0.01 -- sleep 1",
        env!("CARGO_BIN_EXE_rksmctl")
    );
    let output = Command::new("bash")
        .args(["-c", &script])
        .current_dir(fixture.root())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        stderr(&output),
        "rksmctl: cannot write f: File too large; the command goes on\n\
         rksmctl: cannot write f: File too large\n"
    );
    assert!(lines(&fixture.root().join("f")).len() > 2);
}

#[test]
fn no_ksm() {
    let fixture = Fixture::new();
    let output = run(&fixture, &["-o", "f", "--", "touch", "ran"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stderr(&output), "rksmctl: this kernel has no KSM\n");
    assert!(!fixture.root().join("ran").exists() && !fixture.root().join("f").exists());
}

/// Whether this machine has a KSM or not.
#[test]
fn this_machine() {
    let fixture = Fixture::new();
    let file = fixture.root().join("f");
    let output = Command::new(env!("CARGO_BIN_EXE_rksmctl"))
        .args(["record", "--interval", "0.05", "-o"])
        .arg(&file)
        .args(["--", "sleep", "0.2"])
        .output()
        .unwrap();
    if Path::new("/sys/kernel/mm/ksm").exists() {
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert!(lines(&file).len() > 2);
    } else {
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(stderr(&output), "rksmctl: this kernel has no KSM\n");
    }
}

/// rksm is loaded and unloaded meanwhile, with a moment at which there is nothing to read.
#[test]
fn one_ksm_follows_the_other() {
    let fixture = machine();
    let script = "sleep 0.2; mv sys/kernel/mm/rksm gone; mv sys/kernel/mm/ksm/run x; sleep 0.2; \
                  mv x sys/kernel/mm/ksm/run; sleep 0.2";
    let output = run(
        &fixture,
        &["-o", "f", "--interval", "0.02", "--", "sh", "-c", script],
    );
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    assert!(stderr(&output).contains("the counters could not be read"));
    let lines = lines(&fixture.root().join("f"));
    assert_eq!(lines[1]["backend"], "rksm");
    assert_eq!(lines.last().unwrap()["backend"], "built-in KSM");
}

#[test]
fn usage() {
    let fixture = machine();
    for bad in ["record", "record -o f --interval 0", "record -o f x"] {
        assert_eq!(rksmctl(&fixture, bad).status.code(), Some(2), "{bad}");
    }
}
