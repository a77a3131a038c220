// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl merge`: merge a process now.

use crate::device::{catch_interrupts, Device, Merged, Progress};
use crate::exit::{Failure, Status};
use crate::host::Context;
use crate::units::{self, count, counted, duration, signed_bytes};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The process
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: i32,
    /// Only these addresses, as in /proc/PID/maps
    #[arg(value_name = "START-END", value_parser = units::parse_range)]
    pub range: Option<units::AddressRange>,
    /// Open all its memory to merging first
    #[arg(long)]
    pub enable: bool,
}

/// What is printed as JSON.
#[derive(Serialize)]
struct Report {
    pid: i32,
    seconds: f64,
    scanned_pages: u64,
    merged_pages: u64,
    zeroed_pages: u64,
    saved_bytes: i64,
    refused: BTreeMap<String, u64>,
    /// Why it ended before all was done.
    stopped: Option<String>,
}

pub fn run(args: &Args, cx: &Context) -> Result<Status, Failure> {
    let what = format!("merging process {} on request", args.pid);
    let device = Device::open_for(&cx.host, &what)?;
    catch_interrupts()?;
    let bar = Bar::new(cx, "merging");
    let begin = Instant::now();
    let merged = device.merge(args.pid, args.range, args.enable, |progress, so_far| {
        bar.show(
            progress,
            format!("{} saved", signed_bytes(so_far.bytes_saved)),
        );
    });
    let time = begin.elapsed();
    bar.end();
    let merged = merged?;
    cx.print(&report(args.pid, &merged, time), || text(&merged, time))?;
    Ok(status(merged.stopped.as_deref()))
}

fn report(pid: i32, merged: &Merged, time: Duration) -> Report {
    Report {
        pid,
        seconds: seconds(time),
        scanned_pages: merged.scanned,
        merged_pages: merged.merged,
        zeroed_pages: merged.zeroed,
        saved_bytes: merged.bytes_saved,
        refused: merged.refused.clone(),
        stopped: merged.stopped.clone(),
    }
}

/// "2,097,152 pages in 5.1 s; 2.8 GiB saved; 113 refused (pinned)"
fn text(merged: &Merged, time: Duration) -> String {
    let mut text = format!(
        "{} in {}; {} saved",
        counted(merged.scanned, "page", "pages"),
        duration(time),
        signed_bytes(merged.bytes_saved)
    );
    let mut reasons: Vec<(&String, &u64)> = merged.refused.iter().collect();
    reasons.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
    let name = |reason: &str| reason.replace('_', " ");
    match reasons.as_slice() {
        [] => {}
        [(reason, n)] => text += &format!("; {} refused ({})", count(**n), name(reason)),
        all => {
            let total = all.iter().map(|(_, n)| **n).sum();
            let each: Vec<String> = all
                .iter()
                .map(|(reason, n)| format!("{} {}", count(**n), name(reason)))
                .collect();
            text += &format!("; {} refused ({})", count(total), each.join(", "));
        }
    }
    text
}

/// Seconds for JSON, to the millisecond.
pub(super) fn seconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e3).round() / 1e3
}

/// Says why it ended early, if it did.
pub(super) fn status(stopped: Option<&str>) -> Status {
    match stopped {
        None => Status::Ok,
        Some(why) => {
            eprintln!("rksmctl: ended early: {why}");
            Status::Partial
        }
    }
}

/// A bar on stderr, if that is a terminal.
pub(super) struct Bar(Option<ProgressBar>);

impl Bar {
    pub(super) fn new(cx: &Context, what: &'static str) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self(None);
        }
        // What is left of the line beside the words.
        let width = cx.width.saturating_sub(40).min(40);
        let template = if width >= 5 {
            format!("{{prefix}} [{{bar:{width}}}] {{percent}} % {{msg}}")
        } else {
            "{percent} %".into()
        };
        let style = ProgressStyle::with_template(&template)
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        Self(Some(
            ProgressBar::new(0).with_style(style).with_prefix(what),
        ))
    }

    pub(super) fn show(&self, progress: Progress, message: impl Display) {
        if let Self(Some(bar)) = self {
            bar.set_length(progress.total);
            bar.set_position(progress.done);
            bar.set_message(message.to_string());
        }
    }

    pub(super) fn end(&self) {
        if let Self(Some(bar)) = self {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(refused: &[(&str, u64)]) -> Merged {
        Merged {
            scanned: 2_097_152,
            merged: 734_000,
            zeroed: 3,
            bytes_saved: 3_006_477_107,
            refused: refused.iter().map(|(r, n)| (r.to_string(), *n)).collect(),
            stopped: None,
        }
    }

    const TIME: Duration = Duration::from_millis(5100);

    #[test]
    fn texts() {
        assert_eq!(
            text(&merged(&[("pinned", 113)]), TIME),
            "2,097,152 pages in 5.1 s; 2.8 GiB saved; 113 refused (pinned)"
        );
        assert_eq!(
            text(
                &merged(&[("far_node", 7), ("gone", 7), ("pinned", 1113)]),
                TIME
            ),
            "2,097,152 pages in 5.1 s; 2.8 GiB saved; \
             1,127 refused (1,113 pinned, 7 far node, 7 gone)"
        );
        assert_eq!(
            text(&Merged::default(), Duration::ZERO),
            "0 pages in 0 ms; 0 B saved"
        );
    }

    #[test]
    fn json() {
        let json = serde_json::to_string(&report(7, &merged(&[("pinned", 113)]), TIME)).unwrap();
        assert_eq!(
            json,
            "{\"pid\":7,\"seconds\":5.1,\"scanned_pages\":2097152,\"merged_pages\":734000,\
             \"zeroed_pages\":3,\"saved_bytes\":3006477107,\"refused\":{\"pinned\":113},\
             \"stopped\":null}"
        );
    }
}
