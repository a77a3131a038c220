// SPDX-License-Identifier: GPL-2.0-only

//! Which rule holds for a process, and how the rules are listed while they change.

mod common;

use engine_tests::engine::control::{
    cgroup_path::CgroupPath,
    rules::{
        Action,
        Rules,
        Subject,
        MAX_RULES, //
    }, //
};
use std::collections::BTreeMap;

use kernel::{
    alloc::{
        flags::GFP_KERNEL,
        KVec, //
    },
    error::code::{
        ENOENT,
        ENOMEM,
        ENOSPC, //
    },
    testing::{
        self,
        Fail, //
    }, //
};

use proptest::prelude::*;

fn path(text: &str) -> CgroupPath {
    let mut path = KVec::with_capacity(text.len() + 1, GFP_KERNEL).unwrap();
    path.extend_from_slice(text.as_bytes(), GFP_KERNEL).unwrap();
    CgroupPath::new(path, GFP_KERNEL).unwrap()
}

fn cgroup(text: &str) -> Subject<u32> {
    Subject::Cgroup(path(text))
}

/// A subject as the tests name it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Name {
    Process(u32),
    Cgroup(String),
}

impl Name {
    fn subject(&self) -> Subject<u32> {
        match self {
            Self::Process(pid) => Subject::Process(*pid),
            Self::Cgroup(path) => cgroup(path),
        }
    }
}

fn set(rules: &mut Rules<u32>, subject: Subject<u32>, action: Action) {
    rules.set(subject, action, GFP_KERNEL).unwrap();
}

