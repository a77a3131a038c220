// SPDX-License-Identifier: GPL-2.0-only
//! The counters as metrics, in OpenMetrics 1.0 or in the text format of Prometheus.
//!
//! The names are an interface: Documentation/operating/metrics.md lists them.

use crate::backend;
use crate::exit::Failure;
use crate::host::Host;
use crate::sample::{Sample, Unit};
use crate::units::page_size;
use serde::Serialize;
use serde_json::Number;
use std::collections::BTreeMap;
use std::fmt::Write;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// May go up and down.
    Gauge,
    /// Only grows, until the machine or the module starts anew.
    Counter,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Gauge => "gauge",
            Self::Counter => "counter",
        }
    }
}

/// Which text to write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// OpenMetrics 1.0
    #[default]
    Openmetrics,
    /// The older format of Prometheus
    Prometheus,
}

impl Format {
    /// For HTTP.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Openmetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// Metrics of one name.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Family {
    /// With "_total" where it is a counter.
    pub name: &'static str,
    #[serde(rename = "type")]
    pub kind: Kind,
    /// "bytes", "seconds", "ratio"; nothing where things are counted.
    pub unit: Option<&'static str>,
    pub help: &'static str,
    pub samples: Vec<Value>,
}

/// One metric.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Value {
    pub labels: BTreeMap<&'static str, String>,
    pub value: Number,
}

/// Nothing where this kernel does not tell.
type Maybe = Option<Number>;

fn int(n: u64) -> Maybe {
    Some(n.into())
}

fn bytes(pages: u64) -> Maybe {
    int(pages.saturating_mul(page_size()))
}

fn ratio(percent: u64) -> Maybe {
    Number::from_f64(percent as f64 / 100.0)
}

