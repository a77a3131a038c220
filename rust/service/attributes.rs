// SPDX-License-Identifier: GPL-2.0-only

//! Reads and writes of the files, and the values that the built-in gets back.

use crate::{
    engine::{
        mm_list::MmList,
        sysfs::{
            attribute::{
                chosen,
                Attribute,
                Origin,
                ADVISOR_MODE,
                ATTRIBUTES,
                GENERAL_PROFIT,
                KSM_ZERO_PAGES,
                PAGES_TO_SCAN,
                PROCESSES,
                RUN, //
            },
            knobs::{
                Action,
                AdvisorMode,
                Change,
                StoreCtx, //
            },
            line::Line, //
        },
        types::Refusal, //
    },
    kernel_ext::{
        kthread,
        symbols::Symbols,
        sysfs::{
            AttributeHandler,
            Directory, //
        }, //
    },
    service::Ksm, //
};
use core::fmt::Write;
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// The built-in's files.
pub(crate) fn builtin() -> impl Iterator<Item = &'static Attribute> {
    ATTRIBUTES
        .iter()
        .copied()
        .filter(|attribute| attribute.origin == Origin::Builtin)
}

/// The files of our own, in `/sys/kernel/mm/rksm`, which are gone when this is dropped.
pub(crate) struct OwnFiles {
    // In the order in which they go.
    _refused: Directory<Refusal, Ksm>,
    _files: Directory<&'static Attribute, Ksm>,
}

impl OwnFiles {
    /// Creates the files.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn create(symbols: Symbols, ksm: &Arc<Ksm>) -> Result<Self> {
        let mut files = Directory::in_mm(symbols, c"rksm", ksm.clone())?;
        for &attribute in ATTRIBUTES {
            if attribute.origin == Origin::Rksm {
                files.add(attribute.name, attribute.mode(), attribute)?;
            }
        }
        let mut refused = Directory::in_directory(&files, c"refused", ksm.clone())?;
        for refusal in Refusal::ALL {
            refused.add(refusal.name(), 0o444, *refusal)?;
        }
        Ok(Self {
            _refused: refused,
            _files: files,
        })
    }
}

impl Ksm {
    /// Calls `give` with each file of the built-in and what has to be written to it so that it
    /// shows the value from here, in the order to write them. Returns the `run` to give it.
    ///
    /// # Errors
    ///
    /// The first error of `give`; the other files are given nevertheless.
    pub(crate) fn hand_back(&self, mut give: impl FnMut(&CStr, &[u8]) -> Result) -> Result<u8> {
        let (knobs, stats) = self.values();
        let mut first = Ok(());
        let mut write = |name: &CStr, text: &[u8]| {
            let given = give(name, text);
            if first.is_ok() {
                first = given;
            }
        };
        // An advisor keeps `pages_to_scan` from being set, and sets it when it is switched on.
        write(ADVISOR_MODE.name, b"none\n");
        let advised = knobs.advisor_mode != AdvisorMode::None;
        let plain = builtin().filter(|&attribute| {
            attribute.store.is_some()
                && *attribute != RUN
                && *attribute != ADVISOR_MODE
                && !(advised && *attribute == PAGES_TO_SCAN)
        });
        for attribute in Iterator::chain(plain, [&ADVISOR_MODE]) {
            if let Ok(line) = attribute.line(&knobs, &stats) {
                write(attribute.name, chosen(line.as_bytes()));
            }
        }
        first.map(|()| knobs.run as u8)
    }
}

impl AttributeHandler<&'static Attribute> for Ksm {
    fn show(&self, attribute: &'static Attribute, text: &mut [u8]) -> Result<usize> {
        let (knobs, mut stats) = self.values();
        if [&KSM_ZERO_PAGES, &GENERAL_PROFIT].contains(&attribute) {
            stats.zero_pages = self.zero_pages() as i64;
        }
        if *attribute == PROCESSES {
            stats.processes = self.locked(|registry| registry.len()) as u64;
        }
        let line = attribute.line(&knobs, &stats)?;
        copy(line.as_bytes(), text)
    }

    fn store(&self, attribute: &'static Attribute, data: &[u8]) -> Result {
        let change = attribute.parse(data)?;
        if let Change::Run(_) | Change::MergeAcrossNodes(_) | Change::MaxPageSharing(_) = change {
            return self.with_scan_state(|state| self.change_excluding_scanner(state, change))?;
        }
        let ctx = StoreCtx {
            pages_shared: 0,
            cpus: kthread::online_cpus(),
        };
        let action = self.published.lock().knobs.apply(change, &ctx)?;
        if action == Action::WakeIter {
            self.wake_governed();
        }
        Ok(())
    }
}

/// `refused/<reason>`: how often pages were not merged for this reason, since the load.
impl AttributeHandler<Refusal> for Ksm {
    fn show(&self, refusal: Refusal, text: &mut [u8]) -> Result<usize> {
        let (_, stats) = self.values();
        let line = Line::new(|line| writeln!(line, "{}", stats.refusals.get(refusal)))?;
        copy(line.as_bytes(), text)
    }

    fn store(&self, _refusal: Refusal, _data: &[u8]) -> Result {
        Err(EIO)
    }
}

/// Copies a line to where a reader wants it, and returns its length.
fn copy(line: &[u8], text: &mut [u8]) -> Result<usize> {
    text.get_mut(..line.len())
        .ok_or(EINVAL)?
        .copy_from_slice(line);
    Ok(line.len())
}
