// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl tune`: set the scanner. rksm's governor is set where there is one, and otherwise the
//! knobs that both have.

use crate::backend::{detect, Backend, Own};
use crate::exit::{Failure, Status};
use crate::host::{Context, Host, KSM, RKSM};
use crate::text::labelled;
use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Hardly any CPU time, savings after hours
    Quiet,
    /// A few percent of a CPU
    Balanced,
    /// Savings soon, whatever the CPU time
    Fast,
    /// Back from the governor to what the knobs say
    Knobs,
}

#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
With rksm's governor, in percent of one CPU, or the part of all CPUs where that is more:

            cpu_percent     pressure_cpu_percent  cpu_burst_millisecs  scan_threads
  quiet      1 or 0.1 %      2 or 0.2 %                         500  1
  balanced   5 or 0.5 %     10 or 1 %                          2000  1
  fast      25 or 2.5 %     50 or 5 %                         10000  half of the CPUs, 4 at most

and governor to auto. knobs sets governor to knobs and leaves all others as they are.

Without it, on the built-in KSM and on rksm before 0.7:

            pages_to_scan  sleep_millisecs  scan_threads (rksm)
  quiet               100              200  1
  balanced           1000               20  1
  fast               4096                0  half of the CPUs, 4 at most

and advisor_mode to none, or it would set pages_to_scan itself, and smart_scan to 1.

Either all are set, or none. run is left as it is.")]
pub struct Args {
    #[arg(value_enum)]
    pub profile: Profile,
}

/// A knob that was given another value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Change {
    knob: &'static str,
    from: String,
    to: String,
}

#[derive(Clone, Debug, Serialize)]
struct Report {
    profile: Profile,
    backend: &'static str,
    changed: Vec<Change>,
    /// "auto" or "knobs"; nothing where there is no governor.
    governor: Option<String>,
    /// The governor's budget, of one CPU: as a rule, and while memory is short.
    cpu_percent: Option<u64>,
    pressure_cpu_percent: Option<u64>,
    cpu_burst_millisecs: Option<u64>,
    /// 0 stopped, 1 merging, 2 unmerging.
    run: u64,
}

pub fn run(args: &Args, cx: &Context) -> Result<Status, Failure> {
    let backend = detect(&cx.host)?;
    let own = backend.own()?;
    let has_governor = own.as_ref().is_some_and(|own| own.governor.is_some());
    if args.profile == Profile::Knobs && !has_governor {
        backend.require_rksm("the governor")?;
        let version = backend.version()?;
        let message = format!("rksm {version} has no governor: the knobs are in force");
        return Err(Failure::failed(message));
    }
    let cpus = cpus(&cx.host);
    let wanted = match has_governor {
        true => wanted_of_governor(args.profile, cpus),
        false => wanted(args.profile, backend.is_rksm(), cpus),
    };
    let knobs = Files {
        host: &cx.host,
        backend: backend.as_ref(),
    };
    let changed = apply(&knobs, &wanted)?;
    let Own {
        governor,
        cpu_percent,
        pressure_cpu_percent,
        cpu_burst_millisecs,
        ..
    } = backend.own()?.unwrap_or_default();
    let report = Report {
        profile: args.profile,
        backend: backend.name(),
        changed,
        governor,
        cpu_percent,
        pressure_cpu_percent,
        cpu_burst_millisecs,
        run: backend.knobs()?.run,
    };
    cx.print(&report, || text(&report, cx.width))?;
    Ok(Status::Ok)
}

/// Most threads of a profile that is in a hurry.
fn threads(profile: Profile, cpus: u64) -> u64 {
    match profile {
        Profile::Fast => (cpus / 2).clamp(1, 4),
        _ => 1,
    }
}

/// The values of a profile for the governor, which is switched on when its budget is set.
fn wanted_of_governor(profile: Profile, cpus: u64) -> Vec<(&'static str, String)> {
    // A hundredth of a CPU, or a thousandth of all.
    let (times, burst) = match profile {
        Profile::Quiet => (1, 500),
        Profile::Balanced => (5, 2000),
        Profile::Fast => (25, 10_000),
        Profile::Knobs => return vec![("governor", "knobs".to_string())],
    };
    let percent = (times * cpus / 10).max(times);
    vec![
        ("cpu_percent", percent.to_string()),
        ("pressure_cpu_percent", (2 * percent).to_string()),
        ("cpu_burst_millisecs", burst.to_string()),
        ("scan_threads", threads(profile, cpus).to_string()),
        ("governor", "auto".to_string()),
    ]
}

