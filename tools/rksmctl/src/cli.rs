// SPDX-License-Identifier: GPL-2.0-only
//! The command line.

use crate::exit::{Doing, Failure, Status};
use crate::host::Context;
use crate::process::Selector;
use crate::verbs;
use clap::{CommandFactory, Parser, Subcommand};
use std::path::PathBuf;

/// Show, estimate and control the merging of equal pages
#[derive(Debug, Parser)]
#[command(
    name = "rksmctl",
    version,
    subcommand_required = true,
    arg_required_else_help = true
)]
#[command(after_help = "Exit status: 0, 1 failed, 2 usage, 3 needs rksm, 4 done in part")]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

/// What all verbs understand.
#[derive(Clone, Debug, clap::Args)]
pub struct Global {
    /// Write JSON, with plain bytes and seconds
    #[arg(long, global = true)]
    pub json: bool,
    /// Use the /sys, /proc and /etc below DIR
    #[arg(
        long,
        global = true,
        hide = true,
        value_name = "DIR",
        default_value = "/"
    )]
    pub root: PathBuf,
}

/// Processes to look at: several, or all.
#[derive(Clone, Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Many {
    /// Processes by their ids
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub pids: Vec<i32>,
    /// The processes of a systemd unit
    #[arg(long)]
    pub unit: Option<String>,
    /// The processes of a cgroup and of those below it
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<String>,
    /// The virtual machine of this name
    #[arg(long, value_name = "NAME")]
    pub vm: Option<String>,
    /// All processes
    #[arg(long)]
    pub all: bool,
}

impl From<&Many> for Selector {
    fn from(from: &Many) -> Self {
        Self {
            pids: from.pids.clone(),
            unit: from.unit.clone(),
            cgroup: from.cgroup.clone(),
            vm: from.vm.clone(),
            all: from.all,
        }
    }
}

/// What a rule is to be about: a process, or what a name stands for.
#[derive(Clone, Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Target {
    /// A process by its id
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: Option<i32>,
    /// A systemd unit
    #[arg(long)]
    pub unit: Option<String>,
    /// A cgroup and those below it
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<String>,
    /// The virtual machine of this name
    #[arg(long, value_name = "NAME")]
    pub vm: Option<String>,
}

impl From<&Target> for Selector {
    fn from(from: &Target) -> Self {
        Self {
            pids: from.pid.into_iter().collect(),
            unit: from.unit.clone(),
            cgroup: from.cgroup.clone(),
            vm: from.vm.clone(),
            all: false,
        }
    }
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Show what is saved, what it costs, and how the scanner is set
    Status(verbs::status::Args),
    /// Show the same by unit and process, again and again
    Top(verbs::top::Args),
    /// Say why memory of processes is not merged
    Why(verbs::why::Args),
    /// Estimate what merging would save
    Estimate(verbs::estimate::Args),
    /// Merge a process, unit, cgroup or VM from now on
    Enable(verbs::enable::Args),
    /// Leave it to the process again, and unmerge it
    Disable(verbs::disable::Args),
    /// Unmerge it, and never merge it whatever it asks for
    Never(verbs::never::Args),
    /// Merge a process now
    Merge(verbs::merge::Args),
    /// Unmerge a process now
    Unmerge(verbs::unmerge::Args),
    /// Show the rules that enable and never have made
    Rules(verbs::rules::Args),
    /// Set the scanner
    Tune(verbs::tune::Args),
    /// Run a command with all its memory open to merging
    Run(verbs::run::Args),
    /// Record the counters while a command runs, or until interrupted
    Record(verbs::record::Args),
    /// Make a page with plots of a recording
    Report(verbs::report::Args),
    /// Give the counters as OpenMetrics
    Export(verbs::export::Args),
    /// Look for what stands in the way of merging, and say what to do
    Doctor(verbs::doctor::Args),
    /// Print the completions for a shell
    #[command(hide = true)]
    Completions {
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Write the manual pages
    #[command(hide = true)]
    Man { dir: PathBuf },
}

impl Verb {
    pub fn run(&self, cx: &Context) -> Result<Status, Failure> {
        match self {
            Self::Status(args) => verbs::status::run(args, cx),
            Self::Top(args) => verbs::top::run(args, cx),
            Self::Why(args) => verbs::why::run(args, cx),
            Self::Estimate(args) => verbs::estimate::run(args, cx),
            Self::Enable(args) => verbs::enable::run(args, cx),
            Self::Disable(args) => verbs::disable::run(args, cx),
            Self::Never(args) => verbs::never::run(args, cx),
            Self::Merge(args) => verbs::merge::run(args, cx),
            Self::Unmerge(args) => verbs::unmerge::run(args, cx),
            Self::Rules(args) => verbs::rules::run(args, cx),
            Self::Tune(args) => verbs::tune::run(args, cx),
            Self::Run(args) => verbs::run::run(args, cx),
            Self::Record(args) => verbs::record::run(args, cx),
            Self::Report(args) => verbs::report::run(args, cx),
            Self::Export(args) => verbs::export::run(args, cx),
            Self::Doctor(args) => verbs::doctor::run(args, cx),
            Self::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(*shell, &mut Cli::command(), "rksmctl", &mut script);
                std::io::Write::write_all(&mut std::io::stdout(), &script)?;
                Ok(Status::Ok)
            }
            Self::Man { dir } => {
                std::fs::create_dir_all(dir)
                    .and_then(|()| clap_mangen::generate_to(Cli::command(), dir))
                    .doing(format!("cannot write manual pages to {}", dir.display()))?;
                Ok(Status::Ok)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn command_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn lines() {
        for good in [
            "rksmctl status --json",
            "rksmctl why 1 2 3",
            "rksmctl estimate --all --limit 10%",
            "rksmctl estimate --cgroup /machine.slice",
            "rksmctl enable --unit a.service",
            "rksmctl never --vm clone1",
            "rksmctl merge 1 1000-3000 --enable",
            "rksmctl unmerge 1",
            "rksmctl tune quiet",
            "rksmctl run -- true --json",
            "rksmctl record -o f --interval 0.5 -- sleep 1",
            "rksmctl report f -o g.html",
            "rksmctl export --listen 127.0.0.1:9100",
        ] {
            if let Err(e) = parse(good) {
                panic!("{good}: {e}");
            }
        }
        for bad in [
            "rksmctl",
            "rksmctl why",
            "rksmctl why 1 --all",
            "rksmctl why 0",
            "rksmctl enable 1 2",
            "rksmctl enable 1 --unit a",
            "rksmctl merge 1 3000-1000",
            "rksmctl tune loud",
            "rksmctl run",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
