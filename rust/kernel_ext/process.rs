// SPDX-License-Identifier: GPL-2.0-only

//! Processes, by pidfd or all of them, and the cgroups that they are in.
//!
//! C headers: [`include/linux/pid.h`](srctree/include/linux/pid.h),
//! [`include/linux/sched/signal.h`](srctree/include/linux/sched/signal.h),
//! [`include/linux/cgroup.h`](srctree/include/linux/cgroup.h)

use crate::{
    bindings::raw,
    kernel_ext::{
        mm::PinnedMm,
        symbols::Symbols, //
    }, //
};
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    error::{
        from_err_ptr,
        to_result, //
    },
    mm::Mm,
    prelude::*,
    types::NotThreadSafe, //
};

/// Whether the current task has `CAP_SYS_ADMIN` in the initial user namespace.
///
/// # Context
///
/// Any, in a task.
pub(crate) fn capable_sys_admin() -> bool {
    // SAFETY: Looks at the current task's credentials.
    unsafe { raw::rksm_capable_sys_admin() }
}

/// A process that somebody holds a reference to.
///
/// # Invariants
///
/// Owns a reference to the leader of a thread group.
pub(crate) struct Process(NonNull<raw::task_struct>);

impl Process {
    /// The process that a pidfd of the current task is for.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `EBADF` if the descriptor is none of a process, `ESRCH` if it has ended.
    pub(crate) fn of_pidfd(_symbols: Symbols, pidfd: i32) -> Result<Self> {
        // SAFETY: Any number may be asked for. The symbol has been resolved.
        let task = from_err_ptr(unsafe { raw::rksm_pidfd_get_task(pidfd) })?;
        // INVARIANT: The reference is passed on.
        NonNull::new(task).map(Self).ok_or(ESRCH)
    }

    /// The process, borrowed.
    pub(crate) fn as_ref(&self) -> ProcessRef<'_> {
        // INVARIANT: There is a reference for as long as `self` is borrowed.
        ProcessRef(self.0, PhantomData)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SAFETY: By the invariant there is a reference to give up.
        unsafe { raw::rksm_put_task_struct(self.0.as_ptr()) };
    }
}

/// A process that stays for `'a`.
///
/// # Invariants
///
/// The leader of a thread group, which is not freed before the end of `'a`.
#[derive(Clone, Copy)]
pub(crate) struct ProcessRef<'a>(NonNull<raw::task_struct>, PhantomData<&'a Process>);

impl ProcessRef<'_> {
    /// Calls `f` with the process's mm, if that is its own: a `vfork` child that has not called
    /// `exec` runs in its parent's.
    ///
    /// # Context
    ///
    /// Any that may take a spinlock; `f` must not sleep. Takes `alloc_lock` of a task.
    ///
    /// # Errors
    ///
    /// `ESRCH` if the process has no mm, or no longer; `EBUSY` if it is another process's.
    pub(crate) fn with_own_mm<R>(self, f: impl FnOnce(&Mm) -> R) -> Result<R> {
        /// What [`call`] is to do, and what it has done.
        struct Call<F, R> {
            f: Option<F>,
            result: Option<R>,
        }

        /// Calls the function.
        ///
        /// # Safety
        ///
        /// `data` is a `Call<F, R>` that nothing else refers to, and `mm` a valid mm, during this
        /// call.
        unsafe extern "C" fn call<F: FnOnce(&Mm) -> R, R>(
            mm: *mut raw::mm_struct,
            data: *mut c_void,
        ) {
            // SAFETY: By the contract.
            let (call, mm) = unsafe { (&mut *data.cast::<Call<F, R>>(), Mm::from_raw(mm)) };
            call.result = call.f.take().map(|f| f(mm));
        }

        /// The callback for a closure, whose type has no name.
        fn callback<F: FnOnce(&Mm) -> R, R>(
            _: &Call<F, R>,
        ) -> unsafe extern "C" fn(*mut raw::mm_struct, *mut c_void) {
            call::<F, R>
        }

        let mut call = Call {
            f: Some(f),
            result: None,
        };
        let callback = callback(&call);
        // SAFETY: The process stays by the invariant. The callback gets `call`, which outlives
        // this, and an mm that its task, which is locked, refers to.
        to_result(unsafe {
            raw::rksm_with_own_mm(self.0.as_ptr(), Some(callback), (&raw mut call).cast())
        })?;
        call.result.ok_or(ESRCH)
    }

    /// Pins the process's mm, if that is its own.
    ///
    /// # Context
    ///
    /// As [`ProcessRef::with_own_mm`].
    ///
    /// # Errors
    ///
    /// As [`ProcessRef::with_own_mm`].
    pub(crate) fn own_mm(self) -> Result<PinnedMm> {
        self.with_own_mm(PinnedMm::mmgrab)
    }

    /// The process's identity, which does not keep it.
    ///
    /// # Context
    ///
    /// Any.
    ///
    /// # Errors
    ///
    /// `ESRCH` if it has been reaped.
    pub(crate) fn id(self) -> Result<ProcessId> {
        // SAFETY: The process stays by the invariant.
        let pid = unsafe { raw::rksm_get_task_tgid(self.0.as_ptr()) };
        // INVARIANT: The reference is passed on.
        NonNull::new(pid).map(ProcessId).ok_or(ESRCH)
    }
}

