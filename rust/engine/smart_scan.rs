// SPDX-License-Identifier: GPL-2.0-only

//! Smart scan: a page that found no partner several times is looked at less often.
//!
//! The caller asks only while the `smart_scan` knob is on, and only for pages that are not
//! merged: a page's age stands still otherwise.

/// Largest age that is told apart. Older pages are all treated alike.
pub const MAX_AGE: u8 = 15;

/// Age below which a page is never skipped, so that it can become a candidate and find a partner.
const MIN_AGE: u8 = 3;

/// What smart scan remembers of a page; both fit four bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// Full scans that came by, up to [`MAX_AGE`].
    pub age: u8,
    /// Further full scans that are to skip the page, at most 8.
    pub skips: u8,
}

impl History {
    /// Takes note that a full scan came by. True if it is to skip the page.
    ///
    /// A skipped page stays what it was: a candidate goes on being found by others.
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

/// How many full scans skip a page of this age after one has looked at it.
fn skips_at(age: u8) -> u8 {
    match age {
        0..=3 => 1,
        4..=5 => 2,
        6..=8 => 4,
        _ => 8,
    }
}
