// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl top`: the savings by unit and process, again and again.

use crate::backend::detect;
use crate::exit::{Doing, Failure, Status};
use crate::host::Context;
use crate::text::wrap;
use crate::top::model::{Figures, Key, Model, Row, Sort};
use crate::top::source::Source;
use crate::top::view::{draw, plain, table_lines, Screen};
use crate::units;
use crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use crossterm::terminal::{
    disable_raw_mode, enable_raw_mode, EnterAlternateScreen, LeaveAlternateScreen,
};
use crossterm::{cursor, execute};
use nix::sys::signal::{raise, sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
use ratatui::backend::CrosstermBackend;
use ratatui::layout::Size;
use ratatui::Terminal;
use serde::Serialize;
use std::io::{stdin, stdout, IsTerminal, Stdout};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Keys: s, c, u, b sort by SAVED, CHANGING, UNIQUE, BROKEN/s; arrows, page up and down select; space \
or enter folds a unit; a shows what offers no memory, too; w says why memory of a process is not \
merged; q ends.

SAVED is what is merged in a process. The frames that remain, one for each content, are not taken \
off; in the first line they are.")]
pub struct Args {
    /// Seconds between two looks
    #[arg(long, value_name = "S", default_value = "2", value_parser = units::parse_seconds)]
    pub interval: Duration,
    /// Print the table so many times instead, for scripts
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: Option<u32>,
    /// Print the table once
    #[arg(long, conflicts_with = "batch")]
    pub once: bool,
    /// Show what offers no memory for merging, too
    #[arg(short, long)]
    pub all: bool,
}

pub fn run(args: &Args, cx: &Context) -> Result<Status, Failure> {
    let source = Source::new(&cx.host, detect(&cx.host)?);
    let mut model = Model::default();
    model.show_all(args.all);
    let times = match args.once || cx.json {
        true => Some(args.batch.unwrap_or(1)),
        false => args.batch,
    };
    match times {
        Some(times) => batch(times, args.interval, source, model, cx),
        None => live(args.interval, source, model),
    }
}

#[derive(Serialize)]
struct ProcessLine<'a> {
    pid: i32,
    name: &'a str,
    #[serde(flatten)]
    figures: &'a Figures,
}

#[derive(Serialize)]
struct UnitLine<'a> {
    unit: &'a str,
    #[serde(flatten)]
    figures: &'a Figures,
    processes: Vec<ProcessLine<'a>>,
}

fn line(row: &Row) -> Option<ProcessLine<'_>> {
    let Key::Process(pid) = row.key else {
        return None;
    };
    Some(ProcessLine {
        pid,
        name: row.name.split_once(' ').map_or("", |(_, name)| name),
        figures: &row.figures,
    })
}

fn batch(
    times: u32,
    interval: Duration,
    mut source: Source,
    mut model: Model,
    cx: &Context,
) -> Result<Status, Failure> {
    for n in 0..times {
        if n > 0 {
            std::thread::sleep(interval);
        }
        model.update(source.look()?);
        let headline = source.headline()?;
        let units: Vec<UnitLine<'_>> = model
            .tree()
            .map(|(unit, processes)| UnitLine {
                unit: &unit.name,
                figures: &unit.figures,
                processes: processes.iter().filter_map(line).collect(),
            })
            .collect();
        cx.print(&units, || {
            let between = if n > 0 { "\n" } else { "" };
            let headline = wrap(&headline, cx.width, 2);
            let mut text = format!("{between}{headline}\n{}", plain(&model, cx.width));
            if let Some(lacking) = &source.lacking {
                text += &format!("{}\n", wrap(&format!("-: {lacking}"), cx.width, 3));
            }
            text
        })?;
    }
    Ok(Status::Ok)
}

/// The signal that wants this to end; 0 while there is none.
static ENDING: AtomicI32 = AtomicI32::new(0);

extern "C" fn end(signal: libc::c_int) {
    ENDING.store(signal, Ordering::Relaxed);
}

/// The terminal while it is ours; it is given back when this goes, and before a panic is printed.
struct Ours {
    terminal: Terminal<CrosstermBackend<Stdout>>,
}

fn give_back() {
    let _ = disable_raw_mode();
    let _ = execute!(stdout(), LeaveAlternateScreen, cursor::Show);
}

