// SPDX-License-Identifier: GPL-2.0-only

//! Histories of the engine over the simulated mm, made of the fuzzer's bytes where the property
//! tests make them of random ones.

#![cfg_attr(fuzzing, no_main)]

#[path = "../../engine-tests/tests/scan/control.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod control;
#[path = "../../engine-tests/tests/scan/history.rs"]
mod history;
#[path = "../../engine-tests/tests/scan/machine.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod machine;
#[path = "../../engine-tests/tests/scan/memory.rs"]
mod memory;
#[path = "../../engine-tests/tests/scan/sim/mod.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod sim;

use kernel::testing;

use proptest::{
    bool,
    strategy::{
        Strategy,
        ValueTree, //
    },
    test_runner::{
        Config,
        RngAlgorithm,
        TestRng,
        TestRunner, //
    }, //
};

/// Steps of the longest history.
const STEPS: usize = 40;

fn run(data: &[u8]) {
    let rng = TestRng::from_seed(RngAlgorithm::PassThrough, data);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let strategy = (bool::ANY, history::history(STEPS));
    let Ok(tree) = strategy.new_tree(&mut runner) else {
        return;
    };
    let (collide, ops) = tree.current();
    let before = testing::live_bytes();
    let hash = if collide {
        sim::Hash::Colliding
    } else {
        sim::Hash::Good
    };
    let mut machine = history::run_history(hash, &ops);
    // Where hashes collide, the candidates of one content are too few for all.
    if !collide {
        machine.scan_until_stable();
        machine.assert_all_merged();
    }
    machine.tear_down();
    assert_eq!(testing::live_bytes(), before, "memory is lost");
}

fuzz::target!(run);
