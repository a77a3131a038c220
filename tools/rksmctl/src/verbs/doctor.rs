// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl doctor`: what stands in the way of merging, and what to do.

use crate::checks::{findings, Finding, Level, Machine};
use crate::exit::{Doing, Failure, Status};
use crate::host::Context;
use crate::text::labelled;
use serde::Serialize;

#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Each line is ok, a note, a warning or a problem. Exit status: 0 whatever is found, 1 if it could \
not look.")]
pub struct Args {}

#[derive(Serialize)]
struct Report {
    problems: usize,
    warnings: usize,
    findings: Vec<Finding>,
}

pub fn run(_args: &Args, cx: &Context) -> Result<Status, Failure> {
    let machine = Machine::look(&cx.host).doing("cannot look at this machine")?;
    let findings = findings(&machine);
    let of = |level| findings.iter().filter(|f| f.level == level).count();
    let report = Report {
        problems: of(Level::Problem),
        warnings: of(Level::Warning),
        findings,
    };
    cx.print(&report, || text(&report, cx.width))?;
    Ok(Status::Ok)
}

fn text(report: &Report, width: usize) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        text += &labelled(width, finding.level.word(), 9, &finding.text);
        if let Some(remedy) = &finding.remedy {
            text += &labelled(width, "", 9, &format!("-> {remedy}"));
        }
    }
    text
}
