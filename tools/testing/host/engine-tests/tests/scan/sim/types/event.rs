// SPDX-License-Identifier: GPL-2.0-only

//! What happens to the simulated memory.

use super::{
    frame::Content,
    process::AREAS, //
};
use std::ops::Range;

/// What processes and the rest of the kernel do.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// A new process.
    Spawn {
        mergeable: [bool; AREAS.len()],
    },
    /// Consecutive pages are written to. `step` is how much their contents differ.
    Write {
        mm: usize,
        page: usize,
        count: usize,
        content: Content,
        step: Content,
    },
    Unmap {
        mm: usize,
        page: usize,
        count: usize,
    },
    Move {
        mm: usize,
        from: usize,
        to: usize,
        count: usize,
    },
    SwapOut {
        mm: usize,
        page: usize,
        count: usize,
    },
    /// Reclaim clears the accessed bits.
    Age {
        mm: usize,
        page: usize,
        count: usize,
    },
    /// Consecutive pages are read.
    Read {
        mm: usize,
        page: usize,
        count: usize,
    },
    /// Pages become one huge page.
    Collapse {
        mm: usize,
        page: usize,
    },
    /// The child does not get the memory of the area `dont_fork`.
    Fork {
        mm: usize,
        dont_fork: Option<usize>,
    },
    /// The core of mm counts the zero pages of an mm wrongly.
    Miscount {
        mm: usize,
        by: isize,
    },
    /// An mm makes `steps` of the three steps of its exit.
    Exit {
        mm: usize,
        steps: usize,
    },
    Advise {
        mm: usize,
        area: usize,
        on: bool,
    },
    Migrate {
        mm: usize,
        page: usize,
        nid: u32,
    },
    /// Another task holds the mmap lock while the scanner tries for it so often.
    Hold {
        mm: usize,
        tries: u32,
    },
    /// Another task holds the lock of the folio.
    Lock {
        mm: usize,
        page: usize,
    },
    /// `get_user_pages`.
    Pin {
        mm: usize,
        page: usize,
    },
    /// All folio locks and pins are released.
    Release,
}

/// Refusals at random.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chance {
    pub(crate) seed: u64,
    pub(crate) one_in: u64,
}

/// What walks are for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Scan,
    /// Pages of an mm are vouched for, at these addresses.
    Vouched(usize, Range<usize>),
    /// To say why pages are not merged.
    Why,
}

/// How contents are hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hash {
    Good,
    /// Different contents have equal hashes.
    Colliding,
}
