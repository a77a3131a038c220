// SPDX-License-Identifier: GPL-2.0-only

//! What processes, the scanner, the reaper and unload do with the registry, step by step.
//!
//! Each step takes `mmlist_lock` on its own. The rules that keep an mm from being used or freed at
//! the wrong moment are here once, and the models of `tools/testing/host/models` run this code: an
//! mm is dropped only after unlocking, the scanner drops the mmap lock before its claim, and an
//! exit waits for no other thread.

use super::{
    governor::watch::Watch,
    registry::{
        Claim,
        Enter,
        Exit,
        Next,
        Registry,
        SlotChunk, //
    },
    types::{
        MmPin,
        Progress,
        SlotId, //
    },
};

use kernel::{
    alloc::{
        flags::__GFP_NOWARN,
        Flags, //
    },
    prelude::*, //
};

/// Most slots that are looked at under one lock.
pub const SLOTS_AT_ONCE: u32 = 64;

/// What the caller of [`MmList::enter`] has to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entered {
    /// The mm has a slot now, and had none before.
    pub registered: bool,
    /// Wake the scanner: this is the first mm.
    pub wake_scanner: bool,
    /// Arrange for a call of [`MmList::refill`], where memory can be allocated. If the mm itself
    /// found no room, [`Registry::take_missed`] returns true as well.
    pub refill: bool,
}

/// Outcome of one visit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visited {
    /// How far it has come.
    pub progress: Progress,
    /// Whether the engine has page state for the mm now.
    pub tracked: bool,
}

/// Outcome of [`MmList::visit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// An mm was visited.
    Visited {
        /// The mm has left: [`MmList::reap`] is due.
        reap: bool,
    },
    /// Every mm has been visited: the full scan is over.
    End,
    /// No full scan is in progress.
    Idle,
}

/// The registry behind its spinlock, `mmlist_lock`.
pub trait MmList {
    /// A pinned mm.
    type Mm: MmPin;

    /// Calls `f` with the lock held. `f` must not sleep and must not drop an mm.
    fn locked<R>(&self, f: impl FnOnce(&mut Registry<Self::Mm>) -> R) -> R;

    /// Registers an mm.
    ///
    /// # Context
    ///
    /// Does not sleep. Takes `mmlist_lock`.
    fn enter(&self, mm: Self::Mm) -> Entered {
        // An mm that is not kept is dropped at the end of the match, after unlocking.
        match self.locked(|registry| registry.enter(mm)) {
            Enter::Registered { was_empty, low } => Entered {
                registered: true,
                wake_scanner: was_empty,
                refill: low,
            },
            Enter::NoRoom(_) => Entered {
                refill: true,
                ..Entered::default()
            },
            Enter::AlreadyThere(_) | Enter::Exiting(_) => Entered::default(),
        }
    }

    /// Unregisters an mm that exits. Returns whether [`MmList::reap`] is due now.
    ///
    /// # Context
    ///
    /// Does not sleep and waits for no other thread. Takes `mmlist_lock`.
    fn exit(&self, key: usize) -> bool {
        match self.locked(|registry| registry.exit(key)) {
            Exit::NotFound | Exit::Freed(_) => false,
            Exit::Deferred { reap } => reap,
        }
    }

    /// Adds slots if few are free.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory for them.
    ///
    /// # Context
    ///
    /// Sleeps if `flags` allow it. Takes `mmlist_lock`.
    fn refill(&self, flags: Flags) -> Result {
        while let Some(number) = self.locked(|registry| registry.wanted()) {
            // A failed allocation is retried soon, so the kernel need not warn.
            let chunk = SlotChunk::new(number, flags | __GFP_NOWARN)?;
            // Another thread may have added this chunk first; a second one is freed after
            // unlocking.
            drop(self.locked(|registry| registry.add_chunk(chunk)));
        }
        Ok(())
    }

    /// Visits the mm at the cursor: `scan` scans it, unmerges it or finds it exiting.
    ///
    /// `scan` drops the mmap lock before it returns: the guard of that lock borrows from the claim,
    /// so it cannot outlive the visit.
    ///
    /// # Context
    ///
    /// May sleep if `scan` does. The caller holds the lock that protects the page state. Takes
    /// `mmlist_lock`.
    fn visit(&self, scan: impl FnOnce(&Claim<Self::Mm>) -> Visited) -> Step {
        let claim = match self.locked(|registry| registry.claim()) {
            Next::Visit(claim) => claim,
            Next::End => return Step::End,
            Next::Idle => return Step::Idle,
        };
        let Visited { progress, tracked } = scan(&claim);
        let released = self.locked(|registry| {
            match progress {
                Progress::At(address) | Progress::Busy(address) => {
                    registry.move_to(&claim, address);
                }
                Progress::Done => registry.advance(&claim),
                Progress::Exiting => {
                    registry.unregister(&claim);
                }
            }
            registry.release(claim, tracked)
        });
        // `released`, dropped here, has the claim's pin.
        Step::Visited {
            reap: released.reap,
        }
    }

