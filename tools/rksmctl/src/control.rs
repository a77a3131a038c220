// SPDX-License-Identifier: GPL-2.0-only
//! What `enable`, `disable` and `never` have in common: finding out what they are about, changing
//! its rule, and saying so.

use crate::cli::Target;
use crate::device::{Action, Device, Rule, Subject};
use crate::exit::{Failure, Status};
use crate::host::{Context, KSM};
use crate::process::{self, cgroup_path, Process, Selector};
use crate::rule_files::{self, Saved, OWN};
use crate::systemd::{self, Unit};
use crate::units::{bytes, count, counted};
use indicatif::ProgressBar;
use serde::Serialize;
use std::io::IsTerminal;
use std::time::Duration;

/// One of the three verbs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Enable,
    Disable,
    Never,
}

impl Change {
    /// The rule that it sets; nothing where it removes one.
    fn action(self) -> Option<Action> {
        match self {
            Self::Enable => Some(Action::Always),
            Self::Disable => None,
            Self::Never => Some(Action::Never),
        }
    }

    /// What has become of it, after its name.
    fn outcome(self) -> &'static str {
        match self {
            Self::Enable => "merged from now on",
            Self::Disable => "no longer merged",
            Self::Never => "never merged from now on",
        }
    }
}

/// What a target stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Aim {
    Processes(Vec<Process>),
    Cgroup {
        path: String,
        unit: Option<Unit>,
        exists: bool,
    },
}

impl Aim {
    /// Finds it. `gone` is whether a cgroup that is not there will do.
    pub fn find(target: &Target, cx: &Context, gone: bool) -> Result<Self, Failure> {
        let there = |path: &str| cx.host.exists(format!("/sys/fs/cgroup{path}"));
        if let Some(name) = &target.unit {
            let unit = Unit::find(&cx.host, name, gone)?;
            let path = unit.cgroup.clone();
            return Ok(Self::Cgroup {
                exists: there(&path),
                path,
                unit: Some(unit),
            });
        }
        if let Some(cgroup) = &target.cgroup {
            let path = cgroup_path(cgroup);
            rule_files::check_path(&path).map_err(Failure::usage)?;
            let exists = there(&path);
            if !exists && !gone {
                return Err(Failure::failed(format!(
                    "no cgroup {path}; a rule for one to come belongs into {}",
                    rule_files::DIR
                )));
            }
            return Ok(Self::Cgroup {
                path,
                unit: None,
                exists,
            });
        }
        Ok(Self::Processes(Selector::from(target).select(&cx.host)?))
    }

    /// "cgroup /a.slice", "process 5", "2 processes".
    fn name(&self) -> String {
        match self {
            Self::Cgroup { path, .. } => format!("cgroup {path}"),
            Self::Processes(all) => match all.as_slice() {
                [one] => format!("process {}", one.pid),
                all => format!("{} processes", all.len()),
            },
        }
    }

    /// What a change would be, for those who cannot have it.
    fn would(&self, change: Change) -> String {
        match change.action() {
            Some(action) => format!("setting the rule '{action}' for {}", self.name()),
            None => format!("removing the rule of {} and unmerging it", self.name()),
        }
    }
}

/// One of those that were changed.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Changed {
    pub pid: Option<i32>,
    pub title: Option<String>,
    pub cgroup: Option<String>,
    pub unit: Option<String>,
    /// Processes that are there now.
    pub processes: u64,
    /// Why it was not done, or not all of it.
    pub error: Option<String>,
}

/// What was done.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// The rule in force; nothing where one was removed.
    pub rule: Option<Action>,
    pub changed: Vec<Changed>,
    /// Bytes that processes have as their own again.
    pub unmerged_bytes: Option<u64>,
    /// The file of rules that was changed.
    pub saved: Option<String>,
    /// The drop-in that was written or removed.
    pub drop_in: Option<String>,
    /// Whether systemd still has to read it.
    pub reload_needed: bool,
    /// What else there is to know, one sentence each.
    pub notes: Vec<String>,
    /// What went wrong besides.
    pub errors: Vec<String>,
}

impl Report {
    fn status(&self) -> Status {
        if self.errors.is_empty() && self.changed.iter().all(|c| c.error.is_none()) {
            Status::Ok
        } else {
            Status::Partial
        }
    }

