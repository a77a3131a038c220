// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl unmerge`: unmerge a process now.

use super::merge::{seconds, status, Bar};
use crate::device::{catch_interrupts, Device, Unmerged};
use crate::exit::{Failure, Status};
use crate::host::Context;
use crate::units::{self, bytes, count, counted, duration};
use serde::Serialize;
use std::time::{Duration, Instant};

#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "The scanner may merge it again: rksmctl never keeps it from that.")]
pub struct Args {
    /// The process
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: i32,
    /// Only these addresses, as in /proc/PID/maps
    #[arg(value_name = "START-END", value_parser = units::parse_range)]
    pub range: Option<units::AddressRange>,
}

/// What is printed as JSON.
#[derive(Serialize)]
struct Report {
    pid: i32,
    seconds: f64,
    unmerged_pages: u64,
    unmerged_bytes: u64,
    /// Why it ended before all was done.
    stopped: Option<String>,
}

/// The call counts pages of this size.
const PAGE: u64 = 4096;

pub fn run(args: &Args, cx: &Context) -> Result<Status, Failure> {
    let what = format!("unmerging process {} on request", args.pid);
    let device = Device::open_for(&cx.host, &what)?;
    catch_interrupts()?;
    let bar = Bar::new(cx, "unmerging");
    let begin = Instant::now();
    let unmerged = device.unmerge(args.pid, args.range, false, |progress, so_far| {
        bar.show(progress, format!("{} pages", count(so_far.pages)));
    });
    let time = begin.elapsed();
    bar.end();
    let unmerged = unmerged?;
    cx.print(&report(args.pid, &unmerged, time), || text(&unmerged, time))?;
    Ok(status(unmerged.stopped.as_deref()))
}

fn report(pid: i32, unmerged: &Unmerged, time: Duration) -> Report {
    Report {
        pid,
        seconds: seconds(time),
        unmerged_pages: unmerged.pages,
        unmerged_bytes: unmerged.pages * PAGE,
        stopped: unmerged.stopped.clone(),
    }
}

/// "2,048 pages in 0.5 s; 8 MiB more in use"
fn text(unmerged: &Unmerged, time: Duration) -> String {
    format!(
        "{} in {}; {} more in use",
        counted(unmerged.pages, "page", "pages"),
        duration(time),
        bytes(unmerged.pages * PAGE)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs() {
        let time = Duration::from_millis(500);
        let mut unmerged = Unmerged {
            pages: 2048,
            stopped: None,
        };
        assert_eq!(
            text(&unmerged, time),
            "2,048 pages in 0.5 s; 8 MiB more in use"
        );
        unmerged.stopped = Some("interrupted".into());
        assert_eq!(
            serde_json::to_string(&report(7, &unmerged, time)).unwrap(),
            "{\"pid\":7,\"seconds\":0.5,\"unmerged_pages\":2048,\"unmerged_bytes\":8388608,\
             \"stopped\":\"interrupted\"}"
        );
    }
}
