// SPDX-License-Identifier: GPL-2.0-only

//! One block per file: its name, whose it is, what it means, how it is shown and stored.
//!
//! # To add a file
//!
//! Write a block, in the order in which users should see it, and name it in [`ATTRIBUTES`]. A knob
//! also needs a [`Change`], a field of [`Knobs`] with its default, and the place that uses it; a
//! statistic a field of [`Counters`](super::super::stats::Counters) and the place that counts. The
//! compiler finds what is missing of these, and the test `attributes` what is missing in the list,
//! in the parameters of the module, and in the documents.

use super::{
    super::stats::Snapshot,
    knobs::{
        AdvisorMode,
        Change,
        GovernorMode,
        Knobs,
        RunState, //
    },
    line::Line,
    parse::{
        bracketed,
        kstrtobool,
        kstrtoint,
        kstrtoul,
        sysfs_streq,
        text,
        uint,
        ulong, //
    }, //
};
use core::ffi::CStr;

use kernel::{
    fmt::{
        self,
        Write, //
    },
    prelude::*, //
};

/// The least `max_page_sharing`: a merged page is made from two.
const MIN_PAGE_SHARING: i32 = 2;

/// The version of rksm. The one place is the file, which the build reads, too.
pub const RELEASE: &str = include_str!("../VERSION").trim_ascii();

/// Whose a file is, which says in which directory it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The built-in's, in `/sys/kernel/mm/ksm`.
    Builtin,
    /// Ours, in `/sys/kernel/mm/rksm`.
    Rksm,
}

/// Writes what a read of a file shows.
type Show = fn(&Knobs, &Snapshot, &mut dyn Write) -> fmt::Result;

/// Parses what was written to a file.
type Store = fn(&[u8]) -> Result<Change>;

/// A file in sysfs.
pub struct Attribute {
    /// Its name.
    pub name: &'static CStr,
    /// In which directory it stands.
    pub origin: Origin,
    /// What it means, as the ABI document has it.
    #[allow(dead_code, reason = "a host test holds the documents against it")]
    pub doc: &'static str,
    /// Writes what a read shows, newline included.
    pub show: Show,
    /// Parses a write, up to the first NUL. A file without it is read-only.
    pub store: Option<Store>,
    /// Whether the module has a parameter of that name.
    pub parameter: bool,
}

/// See its `doc`.
pub static SLEEP_MILLISECS: Attribute = Attribute {
    name: c"sleep_millisecs",
    origin: Origin::Builtin,
    doc: "Milliseconds that the scanner sleeps between two batches.",
    show: |knobs, _, out| writeln!(out, "{}", knobs.sleep_millisecs),
    store: Some(|text| Ok(Change::SleepMillisecs(uint(text)?))),
    parameter: true,
};

/// See its `doc`.
pub static PAGES_TO_SCAN: Attribute = Attribute {
    name: c"pages_to_scan",
    origin: Origin::Builtin,
    doc: "Pages that the scanner looks at before it sleeps. EINVAL while an advisor sets it.",
    show: |knobs, _, out| writeln!(out, "{}", knobs.pages_to_scan),
    store: Some(|text| Ok(Change::PagesToScan(uint(text)?))),
    parameter: true,
};

/// See its `doc`.
pub static RUN: Attribute = Attribute {
    name: c"run",
    origin: Origin::Builtin,
    doc: "0, 1 or 2: stop, merge, unmerge. 4 is added while memory goes offline.",
    show: |knobs, _, out| writeln!(out, "{}", knobs.run_bits()),
    store: Some(|text| {
        Ok(Change::Run(match uint(text)? {
            0 => RunState::Stop,
            1 => RunState::Merge,
            2 => RunState::Unmerge,
            _ => return Err(EINVAL),
        }))
    }),
    parameter: true,
};

/// See its `doc`.
pub static PAGES_SCANNED: Attribute = Attribute {
    name: c"pages_scanned",
    origin: Origin::Builtin,
    doc: "Pages looked at since rksm was loaded.",
    show: |_, stats, out| writeln!(out, "{}", stats.counters.pages_scanned),
    store: None,
    parameter: false,
};

/// See its `doc`.
pub static PAGES_SHARED: Attribute = Attribute {
    name: c"pages_shared",
    origin: Origin::Builtin,
    doc: "Merged pages in use.",
    show: |_, stats, out| writeln!(out, "{}", stats.counters.pages_shared),
    store: None,
    parameter: false,
};

