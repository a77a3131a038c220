// SPDX-License-Identifier: GPL-2.0-only
//! The two implementations of KSM: the kernel's built-in one, and rksm.

use crate::exit::Failure;
use crate::host::{Host, KSM, RKSM};
use crate::units::page_size;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

/// What both count, in pages unless said otherwise. Nothing where this kernel does not count it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)] // Older recordings may lack some.
pub struct Counters {
    pub pages_shared: u64,
    pub pages_sharing: u64,
    pub pages_unshared: u64,
    pub pages_volatile: u64,
    pub full_scans: u64,
    pub stable_node_chains: u64,
    pub stable_node_dups: u64,
    pub pages_scanned: Option<u64>,
    pub pages_skipped: Option<u64>,
    pub ksm_zero_pages: Option<u64>,
    /// Bytes saved less the bytes of metadata.
    pub general_profit: Option<i64>,
}

impl Counters {
    /// Bytes that are free because of merging; the metadata is not taken off.
    pub fn saved_bytes(&self) -> u64 {
        (self.pages_sharing + self.ksm_zero_pages.unwrap_or(0)) * page_size()
    }

    /// Bytes saved less those of the metadata; what is saved where the kernel does not tell.
    pub fn net_bytes(&self) -> i64 {
        let saved = || i64::try_from(self.saved_bytes()).unwrap_or(i64::MAX);
        self.general_profit.unwrap_or_else(saved)
    }
}

/// The settings that both have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)] // Older recordings may lack some.
pub struct Knobs {
    /// 0 stopped, 1 merging, 2 unmerging.
    pub run: u64,
    pub pages_to_scan: u64,
    pub sleep_millisecs: u64,
    pub max_page_sharing: u64,
    pub merge_across_nodes: Option<bool>,
    pub use_zero_pages: bool,
    pub smart_scan: Option<bool>,
    /// The one in force: "none" or "scan-time".
    pub advisor_mode: Option<String>,
}

/// What only rksm tells. Nothing where its version does not.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)] // Older recordings may lack some.
pub struct Own {
    /// Pages not merged, by reason.
    pub refused: BTreeMap<String, u64>,
    pub scan_threads: Option<u64>,
    pub longest_hold_usecs: Option<u64>,
    pub metadata_bytes: Option<u64>,
    pub wakeups: Option<u64>,
    pub cpu_microsecs: Option<u64>,
    pub processes: Option<u64>,
    /// "knobs" or "auto".
    pub governor: Option<String>,
    /// The governor's budget, of one CPU.
    pub cpu_percent: Option<u64>,
    /// The same while memory is short.
    pub pressure_cpu_percent: Option<u64>,
    pub cpu_burst_millisecs: Option<u64>,
    /// The governor finds memory short.
    pub memory_pressure: Option<bool>,
    /// "none", "user" or "cgroup:N".
    pub domains: Option<String>,
}

impl Own {
    /// Whether the governor paces the scanner, and not the knobs that both have.
    pub fn is_governed(&self) -> bool {
        self.governor.as_deref() == Some("auto")
    }

    /// What the governor keeps to now, in percent of one CPU; nothing where it does not pace the
    /// scanner.
    pub fn budget(&self) -> Option<u64> {
        let normal = self.cpu_percent.filter(|_| self.is_governed())?;
        match (self.memory_pressure, self.pressure_cpu_percent) {
            (Some(true), Some(percent)) => Some(percent.max(normal)),
            _ => Some(normal),
        }
    }
}

/// One of the two.
pub trait Backend: Send + Sync {
    /// As users see it: "built-in KSM" or "rksm".
    fn name(&self) -> &'static str;
    /// rksm's version, or the kernel's release.
    fn version(&self) -> Result<String, Failure>;
    fn counters(&self) -> Result<Counters, Failure>;
    fn knobs(&self) -> Result<Knobs, Failure>;
    /// Writes a file of /sys/kernel/mm/ksm, or of rksm's own.
    fn set(&self, knob: &str, value: &dyn Display) -> Result<(), Failure>;
    /// What only rksm has; nothing on the built-in.
    fn own(&self) -> Result<Option<Own>, Failure>;
    /// CPU time of the scanner's threads since they were started.
    fn cpu_time(&self) -> Result<Duration, Failure>;

    fn is_rksm(&self) -> bool {
        self.name() == "rksm"
    }

    /// Fails where this is not rksm; `what` is as in [`Failure::needs_rksm`].
    fn require_rksm(&self, what: &str) -> Result<(), Failure> {
        if self.is_rksm() {
            Ok(())
        } else {
            Err(Failure::needs_rksm(what))
        }
    }
}

