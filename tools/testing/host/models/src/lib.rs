// SPDX-License-Identifier: GPL-2.0-only

//! The registry's protocol under every interleaving of the threads that use it.
//!
//! [`fixed`] is the engine's own code. Each other module is that code with one fix taken out, as
//! `build.rs` says. The threads and their mms are in [`sim`] and `threads.rs`.
//!
//! That the mmap lock is dropped before the claim on the slot is released (lesson 1) is also a
//! matter of types: what a visit borrows from its claim, as the lock's guard does, cannot leave it.
//!
//! ```
//! use models::fixed::{mm_list::{MmList, Visited}, types::Progress};
//!
//! fn visit<L: MmList>(list: &L) {
//!     list.visit(|claim| {
//!         let guard = claim.mm();
//!         let _ = guard;
//!         Visited { progress: Progress::Done, tracked: false }
//!     });
//! }
//! ```
//!
//! ```compile_fail,E0521
//! use models::fixed::{mm_list::{MmList, Visited}, types::Progress};
//!
//! fn visit<L: MmList>(list: &L) {
//!     let mut kept = None;
//!     list.visit(|claim| {
//!         let guard = claim.mm();
//!         kept = Some(guard);
//!         Visited { progress: Progress::Done, tracked: false }
//!     });
//! }
//! ```

pub mod sim;

include!(concat!(env!("OUT_DIR"), "/variants.rs"));
