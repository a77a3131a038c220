// SPDX-License-Identifier: GPL-2.0-only

//! The files of `/sys/kernel/mm/ksm`: their names and modes, what a write to each means, and
//! what a read of each shows.
//!
//! A write is parsed and checked into a [`Change`] before any lock is taken, and takes effect
//! afterwards, so that a rejected write leaves everything as it was:
//!
//! ```text
//! bytes ── File::parse ──► Change ── Knobs::apply ──► Action ── the caller acts
//!             │ EINVAL, ERANGE          │ EINVAL, EBUSY
//! ```
//!
//! Numbers, words and errnos are those of the built-in, to the byte.

use super::{
    advisor,
    stats::Snapshot, //
};

use kernel::{
    fmt,
    prelude::*, //
};

/// `pages_to_scan` when there is no advisor.
const DEFAULT_PAGES_TO_SCAN: u32 = 100;

/// The least `max_page_sharing`: a merged page is made from two.
const MIN_PAGE_SHARING: i32 = 2;

/// A file of `/sys/kernel/mm/ksm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum File {
    /// Milliseconds that the scanner sleeps between two batches.
    SleepMillisecs,
    /// Pages to scan in one batch; set by the advisor if there is one.
    PagesToScan,
    /// 0: stopped, 1: scanning, 2: stopped, and everything unmerged.
    Run,
    /// Pages looked at, ever.
    PagesScanned,
    /// Merged pages in use.
    PagesShared,
    /// Mappings of merged pages beyond the first of each.
    PagesSharing,
    /// Pages that are unchanged, but unique.
    PagesUnshared,
    /// Pages that change too often to be merged.
    PagesVolatile,
    /// Pages passed over by smart scan, ever.
    PagesSkipped,
    /// Mappings of the zero page in place of pages of zeroes.
    KsmZeroPages,
    /// Full scans completed.
    FullScans,
    /// Whether pages of different NUMA nodes are merged. Changes only while nothing is merged.
    MergeAcrossNodes,
    /// Mappings that one merged page may have. Changes only while nothing is merged.
    MaxPageSharing,
    /// Contents that are held by several merged pages.
    StableNodeChains,
    /// Merged pages that hold such contents.
    StableNodeDups,
    /// How often such contents are searched for stale merged pages, in milliseconds.
    StableNodeChainsPruneMillisecs,
    /// Whether pages of zeroes are merged with the zero page.
    UseZeroPages,
    /// Bytes saved less bytes of metadata.
    GeneralProfit,
    /// Whether pages that find no partner are looked at less often.
    SmartScan,
    /// Who sets `pages_to_scan`: `none`, or `scan-time`.
    AdvisorMode,
    /// Limit on the scanner's CPU share that the advisor keeps, percent.
    AdvisorMaxCpu,
    /// `pages_to_scan` that the advisor starts from.
    AdvisorMinPagesToScan,
    /// `pages_to_scan` that the advisor does not exceed.
    AdvisorMaxPagesToScan,
    /// Seconds that a full scan is to take.
    AdvisorTargetScanTime,
    /// Threads that share the scanning. The built-in has no such file.
    ScanThreads,
}

/// Who may do what with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 0444.
    ReadOnly,
    /// 0644.
    ReadWrite,
}

impl Mode {
    /// The permission bits.
    pub const fn bits(self) -> u16 {
        match self {
            Self::ReadOnly => 0o444,
            Self::ReadWrite => 0o644,
        }
    }
}

/// A row of [`FILES`].
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Which file it is.
    pub file: File,
    /// Its name in `/sys/kernel/mm/ksm`.
    pub name: &'static str,
    /// Who may do what with it.
    pub mode: Mode,
}

const fn row(file: File, name: &'static str, mode: Mode) -> Row {
    Row { file, name, mode }
}

