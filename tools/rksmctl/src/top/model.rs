// SPDX-License-Identifier: GPL-2.0-only
//! What the table shows: units with their processes, sorted and folded. Nothing here draws, and
//! nothing reads files.

use serde::Serialize;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// One process in one look at the machine, in bytes. Nothing where this KSM does not tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    pub pid: i32,
    pub title: String,
    /// The unit, or the cgroup of what is in none.
    pub unit: String,
    /// Whether it offers memory for merging.
    pub offers: bool,
    pub anon: u64,
    pub saved: Option<u64>,
    pub unique: Option<u64>,
    pub changing: Option<u64>,
    /// Merged pages found written to, since the process came or was last unmerged.
    pub broken: Option<u64>,
}

/// One look at the machine.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// When, counted from any one moment.
    pub at: Duration,
    pub processes: Vec<Facts>,
}

/// What a line is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    Unit(String),
    Process(i32),
}

/// By what the lines are sorted, largest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    #[default]
    Saved,
    Changing,
    Unique,
    Broken,
}

/// The figures of a line.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    pub anon_bytes: u64,
    pub saved_bytes: Option<u64>,
    pub unique_bytes: Option<u64>,
    pub changing_bytes: Option<u64>,
    pub broken_per_second: Option<f64>,
}

impl Figures {
    fn add(&mut self, other: &Self) {
        fn sum<T: std::ops::Add<Output = T> + Copy>(a: &mut Option<T>, b: Option<T>) {
            *a = match (*a, b) {
                (Some(a), Some(b)) => Some(a + b),
                (a, b) => a.or(b),
            };
        }
        self.anon_bytes += other.anon_bytes;
        sum(&mut self.saved_bytes, other.saved_bytes);
        sum(&mut self.unique_bytes, other.unique_bytes);
        sum(&mut self.changing_bytes, other.changing_bytes);
        sum(&mut self.broken_per_second, other.broken_per_second);
    }

    /// Larger comes first; what is not told is less than nothing.
    fn rank(&self, sort: Sort) -> Reverse<Option<u64>> {
        Reverse(match sort {
            Sort::Saved => self.saved_bytes,
            Sort::Changing => self.changing_bytes,
            Sort::Unique => self.unique_bytes,
            Sort::Broken => self.broken_per_second.map(|rate| (rate * 1000.0) as u64),
        })
    }
}

/// A line of the table.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub key: Key,
    pub name: String,
    pub figures: Figures,
    /// Of a unit: whether its processes are not shown.
    pub folded: bool,
    /// Bytes saved in the last looks, the newest last.
    pub history: Vec<u64>,
}

/// Looks whose savings are kept for the sparkline.
pub const HISTORY: usize = 8;

struct Unit {
    row: Row,
    processes: Vec<Row>,
}

/// The table.
#[derive(Default)]
pub struct Model {
    units: Vec<Unit>,
    folded: BTreeSet<String>,
    sort: Sort,
    /// Also what offers nothing.
    all: bool,
    selected: Option<Key>,
    history: BTreeMap<Key, VecDeque<u64>>,
    last: Look,
    rates: BTreeMap<i32, f64>,
}

impl Model {
    /// Takes another look in. What has ended goes; the selection stays where it is, or on the
    /// line that takes the place of what has ended.
    pub fn update(&mut self, look: Look) {
        let place = self.place();
        let seconds = look.at.saturating_sub(self.last.at).as_secs_f64();
        let before: BTreeMap<i32, u64> = self
            .last
            .processes
            .iter()
            .filter_map(|p| Some((p.pid, p.broken?)))
            .collect();
        self.rates = look
            .processes
            .iter()
            .filter(|_| seconds > 0.0)
            .filter_map(|p| {
                let new = p.broken?.saturating_sub(*before.get(&p.pid)?);
                Some((p.pid, new as f64 / seconds))
            })
            .collect();
        self.last = look;
        self.build();
        self.remember();
        self.keep_selection(place);
    }

    /// Sorts the look into units.
    fn build(&mut self) {
        let mut units: BTreeMap<&str, Unit> = BTreeMap::new();
        for p in &self.last.processes {
            if !(self.all || p.offers || p.saved.unwrap_or(0) > 0) {
                continue;
            }
            let figures = Figures {
                anon_bytes: p.anon,
                saved_bytes: p.saved,
                unique_bytes: p.unique,
                changing_bytes: p.changing,
                broken_per_second: self.rates.get(&p.pid).copied(),
            };
            let unit = units.entry(&p.unit).or_insert_with(|| Unit {
                row: Row {
                    key: Key::Unit(p.unit.clone()),
                    name: p.unit.clone(),
                    figures: Figures::default(),
                    folded: self.folded.contains(&p.unit),
                    history: Vec::new(),
                },
                processes: Vec::new(),
            });
            unit.row.figures.add(&figures);
            unit.processes.push(Row {
                key: Key::Process(p.pid),
                name: format!("{} {}", p.pid, p.title),
                figures,
                folded: false,
                history: Vec::new(),
            });
        }
        self.units = units.into_values().collect();
        self.order();
        self.fill_history();
    }

