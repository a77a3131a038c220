// SPDX-License-Identifier: GPL-2.0-only
//! What a recording comes to: totals, and values to plot, few enough however long it is.

use crate::backend::{Knobs, Own};
use crate::plot::{Plot, Quantity, Series, Style, MOST_SERIES};
use crate::sample::{Sample, Unit};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// More points than a plot has columns would only make the page larger.
const MOST_POINTS: usize = 1000;
/// An advisor changes a knob with each scan.
const MOST_CHANGES: usize = 50;

/// A value that goes up and down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Course {
    pub first: f64,
    pub last: f64,
    pub highest: f64,
}

impl Course {
    fn add(course: &mut Option<Self>, value: f64) {
        match course {
            None => {
                *course = Some(Self {
                    first: value,
                    last: value,
                    highest: value,
                });
            }
            Some(course) => {
                course.last = value;
                course.highest = course.highest.max(value);
            }
        }
    }
}

/// A knob that was changed meanwhile.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    pub seconds: f64,
    pub knob: String,
    pub from: Value,
    pub to: Value,
}

/// The same of one unit.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct UnitTotals {
    pub anon_bytes: Option<Course>,
    pub merged_bytes: Option<Course>,
}

/// All that the summary has.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Totals {
    pub records: u64,
    pub seconds: f64,
    pub saved_bytes: Option<Course>,
    pub net_bytes: Option<Course>,
    pub changing_bytes: Option<Course>,
    pub available_bytes: Option<Course>,
    pub metadata_bytes: Option<Course>,
    pub cpu_seconds: f64,
    pub full_scans: f64,
    pub pages_scanned: Option<f64>,
    pub broken_pages: Option<f64>,
    /// By reason; rksm only.
    pub refused: BTreeMap<String, f64>,
    /// Implementations, in the order in which they were there.
    pub backends: Vec<String>,
    pub knobs: Knobs,
    /// Those that only rksm has.
    pub own_knobs: BTreeMap<String, Value>,
    pub knob_changes: Vec<Change>,
    /// Those that are not listed any more.
    pub more_knob_changes: u64,
    pub units: BTreeMap<String, UnitTotals>,
}

impl Totals {
    /// Of one CPU, on average.
    pub fn cpu_percent(&self) -> f64 {
        if self.seconds > 0.0 {
            self.cpu_seconds / self.seconds * 100.0
        } else {
            0.0
        }
    }

    /// The units of which most was merged, first.
    pub fn units_by_size(&self) -> Vec<(&String, &UnitTotals)> {
        let highest = |course: Option<Course>| course.map_or(0.0, |c| c.highest);
        let mut units: Vec<_> = self.units.iter().collect();
        units.sort_by(|(_, a), (_, b)| {
            highest(b.merged_bytes)
                .total_cmp(&highest(a.merged_bytes))
                .then(highest(b.anon_bytes).total_cmp(&highest(a.anon_bytes)))
        });
        units
    }
}

/// What is kept of a sample to be plotted.
#[derive(Clone, Debug)]
struct Point {
    seconds: f64,
    saved: f64,
    net: f64,
    /// Sums since the recording began.
    cpu_seconds: f64,
    /// What the governor keeps to, percent of one CPU.
    budget: Option<f64>,
    broken: Option<f64>,
    changing: f64,
    available: Option<f64>,
    units: BTreeMap<String, f64>,
}

/// Takes a recording sample by sample.
#[derive(Debug)]
pub struct Summary {
    page: f64,
    pub totals: Totals,
    points: Vec<Point>,
    /// Every so many samples one is kept, and always the last.
    every: u64,
    last: Option<(Sample, Point)>,
}

fn pages(n: u64, page: f64) -> f64 {
    n as f64 * page
}

/// What a counter has grown by; it begins anew where it is smaller than it was.
fn growth(before: u64, now: u64) -> f64 {
    now.checked_sub(before).unwrap_or(now) as f64
}

fn grown(total: &mut Option<f64>, before: Option<u64>, now: Option<u64>) {
    if let (Some(before), Some(now)) = (before, now) {
        *total = Some(total.unwrap_or(0.0) + growth(before, now));
    }
}

impl Summary {
    pub fn new(page_bytes: u64) -> Self {
        Self {
            page: page_bytes as f64,
            totals: Totals::default(),
            points: Vec::new(),
            every: 1,
            last: None,
        }
    }