/// The one that this kernel runs.
pub fn detect(host: &Host) -> Result<Box<dyn Backend>, Failure> {
    if host.exists(RKSM) {
        Ok(Box::new(Rksm { host: host.clone() }))
    } else if host.exists(KSM) {
        Ok(Box::new(Builtin { host: host.clone() }))
    } else {
        Err(Failure::failed("this kernel has no KSM"))
    }
}

struct Builtin {
    host: Host,
}

struct Rksm {
    host: Host,
}

impl Backend for Builtin {
    fn name(&self) -> &'static str {
        "built-in KSM"
    }

    fn version(&self) -> Result<String, Failure> {
        release(&self.host)
    }

    fn counters(&self) -> Result<Counters, Failure> {
        counters(&self.host)
    }

    fn knobs(&self) -> Result<Knobs, Failure> {
        knobs(&self.host)
    }

    fn set(&self, knob: &str, value: &dyn Display) -> Result<(), Failure> {
        self.host.write(format!("{KSM}/{knob}"), value)
    }

    fn own(&self) -> Result<Option<Own>, Failure> {
        Ok(None)
    }

    fn cpu_time(&self) -> Result<Duration, Failure> {
        cpu_time(&self.host, "ksmd")
    }
}

impl Backend for Rksm {
    fn name(&self) -> &'static str {
        "rksm"
    }

    fn version(&self) -> Result<String, Failure> {
        self.host.read(format!("{RKSM}/version"))
    }

    fn counters(&self) -> Result<Counters, Failure> {
        counters(&self.host)
    }

    fn knobs(&self) -> Result<Knobs, Failure> {
        knobs(&self.host)
    }

    fn set(&self, knob: &str, value: &dyn Display) -> Result<(), Failure> {
        let own = format!("{RKSM}/{knob}");
        if self.host.exists(&own) {
            self.host.write(own, value)
        } else {
            self.host.write(format!("{KSM}/{knob}"), value)
        }
    }

    fn own(&self) -> Result<Option<Own>, Failure> {
        let mut refused = BTreeMap::new();
        for reason in self.host.list(format!("{RKSM}/refused"))? {
            let pages = self.host.value(format!("{RKSM}/refused/{reason}"))?;
            refused.insert(reason, pages);
        }
        let host = &self.host;
        Ok(Some(Own {
            refused,
            scan_threads: rksm(host, "scan_threads")?,
            longest_hold_usecs: rksm(host, "longest_hold_usecs")?,
            metadata_bytes: rksm(host, "metadata_bytes")?,
            wakeups: rksm(host, "wakeups")?,
            cpu_microsecs: rksm(host, "cpu_microsecs")?,
            processes: rksm(host, "processes")?,
            governor: rksm(host, "governor")?.map(chosen),
            cpu_percent: rksm(host, "cpu_percent")?,
            pressure_cpu_percent: rksm(host, "pressure_cpu_percent")?,
            cpu_burst_millisecs: rksm(host, "cpu_burst_millisecs")?,
            memory_pressure: rksm(host, "memory_pressure")?.map(flag),
            domains: rksm(host, "domains")?.map(chosen),
        }))
    }

    fn cpu_time(&self) -> Result<Duration, Failure> {
        match rksm(&self.host, "cpu_microsecs")? {
            Some(microsecs) => Ok(Duration::from_micros(microsecs)),
            None => cpu_time(&self.host, "rksmd"),
        }
    }
}

/// The release of the kernel.
pub fn release(host: &Host) -> Result<String, Failure> {
    host.read("/proc/sys/kernel/osrelease")
}

fn ksm<T: FromStr>(host: &Host, name: &str) -> Result<T, Failure> {
    host.value(format!("{KSM}/{name}"))
}

fn ksm_if_there<T: FromStr>(host: &Host, name: &str) -> Result<Option<T>, Failure> {
    host.value_if_there(format!("{KSM}/{name}"))
}

fn rksm<T: FromStr>(host: &Host, name: &str) -> Result<Option<T>, Failure> {
    host.value_if_there(format!("{RKSM}/{name}"))
}

/// Of "none [scan-time]", the one in brackets; a text without brackets as it is.
fn chosen(text: String) -> String {
    text.split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'))
        .map_or(text.clone(), |(word, _)| word.to_string())
}

fn flag(n: u64) -> bool {
    n != 0
}

fn counters(host: &Host) -> Result<Counters, Failure> {
    Ok(Counters {
        pages_shared: ksm(host, "pages_shared")?,
        pages_sharing: ksm(host, "pages_sharing")?,
        pages_unshared: ksm(host, "pages_unshared")?,
        pages_volatile: ksm(host, "pages_volatile")?,
        full_scans: ksm(host, "full_scans")?,
        stable_node_chains: ksm(host, "stable_node_chains")?,
        stable_node_dups: ksm(host, "stable_node_dups")?,
        pages_scanned: ksm_if_there(host, "pages_scanned")?,
        pages_skipped: ksm_if_there(host, "pages_skipped")?,
        // Of a counter that others change meanwhile, and that is shown as signed.
        ksm_zero_pages: ksm_if_there::<i64>(host, "ksm_zero_pages")?
            .map(|pages| pages.try_into().unwrap_or(0)),
        general_profit: ksm_if_there(host, "general_profit")?,
    })
}