    fn order(&mut self) {
        let sort = self.sort;
        // Equal ones stay by name and by pid.
        self.units.sort_by_key(|unit| unit.row.figures.rank(sort));
        for unit in &mut self.units {
            unit.processes.sort_by_key(|row| row.figures.rank(sort));
        }
    }

    fn each_row(&mut self) -> impl Iterator<Item = &mut Row> {
        self.units
            .iter_mut()
            .flat_map(|unit| std::iter::once(&mut unit.row).chain(&mut unit.processes))
    }

    /// Notes what is saved now, and forgets what is not there any more.
    fn remember(&mut self) {
        let mut old = std::mem::take(&mut self.history);
        let mut new = BTreeMap::new();
        for row in self.each_row() {
            let mut values = old.remove(&row.key).unwrap_or_default();
            if values.len() >= HISTORY {
                values.pop_front();
            }
            values.push_back(row.figures.saved_bytes.unwrap_or(0));
            new.insert(row.key.clone(), values);
        }
        self.history = new;
        self.fill_history();
    }

    fn fill_history(&mut self) {
        let history = std::mem::take(&mut self.history);
        for row in self.each_row() {
            row.history = history
                .get(&row.key)
                .map(|values| values.iter().copied().collect())
                .unwrap_or_default();
        }
        self.history = history;
    }

    /// The lines in their order, without those of folded units.
    pub fn rows(&self) -> Vec<&Row> {
        self.units
            .iter()
            .flat_map(|unit| {
                let shown = if unit.row.folded { 0 } else { usize::MAX };
                std::iter::once(&unit.row).chain(unit.processes.iter().take(shown))
            })
            .collect()
    }

    /// All units with all of their processes.
    pub fn tree(&self) -> impl Iterator<Item = (&Row, &[Row])> {
        self.units
            .iter()
            .map(|unit| (&unit.row, unit.processes.as_slice()))
    }

    /// The line that is selected.
    pub fn place(&self) -> usize {
        let rows = self.rows();
        rows.iter()
            .position(|row| Some(&row.key) == self.selected.as_ref())
            .unwrap_or(0)
    }

    pub fn selected(&self) -> Option<&Key> {
        self.selected.as_ref()
    }

    fn select(&mut self, place: usize) {
        let rows = self.rows();
        let last = rows.len().saturating_sub(1);
        let key = rows.get(place.min(last)).map(|row| row.key.clone());
        self.selected = key;
    }

    fn keep_selection(&mut self, place: usize) {
        let is_there = self
            .rows()
            .iter()
            .any(|row| Some(&row.key) == self.selected.as_ref());
        if !is_there {
            self.select(place);
        }
    }

    /// Selects the line so many below, or above where negative.
    pub fn go(&mut self, lines: isize) {
        self.select(self.place().saturating_add_signed(lines));
    }

    /// Folds or unfolds the unit that is selected, or the one of the process that is.
    pub fn fold(&mut self) {
        let Some(selected) = self.selected.clone() else {
            return;
        };
        let of = |unit: &&mut Unit| {
            unit.row.key == selected || unit.processes.iter().any(|row| row.key == selected)
        };
        let Some(unit) = self.units.iter_mut().find(of) else {
            return;
        };
        unit.row.folded = !unit.row.folded;
        let (key, name, folded) = (unit.row.key.clone(), unit.row.name.clone(), unit.row.folded);
        if folded {
            self.folded.insert(name);
        } else {
            self.folded.remove(&name);
        }
        self.selected = Some(key);
    }

    pub fn sort(&self) -> Sort {
        self.sort
    }

    pub fn sort_by(&mut self, sort: Sort) {
        self.sort = sort;
        self.order();
    }

    pub fn shows_all(&self) -> bool {
        self.all
    }