/// The values of a profile, in the order in which they are to be written: pages_to_scan cannot be
/// written while there is an advisor.
fn wanted(profile: Profile, rksm: bool, cpus: u64) -> Vec<(&'static str, String)> {
    let (pages, sleep) = match profile {
        Profile::Quiet => (100, 200),
        Profile::Balanced => (1000, 20),
        // More pages at a time would only make those wait who read or write the files.
        Profile::Fast => (4096, 0),
        Profile::Knobs => return Vec::new(),
    };
    let mut wanted = vec![
        ("advisor_mode", "none".to_string()),
        ("smart_scan", "1".to_string()),
        ("sleep_millisecs", sleep.to_string()),
        ("pages_to_scan", pages.to_string()),
    ];
    if rksm {
        wanted.push(("scan_threads", threads(profile, cpus).to_string()));
    }
    wanted
}

/// How many CPUs are online; 1 where nobody tells.
fn cpus(host: &Host) -> u64 {
    let list = host.read_if_there("/sys/devices/system/cpu/online");
    let list = list.ok().flatten().unwrap_or_default();
    list.split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let first: u64 = first.trim().parse().ok()?;
            (last.trim().parse::<u64>().ok()? + 1).checked_sub(first)
        })
        .sum::<u64>()
        .max(1)
}

trait Knobs {
    /// Nothing where this kernel does not have it.
    fn get(&self, knob: &str) -> Result<Option<String>, Failure>;
    fn set(&self, knob: &str, value: &str) -> Result<(), Failure>;
}

struct Files<'a> {
    host: &'a Host,
    backend: &'a dyn Backend,
}

impl Knobs for Files<'_> {
    fn get(&self, knob: &str) -> Result<Option<String>, Failure> {
        let own = format!("{RKSM}/{knob}");
        let file = if self.host.exists(&own) {
            own
        } else {
            format!("{KSM}/{knob}")
        };
        let text = self.host.read_if_there(file)?;
        // Of "none [scan-time]" the one in force.
        Ok(text.map(|text| {
            let within = text.split_once('[').and_then(|(_, t)| t.split_once(']'));
            within.map_or(text.clone(), |(word, _)| word.to_string())
        }))
    }

    fn set(&self, knob: &str, value: &str) -> Result<(), Failure> {
        self.backend.set(knob, &value)
    }
}

