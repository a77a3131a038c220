// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl rules`: the rules that enable and never have made.

use crate::cli::Target;
use crate::control::Aim;
use crate::device::{Action, Device, Rule, Subject};
use crate::exit::{Failure, Status};
use crate::host::Context;
use crate::process;
use crate::rule_files::{self, Saved, DIR, OWN};
use crate::units::{count, counted};
use clap::Subcommand;
use serde::Serialize;

const FORMAT: &str = "\
Rules of cgroups are kept for the next boot in /etc/rksm/rules.d/*.rules, a line for each:
an action, which is always, never or default (as the processes themselves say), and the path
of the cgroup below the mount of cgroup v2. What is further in goes before what is further
out; of several lines for one path the last holds, in files by name.

  # Guests are merged, but for this one.
  always /machine.slice
  never  /machine.slice/machine-db.scope

enable, disable, never and rules change 90-rksmctl.rules only.";

#[derive(Clone, Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, after_long_help = FORMAT)]
pub struct Args {
    #[command(subcommand)]
    pub what: Option<What>,
}

#[derive(Clone, Debug, Subcommand)]
pub enum What {
    /// Show the rules that hold, and those in /etc/rksm/rules.d
    List,
    /// Save the rules of cgroups that hold now for the next boot
    Save,
    /// Have the rules in /etc/rksm/rules.d hold; others stay
    Apply,
    /// Remove a rule, and leave what is merged so
    Remove(Remove),
}

#[derive(Clone, Debug, clap::Args)]
pub struct Remove {
    #[command(flatten)]
    pub target: Target,
    /// Leave the rule in the files, for the next boot
    #[arg(long)]
    pub no_save: bool,
}

/// One rule, that holds or is saved.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
struct Row {
    action: Action,
    pid: Option<i32>,
    title: Option<String>,
    cgroup: Option<String>,
    /// Whether it holds now.
    in_force: bool,
    /// To which it applied when rules were last applied.
    processes: u32,
    /// Its file, if it is for the next boot, too.
    saved: Option<String>,
}

/// What saving, applying or removing has done.
#[derive(Clone, Debug, Default, Serialize, PartialEq, Eq)]
struct Done {
    /// Rules that were saved, set or removed.
    changed: u64,
    /// Those that were so already.
    unchanged: u64,
    notes: Vec<String>,
    errors: Vec<String>,
}

pub fn run(args: &Args, cx: &Context) -> Result<Status, Failure> {
    let open = |what: &str| Device::open_for(&cx.host, what);
    match &args.what {
        None | Some(What::List) => list(&open("showing rules")?, cx),
        Some(What::Save) => {
            let done = save(&open("saving the rules that hold")?, cx)?;
            let text = format!("{} saved in {OWN}", counted(done.changed, "rule", "rules"));
            print(&done, &text, cx)
        }
        Some(What::Apply) => {
            let saved = Saved::read(&cx.host)?;
            let n = counted(saved.effective().len() as u64, "rule", "rules");
            let done = apply(&saved, &open(&format!("applying {n} of {DIR}"))?)?;
            let text = format!(
                "{} set, {} as before",
                counted(done.changed, "rule", "rules"),
                count(done.unchanged)
            );
            print(&done, &text, cx)
        }
        Some(What::Remove(remove)) => {
            let aim = Aim::find(&remove.target, cx, true)?;
            let done = remove_rules(&aim, !remove.no_save, &open("removing rules")?, cx)?;
            let text = match done.changed {
                0 => "there was no rule".into(),
                n => format!("{} removed", counted(n, "rule", "rules")),
            };
            print(&done, &text, cx)
        }
    }
}

fn print(done: &Done, text: &str, cx: &Context) -> Result<Status, Failure> {
    cx.print(done, || {
        let notes = done.notes.iter().map(|note| format!("\n{note}"));
        text.to_string() + &notes.collect::<String>()
    })?;
    for error in &done.errors {
        eprintln!("rksmctl: {error}");
    }
    Ok(if done.errors.is_empty() {
        Status::Ok
    } else {
        Status::Partial
    })
}

fn list(device: &Device, cx: &Context) -> Result<Status, Failure> {
    let saved = Saved::read(&cx.host)?;
    let rows = rows(&device.rules()?, &saved, cx)?;
    cx.print(&rows, || table(&rows))?;
    for error in &saved.errors {
        eprintln!("rksmctl: {error}");
    }
    Ok(if saved.errors.is_empty() {
        Status::Ok
    } else {
        Status::Partial
    })
}

