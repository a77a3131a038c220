// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl record`: record the counters.

use crate::backend;
use crate::exit::{Doing, Failure, Status};
use crate::host::Context;
use crate::recording::{Header, Writer, FORMAT, VERSION};
use crate::sample::{meminfo, Sample};
use crate::signals::{Event, Signals};
use crate::units;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde::Serialize;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The file to write, of JSON lines
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Seconds between two records
    #[arg(long, value_name = "S", default_value = "1", value_parser = units::parse_seconds)]
    pub interval: Duration,
    /// Replace the file if it exists
    #[arg(long)]
    pub force: bool,
    /// Record while this command runs, and end as it ends
    #[arg(value_name = "CMD", last = true)]
    pub command: Vec<OsString>,
}

/// What has come of it.
#[derive(Debug, Default, Serialize)]
struct Summary {
    file: String,
    records: u64,
    /// Times at which the counters could not be read.
    missed: u64,
    seconds: f64,
    /// As the command has ended.
    exit_status: Option<u8>,
}

struct Recorder<'a> {
    cx: &'a Context,
    writer: Writer,
    began: Instant,
    summary: Summary,
    /// Why a sample could not be taken, the last time.
    missed: Option<Failure>,
}

impl Recorder<'_> {
    fn record(&mut self) -> Result<(), Failure> {
        // Whole milliseconds: the rest is noise that makes the file longer.
        let seconds = (self.began.elapsed().as_secs_f64() * 1e3).round() / 1e3;
        match Sample::take(&self.cx.host, seconds) {
            Ok(sample) => {
                self.writer.line(&sample)?;
                self.summary.records += 1;
                self.summary.seconds = seconds;
            }
            // One KSM may just be making place for the other.
            Err(failure) => {
                self.summary.missed += 1;
                self.missed = Some(failure);
            }
        }
        Ok(())
    }
}

pub fn run(args: &Args, cx: &Context) -> Result<Status, Failure> {
    let header = header(args, cx)?;
    // What fails now would fail at each sample: say so before anything is written or run.
    Sample::take(&cx.host, 0.0)?;
    let signals = Signals::catch()?;
    let mut writer = Writer::create(&args.output, args.force)?;
    writer.line(&header)?;
    let mut recorder = Recorder {
        cx,
        writer,
        began: Instant::now(),
        summary: Summary {
            file: args.output.display().to_string(),
            ..Summary::default()
        },
        missed: None,
    };
    recorder.record()?;
    let mut child = match spawn(&args.command, &signals) {
        Ok(child) => child,
        Err(failure) => {
            recorder.writer.discard();
            return Err(failure);
        }
    };
    let (ended, failure) = follow(&mut recorder, &signals, child.as_mut(), args.interval)?;
    let Recorder {
        mut summary,
        missed,
        ..
    } = recorder;
    let code = ended.map(code);
    summary.exit_status = code;
    if cx.json && failure.is_none() {
        cx.print(&summary, String::new)?;
    } else if failure.is_none() {
        // Not to standard output, which is the command's.
        eprintln!(
            "rksmctl: {}: {} in {}",
            summary.file,
            units::counted(summary.records, "record", "records"),
            units::duration(Duration::from_secs_f64(summary.seconds))
        );
    }
    if let Some(missed) = &missed {
        let times = units::counted(summary.missed, "time", "times");
        eprintln!("rksmctl: the counters could not be read {times}: {missed}");
    }
    match (code, failure) {
        (Some(code), _) if code != 0 => Ok(Status::Command(code)),
        (_, Some(failure)) => Err(failure),
        _ if missed.is_some() => Ok(Status::Partial),
        _ => Ok(Status::Ok),
    }
}

/// Records until the command ends, or until told to end where there is none. A file that cannot
/// be written is no reason to end the command.
fn follow(
    recorder: &mut Recorder<'_>,
    signals: &Signals,
    mut child: Option<&mut Child>,
    interval: Duration,
) -> Result<(Option<ExitStatus>, Option<Failure>), Failure> {
    let mut next = recorder.began + interval;
    let mut failure = None;
    let ended = loop {
        let until = failure.is_none().then_some(next);
        match (signals.wait(until, None)?, &mut child) {
            (Event::Time, _) => {
                failure = recorder.record().err();
                while next <= Instant::now() {
                    next += interval;
                }
            }
            (Event::Child, Some(child)) => {
                if let Some(status) = child.try_wait().doing("cannot wait for the command")? {
                    break Some(status);
                }
            }
            (Event::End { .. }, None) => break None,
            (
                Event::End {
                    signal,
                    from_terminal: false,
                },
                Some(child),
            ) => {
                let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
                // It may be a zombie already; SIGCHLD comes then.
                let _ = kill(Pid::from_raw(pid), signal);
            }
            _ => {}
        }
        match (&failure, &child) {
            (Some(_), None) => break None,
            (Some(why), Some(_)) if until.is_some() => {
                eprintln!("rksmctl: {why}; the command goes on");
            }
            _ => {}
        }
    };
    if failure.is_none() {
        failure = recorder.record().err();
    }
    Ok((ended, failure))
}

fn header(args: &Args, cx: &Context) -> Result<Header, Failure> {
    let backend = backend::detect(&cx.host)?;
    let started = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Ok(Header {
        format: FORMAT.into(),
        version: VERSION,
        rksmctl: env!("CARGO_PKG_VERSION").into(),
        backend: backend.name().into(),
        backend_version: backend.version()?,
        kernel: backend::release(&cx.host)?,
        interval_seconds: args.interval.as_secs_f64(),
        started_seconds: (started.as_secs_f64() * 1e3).round() / 1e3,
        page_bytes: units::page_size(),
        memory_bytes: meminfo(&cx.host, "MemTotal")?,
        command: args
            .command
            .iter()
            .map(|word| word.to_string_lossy().into_owned())
            .collect(),
    })
}

fn spawn(command: &[OsString], signals: &Signals) -> Result<Option<Child>, Failure> {
    let Some((program, arguments)) = command.split_first() else {
        return Ok(None);
    };
    signals
        .release(Command::new(program).args(arguments))
        .spawn()
        .doing(format!("cannot run {}", program.to_string_lossy()))
        .map(Some)
}

/// As a shell has it.
fn code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}
