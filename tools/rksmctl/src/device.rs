// SPDX-License-Identifier: GPL-2.0-only
//! /dev/rksm, by which rksm is told what to do with processes that are not ours.

use crate::exit::{reason, Failure};
use crate::host::{Host, KSM, RKSM};
use crate::units::AddressRange;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The device.
pub const PATH: &str = "/dev/rksm";

/// The arguments of the calls, as in tools/include/uapi/linux/rksm.h.
pub mod abi {
    pub const RULE: u32 = 0xBD00;
    pub const RULES: u32 = 0xBD01;
    pub const MERGE: u32 = 0xBD02;
    pub const UNMERGE: u32 = 0xBD03;
    pub const STAT: u32 = 0xBD04;
    pub const WHY: u32 = 0xBD05;

    pub const RULE_DEFAULT: u32 = 0;
    pub const RULE_ALWAYS: u32 = 1;
    pub const RULE_NEVER: u32 = 2;
    pub const RULE_REMOVE: u32 = 1 << 0;
    pub const STAT_EXCLUDED: u32 = 1 << 0;
    pub const STAT_MERGE_ANY: u32 = 1 << 1;
    pub const MERGE_ENABLE: u32 = 1 << 0;
    pub const UNMERGE_DISABLE: u32 = 1 << 0;

    pub const NR_REFUSALS: usize = 16;
    /// Those that have a name, in their order.
    pub const REFUSALS: [&str; 11] = [
        "gone",
        "locked",
        "pinned",
        "differs",
        "unsplit",
        "same",
        "no_memory",
        "busy",
        "stale",
        "far_node",
        "userfault",
    ];

    #[repr(C)]
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Rule {
        pub size: u32,
        pub flags: u32,
        pub pidfd: i32,
        pub action: u32,
        pub path: u64,
        pub path_len: u32,
        pub reserved: u32,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug, Default)]
    pub struct List {
        pub size: u32,
        pub flags: u32,
        pub cursor: u64,
        pub records: u64,
        pub len: u32,
        pub count: u32,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug, Default)]
    pub struct RuleRecord {
        pub size: u32,
        pub action: u32,
        pub pid: i32,
        pub path_len: u32,
        pub processes: u32,
        pub reserved: u32,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug, Default)]
    pub struct StatRecord {
        pub size: u32,
        pub flags: u32,
        pub pid: i32,
        pub reserved: u32,
        pub merged: u64,
        pub unique: u64,
        pub changing: u64,
        pub fresh: u64,
        pub zero: u64,
        pub broken: u64,
        pub refused: [u64; NR_REFUSALS],
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Merge {
        pub size: u32,
        pub flags: u32,
        pub pidfd: i32,
        pub reserved: u32,
        pub start: u64,
        pub end: u64,
        pub at: u64,
        pub scanned: u64,
        pub merged: u64,
        pub zeroed: u64,
        pub bytes_saved: i64,
        pub refused: [u64; NR_REFUSALS],
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Unmerge {
        pub size: u32,
        pub flags: u32,
        pub pidfd: i32,
        pub reserved: u32,
        pub start: u64,
        pub end: u64,
        pub at: u64,
        pub pages: u64,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Why {
        pub size: u32,
        pub flags: u32,
        pub pidfd: i32,
        pub reserved: u32,
        pub at: u64,
        pub merged: u64,
        pub zero: u64,
        pub pinned: u64,
        pub unsplit: u64,
        pub unique: u64,
        pub changing: u64,
        pub fresh: u64,
    }
}

/// One call. What an argument points to is beside it; the addresses are filled in by [`Kernel`].
pub enum Call<'a> {
    Rule(&'a mut abi::Rule, &'a str),
    Rules(&'a mut abi::List, &'a mut [u8]),
    Merge(&'a mut abi::Merge),
    Unmerge(&'a mut abi::Unmerge),
    Stat(&'a mut abi::List, &'a mut [u8]),
    Why(&'a mut abi::Why),
}

/// Who answers the calls: the kernel, or a test.
pub trait Kernel {
    /// A pidfd.
    fn open_process(&self, pid: i32) -> Result<OwnedFd, Errno>;
    fn call(&self, call: Call<'_>) -> Result<(), Errno>;
    /// Whether the user wants an end of it.
    fn interrupted(&self) -> bool {
        interrupted()
    }
}

struct Real {
    device: File,
}

impl Real {
    fn ioctl<T>(&self, number: u32, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: The argument is the struct that this number is for, and is borrowed as mutable
        // for the call. Its own `size`, which is that of `T`, bounds what is read and written.
        let result = unsafe {
            libc::ioctl(
                self.device.as_raw_fd(),
                number.into(),
                std::ptr::from_mut(argument),
            )
        };
        Errno::result(result).map(drop)
    }

    fn list(&self, number: u32, list: &mut abi::List, buffer: &mut [u8]) -> Result<(), Errno> {
        list.records = buffer.as_mut_ptr() as u64;
        list.len = u32::try_from(buffer.len()).map_err(|_| Errno::EINVAL)?;
        self.ioctl(number, list)
    }
}

impl Kernel for Real {
    fn open_process(&self, pid: i32) -> Result<OwnedFd, Errno> {
        // SAFETY: The call reads no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = i32::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
        // SAFETY: It has just been opened, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn call(&self, call: Call<'_>) -> Result<(), Errno> {
        match call {
            Call::Rule(rule, path) => {
                if !path.is_empty() {
                    rule.path = path.as_ptr() as u64;
                    rule.path_len = u32::try_from(path.len()).map_err(|_| Errno::ENAMETOOLONG)?;
                }
                self.ioctl(abi::RULE, rule)
            }
            Call::Rules(list, buffer) => self.list(abi::RULES, list, buffer),
            Call::Merge(merge) => self.ioctl(abi::MERGE, merge),
            Call::Unmerge(unmerge) => self.ioctl(abi::UNMERGE, unmerge),
            Call::Stat(list, buffer) => self.list(abi::STAT, list, buffer),
            Call::Why(why) => self.ioctl(abi::WHY, why),
        }
    }
}

/// What a rule is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    Process(i32),
    /// A path below the mount of cgroup v2, from "/"; and all below it.
    Cgroup(String),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(pid) => write!(f, "process {pid}"),
            Self::Cgroup(path) => write!(f, "cgroup {path}"),
        }
    }
}

/// What a rule says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// As the processes themselves say.
    Default,
    /// As if they had asked for it.
    Always,
    /// Whatever they ask for.
    Never,
}

impl Action {
    pub const ALL: [Self; 3] = [Self::Default, Self::Always, Self::Never];

    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Always => "always",
            Self::Never => "never",
        }
    }

    fn number(self) -> u32 {
        match self {
            Self::Default => abi::RULE_DEFAULT,
            Self::Always => abi::RULE_ALWAYS,
            Self::Never => abi::RULE_NEVER,
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A rule, and the processes to which it applied when rules were last applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub subject: Subject,
    pub action: Action,
    pub processes: u32,
}

/// What a merge on request has done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Merged {
    /// Pages that were looked at.
    pub scanned: u64,
    /// Pages that have become mappings of a merged page, and of the zero page.
    pub merged: u64,
    pub zeroed: u64,
    pub bytes_saved: i64,
    /// Pages not merged, by reason; only those above zero.
    pub refused: BTreeMap<String, u64>,
    /// Why it ended early, in one sentence.
    pub stopped: Option<String>,
}

