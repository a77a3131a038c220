// SPDX-License-Identifier: GPL-2.0-only

//! `/dev/rksm`: what programs outside ask for. Each call works in the caller's task, so that its
//! CPU time is charged to who asked.

use crate::{
    engine::{
        control::{
            cgroup_path::CgroupPath,
            layout,
            reply::{
                ListReply,
                MergeReply,
                Opted,
                RuleRecord,
                StatRecord,
                UnmergeReply,
                WhyReply, //
            },
            request::{
                self,
                Call,
                Change,
                ListRequest,
                MergeRequest,
                Request,
                RuleRequest,
                UnmergeRequest,
                WhyRequest, //
            },
            rules::Subject, //
        },
        mm_list::{
            MmList,
            Step,
            SLOTS_AT_ONCE, //
        },
        pace::Hold,
        policy::Policy,
        registry::Claim,
        scan::{
            Allowance,
            ScanTarget, //
        },
        sysfs::knobs::RunState,
        types::{
            MmPin,
            Progress,
            Refusals, //
        },
        why::{
            Reasons,
            WHY_PAGES, //
        }, //
    },
    kernel_ext::{
        compat,
        device::DeviceCalls,
        folio,
        mm::PinnedMm,
        process::{
            capable_sys_admin,
            Process, //
        },
        wait::signal_pending, //
    },
    ksm::{
        backend,
        batch::Batch,
        unmerge,
        worker_pool::KthreadPool, //
    },
    service::{
        pass_buffers,
        scanner::BUSY_USECS,
        Ksm,
        ScanState,
        SLICE, //
    }, //
};
use core::ops::Range;
use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    time::{
        delay::fsleep,
        Delta, //
    },
    uaccess::{
        UserPtr,
        UserSlice, //
    }, //
};

/// Most bytes of records that one call returns.
const RECORDS: usize = 64 << 10;

/// Keeps the scanner out of an mm while this lives.
struct KeptOut<'a> {
    ksm: &'a Ksm,
    /// Pinned: no other mm has its key.
    mm: &'a PinnedMm,
}

impl<'a> KeptOut<'a> {
    /// Begins, if the mm is registered.
    fn begin(ksm: &'a Ksm, mm: &'a PinnedMm) -> Option<Self> {
        ksm.locked(|registry| registry.keep_out(mm.key()))
            .then_some(Self { ksm, mm })
    }
}

impl Drop for KeptOut<'_> {
    fn drop(&mut self) {
        self.ksm.locked(|registry| registry.let_in(self.mm.key()));
    }
}

impl DeviceCalls for Ksm {
    fn open(&self) -> Result {
        if capable_sys_admin() {
            Ok(())
        } else {
            Err(EPERM)
        }
    }

    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize> {
        let call = Call::from_cmd(cmd)?;
        let user = |len| UserSlice::new(UserPtr::from_addr(arg), len);
        let mut size = [0; 4];
        user(size.len()).reader().read_slice(&mut size)?;
        let len = call.check_size(u32::from_ne_bytes(size))?;
        let mut argument = KVec::new();
        user(len).read_all(&mut argument, GFP_KERNEL)?;
        let result = match Request::parse(call, &argument)? {
            Request::Rule(request) => return self.change_rule(request).map(|()| 0),
            Request::Rules(request) => self.list_rules(&request, &mut argument),
            Request::Merge(request) => self.merge_now(&request, &mut argument),
            Request::Unmerge(request) => self.unmerge_now(&request, &mut argument),
            Request::Stat(request) => self.list_stats(&request, &mut argument),
            Request::Why(request) => self.say_why(&request, &mut argument),
        };
        // Also with an error: the counts of what was done are in it.
        user(len).writer().write_slice(&argument)?;
        result.map(|()| 0)
    }
}

impl Ksm {
    /// `RKSM_IOC_RULE`.
    fn change_rule(&self, request: RuleRequest) -> Result {
        let subject = match request.subject {
            request::Subject::Process(pidfd) => {
                Subject::Process(Process::of_pidfd(self.symbols, pidfd)?.as_ref().id()?)
            }
            request::Subject::Cgroup { addr, len } => {
                let mut path = KVec::new();
                UserSlice::new(UserPtr::from_addr(addr), len).read_all(&mut path, GFP_KERNEL)?;
                Subject::Cgroup(CgroupPath::new(path, GFP_KERNEL)?)
            }
        };
        let mut rules = self.rules.lock();
        let before = rules.revision();
        match request.change {
            Change::Set(action) => rules.set(subject, action, GFP_KERNEL)?,
            Change::Remove => rules.remove(&subject)?,
        }
        if rules.revision() != before {
            drop(rules);
            self.kick_sweep();
        }
        Ok(())
    }

