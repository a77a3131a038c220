// SPDX-License-Identifier: GPL-2.0-only

//! Containers for the metadata of millions of pages, and what they cost.

pub(super) mod alloc_size;
pub mod id_table;
pub(super) mod paged_vec;