/// The files, the built-in's in the order of its attributes. A file of our own goes at the end.
pub const FILES: &[Row] = &{
    use File::*;
    use Mode::*;

    [
        row(SleepMillisecs, "sleep_millisecs", ReadWrite),
        row(PagesToScan, "pages_to_scan", ReadWrite),
        row(Run, "run", ReadWrite),
        row(PagesScanned, "pages_scanned", ReadOnly),
        row(PagesShared, "pages_shared", ReadOnly),
        row(PagesSharing, "pages_sharing", ReadOnly),
        row(PagesUnshared, "pages_unshared", ReadOnly),
        row(PagesVolatile, "pages_volatile", ReadOnly),
        row(PagesSkipped, "pages_skipped", ReadOnly),
        row(KsmZeroPages, "ksm_zero_pages", ReadOnly),
        row(FullScans, "full_scans", ReadOnly),
        row(MergeAcrossNodes, "merge_across_nodes", ReadWrite),
        row(MaxPageSharing, "max_page_sharing", ReadWrite),
        row(StableNodeChains, "stable_node_chains", ReadOnly),
        row(StableNodeDups, "stable_node_dups", ReadOnly),
        row(
            StableNodeChainsPruneMillisecs,
            "stable_node_chains_prune_millisecs",
            ReadWrite,
        ),
        row(UseZeroPages, "use_zero_pages", ReadWrite),
        row(GeneralProfit, "general_profit", ReadOnly),
        row(SmartScan, "smart_scan", ReadWrite),
        row(AdvisorMode, "advisor_mode", ReadWrite),
        row(AdvisorMaxCpu, "advisor_max_cpu", ReadWrite),
        row(
            AdvisorMinPagesToScan,
            "advisor_min_pages_to_scan",
            ReadWrite,
        ),
        row(
            AdvisorMaxPagesToScan,
            "advisor_max_pages_to_scan",
            ReadWrite,
        ),
        row(AdvisorTargetScanTime, "advisor_target_scan_time", ReadWrite),
        row(ScanThreads, "scan_threads", ReadWrite),
    ]
};

/// What `run` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// The scanner stands still; merged pages stay merged.
    Stop = 0,
    /// The scanner scans and merges.
    Merge = 1,
    /// The scanner stands still, and what was merged is unmerged.
    Unmerge = 2,
}

/// Bit of `run` that shows while memory goes offline, when no knob can change.
const RUN_OFFLINE: u8 = 4;

/// Who sets `pages_to_scan`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdvisorMode {
    /// Whoever writes to the file.
    None,
    /// The scan-time advisor, after each full scan.
    ScanTime,
}

/// A write that was understood, and is valid by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Of [`File::SleepMillisecs`].
    SleepMillisecs(u32),
    /// Of [`File::PagesToScan`].
    PagesToScan(u32),
    /// Of [`File::Run`].
    Run(RunState),
    /// Of [`File::MergeAcrossNodes`].
    MergeAcrossNodes(bool),
    /// Of [`File::MaxPageSharing`]; from 2 to `i32::MAX`.
    MaxPageSharing(u32),
    /// Of [`File::StableNodeChainsPruneMillisecs`].
    StableNodeChainsPruneMillisecs(u32),
    /// Of [`File::UseZeroPages`].
    UseZeroPages(bool),
    /// Of [`File::SmartScan`].
    SmartScan(bool),
    /// Of [`File::AdvisorMode`].
    AdvisorMode(AdvisorMode),
    /// Of [`File::AdvisorMaxCpu`].
    AdvisorMaxCpu(u32),
    /// Of [`File::AdvisorMinPagesToScan`].
    AdvisorMinPagesToScan(u64),
    /// Of [`File::AdvisorMaxPagesToScan`].
    AdvisorMaxPagesToScan(u64),
    /// Of [`File::AdvisorTargetScanTime`]; at least 1.
    AdvisorTargetScanTime(u64),
    /// Of [`File::ScanThreads`]; at least 1.
    ScanThreads(u32),
}