/// What an unmerge has done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Unmerged {
    /// Pages that have been given a copy of their own.
    pub pages: u64,
    /// Why it ended early, in one sentence.
    pub stopped: Option<String>,
}

/// One process whose memory is registered; pages of 4096 bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    /// 0 where it has none in our pid namespace.
    pub pid: i32,
    /// A rule says never.
    pub excluded: bool,
    /// All its memory is open to merging, not only what it marked.
    pub merge_any: bool,
    pub merged: u64,
    pub unique: u64,
    pub changing: u64,
    pub fresh: u64,
    pub zero: u64,
    /// Merged pages that have been written to since.
    pub broken: u64,
    /// Pages not merged, by reason; only those above zero.
    pub refused: BTreeMap<String, u64>,
}

/// The present pages of a process's mergeable memory, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Why {
    pub excluded: bool,
    pub merge_any: bool,
    pub merged: u64,
    pub zero: u64,
    pub pinned: u64,
    pub unsplit: u64,
    pub unique: u64,
    pub changing: u64,
    pub fresh: u64,
}

/// How far a merge or unmerge is, in bytes of mapped memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub done: u64,
    pub total: u64,
}

/// The device, opened.
pub struct Device {
    kernel: Box<dyn Kernel>,
    host: Host,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").finish_non_exhaustive()
    }
}

/// How going over a process ended.
enum Stop {
    End,
    /// Before it, for this reason.
    Early(String),
    /// No piece has anything mergeable.
    Nothing,
}

/// Mapped bytes between two reports of progress.
const PIECE: u64 = 256 << 20;
/// How often in a row a call without memory is tried again.
const TRIES: u32 = 5;
/// More than a record can have.
const BUFFER: usize = 64 << 10;

impl Device {
    /// Opens it; without rksm it fails with [`Failure::needs_rksm`].
    pub fn open(host: &Host) -> Result<Self, Failure> {
        Self::open_for(host, PATH)
    }

    /// The same; without rksm the failure says that `what` needs it.
    pub fn open_for(host: &Host, what: &str) -> Result<Self, Failure> {
        if !host.exists(RKSM) {
            return Err(Failure::needs_rksm(what));
        }
        match File::options().read(true).write(true).open(host.path(PATH)) {
            Ok(device) => Ok(Self::with(Box::new(Real { device }), host)),
            Err(e) => Err(open_failure(host, &e)),
        }
    }

    /// One that `kernel` answers for.
    pub fn with(kernel: Box<dyn Kernel>, host: &Host) -> Self {
        Self {
            kernel,
            host: host.clone(),
        }
    }

    /// Whether the user wants an end of it: Ctrl-C, see [`catch_interrupts`].
    pub fn interrupted(&self) -> bool {
        self.kernel.interrupted()
    }

    /// Sets a rule, in place of one that the subject has.
    pub fn rule(&self, subject: &Subject, action: Action) -> Result<(), Failure> {
        let rule = abi::Rule {
            action: action.number(),
            ..abi::Rule::default()
        };
        self.set(subject, rule)
            .map_err(|e| self.rule_failure(subject, e))
    }

