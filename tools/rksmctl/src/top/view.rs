// SPDX-License-Identifier: GPL-2.0-only
//! Draws the table, on a terminal of any size.

use crate::top::model::{Figures, Key, Model, Row, Sort, HISTORY};
use crate::units::bytes;
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Modifier, Style};
use ratatui::Frame;

/// What is drawn beside the table.
#[derive(Clone, Debug, Default)]
pub struct Screen {
    /// About the machine as a whole.
    pub headline: String,
    /// Why some columns are empty.
    pub lacking: Option<String>,
    /// The first line of the table that is shown.
    pub top: usize,
    /// What was asked for, instead of the table, and its first line.
    pub panel: Option<(String, usize)>,
}

/// A column after the name.
struct Column {
    title: &'static str,
    width: u16,
    sort: Option<Sort>,
    text: fn(&Row) -> String,
}

/// In the order in which they are shown; the first that does not fit ends the line.
const COLUMNS: [Column; 6] = [
    Column {
        title: "SAVED",
        width: 9,
        sort: Some(Sort::Saved),
        text: |row| amount(row.figures.saved_bytes),
    },
    Column {
        title: "ANON",
        width: 9,
        sort: None,
        text: |row| bytes(row.figures.anon_bytes),
    },
    Column {
        title: "UNIQUE",
        width: 9,
        sort: Some(Sort::Unique),
        text: |row| amount(row.figures.unique_bytes),
    },
    Column {
        title: "CHANGING",
        width: 9,
        sort: Some(Sort::Changing),
        text: |row| amount(row.figures.changing_bytes),
    },
    Column {
        title: "BROKEN/s",
        width: 9,
        sort: Some(Sort::Broken),
        text: |row| rate(&row.figures),
    },
    Column {
        title: "SAVED",
        width: HISTORY as u16 + 1,
        sort: None,
        text: |row| sparkline(&row.history),
    },
];

/// Columns that the name needs at least, and that it takes at most.
const NAME: [u16; 2] = [10, 46];

fn amount(n: Option<u64>) -> String {
    n.map_or("-".into(), bytes)
}

fn rate(figures: &Figures) -> String {
    match figures.broken_per_second {
        None => "-".into(),
        Some(rate) if rate > 0.0 && rate < 9.95 => format!("{rate:.1}"),
        Some(rate) if rate < 99_999.5 => format!("{rate:.0}"),
        Some(rate) => format!("{:.0}k", rate / 1000.0),
    }
}

/// The values as bars, between the least and the most of them.
pub fn sparkline(values: &[u64]) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let least = values.iter().min().copied().unwrap_or(0);
    let range = values.iter().max().copied().unwrap_or(0) - least;
    let bar = |value: &u64| {
        // Level all the way: in the middle where there is something.
        let place = match range {
            0 if least == 0 => 0,
            0 => 3,
            _ => (u128::from(value - least) * 7 / u128::from(range)) as usize,
        };
        BARS.get(place).copied().unwrap_or('█')
    };
    values.iter().map(bar).collect()
}

/// What a process calls itself may hold anything.
fn printable(text: &str) -> String {
    let visible = |c: char| if c.is_control() { '?' } else { c };
    text.chars().map(visible).collect()
}

fn name(row: &Row) -> String {
    match row.key {
        Key::Unit(_) if row.folded => format!("+ {}", printable(&row.name)),
        Key::Unit(_) => format!("- {}", printable(&row.name)),
        Key::Process(_) => format!("   {}", printable(&row.name)),
    }
}

/// The columns that fit, and what is left for the name.
fn layout(width: u16) -> (u16, &'static [Column]) {
    let mut used = 0;
    let mut fit = 0;
    for column in &COLUMNS {
        if NAME[0] + used + column.width > width {
            break;
        }
        used += column.width;
        fit += 1;
    }
    let name = width.saturating_sub(used).min(NAME[1]);
    (name, COLUMNS.get(..fit).unwrap_or(&[]))
}

/// Draws one line of the table.
fn draw_row(buffer: &mut Buffer, area: Rect, y: u16, text: &str, row: &Row, style: Style) {
    let (name, columns) = layout(area.width);
    buffer.set_style(Rect::new(area.x, y, area.width, 1), style);
    buffer.set_stringn(area.x, y, text, name.into(), style);
    let mut x = area.x + name;
    for column in columns {
        right(buffer, x, y, column.width, &(column.text)(row), style);
        x += column.width;
    }
}

fn right(buffer: &mut Buffer, x: u16, y: u16, width: u16, text: &str, style: Style) {
    let length = u16::try_from(text.chars().count())
        .unwrap_or(width)
        .min(width);
    buffer.set_stringn(x + width - length, y, text, length.into(), style);
}

