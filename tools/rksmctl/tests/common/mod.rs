// SPDX-License-Identifier: GPL-2.0-only
//! Runs the program over a made-up machine, and compares what it prints with a file.

pub mod fixture;

pub use fixture::Fixture;
use std::path::Path;
use std::process::{Command, Output};

/// The program with `arguments`, as one line, over the fixture's files.
#[allow(dead_code)]
pub fn rksmctl(fixture: &Fixture, arguments: &str) -> Output {
    rksmctl_at(100, fixture, arguments)
}

/// The same on a terminal of so many columns.
#[allow(dead_code)] // Not every test uses all of it.
pub fn rksmctl_at(columns: u16, fixture: &Fixture, arguments: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rksmctl"))
        .arg("--root")
        .arg(fixture.root())
        .args(arguments.split_whitespace())
        .env("COLUMNS", columns.to_string())
        .output()
        .unwrap()
}

/// Compares with tests/golden/NAME.txt the exit status and all that was printed. With
/// RKSM_GOLDEN=write in the environment the file is written instead.
#[allow(dead_code)] // Not every test uses it.
#[track_caller]
pub fn golden(name: &str, fixture: &Fixture, arguments: &str) {
    let output = rksmctl(fixture, arguments);
    let mut text = format!("$ rksmctl {arguments}\n");
    text += &String::from_utf8(output.stdout).unwrap();
    text += &String::from_utf8(output.stderr).unwrap();
    text += &format!("exit {}\n", output.status.code().unwrap());
    golden_text(name, &text);
}

/// The same for a text that a test has put together.
#[allow(dead_code)]
#[track_caller]
pub fn golden_text(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.txt"));
    if std::env::var("RKSM_GOLDEN").is_ok_and(|v| v == "write") {
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, expected, "not as {}", path.display());
}
