// SPDX-License-Identifier: GPL-2.0-only

//! Applying the rules: while there are any, `rksmd` looks at all processes once a second.
//!
//! No tracepoint tells of a process that joins a cgroup in every case (`CLONE_INTO_CGROUP`), and
//! fork and exec copy the flags of an mm long before it can be found. A process that is looked at
//! again and again is not missed.

use crate::{
    engine::{
        control::rules::{
            Action,
            Rules, //
        },
        mm_list::{
            MmList,
            Step, //
        },
        types::MmPin, //
    },
    kernel_ext::{
        mm::{
            merges_any,
            PinnedMm, //
        },
        process::{
            for_each_process,
            Cgroup,
            ProcessId, //
        }, //
    },
    ksm::unmerge,
    service::Ksm, //
};
use core::ops::Range;
use kernel::{
    prelude::*,
    sync::atomic::Relaxed,
    time::{
        msecs_to_jiffies,
        Jiffies,
        Msecs,
        NSEC_PER_MSEC,
        NSEC_PER_SEC, //
    }, //
};

/// Nanoseconds from one sweep to the next.
const INTERVAL: i64 = NSEC_PER_SEC;

/// Most mms that one sweep enables or excludes. If there are more, the next one follows at once.
const AT_ONCE: usize = 64;

/// Nanoseconds for which merged pages are given back at a time.
const UNMERGE_NSECS: i64 = 2_000_000;

/// What `rksmd` remembers of the sweeps.
pub(crate) struct Sweeper {
    /// When the next one is due, ns since the load.
    next_at: i64,
    /// Number of the last one.
    number: u32,
    /// An mm may be excluded.
    any_excluded: bool,
    /// There are mms to exclude for which the last sweep had no room.
    more_to_exclude: bool,
    /// The cgroups of the rules, as long as there are any by their paths.
    cgroups: KVVec<Option<Cgroup>>,
    /// Mms to enable.
    enabling: KVec<PinnedMm>,
    /// Mms that have been excluded, and what is to be unmerged yet.
    leaving: KVec<(PinnedMm, Range<usize>)>,
}

/// How far an mm that is excluded has come.
enum Leaving {
    /// Nothing is merged any more.
    Done,
    /// Something is.
    Begun,
    /// Nothing can be done now.
    Later,
}

/// When `rksmd` has to come back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// At once.
    Now,
    /// At this time, ns since the load.
    At(i64),
    /// When a rule is set.
    Never,
}

impl Due {
    /// Returns the earlier of two times.
    pub(super) fn min(self, other: Self) -> Self {
        match (self, other) {
            (Self::Now, _) | (_, Self::Now) => Self::Now,
            (Self::At(a), Self::At(b)) => Self::At(a.min(b)),
            (Self::Never, at) | (at, Self::Never) => at,
        }
    }

    /// Jiffies until then, `None` where there is no such time.
    pub(super) fn jiffies(self, now: i64) -> Option<Jiffies> {
        match self {
            Self::Now => Some(0),
            Self::At(at) => {
                let ms = (at.saturating_sub(now).max(0) + NSEC_PER_MSEC - 1) / NSEC_PER_MSEC;
                Some(msecs_to_jiffies(Msecs::try_from(ms).unwrap_or(Msecs::MAX)))
            }
            Self::Never => None,
        }
    }
}

impl Sweeper {
    /// Begins without rules.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            next_at: i64::MAX,
            number: 0,
            any_excluded: false,
            more_to_exclude: false,
            cgroups: KVVec::new(),
            enabling: KVec::with_capacity(AT_ONCE, GFP_KERNEL)?,
            leaving: KVec::with_capacity(AT_ONCE, GFP_KERNEL)?,
        })
    }

    /// Looks the cgroups of the rules up. A unit that is started again has a new one.
    fn resolve(&mut self, rules: &Rules<ProcessId>) -> Result {
        self.cgroups.clear();
        for path in rules.cgroups() {
            self.cgroups
                .push(Cgroup::at(path.as_c_str()).ok(), GFP_KERNEL)?;
        }
        Ok(())
    }

    fn due(&self) -> Due {
        match self.next_at {
            i64::MAX => Due::Never,
            at => Due::At(at),
        }
    }
}

impl Ksm {
    /// Applies the rules, if that is due, and unmerges some pages of what they exclude.
    ///
    /// # Context
    ///
    /// May sleep. Takes `rules`, `thread_mutex` and the mmap locks of processes, one after the
    /// other, and waits for no mmap lock.
    pub(super) fn apply_rules(&self, sweeper: &mut Sweeper) -> Due {
        let now = self.now();
        let changed = self.sweep_due.load(Relaxed);
        if changed || now >= sweeper.next_at {
            self.sweep_due.store(false, Relaxed);
            sweeper.next_at = now.saturating_add(INTERVAL);
            if let Ok(more_to_enable) = self.sweep(sweeper) {
                // Where none could be enabled the next sweep would find the same ones.
                if self.enable(sweeper) && more_to_enable {
                    sweeper.next_at = now;
                }
            }
        }
        if self.exclude(sweeper) {
            return Due::Now;
        }
        if !sweeper.leaving.is_empty() {
            return Due::At(sweeper.next_at.min(now.saturating_add(INTERVAL)));
        }
        if core::mem::take(&mut sweeper.more_to_exclude) {
            sweeper.next_at = now;
        }
        sweeper.due()
    }

