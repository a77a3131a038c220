// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl run` on the kernel that the tests run on, whether that has KSM or not.

mod common;

use common::{rksmctl, Fixture};

fn run(command: &str) -> (i32, String) {
    let output = rksmctl(&Fixture::new(), &format!("run -- {command}"));
    let mut text = String::from_utf8(output.stdout).unwrap();
    text += &String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), text)
}

#[test]
fn command_takes_the_place() {
    let refused = "rksmctl: this kernel cannot open a process to merging: PR_SET_MEMORY_MERGE is \
                   in Linux 6.4 and later with CONFIG_KSM\n";
    if run("true") == (1, refused.into()) {
        // Then nothing is run at all.
        assert_eq!(run("echo --json").0, 1);
        return;
    }
    assert_eq!(run("echo --json"), (0, "--json\n".into()));
    assert_eq!(run("false"), (1, String::new()));
    assert_eq!(
        run("no-such-command"),
        (
            127,
            "rksmctl: cannot run no-such-command: No such file or directory\n".into()
        )
    );
    assert_eq!(
        run("/"),
        (126, "rksmctl: cannot run /: Permission denied\n".into())
    );
    let (_, stat) = run("cat /proc/self/ksm_stat");
    assert!(stat.contains("ksm_merge_any: yes"), "{stat}");
}
