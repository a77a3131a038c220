// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl disable`: leave it to the process again.

use crate::cli::Target;
use crate::control::{self, Change};
use crate::exit::{Failure, Status};
use crate::host::Context;

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub target: Target,
    /// Leave the rule in the files, for the next boot
    #[arg(long)]
    pub no_save: bool,
}

pub fn run(args: &Args, cx: &Context) -> Result<Status, Failure> {
    control::run(Change::Disable, &args.target, !args.no_save, cx)
}