/// See its `doc`.
pub static PAGES_SHARING: Attribute = Attribute {
    name: c"pages_sharing",
    origin: Origin::Builtin,
    doc: "Mappings of merged pages beyond the first of each.",
    show: |_, stats, out| writeln!(out, "{}", stats.counters.pages_sharing),
    store: None,
    parameter: false,
};

/// See its `doc`.
pub static PAGES_UNSHARED: Attribute = Attribute {
    name: c"pages_unshared",
    origin: Origin::Builtin,
    doc: "Pages that have not changed and have no equal.",
    show: |_, stats, out| writeln!(out, "{}", stats.counters.pages_unshared),
    store: None,
    parameter: false,
};

/// See its `doc`.
pub static PAGES_VOLATILE: Attribute = Attribute {
    name: c"pages_volatile",
    origin: Origin::Builtin,
    doc: "Tracked pages that change too often, or have been seen only once.",
    show: |_, stats, out| writeln!(out, "{}", stats.pages_volatile()),
    store: None,
    parameter: false,
};

/// See its `doc`.
pub static PAGES_SKIPPED: Attribute = Attribute {
    name: c"pages_skipped",
    origin: Origin::Builtin,
    doc: "Pages that smart scan skipped since rksm was loaded.",
    show: |_, stats, out| writeln!(out, "{}", stats.counters.pages_skipped),
    store: None,
    parameter: false,
};

/// See its `doc`.
pub static KSM_ZERO_PAGES: Attribute = Attribute {
    name: c"ksm_zero_pages",
    origin: Origin::Builtin,
    doc: "Mappings of the zero page that KSM placed.",
    show: |_, stats, out| writeln!(out, "{}", stats.zero_pages),
    store: None,
    parameter: false,
};

/// See its `doc`.
pub static FULL_SCANS: Attribute = Attribute {
    name: c"full_scans",
    origin: Origin::Builtin,
    doc: "Full scans completed since the last unmerge.",
    show: |_, stats, out| writeln!(out, "{}", stats.counters.full_scans),
    store: None,
    parameter: false,
};

/// See its `doc`.
pub static MERGE_ACROSS_NODES: Attribute = Attribute {
    name: c"merge_across_nodes",
    origin: Origin::Builtin,
    doc: "0 or 1: whether pages of different NUMA nodes are merged. EBUSY while pages are merged.",
    show: |knobs, _, out| writeln!(out, "{}", u8::from(knobs.merge_across_nodes)),
    store: Some(|text| {
        Ok(Change::MergeAcrossNodes(match kstrtoul(text)? {
            0 => false,
            1 => true,
            _ => return Err(EINVAL),
        }))
    }),
    parameter: false,
};

/// See its `doc`.
pub static MAX_PAGE_SHARING: Attribute = Attribute {
    name: c"max_page_sharing",
    origin: Origin::Builtin,
    doc: "Most mappings of one merged page, at least 2. EBUSY while pages are merged.",
    show: |knobs, _, out| writeln!(out, "{}", knobs.max_page_sharing),
    store: Some(|text| {
        Ok(Change::MaxPageSharing(match kstrtoint(text)? {
            sharing @ MIN_PAGE_SHARING.. => sharing as u32,
            _ => return Err(EINVAL),
        }))
    }),
    parameter: false,
};

/// See its `doc`.
pub static STABLE_NODE_CHAINS: Attribute = Attribute {
    name: c"stable_node_chains",
    origin: Origin::Builtin,
    doc: "Contents that are held by more than one merged page.",
    show: |_, stats, out| writeln!(out, "{}", stats.counters.stable_node_chains),
    store: None,
    parameter: false,
};

/// See its `doc`.
pub static STABLE_NODE_DUPS: Attribute = Attribute {
    name: c"stable_node_dups",
    origin: Origin::Builtin,
    doc: "Merged pages that hold such contents.",
    show: |_, stats, out| writeln!(out, "{}", stats.counters.stable_node_dups),
    store: None,
    parameter: false,
};

/// See its `doc`.
pub static STABLE_NODE_CHAINS_PRUNE_MILLISECS: Attribute = Attribute {
    name: c"stable_node_chains_prune_millisecs",
    origin: Origin::Builtin,
    doc: "Least milliseconds between two searches for merged pages that are gone.",
    show: |knobs, _, out| writeln!(out, "{}", knobs.stable_node_chains_prune_millisecs),
    store: Some(|text| Ok(Change::StableNodeChainsPruneMillisecs(uint(text)?))),
    parameter: false,
};

