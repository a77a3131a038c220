// SPDX-License-Identifier: GPL-2.0-only
//! The rules that are to hold after the next boot, too: /etc/rksm/rules.d/*.rules.
//!
//! A line has an action and the path of a cgroup, from "/" as below the mount of cgroup v2:
//!
//! ```text
//! # Guests are merged, but for this one.
//! always /machine.slice
//! never  /machine.slice/machine-db.scope
//! ```
//!
//! The action is `always`, `never` or `default`. Lines that are empty or begin with `#` say
//! nothing. Of several lines for one path the last holds, in files by name. Only `rksmctl` writes
//! [`OWN`]; the others are the administrator's.

use crate::device::Action;
use crate::exit::{Doing, Failure};
use crate::host::Host;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;

pub const DIR: &str = "/etc/rksm/rules.d";
/// The file for what `enable` and the like save.
pub const OWN: &str = "/etc/rksm/rules.d/90-rksmctl.rules";

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    pub action: Action,
    pub path: String,
    pub file: String,
    pub number: usize,
}

/// All files, and what is wrong with them: one sentence each, with file and line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    lines: Vec<Line>,
    pub errors: Vec<String>,
}

/// Why this cannot be the path of a cgroup. Of each cgroup there is one path.
pub fn check_path(path: &str) -> Result<(), String> {
    let bad = |part: &str| matches!(part, "" | "." | "..");
    match path.strip_prefix('/') {
        None => Err(format!("the path '{path}' does not begin with /")),
        Some("") => Ok(()),
        Some(below) if below.split('/').any(bad) => {
            Err(format!("the path '{path}' has an empty part, '.' or '..'"))
        }
        Some(_) if path.contains(['\0', '\n']) => Err("the path has a line end".into()),
        Some(_) if path.len() > 4095 => Err("the path is too long".into()),
        Some(_) => Ok(()),
    }
}

fn parse_line(text: &str) -> Result<Option<(Action, String)>, String> {
    let text = text.trim();
    if text.is_empty() || text.starts_with('#') {
        return Ok(None);
    }
    let (word, path) = text.split_once([' ', '\t']).unwrap_or((text, ""));
    let action = Action::ALL
        .into_iter()
        .find(|a| a.name() == word)
        .ok_or_else(|| format!("'{word}' is none of always, never, default"))?;
    let path = path.trim_start();
    if path.is_empty() {
        return Err(format!("the path of a cgroup is wanted after '{word}'"));
    }
    check_path(path)?;
    Ok(Some((action, path.to_string())))
}

fn parse(file: &str, text: &str, saved: &mut Saved) {
    for (number, line) in (1..).zip(text.lines()) {
        match parse_line(line) {
            Ok(None) => {}
            Ok(Some((action, path))) => saved.lines.push(Line {
                action,
                path,
                file: file.into(),
                number,
            }),
            Err(e) => saved.errors.push(format!("{file}:{number}: {e}")),
        }
    }
}

impl Saved {
    /// Reads all files.
    pub fn read(host: &Host) -> Result<Self, Failure> {
        let mut saved = Self::default();
        for name in host.list(DIR)? {
            if name.ends_with(".rules") && !name.starts_with('.') {
                let file = format!("{DIR}/{name}");
                parse(&file, &host.read(&file)?, &mut saved);
            }
        }
        Ok(saved)
    }

    /// The lines that hold, in the order of their paths.
    pub fn effective(&self) -> Vec<&Line> {
        let mut lines: Vec<&Line> = Vec::new();
        for line in &self.lines {
            lines.retain(|l| l.path != line.path);
            lines.push(line);
        }
        lines.sort_by(|a, b| a.path.cmp(&b.path));
        lines
    }

    /// The one that holds for a path.
    pub fn of(&self, path: &str) -> Option<&Line> {
        self.lines.iter().rev().find(|l| l.path == path)
    }

    /// The one that would hold without our own file.
    pub fn of_others(&self, path: &str) -> Option<&Line> {
        let others = |l: &&Line| l.path == path && l.file != OWN;
        self.lines.iter().rev().find(others)
    }

    /// Fails where our own file has a line that writing it anew would lose.
    pub fn check_own(&self) -> Result<(), Failure> {
        let own = |e: &&String| e.starts_with(OWN);
        match self.errors.iter().find(own) {
            Some(error) => Err(Failure::failed(error)),
            None => Ok(()),
        }
    }

    /// What our own file says.
    pub fn own(&self) -> Vec<(Action, String)> {
        let own = self.lines.iter().filter(|l| l.file == OWN);
        own.map(|l| (l.action, l.path.clone())).collect()
    }
}