impl File {
    /// The file of that name.
    pub fn by_name(name: &[u8]) -> Option<Self> {
        FILES
            .iter()
            .find(|row| row.name.as_bytes() == name)
            .map(|row| row.file)
    }

    /// Parses what was written to the file, as sysfs hands it over.
    ///
    /// Changes nothing and takes no lock. Numbers are decimal; one newline may follow.
    ///
    /// # Errors
    ///
    /// `EINVAL` where the value makes no sense, `ERANGE` where `merge_across_nodes` or
    /// `max_page_sharing` is given a number that does not fit its type, `EIO` where the file
    /// cannot be written to.
    pub fn parse(self, buf: &[u8]) -> Result<Change> {
        let text = text(buf);
        // Most files report any number that they cannot parse as EINVAL, even one out of range.
        let uint = || kstrtouint(text).map_err(|_| EINVAL);
        let ulong = || kstrtoul(text).map_err(|_| EINVAL);

        Ok(match self {
            Self::SleepMillisecs => Change::SleepMillisecs(uint()?),
            Self::PagesToScan => Change::PagesToScan(uint()?),
            Self::Run => Change::Run(match uint()? {
                0 => RunState::Stop,
                1 => RunState::Merge,
                2 => RunState::Unmerge,
                _ => return Err(EINVAL),
            }),
            Self::MergeAcrossNodes => Change::MergeAcrossNodes(match kstrtoul(text)? {
                0 => false,
                1 => true,
                _ => return Err(EINVAL),
            }),
            Self::MaxPageSharing => Change::MaxPageSharing(match kstrtoint(text)? {
                sharing @ MIN_PAGE_SHARING.. => sharing as u32,
                _ => return Err(EINVAL),
            }),
            Self::StableNodeChainsPruneMillisecs => Change::StableNodeChainsPruneMillisecs(uint()?),
            Self::UseZeroPages => Change::UseZeroPages(kstrtobool(text)?),
            Self::SmartScan => Change::SmartScan(kstrtobool(text)?),
            Self::AdvisorMode => Change::AdvisorMode(if sysfs_streq(text, "scan-time") {
                AdvisorMode::ScanTime
            } else if sysfs_streq(text, "none") {
                AdvisorMode::None
            } else {
                return Err(EINVAL);
            }),
            // The built-in parses an unsigned long, and keeps the lower 32 bits of it.
            Self::AdvisorMaxCpu => Change::AdvisorMaxCpu(ulong()? as u32),
            Self::AdvisorMinPagesToScan => Change::AdvisorMinPagesToScan(ulong()?),
            Self::AdvisorMaxPagesToScan => Change::AdvisorMaxPagesToScan(ulong()?),
            Self::AdvisorTargetScanTime => Change::AdvisorTargetScanTime(match ulong()? {
                0 => return Err(EINVAL),
                seconds => seconds,
            }),
            Self::ScanThreads => Change::ScanThreads(match uint()? {
                0 => return Err(EINVAL),
                threads => threads,
            }),
            Self::PagesScanned
            | Self::PagesShared
            | Self::PagesSharing
            | Self::PagesUnshared
            | Self::PagesVolatile
            | Self::PagesSkipped
            | Self::KsmZeroPages
            | Self::FullScans
            | Self::StableNodeChains
            | Self::StableNodeDups
            | Self::GeneralProfit => return Err(EIO),
        })
    }
}

/// What a change depends on besides the knobs.
#[derive(Clone, Copy, Debug)]
pub struct StoreCtx {
    /// Merged pages in use.
    pub pages_shared: u64,
    /// CPUs that are online: the most threads.
    pub cpus: u32,
}

