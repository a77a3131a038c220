// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl estimate`: what merging would save, whichever KSM there is.

use crate::cli::Many;
use crate::exit::{Failure, Status};
use crate::host::{Context, Host, KSM};
use crate::memory::{mappings, Backing, FrameFlags, Kind, PageEntry, Reader, Run, Unreadable};
use crate::process::{Process, Selector};
use crate::sampler::{Estimate, Frame, Place, Random, Rules, Sampler, PIECE, PILOT};
use crate::text::wrap;
use crate::units::{self, bytes, counted, duration, page_size, percent};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub processes: Many,
    /// Look only at this part of the processes
    #[arg(long, value_name = "PERCENT", value_parser = units::parse_percent)]
    pub limit: Option<f64>,
    /// Look again after so long, and leave out what has changed; 0 does not
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = settle)]
    pub settle: Duration,
    /// Choose as an earlier estimate did
    #[arg(long, value_name = "NUMBER")]
    pub seed: Option<u64>,
}

fn settle(text: &str) -> Result<Duration, String> {
    if text.trim().trim_end_matches('s').trim_end() == "0" {
        Ok(Duration::ZERO)
    } else {
        units::parse_seconds(text)
    }
}

/// Bytes but where the name says otherwise.
#[derive(Clone, Debug, Serialize)]
struct Outcome {
    seed: u64,
    /// One content of so many was read whole.
    one_of_contents: u64,
    seconds: f64,
    processes: u64,
    /// Left out by --limit.
    processes_not_sampled: u64,
    processes_unreadable: u64,
    processes_ended: u64,
    /// Present anonymous memory that can be merged: what was looked at.
    memory_bytes: u64,
    swapped_bytes: u64,
    changing_bytes: Option<u64>,
    /// Whether frames could be told apart.
    frames_known: bool,
    saving: Modes,
}

/// By mode of isolation.
#[derive(Clone, Debug, Serialize)]
struct Modes {
    none: Saving,
}

#[derive(Clone, Debug, Serialize)]
struct Saving {
    /// All that merging can save, with what is saved now.
    possible_bytes: u64,
    possible_error_bytes: u64,
    already_bytes: u64,
    more_bytes: u64,
    more_error_bytes: u64,
    /// The part of the first that pages of zeroes are.
    zero_bytes: u64,
}

/// A process that is looked at.
struct Subject {
    pid: i32,
    runs: Vec<Run>,
    /// Has ended, or may not be read any more.
    lost: bool,
}

/// What became of those that could not be looked at.
#[derive(Default)]
struct Lost {
    denied: u64,
    ended: u64,
    /// The first that was denied, and why.
    example: Option<(i32, String)>,
}

impl Lost {
    fn add(&mut self, pid: i32, why: Unreadable) {
        match why {
            Unreadable::Ended => self.ended += 1,
            Unreadable::Denied(reason) => {
                self.denied += 1;
                self.example.get_or_insert((pid, reason));
            }
        }
    }
}

