// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl why`: why memory of processes is not merged.

use crate::backend::{self, Backend};
use crate::cli::Many;
use crate::device::{self, Device};
use crate::exit::{Failure, Status};
use crate::host::{Context, Host, KSM};
use crate::memory::{mappings, Kind, Reader, Unreadable, Vma};
use crate::process::{self, Process, Selector};
use crate::text::wrap;
use crate::units::{bytes, counted, page_size};
use serde::Serialize;

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub processes: Many,
}

/// What becomes of memory. The order is that of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Reason {
    Merged,
    SharedMemory,
    NotOptedIn,
    Excluded,
    Pinned,
    Unsplit,
    Unique,
    Changing,
    Fresh,
    Scanned,
    NotScanned,
    Unknown,
    File,
    Special,
    // What follows is no part of VmRSS.
    Hugetlb,
    Zero,
    Swapped,
    // And this is counted above, too.
    Huge,
    Userfaultfd,
}

impl Reason {
    fn text(self) -> &'static str {
        match self {
            Self::Merged => "merged",
            Self::SharedMemory => {
                "shared memory (memfd, shm): KSM merges private anonymous memory only"
            }
            Self::NotOptedIn => "not opted in: neither madvise nor prctl has opened it to merging",
            Self::Excluded => "excluded: a rule says never",
            Self::Pinned => "pinned: a device uses it, or I/O is under way",
            Self::Unsplit => "huge pages that cannot be split, as they are pinned",
            Self::Unique => "unique: no equal page has been found",
            Self::Changing => "changing: other between the last two looks",
            Self::Fresh => "new: looked at once, or not yet",
            Self::Scanned => "scanned: no partner, or changing",
            Self::NotScanned => "not scanned yet",
            Self::Unknown => "changed while it was looked at",
            Self::File => "file mappings: the page cache has each page once already",
            Self::Special => "special mappings: of devices, of the kernel, or droppable",
            Self::Hugetlb => "hugetlb: KSM does not look at it",
            Self::Zero => "zeroes that KSM has mapped to the zero page",
            Self::Swapped => "swapped: KSM does not look at it",
            Self::Huge => "huge pages: they are split where a part of them is merged",
            Self::Userfaultfd => "write-protected by userfaultfd: not merged while it is",
        }
    }

    /// Whether it is a part of VmRSS.
    fn is_resident(self) -> bool {
        self < Self::Hugetlb
    }

    /// Whether it is a part of other rows.
    fn is_part(self) -> bool {
        self >= Self::Huge
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Row {
    reason: Reason,
    bytes: u64,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

/// One process, or the total of several.
#[derive(Clone, Debug, Default, Serialize)]
struct Answer {
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<i32>,
    title: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<String>,
    /// VmRSS; `resident` sums to it.
    rss_bytes: u64,
    merged_bytes: u64,
    /// Each byte once.
    resident: Vec<Row>,
    /// Not a part of VmRSS.
    apart: Vec<Row>,
    /// Parts of what is resident that are worth knowing.
    of_it: Vec<Row>,
}

#[derive(Clone, Debug, Serialize)]
struct Outcome {
    implementation: &'static str,
    /// Whether rksm's own half is in the answers.
    engine: bool,
    processes: Vec<Answer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total: Option<Answer>,
    processes_unreadable: u64,
    processes_ended: u64,
}

pub fn run(args: &Args, cx: &Context) -> Result<Status, Failure> {
    let host = &cx.host;
    let backend = backend::detect(host)?;
    let selected = Selector::from(&args.processes).select(host)?;
    let mut status = Status::Ok;
    let device = match backend.is_rksm().then(|| Device::open(host)).transpose() {
        Ok(device) => device,
        Err(failure) => {
            eprintln!(
                "rksmctl: {}: what rksm itself knows is missing",
                failure.message
            );
            status = Status::Partial;
            None
        }
    };
    let machine = Machine::new(host, backend.as_ref())?;
    let mut outcome = Outcome {
        implementation: backend.name(),
        engine: device.is_some(),
        processes: Vec::new(),
        total: None,
        processes_unreadable: 0,
        processes_ended: 0,
    };
    let mut denied = None;
    for process in &selected {
        match machine.look(process, device.as_ref()) {
            Ok(answer) => outcome.processes.push(answer),
            Err(Missed::Ended) => outcome.processes_ended += 1,
            // Those of others may be told all the same.
            Err(Missed::Unreadable(failure)) => {
                outcome.processes_unreadable += 1;
                denied.get_or_insert(failure);
            }
        }
    }
    if outcome.processes.is_empty() {
        return Err(match denied {
            Some(failure) => failure,
            None if selected.is_empty() => Failure::failed("no process to look at"),
            None => Failure::failed(match selected.len() {
                1 => "the process has ended",
                _ => "all the processes have ended",
            }),
        });
    }
    if outcome.processes.len() > 1 {
        outcome.total = Some(total(&outcome.processes));
    }
    if denied.is_some() {
        status = Status::Partial;
    }
    cx.print(&outcome, || outcome.text(cx.width))?;
    Ok(status)
}

/// The same of one process as text, for those who show it elsewhere.
pub fn text_of(
    process: &Process,
    host: &Host,
    backend: &dyn Backend,
    device: Option<&Device>,
    width: usize,
) -> Result<String, Failure> {
    match Machine::new(host, backend)?.look(process, device) {
        Ok(answer) => Ok(answer.lines(width).join("\n")),
        Err(Missed::Ended) => Err(Failure::failed("the process has ended")),
        Err(Missed::Unreadable(failure)) => Err(failure),
    }
}

/// Why there is no answer.
enum Missed {
    Ended,
    Unreadable(Failure),
}

impl From<Failure> for Missed {
    fn from(failure: Failure) -> Self {
        Self::Unreadable(failure)
    }
}

/// What is the same for all processes.
struct Machine<'a> {
    host: &'a Host,
    backend: &'a dyn Backend,
    /// The scanner's `run`.
    run: u64,
}

/// Sums of what smaps tells, in bytes.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sums {
    file: u64,
    shared_memory: u64,
    special: u64,
    hugetlb: u64,
    not_opted_in: u64,
    /// Anonymous memory that is open to merging, and what is merged of it.
    mergeable: u64,
    merged: Option<u64>,
    huge: u64,
    swapped: u64,
}