    /// Visits the mm with `key`, if it is registered, wherever the cursor is. `visit` returns
    /// whether the engine has page state for the mm now.
    ///
    /// # Context
    ///
    /// As [`MmList::visit`].
    fn visit_key(&self, key: usize, visit: impl FnOnce(&Claim<Self::Mm>) -> bool) -> Step {
        let Some(claim) = self.locked(|registry| registry.claim_key(key)) else {
            return Step::Idle;
        };
        let tracked = visit(&claim);
        // What is dropped here has the claim's pin.
        let released = self.locked(|registry| registry.release(claim, tracked));
        Step::Visited {
            reap: released.reap,
        }
    }

    /// Visits the mm in a slot, if it is registered, wherever the cursor is. `visit` changes what
    /// the governor remembers of it.
    ///
    /// # Context
    ///
    /// As [`MmList::visit`].
    fn visit_slot(
        &self,
        slot: SlotId,
        visit: impl FnOnce(&Claim<Self::Mm>, &mut Watch) -> Visited,
    ) -> Step {
        let Some((claim, mut watch)) = self.locked(|registry| registry.claim_slot(slot)) else {
            return Step::Idle;
        };
        let Visited { progress, tracked } = visit(&claim, &mut watch);
        // What is dropped here has the claim's pin.
        let released = self.locked(|registry| {
            registry.set_watch(&claim, watch);
            if progress == Progress::Exiting {
                registry.unregister(&claim);
            }
            registry.release(claim, tracked)
        });
        Step::Visited {
            reap: released.reap,
        }
    }

    /// Visits every mm with `unmerge`, also those that enter meanwhile, until one visit fails.
    ///
    /// Ends a full scan that is in progress.
    ///
    /// # Errors
    ///
    /// That of `unmerge`.
    ///
    /// # Context
    ///
    /// May sleep if `unmerge` does. The caller holds the lock that keeps the scanner out. Takes
    /// `mmlist_lock`.
    fn unmerge(&self, mut unmerge: impl FnMut(&Claim<Self::Mm>) -> Result<Visited>) -> Result {
        let mut result = Ok(());
        self.locked(|registry| registry.unmerge_begin());
        while result.is_ok() {
            let step = self.visit(|claim| {
                unmerge(claim).unwrap_or_else(|err| {
                    result = Err(err);
                    Visited {
                        progress: Progress::At(claim.address()),
                        tracked: true,
                    }
                })
            });
            if !matches!(step, Step::Visited { .. }) {
                break;
            }
        }
        self.locked(|registry| registry.unmerge_end());
        result
    }

    /// Returns the sum of what `f` returns for each mm, those that have left included.
    ///
    /// # Context
    ///
    /// Does not sleep; `f` must not either. Takes `mmlist_lock`, each time for a bounded number of
    /// slots.
    fn sum(&self, f: impl Fn(&Self::Mm) -> isize) -> isize {
        let mut sum = 0;
        self.for_all_slots(|registry, from, count| {
            registry.for_each_in(from, count, |mm| sum += f(mm))
        });
        sum
    }

    /// Ends the exclusion of mms that were excluded, but not by this sweep.
    ///
    /// # Context
    ///
    /// As [`MmList::sum`].
    fn readmit(&self, sweep: u32) {
        self.for_all_slots(|registry, from, count| registry.readmit_in(from, count, sweep));
    }

    /// Calls `f` with the number of a slot and a count, until it returns no slot to go on with.
    ///
    /// # Context
    ///
    /// As [`MmList::sum`].
    fn for_all_slots(&self, mut f: impl FnMut(&mut Registry<Self::Mm>, u32, u32) -> Option<u32>) {
        let mut next = Some(0);
        while let Some(from) = next {
            next = self.locked(|registry| f(registry, from, SLOTS_AT_ONCE));
        }
    }

    /// Drops the mms that have left, until `pause` returns true. `forget` drops their page state,
    /// or some of it, and returns whether that was all.
    ///
    /// Returns false if more may be left: this is still due.
    ///
    /// # Context
    ///
    /// May sleep. The caller holds the lock that protects the page state. Takes `mmlist_lock`.
    fn reap(
        &self,
        mut forget: impl FnMut(SlotId, &Self::Mm) -> bool,
        pause: impl Fn() -> bool,
    ) -> bool {
        while let Some(dead) = self.locked(|registry| registry.pop_dead()) {
            if !forget(dead.id(), dead.mm()) {
                self.locked(|registry| registry.put_back(dead));
                return false;
            }
            drop(self.locked(|registry| registry.free(dead)));
            if pause() {
                return false;
            }
        }
        true
    }

    /// Drops all mms, for the end of the module. `forget` drops their page state.
    ///
    /// # Context
    ///
    /// May sleep. The scanner has stopped; processes may still enter and exit. The caller holds the
    /// lock that protects the page state. Takes `mmlist_lock`.
    fn clear(&self, mut forget: impl FnMut(SlotId, &Self::Mm)) {
        while let Some(dead) = self.locked(|registry| registry.drain()) {
            forget(dead.id(), dead.mm());
            drop(self.locked(|registry| registry.free(dead)));
        }
    }
}