pub fn run(args: &Args, cx: &Context) -> Result<Status, Failure> {
    let begin = Instant::now();
    let host = &cx.host;
    let seed = args.seed.unwrap_or_else(Random::seed);
    let mut selected = Selector::from(&args.processes).select(host)?;
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    // What was read is in this process a second time.
    selected.retain(|p| p.pid != own || !host.is_real());
    let all = selected.len();
    if let Some(limit) = args.limit {
        selected = limited(selected, limit, seed);
    }

    let bar = progress(cx.width);
    let mut lost = Lost::default();
    let mut swapped = 0;
    let mut subjects = Vec::new();
    let mut merging_pages = 0;
    let mut zero_pages = 0;
    bar.set_message("looking for memory");
    for process in &selected {
        match memory_of(host, process.pid) {
            Ok((runs, swap)) => {
                swapped += swap;
                merging_pages += process.ksm.merging_pages.unwrap_or(0);
                zero_pages += process.ksm.zero_pages.unwrap_or(0);
                subjects.push(Subject {
                    pid: process.pid,
                    runs,
                    lost: false,
                });
            }
            Err(why) => lost.add(process.pid, why),
        }
    }

    let page = page_size();
    let pages: u64 = subjects.iter().flat_map(|s| &s.runs).map(Run::pages).sum();
    let mut sampler = Sampler::new(seed, pages, usize::try_from(page).unwrap_or(4096));
    bar.set_length(pages);
    bar.set_message("reading");
    let mut look = Look {
        host,
        flags: FrameFlags::open(host),
        sampler: &mut sampler,
        bar: &bar,
        frames_known: true,
        zero_mapped: 0,
        buffer: Vec::new(),
    };
    if look.sampler.rate() > 1 {
        look.pilot(&mut subjects, pages, seed, &mut lost);
    }
    for (i, subject) in subjects.iter_mut().enumerate() {
        if !subject.lost {
            if let Err(why) = look.read(i, subject) {
                subject.lost = true;
                lost.add(subject.pid, why);
            }
        }
    }
    let frames_known = look.frames_known;
    let zero_mapped = look.zero_mapped;
    let read = subjects.iter().filter(|s| !s.lost).count() as u64;
    if read == 0 {
        bar.finish_and_clear();
        return Err(nothing(&lost, all));
    }

    if !args.settle.is_zero() {
        bar.set_message("waiting for what changes");
        std::thread::sleep(args.settle);
        again(host, &subjects, &mut sampler);
    }
    bar.finish_and_clear();

    let mut estimate = sampler.estimate(rules(host));
    if !frames_known {
        estimate.already = merging_pages as f64 * saved_of_merging(host);
    }
    // The scanner's zero pages are mappings of the zero page already.
    estimate.already += zero_pages as f64;
    estimate.possible += zero_pages as f64;
    estimate.zero += zero_pages as f64;
    let looked: Vec<&Subject> = subjects.iter().filter(|s| !s.lost).collect();
    let pages: u64 = looked.iter().flat_map(|s| &s.runs).map(Run::pages).sum();
    let outcome = Outcome {
        seed,
        one_of_contents: sampler.rate(),
        // Of a made-up machine it would only differ from run to run.
        seconds: if host.is_real() {
            begin.elapsed().as_secs_f64()
        } else {
            0.0
        },
        processes: read,
        processes_not_sampled: (all - selected.len()) as u64,
        processes_unreadable: lost.denied,
        processes_ended: lost.ended,
        memory_bytes: pages.saturating_sub(zero_mapped) * page,
        swapped_bytes: swapped,
        changing_bytes: (!args.settle.is_zero()).then(|| in_bytes(estimate.changing)),
        frames_known,
        saving: Modes {
            none: saving(&estimate, frames_known),
        },
    };
    cx.print(&outcome, || outcome.text(cx.width))?;
    Ok(if lost.denied > 0 {
        Status::Partial
    } else {
        Status::Ok
    })
}

fn in_bytes(pages: f64) -> u64 {
    (pages.max(0.0) * page_size() as f64).round() as u64
}

fn saving(estimate: &Estimate, frames_known: bool) -> Saving {
    let more_error = if frames_known {
        estimate.more_error
    } else {
        estimate.possible_error
    };
    Saving {
        possible_bytes: in_bytes(estimate.possible),
        possible_error_bytes: in_bytes(estimate.possible_error),
        already_bytes: in_bytes(estimate.already),
        more_bytes: in_bytes(estimate.more()),
        more_error_bytes: in_bytes(more_error),
        zero_bytes: in_bytes(estimate.zero),
    }
}

/// Some of the processes, chosen by the seed; one at least.
fn limited(mut all: Vec<Process>, limit: f64, seed: u64) -> Vec<Process> {
    let wanted = (all.len() as f64 * limit / 100.0).ceil() as usize;
    let mut random = Random::new(seed);
    while all.len() > wanted.max(1) {
        let i = random.below(all.len() as u64) as usize;
        all.swap_remove(i);
    }
    all.sort_by_key(|p| p.pid);
    all
}

