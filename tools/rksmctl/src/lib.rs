// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl` shows, estimates and controls the merging of equal pages, by the kernel's built-in
//! KSM or by rksm.

pub mod backend;
pub mod checks;
pub mod cli;
pub mod control;
pub mod device;
pub mod exit;
pub mod files;
pub mod host;
pub mod http;
pub mod memory;
pub mod metrics;
pub mod plot;
pub mod process;
pub mod recording;
pub mod rule_files;
pub mod sample;
pub mod sampler;
pub mod series;
pub mod signals;
pub mod systemd;
pub mod text;
pub mod top;
pub mod units;
pub mod verbs;

#[cfg(test)]
#[path = "../tests/common/fixture.rs"]
mod fixture;

use clap::Parser;
use std::process::ExitCode;

/// The whole program: reads the command line, runs the verb, and says what went wrong.
pub fn main() -> ExitCode {
    // SAFETY: No other thread runs yet, and the default action has no handler to be sound.
    unsafe {
        // As other tools: `rksmctl ... | head` ends the writer instead of making it panic.
        let _ = nix::sys::signal::signal(
            nix::sys::signal::Signal::SIGPIPE,
            nix::sys::signal::SigHandler::SigDfl,
        );
    }
    let cli = cli::Cli::parse();
    let cx = host::Context::new(&cli.global);
    match cli.verb.run(&cx) {
        Ok(status) => status.into(),
        Err(failure) => {
            eprintln!("rksmctl: {}", failure.message);
            ExitCode::from(failure.status)
        }
    }
}
