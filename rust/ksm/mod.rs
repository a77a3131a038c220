// SPDX-License-Identifier: GPL-2.0-only

//! Merged pages: what the kernel does for KSM when the engine has decided.

mod arena;
pub(crate) mod backend;
pub(crate) mod collect;
mod replace_pte;
pub(crate) mod unmerge;
pub(crate) mod worker_pool;
