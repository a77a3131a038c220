// SPDX-License-Identifier: GPL-2.0-only

//! The engine against a simulated mm: random histories. Everything has to hold after each step.

#[path = "../common/mod.rs"]
mod common;
mod control;
mod control_stories;
mod history;
mod machine;
mod memory;
mod sim;
mod stories;

use common::runner;
use history::{
    history,
    run_history, //
};
use machine::Op;
use sim::Hash;

use kernel::testing;

use proptest::{
    prelude::*,
    test_runner::TestError, //
};

use std::{
    cell::Cell,
    panic,
    sync::Once, //
};

/// Runs a property, and shows no more than the failure that is left after shrinking.
pub(crate) fn check<S: Strategy>(cases: u32, strategy: S, property: impl Fn(S::Value)) {
    thread_local! {
        static QUIET: Cell<bool> = const { Cell::new(false) };
    }
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let show = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                show(info);
            }
        }));
    });
    QUIET.set(true);
    let result = runner(cases).run(&strategy, |value| {
        property(value);
        Ok(())
    });
    QUIET.set(false);
    match result {
        Ok(()) => {}
        Err(TestError::Fail(reason, value)) => panic!("{reason}\nafter {value:?}"),
        Err(TestError::Abort(reason)) => panic!("{reason}"),
    }
}

/// Whatever happens: contents stay, counters count what is there, and nothing is left in the end.
#[test]
fn histories() {
    check(400, (any::<bool>(), history(40)), |(collide, ops)| {
        let before = testing::live_bytes();
        let hash = if collide { Hash::Colliding } else { Hash::Good };
        run_history(hash, &ops).tear_down();
        assert_eq!(testing::live_bytes(), before, "memory is lost");
    });
}

/// Whatever has happened: once memory stays as it is, everything is merged that can be.
#[test]
fn everything_is_merged() {
    check(300, history(30), |ops| {
        let mut machine = run_history(Hash::Good, &ops);
        machine.scan_until_stable();
        machine.assert_all_merged();
        machine.tear_down();
    });
}

/// Whatever has happened: after unmerging nothing is known, and everything can be merged again.
#[test]
fn unmerging_forgets_everything() {
    check(200, history(30), |ops| {
        let mut machine = run_history(Hash::Good, &ops);
        machine.run(&Op::Unmerge {
            fail_after: None,
            interleaved: Vec::new(),
        });
        machine.scan_until_stable();
        machine.assert_all_merged();
        machine.tear_down();
    });
}
