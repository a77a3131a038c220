// SPDX-License-Identifier: GPL-2.0-only

//! The rules: what holds for which processes, and to how many it has applied.

use super::cgroup_path::CgroupPath;

use kernel::{
    alloc::Flags,
    prelude::*, //
};

/// Most rules.
pub const MAX_RULES: usize = 4096;

/// Bits of a rule's place for its number. Nobody sets as many rules.
const NUMBER_BITS: u32 = 50;

/// More than a path has components, as they have two bytes each. So the places of cgroups are
/// behind the numbers, which are the places of processes.
const DEPTHS: u64 = 2048;

/// What a rule says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Action {
    /// `RKSM_RULE_DEFAULT`: it is as the processes themselves say.
    #[default]
    Default = 0,
    /// `RKSM_RULE_ALWAYS`: all memory is mergeable.
    Always = 1,
    /// `RKSM_RULE_NEVER`: nothing is merged.
    Never = 2,
}

impl Action {
    /// Returns the action of this number in the header.
    ///
    /// # Errors
    ///
    /// `EINVAL` if there is none.
    pub fn from_raw(action: u32) -> Result<Self> {
        Ok(match action {
            0 => Self::Default,
            1 => Self::Always,
            2 => Self::Never,
            _ => return Err(EINVAL),
        })
    }
}

/// A rule for `S`.
#[derive(Debug)]
struct Rule<S> {
    /// Where it is in the order of all. Never changes and is never used again.
    place: u64,
    subject: S,
    action: Action,
    /// Processes to which it applied in the last sweep.
    processes: u32,
    /// The same in the sweep that is going on.
    counted: u32,
}

impl<S> Rule<S> {
    /// Returns what it says to one process more.
    fn apply(&mut self) -> Action {
        self.counted = self.counted.saturating_add(1);
        self.action
    }

    /// Begins to say something else: to no process yet.
    fn replace(&mut self, action: Action) {
        self.action = action;
        (self.processes, self.counted) = (0, 0);
    }
}

/// Rules for subjects of one kind.
///
/// # Invariants
///
/// 1. The places ascend.
/// 2. No two rules have the same subject.
#[derive(Debug)]
struct List<S>(KVVec<Rule<S>>);

impl<S: Eq> List<S> {
    const fn new() -> Self {
        // INVARIANT: There are no rules.
        Self(KVVec::new())
    }

    fn get(&mut self, subject: &S) -> Option<&mut Rule<S>> {
        self.0.iter_mut().find(|rule| rule.subject == *subject)
    }

    /// Adds a rule for a subject that has none.
    fn add(&mut self, rule: Rule<S>, flags: Flags) -> Result {
        self.0.reserve(1, flags)?;
        let at = self.0.partition_point(|other| other.place < rule.place);
        // INVARIANT: 1, it is between lower and higher places; 2, by the caller.
        Ok(self.0.insert_within_capacity(at, rule)?)
    }

    fn remove(&mut self, subject: &S) -> Result {
        let at = self.0.iter().position(|rule| rule.subject == *subject);
        self.0.remove(at.ok_or(ENOENT)?)?;
        Ok(())
    }

    /// The rules at `place` and behind.
    fn from(&self, place: u64) -> &[Rule<S>] {
        let at = self.0.partition_point(|rule| rule.place < place);
        self.0.get(at..).unwrap_or_default()
    }
}

/// Whom a rule is for; a process is `P`.
#[derive(Debug, PartialEq, Eq)]
pub enum Subject<P> {
    /// A process.
    Process(P),
    /// A cgroup and those below.
    Cgroup(CgroupPath),
}

/// A rule as it is listed.
#[derive(Debug)]
pub struct Listed<'a, P> {
    /// The process, of a rule for one.
    pub process: Option<&'a P>,
    /// The cgroup, of a rule for one.
    pub cgroup: Option<&'a CgroupPath>,
    /// What it says.
    pub action: Action,
    /// To how many processes it applied in the last sweep that came to its end, since it says this.
    pub processes: u32,
    /// The cursor behind it.
    pub next: u64,
}

/// All rules. Of those that a process falls under the innermost holds: its own, or else that of the
/// deepest cgroup that it is in.
///
/// # Listing
///
/// Rules are listed as they are asked: those for processes by age, then those for cgroups, the
/// deepest first, by age where they are equally deep. A cursor is 0, for all rules, or
/// [`Listed::next`]. A rule that is there all the time while a list is made is listed once,
/// whatever is added, replaced and removed meanwhile; one that comes or goes may be listed or not.
#[derive(Debug)]
pub struct Rules<P> {
    processes: List<P>,
    cgroups: List<CgroupPath>,
    /// How many rules have ever been added.
    added: u64,
    revision: u64,
}

impl<P: Eq> Rules<P> {
    /// Begins without rules.
    pub const fn new() -> Self {
        Self {
            processes: List::new(),
            cgroups: List::new(),
            added: 0,
            revision: 0,
        }
    }