fn label(name: &'static str, value: &str) -> BTreeMap<&'static str, String> {
    BTreeMap::from([(name, value.to_string())])
}

#[derive(Default)]
struct Families(Vec<Family>);

impl Families {
    fn all(&mut self, name: &'static str, kind: Kind, help: &'static str, samples: Vec<Value>) {
        let base = name.trim_end_matches("_total");
        let unit = ["bytes", "seconds", "ratio"]
            .into_iter()
            .find(|unit| base.ends_with(&format!("_{unit}")));
        if !samples.is_empty() {
            self.0.push(Family {
                name,
                kind,
                unit,
                help,
                samples,
            });
        }
    }

    fn one(&mut self, name: &'static str, kind: Kind, help: &'static str, value: Maybe) {
        let value = value.map(|value| Value {
            labels: BTreeMap::new(),
            value,
        });
        self.all(name, kind, help, value.into_iter().collect());
    }

    fn gauge(&mut self, name: &'static str, help: &'static str, value: Maybe) {
        self.one(name, Kind::Gauge, help, value);
    }

    fn counter(&mut self, name: &'static str, help: &'static str, value: Maybe) {
        self.one(name, Kind::Counter, help, value);
    }

    /// 1, with facts that are text as labels.
    fn info(
        &mut self,
        name: &'static str,
        help: &'static str,
        labels: BTreeMap<&'static str, String>,
    ) {
        let value = 1.into();
        // The type "info" would be right, but node_exporter refuses a file that has it.
        self.all(name, Kind::Gauge, help, vec![Value { labels, value }]);
    }

    fn units(
        &mut self,
        name: &'static str,
        help: &'static str,
        units: &[(&String, &Unit)],
        of: impl Fn(&Unit) -> Maybe,
    ) {
        let samples = units.iter().filter_map(|(unit, sums)| {
            Some(Value {
                labels: label("unit", unit),
                value: of(sums)?,
            })
        });
        self.all(name, Kind::Gauge, help, samples.collect());
    }
}

/// All that the machine tells now.
pub fn collect(host: &Host) -> Result<Vec<Family>, Failure> {
    let backend = backend::detect(host)?;
    let sample = Sample::take(host, 0.0)?;
    let mut families = Families::default();
    families.info(
        "ksm_build_info",
        "Which KSM the kernel runs.",
        BTreeMap::from([
            ("implementation", backend.name().to_string()),
            ("version", backend.version()?),
            ("kernel", backend::release(host)?),
        ]),
    );
    both(&mut families, &sample);
    per_unit(&mut families, &sample);
    rksm(&mut families, &sample);
    Ok(families.0)
}

fn both(f: &mut Families, sample: &Sample) {
    let c = &sample.counters;
    let k = &sample.knobs;
    f.gauge("ksm_run", "0 stopped, 1 merging, 2 unmerging.", int(k.run));
    f.gauge(
        "ksm_saved_bytes",
        "Memory that is free because of merging, metadata not taken off.",
        int(c.saved_bytes()),
    );
    f.gauge(
        "ksm_profit_bytes",
        "Memory that is free because of merging, less the metadata.",
        c.general_profit.map(Number::from),
    );
    f.gauge(
        "ksm_shared_bytes",
        "Merged pages themselves.",
        bytes(c.pages_shared),
    );
    f.gauge(
        "ksm_sharing_bytes",
        "Memory that merged pages stand for, beyond themselves.",
        bytes(c.pages_sharing),
    );
    f.gauge(
        "ksm_zero_bytes",
        "Memory that the zero page stands for.",
        c.ksm_zero_pages.and_then(bytes),
    );
    f.gauge(
        "ksm_unshared_bytes",
        "Memory that does not change and has no equal.",
        bytes(c.pages_unshared),
    );
    f.gauge(
        "ksm_volatile_bytes",
        "Memory that changes too often to be merged.",
        bytes(c.pages_volatile),
    );
    f.gauge(
        "ksm_stable_node_chains",
        "Contents that have more than one merged page.",
        int(c.stable_node_chains),
    );
    f.gauge(
        "ksm_stable_node_dups",
        "Merged pages of such contents.",
        int(c.stable_node_dups),
    );
    f.counter(
        "ksm_cpu_seconds_total",
        "CPU time of the scanner.",
        Number::from_f64(sample.cpu_seconds),
    );
    f.counter(
        "ksm_full_scans_total",
        "Full scans of all mergeable memory.",
        int(c.full_scans),
    );
    f.counter(
        "ksm_pages_scanned_total",
        "Pages looked at.",
        c.pages_scanned.and_then(int),
    );
    f.counter(
        "ksm_pages_skipped_total",
        "Pages passed over, as they have not merged for long.",
        c.pages_skipped.and_then(int),
    );
    f.counter(
        "ksm_pages_broken_total",
        "Merged pages that were written to, and copied.",
        sample.broken_pages.and_then(int),
    );
    f.gauge(
        "ksm_pages_to_scan",
        "Pages that the scanner looks at between two pauses.",
        int(k.pages_to_scan),
    );
    f.gauge(
        "ksm_sleep_seconds",
        "A pause of the scanner.",
        Number::from_f64(k.sleep_millisecs as f64 / 1e3),
    );
    f.gauge(
        "ksm_max_page_sharing",
        "Mappings that one merged page may have.",
        int(k.max_page_sharing),
    );
}

fn per_unit(f: &mut Families, sample: &Sample) {
    // The others have nothing to do with KSM, and sessions come and go.
    let units: Vec<_> = sample.units.iter().filter(|(_, u)| u.mergeable).collect();
    f.units("ksm_unit_processes", "Processes of a unit.", &units, |u| {
        int(u.processes)
    });
    f.units(
        "ksm_unit_anon_bytes",
        "Anonymous memory of a unit's processes.",
        &units,
        |u| int(u.anon_bytes),
    );
    f.units(
        "ksm_unit_merged_bytes",
        "Memory of a unit's processes that is mappings of merged pages.",
        &units,
        |u| u.merging_pages.and_then(bytes),
    );
    f.units(
        "ksm_unit_zero_bytes",
        "Memory of a unit's processes that KSM has made mappings of the zero page.",
        &units,
        |u| u.zero_pages.and_then(bytes),
    );
}

fn rksm(f: &mut Families, sample: &Sample) {
    let Some(own) = &sample.own else {
        return;
    };
    let mut settings = BTreeMap::new();
    settings.extend(own.governor.clone().map(|text| ("governor", text)));
    settings.extend(own.domains.clone().map(|text| ("domains", text)));
    if !settings.is_empty() {
        f.info("rksm_settings_info", "Settings that are words.", settings);
    }
    f.all(
        "rksm_refused_total",
        Kind::Counter,
        "Times that a page was not merged, by reason.",
        own.refused
            .iter()
            .map(|(reason, pages)| Value {
                labels: label("reason", reason),
                value: (*pages).into(),
            })
            .collect(),
    );
    f.gauge(
        "rksm_metadata_bytes",
        "Memory that rksm uses itself.",
        own.metadata_bytes.and_then(int),
    );
    f.gauge(
        "rksm_processes",
        "Processes that have mergeable memory.",
        own.processes.and_then(int),
    );
    f.gauge(
        "rksm_scan_threads",
        "Threads that scan.",
        own.scan_threads.and_then(int),
    );
    f.gauge(
        "rksm_longest_hold_seconds",
        "The longest time that rksm has held a lock of a process.",
        own.longest_hold_usecs
            .and_then(|usecs| Number::from_f64(usecs as f64 / 1e6)),
    );
    f.counter(
        "rksm_wakeups_total",
        "Times that the scanner woke up.",
        own.wakeups.and_then(int),
    );
    f.gauge(
        "rksm_cpu_limit_ratio",
        "CPUs that the governor may use on average.",
        own.cpu_percent.and_then(ratio),
    );
    f.gauge(
        "rksm_pressure_cpu_limit_ratio",
        "CPUs that the governor may use on average while memory is short.",
        own.pressure_cpu_percent.and_then(ratio),
    );
    f.gauge(
        "rksm_cpu_burst_seconds",
        "CPU time that the governor may save up.",
        own.cpu_burst_millisecs
            .and_then(|ms| Number::from_f64(ms as f64 / 1e3)),
    );
    f.gauge(
        "rksm_memory_pressure",
        "1 while the governor finds memory short, else 0.",
        own.memory_pressure.and_then(|short| int(short.into())),
    );
}

/// The text of them.
pub fn text(families: &[Family], format: Format) -> String {
    let mut text = String::new();
    for family in families {
        let (name, kind) = (family.name, family.kind.name());
        // OpenMetrics has "_total" in the samples only.
        let base = match format {
            Format::Openmetrics if family.kind == Kind::Counter => {
                name.strip_suffix("_total").unwrap_or(name)
            }
            _ => name,
        };
        // Nothing can fail: it is a String.
        let _ = writeln!(text, "# TYPE {base} {kind}");
        if let (Format::Openmetrics, Some(unit)) = (format, family.unit) {
            let _ = writeln!(text, "# UNIT {base} {unit}");
        }
        let _ = writeln!(text, "# HELP {base} {}", escaped(family.help, format));
        for sample in &family.samples {
            let labels: Vec<String> = sample
                .labels
                .iter()
                .map(|(label, value)| {
                    format!("{label}=\"{}\"", escaped(value, Format::Openmetrics))
                })
                .collect();
            let _ = match labels.is_empty() {
                true => writeln!(text, "{name} {}", sample.value),
                false => writeln!(text, "{name}{{{}}} {}", labels.join(","), sample.value),
            };
        }
    }
    if format == Format::Openmetrics {
        text += "# EOF\n";
    }
    text
}

/// The help of Prometheus' own format is the only place where a quote is not escaped.
fn escaped(text: &str, format: Format) -> String {
    let text = text.replace('\\', "\\\\").replace('\n', "\\n");
    match format {
        Format::Openmetrics => text.replace('"', "\\\""),
        Format::Prometheus => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_values_are_escaped() {
        let mut f = Families::default();
        let labels = label("unit", "a\\b\"c\nd\u{e9}");
        f.all(
            "x_bytes",
            Kind::Gauge,
            "A \"b\".",
            vec![Value {
                labels,
                value: 1.into(),
            }],
        );
        let line = "x_bytes{unit=\"a\\\\b\\\"c\\nd\u{e9}\"} 1\n";
        assert_eq!(
            text(&f.0, Format::Openmetrics),
            format!(
                "# TYPE x_bytes gauge\n# UNIT x_bytes bytes\n# HELP x_bytes A \\\"b\\\".\n\
                 {line}# EOF\n"
            )
        );
        assert_eq!(
            text(&f.0, Format::Prometheus),
            format!("# TYPE x_bytes gauge\n# HELP x_bytes A \"b\".\n{line}")
        );
    }

    #[test]
    fn absurd_counts_do_not_panic() {
        assert_eq!(bytes(u64::MAX), int(u64::MAX));
    }
}