/// Calls `f` with every process. Those that come or go meanwhile may be missed.
///
/// # Context
///
/// Any; `f` must not sleep. In an RCU read-side section, as [`RunningProcess`] shows.
pub(crate) fn for_each_process<F: FnMut(&RunningProcess<'_>)>(mut f: F) {
    /// Calls the function with one process.
    ///
    /// # Safety
    ///
    /// `data` is an `F` that nothing else refers to, and `task` the leader of a thread group,
    /// during this call, which is in an RCU read-side section.
    unsafe extern "C" fn call<F: FnMut(&RunningProcess<'_>)>(
        task: *mut raw::task_struct,
        data: *mut c_void,
    ) {
        // SAFETY: By the contract.
        let f = unsafe { &mut *data.cast::<F>() };
        if let Some(task) = NonNull::new(task) {
            // INVARIANT: By the contract; tasks are freed by RCU.
            f(&RunningProcess {
                process: ProcessRef(task, PhantomData),
                _nts: NotThreadSafe,
            });
        }
    }

    // SAFETY: The callback gets `f`, which outlives the call.
    unsafe { raw::rksm_visit_processes(Some(call::<F>), (&raw mut f).cast()) };
}

/// A process found by [`for_each_process`].
///
/// # Invariants
///
/// The RCU read-side section in which it was found lasts.
pub(crate) struct RunningProcess<'a> {
    process: ProcessRef<'a>,
    _nts: NotThreadSafe,
}

impl RunningProcess<'_> {
    /// The process.
    pub(crate) fn process(&self) -> ProcessRef<'_> {
        self.process
    }

    /// Whether it is in this cgroup or in one below.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn is_in(&self, cgroup: &Cgroup) -> bool {
        // SAFETY: The process and the cgroup stay by the invariants, and the RCU read-side section
        // lasts.
        unsafe { raw::rksm_task_in_cgroup(self.process.0.as_ptr(), cgroup.0.as_ptr()) }
    }

    /// Whether it is the process of this identity.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn is(&self, id: &ProcessId) -> bool {
        // SAFETY: Both stay by the invariants.
        unsafe { raw::rksm_pid_is_of(id.0.as_ptr(), self.process.0.as_ptr()) }
    }
}

/// The identity of a process: survives `exec`, and is not given to another.
///
/// # Invariants
///
/// Owns a reference to a `struct pid`.
pub(crate) struct ProcessId(NonNull<raw::pid>);

// SAFETY: A `struct pid` may be looked at and released by every thread.
unsafe impl Send for ProcessId {}
// SAFETY: As above; what changes in it is read under RCU.
unsafe impl Sync for ProcessId {}

impl ProcessId {
    /// Whether the process has not ended.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn is_there(&self) -> bool {
        // SAFETY: By the invariant.
        unsafe { raw::rksm_pid_has_task(self.0.as_ptr()) }
    }

    /// Its number in the pid namespace of the current task, 0 where it has none.
    ///
    /// # Context
    ///
    /// Any, in a task.
    pub(crate) fn number(&self) -> i32 {
        // SAFETY: By the invariant.
        unsafe { raw::pid_vnr(self.0.as_ptr()) }
    }
}

impl PartialEq for ProcessId {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Eq for ProcessId {}

impl Drop for ProcessId {
    fn drop(&mut self) {
        // SAFETY: By the invariant there is a reference to give up.
        unsafe { raw::put_pid(self.0.as_ptr()) };
    }
}

/// A cgroup of the unified hierarchy.
///
/// # Invariants
///
/// Owns a reference.
pub(crate) struct Cgroup(NonNull<raw::cgroup>);

// SAFETY: A reference may be given up by every thread.
unsafe impl Send for Cgroup {}
// SAFETY: A shared reference gives nothing but the address.
unsafe impl Sync for Cgroup {}

impl Cgroup {
    /// Looks a cgroup up by its path below the cgroup namespace of the current task.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ENOENT` if there is none, or no unified hierarchy.
    pub(crate) fn at(path: &CStr) -> Result<Self> {
        // SAFETY: The path is a C string.
        let cgroup = from_err_ptr(unsafe { raw::cgroup_get_from_path(path.as_char_ptr()) })?;
        // INVARIANT: The reference is passed on.
        NonNull::new(cgroup).map(Self).ok_or(ENOENT)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // SAFETY: By the invariant there is a reference to give up.
        unsafe { raw::rksm_cgroup_put(self.0.as_ptr()) };
    }
}
