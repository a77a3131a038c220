// SPDX-License-Identifier: GPL-2.0-only

//! The engine, for the tests beside this crate.

pub use engine;
