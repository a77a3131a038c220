// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl report`: a page with plots of a recording.

use crate::exit::{Failure, Status};
use crate::files;
use crate::host::Context;
use crate::plot::{css_colour, Plot};
use crate::recording::{self, Header};
use crate::series::{Course, Summary, Totals};
use crate::units;
use serde::Serialize;
use serde_json::Value;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// What record has written
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The page to write; FILE.html unless given
    #[arg(short, long, value_name = "HTML")]
    pub output: Option<PathBuf>,
}

/// With --json.
#[derive(Debug, Serialize)]
struct Facts<'a> {
    file: String,
    output: String,
    cut_off: bool,
    header: &'a Header,
    cpu_percent: f64,
    #[serde(flatten)]
    totals: &'a Totals,
}

/// More rows than anybody reads; the others are in the JSON.
const MOST_UNITS: usize = 30;

pub fn run(args: &Args, cx: &Context) -> Result<Status, Failure> {
    let name = args.file.display().to_string();
    let output = args.output.clone().unwrap_or_else(|| {
        let mut output = args.file.clone().into_os_string();
        output.push(".html");
        output.into()
    });
    let real = |path| std::fs::canonicalize(path).ok();
    if real(&args.file).is_some() && real(&args.file) == real(&output) {
        return Err(Failure::usage(format!("{name} is the recording itself")));
    }
    let mut reader = recording::open(&args.file)?;
    let mut summary = Summary::new(reader.header.page_bytes);
    while let Some(sample) = reader.next_sample()? {
        summary.add(sample);
    }
    let totals = &summary.totals;
    if totals.records == 0 {
        return Err(Failure::failed(format!("{name} has no whole record")));
    }
    let page = page(&reader.header, &summary, reader.cut_off)?;
    files::write_whole(&output, page.as_bytes())?;
    let facts = Facts {
        file: name.clone(),
        output: output.display().to_string(),
        cut_off: reader.cut_off,
        header: &reader.header,
        cpu_percent: totals.cpu_percent(),
        totals,
    };
    cx.print(&facts, || {
        format!(
            "{}: {} in {}, {} saved at the end",
            facts.output,
            units::counted(totals.records, "record", "records"),
            seconds(totals.seconds),
            bytes(totals.saved_bytes.map_or(0.0, |c| c.last)),
        )
    })?;
    if reader.cut_off {
        eprintln!("rksmctl: {name} is cut off within a line; the page is about what is before it");
        return Ok(Status::Partial);
    }
    Ok(Status::Ok)
}

const STYLE: &str = "\
:root { color-scheme: light dark }
body { background: Canvas; color: CanvasText; font: 16px/1.4 sans-serif; max-width: 60rem;
  margin: 1rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 1.5rem 0 .3rem }
svg { display: block; width: 100%; height: auto }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top }
th { font-weight: 600 } td.n, th.n { text-align: right }
tr { border-bottom: 1px solid color-mix(in srgb, CanvasText 20%, transparent) }
.key { margin: 0; overflow-wrap: anywhere } .key span { margin-right: 1rem }
.note { border-left: .3rem solid #d66928; padding-left: .7rem }
";

fn page(header: &Header, summary: &Summary, cut_off: bool) -> Result<String, Failure> {
    let totals = &summary.totals;
    let backends = totals.backends.join(", then ");
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{0}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{0}</h1>\n",
        escaped(&format!("{backends}, {}", date(header.started_seconds)))
    );
    if cut_off {
        html +=
            "<p class=\"note\">The recording is cut off within a line: its end is missing.</p>\n";
    }
    html += "<h2>Summary</h2>\n";
    html += &facts(header, totals);
    for plot in summary.plots() {
        html += &figure(&plot, totals.seconds)?;
    }
    html += &unit_table(totals);
    html += &refusal_table(totals);
    html += &knob_tables(totals);
    // Nothing can fail: it is a String.
    let _ = writeln!(
        html,
        "<p><small>Recorded by rksmctl {}, format version {}.</small></p>\n</body>\n</html>",
        escaped(&header.rksmctl),
        header.version
    );
    Ok(html)
}

fn figure(plot: &Plot, seconds: f64) -> Result<String, Failure> {
    let key: Vec<String> = plot
        .series
        .iter()
        .enumerate()
        .map(|(i, series)| {
            let colour = css_colour(i);
            let name = escaped(&series.name);
            format!("<span><b style=\"color:{colour}\">\u{25a0}</b> {name}</span>")
        })
        .collect();
    Ok(format!(
        "<h2>{}</h2>\n<p class=\"key\">{}</p>\n{}\n",
        plot.title,
        key.concat(),
        plot.svg(seconds)?.trim_end()
    ))
}

/// A table: a head, if any, and rows; but for the first, columns are numbers where `numbers`.
fn table(head: &[&str], rows: &[Vec<String>], numbers: bool) -> String {
    let class = |i: usize| if numbers && i > 0 { " class=\"n\"" } else { "" };
    let mut html = String::from("<div class=\"wide\"><table>\n");
    if !head.is_empty() {
        html += "<tr>";
        for (i, cell) in head.iter().enumerate() {
            let _ = write!(html, "<th{}>{}</th>", class(i), escaped(cell));
        }
        html += "</tr>\n";
    }
    for row in rows {
        html += "<tr>";
        for (i, cell) in row.iter().enumerate() {
            let tag = if i == 0 { "th" } else { "td" };
            let _ = write!(html, "<{tag}{}>{}</{tag}>", class(i), escaped(cell));
        }
        html += "</tr>\n";
    }
    html + "</table></div>\n"
}