    pub fn add(&mut self, sample: Sample) {
        let before = self.last.take().map(|(sample, _)| sample);
        match &before {
            None => {
                self.totals.knobs = sample.knobs.clone();
                self.totals.own_knobs = own_fields(sample.own.as_ref());
            }
            Some(before) => self.grow(before, &sample),
        }
        let point = self.point(&sample);
        let t = &mut self.totals;
        t.records += 1;
        t.seconds = sample.seconds;
        if t.backends.last() != Some(&sample.backend) {
            t.backends.push(sample.backend.clone());
        }
        Course::add(&mut t.saved_bytes, point.saved);
        Course::add(&mut t.net_bytes, point.net);
        Course::add(&mut t.changing_bytes, point.changing);
        if let Some(available) = point.available {
            Course::add(&mut t.available_bytes, available);
        }
        if let Some(bytes) = sample.own.as_ref().and_then(|own| own.metadata_bytes) {
            Course::add(&mut t.metadata_bytes, bytes as f64);
        }
        for (name, unit) in &sample.units {
            let totals = t.units.entry(name.clone()).or_default();
            Course::add(&mut totals.anon_bytes, unit.anon_bytes as f64);
            if let Some(bytes) = merged(unit, self.page) {
                Course::add(&mut totals.merged_bytes, bytes);
            }
        }
        if (t.records - 1) % self.every == 0 {
            if self.points.len() == MOST_POINTS {
                let mut keep = [true, false].into_iter().cycle();
                self.points.retain(|_| keep.next() == Some(true));
                self.every *= 2;
            }
            // It may not be one of those that are kept from now on.
            if (t.records - 1) % self.every == 0 {
                self.points.push(point.clone());
            }
        }
        self.last = Some((sample, point));
    }

    fn point(&self, sample: &Sample) -> Point {
        let c = &sample.counters;
        let saved =
            pages(c.pages_sharing, self.page) + pages(c.ksm_zero_pages.unwrap_or(0), self.page);
        let page = self.page;
        Point {
            seconds: sample.seconds,
            saved,
            net: c.general_profit.map_or(saved, |bytes| bytes as f64),
            cpu_seconds: self.totals.cpu_seconds,
            budget: sample
                .own
                .as_ref()
                .and_then(|own| Some(own.budget()? as f64)),
            broken: sample
                .broken_pages
                .map(|_| self.totals.broken_pages.unwrap_or(0.0)),
            changing: pages(c.pages_volatile, page),
            available: sample.available_bytes.map(|bytes| bytes as f64),
            units: sample
                .units
                .iter()
                .filter_map(|(name, unit)| Some((name.clone(), merged(unit, page)?)))
                .filter(|(_, bytes)| *bytes > 0.0)
                .collect(),
        }
    }

    fn grow(&mut self, before: &Sample, now: &Sample) {
        let t = &mut self.totals;
        grown(&mut t.broken_pages, before.broken_pages, now.broken_pages);
        // The counters of two implementations have nothing to do with each other.
        if before.backend == now.backend {
            let (a, b) = (&before.counters, &now.counters);
            // A thread that has ended takes its time along.
            t.cpu_seconds += (now.cpu_seconds - before.cpu_seconds).max(0.0);
            t.full_scans += growth(a.full_scans, b.full_scans);
            grown(&mut t.pages_scanned, a.pages_scanned, b.pages_scanned);
            if let (Some(a), Some(b)) = (&before.own, &now.own) {
                for (reason, n) in &b.refused {
                    let old = a.refused.get(reason).copied().unwrap_or(0);
                    *t.refused.entry(reason.clone()).or_default() += growth(old, *n);
                }
            }
        }
        let (mut old, mut new) = (fields(&before.knobs), fields(&now.knobs));
        // Where the implementation changes, those of rksm come or go, and nobody has set them.
        if before.backend == now.backend {
            old.append(&mut own_fields(before.own.as_ref()));
            new.append(&mut own_fields(now.own.as_ref()));
        }
        if old != new {
            for (knob, to) in new {
                let from = old.get(&knob).cloned().unwrap_or_default();
                if from == to {
                    continue;
                }
                if t.knob_changes.len() == MOST_CHANGES {
                    t.more_knob_changes += 1;
                    continue;
                }
                t.knob_changes.push(Change {
                    seconds: now.seconds,
                    knob,
                    from,
                    to,
                });
            }
        }
    }