/// What the caller has to do after a change.
#[must_use = "a change is not complete without it"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing: the change is in effect.
    Done,
    /// The change is in effect. Wake the scanner if it sleeps between two batches, so that it
    /// does not sleep for the old time.
    WakeIter,
    /// `run` was written, and there is nothing to unmerge. Wake the scanner if `run` is 1 now.
    RunChanged,
    /// `run` shows 2 already. Unmerge everything, and call [`Knobs::unmerge_failed`] if that
    /// does not succeed.
    Unmerge,
    /// Nothing has changed yet. Remove all stable nodes: if that succeeds, give this to
    /// [`Knobs::commit`], and otherwise report `EBUSY`.
    RemoveNodes(Pending),
}

/// A change that takes effect only when nothing is merged, and was seen to be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending(Change);

/// The values of the files that can be written to.
///
/// Plain data: it has no lock of its own. Whoever changes `run`, `merge_across_nodes` or
/// `max_page_sharing` also holds, from [`Knobs::apply`] until the [`Action`] is done, the lock
/// that keeps the scanner out, and has waited until no memory is going offline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Knobs {
    /// `run`, without the bit that shows while memory goes offline.
    pub run: RunState,
    /// Memory is going offline: `run` shows it.
    pub offline: bool,
    /// `sleep_millisecs`.
    pub sleep_millisecs: u32,
    /// `pages_to_scan`.
    pub pages_to_scan: u32,
    /// `merge_across_nodes`.
    pub merge_across_nodes: bool,
    /// `max_page_sharing`, from 2 to `i32::MAX`.
    pub max_page_sharing: u32,
    /// `stable_node_chains_prune_millisecs`.
    pub stable_node_chains_prune_millisecs: u32,
    /// `use_zero_pages`.
    pub use_zero_pages: bool,
    /// `smart_scan`.
    pub smart_scan: bool,
    /// `advisor_mode`.
    pub advisor_mode: AdvisorMode,
    /// `advisor_max_cpu`, percent.
    pub advisor_max_cpu: u32,
    /// `advisor_min_pages_to_scan`.
    pub advisor_min_pages_to_scan: u64,
    /// `advisor_max_pages_to_scan`.
    pub advisor_max_pages_to_scan: u64,
    /// `advisor_target_scan_time`, seconds, at least 1.
    pub advisor_target_scan_time: u64,
    /// `scan_threads`, at least 1.
    pub scan_threads: u32,
    /// What the advisor remembers.
    advisor: advisor::Context,
}

impl Knobs {
    /// The built-in's defaults.
    pub const fn new() -> Self {
        Self {
            run: RunState::Stop,
            offline: false,
            sleep_millisecs: 20,
            pages_to_scan: DEFAULT_PAGES_TO_SCAN,
            merge_across_nodes: true,
            max_page_sharing: 256,
            stable_node_chains_prune_millisecs: 2000,
            use_zero_pages: false,
            smart_scan: true,
            advisor_mode: AdvisorMode::None,
            advisor_max_cpu: 70,
            advisor_min_pages_to_scan: 500,
            advisor_max_pages_to_scan: 30_000,
            advisor_target_scan_time: 200,
            scan_threads: 1,
            advisor: advisor::Context::new(),
        }
    }

    /// Parses a write to `file` and applies it: [`File::parse`], then [`Knobs::apply`].
    pub fn store(&mut self, file: File, buf: &[u8], ctx: &StoreCtx) -> Result<Action> {
        self.apply(file.parse(buf)?, ctx)
    }

