// SPDX-License-Identifier: GPL-2.0-only

//! What KSM decides: safe and pure, without any knowledge of page tables, folios or locks.
//!
//! Every structure here is plain data behind `&mut self`; the callers put the locks around it. The same
//! files are compiled on the host by `tools/testing/host`, where the tests run.

#![forbid(unsafe_code)]

mod accessed;
pub mod backend;
mod container;
pub mod content_hash;
pub mod index;
pub mod metadata;
pub mod mm_list;
pub mod page_state;
pub mod policy;
pub mod registry;
pub mod scan;
pub mod smart_scan;
pub mod stats;
pub mod sysfs;
pub mod types;
pub mod worker_pool;