    /// The plots for which there are values.
    pub fn plots(&self) -> Vec<Plot> {
        let mut points: Vec<&Point> = self.points.iter().collect();
        if let Some((_, last)) = &self.last {
            if points.last().is_none_or(|p| p.seconds < last.seconds) {
                points.push(last);
            }
        }
        let series = |name: &str, of: &dyn Fn(&Point) -> Option<f64>| Series {
            name: name.into(),
            points: points
                .iter()
                .filter_map(|p| Some((p.seconds, of(p)?)))
                .collect(),
        };
        let lines = |title, quantity, series| Plot {
            title,
            quantity,
            style: Style::Lines,
            series,
        };
        let mut plots = vec![
            lines(
                "Saved memory",
                Quantity::Bytes,
                vec![
                    series("saved", &|p| Some(p.saved)),
                    series("less metadata", &|p| Some(p.net)),
                ],
            ),
            lines(
                "CPU time of the scanner",
                Quantity::CpuPercent,
                [
                    Series {
                        name: "scanner".into(),
                        points: rate(&points, |p| Some(p.cpu_seconds * 100.0)),
                    },
                    series("budget", &|p| p.budget),
                ]
                .into_iter()
                .filter(|series| !series.points.is_empty())
                .collect(),
            ),
            lines(
                "Merged pages that were written to",
                Quantity::PagesPerSecond,
                vec![Series {
                    name: "broken".into(),
                    points: rate(&points, |p| p.broken),
                }],
            ),
            lines(
                "Memory that changes too often to be merged",
                Quantity::Bytes,
                vec![series("changing", &|p| Some(p.changing))],
            ),
            Plot {
                title: "Merged memory by unit",
                quantity: Quantity::Bytes,
                style: Style::Stacked,
                series: self.unit_series(&points),
            },
            lines(
                "Available memory",
                Quantity::Bytes,
                vec![series("available", &|p| p.available)],
            ),
        ];
        plots.retain(|plot| plot.series.iter().any(|s| !s.points.is_empty()));
        plots
    }

    fn unit_series(&self, points: &[&Point]) -> Vec<Series> {
        let units: Vec<&String> = self
            .totals
            .units_by_size()
            .into_iter()
            .filter(|(_, t)| t.merged_bytes.is_some_and(|c| c.highest > 0.0))
            .map(|(name, _)| name)
            .collect();
        // The last colour is for all the others, where there are others.
        let own = if units.len() > MOST_SERIES {
            MOST_SERIES - 1
        } else {
            units.len()
        };
        let (shown, others) = units.split_at(own);
        let sum = |name: String, of: &[&String]| Series {
            name,
            points: points
                .iter()
                .map(|p| {
                    let bytes = of.iter().filter_map(|unit| p.units.get(*unit));
                    (p.seconds, bytes.sum())
                })
                .collect(),
        };
        let mut series: Vec<Series> = shown
            .iter()
            .map(|unit| sum((*unit).clone(), &[*unit]))
            .collect();
        if !others.is_empty() {
            series.push(sum(format!("{} others", others.len()), others));
        }
        series
    }
}

/// What a sum grows by in a second, from each point to the next.
fn rate(points: &[&Point], of: impl Fn(&Point) -> Option<f64>) -> Vec<(f64, f64)> {
    points
        .iter()
        .zip(points.iter().skip(1))
        .filter_map(|(a, b)| {
            let seconds = b.seconds - a.seconds;
            let growth = of(b)? - of(a)?;
            (seconds > 0.0).then(|| (b.seconds, growth / seconds))
        })
        .collect()
}

fn merged(unit: &Unit, page: f64) -> Option<f64> {
    match (unit.merging_pages, unit.zero_pages) {
        (None, None) => None,
        (a, b) => Some(pages(a.unwrap_or(0), page) + pages(b.unwrap_or(0), page)),
    }
}

fn fields(knobs: &Knobs) -> BTreeMap<String, Value> {
    match serde_json::to_value(knobs) {
        Ok(Value::Object(map)) => map.into_iter().collect(),
        _ => BTreeMap::new(),
    }
}

