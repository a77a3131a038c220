// SPDX-License-Identifier: GPL-2.0-only

//! Taking over from the built-in KSM, and handing back.
//!
//! [`Takeover`] has the built-in's files, has made it unmerge everything, and keeps its scanner
//! stopped. Its registry goes on as it is: mms come and go there as before. With the scanner
//! stopped and its cursor at the head of the list, an mm that exits leaves at once.

pub(crate) mod attributes;
pub(crate) mod btf;
pub(crate) mod builtin;

use crate::{
    bindings::raw,
    kernel_ext::symbols::Symbols,
    takeover::{
        attributes::{
            Attrs,
            Files,
            Text, //
        },
        builtin::{
            Builtin,
            RUN_OFFLINE,
            RUN_STOP,
            RUN_UNMERGE, //
        }, //
    }, //
};
use core::str;
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
};

/// How often and how long (ms) the built-in is given time to get rid of its last merged pages,
/// which may belong to processes that are just exiting.
const DRAIN_TRIES: u32 = 100;
const DRAIN_PAUSE: c_uint = 100;

/// The built-in KSM, drained and stopped, with its files in our hands.
///
/// Dropping it gives all back: the built-in's `run` is set to [`Self::set_final_run`], and then its
/// files answer again. Whatever else was changed must have been put back before, with
/// [`Self::builtin_store`].
pub(crate) struct Takeover<F: Files> {
    builtin: Builtin,
    run_file: usize,
    final_run: Atomic<i32>,
    attrs: Attrs<F>,
}

impl<F: Files> Takeover<F> {
    /// Takes the files named in `names`, which must have `run`, and drains the built-in.
    ///
    /// Users of the files wait from here on until [`Self::open`]. Sleeps, for as long as the
    /// built-in takes to unmerge everything.
    ///
    /// # Errors
    ///
    /// After one line in the log, with everything as it was (but unmerged): see [`Attrs::hold`];
    /// `EBUSY` if merged memory remains, `ENOMEM` or `EINTR` if unmerging failed with that.
    pub(crate) fn new(symbols: Symbols, names: &[&CStr]) -> Result<Self> {
        let run_file = names
            .iter()
            .position(|name| *name == c"run")
            .ok_or(EINVAL)?;
        let attrs = Attrs::hold(symbols, names)?;
        let before = attrs.builtin_show(run_file)?;
        let before = str::from_utf8(&before)
            .ok()
            .and_then(|text| text.trim_end().parse::<u8>().ok())
            .ok_or(EINVAL)?;
        let takeover = Self {
            builtin: Builtin::new(symbols),
            run_file,
            final_run: Atomic::new(i32::from(before & !(RUN_OFFLINE))),
            attrs,
        };
        takeover.drain()?;
        Ok(takeover)
    }

    fn drain(&self) -> Result {
        for _ in 0..DRAIN_TRIES {
            // To write the value it has already would do nothing.
            self.set_run(RUN_STOP)
                .and_then(|()| self.set_run(RUN_UNMERGE))
                .and_then(|()| self.set_run(RUN_STOP))
                .inspect_err(|error| pr_err!("cannot load: unmerging failed: {error:?}\n"))?;
            if self.builtin.is_drained() {
                return Ok(());
            }
            // SAFETY: May sleep here.
            if unsafe { raw::msleep_interruptible(DRAIN_PAUSE) } != 0 {
                return Err(EINTR);
            }
        }
        pr_err!("cannot load: memory stays merged by the built-in KSM\n");
        Err(EBUSY)
    }

    fn set_run(&self, run: u8) -> Result {
        self.attrs.builtin_store(self.run_file, &[b'0' + run])
    }

    /// Chooses what `run` the built-in gets when this is dropped.
    pub(crate) fn set_final_run(&self, run: u8) {
        self.final_run
            .store(i32::from(run.min(RUN_UNMERGE)), Relaxed);
    }

    /// See [`Builtin`].
    pub(crate) fn builtin(&self) -> Builtin {
        self.builtin
    }

    /// What the built-in says in `file`; see [`Attrs::builtin_show`]. In `run` that is what it said
    /// before it was stopped, unless [`Self::set_final_run`] has chosen another value.
    pub(crate) fn builtin_show(&self, file: usize) -> Result<Text> {
        if file == self.run_file {
            return Text::new(&[b'0' + self.final_run.load(Relaxed) as u8, b'\n']);
        }
        self.attrs.builtin_show(file)
    }

    /// Writes to the built-in's `file`; see [`Attrs::builtin_store`]. Not for `run`.
    pub(crate) fn builtin_store(&self, file: usize, data: &[u8]) -> Result {
        if file == self.run_file {
            return Err(EINVAL);
        }
        self.attrs.builtin_store(file, data)
    }

    /// Lets `handler` answer the files; see [`Attrs::open`].
    pub(crate) fn open(&self, handler: Arc<F>) {
        self.attrs.open(handler);
    }

    /// Lets users of the files wait; see [`Attrs::close`].
    pub(crate) fn close(&self) {
        self.attrs.close();
    }
}

impl<F: Files> Drop for Takeover<F> {
    fn drop(&mut self) {
        self.attrs.close();
        let run = self.final_run.load(Relaxed) as u8;
        // It may show that it is unmerging, which would make it ignore that value.
        let given = self.set_run(RUN_STOP).and_then(|()| self.set_run(run));
        if let Err(error) = given {
            pr_warn!("cannot set the built-in's run to {run}: {error:?}\n");
        }
    }
}
