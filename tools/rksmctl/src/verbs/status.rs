// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl status`: what is saved, what it costs, and how the scanner is set.

use crate::backend::{detect, release, Backend, Counters};
use crate::checks::{findings, Level, Machine};
use crate::exit::{Failure, Status};
use crate::host::{Context, Host};
use crate::text::labelled;
use crate::units::{bytes, count, counted, duration, page_size, percent, signed_bytes};
use serde::Serialize;
use std::time::{Duration, Instant};

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Do not watch the scanner for a second
    #[arg(long)]
    pub no_sample: bool,
}

/// What the scanner did in a second or so.
#[derive(Clone, Debug, Serialize)]
struct Sample {
    seconds: f64,
    /// Of one CPU.
    cpu_percent: f64,
    pages_scanned_per_second: Option<f64>,
    wakeups_per_second: Option<f64>,
    saved_bytes_per_second: f64,
}

#[derive(Clone, Debug, Serialize)]
struct Report {
    backend: &'static str,
    version: String,
    kernel: String,
    /// 0 stopped, 1 merging, 2 unmerging.
    run: u64,
    saved_bytes: u64,
    net_bytes: i64,
    metadata_bytes: Option<u64>,
    cpu_seconds: f64,
    /// Of one CPU since the machine was booted. The built-in's only: rksm came later.
    cpu_percent_since_boot: Option<f64>,
    sample: Option<Sample>,
    pages_to_scan: u64,
    sleep_millisecs: u64,
    scan_threads: Option<u64>,
    advisor_mode: Option<String>,
    smart_scan: Option<bool>,
    /// "auto": it paces the scanner, and not the knobs before.
    governor: Option<String>,
    /// The governor's budget, of one CPU: as a rule, and while memory is short.
    cpu_percent: Option<u64>,
    pressure_cpu_percent: Option<u64>,
    cpu_burst_millisecs: Option<u64>,
    memory_pressure: Option<bool>,
    /// Which of the two holds now; nothing where the governor is not in force.
    budget_percent: Option<u64>,
    full_scans: u64,
    merged_bytes: u64,
    frames_bytes: u64,
    zero_bytes: Option<u64>,
    unique_bytes: u64,
    changing_bytes: u64,
    refused_pages: Option<u64>,
    available_bytes: Option<u64>,
    total_bytes: Option<u64>,
    /// What the doctor calls a problem.
    problems: Vec<String>,
}

pub fn run(args: &Args, cx: &Context) -> Result<Status, Failure> {
    let backend = detect(&cx.host)?;
    let sample = if args.no_sample {
        None
    } else {
        Some(sample(backend.as_ref())?)
    };
    let report = report(&cx.host, backend.as_ref(), sample)?;
    cx.print(&report, || text(&report, cx.width))?;
    Ok(Status::Ok)
}

fn sample(backend: &dyn Backend) -> Result<Sample, Failure> {
    type Look = (Instant, Duration, Counters, Option<u64>);
    let look = || -> Result<Look, Failure> {
        let wakeups = backend.own()?.and_then(|own| own.wakeups);
        let (cpu, counters) = (backend.cpu_time()?, backend.counters()?);
        Ok((Instant::now(), cpu, counters, wakeups))
    };
    let (began, cpu_before, before, wakeups_before) = look()?;
    std::thread::sleep(Duration::from_secs(1));
    let (ended, cpu_after, after, wakeups_after) = look()?;
    let seconds = (ended - began).as_secs_f64();
    let rate = |before: Option<u64>, after: Option<u64>| {
        let grown = after?.saturating_sub(before?);
        Some(grown as f64 / seconds)
    };
    Ok(Sample {
        seconds,
        cpu_percent: cpu_after.saturating_sub(cpu_before).as_secs_f64() / seconds * 100.0,
        pages_scanned_per_second: rate(before.pages_scanned, after.pages_scanned),
        wakeups_per_second: rate(wakeups_before, wakeups_after),
        saved_bytes_per_second: (after.saved_bytes() as f64 - before.saved_bytes() as f64)
            / seconds,
    })
}