/// The settings of rksm's own.
fn own_fields(own: Option<&Own>) -> BTreeMap<String, Value> {
    const SETTINGS: [&str; 6] = [
        "cpu_burst_millisecs",
        "cpu_percent",
        "domains",
        "governor",
        "pressure_cpu_percent",
        "scan_threads",
    ];
    match serde_json::to_value(own) {
        Ok(Value::Object(map)) => map
            .into_iter()
            .filter(|(name, value)| SETTINGS.contains(&name.as_str()) && !value.is_null())
            .collect(),
        _ => BTreeMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(seconds: f64, sharing: u64, cpu_seconds: f64) -> Sample {
        let mut sample = Sample {
            seconds,
            cpu_seconds,
            backend: "rksm".into(),
            broken_pages: Some(sharing),
            ..Sample::default()
        };
        sample.counters.pages_sharing = sharing;
        sample
    }

    #[test]
    fn long_recordings_are_thinned_out() {
        let mut summary = Summary::new(4096);
        let n: u64 = 5 * MOST_POINTS as u64 + 3;
        for i in 0..=n {
            summary.add(sample(i as f64, i, i as f64 * 0.25));
        }
        let saved = &summary.plots()[0].series[0].points;
        assert!(saved.len() > MOST_POINTS / 2 && saved.len() <= MOST_POINTS + 1);
        let last = n as f64;
        assert_eq!(saved.first(), Some(&(0.0, 0.0)));
        assert_eq!(saved.last(), Some(&(last, last * 4096.0)));
        let step = saved[1].0 - saved[0].0;
        let even = saved
            .windows(2)
            .rev()
            .skip(1)
            .all(|w| w[1].0 - w[0].0 == step);
        assert!(even);
        // What is left out is in the averages.
        let cpu = &summary.plots()[1].series[0].points;
        assert!(cpu
            .iter()
            .all(|(_, percent)| (*percent - 25.0).abs() < 1e-6));
        assert_eq!(summary.totals.records, n + 1);
        assert_eq!(summary.totals.cpu_percent(), 25.0);
        assert_eq!(summary.totals.broken_pages, Some(last));
    }

    #[test]
    fn another_implementation_begins_anew() {
        let mut summary = Summary::new(4096);
        summary.add(sample(0.0, 10, 5.0));
        summary.add(sample(1.0, 10, 6.0));
        let mut other = sample(2.0, 0, 100.0);
        other.backend = "built-in KSM".into();
        summary.add(other);
        assert_eq!(summary.totals.cpu_seconds, 1.0);
        assert_eq!(summary.totals.backends, ["rksm", "built-in KSM"]);
    }

    #[test]
    fn the_budget_of_the_governor() {
        let mut summary = Summary::new(4096);
        let mut governed = sample(0.0, 10, 5.0);
        governed.own = Some(Own {
            governor: Some("auto".into()),
            cpu_percent: Some(5),
            pressure_cpu_percent: Some(10),
            memory_pressure: Some(false),
            ..Own::default()
        });
        summary.add(governed.clone());
        governed.seconds = 1.0;
        governed.own.as_mut().unwrap().memory_pressure = Some(true);
        summary.add(governed.clone());
        assert!(summary.totals.knob_changes.is_empty());
        governed.seconds = 2.0;
        governed.own.as_mut().unwrap().governor = Some("knobs".into());
        summary.add(governed);
        let cpu = &summary.plots()[1].series;
        assert_eq!(cpu[1].name, "budget");
        assert_eq!(cpu[1].points, [(0.0, 5.0), (1.0, 10.0)]);
        let change = &summary.totals.knob_changes[0];
        assert_eq!(
            (change.knob.as_str(), &change.to),
            ("governor", &"knobs".into())
        );
        assert_eq!(summary.totals.own_knobs["cpu_percent"], 5);

        // The built-in has none, which is not a change of a knob.
        let mut builtin = sample(3.0, 10, 5.0);
        builtin.backend = "built-in KSM".into();
        summary.add(builtin);
        assert_eq!(summary.totals.knob_changes.len(), 1);
    }

    #[test]
    fn many_units() {
        let mut summary = Summary::new(4096);
        let mut one = sample(0.0, 0, 0.0);
        for i in 0..20u64 {
            let unit = Unit {
                merging_pages: Some(i),
                ..Unit::default()
            };
            one.units.insert(format!("{i}.scope"), unit);
        }
        summary.add(one);
        let plots = summary.plots();
        let plot = plots.iter().find(|p| p.style == Style::Stacked).unwrap();
        assert_eq!(plot.series.len(), MOST_SERIES);
        assert_eq!(plot.series[0].name, "19.scope");
        assert_eq!(plot.series[7].name, "12 others");
        let sum: f64 = plot.series.iter().map(|s| s.points[0].1).sum();
        assert_eq!(sum, 190.0 * 4096.0);
    }
}