fn facts(header: &Header, totals: &Totals) -> String {
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut row = |name: &str, text: String| rows.push(vec![name.into(), text]);
    row(
        "KSM",
        format!("{} {}", header.backend, header.backend_version),
    );
    row("kernel", header.kernel.clone());
    if !header.command.is_empty() {
        row("command", header.command.join(" "));
    }
    row(
        "recording",
        format!(
            "{} in {}",
            units::counted(totals.records, "record", "records"),
            seconds(totals.seconds)
        ),
    );
    row(
        "CPU time of the scanner",
        format!(
            "{}, {} of one CPU",
            seconds(totals.cpu_seconds),
            units::percent(totals.cpu_percent())
        ),
    );
    row("full scans", count(totals.full_scans));
    if let Some(n) = totals.pages_scanned {
        row("pages scanned", count(n));
    }
    if let Some(n) = totals.broken_pages {
        row("merged pages written to", count(n));
    }
    let mut courses = Vec::new();
    let mut course = |name: &str, course: Option<Course>| {
        courses.extend(course.map(|c| {
            let texts = [c.first, c.last, c.highest].map(bytes);
            [vec![name.to_string()], texts.to_vec()].concat()
        }));
    };
    course("saved", totals.saved_bytes);
    course("saved, less metadata", totals.net_bytes);
    course("metadata", totals.metadata_bytes);
    course("changing", totals.changing_bytes);
    course("available", totals.available_bytes);
    table(&[], &rows, false) + &table(&["", "at first", "at the end", "highest"], &courses, true)
}

fn unit_table(totals: &Totals) -> String {
    let units = totals.units_by_size();
    let text =
        |course: Option<Course>, of: fn(Course) -> f64| course.map(of).map_or("-".into(), bytes);
    let mut rows: Vec<Vec<String>> = units
        .iter()
        .take(MOST_UNITS)
        .map(|(name, unit)| {
            vec![
                (*name).clone(),
                text(unit.anon_bytes, |c| c.last),
                text(unit.merged_bytes, |c| c.first),
                text(unit.merged_bytes, |c| c.last),
                text(unit.merged_bytes, |c| c.highest),
            ]
        })
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    if units.len() > MOST_UNITS {
        rows.push(vec![format!("{} others", units.len() - MOST_UNITS)]);
    }
    let head = [
        "unit",
        "anonymous",
        "merged at first",
        "at the end",
        "highest",
    ];
    format!("<h2>Units</h2>\n{}", table(&head, &rows, true))
}

fn refusal_table(totals: &Totals) -> String {
    let rows: Vec<Vec<String>> = totals
        .refused
        .iter()
        .filter(|(_, n)| **n > 0.0)
        .map(|(reason, n)| vec![reason.clone(), count(*n)])
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    let rows = table(&["reason", "pages"], &rows, true);
    format!("<h2>Pages not merged</h2>\n{rows}")
}

fn knob_tables(totals: &Totals) -> String {
    let Ok(Value::Object(knobs)) = serde_json::to_value(&totals.knobs) else {
        return String::new();
    };
    let rows: Vec<Vec<String>> = knobs
        .iter()
        .chain(&totals.own_knobs)
        .filter(|(_, value)| !value.is_null())
        .map(|(knob, value)| vec![knob.clone(), plain(value)])
        .collect();
    let mut html = format!("<h2>Knobs at first</h2>\n{}", table(&[], &rows, true));
    let mut rows: Vec<Vec<String>> = totals
        .knob_changes
        .iter()
        .map(|c| {
            vec![
                seconds(c.seconds),
                c.knob.clone(),
                plain(&c.from),
                plain(&c.to),
            ]
        })
        .collect();
    if totals.more_knob_changes > 0 {
        rows.push(vec![format!("and {} more", totals.more_knob_changes)]);
    }
    if !rows.is_empty() {
        let rows = table(&["after", "knob", "from", "to"], &rows, false);
        let _ = write!(html, "<h2>Changes of knobs</h2>\n{rows}");
    }
    html
}

/// As the files of sysfs have it.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::Bool(flag) => u8::from(*flag).to_string(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn bytes(n: f64) -> String {
    units::signed_bytes(n as i64)
}

fn count(n: f64) -> String {
    units::count(n as u64)
}

fn seconds(n: f64) -> String {
    units::duration(Duration::try_from_secs_f64(n).unwrap_or(Duration::MAX))
}

/// "2026-01-31 12:00:00 UTC" of seconds since 1970.
fn date(seconds: f64) -> String {
    // Years of four digits; whatever a recording says.
    let total = seconds.clamp(0.0, 253_402_300_799.0) as u64;
    let (mut days, time) = (total / 86400, total % 86400);
    let leap = |y: u64| y % 4 == 0 && (y % 100 != 0 || y % 400 == 0);
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!(
        "{year:04}-{month:02}-{:02} {:02}:{:02}:{:02} UTC",
        days + 1,
        time / 3600,
        time / 60 % 60,
        time % 60
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0.0, "1970-01-01 00:00:00 UTC"),
            (951_782_400.0, "2000-02-29 00:00:00 UTC"),
            (1_767_225_599.9, "2025-12-31 23:59:59 UTC"),
            (1_769_860_800.0, "2026-01-31 12:00:00 UTC"),
            (f64::MAX, "9999-12-31 23:59:59 UTC"),
            (-1.0, "1970-01-01 00:00:00 UTC"),
        ] {
            assert_eq!(date(seconds), text);
        }
    }
}