fn draw_titles(buffer: &mut Buffer, area: Rect, y: u16, sort: Sort) {
    let style = Style::new().add_modifier(Modifier::BOLD);
    let (name, columns) = layout(area.width);
    buffer.set_stringn(area.x, y, "UNIT / PID", name.into(), style);
    let mut x = area.x + name;
    for column in columns {
        let style = match column.sort == Some(sort) {
            true => style.add_modifier(Modifier::UNDERLINED),
            false => style,
        };
        right(buffer, x, y, column.width, column.title, style);
        x += column.width;
    }
}

/// How many lines of the table there are on a screen so high.
pub fn table_lines(height: u16) -> u16 {
    height.saturating_sub(header_lines(height) + 1 + u16::from(height >= 4))
}

/// The headline goes first where there is little room.
fn header_lines(height: u16) -> u16 {
    u16::from(height >= 5)
}

/// Draws all.
pub fn draw(frame: &mut Frame<'_>, model: &Model, screen: &mut Screen) {
    let area = frame.area();
    let buffer = frame.buffer_mut();
    let width = usize::from(area.width);
    if area.height == 0 || area.width == 0 {
        return;
    }
    let header = header_lines(area.height);
    if header > 0 {
        buffer.set_stringn(area.x, area.y, &screen.headline, width, Style::new());
    }
    let lines = table_lines(area.height);
    if area.height >= 4 {
        let y = area.bottom() - 1;
        buffer.set_stringn(
            area.x,
            y,
            footer(area.width, model, screen),
            width,
            Style::new(),
        );
    }
    if let Some((text, first)) = &mut screen.panel {
        // The line of the titles as well.
        let height = usize::from(lines + 1);
        let wrapped = wrapped(text, width);
        *first = (*first).min(wrapped.len().saturating_sub(height));
        for (y, line) in (area.y + header..).zip(wrapped.iter().skip(*first).take(height)) {
            buffer.set_stringn(area.x, y, line, width, Style::new());
        }
        return;
    }
    draw_titles(buffer, area, area.y + header, model.sort());
    let rows = model.rows();
    let place = model.place();
    let lines = usize::from(lines);
    // As little scrolling as shows the selected line, and no empty lines at the end.
    screen.top = screen.top.min(place).min(rows.len().saturating_sub(lines));
    if place >= screen.top + lines {
        screen.top = (place + 1).saturating_sub(lines);
    }
    let shown = rows.iter().enumerate().skip(screen.top).take(lines);
    for (y, (i, row)) in (area.y + header + 1..).zip(shown) {
        let style = match i == place {
            true => Style::new().add_modifier(Modifier::REVERSED),
            false => Style::new(),
        };
        draw_row(buffer, area, y, &name(row), row, style);
    }
    if rows.is_empty() && lines > 0 {
        let text = "No process offers memory for merging; a shows all.";
        for (y, line) in (area.y + header + 1..).zip(wrapped(text, width).iter().take(lines)) {
            buffer.set_stringn(area.x, y, line, width, Style::new());
        }
    }
}

fn footer(width: u16, model: &Model, screen: &Screen) -> String {
    if screen.panel.is_some() {
        return "w back  q quit".into();
    }
    let all = if model.shows_all() {
        "a fewer"
    } else {
        "a all"
    };
    let keys = match width {
        0..40 => "s c u b  w why  q".to_string(),
        _ => format!("sort: s c u b  space fold  {all}  w why  q quit"),
    };
    match &screen.lacking {
        Some(lacking) if width >= 80 => format!("{keys}  ({lacking})"),
        Some(_) if width >= 40 => format!("{keys}  (-: needs rksm)"),
        _ => keys,
    }
}

/// The lines of a text, broken where they are too long.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for line in text.lines() {
        let characters: Vec<char> = printable(line).chars().collect();
        let mut rest = characters.as_slice();
        while rest.len() > width.max(1) {
            let (head, _) = rest.split_at(width.max(1));
            // After the last space; within a word only where it is longer than a line.
            let end = head.iter().rposition(|c| *c == ' ').filter(|end| *end > 0);
            let (head, tail) = rest.split_at(end.unwrap_or(width.max(1)));
            lines.push(head.iter().collect());
            rest = tail.strip_prefix(&[' ']).unwrap_or(tail);
        }
        lines.push(rest.iter().collect());
    }
    lines
}