    /// `RKSM_IOC_RULES`.
    fn list_rules(&self, request: &ListRequest, argument: &mut [u8]) -> Result {
        let mut records = Records::new(request)?;
        let mut cursor = request.cursor;
        for rule in self.rules.lock().list(request.cursor) {
            let record = RuleRecord {
                action: rule.action,
                pid: rule.process.map_or(0, |process| process.number()),
                processes: rule.processes,
                path: rule.cgroup.map_or(&[], CgroupPath::as_bytes),
            };
            if !records.add(|free| record.encode(free)) {
                break;
            }
            cursor = rule.next;
        }
        records.finish(cursor, argument)
    }

    /// `RKSM_IOC_STAT`.
    fn list_stats(&self, request: &ListRequest, argument: &mut [u8]) -> Result {
        let mut records = Records::new(request)?;
        let mut next = u32::try_from(request.cursor).ok();
        let mut found = KVec::with_capacity(SLOTS_AT_ONCE as usize, GFP_KERNEL)?;
        while let Some(from) = next.filter(|_| !records.full) {
            next = self.with_scan_state_interruptible(|state, hold| {
                found.clear();
                let behind = self.locked(|registry| {
                    registry.visit_in(from, SLOTS_AT_ONCE, |slot, mm, excluded| {
                        let record = StatRecord {
                            opted: Opted {
                                excluded,
                                merge_any: mm.merges_any(),
                            },
                            pid: mm.pid(),
                            zero: u64::try_from(backend::zero_pages(mm)).unwrap_or(0),
                            ..StatRecord::default()
                        };
                        found.push_within_capacity((slot, record)).is_ok()
                    })
                });
                // Not under the spinlock: a large process takes some time. Its slot stays, as the
                // scan state is held.
                for &(slot, mut record) in &found {
                    let stats = state.engine.metadata.mm_stats(slot);
                    (record.merged, record.unique) = (stats.pages.merged, stats.pages.unique);
                    (record.changing, record.fresh) = (stats.pages.changing, stats.pages.fresh);
                    record.broken = stats.broken.into();
                    record.refused = layout::refused(&stats.refusals);
                    if !records.add(|free| record.encode(free)) {
                        return Some(slot.0);
                    }
                    if self.is_over(hold) {
                        return Some(slot.0 + 1);
                    }
                }
                behind
            })?;
        }
        records.finish(next.map_or(u64::MAX, u64::from), argument)
    }

    /// `RKSM_IOC_MERGE`.
    fn merge_now(&self, request: &MergeRequest, argument: &mut [u8]) -> Result {
        let mm = self.mm_of(request.pidfd)?;
        let mut at = request.range.start;
        let mut reply = MergeReply::default();
        let result = self
            .prepare_merge(&mm, request.enable)
            .and_then(|()| self.merge_range(&mm, &mut at, request.range.end, &mut reply));
        reply.at = at as u64;
        reply.encode(argument);
        result
    }

    /// Has the pages of an mm be as ready to be merged as they can be.
    fn prepare_merge(&self, mm: &PinnedMm, enable: bool) -> Result {
        if self.locked(|registry| registry.is_excluded(mm.key())) {
            return Err(EPERM);
        }
        if enable {
            let user = mm.mmget_not_zero().ok_or(ESRCH)?;
            user.mmap_write_lock_killable()?
                .ksm_enable_merge_any(self.symbols)?;
        }
        // Otherwise pages that have just been faulted in count as pinned.
        folio::lru_add_drain_all(self.symbols);
        Ok(())
    }

    /// The own mm of the process that a pidfd is for.
    fn mm_of(&self, pidfd: i32) -> Result<PinnedMm> {
        Process::of_pidfd(self.symbols, pidfd)?.as_ref().own_mm()
    }

