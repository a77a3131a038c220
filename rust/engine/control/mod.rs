// SPDX-License-Identifier: GPL-2.0-only

//! `/dev/rksm`: what the bytes of a call mean, and the rules that calls set.
//!
//! A call is known by its number, its argument is read as long as the program says that it is, and
//! parsed as a whole before anything is done. What has come of it is written into the same bytes,
//! which go back to the program:
//!
//! ```text
//! cmd ── Call::from_cmd ──► Call ── check_size ──► bytes ── Request::parse ──► Request
//!            │ ENOTTY                   │ EINVAL, E2BIG        │ EINVAL, E2BIG      │
//!                                     bytes ◄── encode ── MergeReply, … ◄── the caller acts
//! ```
//!
//! The C side is `tools/include/uapi/linux/rksm.h`; [`layout`] is the same for Rust, and a host
//! test compares the two. Processes, cgroups and memory of a program are for the caller to find:
//! here are numbers and bytes only.

pub mod cgroup_path;
pub mod layout;
pub mod reply;
pub mod request;
pub mod rules;