/// Those of cgroups by path, then those of processes.
fn rows(rules: &[Rule], saved: &Saved, cx: &Context) -> Result<Vec<Row>, Failure> {
    let mut rows = Vec::new();
    for rule in rules {
        rows.push(match &rule.subject {
            Subject::Process(pid) => Row {
                action: rule.action,
                pid: Some(*pid),
                title: process::read(&cx.host, *pid)?.map(|p| p.title().to_string()),
                cgroup: None,
                in_force: true,
                processes: rule.processes,
                saved: None,
            },
            Subject::Cgroup(path) => Row {
                action: rule.action,
                pid: None,
                title: None,
                cgroup: Some(path.clone()),
                in_force: true,
                processes: rule.processes,
                saved: saved
                    .of(path)
                    .filter(|l| l.action == rule.action)
                    .map(|l| l.file.clone()),
            },
        });
    }
    for line in saved.effective() {
        let holds = |row: &Row| row.cgroup.as_ref() == Some(&line.path) && row.saved.is_some();
        if !rows.iter().any(holds) {
            rows.push(Row {
                action: line.action,
                pid: None,
                title: None,
                cgroup: Some(line.path.clone()),
                in_force: false,
                processes: 0,
                saved: Some(line.file.clone()),
            });
        }
    }
    rows.sort_by(|a, b| {
        let key = |r: &Row| (r.cgroup.is_none(), r.cgroup.clone(), r.pid, !r.in_force);
        key(a).cmp(&key(b))
    });
    Ok(rows)
}

/// The longest column is the last: nothing is out of line where a terminal breaks it.
fn table(rows: &[Row]) -> String {
    if rows.is_empty() {
        return "no rules".into();
    }
    let mut lines = vec!["RULE      NOW  SAVED  FOR".to_string()];
    for row in rows {
        let now = if row.in_force {
            count(row.processes.into())
        } else {
            "-".into()
        };
        let saved = if row.saved.is_some() { "yes" } else { "-" };
        let subject = match (&row.cgroup, row.pid, &row.title) {
            (Some(path), _, _) => path.clone(),
            (None, Some(pid), Some(title)) => format!("process {pid} ({title})"),
            (None, pid, _) => format!("process {}", pid.unwrap_or(0)),
        };
        lines.push(format!(
            "{:7} {now:>5}  {saved:5}  {subject}",
            row.action.name()
        ));
    }
    lines.join("\n")
}

/// Has our own file say what holds, but for what other files say already.
fn save(device: &Device, cx: &Context) -> Result<Done, Failure> {
    let rules = device.rules()?;
    let before = Saved::read(&cx.host)?;
    before.check_own()?;
    let mut done = Done::default();
    let mut own = Vec::new();
    let mut processes = 0;
    for rule in &rules {
        let Subject::Cgroup(path) = &rule.subject else {
            processes += 1;
            continue;
        };
        match before.of_others(path).filter(|l| l.action == rule.action) {
            Some(_) => done.unchanged += 1,
            None => own.push((rule.action, path.clone())),
        }
    }
    own.sort_by(|a, b| a.1.cmp(&b.1));
    rule_files::write(&cx.host, &own)?;
    done.changed = own.len() as u64;
    if processes > 0 {
        let n = counted(processes, "rule of a process", "rules of processes");
        done.notes.push(format!("{n} cannot be saved"));
    }
    let after = Saved::read(&cx.host)?;
    for (action, path) in &own {
        if let Some(line) = after.of(path).filter(|l| l.action != *action) {
            done.notes.push(format!(
                "{}:{} still says '{}' for the next boot",
                line.file, line.number, line.action
            ));
        }
    }
    Ok(done)
}

/// Sets each rule that does not hold. One that is wrong does not keep the others from it.
fn apply(saved: &Saved, device: &Device) -> Result<Done, Failure> {
    let mut done = Done {
        errors: saved.errors.clone(),
        ..Done::default()
    };
    let rules = device.rules()?;
    for line in saved.effective() {
        let subject = Subject::Cgroup(line.path.clone());
        if rules
            .iter()
            .any(|r| r.subject == subject && r.action == line.action)
        {
            done.unchanged += 1;
            continue;
        }
        match device.rule(&subject, line.action) {
            Ok(()) => done.changed += 1,
            Err(e) => done
                .errors
                .push(format!("{}:{}: {e}", line.file, line.number)),
        }
    }
    Ok(done)
}