impl Ours {
    fn take() -> Result<Self, Failure> {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            give_back();
            before(info);
        }));
        let action = SigAction::new(SigHandler::Handler(end), SaFlags::empty(), SigSet::empty());
        for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT] {
            // SAFETY: The handler only stores to an atomic variable.
            unsafe { sigaction(signal, &action) }.doing("cannot wait for signals")?;
        }
        enable_raw_mode().doing("cannot set up the terminal")?;
        let set_up = || {
            execute!(stdout(), EnterAlternateScreen, cursor::Hide)?;
            Terminal::new(CrosstermBackend::new(stdout()))
        };
        match set_up() {
            Ok(terminal) => Ok(Self { terminal }),
            Err(e) => {
                give_back();
                Err(e).doing("cannot set up the terminal")
            }
        }
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        give_back();
    }
}

fn live(interval: Duration, source: Source, model: Model) -> Result<Status, Failure> {
    if !stdin().is_terminal() || !stdout().is_terminal() {
        return Err(Failure::failed(
            "top needs a terminal; for scripts there are --once and --batch N",
        ));
    }
    let ours = Ours::take()?;
    let result = watch(ours, interval, source, model);
    let signal = ENDING.load(Ordering::Relaxed);
    if let Ok(signal) = Signal::try_from(signal) {
        // As if there were no handler, now that the terminal is as it was.
        let action = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: The default action has no handler to be sound.
        let _ = unsafe { sigaction(signal, &action) };
        let _ = raise(signal);
    }
    result.map(|()| Status::Ok)
}

fn watch(
    mut ours: Ours,
    interval: Duration,
    mut source: Source,
    mut model: Model,
) -> Result<(), Failure> {
    let mut screen = Screen {
        lacking: source.lacking.clone(),
        ..Screen::default()
    };
    let mut next = Instant::now();
    while ENDING.load(Ordering::Relaxed) == 0 {
        if Instant::now() >= next {
            model.update(source.look()?);
            screen.headline = source.headline()?;
            next = Instant::now() + interval;
        }
        ours.terminal
            .draw(|frame| draw(frame, &model, &mut screen))
            .doing("cannot draw")?;
        // A signal does not end the wait, so that it is never long.
        while ENDING.load(Ordering::Relaxed) == 0 && Instant::now() < next {
            let left = next.saturating_duration_since(Instant::now());
            let wait = left.min(Duration::from_millis(250));
            if event::poll(wait).doing("cannot read the terminal")? {
                let size = ours.terminal.size().unwrap_or(Size::new(80, 24));
                let event = event::read().doing("cannot read the terminal")?;
                if handle(&event, &mut model, &mut screen, &source, size) {
                    return Ok(());
                }
                break;
            }
        }
    }
    Ok(())
}

/// Does what a key asks for. True at the end.
fn handle(
    event: &Event,
    model: &mut Model,
    screen: &mut Screen,
    source: &Source,
    size: Size,
) -> bool {
    let Event::Key(KeyEvent {
        code,
        modifiers,
        kind: KeyEventKind::Press | KeyEventKind::Repeat,
        ..
    }) = event
    else {
        return false;
    };
    let page = isize::try_from(table_lines(size.height).max(1)).unwrap_or(1);
    let lines = match code {
        KeyCode::Up | KeyCode::Char('k') => -1,
        KeyCode::Down | KeyCode::Char('j') => 1,
        KeyCode::PageUp => -page,
        KeyCode::PageDown => page,
        KeyCode::Home => -isize::MAX,
        KeyCode::End => isize::MAX,
        _ => 0,
    };
    match code {
        KeyCode::Char('q') => return true,
        KeyCode::Char('c') if modifiers.contains(KeyModifiers::CONTROL) => return true,
        _ => {}
    }
    if let Some((_, first)) = &mut screen.panel {
        match code {
            KeyCode::Esc | KeyCode::Enter | KeyCode::Char('w') => screen.panel = None,
            _ => *first = first.saturating_add_signed(lines),
        }
        return false;
    }
    match code {
        KeyCode::Char('s') => model.sort_by(Sort::Saved),
        KeyCode::Char('c') => model.sort_by(Sort::Changing),
        KeyCode::Char('u') => model.sort_by(Sort::Unique),
        KeyCode::Char('b') => model.sort_by(Sort::Broken),
        KeyCode::Char('a') => model.show_all(!model.shows_all()),
        KeyCode::Char(' ') | KeyCode::Enter => model.fold(),
        KeyCode::Char('w') => {
            screen.panel = match model.selected() {
                Some(Key::Process(pid)) => Some((source.why(*pid, size.width.into()), 0)),
                Some(Key::Unit(name)) => {
                    // What is in no unit is shown by its cgroup.
                    let option = match name.starts_with('/') {
                        true => "--cgroup",
                        false => "--unit",
                    };
                    let text = format!("{name}\nrksmctl why {option} {name} tells more.");
                    Some((text, 0))
                }
                None => None,
            }
        }
        KeyCode::Esc => return true,
        _ if lines != 0 => model.go(lines),
        _ => {}
    }
    false
}
