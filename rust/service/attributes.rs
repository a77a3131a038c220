// SPDX-License-Identifier: GPL-2.0-only

//! Reads and writes of the files, and the values that the built-in gets back.

use crate::{
    engine::knobs::{
        Action,
        AdvisorMode,
        Change,
        File,
        Mode,
        StoreCtx,
        FILES, //
    },
    kernel_ext::kthread,
    ksm::backend,
    service::{
        Ksm,
        NAMES, //
    },
    takeover::attributes::Files, //
};
use core::fmt::Write;
use kernel::prelude::*;

impl Ksm {
    /// What each file of the built-in is to be given to have the values from here, in the order to write them.
    ///
    /// # Errors
    ///
    /// The first error of `give`; the other files are given nevertheless.
    pub(crate) fn hand_back(&self, mut give: impl FnMut(usize, &[u8]) -> Result) -> Result<u8> {
        let knobs = self.knobs();
        let mut first = Ok(());
        let mut write = |file: File, text: &[u8]| {
            if let Some(i) = FILES.iter().position(|row| row.file == file) {
                let given = give(i, text);
                if first.is_ok() {
                    first = given;
                }
            }
        };
        // An advisor keeps `pages_to_scan` from being set, and sets it when it is switched on.
        write(File::AdvisorMode, b"none\n");
        let plain = FILES.iter().take(NAMES.len()).filter(|row| {
            let last = matches!(row.file, File::Run | File::AdvisorMode);
            let advised = row.file == File::PagesToScan && knobs.advisor_mode != AdvisorMode::None;
            row.mode == Mode::ReadWrite && !last && !advised
        });
        for row in plain {
            let mut text = Line::new();
            if knobs.hand_back(row.file, &mut text).is_ok() {
                write(row.file, text.as_bytes());
            }
        }
        let mut text = Line::new();
        if knobs.hand_back(File::AdvisorMode, &mut text).is_ok() {
            write(File::AdvisorMode, text.as_bytes());
        }
        first.map(|()| knobs.run as u8)
    }
}
impl Files for Ksm {
    fn show(&self, file: usize, text: &mut [u8]) -> Result<usize> {
        let file = FILES.get(file).ok_or(ENOENT)?.file;
        let (knobs, mut snapshot) = {
            let published = self.published.lock();
            (published.knobs, published.snapshot)
        };
        snapshot.zero_pages = backend::zero_pages(self.symbols);
        let mut line = Line::new();
        knobs.show(file, &snapshot, &mut line).map_err(|_| EINVAL)?;
        let line = line.as_bytes();
        text.get_mut(..line.len())
            .ok_or(EINVAL)?
            .copy_from_slice(line);
        Ok(line.len())
    }

    fn store(&self, file: usize, data: &[u8]) -> Result {
        let change = FILES.get(file).ok_or(ENOENT)?.file.parse(data)?;
        if let Change::Run(_) | Change::MergeAcrossNodes(_) | Change::MaxPageSharing(_) = change {
            return self.with_scan_state(|state| self.change_excluding_scanner(state, change));
        }
        let ctx = StoreCtx {
            pages_shared: 0,
            cpus: kthread::online_cpus(),
        };
        let action = self.published.lock().knobs.apply(change, &ctx)?;
        if action == Action::WakeIter {
            self.iter_wait.wake_up_interruptible();
        }
        Ok(())
    }
}

/// A line of a file.
struct Line {
    text: [u8; 32],
    len: usize,
}

impl Line {
    const fn new() -> Self {
        Self {
            text: [0; 32],
            len: 0,
        }
    }

    fn as_bytes(&self) -> &[u8] {
        self.text.get(..self.len).unwrap_or_default()
    }
}

impl Write for Line {
    fn write_str(&mut self, s: &str) -> core::fmt::Result {
        let room = self.text.get_mut(self.len..self.len + s.len());
        room.ok_or(core::fmt::Error)?.copy_from_slice(s.as_bytes());
        self.len += s.len();
        Ok(())
    }
}