/// See its `doc`.
pub static USE_ZERO_PAGES: Attribute = Attribute {
    name: c"use_zero_pages",
    origin: Origin::Builtin,
    doc: "0 or 1: whether a page of zeroes is replaced by the zero page.",
    show: |knobs, _, out| writeln!(out, "{}", u8::from(knobs.use_zero_pages)),
    store: Some(|text| Ok(Change::UseZeroPages(kstrtobool(text)?))),
    parameter: false,
};

/// See its `doc`.
pub static GENERAL_PROFIT: Attribute = Attribute {
    name: c"general_profit",
    origin: Origin::Builtin,
    doc: "Bytes saved less the bytes of rksm's metadata; may be negative.",
    show: |_, stats, out| writeln!(out, "{}", stats.general_profit()),
    store: None,
    parameter: false,
};

/// See its `doc`.
pub static SMART_SCAN: Attribute = Attribute {
    name: c"smart_scan",
    origin: Origin::Builtin,
    doc: "0 or 1: whether pages that found no equal are looked at less often.",
    show: |knobs, _, out| writeln!(out, "{}", u8::from(knobs.smart_scan)),
    store: Some(|text| Ok(Change::SmartScan(kstrtobool(text)?))),
    parameter: false,
};

/// See its `doc`.
pub static ADVISOR_MODE: Attribute = Attribute {
    name: c"advisor_mode",
    origin: Origin::Builtin,
    doc: "none or scan-time; the one in force is shown in brackets.",
    show: |knobs, _, out| {
        out.write_str(match knobs.advisor_mode {
            AdvisorMode::None => "[none] scan-time\n",
            AdvisorMode::ScanTime => "none [scan-time]\n",
        })
    },
    store: Some(|text| {
        Ok(Change::AdvisorMode(if sysfs_streq(text, "scan-time") {
            AdvisorMode::ScanTime
        } else if sysfs_streq(text, "none") {
            AdvisorMode::None
        } else {
            return Err(EINVAL);
        }))
    }),
    parameter: false,
};

/// See its `doc`.
pub static ADVISOR_MAX_CPU: Attribute = Attribute {
    name: c"advisor_max_cpu",
    origin: Origin::Builtin,
    doc: "Most CPU of the scanner under the advisor, in percent.",
    show: |knobs, _, out| writeln!(out, "{}", knobs.advisor_max_cpu),
    // The built-in parses an unsigned long, and keeps the lower 32 bits of it.
    store: Some(|text| Ok(Change::AdvisorMaxCpu(ulong(text)? as u32))),
    parameter: false,
};

/// See its `doc`.
pub static ADVISOR_MIN_PAGES_TO_SCAN: Attribute = Attribute {
    name: c"advisor_min_pages_to_scan",
    origin: Origin::Builtin,
    doc: "pages_to_scan when the advisor is switched on.",
    show: |knobs, _, out| writeln!(out, "{}", knobs.advisor_min_pages_to_scan),
    store: Some(|text| Ok(Change::AdvisorMinPagesToScan(ulong(text)?))),
    parameter: false,
};

/// See its `doc`.
pub static ADVISOR_MAX_PAGES_TO_SCAN: Attribute = Attribute {
    name: c"advisor_max_pages_to_scan",
    origin: Origin::Builtin,
    doc: "Most that the advisor sets pages_to_scan to.",
    show: |knobs, _, out| writeln!(out, "{}", knobs.advisor_max_pages_to_scan),
    store: Some(|text| Ok(Change::AdvisorMaxPagesToScan(ulong(text)?))),
    parameter: false,
};

/// See its `doc`.
pub static ADVISOR_TARGET_SCAN_TIME: Attribute = Attribute {
    name: c"advisor_target_scan_time",
    origin: Origin::Builtin,
    doc: "Seconds that a full scan should take under the advisor, at least 1.",
    show: |knobs, _, out| writeln!(out, "{}", knobs.advisor_target_scan_time),
    store: Some(|text| {
        Ok(Change::AdvisorTargetScanTime(match ulong(text)? {
            0 => return Err(EINVAL),
            seconds => seconds,
        }))
    }),
    parameter: false,
};

/// See its `doc`.
pub static SCAN_THREADS: Attribute = Attribute {
    name: c"scan_threads",
    origin: Origin::Rksm,
    doc: "Threads that share the scanning: 1 (default) to the number of CPUs that are online. \
          EINVAL for any other.",
    show: |knobs, _, out| writeln!(out, "{}", knobs.scan_threads),
    store: Some(|text| Ok(Change::ScanThreads(at_least_1(uint(text)?)?))),
    parameter: true,
};

