// SPDX-License-Identifier: GPL-2.0-only

//! What the property tests share.

use proptest::test_runner::{
    Config,
    RngAlgorithm,
    TestRng,
    TestRunner, //
};

use std::hash::{
    BuildHasher,
    RandomState, //
};

/// Makes a runner from a seed that is printed, so that a failure can be had again with
/// `RKSM_SEED=…`.
///
/// `PROPTEST_CASES` takes precedence over `cases`.
pub(crate) fn runner(cases: u32) -> TestRunner {
    let mut config = Config::default();
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = cases;
    }
    config.failure_persistence = None;
    let seed = match std::env::var("RKSM_SEED") {
        Ok(seed) => seed.parse().expect("RKSM_SEED must be a number"),
        Err(_) => RandomState::new().hash_one(0),
    };
    println!("RKSM_SEED={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
}