    /// Applies a change, or says what has to be done before it can be.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the advisor sets `pages_to_scan`, or there are fewer CPUs than threads; `EBUSY`
    /// if pages are merged. Nothing has changed then.
    pub fn apply(&mut self, change: Change, ctx: &StoreCtx) -> Result<Action> {
        let held = match change {
            Change::PagesToScan(_) if self.advisor_mode != AdvisorMode::None => return Err(EINVAL),
            Change::ScanThreads(threads) if threads > ctx.cpus => return Err(EINVAL),
            Change::MergeAcrossNodes(across) => across != self.merge_across_nodes,
            Change::MaxPageSharing(sharing) => sharing != self.max_page_sharing,
            _ => false,
        };
        if held && ctx.pages_shared != 0 {
            return Err(EBUSY);
        }
        if held {
            return Ok(Action::RemoveNodes(Pending(change)));
        }

        let (run, mode) = (self.run, self.advisor_mode);
        self.set(change);
        if self.advisor_mode != mode {
            self.set_advisor_defaults();
        }
        Ok(match change {
            Change::SleepMillisecs(_) => Action::WakeIter,
            Change::Run(RunState::Unmerge) if run != RunState::Unmerge => Action::Unmerge,
            Change::Run(_) => Action::RunChanged,
            _ => Action::Done,
        })
    }

    /// Puts a change into effect that [`Action::RemoveNodes`] had to wait for.
    pub fn commit(&mut self, pending: Pending) {
        self.set(pending.0);
    }

    /// Sets the one value that a change is about.
    fn set(&mut self, change: Change) {
        match change {
            Change::SleepMillisecs(msecs) => self.sleep_millisecs = msecs,
            Change::PagesToScan(pages) => self.pages_to_scan = pages,
            Change::Run(run) => self.run = run,
            Change::MergeAcrossNodes(across) => self.merge_across_nodes = across,
            Change::MaxPageSharing(sharing) => self.max_page_sharing = sharing,
            Change::StableNodeChainsPruneMillisecs(msecs) => {
                self.stable_node_chains_prune_millisecs = msecs;
            }
            Change::UseZeroPages(on) => self.use_zero_pages = on,
            Change::SmartScan(on) => self.smart_scan = on,
            Change::AdvisorMode(mode) => self.advisor_mode = mode,
            Change::AdvisorMaxCpu(percent) => self.advisor_max_cpu = percent,
            Change::AdvisorMinPagesToScan(pages) => self.advisor_min_pages_to_scan = pages,
            Change::AdvisorMaxPagesToScan(pages) => self.advisor_max_pages_to_scan = pages,
            Change::AdvisorTargetScanTime(seconds) => self.advisor_target_scan_time = seconds,
            Change::ScanThreads(threads) => self.scan_threads = threads,
        }
    }

    /// Has `run` show 0 after [`Action::Unmerge`] could not be done.
    pub fn unmerge_failed(&mut self) {
        self.run = RunState::Stop;
    }

    /// Gives `pages_to_scan` the value that goes with a new `advisor_mode`.
    fn set_advisor_defaults(&mut self) {
        match self.advisor_mode {
            AdvisorMode::None => self.pages_to_scan = DEFAULT_PAGES_TO_SCAN,
            AdvisorMode::ScanTime => {
                self.advisor = advisor::Context::new();
                // As in the built-in, `pages_to_scan` takes the lower 32 bits.
                self.pages_to_scan = self.advisor_min_pages_to_scan as u32;
            }
        }
    }

    /// Tells the advisor that a full scan begins. `now_ns` is the monotonic clock.
    pub fn scan_started(&mut self, now_ns: i64) {
        if self.advisor_mode == AdvisorMode::ScanTime {
            self.advisor.start_ns = now_ns;
        }
    }

    /// Lets the advisor set `pages_to_scan` at the end of a full scan.
    ///
    /// `now_ns` is the monotonic clock, `cpu_ns` the CPU time that the scanner has used since it
    /// was started. Returns what the `ksm_advisor` trace event is to report.
    pub fn scan_ended(&mut self, now_ns: i64, cpu_ns: u64) -> Option<advisor::Advice> {
        if self.advisor_mode != AdvisorMode::ScanTime {
            return None;
        }
        let limits = advisor::Limits {
            target_scan_time: self.advisor_target_scan_time,
            max_cpu: self.advisor_max_cpu,
            max_pages_to_scan: self.advisor_max_pages_to_scan,
        };
        let advice = self
            .advisor
            .advise(now_ns, cpu_ns, self.pages_to_scan, &limits);
        self.pages_to_scan = advice.pages_to_scan as u32;
        Some(advice)
    }

