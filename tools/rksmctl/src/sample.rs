// SPDX-License-Identifier: GPL-2.0-only
//! All that there is to know at one moment: what `record` writes and `export` gives.

use crate::backend::{self, Backend, Counters, Knobs, Own};
use crate::exit::Failure;
use crate::host::Host;
use crate::process;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One look at the machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Since the recording began.
    pub seconds: f64,
    /// [`Backend::name`]; rksm may come and go during a recording.
    pub backend: String,
    pub counters: Counters,
    pub knobs: Knobs,
    /// Nothing on the built-in.
    #[serde(default)]
    pub own: Option<Own>,
    /// CPU time of the scanner.
    pub cpu_seconds: f64,
    /// MemAvailable.
    #[serde(default)]
    pub available_bytes: Option<u64>,
    /// Merged pages that have been written to, since the machine was booted.
    #[serde(default)]
    pub broken_pages: Option<u64>,
    /// By systemd unit, or by cgroup where that is in no unit.
    #[serde(default)]
    pub units: BTreeMap<String, Unit>,
}

/// Sums over the processes of a unit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Unit {
    pub processes: u64,
    pub anon_bytes: u64,
    /// Nothing where no process of it tells, or not to us.
    pub merging_pages: Option<u64>,
    pub zero_pages: Option<u64>,
    /// Whether any of its processes is open to merging, or has been.
    pub mergeable: bool,
}

impl Sample {
    /// Looks at the machine now.
    pub fn take(host: &Host, seconds: f64) -> Result<Self, Failure> {
        Self::of(host, backend::detect(host)?.as_ref(), seconds)
    }

    fn of(host: &Host, backend: &dyn Backend, seconds: f64) -> Result<Self, Failure> {
        Ok(Self {
            seconds,
            backend: backend.name().to_string(),
            counters: backend.counters()?,
            knobs: backend.knobs()?,
            own: backend.own()?,
            cpu_seconds: backend.cpu_time()?.as_secs_f64(),
            available_bytes: meminfo(host, "MemAvailable")?,
            broken_pages: broken(host)?,
            units: units(host)?,
        })
    }
}

/// A line of /proc/meminfo, in bytes.
pub fn meminfo(host: &Host, name: &str) -> Result<Option<u64>, Failure> {
    let text = host.read_if_there("/proc/meminfo")?.unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(line
        .and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .and_then(|kib| kib.checked_mul(1024)))
}

fn broken(host: &Host) -> Result<Option<u64>, Failure> {
    let text = host.read_if_there("/proc/vmstat")?.unwrap_or_default();
    Ok(text
        .lines()
        .find_map(|line| line.strip_prefix("cow_ksm ")?.trim().parse().ok()))
}

fn units(host: &Host) -> Result<BTreeMap<String, Unit>, Failure> {
    let mut units: BTreeMap<String, Unit> = BTreeMap::new();
    for process in process::list(host)? {
        let name = process
            .unit
            .or(process.cgroup)
            .unwrap_or_else(|| "/".into());
        let unit = units.entry(name).or_default();
        let ksm = &process.ksm;
        unit.processes += 1;
        unit.anon_bytes = unit.anon_bytes.saturating_add(process.anon_bytes);
        unit.merging_pages = sum(unit.merging_pages, ksm.merging_pages);
        unit.zero_pages = sum(unit.zero_pages, ksm.zero_pages);
        unit.mergeable |= ksm.merge_any == Some(true)
            || ksm.mergeable == Some(true)
            || [ksm.merging_pages, ksm.zero_pages, ksm.rmap_items]
                .iter()
                .any(|pages| pages.is_some_and(|n| n > 0));
    }
    Ok(units)
}

fn sum(a: Option<u64>, b: Option<u64>) -> Option<u64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.saturating_add(b)),
        (a, b) => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, Proc};

    #[test]
    fn sums_by_unit() {
        let fixture = Fixture::new();
        fixture.rksm();
        fixture.processes();
        fixture.file("/proc/vmstat", "nr_free_pages 1\ncow_ksm 77\n");
        fixture.process(&Proc {
            pid: 900,
            comm: "helper",
            cgroup: "/qemu.slice/100.scope",
            anon_kib: 4,
            merging_pages: 5,
            ..Proc::default()
        });
        fixture.process(&Proc {
            pid: 901,
            comm: "hidden",
            cgroup: "/docker/abc",
            ..Proc::default()
        });
        fixture.remove("/proc/901/ksm_stat");
        let sample = Sample::take(&Host::new(fixture.root()), 1.5).unwrap();
        assert_eq!(sample.backend, "rksm");
        assert_eq!(sample.available_bytes, Some(10 << 30));
        assert_eq!(sample.broken_pages, Some(77));
        let names: Vec<_> = sample.units.keys().map(String::as_str).collect();
        let expected = [
            "/docker/abc",
            "100.scope",
            "101.scope",
            "init.scope",
            "ssh.service",
        ];
        assert_eq!(names, expected);
        let vm = &sample.units["100.scope"];
        assert_eq!(vm.processes, 2);
        assert_eq!(vm.anon_bytes, (4000 << 20) + 4096);
        assert_eq!(vm.merging_pages, Some(2005));
        assert_eq!(vm.zero_pages, Some(48));
        assert!(vm.mergeable && !sample.units["ssh.service"].mergeable);
        assert_eq!(sample.units["/docker/abc"].merging_pages, None);
        assert_eq!(sample.units["ssh.service"].merging_pages, Some(0));
        let text = serde_json::to_string(&sample).unwrap();
        assert_eq!(serde_json::from_str::<Sample>(&text).unwrap(), sample);
    }
}