fn remove_rules(aim: &Aim, save: bool, device: &Device, cx: &Context) -> Result<Done, Failure> {
    let mut done = Done::default();
    match aim {
        Aim::Processes(all) => {
            for process in all {
                let removed = device.remove(&Subject::Process(process.pid))?;
                done.changed += u64::from(removed);
            }
        }
        Aim::Cgroup { path, .. } => {
            let mut removed = device.remove(&Subject::Cgroup(path.clone()))?;
            if save {
                removed |= rule_files::save(&cx.host, path, None)?;
                if let Some(line) = Saved::read(&cx.host)?.of(path) {
                    done.notes.push(format!(
                        "{}:{} still says '{}' for the next boot",
                        line.file, line.number, line.action
                    ));
                }
            }
            done.changed += u64::from(removed);
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
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
            let fake = Fake::new(&[4211, 4212]);
            Self { fixture, fake, cx }
        }

        fn device(&self) -> Device {
            self.fake.device(&self.cx.host)
        }

        fn rule(&self, path: &str, action: Action) {
            let subject = Subject::Cgroup(path.into());
            self.device().rule(&subject, action).unwrap();
        }

        fn saved(&self) -> Saved {
            Saved::read(&self.cx.host).unwrap()
        }
    }

    #[test]
    fn lists() {
        let m = Machine::new();
        let rows_now = || rows(&m.device().rules().unwrap(), &m.saved(), &m.cx).unwrap();
        assert_eq!(table(&rows_now()), "no rules");
        let process = Subject::Process(4212);
        m.device().rule(&process, Action::Always).unwrap();
        m.rule("/qemu.slice", Action::Always);
        m.rule("/system.slice", Action::Never);
        m.rule("/a.slice", Action::Default);
        m.fixture.file(
            "/etc/rksm/rules.d/10-x.rules",
            "always /qemu.slice\nalways /system.slice\nnever /later.slice\n",
        );
        let rows = rows_now();
        golden("rules", &table(&rows));
        golden("rules-json", &serde_json::to_string_pretty(&rows).unwrap());
    }

    #[test]
    fn applies_what_does_not_hold() {
        let m = Machine::new();
        m.rule("/other", Action::Never);
        m.rule("/a", Action::Never);
        m.fixture.file(
            "/etc/rksm/rules.d/10-x.rules",
            "never /a\nalways /b\nsometimes /c\n",
        );
        m.fake.log();
        let done = apply(&m.saved(), &m.device()).unwrap();
        assert_eq!((done.changed, done.unchanged), (1, 1));
        assert_eq!(
            done.errors,
            ["/etc/rksm/rules.d/10-x.rules:3: 'sometimes' is none of always, never, default"]
        );
        assert_eq!(m.fake.log(), ["always cgroup /b"]);
        // Again nothing is left to do, and the rule of others is still there.
        let done = apply(&m.saved(), &m.device()).unwrap();
        assert_eq!((done.changed, done.unchanged), (0, 2));
        assert_eq!(m.device().rules().unwrap().len(), 3);
        // One that holds otherwise is set.
        m.rule("/a", Action::Always);
        assert_eq!(apply(&m.saved(), &m.device()).unwrap().changed, 1);

        m.fixture
            .file("/etc/rksm/rules.d/20-y.rules", "never /d\nnever /e\n");
        m.fake.0.borrow_mut().rule_error = Some(Errno::ENOSPC);
        let done = apply(&m.saved(), &m.device()).unwrap();
        assert_eq!(
            done.errors[1..],
            [
                "/etc/rksm/rules.d/20-y.rules:1: rksm has as many rules as it can hold",
                "/etc/rksm/rules.d/20-y.rules:2: rksm has as many rules as it can hold"
            ]
        );
    }

    #[test]
    fn saves_what_holds() {
        let m = Machine::new();
        let process = Subject::Process(4212);
        m.device().rule(&process, Action::Always).unwrap();
        m.rule("/b", Action::Always);
        m.rule("/a", Action::Never);
        m.rule("/c", Action::Never);
        rule_files::save(&m.cx.host, "/gone", Some(Action::Always)).unwrap();
        // Ours is in the way of what another file says rightly.
        rule_files::save(&m.cx.host, "/a", Some(Action::Always)).unwrap();
        m.fixture.file("/etc/rksm/rules.d/10-y.rules", "never /a\n");
        m.fixture
            .file("/etc/rksm/rules.d/95-x.rules", "always /c\n");
        let done = save(&m.device(), &m.cx).unwrap();
        assert_eq!((done.changed, done.unchanged), (2, 1));
        assert_eq!(
            done.notes,
            [
                "1 rule of a process cannot be saved",
                "/etc/rksm/rules.d/95-x.rules:1 still says 'always' for the next boot"
            ]
        );
        assert_eq!(
            m.saved().own(),
            [
                (Action::Always, "/b".to_string()),
                (Action::Never, "/c".to_string())
            ]
        );
    }

    #[test]
    fn removes() {
        let m = Machine::new();
        m.rule("/b", Action::Always);
        rule_files::save(&m.cx.host, "/b", Some(Action::Always)).unwrap();
        let aim = Aim::Cgroup {
            path: "/b".into(),
            unit: None,
            exists: false,
        };
        let remove = |save| remove_rules(&aim, save, &m.device(), &m.cx).unwrap();
        assert_eq!(remove(false).changed, 1);
        assert!(m.saved().of("/b").is_some());
        assert_eq!(remove(true).changed, 1);
        assert!(m.saved().of("/b").is_none());
        assert_eq!(remove(true), Done::default());
    }
}
