// SPDX-License-Identifier: GPL-2.0-only

//! Every race is found where its fix is taken out, and none where it is in.

use models::fixed;

use std::{
    panic,
    path::Path,
    process::Command,
    sync::{
        atomic::{
            AtomicUsize,
            Ordering::Relaxed, //
        },
        Arc, //
    },
};

/// Runs a scenario through its interleavings: all, or those in which threads are preempted so often
/// at most. Returns the number of them, or what one of them ended with.
fn explore(scenario: fn(), preemptions: Option<usize>) -> Result<usize, String> {
    let runs = Arc::new(AtomicUsize::new(0));
    let counter = runs.clone();
    panic::catch_unwind(move || {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = preemptions;
        model.check(move || {
            counter.fetch_add(1, Relaxed);
            scenario();
        });
    })
    .map(|()| runs.load(Relaxed))
    .map_err(|payload| match payload.downcast::<String>() {
        Ok(text) => *text,
        Err(payload) => payload.downcast::<&str>().map_or_else(
            |_| "a panic without a message".to_string(),
            |text| (*text).to_string(),
        ),
    })
}

fn holds(name: &str, scenario: fn(), preemptions: Option<usize>) {
    match explore(scenario, preemptions) {
        Ok(runs) => println!("{name}: {runs} interleavings, all good"),
        Err(err) => panic!("{name}: {err}"),
    }
}

fn fails(name: &str, scenario: fn(), expected: &str) {
    match explore(scenario, None) {
        Ok(runs) => panic!("{name}: nothing found in {runs} interleavings"),
        Err(err) => {
            assert!(
                err.contains(expected),
                "{name}: found another failure: {err}"
            );
            println!("{name}: found: {expected}");
        }
    }
}

/// For each scenario, a test of the engine as it is.
macro_rules! holds {
    ($($scenario:ident $(within $preemptions:literal preemptions)?,)*) => {
        mod holds {$(
            #[test]
            fn $scenario() {
                let bound = None::<usize>$(.or(Some($preemptions)))?;
                super::holds(stringify!($scenario), super::fixed::threads::$scenario, bound);
            }
        )*}
    };
}

holds! {
    scan_against_exit,
    scan_against_exit_of_empty,
    scan_against_reuse,
    scan_against_exit_and_reaper,
    two_scanners_against_exit within 3 preemptions,
    everything_at_once within 2 preemptions,
    merge_now_against_scan_and_exit within 3 preemptions,
    unload_against_exit,
    unmerge_against_oom_kill,
    unmerge_against_fork,
    late_enter_against_exit,
    enter_against_refill,
    merge_against_unmap_and_rmap_walk,
    newcomer_against_sleep within 3 preemptions,
    newcomers_against_sleep within 2 preemptions,
}

// One for each line "model: SCENARIO: TEXT" in the patches.
include!(concat!(env!("OUT_DIR"), "/without_fix.rs"));

/// The guest stages need all of a patch, and the models a part.
#[test]
fn every_patch_applies_to_the_tree() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../..");
    let mut found = 0;
    for entry in top.join("tools/testing/races").read_dir().unwrap() {
        let path = entry.unwrap().path();
        let result = Command::new("patch")
            .args(["-p1", "--batch", "--forward", "--dry-run", "-d"])
            .args([&top, Path::new("-i"), &path])
            .output()
            .unwrap();
        assert!(
            result.status.success(),
            "{}:\n{}",
            path.display(),
            String::from_utf8_lossy(&result.stdout)
        );
        found += 1;
    }
    assert!(found >= 10);
}
