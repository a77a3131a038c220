// SPDX-License-Identifier: GPL-2.0-only

//! Probes on the tracepoints `ksm_enter` and `ksm_exit`.
//!
//! The built-in KSM goes on registering mms, and fires those two from wherever it is called
//! (madvise, prctl, fork, exec, exit). A probe on each tells of every mm that comes and goes.
//!
//! C header: [`include/linux/tracepoint.h`](srctree/include/linux/tracepoint.h)

use crate::bindings::raw;
use core::ptr;
use kernel::{
    error::to_result,
    mm::Mm,
    prelude::*,
    sync::Arc, //
};

/// Called for mms that come and go.
///
/// # Context
///
/// Both are called in the task that registers or releases the mm, at once, and must not sleep.
/// The mm is valid during the call, and as long as a reference taken there is held.
pub(crate) trait MmEvents: Send + Sync + 'static {
    /// The mm has been registered for KSM. At `fork` and `execve` it does not run yet.
    fn enter(&self, mm: &Mm);

    /// The mm is being released: `mm_users` is zero, and `exit_mmap` comes next. (An `execve` that
    /// fails early calls this too, for the new mm, whose one user then gives it up.) Also called
    /// for an mm that was never entered or has left before.
    fn exit(&self, mm: &Mm);
}

/// Registered probes, which are gone when this is dropped. Dropping sleeps.
///
/// # Invariants
///
/// Exactly the probes for which `registered` says so are registered, with `events` as their data.
pub(crate) struct Probes<T: MmEvents> {
    points: Points,
    registered: [bool; 2],
    events: Arc<T>,
}

/// The two tracepoints, in the order enter, exit.
struct Points([*mut raw::tracepoint; 2]);

// SAFETY: The kernel's own tracepoints are there for ever, and may be used from every thread.
unsafe impl Send for Points {}
// SAFETY: Through a shared reference only what the lock of the tracepoints protects is changed.
unsafe impl Sync for Points {}

const NAMES: [&CStr; 2] = [c"ksm_enter", c"ksm_exit"];

impl<T: MmEvents> Probes<T> {
    /// Registers both probes.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ENOENT`, after a line in the log, when the kernel has no such tracepoints; `ENOMEM`.
    pub(crate) fn register(events: Arc<T>) -> Result<Self> {
        let mut points = Points([ptr::null_mut(); 2]);
        // SAFETY: `find` gets nothing but `points`, which outlives the call.
        unsafe { raw::for_each_kernel_tracepoint(Some(find), (&raw mut points).cast()) };
        if points.0.iter().any(|point| point.is_null()) {
            pr_err!("cannot load: no tracepoints ksm_enter and ksm_exit in this kernel\n");
            return Err(ENOENT);
        }
        // INVARIANT: None is registered yet.
        let mut probes = Self {
            points,
            registered: [false; 2],
            events,
        };
        // Exit first: an mm that enters is then never missed when it exits.
        for i in [1, 0] {
            // SAFETY: The tracepoint passes the data and an mm to its probes, which is what they
            // take. The data is there until the probe is unregistered and nobody runs it.
            to_result(unsafe {
                raw::tracepoint_probe_register(probes.points.0[i], Self::probe(i), probes.data())
            })?;
            // INVARIANT: It is registered now.
            probes.registered[i] = true;
        }
        Ok(probes)
    }

    fn probe(i: usize) -> *mut c_void {
        if i == 0 {
            enter::<T> as *mut c_void
        } else {
            exit::<T> as *mut c_void
        }
    }

    fn data(&self) -> *mut c_void {
        (&raw const *self.events).cast_mut().cast()
    }
}

impl<T: MmEvents> Drop for Probes<T> {
    fn drop(&mut self) {
        for i in [0, 1] {
            if self.registered[i] {
                // SAFETY: By the type invariant this very probe is registered.
                unsafe {
                    raw::tracepoint_probe_unregister(self.points.0[i], Self::probe(i), self.data())
                };
            }
        }
        // SAFETY: Called from a context that may sleep. Afterwards nobody is in a probe.
        unsafe { raw::rksm_tracepoint_synchronize_unregister() };
    }
}

/// Remembers the tracepoint if it is one of the two.
///
/// # Safety
///
/// `point` is one of the kernel's tracepoints, and `data` a `Points` that nothing else refers to
/// during the call.
unsafe extern "C" fn find(point: *mut raw::tracepoint, data: *mut c_void) {
    // SAFETY: By the contract; every tracepoint has a name, which is a string.
    let (points, name) = unsafe {
        (
            &mut *data.cast::<Points>(),
            CStr::from_char_ptr((*point).name),
        )
    };
    for (slot, wanted) in points.0.iter_mut().zip(NAMES) {
        if name == wanted {
            *slot = point;
        }
    }
}

/// The probe on `ksm_enter`.
///
/// # Safety
///
/// To be called by that tracepoint only, with the data that a `Probes<T>` gave it.
unsafe extern "C" fn enter<T: MmEvents>(data: *mut c_void, mm: *mut c_void) {
    // SAFETY: `data` is the `T` that the probe was registered with, kept until no probe runs. The
    // caller of __ksm_enter() keeps the mm during the call.
    unsafe { (*data.cast::<T>()).enter(Mm::from_raw(mm.cast())) }
}

/// The probe on `ksm_exit`.
///
/// # Safety
///
/// To be called by that tracepoint only, with the data that a `Probes<T>` gave it.
unsafe extern "C" fn exit<T: MmEvents>(data: *mut c_void, mm: *mut c_void) {
    // SAFETY: `data` is the `T` that the probe was registered with, kept until no probe runs.
    // __mmput() has a reference to the mm until its end.
    unsafe { (*data.cast::<T>()).exit(Mm::from_raw(mm.cast())) }
}