fn sums(vmas: &[Vma]) -> Sums {
    let mut sums = Sums::default();
    for vma in vmas {
        sums.hugetlb += vma.hugetlb;
        sums.swapped += vma.swap;
        match vma.kind() {
            Kind::Hugetlb => {}
            Kind::Special => sums.special += vma.rss,
            Kind::Shared if vma.is_shared_memory() => sums.shared_memory += vma.rss,
            Kind::Shared => sums.file += vma.rss,
            Kind::Private => {
                sums.file += vma.rss.saturating_sub(vma.anonymous);
                if vma.has("mg") {
                    sums.mergeable += vma.anonymous;
                    sums.huge += vma.anon_huge;
                    if let Some(ksm) = vma.ksm {
                        *sums.merged.get_or_insert(0) += ksm;
                    }
                } else {
                    sums.not_opted_in += vma.anonymous;
                }
            }
        }
    }
    sums
}

impl<'a> Machine<'a> {
    fn new(host: &'a Host, backend: &'a dyn Backend) -> Result<Self, Failure> {
        Ok(Self {
            host,
            backend,
            run: host.value_if_there(format!("{KSM}/run"))?.unwrap_or(1),
        })
    }

    fn look(&self, process: &Process, device: Option<&Device>) -> Result<Answer, Missed> {
        let (host, pid) = (self.host, process.pid);
        let vmas = match mappings(host, pid) {
            Ok(vmas) => vmas,
            Err(Unreadable::Ended) => return Err(Missed::Ended),
            Err(Unreadable::Denied(reason)) => {
                let message = format!("cannot read the mappings of process {pid}: {reason}");
                return Err(Failure::failed(message).into());
            }
        };
        let engine = match device.map(|d| d.why(pid)).transpose() {
            Ok(engine) => engine,
            Err(_) if !host.exists(format!("/proc/{pid}")) => return Err(Missed::Ended),
            Err(failure) => return Err(failure.into()),
        };
        // As near to the mappings as can be.
        match process::read(host, pid)? {
            Some(now) => Ok(self.answer(&now, &vmas, engine.as_ref())),
            None => Err(Missed::Ended),
        }
    }

