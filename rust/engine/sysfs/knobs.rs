// SPDX-License-Identifier: GPL-2.0-only

//! The values of the files that can be written, and what a change of one brings about.

use super::{
    super::governor::Limits,
    advisor, //
};

use kernel::prelude::*;

/// `pages_to_scan` when there is no advisor.
const DEFAULT_PAGES_TO_SCAN: u32 = 100;

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
pub const RUN_OFFLINE: u8 = 4;

/// Who sets `pages_to_scan`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdvisorMode {
    /// Whoever writes to the file.
    None,
    /// The scan-time advisor, after each full scan.
    ScanTime,
}

/// Who paces the scanner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GovernorMode {
    /// The built-in's files: `pages_to_scan`, `sleep_millisecs`, `smart_scan`, the advisor.
    Knobs,
    /// The [governor](super::super::governor).
    Auto,
}

/// Largest `cpu_burst_millisecs`: a minute.
const MAX_BURST_MSECS: u32 = 60_000;

/// A write that was understood, and is valid by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Of `sleep_millisecs`.
    SleepMillisecs(u32),
    /// Of `pages_to_scan`.
    PagesToScan(u32),
    /// Of `run`.
    Run(RunState),
    /// Of `merge_across_nodes`.
    MergeAcrossNodes(bool),
    /// Of `max_page_sharing`; from 2 to `i32::MAX`.
    MaxPageSharing(u32),
    /// Of `stable_node_chains_prune_millisecs`.
    StableNodeChainsPruneMillisecs(u32),
    /// Of `use_zero_pages`.
    UseZeroPages(bool),
    /// Of `smart_scan`.
    SmartScan(bool),
    /// Of `advisor_mode`.
    AdvisorMode(AdvisorMode),
    /// Of `advisor_max_cpu`.
    AdvisorMaxCpu(u32),
    /// Of `advisor_min_pages_to_scan`.
    AdvisorMinPagesToScan(u64),
    /// Of `advisor_max_pages_to_scan`.
    AdvisorMaxPagesToScan(u64),
    /// Of `advisor_target_scan_time`; at least 1.
    AdvisorTargetScanTime(u64),
    /// Of `scan_threads`; at least 1.
    ScanThreads(u32),
    /// Of `governor`.
    Governor(GovernorMode),
    /// Of `cpu_percent`; at least 1.
    CpuPercent(u32),
    /// Of `pressure_cpu_percent`; at least 1.
    PressureCpuPercent(u32),
    /// Of `cpu_burst_millisecs`; at least 1.
    CpuBurstMillisecs(u32),
}

impl Change {
    /// Whether the change makes sense where so many CPUs are online.
    pub(super) fn possible_with(self, cpus: u32) -> bool {
        match self {
            Self::ScanThreads(threads) => threads <= cpus,
            Self::CpuPercent(percent) | Self::PressureCpuPercent(percent) => {
                percent <= cpus.saturating_mul(100)
            }
            Self::CpuBurstMillisecs(msecs) => msecs <= MAX_BURST_MSECS,
            _ => true,
        }
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
    /// `governor`.
    pub governor: GovernorMode,
    /// `cpu_percent`, `pressure_cpu_percent` and `cpu_burst_millisecs`.
    pub limits: Limits,
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
            governor: GovernorMode::Knobs,
            limits: Limits::for_cpus(1),
            advisor: advisor::Context::new(),
        }
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
            _ if !change.possible_with(ctx.cpus) => return Err(EINVAL),
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
            Change::SleepMillisecs(_)
            | Change::Governor(_)
            | Change::CpuPercent(_)
            | Change::PressureCpuPercent(_)
            | Change::CpuBurstMillisecs(_) => Action::WakeIter,
            Change::Run(RunState::Unmerge) if run != RunState::Unmerge => Action::Unmerge,
            Change::Run(_) => Action::RunChanged,
            _ => Action::Done,
        })
    }

    /// Puts a change into effect that [`Action::RemoveNodes`] had to wait for.
    pub fn commit(&mut self, pending: Pending) {
        self.set(pending.0);
    }

    /// Sets the one value that a change is about, with nothing that goes with it in
    /// [`Self::apply`]: at the load, before anybody has acted on the values.
    pub(super) fn set(&mut self, change: Change) {
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
            Change::Governor(mode) => self.governor = mode,
            Change::CpuPercent(percent) => self.limits.percent = percent,
            Change::PressureCpuPercent(percent) => self.limits.pressure_percent = percent,
            Change::CpuBurstMillisecs(msecs) => self.limits.burst_msecs = msecs,
        }
    }

    /// Sets `run` to 0 after [`Action::Unmerge`] has failed.
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

    /// `run` as it is shown, and as the built-in keeps it in `ksm_run`.
    pub fn run_bits(&self) -> u8 {
        self.run as u8 | if self.offline { RUN_OFFLINE } else { 0 }
    }
}

impl Default for Knobs {
    fn default() -> Self {
        Self::new()
    }
}