fn progress(width: usize) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    // In a line, which a narrow terminal has no more room in.
    let template = match width {
        0..60 => "{percent} %",
        _ => "{msg} {bar} {percent} % {eta}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// The present anonymous pages of what KSM could merge, and how many bytes of it are swapped.
fn memory_of(host: &Host, pid: i32) -> Result<(Vec<Run>, u64), Unreadable> {
    let vmas = mappings(host, pid)?;
    let mut reader = Reader::open(host, pid)?;
    let mut runs = Vec::new();
    let mut swapped = 0;
    for vma in vmas.iter().filter(|v| v.kind() == Kind::Private) {
        swapped += vma.swap;
        if vma.anonymous > 0 {
            runs.extend(reader.present(vma.start, vma.end)?);
        }
    }
    Ok((runs, swapped))
}

fn rules(host: &Host) -> Rules {
    let value = |name| host.value_if_there(format!("{KSM}/{name}")).ok().flatten();
    Rules {
        max_page_sharing: value("max_page_sharing").unwrap_or(256),
        use_zero_pages: value("use_zero_pages").unwrap_or(0) != 0,
    }
}

/// The part of merged mappings that needs no page of its own, on the whole machine.
fn saved_of_merging(host: &Host) -> f64 {
    let value =
        |name| -> Option<u64> { host.value_if_there(format!("{KSM}/{name}")).ok().flatten() };
    let sharing = value("pages_sharing").unwrap_or(0);
    let shared = value("pages_shared").unwrap_or(0);
    if sharing == 0 {
        0.0
    } else {
        sharing as f64 / (sharing + shared) as f64
    }
}

fn nothing(lost: &Lost, all: usize) -> Failure {
    match &lost.example {
        Some((pid, reason)) => Failure::failed(format!(
            "cannot read the memory of process {pid}{}: {reason}",
            match lost.denied {
                1 => String::new(),
                n => format!(" and {} more", n - 1),
            }
        )),
        None if all == 0 => Failure::failed("no process to look at"),
        None => Failure::failed("all the processes have ended"),
    }
}

/// Pages that are read at once.
const BATCH: usize = 512;

/// The first look.
struct Look<'a> {
    host: &'a Host,
    flags: FrameFlags,
    sampler: &'a mut Sampler,
    bar: &'a ProgressBar,
    frames_known: bool,
    /// Pages that turned out to be mappings of the zero page.
    zero_mapped: u64,
    buffer: Vec<u8>,
}

/// One of the ways to read.
type Read = fn(&Reader, &[u64], usize, &mut Vec<u8>) -> Result<Vec<bool>, Unreadable>;

