// SPDX-License-Identifier: GPL-2.0-only
//! What holds for the program as a whole.

mod common;

use common::{golden, rksmctl, Fixture};

#[test]
fn help() {
    golden("help", &Fixture::new(), "--help");
}

/// It is released with the module.
#[test]
fn version_is_that_of_the_module() {
    let module = include_str!("../../../rust/engine/VERSION").trim();
    let output = rksmctl(&Fixture::new(), "--version");
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(said.trim(), format!("rksmctl {module}"));
}

#[test]
fn usage() {
    let output = rksmctl(&Fixture::new(), "tune loud");
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn completions_and_manual() {
    let fixture = Fixture::new();
    let output = rksmctl(&fixture, "completions bash");
    assert!(String::from_utf8(output.stdout)
        .unwrap()
        .contains("_rksmctl()"));
    let dir = fixture.root().join("man");
    let output = rksmctl(&fixture, &format!("man {}", dir.display()));
    assert!(output.status.success());
    assert!(dir.join("rksmctl.1").exists() && dir.join("rksmctl-why.1").exists());
}

/// Whoever reads may stop reading.
#[test]
fn broken_pipe_is_quiet() {
    let program = env!("CARGO_BIN_EXE_rksmctl");
    let output = std::process::Command::new("sh")
        .args([
            "-c",
            &format!("({program} completions bash; echo $? >&2) | true"),
        ])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    // 141 is SIGPIPE; 0 where the script fitted into the pipe first.
    assert!(text == "141\n" || text == "0\n", "{text}");
}
