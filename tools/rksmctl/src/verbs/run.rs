// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl run`: run a command with all its memory open to merging.

use crate::exit::{reason, Doing, Failure, Status};
use crate::host::Context;
use nix::errno::Errno;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
All that the command starts inherits it. Exit status: that of the command; 126 if it cannot be \
executed, 127 if there is none of that name, 1 if the kernel refuses.")]
pub struct Args {
    /// The command and its arguments
    #[arg(
        value_name = "CMD",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub command: Vec<OsString>,
}

/// Returns only if it fails: the command takes the place of this program.
pub fn run(args: &Args, _cx: &Context) -> Result<Status, Failure> {
    let Some((program, arguments)) = args.command.split_first() else {
        return Err(Failure::usage("no command is given"));
    };
    open_memory()?;
    let error = Command::new(program).args(arguments).exec();
    Err(Failure {
        // As env(1).
        status: match error.raw_os_error() {
            Some(libc::ENOENT) => 127,
            _ => 126,
        },
        message: format!(
            "cannot run {}: {}",
            program.to_string_lossy(),
            reason(&error)
        ),
    })
}

/// Of linux/prctl.h; not in every version of the libc crate.
const PR_SET_MEMORY_MERGE: libc::c_int = 67;

/// Opens all memory to merging, from now on; fork and exec hand it on.
fn open_memory() -> Result<(), Failure> {
    let one: libc::c_ulong = 1;
    let zero: libc::c_ulong = 0;
    // SAFETY: This call takes numbers only, and unused ones have to be zero.
    let result = unsafe { libc::prctl(PR_SET_MEMORY_MERGE, one, zero, zero, zero) };
    match Errno::result(result) {
        Ok(_) => Ok(()),
        Err(Errno::EINVAL) => Err(Failure::failed(
            "this kernel cannot open a process to merging: PR_SET_MEMORY_MERGE is in Linux 6.4 \
             and later with CONFIG_KSM",
        )),
        Err(e) => Err(e).doing("cannot open this process to merging"),
    }
}
