// SPDX-License-Identifier: GPL-2.0-only
//! Plots against time, as SVG to be put into a page.

use crate::exit::Failure;
use plotters::prelude::*;

/// What the vertical axis has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    Bytes,
    /// Of one CPU.
    CpuPercent,
    PagesPerSecond,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    Lines,
    /// Areas, each on top of the one before; all series have the same times.
    Stacked,
}

/// Values at times in seconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Plot {
    pub title: &'static str,
    pub quantity: Quantity,
    pub style: Style,
    pub series: Vec<Series>,
}

const SIZE: (u32, u32) = (960, 300);
/// Stands for the colour of the page's text, which is put in its place.
const INK: RGBColor = RGBColor(1, 2, 3);
/// Neither so light nor so dark that they would be lost on white or on black.
const COLOURS: [RGBColor; 8] = [
    RGBColor(58, 129, 214),
    RGBColor(214, 105, 40),
    RGBColor(46, 150, 90),
    RGBColor(190, 80, 160),
    RGBColor(150, 120, 50),
    RGBColor(40, 150, 165),
    RGBColor(205, 75, 75),
    RGBColor(125, 105, 205),
];
/// As many series as there are colours.
pub const MOST_SERIES: usize = COLOURS.len();

fn colour(i: usize) -> RGBColor {
    COLOURS.get(i % MOST_SERIES).copied().unwrap_or(INK)
}

/// The colour of a series, for its name beside the plot.
pub fn css_colour(i: usize) -> String {
    let RGBColor(r, g, b) = colour(i);
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// How many seconds one unit of the time axis has, and its name.
fn time_unit(seconds: f64) -> (f64, &'static str) {
    match seconds {
        s if s <= 300.0 => (1.0, "s"),
        s if s <= 3.0 * 3600.0 => (60.0, "min"),
        s if s <= 96.0 * 3600.0 => (3600.0, "h"),
        _ => (86400.0, "days"),
    }
}

fn value_unit(quantity: Quantity, largest: f64) -> (f64, &'static str) {
    match quantity {
        Quantity::CpuPercent => (1.0, "% of one CPU"),
        Quantity::PagesPerSecond => (1.0, "pages/s"),
        Quantity::Bytes => {
            let mut unit = (1024.0, "KiB");
            for next in ["MiB", "GiB", "TiB", "PiB"] {
                if largest < unit.0 * 1024.0 {
                    break;
                }
                unit = (unit.0 * 1024.0, next);
            }
            unit
        }
    }
}

/// Without zeroes at the end.
fn number(value: &f64) -> String {
    let text = format!("{value:.3}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0" } else { text }.to_string()
}

impl Plot {
    /// The SVG element, over a time of so many seconds.
    pub fn svg(&self, seconds: f64) -> Result<String, Failure> {
        let series = match self.style {
            Style::Lines => self.series.clone(),
            Style::Stacked => stacked(&self.series),
        };
        let values = || series.iter().flat_map(|s| s.points.iter().map(|(_, y)| *y));
        let highest = values().fold(0.0, f64::max);
        let lowest = values().fold(0.0, f64::min);
        let (second, time) = time_unit(seconds);
        let (one, unit) = value_unit(self.quantity, highest.max(-lowest));
        let scaled = |(x, y): &(f64, f64)| (x / second, y / one);
        // An axis from 0 to 0 has no scale.
        let right = if seconds > 0.0 { seconds / second } else { 1.0 };
        let top = if highest > lowest {
            highest * 1.05 / one
        } else {
            1.0
        };
        let bottom = lowest * 1.05 / one;

        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
            let mut chart = ChartBuilder::on(&area)
                .margin(10)
                .x_label_area_size(46)
                .y_label_area_size(78)
                .build_cartesian_2d(0.0..right, bottom..top)
                .map_err(not_drawn)?;
            let text = |size: u32| ("sans-serif", size).into_font().color(&INK);
            chart
                .configure_mesh()
                .x_desc(format!("time, {time}"))
                .y_desc(unit)
                .axis_style(INK)
                .bold_line_style(INK.mix(0.2))
                .light_line_style(TRANSPARENT)
                .label_style(text(17))
                .axis_desc_style(text(18))
                .x_labels(10)
                .y_labels(6)
                .x_label_formatter(&number)
                .y_label_formatter(&number)
                .draw()
                .map_err(not_drawn)?;
            let mut below: Vec<(f64, f64)> = Vec::new();
            for (i, one) in series.iter().enumerate() {
                let line: Vec<_> = one.points.iter().map(scaled).collect();
                if self.style == Style::Stacked {
                    if below.is_empty() {
                        below = line.iter().map(|(x, _)| (*x, 0.0)).collect();
                    }
                    let around: Vec<_> = line.iter().chain(below.iter().rev()).copied().collect();
                    let shape = Polygon::new(around, colour(i).mix(0.5));
                    chart
                        .draw_series(std::iter::once(shape))
                        .map_err(not_drawn)?;
                    below.clone_from(&line);
                }
                chart
                    .draw_series(LineSeries::new(line, colour(i).stroke_width(2)))
                    .map_err(not_drawn)?;
            }
            area.present().map_err(not_drawn)?;
        }
        Ok(inline(&svg, self.title))
    }
}