fn knobs(host: &Host) -> Result<Knobs, Failure> {
    Ok(Knobs {
        run: ksm(host, "run")?,
        pages_to_scan: ksm(host, "pages_to_scan")?,
        sleep_millisecs: ksm(host, "sleep_millisecs")?,
        max_page_sharing: ksm(host, "max_page_sharing")?,
        merge_across_nodes: ksm_if_there(host, "merge_across_nodes")?.map(flag),
        use_zero_pages: ksm(host, "use_zero_pages").map(flag)?,
        smart_scan: ksm_if_there(host, "smart_scan")?.map(flag),
        advisor_mode: ksm_if_there(host, "advisor_mode")?.map(chosen),
    })
}

/// CPU time of the kernel threads named `name` or `name`/N.
fn cpu_time(host: &Host, name: &str) -> Result<Duration, Failure> {
    let mut ticks = 0;
    for pid in host.list("/proc")? {
        if !pid.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        if let Some(stat) = host.read_if_there(format!("/proc/{pid}/stat"))? {
            ticks += thread_ticks(&stat, name).unwrap_or(0);
        }
    }
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)
        .ok()
        .flatten()
        .and_then(|n| u64::try_from(n).ok())
        .unwrap_or(100);
    Ok(Duration::from_millis(ticks * 1000 / per_second))
}

/// utime + stime of /proc/PID/stat, where it is a kernel thread of that name.
fn thread_ticks(stat: &str, name: &str) -> Option<u64> {
    const KTHREADD: &str = "2";
    let (before, after) = stat.rsplit_once(')')?;
    let (_, comm) = before.split_once('(')?;
    let fields: Vec<&str> = after.split_whitespace().collect();
    let rest = comm.strip_prefix(name)?;
    if !(rest.is_empty() || rest.starts_with('/')) || *fields.get(1)? != KTHREADD {
        return None;
    }
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    #[test]
    fn no_ksm() {
        let fixture = Fixture::new();
        let failure = detect(&Host::new(fixture.root())).err().unwrap();
        assert_eq!(failure, Failure::failed("this kernel has no KSM"));
    }

    #[test]
    fn builtin() {
        let fixture = Fixture::new();
        fixture.builtin();
        let backend = detect(&Host::new(fixture.root())).unwrap();
        assert_eq!(backend.name(), "built-in KSM");
        assert_eq!(backend.version().unwrap(), "7.3.4+deb13-amd64");
        let counters = backend.counters().unwrap();
        assert_eq!(counters.pages_sharing, 3000);
        assert_eq!(counters.saved_bytes(), (3000 + 96) * 4096);
        assert_eq!(backend.knobs().unwrap().advisor_mode.unwrap(), "none");
        assert_eq!(backend.cpu_time().unwrap(), Duration::from_millis(12340));
        assert_eq!(backend.own().unwrap(), None);
        assert_eq!(backend.require_rksm("x").unwrap_err().status, 3);
        backend.set("run", &0).unwrap();
        assert_eq!(backend.knobs().unwrap().run, 0);
    }

    #[test]
    fn rksm() {
        let fixture = Fixture::new();
        fixture.rksm();
        let backend = detect(&Host::new(fixture.root())).unwrap();
        assert_eq!(backend.version().unwrap(), "0.4.0");
        let own = backend.own().unwrap().unwrap();
        assert_eq!(own.refused["pinned"], 113);
        assert_eq!(own.governor.as_deref(), Some("auto"));
        assert_eq!((own.memory_pressure, own.budget()), (Some(false), Some(5)));
        assert_eq!(backend.cpu_time().unwrap(), Duration::from_millis(5600));
        backend.set("scan_threads", &2).unwrap();
        assert_eq!(backend.own().unwrap().unwrap().scan_threads, Some(2));
    }

    #[test]
    fn budgets() {
        let mut own = Own {
            governor: Some("auto".into()),
            cpu_percent: Some(5),
            ..Own::default()
        };
        assert_eq!(own.budget(), Some(5));
        (own.memory_pressure, own.pressure_cpu_percent) = (Some(true), Some(10));
        assert_eq!(own.budget(), Some(10));
        // Pressure never means less.
        own.pressure_cpu_percent = Some(3);
        assert_eq!(own.budget(), Some(5));
        own.governor = Some("knobs".into());
        assert_eq!(own.budget(), None);
        assert_eq!(Own::default().budget(), None);
    }
}
