// SPDX-License-Identifier: GPL-2.0-only
//! Where the table's figures come from: /proc, and of rksm its device.

use crate::backend::Backend;
use crate::device::{Device, Stat};
use crate::exit::Failure;
use crate::host::Host;
use crate::process::{self, Process};
use crate::top::model::{Facts, Look};
use crate::units::{bytes, page_size, percent, signed_bytes};
use crate::verbs::{self, status::meminfo};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Gives looks at a machine.
pub struct Source {
    host: Host,
    backend: Box<dyn Backend>,
    device: Option<Device>,
    began: Instant,
    cpu: Option<(Duration, Duration)>,
    /// Why some columns are empty.
    pub lacking: Option<String>,
}

impl Source {
    pub fn new(host: &Host, backend: Box<dyn Backend>) -> Self {
        let (device, lacking) = if !backend.is_rksm() {
            let why = "UNIQUE, CHANGING and BROKEN/s need rksm";
            (None, Some(why.to_string()))
        } else {
            match Device::open(host) {
                Ok(device) => (Some(device), None),
                Err(failure) => (None, Some(failure.message)),
            }
        };
        Self {
            host: host.clone(),
            backend,
            device,
            began: Instant::now(),
            cpu: None,
            lacking,
        }
    }

    pub fn look(&mut self) -> Result<Look, Failure> {
        let stats: Option<HashMap<i32, Stat>> = match &self.device {
            Some(device) => Some(device.stats()?.into_iter().map(|s| (s.pid, s)).collect()),
            None => None,
        };
        let at = self.began.elapsed();
        let processes = process::list(&self.host)?;
        Ok(Look {
            at,
            processes: processes.iter().map(|p| facts(p, stats.as_ref())).collect(),
        })
    }

    /// One line about the machine as a whole.
    pub fn headline(&mut self) -> Result<String, Failure> {
        let counters = self.backend.counters()?;
        let mut parts = vec![
            self.backend.name().to_string(),
            format!("saved {} net", signed_bytes(counters.net_bytes())),
        ];
        let own = self.backend.own()?.unwrap_or_default();
        let budget = own.budget();
        let now = (self.began.elapsed(), self.backend.cpu_time()?);
        if let Some((at, cpu)) = self.cpu {
            let seconds = now.0.saturating_sub(at).as_secs_f64();
            if seconds > 0.0 {
                let used = now.1.saturating_sub(cpu).as_secs_f64();
                let used = percent(used / seconds * 100.0);
                parts.push(match budget {
                    Some(budget) => format!("CPU {used} of {budget} %"),
                    None => format!("CPU {used}"),
                });
            }
        }
        self.cpu = Some(now);
        if let Some(available) = meminfo(&self.host, "MemAvailable")? {
            parts.push(format!("available {}", bytes(available)));
        }
        if budget.is_some() && own.memory_pressure == Some(true) {
            parts.push("memory short".into());
        }
        match self.backend.knobs()?.run {
            0 => parts.push("run 0: stopped".into()),
            2 => parts.push("run 2: unmerging".into()),
            _ => {}
        }
        Ok(parts.join("  "))
    }

    /// Why memory of one process is not merged, in lines.
    pub fn why(&self, pid: i32, width: usize) -> String {
        let text = |process: Process| {
            let backend = self.backend.as_ref();
            verbs::why::text_of(&process, &self.host, backend, self.device.as_ref(), width)
        };
        match process::read(&self.host, pid) {
            Ok(Some(process)) => text(process).unwrap_or_else(|failure| failure.message),
            Ok(None) => format!("{pid} has ended."),
            Err(failure) => failure.message,
        }
    }
}

fn facts(p: &Process, stats: Option<&HashMap<i32, Stat>>) -> Facts {
    let page = page_size();
    let saved = p
        .ksm
        .merging_pages
        .map(|pages| (pages + p.ksm.zero_pages.unwrap_or(0)) * page);
    // A process that rksm does not know has none of these, which is not the same as not told.
    let none = Stat::default();
    let stat = stats.map(|stats| stats.get(&p.pid).unwrap_or(&none));
    let unit = p.unit.clone().or_else(|| p.cgroup.clone());
    Facts {
        pid: p.pid,
        title: p.title().to_string(),
        unit: unit.unwrap_or_else(|| "/".into()),
        offers: p.ksm.mergeable == Some(true)
            || p.ksm.merge_any == Some(true)
            || p.ksm.rmap_items.unwrap_or(0) > 0,
        anon: p.anon_bytes,
        saved: match stat {
            Some(stat) => Some((stat.merged + stat.zero) * page),
            None => saved,
        },
        unique: stat.map(|stat| stat.unique * page),
        changing: stat.map(|stat| stat.changing * page),
        broken: stat.map(|stat| stat.broken),
    }
}
