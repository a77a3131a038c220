// SPDX-License-Identifier: GPL-2.0-only

//! How far a visit of an mm came.

/// How far a visit of an mm came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Up to this address; the next visit goes on there.
    At(usize),
    /// Up to this address, since another task holds the mmap lock; the next visit tries again.
    Busy(usize),
    /// To the end of the mm.
    Done,
    /// Nowhere: the mm is exiting. It is unregistered if its exit has not been reported yet.
    Exiting,
}