    fn answer(&self, process: &Process, vmas: &[Vma], engine: Option<&device::Why>) -> Answer {
        let page = page_size();
        let sums = sums(vmas);
        let stat = &process.ksm;
        let pages = |n: Option<u64>| n.unwrap_or(0) * page;
        let mut rows = vec![
            (Reason::File, sums.file),
            (Reason::SharedMemory, sums.shared_memory),
            (Reason::Special, sums.special),
            (Reason::NotOptedIn, sums.not_opted_in),
            (Reason::Hugetlb, sums.hugetlb),
            (Reason::Swapped, sums.swapped),
            (Reason::Huge, sums.huge),
            (Reason::Userfaultfd, self.write_protected(process.pid, vmas)),
        ];
        // What is left of the mergeable memory, as each reason takes its part.
        let mut left = sums.mergeable;
        let mut take = |reason, bytes: u64| {
            let bytes = bytes.min(left);
            left -= bytes;
            (reason, bytes)
        };
        let zero = if let Some(why) = engine {
            rows.push(take(Reason::Merged, why.merged));
            if why.excluded {
                rows.push(take(Reason::Excluded, u64::MAX));
            }
            rows.extend([
                take(Reason::Pinned, why.pinned),
                take(Reason::Unsplit, why.unsplit),
                take(Reason::Unique, why.unique),
                take(Reason::Changing, why.changing),
                take(Reason::Fresh, why.fresh),
                take(Reason::Unknown, u64::MAX),
            ]);
            why.zero
        } else {
            let merged = sums.merged.unwrap_or_else(|| pages(stat.merging_pages));
            let items = pages(stat.rmap_items);
            rows.extend([
                take(Reason::Merged, merged),
                take(
                    Reason::Scanned,
                    items.saturating_sub(pages(stat.merging_pages)),
                ),
                take(Reason::NotScanned, u64::MAX),
            ]);
            pages(stat.zero_pages)
        };
        rows.push((Reason::Zero, zero));
        let mut rows: Vec<Row> = rows
            .into_iter()
            .filter(|(_, bytes)| *bytes > 0)
            .map(|(reason, bytes)| Row {
                reason,
                bytes,
                remedy: self.remedy(reason, process),
            })
            .collect();
        rows.sort_by_key(|row| row.reason);
        answer(Answer {
            pid: Some(process.pid),
            title: process.title().to_string(),
            unit: process.unit.clone(),
            rss_bytes: process.rss_bytes,
            resident: rows,
            ..Answer::default()
        })
    }

    /// Present pages that userfaultfd has write-protected, in bytes. 0 where it cannot be read.
    fn write_protected(&self, pid: i32, vmas: &[Vma]) -> u64 {
        let page = page_size();
        let mut found = 0;
        for vma in vmas.iter().filter(|v| v.has("uw") && v.has("mg")) {
            let Ok(reader) = Reader::open(self.host, pid) else {
                return 0;
            };
            let mut at = vma.start;
            while at < vma.end {
                let entries = reader
                    .entries(at, (vma.end - at) / page)
                    .unwrap_or_default();
                if entries.is_empty() {
                    break;
                }
                at += entries.len() as u64 * page;
                let of_them = entries.iter().filter(|e| e.is_present() && e.is_uffd_wp());
                found += of_them.count() as u64 * page;
            }
        }
        found
    }