    fn text(&self, change: Change) -> String {
        let mut lines = Vec::new();
        for c in self.changed.iter().filter(|c| c.error.is_none()) {
            let outcome = change.outcome();
            lines.push(match (c.pid, &c.cgroup) {
                (Some(pid), _) => {
                    let title = c.title.as_deref().unwrap_or_default();
                    format!("process {pid} ({title}): {outcome}")
                }
                (None, path) => format!(
                    "cgroup {}: {outcome}, {} now",
                    path.as_deref().unwrap_or_default(),
                    counted(c.processes, "process", "processes")
                ),
            });
        }
        if let Some(n) = self.unmerged_bytes.filter(|n| *n > 0) {
            let pages = count(n / PAGE);
            lines.push(format!("unmerged {pages} pages ({})", bytes(n)));
        }
        match (&self.saved, self.rule) {
            (Some(file), Some(_)) => lines.push(format!("saved in {file}")),
            (Some(file), None) => lines.push(format!("removed from {file}")),
            (None, _) => {}
        }
        if let Some(file) = &self.drop_in {
            lines.push(match change {
                Change::Enable => format!("wrote {file}: MemoryKSM=yes from its next start on"),
                _ => format!("removed {file}"),
            });
            lines.push(if self.reload_needed {
                "systemd has to read it: systemctl daemon-reload".into()
            } else {
                "systemd has read it".into()
            });
        }
        lines.extend(self.notes.iter().cloned());
        lines.join("\n")
    }
}

/// The kernel's calls count pages of this size.
const PAGE: u64 = 4096;

/// The verb as a whole.
pub fn run(change: Change, target: &Target, save: bool, cx: &Context) -> Result<Status, Failure> {
    let aim = Aim::find(target, cx, change == Change::Disable)?;
    let device = Device::open_for(&cx.host, &aim.would(change)).map_err(|mut failure| {
        let service = matches!(&aim, Aim::Cgroup { unit: Some(u), .. } if u.is_service());
        if failure.status == 3 && change == Change::Enable && service {
            failure.message += "; MemoryKSM=yes in the unit's [Service] works without it";
        }
        failure
    })?;
    crate::device::catch_interrupts()?;
    let report = apply(change, &aim, save, &device, cx)?;
    print(change, &report, cx)
}

fn print(change: Change, report: &Report, cx: &Context) -> Result<Status, Failure> {
    let text = report.text(change);
    if cx.json || !text.is_empty() {
        cx.print(report, || text)?;
    }
    let each = report.changed.iter().filter_map(|c| c.error.as_ref());
    for error in each.chain(&report.errors) {
        eprintln!("rksmctl: {error}");
    }
    let done = report.changed.iter().any(|c| c.error.is_none());
    match report.status() {
        // All of them have been said.
        Status::Partial if !done => Err(Failure::failed("nothing was changed")),
        status => Ok(status),
    }
}

/// Does it, and reports. Fails only where nothing has been changed.
pub fn apply(
    change: Change,
    aim: &Aim,
    save: bool,
    device: &Device,
    cx: &Context,
) -> Result<Report, Failure> {
    let mut report = Report {
        rule: change.action(),
        ..Report::default()
    };
    match aim {
        Aim::Processes(all) => {
            for process in all {
                let subject = Subject::Process(process.pid);
                let error = set(change, &subject, device)
                    .and_then(|()| unmerge(change, process.pid, device, &mut report))
                    .err();
                // With one there is nothing done in part.
                if let (Some(error), [_]) = (&error, all.as_slice()) {
                    return Err(error.clone());
                }
                report.changed.push(Changed {
                    pid: Some(process.pid),
                    title: Some(process.title().into()),
                    processes: 1,
                    error: error.map(|e| e.message),
                    ..Changed::default()
                });
            }
        }
        Aim::Cgroup { path, unit, exists } => {
            set(change, &Subject::Cgroup(path.clone()), device)?;
            let inside: Vec<Process> = process::list(&cx.host)?
                .into_iter()
                .filter(|p| p.in_cgroup(path))
                .collect();
            report.changed.push(Changed {
                cgroup: Some(path.clone()),
                unit: unit.as_ref().map(|u| u.name.clone()),
                processes: inside.len() as u64,
                ..Changed::default()
            });
            if !exists && change != Change::Disable {
                let name = unit.as_ref().map_or(path, |u| &u.name);
                report
                    .notes
                    .push(format!("{name} does not run now: the rule waits for it"));
            }
            if save {
                save_rule(change, path, &mut report, cx);
            }
            if let Some(unit) = unit.as_ref().filter(|u| u.is_service()) {
                drop_in(change, unit, &mut report, cx);
            }
            let rules = match change {
                Change::Disable => device.rules().unwrap_or_default(),
                _ => Vec::new(),
            };
            for process in inside {
                if has_own_rule(&rules, path, &process) {
                    continue;
                }
                let result = unmerge(change, process.pid, device, &mut report);
                // One that has ended is not merged either.
                let there = || matches!(process::read(&cx.host, process.pid), Ok(Some(_)));
                report
                    .errors
                    .extend(result.err().filter(|_| there()).map(|e| e.message));
            }
        }
    }
    let run = cx.host.value_if_there::<u64>(format!("{KSM}/run"));
    if let (Change::Enable, Ok(Some(run @ (0 | 2)))) = (change, run) {
        report
            .notes
            .push(format!("nothing is merged while {KSM}/run is {run}"));
    }
    if change == Change::Disable {
        still_covered(aim, device, &mut report);
    }
    Ok(report)
}

