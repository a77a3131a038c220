// SPDX-License-Identifier: GPL-2.0-only

//! The engine's own sources, compiled for the host.

#[forbid(unsafe_code)]
#[path = "../../../../../rust/engine/mod.rs"]
pub mod engine;