/// See its `doc`.
pub static GOVERNOR: Attribute = Attribute {
    name: c"governor",
    origin: Origin::Rksm,
    doc: "knobs (default) or auto; the one in force is shown in brackets. With auto the scanner \
          keeps to cpu_percent, looks at new memory within a second, and at other memory the more \
          rarely the less that brings. Then pages_to_scan, sleep_millisecs, smart_scan and the \
          advisor's files keep their values, without effect.",
    show: |knobs, _, out| {
        out.write_str(match knobs.governor {
            GovernorMode::Knobs => "[knobs] auto\n",
            GovernorMode::Auto => "knobs [auto]\n",
        })
    },
    store: Some(|text| {
        Ok(Change::Governor(if sysfs_streq(text, "knobs") {
            GovernorMode::Knobs
        } else if sysfs_streq(text, "auto") {
            GovernorMode::Auto
        } else {
            return Err(EINVAL);
        }))
    }),
    parameter: false,
};

/// See its `doc`.
pub static CPU_PERCENT: Attribute = Attribute {
    name: c"cpu_percent",
    origin: Origin::Rksm,
    doc: "CPU time of the scanner with governor=auto, in percent of one CPU, from 1 to 100 for \
          each CPU that is online. The default is 5, or half the number of CPUs if that is more.",
    show: |knobs, _, out| writeln!(out, "{}", knobs.limits.percent),
    store: Some(|text| Ok(Change::CpuPercent(at_least_1(uint(text)?)?))),
    parameter: false,
};

/// See its `doc`.
pub static PRESSURE_CPU_PERCENT: Attribute = Attribute {
    name: c"pressure_cpu_percent",
    origin: Origin::Rksm,
    doc: "The same while memory is short: less than 15 % of it is available, or pages have been \
          swapped within the last 10 seconds. No less than cpu_percent; the default is twice that.",
    show: |knobs, _, out| writeln!(out, "{}", knobs.limits.pressure_percent),
    store: Some(|text| Ok(Change::PressureCpuPercent(at_least_1(uint(text)?)?))),
    parameter: false,
};

/// See its `doc`.
pub static CPU_BURST_MILLISECS: Attribute = Attribute {
    name: c"cpu_burst_millisecs",
    origin: Origin::Rksm,
    doc: "CPU time that a scanner which has had little to do may use at once with governor=auto, \
          from 1 to 60000 milliseconds (default 2000). Half of it is kept for new memory.",
    show: |knobs, _, out| writeln!(out, "{}", knobs.limits.burst_msecs),
    store: Some(|text| Ok(Change::CpuBurstMillisecs(at_least_1(uint(text)?)?))),
    parameter: false,
};

/// See its `doc`.
pub static MEMORY_PRESSURE: Attribute = Attribute {
    name: c"memory_pressure",
    origin: Origin::Rksm,
    doc: "1 while governor=auto finds memory short, else 0.",
    show: |_, stats, out| writeln!(out, "{}", u8::from(stats.memory_pressure)),
    store: None,
    parameter: false,
};

/// See its `doc`.
pub static LONGEST_HOLD_USECS: Attribute = Attribute {
    name: c"longest_hold_usecs",
    origin: Origin::Rksm,
    doc:
        "Longest time since the load for which the scanner kept others waiting that use a file or \
          take memory offline, in microseconds.",
    show: |_, stats, out| writeln!(out, "{}", stats.longest_hold_usecs),
    store: None,
    parameter: false,
};

/// See its `doc`.
pub static WAKEUPS: Attribute = Attribute {
    name: c"wakeups",
    origin: Origin::Rksm,
    doc: "How often rksmd has slept and gone on since the load.",
    show: |_, stats, out| writeln!(out, "{}", stats.wakeups),
    store: None,
    parameter: false,
};

/// See its `doc`.
pub static CPU_MICROSECS: Attribute = Attribute {
    name: c"cpu_microsecs",
    origin: Origin::Rksm,
    doc: "CPU time of rksmd and the threads that help it since the load, those that have ended \
          included, in microseconds.",
    show: |_, stats, out| writeln!(out, "{}", stats.cpu_microsecs),
    store: None,
    parameter: false,
};

/// See its `doc`.
pub static PROCESSES: Attribute = Attribute {
    name: c"processes",
    origin: Origin::Rksm,
    doc: "Processes whose memory is registered: that have offered some, or for which a rule did.",
    show: |_, stats, out| writeln!(out, "{}", stats.processes),
    store: None,
    parameter: false,
};

