// SPDX-License-Identifier: GPL-2.0-only

//! What processes, scanner, reaper and unload do with the registry, each step under its lock.
//!
//! The rules that keep an mm from being used or freed at the wrong moment are kept here once, and
//! the host's models run this very code: an mm is dropped only after unlocking, the scanner's mmap
//! lock is gone before its claim is, and exit waits for nobody.

use super::{
    registry::{
        Chunk,
        Claim,
        Dead,
        Enter,
        Exit,
        Next,
        PinnedMm,
        Registry, //
    },
    types::SlotId,
};

use kernel::{
    alloc::{
        flags::__GFP_NOWARN,
        Flags, //
    },
    prelude::*, //
};

/// What the caller of [`MmList::enter`] has to see to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entered {
    /// This is the first mm: wake the scanner.
    pub wake_scanner: bool,
    /// Have [`MmList::refill`] called, where memory can be allocated. If the mm itself found no
    /// room, [`Registry::take_missed`] says so too.
    pub refill: bool,
}

/// How far a visit came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Up to this address; the next visit goes on there.
    At(usize),
    /// To the end of the mm.
    Done,
    /// Nowhere: the mm is exiting. It is unregistered if its exit has not been reported yet.
    Exiting,
}

/// What a visit left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visited {
    /// How far it came.
    pub progress: Progress,
    /// Whether there is page state for the mm now.
    pub tracked: bool,
}

/// What came of [`MmList::visit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// An mm was visited. If `reap` is set it has left, and [`MmList::reap`] is due.
    Visited {
        /// The mm has left.
        reap: bool,
    },
    /// Every mm has been visited: the full scan is over.
    End,
    /// No full scan is under way.
    Idle,
}

/// The registry behind its spinlock, `mmlist_lock`.
pub trait MmList {
    /// A pinned mm.
    type Mm: PinnedMm;

    /// Calls `f` with the lock held. `f` does not sleep, and drops no mm.
    fn locked<R>(&self, f: impl FnOnce(&mut Registry<Self::Mm>) -> R) -> R;

    /// Registers an mm. Does not sleep.
    fn enter(&self, mm: Self::Mm) -> Entered {
        // What is not kept of the mm is dropped at the end, after unlocking.
        match self.locked(|registry| registry.enter(mm)) {
            Enter::Registered { was_empty, low } => Entered {
                wake_scanner: was_empty,
                refill: low,
            },
            Enter::NoRoom(_) => Entered {
                wake_scanner: false,
                refill: true,
            },
            Enter::AlreadyThere(_) | Enter::Exiting(_) => Entered::default(),
        }
    }

    /// Unregisters an mm that exits. Does not sleep, and waits for nobody.
    ///
    /// Returns whether [`MmList::reap`] is due now.
    fn exit(&self, key: usize) -> bool {
        match self.locked(|registry| registry.exit(key)) {
            Exit::NotFound | Exit::Freed(_) => false,
            Exit::Deferred { reap } => reap,
        }
    }

    /// Makes room for more mms, if it runs low.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory for it.
    fn refill(&self, flags: Flags) -> Result {
        while let Some(number) = self.locked(|registry| registry.wanted()) {
            // What fails is tried again soon, so the kernel need not tell of it each time.
            let chunk = Chunk::new(number, flags | __GFP_NOWARN)?;
            // Somebody else may have been quicker; what is too much is freed after unlocking.
            drop(self.locked(|registry| registry.add_chunk(chunk)));
        }
        Ok(())
    }

    /// Visits the mm at the cursor: `scan` scans it, or unmerges it, or finds it exiting.
    ///
    /// `scan` drops the mmap lock before it returns; the lock's guard cannot outlive it, as it
    /// borrows from the claim. The caller holds the lock that protects the page state.
    fn visit(&self, scan: impl FnOnce(&Claim<Self::Mm>) -> Visited) -> Step {
        let claim = match self.locked(|registry| registry.claim()) {
            Next::Visit(claim) => claim,
            Next::End => return Step::End,
            Next::Idle => return Step::Idle,
        };
        let Visited { progress, tracked } = scan(&claim);
        let released = self.locked(|registry| {
            match progress {
                Progress::At(address) => registry.move_to(&claim, address),
                Progress::Done => registry.advance(&claim),
                Progress::Exiting => {
                    registry.expel(&claim);
                }
            }
            registry.release(claim, tracked)
        });
        // With it goes the claim's own pin.
        Step::Visited {
            reap: released.reap,
        }
    }

    /// Visits every mm with `unmerge`, those included that enter meanwhile, until one fails.
    ///
    /// A full scan that was under way is over. The caller holds the lock that keeps the scanner
    /// out.
    ///
    /// # Errors
    ///
    /// That of `unmerge`.
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

    /// Lets go of the mms that have left. `forget` drops their page state.
    ///
    /// The caller holds the lock that protects the page state.
    fn reap(&self, mut forget: impl FnMut(SlotId, &Self::Mm)) {
        while let Some(dead) = self.locked(|registry| registry.pop_dead()) {
            self.forget(dead, &mut forget);
        }
    }

    /// Lets go of all mms, for the end of the module. `forget` drops their page state.
    ///
    /// The scanner has stopped; processes may still enter and exit.
    fn clear(&self, mut forget: impl FnMut(SlotId, &Self::Mm)) {
        while let Some(dead) = self.locked(|registry| registry.drain()) {
            self.forget(dead, &mut forget);
        }
    }

    /// Drops the page state of one mm that has left, and then the mm.
    fn forget(&self, dead: Dead<Self::Mm>, forget: &mut impl FnMut(SlotId, &Self::Mm)) {
        forget(dead.id(), dead.mm());
        drop(self.locked(|registry| registry.free(dead)));
    }
}