impl Look<'_> {
    /// Looks for what is heavy.
    fn pilot(&mut self, subjects: &mut [Subject], pages: u64, seed: u64, lost: &mut Lost) {
        let page = page_size();
        let mut random = Random::new(!seed);
        let mut samples: Vec<u8> = Vec::new();
        let length = usize::try_from(page).unwrap_or(4096);
        let mut buffer = Vec::new();
        for subject in subjects.iter_mut() {
            let mut addresses = Vec::new();
            for run in &subject.runs {
                let all = (run.start..run.end).step_by(length);
                addresses.extend(all.filter(|_| random.below(pages) < PILOT));
            }
            let result = Reader::open(self.host, subject.pid).and_then(|reader| {
                for batch in addresses.chunks(BATCH) {
                    let done = reader.read(batch, length, &mut buffer)?;
                    for (page, _) in buffer.chunks_exact(length).zip(done).filter(|(_, d)| *d) {
                        samples.extend_from_slice(page);
                    }
                }
                Ok(())
            });
            if let Err(why) = result {
                subject.lost = true;
                lost.add(subject.pid, why);
            }
        }
        self.sampler.pilot(samples.chunks_exact(length));
    }

    /// Gives the sampler a process's pages.
    fn read(&mut self, process: usize, subject: &Subject) -> Result<(), Unreadable> {
        let mut reader = Reader::open(self.host, subject.pid)?;
        // Once, so that it is known what the kernel can tell.
        reader.present(0, page_size())?;
        for batch in batches(&subject.runs) {
            let entries = entries(&reader, &batch)?;
            let (own, others): (Vec<_>, Vec<_>) = batch
                .into_iter()
                .zip(entries)
                .partition(|(_, entry)| entry.is_exclusive());
            self.pages(process, &reader, own, Reader::read_exclusive)?;
            self.pages(process, &reader, others, Reader::read)?;
            self.bar.inc(BATCH as u64);
        }
        Ok(())
    }

    fn pages(
        &mut self,
        process: usize,
        reader: &Reader,
        mut pages: Vec<(u64, PageEntry)>,
        read: Read,
    ) -> Result<(), Unreadable> {
        if self.sampler.rate() > 1 {
            let offset = self.sampler.offset() as u64;
            let at: Vec<u64> = pages.iter().map(|(a, _)| a + offset).collect();
            let done = read(reader, &at, PIECE, &mut self.buffer)?;
            let mut wanted = done
                .into_iter()
                .zip(self.buffer.chunks_exact(PIECE))
                .map(|(done, piece)| done && self.sampler.wants(piece));
            pages.retain(|_| wanted.next().unwrap_or(false));
        }
        let length = usize::try_from(page_size()).unwrap_or(4096);
        let at: Vec<u64> = pages.iter().map(|(address, _)| *address).collect();
        let done = read(reader, &at, length, &mut self.buffer)?;
        let contents = self.buffer.chunks_exact(length).zip(done);
        for ((address, entry), (bytes, _)) in pages.into_iter().zip(contents).filter(|p| p.1 .1) {
            self.frames_known &= entry.frame().is_some() || !entry.is_present();
            let frame = match reader.backing(entry, &self.flags) {
                Backing::Frame(frame) => frame,
                Backing::PerhapsZero if bytes.iter().any(|b| *b != 0) => Frame::Own,
                Backing::Zero | Backing::PerhapsZero => {
                    self.zero_mapped += 1;
                    continue;
                }
            };
            self.sampler.add(Place { process, address }, bytes, frame);
        }
        Ok(())
    }
}

/// The addresses of pages, some at a time.
fn batches(runs: &[Run]) -> impl Iterator<Item = Vec<u64>> + '_ {
    let page = page_size();
    let mut all = runs
        .iter()
        .flat_map(move |run| (0..run.pages()).map(move |i| run.start + i * page));
    std::iter::from_fn(move || {
        let batch: Vec<u64> = all.by_ref().take(BATCH).collect();
        (!batch.is_empty()).then_some(batch)
    })
}

/// The entries of these pages, of which those side by side are read in one go.
fn entries(reader: &Reader, pages: &[u64]) -> Result<Vec<PageEntry>, Unreadable> {
    let page = page_size();
    let mut all = Vec::with_capacity(pages.len());
    for run in pages.chunk_by(|a, b| a + page == *b) {
        let Some(start) = run.first() else {
            continue;
        };
        let wanted = all.len() + run.len();
        all.extend(reader.entries(*start, run.len() as u64)?);
        // Nothing is known of those that have gone.
        all.resize(wanted, PageEntry::default());
    }
    Ok(all)
}