fn not_drawn(error: impl std::fmt::Display) -> Failure {
    Failure::failed(format!("cannot draw: {error}"))
}

/// Each the sum of itself and of those before.
fn stacked(series: &[Series]) -> Vec<Series> {
    let mut sums: Vec<f64> = Vec::new();
    series
        .iter()
        .map(|one| {
            sums.resize(one.points.len(), 0.0);
            let add = |((x, y), sum): (&(f64, f64), &mut f64)| {
                *sum += y;
                (*x, *sum)
            };
            Series {
                name: one.name.clone(),
                points: one.points.iter().zip(&mut sums).map(add).collect(),
            }
        })
        .collect()
}

/// Within a page it needs no namespace, takes the page's colour, and has a name for those who
/// cannot see it.
fn inline(svg: &str, title: &str) -> String {
    let svg = svg
        .replace("\"#010203\"", "\"currentColor\"")
        .replace(" xmlns=\"http://www.w3.org/2000/svg\"", "");
    svg.replacen(
        "<svg ",
        &format!("<svg role=\"img\" aria-label=\"{title}\" "),
        1,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(style: Style, points: &[(f64, f64)]) -> Plot {
        let series = |name: &str| Series {
            name: name.into(),
            points: points.to_vec(),
        };
        Plot {
            title: "Saved",
            quantity: Quantity::Bytes,
            style,
            series: vec![series("a"), series("b")],
        }
    }

    #[test]
    fn axes_have_units() {
        let gib = f64::from(1 << 30);
        let svg = plot(Style::Lines, &[(0.0, 0.0), (600.0, 2.0 * gib)])
            .svg(600.0)
            .unwrap();
        assert!(svg.contains("GiB") && svg.contains("time, min"), "{svg}");
        assert!(svg.contains("currentColor") && !svg.contains("#010203"));
        assert!(!svg.contains("http"), "{svg}");
        assert_eq!(time_unit(30.0).1, "s");
        assert_eq!(time_unit(1e6).1, "days");
        assert_eq!(number(&0.25), "0.25");
        assert_eq!(number(&-0.0), "0");
        assert_eq!(number(&1000.0), "1000");
    }

    #[test]
    fn areas_are_sums() {
        let plot = plot(Style::Stacked, &[(0.0, 1.0), (1.0, 2.0)]);
        let sums = stacked(&plot.series);
        assert_eq!(sums[1].points, [(0.0, 2.0), (1.0, 4.0)]);
        assert!(plot.svg(1.0).unwrap().contains("<polygon"));
    }

    #[test]
    fn little_to_draw() {
        for style in [Style::Lines, Style::Stacked] {
            plot(style, &[]).svg(0.0).unwrap();
            plot(style, &[(0.0, 0.0)]).svg(0.0).unwrap();
            plot(style, &[(0.0, -1e18), (1.0, 1e18)]).svg(1.0).unwrap();
            plot(style, &[(0.0, -5.0), (1.0, -4.0)]).svg(1.0).unwrap();
        }
    }
}