/// Has our own file say this about a path, or nothing; the rest of it stays. False where it does
/// so already.
pub fn save(host: &Host, path: &str, action: Option<Action>) -> Result<bool, Failure> {
    let saved = Saved::read(host)?;
    saved.check_own()?;
    let mut rules = saved.own();
    let before = rules.clone();
    let at = rules.iter().position(|(_, p)| p == path);
    match (at, action) {
        // In its place.
        (Some(_), Some(action)) => {
            for rule in rules.iter_mut().filter(|(_, p)| p == path) {
                rule.0 = action;
            }
        }
        (None, Some(action)) => rules.push((action, path.into())),
        (Some(_), None) => rules.retain(|(_, p)| p != path),
        (None, None) => {}
    }
    if rules == before {
        return Ok(false);
    }
    write(host, &rules)?;
    Ok(true)
}

/// Has our own file say just this.
pub fn write(host: &Host, rules: &[(Action, String)]) -> Result<(), Failure> {
    let mut text = String::from(
        "# Written by rksmctl enable, disable, never and rules. Others of your own belong into\n\
         # other files here; `rksmctl rules apply` has all of them hold.\n",
    );
    for (action, path) in rules {
        check_path(path).map_err(Failure::failed)?;
        let _ = writeln!(text, "{action:7} {path}");
    }
    write_file(host, OWN, &text)
}

/// Writes a file in one step, and the directories above it: who reads sees the old or the new.
pub fn write_file(host: &Host, path: &str, text: &str) -> Result<(), Failure> {
    let real = host.path(path);
    let new = real.with_extension("new");
    let write = || {
        if let Some(dir) = real.parent() {
            fs::create_dir_all(dir)?;
        }
        let mut file = fs::File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, &real)
    };
    write()
        .inspect_err(|_| drop(fs::remove_file(&new)))
        .doing(format!("cannot write {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    #[test]
    fn lines() {
        let mut saved = Saved::default();
        parse(
            "f",
            "# a comment\n\n  always /machine.slice\nnever\t /a b/c\n\
             maybe /x\nnever\nnever x\nnever /x/\nnever /x//y\nnever /x/../y\ndefault /\n",
            &mut saved,
        );
        let good: Vec<_> = saved
            .lines
            .iter()
            .map(|l| (l.action, l.path.as_str(), l.number))
            .collect();
        assert_eq!(
            good,
            [
                (Action::Always, "/machine.slice", 3),
                (Action::Never, "/a b/c", 4),
                (Action::Default, "/", 11)
            ]
        );
        assert_eq!(
            saved.errors,
            [
                "f:5: 'maybe' is none of always, never, default",
                "f:6: the path of a cgroup is wanted after 'never'",
                "f:7: the path 'x' does not begin with /",
                "f:8: the path '/x/' has an empty part, '.' or '..'",
                "f:9: the path '/x//y' has an empty part, '.' or '..'",
                "f:10: the path '/x/../y' has an empty part, '.' or '..'",
            ]
        );
    }

    #[test]
    fn files() {
        let fixture = Fixture::new();
        let host = Host::new(fixture.root());
        assert_eq!(Saved::read(&host).unwrap(), Saved::default());
        assert_eq!(save(&host, "/a", None), Ok(false));
        assert!(!host.exists(OWN));
        assert_eq!(save(&host, "/a", Some(Action::Always)), Ok(true));
        assert_eq!(save(&host, "/b", Some(Action::Always)), Ok(true));
        assert_eq!(save(&host, "/a", Some(Action::Never)), Ok(true));
        assert_eq!(save(&host, "/a", Some(Action::Never)), Ok(false));
        assert!(host
            .read(OWN)
            .unwrap()
            .ends_with("\nnever   /a\nalways  /b"));
        fixture.file("/etc/rksm/rules.d/95-x.rules", "default /a\n");
        fixture.file("/etc/rksm/rules.d/README", "x\n");
        let saved = Saved::read(&host).unwrap();
        assert_eq!(saved.errors, Vec::<String>::new());
        let hold: Vec<_> = saved
            .effective()
            .iter()
            .map(|l| (l.action, l.path.as_str()))
            .collect();
        assert_eq!(hold, [(Action::Default, "/a"), (Action::Always, "/b")]);
        assert_eq!(saved.of_others("/a").unwrap().number, 1);
        assert_eq!(save(&host, "/b", None), Ok(true));
        assert_eq!(Saved::read(&host).unwrap().of("/b"), None);
        assert_eq!(host.list(DIR).unwrap().len(), 3);
        fixture.file(OWN, "nevre /c\n");
        assert_eq!(
            save(&host, "/d", Some(Action::Never)).unwrap_err().message,
            format!("{OWN}:1: 'nevre' is none of always, never, default")
        );
        assert_eq!(host.read(OWN).unwrap(), "nevre /c");
    }
}