fn set(change: Change, subject: &Subject, device: &Device) -> Result<(), Failure> {
    match change.action() {
        Some(action) => device.rule(subject, action),
        None => device.remove(subject).map(drop),
    }
}

/// What `disable` does with a process, without a rule that would undo it.
fn unmerge(change: Change, pid: i32, device: &Device, report: &mut Report) -> Result<(), Failure> {
    if change != Change::Disable {
        return Ok(());
    }
    if device.interrupted() {
        return Err(Failure::failed(format!("process {pid}: interrupted")));
    }
    let spinner = Spinner::new(format!("unmerging process {pid}"));
    let unmerged = device.unmerge(pid, None, true, |_, _| {});
    drop(spinner);
    let unmerged = unmerged?;
    *report.unmerged_bytes.get_or_insert(0) += unmerged.pages * PAGE;
    match unmerged.stopped {
        Some(why) => Err(Failure::failed(format!("process {pid}: {why}"))),
        None => Ok(()),
    }
}

/// Something that moves on stderr, if that is a terminal: one call does all of a process.
struct Spinner(Option<ProgressBar>);

impl Spinner {
    fn new(what: String) -> Self {
        Self(std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner().with_message(what);
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        }))
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

fn save_rule(change: Change, path: &str, report: &mut Report, cx: &Context) {
    match rule_files::save(&cx.host, path, change.action()) {
        Ok(true) => report.saved = Some(OWN.into()),
        Ok(false) => {}
        Err(e) => report.errors.push(format!("not saved: {e}")),
    }
    let Ok(saved) = Saved::read(&cx.host) else {
        return;
    };
    // After the next boot another file would have it otherwise.
    if let Some(line) = saved.of(path).filter(|l| Some(l.action) != change.action()) {
        report.notes.push(format!(
            "{}:{} still says '{}' for the next boot",
            line.file, line.number, line.action
        ));
    }
}

fn drop_in(change: Change, unit: &Unit, report: &mut Report, cx: &Context) {
    let host = &cx.host;
    let result = if change == Change::Enable {
        if let Some(why) = systemd::too_old(host) {
            report.notes.push(why);
            return;
        }
        unit.write_drop_in(host).map(|()| true)
    } else {
        unit.remove_drop_in(host)
    };
    match result {
        Ok(true) => {
            report.drop_in = Some(unit.drop_in());
            report.reload_needed = !systemd::reload(host);
        }
        Ok(false) => {}
        Err(e) => report.errors.push(e.message),
    }
}

/// Says which rule of a cgroup further out merges what has just been disabled.
fn still_covered(aim: &Aim, device: &Device, report: &mut Report) {
    let Ok(rules) = device.rules() else {
        return;
    };
    let paths: Vec<&str> = match aim {
        Aim::Cgroup { path, .. } => vec![path],
        Aim::Processes(all) => all.iter().filter_map(|p| p.cgroup.as_deref()).collect(),
    };
    for path in paths {
        if let Some((outer, Action::Always)) = innermost(&rules, path) {
            let note = format!("the rule 'always' of cgroup {outer} merges it again: use never");
            if !report.notes.contains(&note) {
                report.notes.push(note);
            }
        }
    }
}

