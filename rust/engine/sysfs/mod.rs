// SPDX-License-Identifier: GPL-2.0-only

//! The files in sysfs: what a write to each means, and what a read of each shows.
//!
//! A file is one block in [`attribute`]; what it sets is a field of [`knobs::Knobs`]. A write is
//! parsed and checked into a [`knobs::Change`] before any lock is taken, and takes effect
//! afterwards, so that a rejected write leaves everything as it was:
//!
//! ```text
//! bytes ── Attribute::parse ──► Change ── Knobs::apply ──► Action ── the caller acts
//!               │ EINVAL, ERANGE            │ EINVAL, EBUSY
//! ```
//!
//! Numbers, words and errnos are those of the built-in, to the byte.

pub mod advisor;
pub mod attribute;
pub mod knobs;
pub mod line;
mod parse;