    /// Removes the rule of a subject. False where there was none.
    pub fn remove(&self, subject: &Subject) -> Result<bool, Failure> {
        let rule = abi::Rule {
            flags: abi::RULE_REMOVE,
            ..abi::Rule::default()
        };
        match self.set(subject, rule) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(e) => Err(self.rule_failure(subject, e)),
        }
    }

    fn set(&self, subject: &Subject, mut rule: abi::Rule) -> Result<(), Errno> {
        rule.size = size::<abi::Rule>();
        match subject {
            Subject::Process(pid) => {
                let pidfd = self.kernel.open_process(*pid)?;
                rule.pidfd = pidfd.as_raw_fd();
                self.kernel.call(Call::Rule(&mut rule, ""))
            }
            Subject::Cgroup(path) => {
                rule.pidfd = -1;
                self.kernel.call(Call::Rule(&mut rule, path))
            }
        }
    }

    fn rule_failure(&self, subject: &Subject, errno: Errno) -> Failure {
        match (subject, errno) {
            (_, Errno::ENOSPC) => Failure::failed("rksm has as many rules as it can hold"),
            (Subject::Process(pid), _) => self.failure(*pid, errno),
            (Subject::Cgroup(path), Errno::ENOENT) => Failure::failed(format!("no cgroup {path}")),
            (Subject::Cgroup(path), Errno::ENAMETOOLONG) => {
                Failure::failed(format!("the path of cgroup {path} is too long"))
            }
            (Subject::Cgroup(path), _) => self
                .mismatch_of(errno)
                .unwrap_or_else(|| Failure::failed(errno.desc()))
                .context(format!("cgroup {path}")),
        }
    }

    /// All rules.
    pub fn rules(&self) -> Result<Vec<Rule>, Failure> {
        self.list(|list, buffer| Call::Rules(list, buffer), rule_record)
    }

    /// All processes whose memory is registered.
    pub fn stats(&self) -> Result<Vec<Stat>, Failure> {
        self.list(|list, buffer| Call::Stat(list, buffer), stat_record)
    }

    fn list<T>(
        &self,
        call: impl for<'a> Fn(&'a mut abi::List, &'a mut [u8]) -> Call<'a>,
        parse: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, Failure> {
        let mut all = Vec::new();
        let mut buffer = vec![0; BUFFER];
        let mut cursor = 0;
        loop {
            let mut list = abi::List {
                size: size::<abi::List>(),
                cursor,
                ..abi::List::default()
            };
            match self.kernel.call(call(&mut list, &mut buffer)) {
                Ok(()) => {}
                Err(Errno::EINTR) if !self.interrupted() => continue,
                Err(Errno::EINTR) => return Err(Failure::failed("interrupted")),
                Err(e) => {
                    return Err(self.mismatch_of(e).unwrap_or_else(|| {
                        Failure::failed(e.desc()).context(format!("cannot read {PATH}"))
                    }))
                }
            }
            if list.count == 0 {
                return Ok(all);
            }
            if list.cursor == cursor {
                return Err(self.mismatch());
            }
            cursor = list.cursor;
            let mut rest = buffer.as_slice();
            for _ in 0..list.count {
                let (record, others) = split_record(rest).ok_or_else(|| self.mismatch())?;
                all.push(parse(record).ok_or_else(|| self.mismatch())?);
                rest = others;
            }
        }
    }

    /// Merges what is equal in a process now, or in a range of it; with `enable` all its memory is
    /// opened to merging before.
    pub fn merge(
        &self,
        pid: i32,
        range: Option<AddressRange>,
        enable: bool,
        mut progress: impl FnMut(Progress, &Merged),
    ) -> Result<Merged, Failure> {
        let pidfd = self.process(pid)?;
        let mut total = Merged::default();
        let mut enabling = enable;
        let stopped = self.pieces(pid, range, |start, end, done| {
            let mut merge = abi::Merge {
                size: size::<abi::Merge>(),
                flags: if enabling { abi::MERGE_ENABLE } else { 0 },
                pidfd: pidfd.as_raw_fd(),
                start,
                end,
                at: start,
                ..abi::Merge::default()
            };
            let result = self.kernel.call(Call::Merge(&mut merge));
            // With other errors nothing has been filled in.
            if matches!(result, Ok(()) | Err(Errno::EINTR | Errno::ENOMEM)) {
                total.scanned += merge.scanned;
                total.merged += merge.merged;
                total.zeroed += merge.zeroed;
                total.bytes_saved += merge.bytes_saved;
                add_refused(&mut total.refused, &merge.refused);
            }
            if matches!(result, Ok(()) | Err(Errno::ENODATA)) {
                enabling = false;
            }
            progress(done, &total);
            (result, merge.at)
        })?;
        total.stopped = match stopped {
            Stop::End => None,
            Stop::Early(why) => Some(why),
            Stop::Nothing if enable => {
                return Err(Failure::failed(format!(
                    "process {pid} has no memory that could be merged{}",
                    if range.is_some() { " there" } else { "" }
                )))
            }
            Stop::Nothing => return Err(self.failure(pid, Errno::ENODATA)),
        };
        Ok(total)
    }

    /// Unmerges a process, or a range of it; with `disable`, which is for all of it, none of its
    /// memory is open to merging afterwards.
    pub fn unmerge(
        &self,
        pid: i32,
        range: Option<AddressRange>,
        disable: bool,
        mut progress: impl FnMut(Progress, &Unmerged),
    ) -> Result<Unmerged, Failure> {
        let pidfd = self.process(pid)?;
        let mut total = Unmerged::default();
        let step = |start, end, done| {
            let mut unmerge = abi::Unmerge {
                size: size::<abi::Unmerge>(),
                flags: if disable { abi::UNMERGE_DISABLE } else { 0 },
                pidfd: pidfd.as_raw_fd(),
                start,
                end,
                at: start,
                ..abi::Unmerge::default()
            };
            let result = self.kernel.call(Call::Unmerge(&mut unmerge));
            if matches!(result, Ok(()) | Err(Errno::EINTR | Errno::ENOMEM)) {
                total.pages += unmerge.pages;
            }
            progress(done, &total);
            (result, unmerge.at)
        };
        let stopped = if disable {
            // In one piece: between two the scanner could merge again what is not yet closed.
            self.repeat(pid, &[(0, u64::MAX, 0)], step)?
        } else {
            self.pieces(pid, range, step)?
        };
        if let Stop::Early(why) = stopped {
            total.stopped = Some(why);
        }
        Ok(total)
    }

    /// What becomes of the pages of a process.
    pub fn why(&self, pid: i32) -> Result<Why, Failure> {
        let pidfd = self.process(pid)?;
        let mut total = Why::default();
        let mut at = 0;
        loop {
            let mut why = abi::Why {
                size: size::<abi::Why>(),
                pidfd: pidfd.as_raw_fd(),
                at,
                ..abi::Why::default()
            };
            match self.kernel.call(Call::Why(&mut why)) {
                Ok(()) => {}
                Err(Errno::EINTR) if !self.interrupted() => {}
                Err(Errno::EINTR) => return Err(Failure::failed("interrupted")),
                // Nothing of it is mergeable.
                Err(Errno::ENODATA) => return Ok(total),
                Err(e) => return Err(self.failure(pid, e)),
            }
            total.excluded |= why.flags & abi::STAT_EXCLUDED != 0;
            total.merge_any |= why.flags & abi::STAT_MERGE_ANY != 0;
            total.merged += why.merged;
            total.zero += why.zero;
            total.pinned += why.pinned;
            total.unsplit += why.unsplit;
            total.unique += why.unique;
            total.changing += why.changing;
            total.fresh += why.fresh;
            if why.at == u64::MAX {
                return Ok(total);
            }
            if why.at < at {
                return Err(self.mismatch());
            }
            at = why.at;
        }
    }

    fn process(&self, pid: i32) -> Result<OwnedFd, Failure> {
        self.kernel.open_process(pid).map_err(|e| match e {
            Errno::ESRCH => Failure::failed(format!("no process {pid}")),
            // Which of the two depends on the kernel.
            Errno::EINVAL | Errno::ENOENT => {
                Failure::failed(format!("{pid} is a thread, not a process"))
            }
            e => Failure::failed(e.desc()).context(format!("process {pid}")),
        })
    }

    /// Does `step` for all of a range or of the process, piece by piece.
    fn pieces(
        &self,
        pid: i32,
        range: Option<AddressRange>,
        step: impl FnMut(u64, u64, Progress) -> (Result<(), Errno>, u64),
    ) -> Result<Stop, Failure> {
        let maps = self.host.read_if_there(format!("/proc/{pid}/maps"))?;
        self.repeat(pid, &pieces(&maps.unwrap_or_default(), range), step)
    }

    /// Does `step` for each piece, again from where it ended where it was interrupted. Says why
    /// it did not come to the end, and fails where nothing at all was done.
    fn repeat(
        &self,
        pid: i32,
        pieces: &[(u64, u64, u64)],
        mut step: impl FnMut(u64, u64, Progress) -> (Result<(), Errno>, u64),
    ) -> Result<Stop, Failure> {
        let total = pieces.iter().map(|(_, _, mapped)| mapped).sum();
        let mut done = 0;
        let mut any = false;
        for (start, end, mapped) in pieces {
            done += mapped;
            let (mut start, mut tries) = (*start, 0);
            loop {
                if self.interrupted() {
                    return Ok(Stop::Early("interrupted".into()));
                }
                let (result, at) = step(start, *end, Progress { done, total });
                // With other errors nothing has been filled in.
                let filled = matches!(result, Ok(()) | Err(Errno::EINTR | Errno::ENOMEM));
                let moved = filled && at > start;
                any |= moved;
                match result {
                    Ok(()) => {
                        any = true;
                        break;
                    }
                    // Nothing mergeable here; there may be in other pieces.
                    Err(Errno::ENODATA) => break,
                    Err(Errno::EINTR) => {}
                    Err(Errno::ENOMEM) if moved || tries < TRIES => {
                        tries = if moved { 0 } else { tries + 1 };
                        std::thread::sleep(Duration::from_millis(20));
                    }
                    Err(e) if any => return Ok(Stop::Early(self.failure(pid, e).message)),
                    Err(e) => return Err(self.failure(pid, e)),
                }
                if at < start || at > *end {
                    return Err(self.mismatch());
                }
                start = at;
                if start == *end {
                    break;
                }
            }
        }
        Ok(if any { Stop::End } else { Stop::Nothing })
    }

    /// Whether there is such a process, without memory.
    fn lacks_memory(&self, pid: i32) -> bool {
        let status = self.host.read_if_there(format!("/proc/{pid}/status"));
        matches!(status, Ok(Some(text)) if !text.contains("\nVmRSS:"))
    }

    /// What an error of a call about a process means.
    fn failure(&self, pid: i32, errno: Errno) -> Failure {
        Failure::failed(match errno {
            // A thread of the kernel, or one that its parent has not waited for.
            Errno::ESRCH if self.lacks_memory(pid) => {
                format!("process {pid} has no memory of its own")
            }
            Errno::ESRCH => format!("process {pid} has ended"),
            Errno::EBUSY => {
                if matches!(self.host.value_if_there(format!("{KSM}/run")), Ok(Some(2))) {
                    format!("rksm is unmerging all: write 0 or 1 to {KSM}/run first")
                } else {
                    format!("process {pid} still runs in the memory of its parent: try again")
                }
            }
            Errno::EPERM => format!("a rule says never for process {pid}"),
            Errno::ENODATA => {
                format!("nothing of process {pid} is open to merging: try merge --enable")
            }
            Errno::ENOMEM => "the kernel has no memory left for it".into(),
            Errno::EINTR => "interrupted".into(),
            e => match self.mismatch_of(e) {
                Some(mismatch) => return mismatch,
                None => format!("process {pid}: {}", e.desc()),
            },
        })
    }

    fn mismatch_of(&self, errno: Errno) -> Option<Failure> {
        matches!(errno, Errno::ENOTTY | Errno::E2BIG | Errno::EINVAL).then(|| self.mismatch())
    }

    /// The module is older than this program, or newer.
    fn mismatch(&self) -> Failure {
        Failure::failed(format!(
            "this rksmctl ({}) and the loaded rksm ({}) do not fit each other",
            env!("CARGO_PKG_VERSION"),
            version(&self.host)
        ))
    }
}

