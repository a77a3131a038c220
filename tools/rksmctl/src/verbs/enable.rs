// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl enable`: merge something from now on.

use crate::cli::Target;
use crate::control::{self, Change};
use crate::exit::{Failure, Status};
use crate::host::Context;

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub target: Target,
    /// Do not save the rule for the next boot
    #[arg(long)]
    pub no_save: bool,
}

pub fn run(args: &Args, cx: &Context) -> Result<Status, Failure> {
    control::run(Change::Enable, &args.target, !args.no_save, cx)
}
