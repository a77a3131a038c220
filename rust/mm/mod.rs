// SPDX-License-Identifier: GPL-2.0

//! What the kernel does: safe wrappers of its interfaces, and all the unsafe code.

mod arena;
pub(crate) mod attrs;
pub(crate) mod btf;
pub(crate) mod delay;
pub(crate) mod extra_file;
mod folio;
pub(crate) mod ksm;
pub(crate) mod kthread;
pub(crate) mod memory_notifier;
mod merge;
mod module_ref;
pub(crate) mod pin;
pub(crate) mod symbols;
pub(crate) mod takeover;
pub(crate) mod team;
pub(crate) mod tracepoint;
pub(crate) mod unmerge;
pub(crate) mod wait;
pub(crate) mod walk;

/// What of the kernel this layer stands on: the kernel crate's bindings, and our own for what they lack.
mod raw {
    pub(super) use crate::bindings::*;
    pub(super) use kernel::bindings::*;
}