/// Sets all; where one fails, those before it get their values back.
fn apply(knobs: &dyn Knobs, wanted: &[(&'static str, String)]) -> Result<Vec<Change>, Failure> {
    let mut all = Vec::new();
    for (knob, to) in wanted {
        if let Some(from) = knobs.get(knob)? {
            let (knob, to) = (*knob, to.clone());
            all.push(Change { knob, from, to });
        }
    }
    for (done, change) in all.iter().enumerate() {
        // Also what has the value already: another advisor_mode brings its own pages_to_scan.
        let Err(mut failure) = knobs.set(change.knob, &change.to) else {
            continue;
        };
        for old in all.iter().take(done).rev() {
            if let Err(again) = knobs.set(old.knob, &old.from) {
                failure.message += &format!("; and {} stays {}: {again}", old.knob, old.to);
            }
        }
        return Err(failure);
    }
    all.retain(|change| change.from != change.to);
    Ok(all)
}

fn text(report: &Report, width: usize) -> String {
    let mut text = String::new();
    let longest = report.changed.iter().map(|change| change.knob.len()).max();
    let column = 17.max(longest.unwrap_or(0) + 2);
    for Change { knob, from, to } in &report.changed {
        let label = format!("{knob}:");
        text += &labelled(width, &label, column, &format!("{from} -> {to}"));
    }
    if report.changed.is_empty() {
        text += &labelled(width, "", 0, "All knobs had these values already.");
    }
    if let Some(words) = in_force(report) {
        text += &labelled(width, "", 0, &words);
    }
    let start = format!("start with: echo 1 > {KSM}/run");
    match report.run {
        0 => {
            text += &labelled(
                width,
                "",
                0,
                &format!("run is 0, nothing is scanned; {start}"),
            )
        }
        2 => {
            text += &labelled(
                width,
                "",
                0,
                &format!("run is 2, nothing is merged; {start}"),
            )
        }
        _ => {}
    }
    text
}

/// What the governor's settings come to; nothing where there is none.
fn in_force(report: &Report) -> Option<String> {
    if report.governor.as_deref()? != "auto" {
        return Some(
            "the knobs pace the scanner: pages_to_scan, sleep_millisecs, advisor_mode".into(),
        );
    }
    let percent = report.cpu_percent?;
    let pressure = report.pressure_cpu_percent.map(|pressure| {
        let most = pressure.max(percent);
        format!(", to {most} % while memory is short")
    });
    let pressure = pressure.unwrap_or_default();
    Some(format!(
        "the governor keeps to {percent} % of a CPU{pressure}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    /// Knobs of which some refuse every value, or every value but "old".
    #[derive(Default)]
    struct Fake {
        values: RefCell<BTreeMap<String, String>>,
        refuses: &'static str,
        stuck: &'static str,
    }

    impl Knobs for Fake {
        fn get(&self, knob: &str) -> Result<Option<String>, Failure> {
            Ok(self.values.borrow().get(knob).cloned())
        }

        fn set(&self, knob: &str, value: &str) -> Result<(), Failure> {
            if knob == self.refuses || (knob == self.stuck && value == "old") {
                return Err(Failure::failed(format!("cannot write {value} to {knob}")));
            }
            self.values.borrow_mut().insert(knob.into(), value.into());
            Ok(())
        }
    }

    fn fake(refuses: &'static str, stuck: &'static str) -> Fake {
        let knobs = ["advisor_mode", "sleep_millisecs", "pages_to_scan"];
        let values = knobs.map(|k| (k.to_string(), "old".to_string()));
        Fake {
            values: RefCell::new(values.into()),
            refuses,
            stuck,
        }
    }

    #[test]
    fn all_or_nothing() {
        let wanted = wanted(Profile::Quiet, false, 8);
        let knobs = fake("", "");
        let changed = apply(&knobs, &wanted).unwrap();
        // This kernel has no smart_scan.
        assert_eq!(changed.len(), 3);
        assert_eq!(knobs.values.borrow()["pages_to_scan"], "100");

        let knobs = fake("pages_to_scan", "");
        let failure = apply(&knobs, &wanted).unwrap_err();
        assert_eq!(failure.message, "cannot write 100 to pages_to_scan");
        assert!(knobs.values.borrow().values().all(|value| value == "old"));

        let failure = apply(&fake("pages_to_scan", "sleep_millisecs"), &wanted).unwrap_err();
        assert_eq!(
            failure.message,
            "cannot write 100 to pages_to_scan; and sleep_millisecs stays 200: \
             cannot write old to sleep_millisecs"
        );
    }

    #[test]
    fn the_budget_follows_the_cpus() {
        for (profile, cpus, percent, pressure) in [
            (Profile::Quiet, 1, 1, 2),
            (Profile::Quiet, 64, 6, 12),
            (Profile::Balanced, 1, 5, 10),
            (Profile::Balanced, 11, 5, 10),
            (Profile::Balanced, 64, 32, 64),
            (Profile::Fast, 1, 25, 50),
            (Profile::Fast, 64, 160, 320),
        ] {
            let wanted = wanted_of_governor(profile, cpus);
            assert_eq!(wanted[0], ("cpu_percent", f64::from(percent).to_string()));
            assert_eq!(wanted[1].1, f64::from(pressure).to_string());
            // The kernel's own bound.
            assert!(pressure <= 100 * cpus as i32);
            // Last, so that nothing is scanned with another budget.
            assert_eq!(wanted.last().unwrap().1, "auto");
        }
    }

    #[test]
    fn threads_follow_the_cpus() {
        let fixture = Fixture::new();
        let host = Host::new(fixture.root());
        for (online, n, threads) in [("0", 1, "1"), ("0-3,6", 5, "2"), ("0-63", 64, "4")] {
            fixture.file("/sys/devices/system/cpu/online", format!("{online}\n"));
            assert_eq!(cpus(&host), n);
            let wanted = wanted(Profile::Fast, true, n);
            assert_eq!(wanted.last().unwrap().1, threads);
            assert!(
                wanted_of_governor(Profile::Fast, n).contains(&("scan_threads", threads.into()))
            );
        }
        fixture.remove("/sys/devices/system/cpu/online");
        assert_eq!(cpus(&host), 1);
    }
}
