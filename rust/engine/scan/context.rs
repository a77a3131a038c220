// SPDX-License-Identifier: GPL-2.0-only

//! The mm that is scanned, and how.

use super::super::{
    accessed::AccessedHint,
    policy::Policy,
    types::SlotId, //
};
use core::ops::Range;

/// Finds the mm of a slot whose pages are tracked.
pub trait Pins<Mm> {
    /// Pins the mm of a slot; `None` once it has left.
    ///
    /// # Context
    ///
    /// May take the registry's lock.
    fn pin(&self, slot: SlotId) -> Option<Mm>;
}

/// The mm that is scanned, and how.
pub(super) struct ScanContext<'a, Mm> {
    pub(super) policy: &'a Policy,
    pub(super) hint: AccessedHint,
    pub(super) slot: SlotId,
    pub(super) mm: &'a Mm,
    /// Pages that count as accessed: walks have cleared their accessed bits, but were dropped, or
    /// ended before.
    pub(super) cleared_ahead: Range<usize>,
    /// Mappings of retiring nodes are to be moved.
    pub(super) moves: bool,
}
