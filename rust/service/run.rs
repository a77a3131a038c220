// SPDX-License-Identifier: GPL-2.0-only

//! What a write to `run`, `merge_across_nodes` or `max_page_sharing` does.

use crate::{
    engine::{
        governor::{
            pause::tick_at,
            watch::Watch, //
        },
        mm_list::{
            MmList,
            Visited, //
        },
        sysfs::knobs::{
            Action,
            Change,
            RunState,
            StoreCtx,
            RUN_OFFLINE, //
        },
        types::Progress, //
    },
    kernel_ext::{
        gfp::GFP_METADATA,
        oom::OomOrigin,
        wait::signal_pending, //
    },
    ksm::unmerge,
    service::{
        Ksm,
        ScanState, //
    },
    takeover::builtin, //
};
use kernel::prelude::*;

// Neither layer may know the other, and both keep the bit.
const _: () = assert!(RUN_OFFLINE == builtin::RUN_OFFLINE);

impl Ksm {
    /// Applies a change that needs the scanner to stand still.
    ///
    /// # Errors
    ///
    /// `EBUSY` while pages are merged, or those of [`Self::unmerge_all`].
    pub(super) fn change_excluding_scanner(&self, state: &mut ScanState, change: Change) -> Result {
        let ctx = StoreCtx {
            pages_shared: state.engine.metadata.counters.pages_shared,
            cpus: 0,
        };
        let action = self.published.lock().knobs.apply(change, &ctx)?;
        match action {
            Action::Done => Ok(()),
            Action::WakeIter => {
                self.wake_governed();
                Ok(())
            }
            Action::RunChanged => {
                let run = self.knobs().run;
                self.builtin.set_unmerging(run == RunState::Unmerge);
                if run == RunState::Merge {
                    self.thread_wait.wake_up_interruptible();
                }
                Ok(())
            }
            Action::Unmerge => {
                self.builtin.set_unmerging(true);
                self.unmerge_all(state).inspect_err(|_| {
                    self.published.lock().knobs.unmerge_failed();
                    self.builtin.set_unmerging(false);
                })
            }
            Action::RemoveNodes(pending) => {
                if !state.engine.metadata.remove_all_nodes() {
                    return Err(EBUSY);
                }
                self.published.lock().knobs.commit(pending);
                Ok(())
            }
        }
    }

    /// Unmerges all that is merged.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, `ERESTARTSYS` where a signal is pending.
    fn unmerge_all(&self, state: &mut ScanState) -> Result {
        let origin = OomOrigin::new();
        let mut result = self.unmerge_registered(state);
        // Children that found no slot while their parents were unmerged inherited merged pages.
        while result.is_ok() && self.locked(|registry| registry.take_missed()) {
            result = self
                .register_all()
                .and_then(|()| self.unmerge_registered(state));
            if result.is_err() {
                self.locked(|registry| registry.mark_missed());
            }
        }
        drop(origin);
        let metadata = &mut state.engine.metadata;
        let forget = |slot, mm: &_| metadata.forget_some(slot, mm, signal_pending);
        if !self.reap(forget, signal_pending) {
            self.kick_housekeeping();
            result = result.and(Err(ERESTARTSYS));
        }
        let tick = tick_at(self.now());
        self.for_all_slots(|registry, from, count| {
            registry.watch_in(from, count, tick, |_, _, watch| Watch::forget(watch))
        });
        result?;
        // Nodes of pages that are just going, with their last process, are left to `prune`.
        state.engine.metadata.remove_all_nodes();
        state.engine.metadata.counters.full_scans = 0;
        Ok(())
    }

    /// Unmerges the mms that are registered, or become so meanwhile.
    fn unmerge_registered(&self, state: &mut ScanState) -> Result {
        MmList::unmerge(self, |claim| {
            unmerge::unmerge_mm(claim.mm())?;
            let metadata = &mut state.engine.metadata;
            if !metadata.forget_some(claim.id(), claim.mm(), signal_pending) {
                return Err(ERESTARTSYS);
            }
            self.publish(state);
            self.refill(GFP_METADATA)?;
            Ok(Visited {
                progress: Progress::Done,
                tracked: false,
            })
        })
    }
}
