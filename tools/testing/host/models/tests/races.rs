// SPDX-License-Identifier: GPL-2.0-only

//! Every race is found where its fix is taken out, and none where it is in.

use models::{
    drop_under_lock,
    enter_behind_unmerge,
    exit_check,
    exit_waits,
    fixed,
    forgotten_mm,
    late_enter,
    late_reference,
    two_deletions,
    uncounted_claim,
    unlock_order, //
};

use std::{
    panic,
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

/// For each scenario, a test of the engine as it is and one for each fix that is taken out.
macro_rules! races {
    ($($scenario:ident $(within $preemptions:literal preemptions)? { $($broken:ident: $expected:literal,)* })*) => {$(
        mod $scenario {
            use super::*;

            #[test]
            fn holds() {
                let bound = None::<usize>$(.or(Some($preemptions)))?;
                super::holds(stringify!($scenario), fixed::threads::$scenario, bound);
            }

            $(
                #[test]
                fn $broken() {
                    let name = concat!(stringify!($scenario), " with ", stringify!($broken));
                    fails(name, super::$broken::threads::$scenario, $expected);
                }
            )*
        }
    )*};
}

races! {
    scan_against_exit {
        exit_check: "walked that are gone",
        uncounted_claim: "page state is left behind",
        drop_under_lock: "dropped under the registry's lock",
    }
    scan_against_exit_of_empty {
        unlock_order: "used after its end",
    }
    scan_against_reuse {
        uncounted_claim: "page state",
    }
    scan_against_exit_and_reaper {}
    two_scanners_against_exit within 3 preemptions {}
    everything_at_once within 2 preemptions {}
    unload_against_exit {
        two_deletions: "subtract with overflow",
    }
    unmerge_against_oom_kill {
        exit_waits: "deadlock",
    }
    unmerge_against_fork {
        enter_behind_unmerge: "left after unmerging",
    }
    late_enter_against_exit {
        late_enter: "still registered",
    }
    enter_against_refill {
        forgotten_mm: "an mm is forgotten",
    }
    merge_against_unmap_and_rmap_walk {
        late_reference: "after its end",
    }
}