    /// Looks at all processes. Returns whether there are more to enable than there was room for.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; nothing has changed.
    fn sweep(&self, sweeper: &mut Sweeper) -> Result<bool> {
        let mut rules = self.rules.lock();
        rules.retain_processes(ProcessId::is_there);
        if rules.is_empty() && !sweeper.any_excluded {
            sweeper.cgroups = KVVec::new();
            sweeper.next_at = i64::MAX;
            return Ok(false);
        }
        sweeper.resolve(&rules)?;
        sweeper.number = sweeper.number.wrapping_add(1).max(1);
        let number = sweeper.number;
        let (mut more_to_enable, mut more_to_exclude, mut any_excluded) = (false, false, false);
        rules.begin_sweep();
        for_each_process(|running| {
            let inside =
                |i| matches!(sweeper.cgroups.get(i), Some(Some(cgroup)) if running.is_in(cgroup));
            let action = rules.decide(|id| running.is(id), inside);
            // A process without an mm of its own is left to the next sweep.
            let _ = match action {
                Action::Default => Ok(()),
                Action::Always => running.process().with_own_mm(|mm| {
                    if !merges_any(mm) {
                        let room = sweeper.enabling.len() < sweeper.enabling.capacity();
                        more_to_enable |= !room;
                        if room {
                            let _ = sweeper.enabling.push_within_capacity(PinnedMm::mmgrab(mm));
                        }
                    }
                }),
                Action::Never => running.process().with_own_mm(|mm| {
                    let room = sweeper.leaving.len() < sweeper.leaving.capacity();
                    let key = mm.as_raw() as usize;
                    let new = self.locked(|registry| registry.exclude(key, number, room));
                    any_excluded |= new.is_some();
                    more_to_exclude |= new == Some(true) && !room;
                    if new == Some(true) && room {
                        let all = (PinnedMm::mmgrab(mm), 0..usize::MAX);
                        let _ = sweeper.leaving.push_within_capacity(all);
                    }
                }),
            };
        });
        rules.end_sweep();
        drop(rules);
        if sweeper.any_excluded {
            self.readmit(number);
        }
        (sweeper.any_excluded, sweeper.more_to_exclude) = (any_excluded, more_to_exclude);
        Ok(more_to_enable)
    }

    /// Makes all memory of those mergeable for whom a rule says so. Those that hold their mmap lock
    /// are left to the next sweep, as are all if there is no memory. Returns whether there was any
    /// for whom that was done.
    fn enable(&self, sweeper: &mut Sweeper) -> bool {
        let mut enabled = false;
        for mm in sweeper.enabling.drain_all() {
            let Some(user) = mm.mmget_not_zero() else {
                continue;
            };
            if let Some(guard) = user.mmap_write_trylock() {
                enabled |= guard.ksm_enable_merge_any(self.symbols).is_ok();
            };
        }
        enabled
    }

    /// Gives merged pages of mms back that a rule excludes, for some time. Returns whether more can
    /// be done now.
    fn exclude(&self, sweeper: &mut Sweeper) -> bool {
        for i in (0..sweeper.leaving.len()).rev() {
            let Some((mm, range)) = sweeper.leaving.get_mut(i) else {
                continue;
            };
            match self.exclude_some(mm, range) {
                Leaving::Done => {
                    // Nothing more is to be done for it, whatever comes of this.
                    let _ = sweeper.leaving.remove(i);
                    return !sweeper.leaving.is_empty();
                }
                Leaving::Begun => return true,
                // The next sweep is early enough.
                Leaving::Later => {}
            }
        }
        false
    }

    /// Gives some merged pages of an mm back.
    fn exclude_some(&self, mm: &PinnedMm, range: &mut Range<usize>) -> Leaving {
        if !self.locked(|registry| registry.is_excluded(mm.key())) {
            // It has left, or been readmitted.
            return Leaving::Done;
        }
        if range.start == 0 {
            // What merges pages of the mm right now is over then.
            self.hold_scan_state(|_, _| ());
        }
        let begun = self.now();
        let mut busy = true;
        let pause = || {
            busy = false;
            self.now() - begun > UNMERGE_NSECS
        };
        match unmerge::unmerge_range(mm, range, &mut 0, false, pause) {
            Ok(true) => {}
            Ok(false) if !busy => return Leaving::Begun,
            // It holds its mmap lock, or memory is short.
            Ok(false) | Err(_) => return Leaving::Later,
        }
        let mut forgotten = true;
        let step = self.hold_scan_state(|state, hold| {
            self.visit_key(mm.key(), |claim| {
                let metadata = &mut state.engine.metadata;
                let pause = || self.is_over(hold);
                if claim.is_passed_over() {
                    forgotten = metadata.forget_some(claim.id(), claim.mm(), pause);
                }
                metadata.tracks(claim.id())
            })
        });
        if step == (Step::Visited { reap: true }) {
            self.housekeeping_due.store(true, Relaxed);
        }
        match forgotten {
            true => Leaving::Done,
            false => Leaving::Begun,
        }
    }
}
