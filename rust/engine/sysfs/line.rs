// SPDX-License-Identifier: GPL-2.0-only

//! The one line that a file shows.

use kernel::{
    fmt,
    prelude::*, //
};

/// Bytes of the longest line.
const LINE_MAX: usize = 32;

/// A line of a file, without any allocation.
///
/// # Invariants
///
/// `len` is at most [`LINE_MAX`].
pub struct Line {
    text: [u8; LINE_MAX],
    len: usize,
}

impl Line {
    /// The line that `write` writes.
    ///
    /// # Errors
    ///
    /// `EINVAL` if that is too long.
    pub fn new(write: impl FnOnce(&mut Self) -> fmt::Result) -> Result<Self> {
        // INVARIANT: 0 is less than `LINE_MAX`.
        let mut line = Self {
            text: [0; LINE_MAX],
            len: 0,
        };
        write(&mut line).map_err(|_| EINVAL)?;
        Ok(line)
    }

    /// What has been written.
    pub fn as_bytes(&self) -> &[u8] {
        self.text.get(..self.len).unwrap_or_default()
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let room = self.text.get_mut(self.len..self.len + s.len());
        room.ok_or(fmt::Error)?.copy_from_slice(s.as_bytes());
        // INVARIANT: There was room for as many bytes.
        self.len += s.len();
        Ok(())
    }
}