    /// Writes what a read of `file` shows, newline included; at most 32 bytes.
    pub fn show(&self, file: File, stats: &Snapshot, out: &mut impl fmt::Write) -> fmt::Result {
        let counters = &stats.counters;
        match file {
            File::KsmZeroPages => writeln!(out, "{}", stats.zero_pages),
            File::GeneralProfit => writeln!(out, "{}", stats.general_profit()),
            File::AdvisorMode => out.write_str(match self.advisor_mode {
                AdvisorMode::None => "[none] scan-time\n",
                AdvisorMode::ScanTime => "none [scan-time]\n",
            }),
            _ => {
                let number = match file {
                    File::SleepMillisecs => self.sleep_millisecs.into(),
                    File::PagesToScan => self.pages_to_scan.into(),
                    File::Run => self.run_bits().into(),
                    File::PagesScanned => counters.pages_scanned,
                    File::PagesShared => counters.pages_shared,
                    File::PagesSharing => counters.pages_sharing,
                    File::PagesUnshared => counters.pages_unshared,
                    File::PagesVolatile => stats.pages_volatile(),
                    File::PagesSkipped => counters.pages_skipped,
                    File::FullScans => counters.full_scans,
                    File::MergeAcrossNodes => self.merge_across_nodes.into(),
                    File::MaxPageSharing => self.max_page_sharing.into(),
                    File::StableNodeChains => counters.stable_node_chains,
                    File::StableNodeDups => counters.stable_node_dups,
                    File::StableNodeChainsPruneMillisecs => {
                        self.stable_node_chains_prune_millisecs.into()
                    }
                    File::UseZeroPages => self.use_zero_pages.into(),
                    File::SmartScan => self.smart_scan.into(),
                    File::AdvisorMaxCpu => self.advisor_max_cpu.into(),
                    File::AdvisorMinPagesToScan => self.advisor_min_pages_to_scan,
                    File::AdvisorMaxPagesToScan => self.advisor_max_pages_to_scan,
                    File::AdvisorTargetScanTime => self.advisor_target_scan_time,
                    File::ScanThreads => self.scan_threads.into(),
                    File::KsmZeroPages | File::GeneralProfit | File::AdvisorMode => return Ok(()),
                };
                writeln!(out, "{number}")
            }
        }
    }

    /// `run` as it is shown, and as the built-in keeps it in `ksm_run`.
    pub fn run_bits(&self) -> u8 {
        self.run as u8 | if self.offline { RUN_OFFLINE } else { 0 }
    }

    /// Takes over the value that the built-in's `file` shows.
    ///
    /// Sets it as it stands, where [`Knobs::store`] would refuse or do more: `pages_to_scan` under
    /// an advisor for one, and `run`, which nobody has acted upon yet.
    ///
    /// # Errors
    ///
    /// Those of [`File::parse`], if the built-in shows what it would not accept.
    pub fn take_over(&mut self, file: File, shown: &[u8]) -> Result {
        let chosen = match file {
            File::AdvisorMode => bracketed(shown).ok_or(EINVAL)?,
            _ => shown,
        };
        self.set(file.parse(chosen)?);
        Ok(())
    }

    /// Sets the file `name` to a module parameter. False if it cannot have that value, where there are so many CPUs.
    pub fn set_at_load(&mut self, name: &str, value: i64, cpus: u32) -> bool {
        let change = match (name, u32::try_from(value)) {
            ("run", Ok(0)) => Change::Run(RunState::Stop),
            ("run", Ok(1)) => Change::Run(RunState::Merge),
            ("run", Ok(2)) => Change::Run(RunState::Unmerge),
            ("pages_to_scan", Ok(pages)) => Change::PagesToScan(pages),
            ("sleep_millisecs", Ok(msecs)) => Change::SleepMillisecs(msecs),
            ("scan_threads", Ok(threads @ 1..)) if threads <= cpus => Change::ScanThreads(threads),
            _ => return false,
        };
        self.set(change);
        true
    }