/// The table as plain text, all of its lines.
pub fn plain(model: &Model, width: usize) -> String {
    let width = u16::try_from(width).unwrap_or(u16::MAX);
    let rows = model.rows();
    let height = u16::try_from(rows.len() + 1).unwrap_or(u16::MAX);
    let mut text = String::new();
    for first in [None]
        .into_iter()
        .chain(rows.into_iter().map(Some))
        .take(height.into())
    {
        let area = Rect::new(0, 0, width, 1);
        let mut buffer = Buffer::empty(area);
        match first {
            None => draw_titles(&mut buffer, area, 0, model.sort()),
            Some(row) => draw_row(&mut buffer, area, 0, &name(row), row, Style::new()),
        }
        let line: String = buffer.content.iter().map(|cell| cell.symbol()).collect();
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::model::tests::{look, process};
    use ratatui::backend::TestBackend;
    use ratatui::Terminal;

    fn model() -> Model {
        let mut model = Model::default();
        for (second, broken) in [(1, 0), (3, 420)] {
            model.update(look(
                second,
                &[
                    process(4211, "100.scope", [3100, 3500, 500, broken]),
                    process(4212, "101.scope", [3000 + second, 3600, 400, 0]),
                    process(4213, "101.scope", [10, 0, 0, 0]),
                ],
            ));
        }
        model
    }

    fn screen() -> Screen {
        Screen {
            headline: "rksm  saved 6.1 GiB net  CPU 0.4 %  available 61 GiB".into(),
            ..Screen::default()
        }
    }

    /// What is on a screen of that size, without spaces at the ends of lines.
    fn drawn(width: u16, height: u16, model: &Model, screen: &mut Screen) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, model, screen)).unwrap();
        let buffer = terminal.backend().buffer();
        (0..height)
            .map(|y| {
                let line: String = (0..width).map(|x| buffer[(x, y)].symbol()).collect();
                line.trim_end().to_string()
            })
            .collect()
    }

    #[test]
    fn wide() {
        let lines = drawn(100, 24, &model(), &mut screen());
        let expected = [
            "rksm  saved 6.1 GiB net  CPU 0.4 %  available 61 GiB",
            "UNIT / PID                                        SAVED     ANON   UNIQUE CHANGING BROKEN/s    SAVED",
            "- 100.scope                                    3.03 GiB    1 GiB 3.42 GiB  500 MiB      210       ▄▄",
        ];
        assert_eq!(&lines[..3], expected);
        assert_eq!(lines[5].trim_start().split(' ').next(), Some("4212"));
        assert!(lines[5].ends_with("▁█"), "{lines:?}");
        assert_eq!(lines[23], "sort: s c u b  space fold  a all  w why  q quit");
        assert_eq!(lines[7], "");
    }

    #[test]
    fn small() {
        let mut screen = screen();
        let mut model = model();
        let lines = drawn(20, 5, &model, &mut screen);
        assert_eq!(
            lines,
            [
                "rksm  saved 6.1 GiB",
                "UNIT / PID     SAVED",
                "- 100.scope 3.03 GiB",
                "   4211 p42 3.03 GiB",
                "s c u b  w why  q"
            ]
        );
        // The selected line is in sight.
        model.go(10);
        assert_eq!(drawn(20, 5, &model, &mut screen)[3], "   4213 p42   10 MiB");
        model.go(-1);
        assert_eq!(drawn(20, 5, &model, &mut screen)[2], "   4212 p42 2.93 GiB");
    }

    #[test]
    fn any_size() {
        let mut panel = screen();
        panel.panel = Some(("some words\nand a\u{1b}[2Jline".into(), 7));
        for (width, height) in (1..30).flat_map(|w| (1..8).map(move |h| (w, h))) {
            drawn(width, height, &model(), &mut screen());
            drawn(width, height, &model(), &mut panel);
            drawn(width, height, &Model::default(), &mut screen());
        }
        drawn(300, 100, &model(), &mut screen());
    }

    #[test]
    fn what_is_not_told() {
        let mut facts = process(7, "a.service", [5, 0, 0, 0]);
        (facts.unique, facts.changing, facts.broken) = (None, None, None);
        facts.title = "x\u{1b}[31m".into();
        let mut model = Model::default();
        model.update(look(1, &[facts]));
        let mut screen = screen();
        screen.lacking = Some("UNIQUE needs rksm".into());
        let lines = drawn(100, 6, &model, &mut screen);
        assert!(lines[3].starts_with("   7 x?[31m "), "{lines:?}");
        let words: Vec<&str> = lines[2].split_whitespace().collect();
        assert_eq!(words[2..], ["5", "MiB", "1", "GiB", "-", "-", "-", "▄"]);
        assert!(lines[5].ends_with("(UNIQUE needs rksm)"));
        let text = plain(&model, 30);
        assert_eq!(
            text,
            "UNIT / PID      SAVED     ANON\n- a.service     5 MiB    1 GiB\n   7 x?[31m     5 MiB    1 GiB\n"
        );
    }

    #[test]
    fn panel() {
        let mut screen = screen();
        screen.panel = Some(("4211 clone1\nmerged    3.1 GiB of memory".into(), 0));
        let lines = drawn(20, 6, &model(), &mut screen);
        assert_eq!(
            lines[1..],
            [
                "4211 clone1",
                "merged    3.1 GiB",
                "of memory",
                "",
                "w back  q quit"
            ]
        );
    }

    #[test]
    fn sparklines() {
        assert_eq!(sparkline(&[]), "");
        assert_eq!(sparkline(&[0, 0]), "▁▁");
        assert_eq!(sparkline(&[5, 5]), "▄▄");
        assert_eq!(sparkline(&[0, u64::MAX / 2, u64::MAX]), "▁▄█");
    }
}
