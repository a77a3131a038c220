// SPDX-License-Identifier: GPL-2.0-only

//! Taking over from the built-in KSM, and handing back.
//!
//! [`Takeover`] has the built-in's files, and keeps its scanner stopped. [`inventory`] takes what
//! it has merged away from it, and [`hand_back`] gives it what is merged in the end; where the
//! inventory does not know what it finds, [`Takeover::drain`] has the built-in unmerge it. Its
//! registry goes on as it is: mms come and go there as before. With the scanner stopped, its cursor
//! at the head of the list and no rmap items, an mm that exits leaves at once.

pub(crate) mod attributes;
pub(crate) mod btf;
pub(crate) mod builtin;
pub(crate) mod hand_back;
pub(crate) mod inventory;
pub(crate) mod merged_pages;

use crate::{
    bindings::raw,
    kernel_ext::{
        symbols::Symbols,
        sysfs::AttributeHandler, //
    },
    takeover::{
        attributes::{
            AttributeText,
            BuiltinAttributes, //
        },
        btf::Layouts,
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

/// The built-in's file that is kept at 0 meanwhile.
const RUN: &CStr = c"run";

/// How often and how long (ms) the built-in is given time to get rid of its last merged pages,
/// which may belong to processes that are just exiting.
const DRAIN_TRIES: u32 = 100;
const DRAIN_PAUSE: c_uint = 100;

/// The built-in KSM, stopped, with its files in our hands.
///
/// Dropping it hands everything back: the built-in's `run` is set to [`Self::set_final_run`], and
/// then its files answer again. Whatever else was changed must have been put back before, with
/// [`Self::builtin_store`].
pub(crate) struct Takeover<A: Copy + Send + Sync + 'static, H: AttributeHandler<A>> {
    builtin: Builtin,
    final_run: Atomic<i32>,
    attributes: BuiltinAttributes<A, H>,
}

impl<A: Copy + Send + Sync + 'static, H: AttributeHandler<A>> Takeover<A, H> {
    /// Takes over the files of `ours`, of which `run` must be one, and stops the built-in's
    /// scanner; see [`BuiltinAttributes::hold`].
    ///
    /// Users of the files wait from here on until [`Self::open`].
    ///
    /// # Context
    ///
    /// Sleeps for as long as a batch of the built-in takes. Takes `ksm_thread_mutex`.
    ///
    /// # Errors
    ///
    /// With everything as it was: those of [`BuiltinAttributes::hold`], after one line in the log;
    /// what the built-in returns where its `run` is read or written, `EINVAL` if that is no number.
    pub(crate) fn new(
        symbols: Symbols,
        layouts: Layouts,
        ours: impl Iterator<Item = (&'static CStr, A)>,
    ) -> Result<Self> {
        let attributes = BuiltinAttributes::hold(symbols, ours)?;
        let before = attributes.builtin_show(RUN)?;
        let before = str::from_utf8(&before)
            .ok()
            .and_then(|text| text.trim_end().parse::<u8>().ok())
            .ok_or(EINVAL)?;
        let takeover = Self {
            builtin: Builtin::new(symbols, layouts),
            final_run: Atomic::new(i32::from(before & !RUN_OFFLINE)),
            attributes,
        };
        takeover.set_run(RUN_STOP)?;
        Ok(takeover)
    }

    /// Has the built-in unmerge everything, and tries again where something remains.
    ///
    /// # Context
    ///
    /// Sleeps for as long as that takes, and for [`DRAIN_TRIES`] pauses at most. Takes
    /// `ksm_thread_mutex`; the caller does not hold it.
    ///
    /// # Errors
    ///
    /// `EBUSY` if merged memory remains, `ENOMEM` or `EINTR` if unmerging failed with that, after
    /// one line in the log; `EINTR` if a signal came during a pause.
    pub(crate) fn drain(&self) -> Result {
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
                pr_err!("cannot load: unmerging failed: {EINTR:?}\n");
                return Err(EINTR);
            }
        }
        pr_err!("cannot load: memory stays merged by the built-in KSM\n");
        Err(EBUSY)
    }

    fn set_run(&self, run: u8) -> Result {
        self.attributes.builtin_store(RUN, &[b'0' + run])
    }

    /// Sets the value of `run` that the built-in gets when this is dropped.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn set_final_run(&self, run: u8) {
        self.final_run
            .store(i32::from(run.min(RUN_UNMERGE)), Relaxed);
    }

    /// Returns the parts of the built-in that can be used beside its files.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn builtin(&self) -> Builtin {
        self.builtin
    }

    /// Returns what the built-in's file `name` shows; see [`BuiltinAttributes::builtin_show`]. For
    /// `run` that is what it showed before it was stopped, unless [`Self::set_final_run`] has
    /// chosen another value.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn builtin_show(&self, name: &CStr) -> Result<AttributeText> {
        if name == RUN {
            return AttributeText::new(&[b'0' + self.final_run.load(Relaxed) as u8, b'\n']);
        }
        self.attributes.builtin_show(name)
    }

    /// Writes to the built-in's file `name`; see [`BuiltinAttributes::builtin_store`]. Not for
    /// `run`.
    ///
    /// # Context
    ///
    /// May sleep for as long as the built-in's function does, which takes `ksm_thread_mutex`.
    pub(crate) fn builtin_store(&self, name: &CStr, data: &[u8]) -> Result {
        if name == RUN {
            return Err(EINVAL);
        }
        self.attributes.builtin_store(name, data)
    }

    /// Lets `handler` answer the files; see [`BuiltinAttributes::open`].
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn open(&self, handler: Arc<H>) {
        self.attributes.open(handler);
    }

    /// Lets users of the files wait; see [`BuiltinAttributes::close`].
    ///
    /// # Context
    ///
    /// Sleeps until no thread is in the handler. The caller holds no lock that the handler takes.
    pub(crate) fn close(&self) {
        self.attributes.close();
    }
}

impl<A: Copy + Send + Sync + 'static, H: AttributeHandler<A>> Drop for Takeover<A, H> {
    fn drop(&mut self) {
        self.attributes.close();
        let run = self.final_run.load(Relaxed) as u8;
        // It may show that it is unmerging, which would make it ignore that value.
        let given = self.set_run(RUN_STOP).and_then(|()| self.set_run(run));
        if let Err(error) = given {
            pr_warn!("cannot set the built-in's run to {run}: {error:?}\n");
        }
    }
}
