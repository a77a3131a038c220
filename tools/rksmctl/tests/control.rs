// SPDX-License-Identifier: GPL-2.0-only
//! What the verbs that need /dev/rksm say where they cannot have it.

mod common;

use common::{golden, rksmctl, Fixture};

#[test]
fn on_the_builtin() {
    let fixture = Fixture::new();
    fixture.builtin();
    fixture.processes();
    for (name, arguments) in [
        ("builtin-enable-pid", "enable 4211"),
        ("builtin-enable-unit", "enable --unit ssh"),
        ("builtin-enable-vm", "enable --vm clone1 --json"),
        ("builtin-disable-cgroup", "disable --cgroup /qemu.slice"),
        ("builtin-never", "never --vm clone1"),
        ("builtin-merge", "merge 4211 --enable"),
        ("builtin-unmerge", "unmerge 4211"),
        ("builtin-rules", "rules"),
        ("rules-help", "rules --help"),
        ("builtin-rules-apply", "rules apply"),
    ] {
        golden(name, &fixture, arguments);
    }
}

#[test]
fn on_a_rksm_that_is_older() {
    let fixture = Fixture::new();
    fixture.rksm();
    fixture.processes();
    golden("no-device", &fixture, "merge 4211");
    // A file: no call is known.
    fixture.file("/dev/rksm", "");
    let output = rksmctl(&fixture, "rules --json");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        format!(
            "rksmctl: this rksmctl ({}) and the loaded rksm (0.4.0) do not fit each other\n",
            env!("CARGO_PKG_VERSION")
        )
    );
    golden("no-cgroup", &fixture, "enable --cgroup /none");
    golden("no-process", &fixture, "merge 2147483647");
    golden("no-vm", &fixture, "never --vm none");
    golden("no-unit", &fixture, "enable --unit ../x");
}