    /// Shows what offers no memory, too, or not.
    pub fn show_all(&mut self, all: bool) {
        let place = self.place();
        self.all = all;
        self.build();
        self.keep_selection(place);
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A process of a unit, with so many MiB saved, unique and changing, and pages broken.
    pub fn process(pid: i32, unit: &str, figures: [u64; 4]) -> Facts {
        let [saved, unique, changing, broken] = figures;
        Facts {
            pid,
            title: format!("p{pid}"),
            unit: unit.into(),
            offers: true,
            anon: 1 << 30,
            saved: Some(saved << 20),
            unique: Some(unique << 20),
            changing: Some(changing << 20),
            broken: Some(broken),
        }
    }

    pub fn look(second: u64, processes: &[Facts]) -> Look {
        Look {
            at: Duration::from_secs(second),
            processes: processes.into(),
        }
    }

    fn names(model: &Model) -> Vec<String> {
        model.rows().iter().map(|row| row.name.clone()).collect()
    }

    fn model() -> Model {
        let mut model = Model::default();
        model.update(look(
            10,
            &[
                process(1, "a.service", [10, 50, 0, 0]),
                process(2, "b.service", [30, 5, 7, 100]),
                process(3, "a.service", [15, 60, 9, 0]),
            ],
        ));
        model
    }

    #[test]
    fn sorts_units_and_processes() {
        let mut model = model();
        assert_eq!(
            names(&model),
            ["b.service", "2 p2", "a.service", "3 p3", "1 p1"]
        );
        assert_eq!(model.rows()[2].figures.saved_bytes, Some(25 << 20));
        model.sort_by(Sort::Unique);
        assert_eq!(
            names(&model),
            ["a.service", "3 p3", "1 p1", "b.service", "2 p2"]
        );
        model.sort_by(Sort::Changing);
        assert_eq!(names(&model)[0], "a.service");
        model.update(look(
            12,
            &[process(2, "b", [0; 4]), process(9, "c", [0, 0, 0, 8])],
        ));
        model.sort_by(Sort::Broken);
        // What is new has no rate yet, which is less than none broken.
        assert_eq!(names(&model), ["b", "2 p2", "c", "9 p9"]);
    }

    #[test]
    fn rates_are_by_second() {
        let mut model = model();
        assert_eq!(model.rows()[1].figures.broken_per_second, None);
        model.update(look(14, &[process(2, "b.service", [30, 5, 7, 300])]));
        assert_eq!(model.rows()[1].figures.broken_per_second, Some(50.0));
        assert_eq!(model.rows()[0].history, [30 << 20, 30 << 20]);
        // Another process with the same pid.
        model.update(look(16, &[process(2, "b.service", [30, 5, 7, 3])]));
        assert_eq!(model.rows()[1].figures.broken_per_second, Some(0.0));
        for second in 17..40 {
            model.update(look(second, &[process(2, "b.service", [second, 0, 0, 0])]));
        }
        assert_eq!(model.rows()[0].history.len(), HISTORY);
        assert_eq!(model.rows()[0].history.last(), Some(&(39 << 20)));
    }

    #[test]
    fn selection_follows_its_process() {
        let mut model = model();
        assert_eq!(model.selected(), Some(&Key::Unit("b.service".into())));
        model.go(3);
        assert_eq!(model.selected(), Some(&Key::Process(3)));
        // One comes, and it moves down.
        let one = process(1, "a.service", [10, 50, 0, 0]);
        let two = process(2, "b.service", [30, 5, 7, 100]);
        let three = process(3, "a.service", [15, 60, 9, 0]);
        let four = process(4, "c.service", [99, 0, 0, 0]);
        let all = [one.clone(), two.clone(), three, four.clone()];
        model.update(look(12, &all));
        assert_eq!(names(&model)[4..], ["a.service", "3 p3", "1 p1"]);
        assert_eq!(model.selected(), Some(&Key::Process(3)));
        // It ends: what takes its place is selected.
        model.update(look(14, &[one, two, four]));
        assert_eq!(model.selected(), Some(&Key::Process(1)));
        model.update(look(16, &[]));
        assert_eq!(model.selected(), None);
        model.go(1);
        model.fold();
        assert_eq!(model.place(), 0);
        model.update(model_look());
        assert_eq!(model.place(), 0);
    }

    fn model_look() -> Look {
        look(20, &[process(1, "a", [1; 4])])
    }

    #[test]
    fn ends_of_the_list() {
        let mut model = model();
        model.go(-5);
        assert_eq!(model.place(), 0);
        model.go(isize::MAX);
        assert_eq!(model.place(), 4);
        model.go(isize::MIN);
        assert_eq!(model.place(), 0);
    }

    #[test]
    fn folds() {
        let mut model = model();
        model.go(3);
        model.fold();
        assert_eq!(names(&model), ["b.service", "2 p2", "a.service"]);
        assert_eq!(model.selected(), Some(&Key::Unit("a.service".into())));
        model.update(look(12, &[process(1, "a.service", [1; 4])]));
        assert_eq!(names(&model), ["a.service"]);
        model.fold();
        assert_eq!(names(&model), ["a.service", "1 p1"]);
    }

    #[test]
    fn what_offers_nothing_is_hidden() {
        let mut model = Model::default();
        let mut quiet = process(5, "q", [0; 4]);
        quiet.offers = false;
        model.update(look(1, &[quiet]));
        assert!(model.rows().is_empty());
        model.show_all(true);
        assert_eq!(names(&model), ["q", "5 p5"]);
        model.show_all(false);
        assert!(model.rows().is_empty() && model.selected().is_none());
    }
}