/// Whether a cgroup is another one or below.
fn is_inside(path: &str, above: &str) -> bool {
    let rest = path.strip_prefix(above.trim_end_matches('/'));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// What holds for a process in a cgroup.
fn decide(rules: &mut Rules<u32>, pid: u32, path: &str) -> Action {
    let cgroups: Vec<_> = rules
        .cgroups()
        .map(|rule| is_inside(path, std::str::from_utf8(rule.as_bytes()).unwrap()))
        .collect();
    rules.decide(|&process| process == pid, |index| cgroups[index])
}

/// A record of a list, and the cursor behind it.
fn next(rules: &Rules<u32>, cursor: u64) -> Option<(Name, Action, u32, u64)> {
    let listed = rules.list(cursor).next()?;
    let name = match (listed.process, listed.cgroup) {
        (Some(&pid), None) => Name::Process(pid),
        (None, Some(path)) => Name::Cgroup(String::from_utf8(path.as_bytes().to_vec()).unwrap()),
        _ => panic!("both or neither"),
    };
    Some((name, listed.action, listed.processes, listed.next))
}

/// The whole list, one record at a time.
fn list(rules: &Rules<u32>) -> Vec<(Name, Action, u32)> {
    let (mut all, mut cursor) = (Vec::new(), 0);
    while let Some((name, action, processes, behind)) = next(rules, cursor) {
        assert!(behind > cursor);
        cursor = behind;
        all.push((name, action, processes));
    }
    assert_eq!(rules.list(0).count(), all.len());
    assert_eq!(rules.len(), all.len());
    assert_eq!(rules.is_empty(), all.is_empty());
    all
}

fn names(rules: &Rules<u32>) -> Vec<Name> {
    list(rules).into_iter().map(|(name, ..)| name).collect()
}

#[test]
fn the_innermost_rule_holds() {
    let mut rules = Rules::new();
    assert_eq!(decide(&mut rules, 1, "/a/b/c"), Action::Default);
    set(&mut rules, cgroup("/"), Action::Always);
    set(&mut rules, cgroup("/a/b"), Action::Default);
    set(&mut rules, cgroup("/a"), Action::Never);
    for (path, action) in [
        ("/", Action::Always),
        ("/b", Action::Always),
        ("/a", Action::Never),
        ("/a/c/b", Action::Never),
        ("/ab", Action::Always),
        // A rule that leaves it to the process hides those above.
        ("/a/b", Action::Default),
        ("/a/b/c", Action::Default),
    ] {
        assert_eq!(decide(&mut rules, 1, path), action, "{path}");
        // The process's own goes before all.
        set(&mut rules, Subject::Process(2), Action::Never);
        assert_eq!(decide(&mut rules, 1, path), action, "{path}");
        assert_eq!(decide(&mut rules, 2, path), Action::Never);
        set(&mut rules, Subject::Process(2), Action::Always);
        assert_eq!(decide(&mut rules, 2, path), Action::Always);
        assert_eq!(rules.remove(&Subject::Process(2)), Ok(()));
    }
    assert_eq!(rules.remove(&cgroup("/a/b")), Ok(()));
    assert_eq!(decide(&mut rules, 1, "/a/b"), Action::Never);
}

#[test]
fn rules_are_replaced_and_removed() {
    let mut rules = Rules::default();
    assert!(rules.is_empty());
    for subject in [|| Subject::Process(7), || cgroup("/x")] {
        assert_eq!(rules.remove(&subject()), Err(ENOENT));
        let before = rules.revision();
        set(&mut rules, subject(), Action::Never);
        assert_eq!((rules.len(), rules.revision()), (1, before + 1));
        // The same again is no change.
        set(&mut rules, subject(), Action::Never);
        assert_eq!((rules.len(), rules.revision()), (1, before + 1));
        set(&mut rules, subject(), Action::Always);
        assert_eq!((rules.len(), rules.revision()), (1, before + 2));
        assert_eq!(rules.list(0).next().unwrap().action, Action::Always);
        assert_eq!(rules.remove(&cgroup("/x/y")), Err(ENOENT));
        assert_eq!(rules.remove(&Subject::Process(8)), Err(ENOENT));
        assert_eq!((rules.len(), rules.revision()), (1, before + 2));
        assert_eq!(rules.remove(&subject()), Ok(()));
        assert_eq!(rules.revision(), before + 3);
        assert!(rules.is_empty());
    }
}

#[test]
fn a_sweep_counts_what_it_decides() {
    let mut rules = Rules::new();
    set(&mut rules, cgroup("/"), Action::Always);
    set(&mut rules, cgroup("/a"), Action::Never);
    set(&mut rules, Subject::Process(1), Action::Default);
    let counts = |rules: &Rules<u32>| -> Vec<_> {
        let list = list(rules).into_iter();
        list.map(|(.., processes)| processes).collect()
    };
    rules.begin_sweep();
    for (pid, path) in [(1, "/a"), (2, "/a"), (3, "/a/b"), (4, "/b")] {
        decide(&mut rules, pid, path);
    }
    assert_eq!(counts(&rules), [0, 0, 0], "the sweep goes on");
    rules.end_sweep();
    assert_eq!(counts(&rules), [1, 2, 1], "one for each process");

    // One that is not ended does not count, nor goes into the next.
    rules.begin_sweep();
    decide(&mut rules, 1, "/a");
    assert_eq!(counts(&rules), [1, 2, 1]);
    rules.begin_sweep();
    decide(&mut rules, 4, "/b");
    rules.end_sweep();
    assert_eq!(counts(&rules), [0, 0, 1]);

    // What a rule says now, it has said to nobody yet.
    set(&mut rules, cgroup("/"), Action::Always);
    assert_eq!(counts(&rules), [0, 0, 1]);
    set(&mut rules, cgroup("/"), Action::Never);
    assert_eq!(counts(&rules), [0, 0, 0]);
}

#[test]
fn processes_end() {
    let mut rules = Rules::new();
    for pid in 0..6 {
        set(&mut rules, Subject::Process(pid), Action::Never);
    }
    set(&mut rules, cgroup("/a"), Action::Never);
    let revision = rules.revision();
    rules.retain_processes(|pid| pid % 2 == 1);
    let left = [1, 3, 5].map(Name::Process);
    assert_eq!(names(&rules)[..3], left);
    assert_eq!((rules.len(), rules.revision()), (4, revision));
}

#[test]
fn there_are_not_too_many() {
    let mut rules = Rules::new();
    for i in 0..MAX_RULES as u32 {
        let subject = match i % 2 {
            0 => Subject::Process(i),
            _ => cgroup(&format!("/{i}")),
        };
        set(&mut rules, subject, Action::Never);
    }
    let before = (list(&rules), rules.revision());
    for subject in [Subject::Process(1), cgroup("/0")] {
        let more = rules.set(subject, Action::Never, GFP_KERNEL);
        assert_eq!(more, Err(ENOSPC));
    }
    assert_eq!((list(&rules), rules.revision()), before);
    // Others can still be replaced.
    set(&mut rules, Subject::Process(0), Action::Always);
    set(&mut rules, cgroup("/1"), Action::Always);
    assert_eq!(rules.remove(&Subject::Process(0)), Ok(()));
    set(&mut rules, cgroup("/0"), Action::Never);
    assert_eq!(rules.len(), MAX_RULES);
}

#[test]
fn the_deepest_path_has_its_place() {
    let mut rules = Rules::new();
    let deepest = "/x".repeat(2047);
    for path in ["/", "/a", &deepest, "/x/x"] {
        set(&mut rules, cgroup(path), Action::Never);
    }
    set(&mut rules, Subject::Process(1), Action::Never);
    let expected = [&deepest, "/x/x", "/a", "/"].map(|path| Name::Cgroup(path.to_owned()));
    assert_eq!(names(&rules)[0], Name::Process(1));
    assert_eq!(names(&rules)[1..], expected);
    assert!(rules.list(u64::MAX).next().is_none());
}

#[derive(Clone, Debug)]
enum Op {
    Set(Name, Action),
    Remove(Name),
    /// Processes from this one on end.
    End(u32),
    /// A sweep over all processes.
    Sweep,
    /// The list goes on by a record.
    List,
}

fn name() -> impl Strategy<Value = Name> {
    let path = prop::collection::vec(prop::sample::select(vec!["/a", "/b"]), 0..4);
    prop_oneof![
        (0..5u32).prop_map(Name::Process),
        path.prop_map(|parts| match parts.is_empty() {
            true => Name::Cgroup("/".to_owned()),
            false => Name::Cgroup(parts.concat()),
        }),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let action = prop::sample::select(vec![Action::Default, Action::Always, Action::Never]);
    prop_oneof![
        6 => (name(), action).prop_map(|(name, action)| Op::Set(name, action)),
        3 => name().prop_map(Op::Remove),
        1 => (2..5u32).prop_map(Op::End),
        1 => Just(Op::Sweep),
        4 => Just(Op::List),
    ]
}

/// Where processes are that a sweep finds.
const MACHINE: [(u32, &str); 6] = [
    (0, "/"),
    (1, "/a"),
    (2, "/a/b"),
    (3, "/a/b/a/b"),
    (4, "/b/b/b"),
    (9, "/c"),
];

/// The rules in plain words, and when each has come.
#[derive(Default)]
struct Model(BTreeMap<Name, (Action, u32)>);

impl Model {
    fn holds(&self, pid: u32, path: &str) -> Option<&Name> {
        let own = self.0.get_key_value(&Name::Process(pid));
        let own = own.map(|(name, _)| name);
        own.or_else(|| {
            let outer = |name: &&Name| matches!(name, Name::Cgroup(rule) if is_inside(path, rule));
            // Of the cgroups that a process is in, the longest path is the innermost.
            let outer = self.0.keys().filter(outer);
            outer.max_by_key(|name| match name {
                Name::Cgroup(rule) => rule.len(),
                Name::Process(_) => 0,
            })
        })
    }
}

#[test]
fn histories_of_rules() {
    let mut runner = common::runner(3000);
    let failures = testing::failures();
    let histories = (prop::collection::vec(op(), 1..60), any::<u64>(), 0..6u64);
    let result = runner.run(&histories, |(history, seed, one_in)| {
        let bytes = testing::live_bytes();
        let (mut rules, mut model) = (Rules::new(), Model::default());
        // Of the list that is being made: the cursor, what it has, and what must be in it.
        let (mut cursor, mut listed, mut steady) = (0, Vec::new(), Vec::<Name>::new());
        for op in history {
            let before = (list(&rules), rules.revision());
            match op {
                Op::Set(name, action) => {
                    let subject = name.subject();
                    testing::fail(Fail::Random { seed, one_in });
                    let result = rules.set(subject, action, GFP_KERNEL);
                    testing::fail(Fail::Never);
                    if result.is_err() {
                        prop_assert_eq!(result, Err(ENOMEM));
                        prop_assert_eq!((list(&rules), rules.revision()), before);
                        continue;
                    }
                    let old = model.0.get(&name).copied();
                    let changes = old.is_none_or(|(said, _)| said != action);
                    prop_assert_eq!(rules.revision(), before.1 + u64::from(changes));
                    if changes {
                        model.0.insert(name, (action, 0));
                    }
                }
                Op::Remove(name) => {
                    let result = rules.remove(&name.subject());
                    let there = model.0.remove(&name).is_some();
                    prop_assert_eq!(result, if there { Ok(()) } else { Err(ENOENT) });
                    steady.retain(|steady| *steady != name);
                }
                Op::End(from) => {
                    rules.retain_processes(|&pid| pid < from);
                    let ended = |name: &Name| matches!(name, Name::Process(pid) if *pid >= from);
                    model.0.retain(|name, _| !ended(name));
                    steady.retain(|name| !ended(name));
                }
                Op::Sweep => {
                    let mut counts = BTreeMap::<Name, u32>::new();
                    rules.begin_sweep();
                    for (pid, path) in MACHINE {
                        let holds = model.holds(pid, path);
                        let action = holds.map_or(Action::Default, |name| model.0[name].0);
                        prop_assert_eq!(decide(&mut rules, pid, path), action);
                        if let Some(name) = holds {
                            *counts.entry(name.clone()).or_default() += 1;
                        }
                    }
                    rules.end_sweep();
                    for (name, (_, count)) in &mut model.0 {
                        *count = counts.get(name).copied().unwrap_or(0);
                    }
                }
                Op::List => match next(&rules, cursor) {
                    Some((name, _, _, behind)) => {
                        if cursor == 0 {
                            steady = model.0.keys().cloned().collect();
                        }
                        prop_assert!(behind > cursor);
                        listed.push(name);
                        cursor = behind;
                    }
                    None => {
                        for name in steady.drain(..) {
                            let times = listed.iter().filter(|&listed| *listed == name);
                            prop_assert_eq!(times.count(), 1, "{:?}", name);
                        }
                        listed.clear();
                        cursor = 0;
                    }
                },
            }
            let mut all = list(&rules);
            all.sort_by(|(a, ..), (b, ..)| a.cmp(b));
            let expected = model.0.iter();
            let expected = expected.map(|(name, (action, count))| (name.clone(), *action, *count));
            prop_assert_eq!(all, expected.collect::<Vec<_>>());
        }
        drop(rules);
        prop_assert_eq!(testing::live_bytes(), bytes, "memory is lost");
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
    assert_ne!(testing::failures(), failures, "nothing was made to fail");
}