/// Why the device cannot be opened.
fn open_failure(host: &Host, error: &std::io::Error) -> Failure {
    Failure::failed(match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => {
            format!("{PATH} is for root (CAP_SYS_ADMIN on the host) only")
        }
        Some(libc::ENOENT) => format!(
            "rksm {} has no {PATH}: it is older than this, or /dev is not devtmpfs",
            version(host)
        ),
        _ => format!("cannot open {PATH}: {}", reason(error)),
    })
}

/// rksm's version, for messages.
fn version(host: &Host) -> String {
    host.read(format!("{RKSM}/version"))
        .unwrap_or_else(|_| "of unknown version".into())
}

/// What `size` of an argument is to be.
fn size<T>() -> u32 {
    u32::try_from(std::mem::size_of::<T>()).unwrap_or(0)
}

/// Cuts mapped memory into pieces of about [`PIECE`]: start, end, and bytes mapped. Together they
/// are the whole range, with what is not mapped now.
fn pieces(maps: &str, range: Option<AddressRange>) -> Vec<(u64, u64, u64)> {
    let (first, last) = range.map_or((0, u64::MAX), |r| (r.start, r.end));
    let hex = |s: &str| u64::from_str_radix(s, 16).ok();
    let mut pieces = Vec::new();
    let (mut from, mut mapped) = (first, 0);
    let areas = maps.lines().filter_map(|line| {
        let (start, rest) = line.split_once('-')?;
        let end = rest.split(' ').next()?;
        Some((hex(start)?.max(first), hex(end)?.min(last)))
    });
    for (mut start, end) in areas {
        while start < end {
            let n = (end - start).min(PIECE - mapped);
            start += n;
            mapped += n;
            if mapped == PIECE && start < last {
                pieces.push((from, start, mapped));
                (from, mapped) = (start, 0);
            }
        }
    }
    pieces.push((from, last, mapped));
    pieces
}

/// The first of several records, by its size.
fn split_record(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let size = usize::try_from(u32_at(bytes, 0)?).ok()?;
    (size % 8 == 0 && size >= 8).then(|| bytes.split_at_checked(size))?
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(field.try_into().ok()?))
}

fn i32_at(bytes: &[u8], at: usize) -> Option<i32> {
    Some(i32::from_ne_bytes(u32_at(bytes, at)?.to_ne_bytes()))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_ne_bytes(field.try_into().ok()?))
}

fn rule_record(record: &[u8]) -> Option<Rule> {
    use abi::RuleRecord as R;
    use std::mem::offset_of;
    const FIXED: usize = std::mem::size_of::<R>();
    let number = u32_at(record, offset_of!(R, action))?;
    let action = Action::ALL.into_iter().find(|a| a.number() == number)?;
    let pid = i32_at(record, offset_of!(R, pid))?;
    let len = usize::try_from(u32_at(record, offset_of!(R, path_len))?).ok()?;
    // A longer fixed part would have the path elsewhere.
    if record.len() != FIXED.checked_add(len)?.checked_next_multiple_of(8)? {
        return None;
    }
    let path = record.get(FIXED..FIXED + len)?;
    let subject = match (pid, path) {
        (0, [b'/', ..]) => Subject::Cgroup(String::from_utf8_lossy(path).into_owned()),
        (1.., []) => Subject::Process(pid),
        _ => return None,
    };
    Some(Rule {
        subject,
        action,
        processes: u32_at(record, offset_of!(R, processes))?,
    })
}

fn stat_record(record: &[u8]) -> Option<Stat> {
    use abi::StatRecord as R;
    use std::mem::offset_of;
    // What a newer module adds is behind what is known here.
    if record.len() < std::mem::size_of::<R>() {
        return None;
    }
    let flags = u32_at(record, offset_of!(R, flags))?;
    let mut numbers = [0; abi::NR_REFUSALS];
    for (i, n) in numbers.iter_mut().enumerate() {
        *n = u64_at(record, offset_of!(R, refused) + 8 * i)?;
    }
    let mut refused = BTreeMap::new();
    add_refused(&mut refused, &numbers);
    Some(Stat {
        pid: i32_at(record, offset_of!(R, pid))?,
        excluded: flags & abi::STAT_EXCLUDED != 0,
        merge_any: flags & abi::STAT_MERGE_ANY != 0,
        merged: u64_at(record, offset_of!(R, merged))?,
        unique: u64_at(record, offset_of!(R, unique))?,
        changing: u64_at(record, offset_of!(R, changing))?,
        fresh: u64_at(record, offset_of!(R, fresh))?,
        zero: u64_at(record, offset_of!(R, zero))?,
        broken: u64_at(record, offset_of!(R, broken))?,
        refused,
    })
}