    /// Returns whether there are no rules.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the number of rules.
    pub fn len(&self) -> usize {
        self.processes.0.len() + self.cgroups.0.len()
    }

    /// Returns a number that changes with each [`Self::set`] and [`Self::remove`] that changes
    /// something, so that the next sweep may be due at once. As long as it stays, so do the indices
    /// of the cgroups.
    pub const fn revision(&self) -> u64 {
        self.revision
    }

    /// Sets what holds for a process or cgroup, in place of what held before.
    ///
    /// # Errors
    ///
    /// `ENOSPC` if there are [`MAX_RULES`] already, `ENOMEM` if there is no memory. Nothing has
    /// changed then.
    pub fn set(&mut self, subject: Subject<P>, action: Action, flags: Flags) -> Result {
        let full = self.len() >= MAX_RULES;
        let number = self.added + 1;
        let changed = match subject {
            Subject::Process(process) => {
                Self::set_in(&mut self.processes, process, number, action, full, flags)?
            }
            Subject::Cgroup(path) => {
                let depth = u64::try_from(path.depth())?;
                let above = DEPTHS.saturating_sub(depth) << NUMBER_BITS;
                let place = above | number;
                Self::set_in(&mut self.cgroups, path, place, action, full, flags)?
            }
        };
        if changed {
            self.added = number;
            self.revision += 1;
        }
        Ok(())
    }

    /// Returns whether anything has changed.
    fn set_in<S: Eq>(
        list: &mut List<S>,
        subject: S,
        place: u64,
        action: Action,
        full: bool,
        flags: Flags,
    ) -> Result<bool> {
        match list.get(&subject) {
            Some(rule) if rule.action == action => return Ok(false),
            Some(rule) => rule.replace(action),
            None if full => return Err(ENOSPC),
            None => {
                let rule = Rule {
                    place,
                    subject,
                    action,
                    processes: 0,
                    counted: 0,
                };
                list.add(rule, flags)?;
            }
        }
        Ok(true)
    }

    /// Removes the rule for a process or cgroup.
    ///
    /// # Errors
    ///
    /// `ENOENT` if there is none.
    pub fn remove(&mut self, subject: &Subject<P>) -> Result {
        match subject {
            Subject::Process(process) => self.processes.remove(process)?,
            Subject::Cgroup(path) => self.cgroups.remove(path)?,
        }
        self.revision += 1;
        Ok(())
    }

    /// Removes the rules for processes of which `alive` does not hold. The revision stays: nothing
    /// falls under such a rule any more.
    pub fn retain_processes(&mut self, alive: impl Fn(&P) -> bool) {
        self.processes.0.retain(|rule| alive(&rule.subject));
    }

    /// Returns the cgroups that have rules, in the order of their indices.
    pub fn cgroups(&self) -> impl ExactSizeIterator<Item = &CgroupPath> {
        self.cgroups.0.iter().map(|rule| &rule.subject)
    }

    /// Lists the rules at a cursor and behind.
    pub fn list(&self, cursor: u64) -> impl Iterator<Item = Listed<'_, P>> {
        let processes = self.processes.from(cursor).iter().map(|rule| Listed {
            process: Some(&rule.subject),
            cgroup: None,
            action: rule.action,
            processes: rule.processes,
            next: rule.place + 1,
        });
        let cgroups = self.cgroups.from(cursor).iter().map(|rule| Listed {
            process: None,
            cgroup: Some(&rule.subject),
            action: rule.action,
            processes: rule.processes,
            next: rule.place + 1,
        });
        // The prelude has another `chain`.
        Iterator::chain(processes, cgroups)
    }

    /// Begins a sweep over all processes. One that was not ended is forgotten.
    pub fn begin_sweep(&mut self) {
        self.each_count(|_, counted| *counted = 0);
    }

    /// Decides about a process, and counts it for the rule that holds. `process` says whether it is
    /// that process, `inside` whether it is in the cgroup of that index or below.
    pub fn decide(
        &mut self,
        mut process: impl FnMut(&P) -> bool,
        mut inside: impl FnMut(usize) -> bool,
    ) -> Action {
        for rule in &mut self.processes.0 {
            if process(&rule.subject) {
                return rule.apply();
            }
        }
        for (index, rule) in self.cgroups.0.iter_mut().enumerate() {
            if inside(index) {
                return rule.apply();
            }
        }
        Action::Default
    }

    /// Ends a sweep: what it has counted is listed from now on.
    pub fn end_sweep(&mut self) {
        self.each_count(|processes, counted| *processes = *counted);
    }

    fn each_count(&mut self, mut f: impl FnMut(&mut u32, &mut u32)) {
        for rule in &mut self.processes.0 {
            f(&mut rule.processes, &mut rule.counted);
        }
        for rule in &mut self.cgroups.0 {
            f(&mut rule.processes, &mut rule.counted);
        }
    }
}

impl<P: Eq> Default for Rules<P> {
    fn default() -> Self {
        Self::new()
    }
}
