// SPDX-License-Identifier: GPL-2.0-only

//! Smart scan: a page that several full scans could not merge is scanned less often.
//!
//! Mirrors `should_skip_rmap_item()` and `skip_age()` of mm/ksm.c. As there, the age of a page does
//! not change while the `smart_scan` knob is off or the page is merged: the caller does not ask
//! then.

/// Largest age and largest number of skips that are stored: four bits each. Pages at that age and
/// above it are all treated the same.
pub const MAX_AGE: u8 = 15;

/// Age below which a page is never skipped, so that it can become a candidate and be merged.
const MIN_AGE: u8 = 3;

/// Age from which on a page is skipped most often.
pub(super) const OLD_AGE: u8 = 9;

/// Skips of a page of that age.
pub(super) const MAX_SKIPS: u8 = 8;

/// What smart scan remembers of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// Number of full scans that have reached the page, up to [`MAX_AGE`].
    pub age: u8,
    /// Number of further full scans that skip the page, at most [`MAX_SKIPS`].
    pub skips: u8,
}

impl History {
    /// Counts a full scan that has reached the page. Returns whether that scan skips it.
    ///
    /// A skipped page keeps its state: a candidate is still found by other pages.
    pub fn should_skip(&mut self) -> bool {
        let age = self.age;
        self.age = age.saturating_add(1).min(MAX_AGE);
        if age < MIN_AGE {
            return false;
        }
        match self.skips.checked_sub(1) {
            Some(skips) => {
                self.skips = skips;
                true
            }
            None => {
                self.skips = skips_at(age);
                false
            }
        }
    }
}

/// Returns the number of full scans that skip a page of this age after one that did not.
fn skips_at(age: u8) -> u8 {
    match age {
        0..=3 => 1,
        4..=5 => 2,
        6..OLD_AGE => 4,
        _ => MAX_SKIPS,
    }
}