/// See its `doc`.
pub static METADATA_BYTES: Attribute = Attribute {
    name: c"metadata_bytes",
    origin: Origin::Rksm,
    doc: "Bytes of rksm's metadata, which general_profit subtracts.",
    show: |_, stats, out| writeln!(out, "{}", stats.metadata_bytes),
    store: None,
    parameter: false,
};

/// See its `doc`.
pub static VERSION: Attribute = Attribute {
    name: c"version",
    origin: Origin::Rksm,
    doc: "Version of rksm, as modinfo shows it.",
    show: |_, _, out| writeln!(out, "{RELEASE}"),
    store: None,
    parameter: false,
};

/// All files, the built-in's in the order of its attributes.
pub static ATTRIBUTES: &[&Attribute] = &[
    &SLEEP_MILLISECS,
    &PAGES_TO_SCAN,
    &RUN,
    &PAGES_SCANNED,
    &PAGES_SHARED,
    &PAGES_SHARING,
    &PAGES_UNSHARED,
    &PAGES_VOLATILE,
    &PAGES_SKIPPED,
    &KSM_ZERO_PAGES,
    &FULL_SCANS,
    &MERGE_ACROSS_NODES,
    &MAX_PAGE_SHARING,
    &STABLE_NODE_CHAINS,
    &STABLE_NODE_DUPS,
    &STABLE_NODE_CHAINS_PRUNE_MILLISECS,
    &USE_ZERO_PAGES,
    &GENERAL_PROFIT,
    &SMART_SCAN,
    &ADVISOR_MODE,
    &ADVISOR_MAX_CPU,
    &ADVISOR_MIN_PAGES_TO_SCAN,
    &ADVISOR_MAX_PAGES_TO_SCAN,
    &ADVISOR_TARGET_SCAN_TIME,
    &SCAN_THREADS,
    &GOVERNOR,
    &CPU_PERCENT,
    &PRESSURE_CPU_PERCENT,
    &CPU_BURST_MILLISECS,
    &MEMORY_PRESSURE,
    &LONGEST_HOLD_USECS,
    &WAKEUPS,
    &CPU_MICROSECS,
    &PROCESSES,
    &METADATA_BYTES,
    &VERSION,
];

impl PartialEq for Attribute {
    fn eq(&self, other: &Self) -> bool {
        (self.origin, self.name) == (other.origin, other.name)
    }
}

impl Eq for Attribute {}

impl fmt::Debug for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.name)
    }
}

impl Attribute {
    /// The permission bits.
    pub const fn mode(&self) -> u16 {
        match self.store {
            Some(_) => 0o644,
            None => 0o444,
        }
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
    pub fn parse(&self, buf: &[u8]) -> Result<Change> {
        self.store.ok_or(EIO)?(text(buf))
    }

    /// The line that a read shows.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it is longer than any line of ours.
    pub fn line(&self, knobs: &Knobs, stats: &Snapshot) -> Result<Line> {
        Line::new(|line| (self.show)(knobs, stats, line))
    }

    /// Sets the knob to the value that the built-in's file shows.
    ///
    /// Sets it as it stands, where [`Knobs::apply`] would refuse or do more: `pages_to_scan` under
    /// an advisor, and `run`, on which nobody has acted yet.
    ///
    /// # Errors
    ///
    /// Those of [`Self::parse`], if the built-in shows what it would not accept.
    pub fn take_over(&self, knobs: &mut Knobs, shown: &[u8]) -> Result {
        knobs.set(self.parse(chosen(shown))?);
        Ok(())
    }

    /// Sets the knob to the value of the module's parameter of that name.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it cannot have that value, where so many CPUs are online, or is no parameter.
    pub fn set_at_load(&self, knobs: &mut Knobs, value: i64, cpus: u32) -> Result {
        let text = Line::new(|line| write!(line, "{value}"))?;
        let change = self.parse(text.as_bytes()).map_err(|_| EINVAL)?;
        if !self.parameter || !change.possible_with(cpus) {
            return Err(EINVAL);
        }
        knobs.set(change);
        Ok(())
    }
}

/// Refuses 0.
fn at_least_1(value: u32) -> Result<u32> {
    match value {
        0 => Err(EINVAL),
        value => Ok(value),
    }
}

/// The value in what a file shows: of several words, the one in brackets.
pub fn chosen(shown: &[u8]) -> &[u8] {
    bracketed(shown).unwrap_or(shown)
}
