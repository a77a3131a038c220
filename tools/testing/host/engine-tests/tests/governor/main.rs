// SPDX-License-Identifier: GPL-2.0-only

//! The governor: its parts against their rules, and all of it on simulated hosts.

#[path = "../common/mod.rs"]
mod common;
mod curves;
mod due;
mod host;
mod list;
mod pause;
mod queues;
mod scenarios;
mod slots;
mod watch;

use proptest::prelude::*;

/// Runs a property with a seed that is printed.
pub(crate) fn check<S: Strategy>(cases: u32, strategy: S, property: impl Fn(S::Value)) {
    let result = common::runner(cases).run(&strategy, |value| {
        property(value);
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
}