    fn remedy(&self, reason: Reason, process: &Process) -> Option<String> {
        let pid = process.pid;
        let program = process
            .cmdline
            .first()
            .and_then(|path| path.rsplit('/').next())
            .unwrap_or_default();
        let text = match reason {
            Reason::SharedMemory if program.starts_with("cloud-hypervisor") => {
                "start with --memory shared=off (vhost-user and virtiofs need it on)".into()
            }
            Reason::SharedMemory if program.starts_with("qemu") || program.contains("kvm") => {
                "use memory-backend-ram instead of memory-backend-memfd or -file, without \
                 share=on (vhost-user and virtiofs need it)"
                    .into()
            }
            Reason::SharedMemory => "only the program itself can map it privately".into(),
            Reason::NotOptedIn if self.backend.is_rksm() => format!("rksmctl enable {pid}"),
            Reason::NotOptedIn => "start it by rksmctl run, or with MemoryKSM=yes in its unit \
                 (rksmctl enable needs rksm)"
                .into(),
            // Most often that of a cgroup, which no verb about the process takes away.
            Reason::Excluded => "rksmctl rules shows it, rksmctl disable takes it away".into(),
            Reason::Pinned | Reason::Unsplit => {
                "give it no device by VFIO, and let io_uring register none of it; I/O that is \
                 under way ends by itself"
                    .into()
            }
            Reason::Fresh | Reason::NotScanned | Reason::Scanned if self.run != 1 => {
                format!("the scanner is stopped: echo 1 >{KSM}/run")
            }
            Reason::Fresh => format!("wait for the scanner, or rksmctl merge {pid}"),
            Reason::NotScanned => "wait for the scanner, or rksmctl tune fast".into(),
            Reason::Scanned if !self.backend.is_rksm() => "rksm would tell which".into(),
            Reason::Hugetlb => "use transparent huge pages instead: KSM splits these".into(),
            Reason::Userfaultfd => "wait until the snapshot or migration is done".into(),
            _ => return None,
        };
        Some(text)
    }
}

/// Sorts rows, all in `resident`, into what is and what is not.
fn answer(mut from: Answer) -> Answer {
    let rows = std::mem::take(&mut from.resident);
    for row in rows {
        if row.reason == Reason::Merged {
            from.merged_bytes = row.bytes;
        }
        if row.reason.is_resident() {
            from.resident.push(row);
        } else if row.reason.is_part() {
            from.of_it.push(row);
        } else {
            from.apart.push(row);
        }
    }
    from
}

/// All of them together, without remedies, which are for one.
fn total(all: &[Answer]) -> Answer {
    let mut rows: Vec<Row> = Vec::new();
    for row in all
        .iter()
        .flat_map(|a| a.resident.iter().chain(&a.apart).chain(&a.of_it))
    {
        match rows.iter_mut().find(|r| r.reason == row.reason) {
            Some(sum) => sum.bytes += row.bytes,
            None => rows.push(Row {
                remedy: None,
                ..row.clone()
            }),
        }
    }
    rows.sort_by_key(|row| row.reason);
    answer(Answer {
        title: counted(all.len() as u64, "process", "processes"),
        rss_bytes: all.iter().map(|a| a.rss_bytes).sum(),
        resident: rows,
        ..Answer::default()
    })
}

impl Answer {
    fn lines(&self, width: usize) -> Vec<String> {
        let name = match self.pid {
            Some(pid) => format!("{} ({pid})", self.title),
            None => self.title.clone(),
        };
        let mut lines = vec![wrap(
            &format!(
                "{name}, {} resident: {} merged",
                bytes(self.rss_bytes),
                bytes(self.merged_bytes)
            ),
            width,
            2,
        )];
        let mut largest_first: Vec<&Row> = self.resident.iter().collect();
        largest_first.sort_by_key(|row| std::cmp::Reverse(row.bytes));
        let parts = [
            ("", largest_first),
            ("apart from these", self.apart.iter().collect()),
            ("of these", self.of_it.iter().collect()),
        ];
        for (title, rows) in parts {
            if !title.is_empty() && !rows.is_empty() {
                lines.push(format!(" {title}"));
            }
            for row in rows {
                let amount = bytes(row.bytes);
                let text = row.reason.text();
                lines.push(wrap(&format!("{amount:>10}  {text}"), width, 12));
                if let Some(remedy) = &row.remedy {
                    let arrow = format!("{:1$}→ {remedy}", "", 12.min(width / 4));
                    lines.push(wrap(&arrow, width, 14));
                }
            }
        }
        lines
    }
}