fn report(host: &Host, backend: &dyn Backend, sample: Option<Sample>) -> Result<Report, Failure> {
    let counters = backend.counters()?;
    let knobs = backend.knobs()?;
    let own = backend.own()?;
    let governed = own.clone().unwrap_or_default();
    let cpu = backend.cpu_time()?;
    let saved = counters.saved_bytes();
    let told = own.as_ref().and_then(|own| own.metadata_bytes);
    let net_bytes = match told {
        Some(metadata) => signed(saved) - signed(metadata),
        None => counters.net_bytes(),
    };
    let difference = || {
        counters
            .general_profit
            .map(|net| u64::try_from(signed(saved) - net).unwrap_or(0))
    };
    let uptime = || -> Option<f64> {
        let text = host.read_if_there("/proc/uptime").ok()??;
        text.split(' ').next()?.parse().ok().filter(|s| *s > 0.0)
    };
    Ok(Report {
        backend: backend.name(),
        version: backend.version()?,
        kernel: release(host)?,
        run: knobs.run,
        saved_bytes: saved,
        net_bytes,
        metadata_bytes: told.or_else(difference),
        cpu_seconds: cpu.as_secs_f64(),
        cpu_percent_since_boot: match backend.is_rksm() {
            true => None,
            false => uptime().map(|uptime| cpu.as_secs_f64() / uptime * 100.0),
        },
        sample,
        pages_to_scan: knobs.pages_to_scan,
        sleep_millisecs: knobs.sleep_millisecs,
        scan_threads: own.as_ref().and_then(|own| own.scan_threads),
        advisor_mode: knobs.advisor_mode,
        smart_scan: knobs.smart_scan,
        budget_percent: governed.budget(),
        governor: governed.governor,
        cpu_percent: governed.cpu_percent,
        pressure_cpu_percent: governed.pressure_cpu_percent,
        cpu_burst_millisecs: governed.cpu_burst_millisecs,
        memory_pressure: governed.memory_pressure,
        full_scans: counters.full_scans,
        merged_bytes: (counters.pages_sharing + counters.pages_shared) * page_size(),
        frames_bytes: counters.pages_shared * page_size(),
        zero_bytes: counters.ksm_zero_pages.map(|pages| pages * page_size()),
        unique_bytes: counters.pages_unshared * page_size(),
        changing_bytes: counters.pages_volatile * page_size(),
        refused_pages: own.map(|own| own.refused.values().sum()),
        available_bytes: meminfo(host, "MemAvailable")?,
        total_bytes: meminfo(host, "MemTotal")?,
        problems: findings(&Machine::look(host)?)
            .into_iter()
            .filter(|finding| finding.level == Level::Problem)
            .map(|finding| finding.text)
            .collect(),
    })
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// A line of /proc/meminfo, in bytes.
pub fn meminfo(host: &Host, name: &str) -> Result<Option<u64>, Failure> {
    let text = host.read_if_there("/proc/meminfo")?.unwrap_or_default();
    Ok(text.lines().find_map(|line| {
        let value = line.strip_prefix(name)?.strip_prefix(':')?.trim();
        let kib: u64 = value.strip_suffix("kB")?.trim_end().parse().ok()?;
        kib.checked_mul(1024)
    }))
}

fn text(r: &Report, width: usize) -> String {
    let mut text = labelled(width, "", 0, &heading(r));
    let mut line = |label: &str, words: Vec<String>| {
        text += &labelled(width, label, 10, &words.join(", "));
    };

    let mut saved = vec![match r.metadata_bytes {
        Some(metadata) => format!(
            "{} net of {} of metadata",
            signed_bytes(r.net_bytes),
            bytes(metadata)
        ),
        None => bytes(r.saved_bytes),
    }];
    if let Some(sample) = &r.sample {
        let minute = sample.saved_bytes_per_second * 60.0;
        if minute.abs() >= 1.0 {
            let sign = if minute > 0.0 { "+" } else { "" };
            saved.push(format!("{sign}{}/min", signed_bytes(minute as i64)));
        }
    }
    line("saved", saved);

    let mut cpu = Vec::new();
    if let Some(sample) = &r.sample {
        cpu.push(format!("{} of a CPU now", percent(sample.cpu_percent)));
    }
    let total = duration(Duration::from_secs_f64(r.cpu_seconds));
    cpu.push(match r.cpu_percent_since_boot {
        Some(part) => format!("{} since boot ({total})", percent(part)),
        None => format!("{total} since it was loaded"),
    });
    if let Some(rate) = r.sample.as_ref().and_then(|s| s.wakeups_per_second) {
        cpu.push(counted(rate.round() as u64, "wake-up/s", "wake-ups/s"));
    }
    line("cost", cpu);
    if let Some(budget) = r.budget_percent {
        line("budget", budget_words(r, budget));
    }

    let mut scanner = vec![match r.budget_percent {
        Some(_) => "governor auto".into(),
        None => format!(
            "{} every {} ms",
            counted(r.pages_to_scan, "page", "pages"),
            r.sleep_millisecs
        ),
    }];
    if let Some(rate) = r.sample.as_ref().and_then(|s| s.pages_scanned_per_second) {
        scanner.push(format!("{} pages/s now", count(rate as u64)));
    }
    if let Some(threads) = r.scan_threads {
        scanner.push(counted(threads, "thread", "threads"));
    }
    // Under the governor neither has an effect.
    if r.budget_percent.is_none() {
        if let Some(mode) = r.advisor_mode.as_ref().filter(|mode| *mode != "none") {
            scanner.push(format!("advisor {mode}"));
        }
        if r.smart_scan == Some(false) {
            scanner.push("smart scan off".into());
        }
    }
    scanner.push(counted(r.full_scans, "full scan", "full scans"));
    line("scanner", scanner);

    let mut merged = vec![format!(
        "{} into {}",
        bytes(r.merged_bytes),
        bytes(r.frames_bytes)
    )];
    if let Some(zero) = r.zero_bytes.filter(|zero| *zero > 0) {
        merged.push(format!("{} of zeroes", bytes(zero)));
    }
    line("merged", merged);
    line("rest", {
        let mut not = vec![
            format!("{} unique", bytes(r.unique_bytes)),
            format!("{} changing", bytes(r.changing_bytes)),
        ];
        if let Some(refused) = r.refused_pages.filter(|pages| *pages > 0) {
            not.push(format!("refused {} times", count(refused)));
        }
        not
    });

    if let Some((available, total)) = r.available_bytes.zip(r.total_bytes) {
        let part = available as f64 / (total.max(1)) as f64 * 100.0;
        let words = format!(
            "{} of {} available ({})",
            bytes(available),
            bytes(total),
            percent(part)
        );
        line("memory", vec![words]);
    }
    for problem in &r.problems {
        line("problem", vec![problem.clone()]);
    }
    if !r.problems.is_empty() {
        line("", vec!["rksmctl doctor has the remedies".into()]);
    }
    text
}

/// What the governor may use now, and otherwise.
fn budget_words(r: &Report, budget: u64) -> Vec<String> {
    let short = r.memory_pressure == Some(true);
    let mut words = vec![match short {
        true => format!("{budget} % of a CPU as memory is short"),
        false => format!("{budget} % of a CPU"),
    }];
    if let Some(msecs) = r.cpu_burst_millisecs {
        // It grows as the percent do.
        let normal = r.cpu_percent.unwrap_or(budget).max(1);
        let msecs = msecs.saturating_mul(budget) / normal;
        let burst = duration(Duration::from_millis(msecs));
        words.push(format!("bursts of {burst}"));
    }
    match (short, r.cpu_percent, r.pressure_cpu_percent) {
        (true, Some(percent), _) => words.push(format!("{percent} % otherwise")),
        (false, _, Some(percent)) => {
            words.push(format!("{} % while memory is short", percent.max(budget)));
        }
        _ => {}
    }
    words
}

fn heading(r: &Report) -> String {
    let state = match r.run {
        0 => "stopped (run 0)",
        1 => "merging (run 1)",
        _ => "unmerging (run 2)",
    };
    if r.backend == "rksm" {
        format!("rksm {} on Linux {}: {state}", r.version, r.kernel)
    } else {
        format!("built-in KSM of Linux {}: {state}", r.kernel)
    }
}