    /// Merges the pages of an mm from `at` to `end`, and adds what it has done to `reply`.
    fn merge_range(
        &self,
        mm: &PinnedMm,
        at: &mut usize,
        end: usize,
        reply: &mut MergeReply,
    ) -> Result {
        let (mut buffers, pool) = (pass_buffers(1)?, KthreadPool::new()?);
        self.in_slices(mm, at, end, |state, claim, within, hold| {
            if claim.is_excluded() {
                return Err(EPERM);
            }
            if claim.is_passed_over() {
                // Somebody unmerges it.
                return Ok(Progress::Busy(within.start));
            }
            if self.knobs().run == RunState::Unmerge {
                return Err(EBUSY);
            }
            let policy = Policy {
                vouched: true,
                ..self.policy()
            };
            let metadata = &state.engine.metadata;
            let (counters, refusals) = (metadata.counters, metadata.refusals);
            let target = ScanTarget {
                slot: claim.id(),
                mm: claim.mm(),
                within,
                look: None,
            };
            let mut allowance = Allowance {
                budget: SLICE,
                pause: || self.is_over(hold) || signal_pending(),
            };
            let progress =
                state
                    .engine
                    .scan_mm(&policy, self, &target, &pool, &mut buffers, &mut allowance);
            let metadata = &state.engine.metadata;
            let merges = metadata.counters.merges.since(&counters.merges);
            let scanned = metadata.counters.pages_scanned;
            reply.scanned += scanned.wrapping_sub(counters.pages_scanned);
            reply.merged += merges.merged;
            reply.zeroed += merges.zeroed;
            reply.bytes_saved += (merges.saved * PAGE_SIZE as u64) as i64;
            add_since(&mut reply.refused, &metadata.refusals, &refusals);
            Ok(progress)
        })
    }

    /// `RKSM_IOC_UNMERGE`.
    fn unmerge_now(&self, request: &UnmergeRequest, argument: &mut [u8]) -> Result {
        let mm = self.mm_of(request.pidfd)?;
        // Otherwise the scanner merges again what is unmerged.
        let kept_out = KeptOut::begin(self, &mm);
        if kept_out.is_some() {
            // What merges pages of the mm right now is over then.
            self.with_scan_state_interruptible(|_, _| ())?;
        }
        let mut range = request.range.clone();
        let mut reply = UnmergeReply::default();
        let unmerged =
            unmerge::unmerge_range(&mm, &mut range, &mut reply.pages, true, || false).map(|_| ());
        let mut at = request.range.start;
        let forgotten = match kept_out {
            Some(_) => self.forget(&mm, &mut at, range.start),
            None => {
                at = range.start;
                Ok(())
            }
        };
        reply.at = at as u64;
        reply.encode(argument);
        unmerged.map_err(interrupted)?;
        forgotten?;
        if request.disable {
            let user = mm.mmget_not_zero().ok_or(ESRCH)?;
            let guard = user.mmap_write_lock_killable()?;
            guard.ksm_disable(self.symbols).map_err(interrupted)?;
        }
        Ok(())
    }

    /// Forgets what is known of pages that have been unmerged, so that they do not count as broken.
    /// All up to `at` has been done then, also with an error.
    fn forget(&self, mm: &PinnedMm, at: &mut usize, end: usize) -> Result {
        self.in_slices(mm, at, end, |state, claim, within, hold| {
            let pause = || self.is_over(hold) || signal_pending();
            let start = within.start;
            let metadata = &mut state.engine.metadata;
            Ok(
                match metadata.forget_range(claim.id(), claim.mm(), within, pause) {
                    true => Progress::Done,
                    false => Progress::At(start),
                },
            )
        })
        // One that is exiting is forgotten anyway.
        .or_else(|error| {
            if error != ESRCH {
                return Err(error);
            }
            *at = end;
            Ok(())
        })
    }

    /// `RKSM_IOC_WHY`.
    fn say_why(&self, request: &WhyRequest, argument: &mut [u8]) -> Result {
        let mm = self.mm_of(request.pidfd)?;
        folio::lru_add_drain_all(self.symbols);
        let (mut at, mut reasons) = (request.at, Reasons::default());
        let mut batch = Batch::new(WHY_PAGES)?;
        let mut excluded = false;
        let result = self.in_slices(&mm, &mut at, usize::MAX, |state, claim, within, hold| {
            excluded = claim.is_excluded();
            let target = ScanTarget {
                slot: claim.id(),
                mm: claim.mm(),
                within,
                look: None,
            };
            let pause = || self.is_over(hold) || signal_pending();
            Ok(state.engine.why(&target, &mut batch, &mut reasons, pause))
        });
        let bytes = |pages: u64| pages * PAGE_SIZE as u64;
        let reply = WhyReply {
            opted: Opted {
                excluded,
                merge_any: mm.merges_any(),
            },
            at: at as u64,
            merged: bytes(reasons.merged),
            zero: bytes(reasons.zero),
            pinned: bytes(reasons.pinned),
            unsplit: bytes(reasons.unsplit),
            unique: bytes(reasons.unique),
            changing: bytes(reasons.changing),
            fresh: bytes(reasons.fresh),
        };
        reply.encode(argument);
        result
    }
}

