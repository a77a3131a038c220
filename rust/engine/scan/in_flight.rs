// SPDX-License-Identifier: GPL-2.0-only

//! The contents that are being merged.

use super::super::types::Fingerprint;

/// Fingerprints of the contents that are being merged: a counting filter.
///
/// It may contain a fingerprint that was never added, but never lacks one that was.
pub(super) struct InFlight([u16; Self::COUNTERS]);

impl InFlight {
    const COUNTERS: usize = 1024;

    /// Creates an empty filter.
    pub(super) const fn new() -> Self {
        Self([0; Self::COUNTERS])
    }

    fn counter(&mut self, fingerprint: Fingerprint) -> Option<&mut u16> {
        self.0
            .get_mut(fingerprint.to_bits() as usize % Self::COUNTERS)
    }

    /// Returns whether the fingerprint may have been added; never false if it was.
    pub(super) fn may_contain(&mut self, fingerprint: Fingerprint) -> bool {
        self.counter(fingerprint).is_some_and(|count| *count != 0)
    }

    /// Adds a fingerprint, as often as it is called.
    pub(super) fn add(&mut self, fingerprint: Fingerprint) {
        if let Some(count) = self.counter(fingerprint) {
            *count += 1;
        }
    }

    /// Reverts one [`InFlight::add`].
    pub(super) fn remove(&mut self, fingerprint: Fingerprint) {
        if let Some(count) = self.counter(fingerprint) {
            *count -= 1;
        }
    }
}