    /// Writes what the built-in's `file` is to be given so that it shows the value it has here.
    ///
    /// `advisor_mode` sets `pages_to_scan`, and an advisor keeps `pages_to_scan` from being set:
    /// hand back `advisor_mode` after the other files, `pages_to_scan` with its advisor off.
    pub fn hand_back(&self, file: File, out: &mut impl fmt::Write) -> fmt::Result {
        match file {
            File::AdvisorMode => out.write_str(match self.advisor_mode {
                AdvisorMode::None => "none\n",
                AdvisorMode::ScanTime => "scan-time\n",
            }),
            _ => self.show(file, &Snapshot::default(), out),
        }
    }
}

impl Default for Knobs {
    fn default() -> Self {
        Self::new()
    }
}

/// The part of a buffer that the kernel's string functions see: up to the first NUL.
fn text(buf: &[u8]) -> &[u8] {
    buf.split(|&byte| byte == 0).next().unwrap_or(buf)
}

/// The word in brackets, of a file that shows all its words.
fn bracketed(shown: &[u8]) -> Option<&[u8]> {
    let from = shown.iter().position(|&byte| byte == b'[')?;
    let len = shown.get(from..)?.iter().position(|&byte| byte == b']')?;
    shown.get(from + 1..from + len)
}

/// Parses digits and one newline after them, as `_kstrtoull()` does.
///
/// All digits are read before anything else is looked at: a number out of range is `ERANGE`,
/// whatever follows it.
fn digits(text: &[u8]) -> Result<u64> {
    let len = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (digits, rest) = text.split_at_checked(len).ok_or(EINVAL)?;
    let value = digits.iter().try_fold(0u64, |value, digit| {
        value.checked_mul(10)?.checked_add(u64::from(digit - b'0'))
    });
    let value = value.ok_or(ERANGE)?;
    match (digits, rest) {
        ([_, ..], [] | [b'\n']) => Ok(value),
        _ => Err(EINVAL),
    }
}

/// Parses an `unsigned long`, as `kstrtoul()` in base 10: one plus sign may come first.
fn kstrtoul(text: &[u8]) -> Result<u64> {
    digits(text.strip_prefix(b"+").unwrap_or(text))
}

/// Parses an `unsigned int`, as `kstrtouint()` in base 10.
fn kstrtouint(text: &[u8]) -> Result<u32> {
    kstrtoul(text)?.try_into().map_err(|_| ERANGE)
}

/// Parses an `int`, as `kstrtoint()` in base 10: one sign may come first.
fn kstrtoint(text: &[u8]) -> Result<i32> {
    let value = match text.strip_prefix(b"-") {
        Some(text) => -i128::from(digits(text)?),
        None => i128::from(kstrtoul(text)?),
    };
    value.try_into().map_err(|_| ERANGE)
}

/// Parses a truth value by its first letters, as `kstrtobool()`.
fn kstrtobool(text: &[u8]) -> Result<bool> {
    match text {
        [b'e' | b'E' | b'y' | b'Y' | b't' | b'T' | b'1', ..] => Ok(true),
        [b'd' | b'D' | b'n' | b'N' | b'f' | b'F' | b'0', ..] => Ok(false),
        [b'o' | b'O', b'n' | b'N', ..] => Ok(true),
        [b'o' | b'O', b'f' | b'F', ..] => Ok(false),
        _ => Err(EINVAL),
    }
}

/// Whether the text is `word`, or `word` and a newline, as `sysfs_streq()`.
fn sysfs_streq(text: &[u8], word: &str) -> bool {
    text.strip_suffix(b"\n").unwrap_or(text) == word.as_bytes()
}