impl Ksm {
    /// Calls `visit` with a registered mm and the addresses from `at` to `end`, again and again,
    /// until it has come to the end. Others get the scan state in between.
    ///
    /// # Context
    ///
    /// May sleep. Takes `thread_mutex`.
    ///
    /// # Errors
    ///
    /// `ENODATA` if the mm is not registered, `ESRCH` if it is exiting, `EINTR` if a signal came.
    /// Those of `visit`. All up to `at` has been done then.
    fn in_slices<F>(&self, mm: &PinnedMm, at: &mut usize, end: usize, mut visit: F) -> Result
    where
        F: FnMut(&mut ScanState, &Claim<PinnedMm>, Range<usize>, Hold) -> Result<Progress>,
    {
        while *at < end {
            if signal_pending() {
                return Err(EINTR);
            }
            let mut progress = Err(compat::no_data());
            self.with_scan_state_interruptible(|state, hold| {
                let step = self.visit_key(mm.key(), |claim| {
                    progress = visit(state, claim, *at..end, hold);
                    state.engine.metadata.tracks(claim.id())
                });
                if step == (Step::Visited { reap: true }) {
                    self.kick_housekeeping();
                }
            })?;
            match progress {
                Ok(Progress::At(next)) => *at = next,
                Ok(Progress::Busy(next)) => {
                    *at = next;
                    fsleep(Delta::from_micros(BUSY_USECS));
                }
                Ok(Progress::Done) => *at = end,
                Ok(Progress::Exiting) => return Err(ESRCH),
                Err(_) if mm.exiting() => return Err(ESRCH),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// A signal has come while something was done that is not done again by itself.
fn interrupted(error: Error) -> Error {
    if error == ERESTARTSYS {
        EINTR
    } else {
        error
    }
}

/// Adds what has been refused between two counts.
fn add_since(sum: &mut [u64; layout::NR_REFUSALS], after: &Refusals, before: &Refusals) {
    let counts = layout::refused(after).into_iter();
    for (sum, (after, before)) in sum.iter_mut().zip(counts.zip(layout::refused(before))) {
        *sum += after.wrapping_sub(before);
    }
}

/// The records that one call returns.
struct Records {
    /// Where the caller wants them.
    addr: usize,
    bytes: KVec<u8>,
    used: usize,
    count: u32,
    /// There was no room for the last one.
    full: bool,
}

impl Records {
    /// Begins without records, with the room that the caller has.
    fn new(request: &ListRequest) -> Result<Self> {
        Ok(Self {
            addr: request.addr,
            bytes: KVec::from_elem(0, request.len.min(RECORDS), GFP_KERNEL)?,
            used: 0,
            count: 0,
            full: false,
        })
    }

    /// Adds a record, which `encode` writes to the free room, if there is enough. Returns whether
    /// there was.
    fn add(&mut self, encode: impl FnOnce(&mut [u8]) -> Option<usize>) -> bool {
        let free = self.bytes.get_mut(self.used..).unwrap_or_default();
        match encode(free) {
            Some(size) => {
                self.used += size;
                self.count += 1;
            }
            None => self.full = true,
        }
        !self.full
    }

    /// Gives the records to the caller, who goes on at `cursor`.
    ///
    /// # Errors
    ///
    /// `EMSGSIZE` if there is no room for a single one, `EFAULT`.
    fn finish(&self, cursor: u64, argument: &mut [u8]) -> Result {
        if self.full && self.count == 0 {
            return Err(EMSGSIZE);
        }
        let records = self.bytes.get(..self.used).unwrap_or_default();
        UserSlice::new(UserPtr::from_addr(self.addr), self.used)
            .writer()
            .write_slice(records)?;
        let count = self.count;
        ListReply { cursor, count }.encode(argument);
        Ok(())
    }
}
