// SPDX-License-Identifier: GPL-2.0-only

//! Safe wrappers of kernel interfaces that the `kernel` crate lacks, written as if for upstream.

pub(crate) mod compat;
pub(crate) mod device;
pub(crate) mod folio;
pub(crate) mod gfp;
pub(crate) mod ksm_objects;
pub(crate) mod kthread;
pub(crate) mod memory;
pub(crate) mod memory_notifier;
pub(crate) mod mm;
pub(crate) mod mutex;
pub(crate) mod oom;
pub(crate) mod process;
pub(crate) mod pte;
pub(crate) mod race_window;
pub(crate) mod slab;
pub(crate) mod symbols;
pub(crate) mod sysfs;
pub(crate) mod tracepoint;
pub(crate) mod wait;