/// Adds those above zero; "other" are those that a newer module has.
fn add_refused(to: &mut BTreeMap<String, u64>, numbers: &[u64; abi::NR_REFUSALS]) {
    for (i, n) in numbers.iter().enumerate().filter(|(_, n)| **n > 0) {
        let name = abi::REFUSALS.get(i).copied().unwrap_or("other");
        *to.entry(name.into()).or_default() += n;
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupt(_: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// From now on Ctrl-C and SIGTERM end a long call instead of the program: it returns what was
/// done so far.
pub fn catch_interrupts() -> Result<(), Failure> {
    use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
    // Without SA_RESTART, so that a call under way returns.
    let action = SigAction::new(
        SigHandler::Handler(interrupt),
        SaFlags::empty(),
        SigSet::empty(),
    );
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: The handler only stores to an atomic.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

/// Whether one of them has come.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// A kernel for the tests of this crate: it answers calls as if rksm were loaded.
#[cfg(test)]
pub mod fake {
    use super::*;
    use crate::fixture::Fixture;
    use crate::host::Context;
    use std::cell::RefCell;
    use std::collections::{HashMap, VecDeque};
    use std::rc::Rc;

    /// What the kernel knows, and what it is to answer.
    #[derive(Default)]
    pub struct State {
        /// The processes there are.
        pub pids: Vec<i32>,
        pidfds: HashMap<i32, i32>,
        pub rules: Vec<Rule>,
        /// The bytes of RULES or STAT, if they are not to be made of `rules`; one for each call.
        pub lists: VecDeque<(u32, Vec<u8>)>,
        /// Answers of MERGE; the last goes for all that follow.
        pub merges: VecDeque<(Result<(), Errno>, abi::Merge)>,
        pub unmerges: VecDeque<(Result<(), Errno>, abi::Unmerge)>,
        pub whys: VecDeque<(Result<(), Errno>, abi::Why)>,
        /// Whether cursors stay where they are.
        pub stuck: bool,
        /// What RULE fails with.
        pub rule_error: Option<Errno>,
        /// Ctrl-C comes after so many questions whether it has.
        pub patience: Option<u32>,
        /// All calls, in words.
        pub log: Vec<String>,
    }

    /// Files of a host with rksm and some processes, and what a verb is told of it.
    pub(crate) fn rksm_host() -> (Fixture, Context) {
        let fixture = Fixture::new();
        fixture.rksm();
        fixture.processes();
        let cx = Context {
            host: Host::new(fixture.root()),
            json: false,
            width: 80,
        };
        (fixture, cx)
    }

    #[derive(Clone, Default)]
    pub struct Fake(pub Rc<RefCell<State>>);

    impl Fake {
        pub fn new(pids: &[i32]) -> Self {
            let fake = Self::default();
            fake.0.borrow_mut().pids = pids.into();
            fake
        }

        pub fn device(&self, host: &Host) -> Device {
            Device::with(Box::new(self.clone()), host)
        }

        pub fn log(&self) -> Vec<String> {
            std::mem::take(&mut self.0.borrow_mut().log)
        }
    }

    /// Compares with tests/golden/NAME.txt, as the tests of the program do.
    #[track_caller]
    pub fn golden(name: &str, text: &str) {
        let path = format!("{}/tests/golden/{name}.txt", env!("CARGO_MANIFEST_DIR"));
        let text = format!("{}\n", text.trim_end());
        if std::env::var("RKSM_GOLDEN").is_ok_and(|v| v == "write") {
            std::fs::write(&path, &text).unwrap();
        }
        let expected = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(text, expected, "not as {path}");
    }

    /// The bytes of a rule, as RULES gives them.
    pub fn record(rule: &Rule) -> Vec<u8> {
        let (pid, path) = match &rule.subject {
            Subject::Process(pid) => (*pid, ""),
            Subject::Cgroup(path) => (0, path.as_str()),
        };
        let size = (24 + path.len()).next_multiple_of(8);
        let mut bytes = Vec::new();
        for n in [
            size as u32,
            rule.action.number(),
            pid as u32,
            path.len() as u32,
            rule.processes,
            0,
        ] {
            bytes.extend(n.to_ne_bytes());
        }
        bytes.extend(path.as_bytes());
        bytes.resize(size, 0);
        bytes
    }

    fn next<T: Copy>(answers: &mut VecDeque<T>) -> Option<T> {
        match answers.len() {
            1 => answers.front().copied(),
            _ => answers.pop_front(),
        }
    }

    impl State {
        fn pid_of(&self, pidfd: i32) -> Result<i32, Errno> {
            let pid = *self.pidfds.get(&pidfd).ok_or(Errno::EBADF)?;
            self.pids.contains(&pid).then_some(pid).ok_or(Errno::ESRCH)
        }

        fn fill(&mut self, list: &mut abi::List, buffer: &mut [u8]) {
            assert_eq!(list.size, 32);
            let (count, bytes) = match self.lists.pop_front() {
                Some(answer) => answer,
                // One rule a call, so that the cursor is used.
                None => match self.rules.get(list.cursor as usize) {
                    Some(rule) => (1, record(rule)),
                    None => (0, Vec::new()),
                },
            };
            buffer[..bytes.len()].copy_from_slice(&bytes);
            if !self.stuck {
                list.cursor += u64::from(count);
            }
            list.count = count;
        }
    }

    impl Kernel for Fake {
        fn interrupted(&self) -> bool {
            match &mut self.0.borrow_mut().patience {
                None => false,
                Some(0) => true,
                Some(n) => {
                    *n -= 1;
                    false
                }
            }
        }

        fn open_process(&self, pid: i32) -> Result<OwnedFd, Errno> {
            let mut state = self.0.borrow_mut();
            if !state.pids.contains(&pid) {
                return Err(Errno::ESRCH);
            }
            let fd = OwnedFd::from(File::open("/dev/null").unwrap());
            state.pidfds.insert(fd.as_raw_fd(), pid);
            Ok(fd)
        }

        fn call(&self, call: Call<'_>) -> Result<(), Errno> {
            let mut state = self.0.borrow_mut();
            match call {
                Call::Rule(rule, path) => {
                    assert_eq!((rule.size, rule.reserved), (32, 0));
                    if let Some(e) = state.rule_error {
                        return Err(e);
                    }
                    let subject = if rule.pidfd == -1 {
                        Subject::Cgroup(path.into())
                    } else {
                        assert!(path.is_empty());
                        Subject::Process(state.pid_of(rule.pidfd)?)
                    };
                    let before = state.rules.len();
                    state.rules.retain(|r| r.subject != subject);
                    if rule.flags == abi::RULE_REMOVE {
                        assert_eq!(rule.action, 0);
                        state.log.push(format!("remove {subject}"));
                        let found = state.rules.len() < before;
                        return found.then_some(()).ok_or(Errno::ENOENT);
                    }
                    assert_eq!(rule.flags, 0);
                    let action = Action::ALL[rule.action as usize];
                    state.log.push(format!("{action} {subject}"));
                    state.rules.push(Rule {
                        subject,
                        action,
                        processes: 1,
                    });
                    Ok(())
                }
                Call::Rules(list, buffer) | Call::Stat(list, buffer) => {
                    state.fill(list, buffer);
                    Ok(())
                }
                Call::Merge(merge) => {
                    assert_eq!(merge.size, 200);
                    let pid = state.pid_of(merge.pidfd)?;
                    let (flags, start, end) = (merge.flags, merge.start, merge.end);
                    state
                        .log
                        .push(format!("merge {pid} {flags} {start:x}-{end:x}"));
                    let (result, answer) = next(&mut state.merges).unwrap();
                    let at = if answer.at == 0 { end } else { answer.at };
                    *merge = abi::Merge { at, ..answer };
                    result
                }
                Call::Unmerge(unmerge) => {
                    assert_eq!(unmerge.size, 48);
                    let pid = state.pid_of(unmerge.pidfd)?;
                    let (flags, start, end) = (unmerge.flags, unmerge.start, unmerge.end);
                    state
                        .log
                        .push(format!("unmerge {pid} {flags} {start:x}-{end:x}"));
                    let (result, answer) = next(&mut state.unmerges).unwrap();
                    let at = if answer.at == 0 { end } else { answer.at };
                    *unmerge = abi::Unmerge { at, ..answer };
                    result
                }
                Call::Why(why) => {
                    assert_eq!(why.size, 80);
                    let pid = state.pid_of(why.pidfd)?;
                    state.log.push(format!("why {pid} {:x}", why.at));
                    let (result, answer) = next(&mut state.whys).unwrap();
                    *why = answer;
                    result
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fake::{record, Fake};
    use super::*;
    use crate::fixture::Fixture;
    use std::mem::{offset_of, size_of};

    fn device(fake: &Fake) -> (Fixture, Device) {
        let fixture = Fixture::new();
        fixture.rksm();
        let device = fake.device(&Host::new(fixture.root()));
        (fixture, device)
    }

    const MISMATCH: &str = concat!(
        "this rksmctl (",
        env!("CARGO_PKG_VERSION"),
        ") and the loaded rksm (0.4.0) do not fit each other"
    );

    /// Name, size and offset of each field of the structs in the header.
    fn fields(header: &str, name: &str) -> Vec<(String, usize, usize)> {
        let (_, rest) = header.split_once(&format!("struct {name} {{")).unwrap();
        let (body, _) = rest.split_once("};").unwrap();
        let mut fields = Vec::new();
        let mut offset = 0;
        for line in body.lines().filter_map(|l| l.split_once(';')) {
            let (kind, name) = line.0.trim().split_once(' ').unwrap();
            let one = match kind {
                "__u32" | "__s32" => 4,
                "__u64" | "__s64" => 8,
                kind => panic!("{kind}"),
            };
            let (name, size) = match name.split_once('[') {
                Some((name, "RKSM_NR_REFUSALS]")) => (name, one * abi::NR_REFUSALS),
                Some(_) => panic!("{name}"),
                None => (name, one),
            };
            assert_eq!(offset % one, 0, "a hole before {name}");
            fields.push((name.to_string(), offset, size));
            offset += size;
        }
        fields
    }

    macro_rules! same {
        ($header:expr, $name:expr, $t:ty, $($field:ident)*) => {
            let fields = fields($header, $name);
            let value = <$t>::default();
            let ours = [$({
                let at = offset_of!($t, $field);
                (stringify!($field), at, size_of_val(&value.$field))
            }),*];
            let theirs: Vec<_> = fields.iter().map(|(n, o, s)| (n.as_str(), *o, *s)).collect();
            assert_eq!(theirs, ours, "{}", $name);
            assert_eq!(theirs.iter().map(|f| f.2).sum::<usize>(), size_of::<$t>());
        };
    }

    #[test]
    fn as_the_header() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../include/uapi/linux/rksm.h");
        // The module's side of the tree need not be there.
        let Ok(header) = std::fs::read_to_string(path) else {
            return;
        };
        let define = |name: &str| {
            header
                .lines()
                .find_map(|l| {
                    l.strip_prefix("#define ")?
                        .strip_prefix(name)?
                        .strip_prefix(' ')
                })
                .unwrap_or_else(|| panic!("no {name}"))
                .split("/*")
                .next()
                .unwrap()
                .trim()
        };
        assert_eq!(define("RKSM_IOC_MAGIC"), "0xBD");
        for (name, number) in [
            ("RULE", abi::RULE),
            ("RULES", abi::RULES),
            ("MERGE", abi::MERGE),
            ("UNMERGE", abi::UNMERGE),
            ("STAT", abi::STAT),
            ("WHY", abi::WHY),
        ] {
            // _IO has neither size nor direction.
            let expected = format!("_IO(RKSM_IOC_MAGIC, {})", number - 0xBD00);
            assert_eq!(define(&format!("RKSM_IOC_{name}")), expected);
        }
        for (name, number) in [
            ("RULE_DEFAULT", abi::RULE_DEFAULT),
            ("RULE_ALWAYS", abi::RULE_ALWAYS),
            ("RULE_NEVER", abi::RULE_NEVER),
            ("NR_REFUSALS", abi::NR_REFUSALS as u32),
        ] {
            assert_eq!(
                define(&format!("RKSM_{name}")),
                number.to_string(),
                "{name}"
            );
        }
        for (name, flag) in [
            ("RULE_REMOVE", abi::RULE_REMOVE),
            ("STAT_EXCLUDED", abi::STAT_EXCLUDED),
            ("STAT_MERGE_ANY", abi::STAT_MERGE_ANY),
            ("MERGE_ENABLE", abi::MERGE_ENABLE),
            ("UNMERGE_DISABLE", abi::UNMERGE_DISABLE),
        ] {
            let expected = format!("(1 << {})", flag.trailing_zeros());
            assert_eq!(define(&format!("RKSM_{name}")), expected, "{name}");
        }
        let (_, names) = header.split_once("#define RKSM_REFUSALS").unwrap();
        let (names, _) = names.split_once("\n\n").unwrap();
        let names: Vec<&str> = names.split('"').skip(1).step_by(2).collect();
        assert_eq!(names, abi::REFUSALS);

        let h = &header;
        same!(h, "rksm_rule", abi::Rule, size flags pidfd action path path_len reserved);
        same!(h, "rksm_list", abi::List, size flags cursor records len count);
        same!(h, "rksm_rule_record", abi::RuleRecord, size action pid path_len processes reserved);
        same!(h, "rksm_stat_record", abi::StatRecord, size flags pid reserved merged unique changing
            fresh zero broken refused);
        same!(h, "rksm_merge", abi::Merge, size flags pidfd reserved start end at scanned merged
            zeroed bytes_saved refused);
        same!(h, "rksm_unmerge", abi::Unmerge, size flags pidfd reserved start end at pages);
        same!(h, "rksm_why", abi::Why, size flags pidfd reserved at merged zero pinned unsplit
            unique changing fresh);
    }

    #[test]
    fn opening() {
        let fixture = Fixture::new();
        fixture.builtin();
        let host = Host::new(fixture.root());
        assert_eq!(Device::open(&host).unwrap_err().status, 3);
        fixture.rksm();
        let failure = Device::open(&host).unwrap_err();
        assert_eq!(failure.status, 1);
        assert_eq!(
            failure.message,
            "rksm 0.4.0 has no /dev/rksm: it is older than this, or /dev is not devtmpfs"
        );
        for errno in [libc::EACCES, libc::EPERM] {
            let error = std::io::Error::from_raw_os_error(errno);
            assert_eq!(
                open_failure(&host, &error).message,
                "/dev/rksm is for root (CAP_SYS_ADMIN on the host) only"
            );
        }
        // Not a device: no call is known.
        fixture.file("/dev/rksm", "");
        let device = Device::open(&host).unwrap();
        assert_eq!(device.rules().unwrap_err().message, MISMATCH);
    }

    #[test]
    fn rules() {
        let fake = Fake::new(&[7]);
        let (_fixture, device) = device(&fake);
        let group = Subject::Cgroup("/a.slice".into());
        device.rule(&Subject::Process(7), Action::Always).unwrap();
        device.rule(&group, Action::Always).unwrap();
        device.rule(&group, Action::Never).unwrap();
        let rules = device.rules().unwrap();
        assert_eq!(rules.len(), 2);
        assert_eq!(rules[0].subject, Subject::Process(7));
        assert_eq!(
            (&rules[1].subject, rules[1].action),
            (&group, Action::Never)
        );
        assert_eq!(device.remove(&group), Ok(true));
        assert_eq!(device.remove(&group), Ok(false));
        assert_eq!(
            device
                .rule(&Subject::Process(8), Action::Never)
                .unwrap_err()
                .message,
            "process 8 has ended"
        );
        fake.0.borrow_mut().rule_error = Some(Errno::E2BIG);
        assert_eq!(
            device.rule(&group, Action::Never).unwrap_err().message,
            format!("cgroup /a.slice: {MISMATCH}")
        );
    }

    #[test]
    fn records_of_another_module_are_refused() {
        let fake = Fake::new(&[]);
        let (_fixture, device) = device(&fake);
        let good = record(&Rule {
            subject: Subject::Cgroup("/abc".into()),
            action: Action::Never,
            processes: 3,
        });
        assert_eq!(good.len(), 32);
        let with = |at: usize, n: u32| {
            let mut bytes = good.clone();
            bytes[at..at + 4].copy_from_slice(&n.to_ne_bytes());
            bytes
        };
        let mut longer = with(0, 40);
        longer.resize(40, 0);
        for bad in [
            with(0, 0),       // no size
            with(0, 20),      // not of 8
            with(0, 1 << 20), // over the end
            with(4, 3),       // an action that is not known
            with(8, 5),       // a process with a path
            with(12, 9),      // a path over the end
            with(12, u32::MAX),
            longer, // more in front of the path
        ] {
            fake.0.borrow_mut().lists.push_back((1, bad));
            assert_eq!(device.rules().unwrap_err().message, MISMATCH);
        }
        let answers = [(1, good), (0, Vec::new())];
        fake.0.borrow_mut().lists.extend(answers.clone());
        assert_eq!(device.rules().unwrap().len(), 1);
        // Nor would a cursor that stays end.
        fake.0.borrow_mut().lists.extend(answers);
        fake.0.borrow_mut().stuck = true;
        assert_eq!(device.rules().unwrap_err().message, MISMATCH);
    }

    fn stat(size: usize, pid: i32, merged: u64) -> Vec<u8> {
        let mut bytes = vec![0; size];
        let mut put = |at: usize, b: &[u8]| bytes[at..at + b.len()].copy_from_slice(b);
        put(0, &(size as u32).to_ne_bytes());
        put(4, &2u32.to_ne_bytes());
        put(8, &pid.to_ne_bytes());
        put(16, &merged.to_ne_bytes());
        put(64 + 2 * 8, &113u64.to_ne_bytes());
        put(64 + 15 * 8, &5u64.to_ne_bytes());
        bytes
    }

    #[test]
    fn stats() {
        let fake = Fake::new(&[]);
        let (_fixture, device) = device(&fake);
        {
            let lists = &mut fake.0.borrow_mut().lists;
            // A newer module's are longer.
            lists.push_back((2, [stat(192, 1, 10), stat(208, 2, 20)].concat()));
            lists.push_back((1, stat(192, 3, 30)));
            lists.push_back((0, Vec::new()));
        }
        let stats = device.stats().unwrap();
        let merged: Vec<_> = stats.iter().map(|s| (s.pid, s.merged)).collect();
        assert_eq!(merged, [(1, 10), (2, 20), (3, 30)]);
        assert!(stats[0].merge_any && !stats[0].excluded);
        assert_eq!(stats[0].refused["pinned"], 113);
        assert_eq!(stats[0].refused["other"], 5);
        let mut short = stat(192, 1, 10);
        short[..4].copy_from_slice(&184u32.to_ne_bytes());
        fake.0.borrow_mut().lists.push_back((1, short));
        assert_eq!(device.stats().unwrap_err().message, MISMATCH);
    }

    fn merged(at: u64, pages: u64) -> abi::Merge {
        let mut refused = [0; 16];
        refused[2] = 1;
        abi::Merge {
            at,
            scanned: pages,
            merged: pages / 2,
            bytes_saved: 4096,
            refused,
            ..abi::Merge::default()
        }
    }

    #[test]
    fn merge_goes_on_where_it_was_interrupted() {
        let fake = Fake::new(&[7]);
        let (_fixture, device) = device(&fake);
        fake.0.borrow_mut().merges.extend([
            (Err(Errno::EINTR), merged(0x5000, 4)),
            (Err(Errno::ENOMEM), merged(0x9000, 4)),
            (Ok(()), merged(0, 2)),
        ]);
        let mut reports = 0;
        let total = device.merge(7, None, true, |_, _| reports += 1).unwrap();
        assert_eq!(
            (total.scanned, total.merged, total.bytes_saved),
            (10, 5, 3 * 4096)
        );
        assert_eq!(total.refused["pinned"], 3);
        assert_eq!((total.stopped, reports), (None, 3));
        assert_eq!(
            fake.log(),
            [
                "merge 7 1 0-ffffffffffffffff",
                "merge 7 1 5000-ffffffffffffffff",
                "merge 7 1 9000-ffffffffffffffff"
            ]
        );
    }

    #[test]
    fn merge_in_pieces() {
        let fake = Fake::new(&[7]);
        let (fixture, device) = device(&fake);
        fixture.file(
            "/proc/7/maps",
            "10000000-30000000 rw-p 00000000 00:00 0 [heap]\n\
             7f0000000000-7f0000001000 rw-p 00000000 00:00 0\n",
        );
        fake.0.borrow_mut().merges.push_back((Ok(()), merged(0, 1)));
        let mut last = None;
        device.merge(7, None, true, |p, _| last = Some(p)).unwrap();
        assert_eq!(
            fake.log(),
            [
                "merge 7 1 0-20000000",
                "merge 7 0 20000000-30000000",
                "merge 7 0 30000000-ffffffffffffffff"
            ]
        );
        let total = 0x2000_1000;
        assert_eq!(last, Some(Progress { done: total, total }));
        let range = AddressRange {
            start: 0x1000_1000,
            end: 0x2000_1000,
        };
        device.merge(7, Some(range), false, |_, _| {}).unwrap();
        assert_eq!(fake.log(), ["merge 7 0 10001000-20001000"]);
    }

    #[test]
    fn merge_that_ends_early() {
        let fake = Fake::new(&[7]);
        let (fixture, device) = device(&fake);
        let fail = |e: Errno| {
            let none = abi::Merge {
                // To be ignored.
                scanned: 77,
                ..abi::Merge::default()
            };
            fake.0.borrow_mut().merges = [(Err(e), none)].into();
            device.merge(7, None, false, |_, _| {}).unwrap_err().message
        };
        assert_eq!(fail(Errno::ESRCH), "process 7 has ended");
        assert_eq!(fail(Errno::EPERM), "a rule says never for process 7");
        assert_eq!(
            fail(Errno::ENODATA),
            "nothing of process 7 is open to merging: try merge --enable"
        );
        assert_eq!(
            fail(Errno::EBUSY),
            "process 7 still runs in the memory of its parent: try again"
        );
        fixture.file("/sys/kernel/mm/ksm/run", "2\n");
        assert_eq!(
            fail(Errno::EBUSY),
            "rksm is unmerging all: write 0 or 1 to /sys/kernel/mm/ksm/run first"
        );
        for e in [Errno::ENOTTY, Errno::E2BIG, Errno::EINVAL] {
            assert_eq!(fail(e), MISMATCH);
        }
        assert_eq!(
            device.merge(8, None, false, |_, _| {}).unwrap_err().message,
            "no process 8"
        );

        fake.0.borrow_mut().merges = [
            (Err(Errno::EINTR), merged(0x5000, 4)),
            (Err(Errno::ESRCH), merged(0, 77)),
        ]
        .into();
        let total = device.merge(7, None, false, |_, _| {}).unwrap();
        assert_eq!(total.scanned, 4);
        assert_eq!(total.stopped.unwrap(), "process 7 has ended");

        fixture.file("/proc/7/status", "Name:\tkthreadd\nThreads:\t1\n");
        assert_eq!(fail(Errno::ESRCH), "process 7 has no memory of its own");

        // One that goes backwards would never end.
        fake.0.borrow_mut().patience = Some(9);
        fake.0.borrow_mut().merges = [
            (Err(Errno::EINTR), merged(0x5000, 4)),
            (Err(Errno::EINTR), merged(0x4000, 4)),
        ]
        .into();
        let failure = device.merge(7, None, false, |_, _| {}).unwrap_err();
        assert_eq!(failure.message, MISMATCH);
    }

    #[test]
    fn interrupts_end_it_with_what_was_done() {
        let fake = Fake::new(&[7]);
        let (_fixture, device) = device(&fake);
        fake.0.borrow_mut().merges = [(Err(Errno::EINTR), merged(0x5000, 4))].into();
        fake.0.borrow_mut().patience = Some(1);
        let total = device.merge(7, None, false, |_, _| {}).unwrap();
        assert_eq!(
            (total.scanned, total.stopped),
            (4, Some("interrupted".into()))
        );
        assert_eq!(fake.log().len(), 1);
        // A call that ends well is not called interrupted.
        fake.0.borrow_mut().merges = [(Ok(()), merged(0, 4))].into();
        fake.0.borrow_mut().patience = Some(1);
        let total = device.merge(7, None, false, |_, _| {}).unwrap();
        assert_eq!((total.scanned, total.stopped), (4, None));
    }

    #[test]
    fn signals() {
        use nix::sys::signal::{raise, signal, SigHandler, Signal};
        catch_interrupts().unwrap();
        assert!(!interrupted());
        raise(Signal::SIGTERM).unwrap();
        assert!(INTERRUPTED.swap(false, Ordering::Relaxed));
        for s in [Signal::SIGINT, Signal::SIGTERM] {
            // SAFETY: The default action has no handler to be sound.
            unsafe { signal(s, SigHandler::SigDfl) }.unwrap();
        }
    }

    #[test]
    fn no_memory_is_not_tried_for_ever() {
        let fake = Fake::new(&[7]);
        let (_fixture, device) = device(&fake);
        let nothing = abi::Merge {
            at: 0x1000,
            ..abi::Merge::default()
        };
        fake.0.borrow_mut().merges = [(Err(Errno::ENOMEM), nothing)].into();
        let total = device.merge(7, None, false, |_, _| {}).unwrap();
        assert_eq!(
            total.stopped.unwrap(),
            "the kernel has no memory left for it"
        );
    }

    #[test]
    fn unmerging() {
        let fake = Fake::new(&[7]);
        let (fixture, device) = device(&fake);
        fixture.file("/proc/7/maps", "10000000-30000000 rw-p 00000000 00:00 0\n");
        let pages = |pages| abi::Unmerge {
            pages,
            ..abi::Unmerge::default()
        };
        fake.0.borrow_mut().unmerges = [(Ok(()), pages(3))].into();
        assert_eq!(device.unmerge(7, None, false, |_, _| {}).unwrap().pages, 9);
        assert_eq!(device.unmerge(7, None, true, |_, _| {}).unwrap().pages, 3);
        assert_eq!(fake.log().last().unwrap(), "unmerge 7 1 0-ffffffffffffffff");
        fake.0.borrow_mut().unmerges = [(Err(Errno::ENODATA), pages(0))].into();
        assert_eq!(
            device.unmerge(7, None, true, |_, _| {}).unwrap(),
            Unmerged::default()
        );
    }

    #[test]
    fn whys() {
        let fake = Fake::new(&[7]);
        let (_fixture, device) = device(&fake);
        let why = |at| abi::Why {
            at,
            flags: 1,
            merged: 4096,
            unique: 8192,
            ..abi::Why::default()
        };
        fake.0.borrow_mut().whys = [
            (Ok(()), why(0x1000)),
            (Err(Errno::EINTR), why(0x3000)),
            (Ok(()), why(u64::MAX)),
        ]
        .into();
        let total = device.why(7).unwrap();
        assert_eq!((total.merged, total.unique), (3 * 4096, 3 * 8192));
        assert!(total.excluded && !total.merge_any);
        assert_eq!(fake.log(), ["why 7 0", "why 7 1000", "why 7 3000"]);
    }
}