impl Outcome {
    fn text(&self, width: usize) -> String {
        let mut lines = Vec::new();
        for answer in self.processes.iter().chain(&self.total) {
            lines.extend(answer.lines(width));
        }
        if self.processes_unreadable > 0 {
            let text = counted(self.processes_unreadable, "process", "processes");
            lines.push(wrap(&format!("{text} could not be read"), width, 2));
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;
    use crate::memory::parse_smaps;

    const SMAPS: &str = "\
10000000-20000000 rw-p 00000000 00:00 0
Rss: 1000 kB
Anonymous: 1000 kB
VmFlags: rd wr mr mw me mg
30000000-40000000 rw-p 00000000 00:00 0
Rss: 24 kB
Anonymous: 24 kB
VmFlags: rd wr mr mw me
";

    fn answer_of(why: &device::Why) -> Answer {
        let fixture = Fixture::new();
        fixture.rksm();
        let host = Host::new(fixture.root());
        let backend = backend::detect(&host).unwrap();
        let machine = Machine {
            host: &host,
            backend: backend.as_ref(),
            run: 1,
        };
        let process = Process {
            pid: 7,
            rss_bytes: 1024 << 10,
            ..Process::default()
        };
        machine.answer(&process, &parse_smaps(SMAPS), Some(why))
    }

    fn rows(rows: &[Row]) -> Vec<(Reason, u64)> {
        rows.iter().map(|r| (r.reason, r.bytes >> 10)).collect()
    }

    /// What rksm knows, and what has changed since the mappings were read.
    #[test]
    fn engine() {
        let why = device::Why {
            merged: 300 << 10,
            zero: 64 << 10,
            pinned: 8 << 10,
            unsplit: 4 << 10,
            unique: 500 << 10,
            changing: 100 << 10,
            fresh: 60 << 10,
            ..device::Why::default()
        };
        let answer = answer_of(&why);
        assert_eq!(
            rows(&answer.resident),
            [
                (Reason::Merged, 300),
                (Reason::NotOptedIn, 24),
                (Reason::Pinned, 8),
                (Reason::Unsplit, 4),
                (Reason::Unique, 500),
                (Reason::Changing, 100),
                (Reason::Fresh, 60),
                (Reason::Unknown, 28),
            ]
        );
        assert_eq!(rows(&answer.apart), [(Reason::Zero, 64)]);
        assert_eq!(answer.merged_bytes, 300 << 10);
        let sum: u64 = answer.resident.iter().map(|r| r.bytes).sum();
        assert_eq!(sum, answer.rss_bytes);
        let remedy = |reason| {
            let mut all = answer.resident.iter();
            all.find(|r| r.reason == reason).unwrap().remedy.clone()
        };
        assert_eq!(remedy(Reason::NotOptedIn).unwrap(), "rksmctl enable 7");
        assert_eq!(remedy(Reason::Unique), None);
    }

    /// More than the mappings hold: never more than VmRSS.
    #[test]
    fn engine_says_more() {
        let why = device::Why {
            merged: 900 << 10,
            unique: 900 << 10,
            ..device::Why::default()
        };
        let answer = answer_of(&why);
        assert_eq!(
            rows(&answer.resident),
            [
                (Reason::Merged, 900),
                (Reason::NotOptedIn, 24),
                (Reason::Unique, 100)
            ]
        );
    }

    #[test]
    fn excluded() {
        let why = device::Why {
            excluded: true,
            fresh: 1000 << 10,
            ..device::Why::default()
        };
        assert_eq!(
            rows(&answer_of(&why).resident),
            [(Reason::NotOptedIn, 24), (Reason::Excluded, 1000)]
        );
    }

    /// A total is of all, without what is for one.
    #[test]
    fn totals() {
        let one = answer_of(&device::Why {
            merged: 1000 << 10,
            ..device::Why::default()
        });
        let sum = total(&[one.clone(), one]);
        assert_eq!(
            rows(&sum.resident),
            [(Reason::Merged, 2000), (Reason::NotOptedIn, 48)]
        );
        assert_eq!((sum.merged_bytes, sum.rss_bytes), (2000 << 10, 2048 << 10));
        assert!(sum.resident.iter().all(|r| r.remedy.is_none()));
    }
}