/// The second look.
fn again(host: &Host, subjects: &[Subject], sampler: &mut Sampler) {
    let length = usize::try_from(page_size()).unwrap_or(4096);
    let places: Vec<Place> = sampler.places().collect();
    let mut buffer = Vec::new();
    let mut index = 0;
    for of_one in places.chunk_by(|a, b| a.process == b.process) {
        let reader = of_one
            .first()
            .and_then(|place| subjects.get(place.process))
            .and_then(|subject| Reader::open(host, subject.pid).ok());
        for batch in of_one.chunks(BATCH) {
            let addresses: Vec<u64> = batch.iter().map(|place| place.address).collect();
            let done = reader
                .as_ref()
                .and_then(|r| r.read(&addresses, length, &mut buffer).ok())
                .unwrap_or_default();
            for i in 0..batch.len() {
                let bytes = buffer.get(i * length..(i + 1) * length);
                let there = done.get(i).copied().unwrap_or(false);
                sampler.again(index, bytes.filter(|_| there));
                index += 1;
            }
        }
    }
}

impl Outcome {
    fn text(&self, width: usize) -> String {
        let none = &self.saving.none;
        let part = match self.one_of_contents {
            1 => "all contents".into(),
            n => format!("{} of contents", percent(100.0 / n as f64)),
        };
        let mut lines = vec![format!(
            "{}, {} of private memory; {part}, seed {}, {}",
            counted(self.processes, "process", "processes"),
            bytes(self.memory_bytes),
            self.seed,
            duration(Duration::from_secs_f64(self.seconds)),
        )];
        lines.push(format!(
            "none  {} in all, {} saved now, {} more",
            with_error(none.possible_bytes, none.possible_error_bytes),
            bytes(none.already_bytes),
            with_error(none.more_bytes, none.more_error_bytes),
        ));
        if none.zero_bytes > 0 {
            lines.push(format!(
                "      {} of it are pages of zeroes",
                bytes(none.zero_bytes)
            ));
        }
        if let Some(changing) = self.changing_bytes.filter(|n| *n > 0) {
            lines.push(format!("changing, left out: {}", bytes(changing)));
        }
        if self.swapped_bytes > 0 {
            lines.push(format!(
                "swapped, not looked at: {}",
                bytes(self.swapped_bytes)
            ));
        }
        if self.processes_not_sampled > 0 {
            lines.push(format!(
                "{} not looked at: with these it is more",
                counted(self.processes_not_sampled, "process", "processes")
            ));
        }
        if self.processes_unreadable > 0 {
            lines.push(format!(
                "{} could not be read",
                counted(self.processes_unreadable, "process", "processes")
            ));
        }
        if !self.frames_known {
            lines.push(
                "only root sees which pages fork has left shared: they count as equal".into(),
            );
        }
        let lines: Vec<String> = lines.iter().map(|line| wrap(line, width, 6)).collect();
        lines.join("\n")
    }
}

/// "5.9 GiB ± 210 MiB"
fn with_error(n: u64, error: u64) -> String {
    if error == 0 {
        bytes(n)
    } else {
        format!("{} ± {}", bytes(n), bytes(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits() {
        let all = |n| -> Vec<Process> {
            (1..=n)
                .map(|pid| Process {
                    pid,
                    ..Process::default()
                })
                .collect()
        };
        assert_eq!(limited(all(30), 10.0, 1).len(), 3);
        assert_eq!(limited(all(3), 10.0, 1).len(), 1);
        assert_eq!(limited(all(0), 10.0, 1).len(), 0);
        assert_eq!(limited(all(30), 10.0, 1), limited(all(30), 10.0, 1));
        assert_eq!(limited(all(30), 100.0, 1), all(30));
    }

    #[test]
    fn batches_cross_runs() {
        let page = page_size();
        let runs = [
            Run {
                start: 0,
                end: 300 * page,
            },
            Run {
                start: 400 * page,
                end: 700 * page,
            },
        ];
        let sizes: Vec<usize> = batches(&runs).map(|b| b.len()).collect();
        assert_eq!(sizes, [512, 88]);
        assert_eq!(batches(&runs).last().unwrap().last(), Some(&(699 * page)));
    }

    #[test]
    fn settle_takes_zero() {
        assert_eq!(settle("0"), Ok(Duration::ZERO));
        assert_eq!(settle("2.5"), Ok(Duration::from_millis(2500)));
        assert!(settle("-1").is_err());
    }
}
