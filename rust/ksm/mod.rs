// SPDX-License-Identifier: GPL-2.0-only

//! Merged pages: what the kernel does for KSM when the engine has decided.

pub(crate) mod backend;
pub(crate) mod batch;
mod collect;
mod handover;
mod merge;
mod node;
mod page;
mod replace_pte;
mod split;
pub(crate) mod stable_nodes;
pub(crate) mod trace;
pub(crate) mod unmerge;
pub(crate) mod worker_pool;
