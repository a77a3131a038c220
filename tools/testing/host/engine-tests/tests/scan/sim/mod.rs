// SPDX-License-Identifier: GPL-2.0-only

//! A simulated mm: processes, vmas, page tables, pages with contents, and KSM pages with their
//! stable nodes and rmap items.
//!
//! Imports go one way: `types` has the types, `world` holds all of them, and each other file is a
//! part of `impl World`.

mod batch;
mod event;
mod frame;
mod invariants;
mod ksm;
mod process;
mod types;
mod world;

pub(crate) use batch::Batch;
pub(crate) use types::*;
pub(crate) use world::World;