/// Whether a rule for a process, or for a cgroup below the cgroup `path`, has it merged.
fn has_own_rule(rules: &[Rule], path: &str, process: &Process) -> bool {
    let own = |rule: &Rule| {
        rule.subject == Subject::Process(process.pid) && rule.action == Action::Always
    };
    let cgroup = process.cgroup.as_deref().unwrap_or("/");
    let inner = innermost(rules, cgroup)
        .is_some_and(|(of, action)| of.len() > path.len() && action == Action::Always);
    inner || rules.iter().any(own)
}

/// The rule of a cgroup that holds for what is in the cgroup `path`.
fn innermost<'a>(rules: &'a [Rule], path: &str) -> Option<(&'a str, Action)> {
    let inside = Process {
        cgroup: Some(path.into()),
        ..Process::default()
    };
    rules
        .iter()
        .filter_map(|rule| match &rule.subject {
            Subject::Cgroup(of) if inside.in_cgroup(of) => Some((of.as_str(), rule.action)),
            _ => None,
        })
        .max_by_key(|(of, _)| of.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::abi;
    use crate::device::fake::{golden, rksm_host, Fake};
    use crate::fixture::Fixture;
    use nix::errno::Errno;

    struct Machine {
        fixture: Fixture,
        fake: Fake,
        cx: Context,
    }

    impl Machine {
        fn new() -> Self {
            let (fixture, cx) = rksm_host();
            let fake = Fake::new(&[1, 800, 4211, 4212]);
            let pages = abi::Unmerge {
                pages: 2048,
                ..abi::Unmerge::default()
            };
            fake.0.borrow_mut().unmerges = [(Ok(()), pages)].into();
            Self { fixture, fake, cx }
        }

        fn device(&self) -> Device {
            self.fake.device(&self.cx.host)
        }

        fn apply(&self, change: Change, target: &Target) -> Result<Report, Failure> {
            let aim = Aim::find(target, &self.cx, change == Change::Disable)?;
            apply(change, &aim, true, &self.device(), &self.cx)
        }

        /// The text, and the calls that were made.
        fn does(&self, change: Change, target: &Target) -> String {
            let report = self.apply(change, target).unwrap();
            let text = report.text(change);
            format!("{text}\n[{}]", self.fake.log().join("] ["))
        }
    }

    fn nothing() -> Target {
        Target {
            pid: None,
            unit: None,
            cgroup: None,
            vm: None,
        }
    }

    fn pid(pid: i32) -> Target {
        Target {
            pid: Some(pid),
            ..nothing()
        }
    }

    fn unit(name: &str) -> Target {
        Target {
            unit: Some(name.into()),
            ..nothing()
        }
    }

    fn cgroup(path: &str) -> Target {
        Target {
            cgroup: Some(path.into()),
            ..nothing()
        }
    }

    #[test]
    fn processes() {
        let m = Machine::new();
        assert_eq!(
            m.does(Change::Enable, &pid(4211)),
            "process 4211 (clone1): merged from now on\n[always process 4211]"
        );
        let vm = Target {
            vm: Some("clone2".into()),
            ..nothing()
        };
        assert_eq!(
            m.does(Change::Never, &vm),
            "process 4212 (clone2): never merged from now on\n[never process 4212]"
        );
        // The rule goes first, or it would have the process merged again.
        assert_eq!(
            m.does(Change::Disable, &pid(4211)),
            "process 4211 (clone1): no longer merged\nunmerged 2,048 pages (8 MiB)\n\
             [remove process 4211] [unmerge 4211 1 0-ffffffffffffffff]"
        );
        assert!(!m.cx.host.exists(rule_files::DIR));
        m.fake.0.borrow_mut().pids.clear();
        assert_eq!(
            m.apply(Change::Enable, &pid(4211)).unwrap_err().message,
            "process 4211 has ended"
        );
        assert_eq!(
            m.apply(Change::Enable, &pid(9)).unwrap_err().message,
            "no process 9"
        );
    }

    #[test]
    fn disabling_in_part() {
        let m = Machine::new();
        let half = abi::Unmerge {
            at: 0x1000,
            pages: 1,
            ..abi::Unmerge::default()
        };
        m.fake.0.borrow_mut().unmerges =
            [(Err(Errno::EINTR), half), (Err(Errno::ESRCH), half)].into();
        assert_eq!(
            m.apply(Change::Disable, &pid(4211)).unwrap_err().message,
            "process 4211: process 4211 has ended"
        );
    }

    #[test]
    fn cgroups() {
        let m = Machine::new();
        assert_eq!(
            m.does(Change::Enable, &cgroup("qemu.slice/")),
            "cgroup /qemu.slice: merged from now on, 2 processes now\n\
             saved in /etc/rksm/rules.d/90-rksmctl.rules\n[always cgroup /qemu.slice]"
        );
        // What holds for the whole slice does so for a part of it, too.
        assert_eq!(
            m.does(Change::Disable, &cgroup("/qemu.slice/100.scope")),
            "cgroup /qemu.slice/100.scope: no longer merged, 1 process now\n\
             unmerged 2,048 pages (8 MiB)\n\
             the rule 'always' of cgroup /qemu.slice merges it again: use never\n\
             [remove cgroup /qemu.slice/100.scope] [unmerge 4211 1 0-ffffffffffffffff]"
        );
        m.does(Change::Enable, &cgroup("/qemu.slice/100.scope"));
        // The part has its own rule now.
        assert_eq!(
            m.does(Change::Disable, &cgroup("/qemu.slice")),
            "cgroup /qemu.slice: no longer merged, 2 processes now\n\
             unmerged 2,048 pages (8 MiB)\n\
             removed from /etc/rksm/rules.d/90-rksmctl.rules\n\
             [remove cgroup /qemu.slice] [unmerge 4212 1 0-ffffffffffffffff]"
        );
        assert_eq!(
            m.apply(Change::Enable, &cgroup("/none"))
                .unwrap_err()
                .message,
            "no cgroup /none; a rule for one to come belongs into /etc/rksm/rules.d"
        );
        assert_eq!(
            m.apply(Change::Enable, &cgroup("/a/../b"))
                .unwrap_err()
                .status,
            2
        );
        // Its rule can go when it has gone.
        m.apply(Change::Disable, &cgroup("/none")).unwrap();
        m.fixture
            .file("/etc/rksm/rules.d/95-x.rules", "always /qemu.slice\n");
        let notes = m
            .apply(Change::Never, &cgroup("/qemu.slice"))
            .unwrap()
            .notes;
        assert_eq!(
            notes,
            ["/etc/rksm/rules.d/95-x.rules:1 still says 'always' for the next boot"]
        );
    }

    #[test]
    fn units() {
        let m = Machine::new();
        m.fixture.file("/run/systemd/system/x", "");
        let enabled = m.apply(Change::Enable, &unit("ssh")).unwrap();
        golden("enable-unit", &enabled.text(Change::Enable));
        golden(
            "enable-unit-json",
            &serde_json::to_string_pretty(&enabled).unwrap(),
        );
        let drop_in = "/etc/systemd/system/ssh.service.d/50-rksm.conf";
        assert!(m.cx.host.read(drop_in).unwrap().contains("MemoryKSM=yes"));
        golden("disable-unit", &m.does(Change::Disable, &unit("ssh")));
        assert!(!m.cx.host.exists(drop_in));
        golden("enable-unit-later", &m.does(Change::Enable, &unit("later")));
        // systemd has no such setting for a slice.
        let slice = m.apply(Change::Enable, &unit("qemu.slice")).unwrap();
        assert_eq!(slice.drop_in, None);
    }

    #[test]
    fn a_stopped_scanner_is_said() {
        let m = Machine::new();
        m.fixture.file("/sys/kernel/mm/ksm/run", "0\n");
        let notes = |change| m.apply(change, &pid(4211)).unwrap().notes;
        assert_eq!(
            notes(Change::Enable),
            ["nothing is merged while /sys/kernel/mm/ksm/run is 0"]
        );
        assert!(notes(Change::Never).is_empty());
    }

    #[test]
    fn interrupts_leave_the_rest() {
        let m = Machine::new();
        m.fake.0.borrow_mut().patience = Some(2);
        let report = m.apply(Change::Disable, &cgroup("/qemu.slice")).unwrap();
        assert_eq!(report.status(), Status::Partial);
        assert_eq!(report.errors, ["process 4212: interrupted"]);
        assert_eq!(report.unmerged_bytes, Some(2048 * PAGE));
    }

    /// What cannot be saved holds all the same, and is said.
    #[test]
    fn not_saved() {
        let m = Machine::new();
        m.fixture.file("/etc/rksm", "no directory");
        let report = m.apply(Change::Enable, &cgroup("/qemu.slice")).unwrap();
        assert_eq!(report.status(), Status::Partial);
        assert!(
            report.errors[0].starts_with("not saved: cannot "),
            "{:?}",
            report.errors
        );
        assert_eq!(m.fake.log(), ["always cgroup /qemu.slice"]);
    }
}
