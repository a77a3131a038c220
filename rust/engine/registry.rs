// SPDX-License-Identifier: GPL-2.0-only

//! The registry: which mms take part in KSM, and in which order they are scanned.
//!
//! A registered mm has an *mm_slot*. Slots are linked in scan order and hashed by the address of
//! their `mm_struct`. The scanner has a cursor on that list. Processes come and go meanwhile, from
//! tracepoint probes that must neither sleep nor allocate.
//!
//! # Locking
//!
//! A [`Registry`] is a plain value behind one spinlock, `mmlist_lock`. That lock is a leaf: no
//! other lock is taken under it. Nothing here allocates or frees memory or drops an mm: whatever
//! leaves the registry is returned, and the caller drops it after unlocking. A dropped pin may be
//! the last one, and `mmdrop()` of the last one frees page tables and takes locks.
//!
//! One lock decides which caller removes a slot, and the other finds that it is gone: two releases
//! of one mm (a process exits, the scanner gives it up, the module unloads) cannot both remove it.
//!
//! # Life of a slot
//!
//! ```text
//!            enter                    exit: not claimed, no pages tracked
//!   Free ─────────────► Live ───────────────────────────────────────────────► Free
//!                        │ │
//!                        │ └─ exit or unregister, while claimed ──► Leaving
//!                        │                                            │ release of the last claim
//!                        ├─ exit: not claimed, pages tracked ───────► Dead
//!                        │                                            │ pop_dead
//!                        └─ drain ──────────────────────────────────► Reaping
//!                                                                     │ free
//!                                                                     ▼
//!                                                                    Free
//! ```
//!
//! Only a `Live` slot is on the scan list and in the hash. A claimed slot is never freed, so the id
//! of a slot is valid as long as a claim on it is held.
//!
//! # Claims
//!
//! The product has one scanner, `rksmd`, and one thread that unmerges. Both visit mms under
//! `thread_mutex`, so at most one claim exists at a time; the threads of `scan_threads` share the
//! work on one mm under that claim. The protocol itself counts claims and allows several: that is
//! what the models of `tools/testing/host/models` and the tests exercise, and what makes an exit
//! independent of which thread holds which lock.
//!
//! # The hash
//!
//! Linear hashing (W. Litwin, "Linear Hashing: A New Tool for File and Table Addressing", VLDB
//! 1980): it grows by one bucket with each mm and never rehashes all at once, which a probe that
//! must not allocate could not do. The buckets are in the slots themselves.
//!
//! # Examples
//!
//! A process exits while the scanner visits its mm:
//!
//! ```
//! use engine::{
//!     registry::{Enter, Exit, Next, Registry, SlotChunk},
//!     types::MmPin,
//! };
//! use kernel::prelude::*;
//!
//! struct Pin(usize);
//!
//! impl MmPin for Pin {
//!     fn key(&self) -> usize {
//!         self.0
//!     }
//!     fn exiting(&self) -> bool {
//!         false
//!     }
//!     fn clone_pin(&self) -> Self {
//!         Self(self.0)
//!     }
//! }
//!
//! let mut registry = Registry::new();
//! assert!(registry.add_chunk(SlotChunk::new(0, GFP_KERNEL)?).is_ok());
//! assert!(matches!(registry.enter(Pin(1)), Enter::Registered { .. }));
//!
//! assert!(registry.begin());
//! let Next::Visit(claim) = registry.claim() else {
//!     panic!("there is an mm to scan");
//! };
//! assert!(matches!(registry.exit(1), Exit::Deferred { reap: false }));
//! assert!(registry.release(claim, true).reap);
//!
//! let dead = registry.pop_dead().unwrap();
//! // Here the page state of the slot `dead.id()` is dropped.
//! drop(registry.free(dead));
//! assert_eq!((registry.len(), registry.nr_left()), (0, 0));
//! # Ok::<(), Error>(())
//! ```

use super::{
    governor::{
        pause::Tick,
        watch::Watch, //
    },
    types::{
        MmPin,
        SlotId, //
    }, //
};

use kernel::{
    alloc::{
        AllocError,
        Flags, //
    },
    prelude::*, //
};

/// End of a list; also the cursor between two full scans.
const NIL: u32 = u32::MAX;

/// Slots in the first chunk, as a power of two. Each further chunk is twice as large.
const FIRST_CHUNK_SHIFT: u32 = 8;

/// Largest number of chunks: 8,388,352 slots, twice the largest `pid_max`.
const MAX_CHUNKS: usize = 15;

/// More slots are wanted if fewer are free than this and an eighth of the capacity.
const LOW_WATER: u32 = 64;

/// Where a slot is in its life; see the module's description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// On the free list. Has no mm.
    Free,
    /// On the scan list and in the hash.
    Live,
    /// Its mm exited or was unregistered while the slot was claimed. On no list.
    Leaving,
    /// On the dead list until its page state is dropped.
    Dead,
    /// Off the dead list. A [`Dead`] has its mm.
    Reaping,
}

/// An mm_slot. Also holds one bucket of the hash, which has room for as many buckets as slots.
struct MmSlot<M> {
    /// Present while `Live`, `Leaving` or `Dead`.
    mm: Option<M>,
    /// `mm.key()`, for a lookup that does not touch the mm.
    key: usize,
    /// Next on the scan list (`Live`), the dead list (`Dead`) or the free list (`Free`).
    next: u32,
    /// Previous on the scan list (`Live`).
    prev: u32,
    /// Next slot of the same hash bucket (`Live`).
    chain: u32,
    /// First slot of the hash bucket that has this slot's number.
    bucket: u32,
    /// Number of claims that are held.
    claims: u32,
    state: State,
    /// Whether the engine has page state for the mm.
    tracked: bool,
    /// The sweep that has excluded the mm last, 0 if none has.
    excluded: u32,
    /// How many tasks keep the scanner out, see [`Registry::keep_out`].
    kept_out: u16,
    /// What the governor remembers of the mm.
    watch: Watch,
}

/// Free slots for a registry, allocated by the caller where it can sleep.
#[must_use = "a chunk is of use only in a registry"]
pub struct SlotChunk<M> {
    number: usize,
    slots: KVVec<MmSlot<M>>,
}

impl<M> SlotChunk<M> {
    /// Allocates chunk `number`, which [`Registry::wanted`] has returned.
    ///
    /// # Errors
    ///
    /// `AllocError` if there is no memory for it or no registry has room for such a chunk.
    ///
    /// # Context
    ///
    /// Sleeps if `flags` allow it. Not under the registry's lock.
    pub fn new(number: usize, flags: Flags) -> Result<Self, AllocError> {
        if number >= MAX_CHUNKS {
            return Err(AllocError);
        }
        let len = Self::len(number);
        let base = Self::base(number);
        let mut slots = KVVec::with_capacity(len as usize, flags)?;
        for i in 0..len {
            slots.push(
                MmSlot {
                    mm: None,
                    key: 0,
                    next: if i + 1 < len { base + i + 1 } else { NIL },
                    prev: NIL,
                    chain: NIL,
                    bucket: NIL,
                    claims: 0,
                    state: State::Free,
                    tracked: false,
                    excluded: 0,
                    kept_out: 0,
                    watch: Watch::default(),
                },
                flags,
            )?;
        }
        Ok(Self { number, slots })
    }

    /// Returns the number of slots in chunk `number`.
    const fn len(number: usize) -> u32 {
        1 << (FIRST_CHUNK_SHIFT + number as u32)
    }

    /// Returns the number of the first slot in chunk `number`.
    const fn base(number: usize) -> u32 {
        ((1 << number as u32) - 1) << FIRST_CHUNK_SHIFT
    }
}

/// Outcome of [`Registry::enter`]. The mm in it is to be dropped after unlocking.
#[must_use = "the mm in it is to be dropped after unlocking"]
#[derive(Debug)]
pub enum Enter<M> {
    /// The mm has a slot now.
    Registered {
        /// No mm was registered before: a scanner that waits for mms is to be woken.
        was_empty: bool,
        /// Free slots run low: [`Registry::wanted`] returns the chunk to add.
        low: bool,
    },
    /// The mm had a slot already.
    AlreadyThere(M),
    /// The last user of the mm is gone: its exit has been reported or will be.
    Exiting(M),
    /// There is no free slot. [`Registry::take_missed`] returns true once.
    NoRoom(M),
}

/// Outcome of [`Registry::exit`]. The mm in it is to be dropped after unlocking.
#[must_use = "the mm in it is to be dropped after unlocking"]
#[derive(Debug)]
pub enum Exit<M> {
    /// The mm has no slot, or no longer.
    NotFound,
    /// None of its pages was tracked: its slot is free again.
    Freed(M),
    /// The mm is no longer scanned, but stays pinned until its page state is dropped.
    Deferred {
        /// It can be reaped now: the reaper is to be woken. If false, the release of the last
        /// claim reports it instead.
        reap: bool,
    },
}

/// Outcome of [`Registry::claim`]: what is at the cursor.
#[must_use = "a claim is to be released"]
#[derive(Debug)]
pub enum Next<M> {
    /// The mm to visit.
    Visit(Claim<M>),
    /// Every mm has been visited: the full scan is over.
    End,
    /// No full scan is in progress, or every mm left before one was visited.
    Idle,
}

/// A visit to one mm. While it is held, the slot is not freed and its id not reused.
///
/// # Invariants
///
/// The slot `id` counts this claim, and `mm` pins the mm of the slot.
#[must_use = "a claim is to be released"]
#[derive(Debug)]
pub struct Claim<M> {
    id: SlotId,
    mm: M,
    address: usize,
    excluded: bool,
    kept_out: bool,
}

impl<M> Claim<M> {
    /// Returns the slot.
    pub fn id(&self) -> SlotId {
        self.id
    }

    /// Returns the mm, which is pinned as long as the claim is held.
    pub fn mm(&self) -> &M {
        &self.mm
    }

    /// Returns the user address at which the visit starts.
    pub fn address(&self) -> usize {
        self.address
    }

    /// Returns whether a rule has excluded the mm: nothing of it is to be merged, whatever its
    /// process says.
    pub fn is_excluded(&self) -> bool {
        self.excluded
    }

    /// Returns whether the scanner is to pass over the mm: it is excluded, or a task keeps it out.
    pub fn is_passed_over(&self) -> bool {
        self.excluded || self.kept_out
    }
}

/// Outcome of [`Registry::release`]. It is to be dropped after unlocking, and the claim's pin with
/// it.
#[must_use = "the pin in it is to be dropped after unlocking"]
#[derive(Debug)]
pub struct Released<M> {
    _pin: M,
    /// The mm has left and this was the last claim: it can be reaped now.
    pub reap: bool,
}

/// A slot whose mm has left, while the caller drops its page state.
///
/// # Invariants
///
/// The slot `id` is [`State::Reaping`], and `mm` is the pin that it had.
#[must_use = "the slot is lost unless it is passed to `Registry::free` or `Registry::put_back`"]
#[derive(Debug)]
pub struct Dead<M> {
    id: SlotId,
    mm: M,
}

impl<M> Dead<M> {
    /// Returns the slot, whose page state is to be dropped.
    pub fn id(&self) -> SlotId {
        self.id
    }

    /// Returns the mm that has left.
    pub fn mm(&self) -> &M {
        &self.mm
    }
}

/// A FIFO list of slots, linked by `next`.
struct Queue {
    head: u32,
    tail: u32,
    len: u32,
}

/// The registered mms; see the module's description.
///
/// # Invariants
///
/// 1. A slot is on the scan list and in its hash bucket if and only if it is `Live`; on the dead
///    list if and only if it is `Dead`; on the free list if and only if it is `Free`.
/// 2. No two `Live` slots have the same key.
/// 3. `cursor` is `NIL` or a `Live` slot, and is `NIL` unless a scan is under way.
/// 4. A slot with claims is `Live` or `Leaving`, and a `Leaving` slot has claims.
/// 5. A slot has an mm unless it is `Free` or `Reaping`.
pub struct Registry<M> {
    chunks: [KVVec<MmSlot<M>>; MAX_CHUNKS],
    nr_chunks: usize,
    capacity: u32,
    /// Hash buckets in use: 0, or at least the first chunk's length and at most `capacity`.
    buckets: u32,
    free: u32,
    nr_free: u32,
    first: u32,
    last: u32,
    nr_live: u32,
    nr_leaving: u32,
    nr_reaping: u32,
    dead: Queue,
    cursor: u32,
    address: usize,
    scanning: bool,
    /// A visit has been claimed since the scan began.
    visited: bool,
    unmerging: bool,
    missed: bool,
}

impl<M: MmPin> Registry<M> {
    /// Returns a registry without slots.
    pub const fn new() -> Self {
        Self {
            chunks: [const { KVVec::new() }; MAX_CHUNKS],
            nr_chunks: 0,
            capacity: 0,
            buckets: 0,
            free: NIL,
            nr_free: 0,
            first: NIL,
            last: NIL,
            nr_live: 0,
            nr_leaving: 0,
            nr_reaping: 0,
            dead: Queue {
                head: NIL,
                tail: NIL,
                len: 0,
            },
            cursor: NIL,
            address: 0,
            scanning: false,
            visited: false,
            unmerging: false,
            missed: false,
        }
    }

    // Room.

    /// Returns the number of the chunk to add if free slots run low.
    ///
    /// The caller unlocks, allocates the chunk with [`SlotChunk::new`] and passes it to
    /// [`Registry::add_chunk`].
    pub fn wanted(&self) -> Option<usize> {
        let low = self.nr_free < LOW_WATER + self.capacity / 8;
        (low && self.nr_chunks < MAX_CHUNKS).then_some(self.nr_chunks)
    }

    /// Adds a chunk. Returns it if another caller has added that one first.
    pub fn add_chunk(&mut self, chunk: SlotChunk<M>) -> Result<(), SlotChunk<M>> {
        if chunk.number != self.nr_chunks {
            return Err(chunk);
        }
        let len = SlotChunk::<M>::len(chunk.number);
        let base = SlotChunk::<M>::base(chunk.number);
        let Some(room) = self.chunks.get_mut(chunk.number) else {
            return Err(chunk);
        };
        // The vector that this replaces has never held anything: no memory is freed here.
        *room = chunk.slots;
        self.nr_chunks += 1;
        self.capacity += len;
        if self.buckets == 0 {
            self.buckets = len;
        }
        // INVARIANT: The new slots are `Free`, and come linked among themselves.
        let free = core::mem::replace(&mut self.free, base);
        if let Some(tail) = self.slot_mut(base + len - 1) {
            tail.next = free;
        }
        self.nr_free += len;
        Ok(())
    }

    /// Returns whether an mm found no room since the last call.
    ///
    /// Such an mm is on the built-in's list only, and is to be entered from there.
    pub fn take_missed(&mut self) -> bool {
        core::mem::take(&mut self.missed)
    }

    /// Makes [`Registry::take_missed`] return true again, after those mms could not be entered.
    pub fn mark_missed(&mut self) {
        self.missed = true;
    }

    // Processes that come and go.

    /// Registers an mm.
    ///
    /// Inserts it just behind the cursor, so that it is scanned as late as possible: a fork that is
    /// followed by exec is gone by then. While unmerging, inserts it ahead of the cursor, so that
    /// no merged page that it inherited is missed.
    pub fn enter(&mut self, mm: M) -> Enter<M> {
        // An exit is reported after `mm_users` is zero, and looks for the slot under the lock that
        // is held here: either the exit finds the slot, or this finds `mm_users` zero.
        if mm.exiting() {
            return Enter::Exiting(mm);
        }
        let key = mm.key();
        if self.find(key).is_some() {
            return Enter::AlreadyThere(mm);
        }
        let id = self.free;
        let Some(slot) = self.slot_mut(id) else {
            self.missed = true;
            return Enter::NoRoom(mm);
        };
        let free = slot.next;
        slot.mm = Some(mm);
        slot.key = key;
        slot.claims = 0;
        slot.tracked = false;
        (slot.excluded, slot.kept_out) = (0, 0);
        slot.watch = Watch::default();
        slot.state = State::Live;
        self.free = free;
        self.nr_free -= 1;

        let was_empty = self.nr_live == 0;
        let before = if self.unmerging { NIL } else { self.cursor };
        // INVARIANT: A `Live` slot is on the scan list and in the hash; its key is in neither.
        self.link(id, before);
        self.hash(id, key);
        self.split_bucket();
        Enter::Registered {
            was_empty,
            low: self.wanted().is_some(),
        }
    }

    /// Unregisters the mm with `key`, which exits.
    ///
    /// Never waits for the scanner: a slot that cannot be freed at once goes to the dead list.
    pub fn exit(&mut self, key: usize) -> Exit<M> {
        let Some(id) = self.find(key) else {
            return Exit::NotFound;
        };
        self.unlink(id);
        let Some(slot) = self.slot_mut(id) else {
            return Exit::NotFound;
        };
        if slot.claims != 0 {
            // INVARIANT: A slot with claims is `Leaving` once it is off the lists.
            slot.state = State::Leaving;
            self.nr_leaving += 1;
            return Exit::Deferred { reap: false };
        }
        if slot.tracked {
            self.queue_dead(id);
            return Exit::Deferred { reap: true };
        }
        match slot.mm.take() {
            Some(mm) => {
                self.push_free(id);
                Exit::Freed(mm)
            }
            None => Exit::NotFound,
        }
    }

    // The scanner.

    /// Begins a full scan, unless one is in progress. Returns false if there is no mm to scan.
    pub fn begin(&mut self) -> bool {
        if !self.scanning {
            if self.nr_live == 0 {
                return false;
            }
            self.restart();
        }
        true
    }

    /// Returns whether a full scan is in progress.
    pub fn scanning(&self) -> bool {
        self.scanning
    }

    /// Claims the mm at the cursor.
    ///
    /// The caller moves the cursor with [`Registry::move_to`] or [`Registry::advance`]. A second
    /// claim before that gets the same mm and address.
    pub fn claim(&mut self) -> Next<M> {
        if !self.scanning {
            return Next::Idle;
        }
        let (id, address) = (self.cursor, self.address);
        let Some(slot) = self.slot_mut(id) else {
            self.scanning = false;
            return if self.visited { Next::End } else { Next::Idle };
        };
        let Some(mm) = slot.mm.as_ref().map(M::clone_pin) else {
            return Next::Idle;
        };
        slot.claims += 1;
        let (excluded, kept_out) = (slot.excluded != 0, slot.kept_out != 0);
        self.visited = true;
        // INVARIANT: The claim is counted, and pins the slot's mm.
        Next::Visit(Claim {
            id: SlotId(id),
            mm,
            address,
            excluded,
            kept_out,
        })
    }

    /// Claims the mm with `key`, wherever the cursor is.
    pub fn claim_key(&mut self, key: usize) -> Option<Claim<M>> {
        let id = self.find(key)?;
        let slot = self.slot_mut(id)?;
        let mm = slot.mm.as_ref().map(M::clone_pin)?;
        slot.claims += 1;
        let (excluded, kept_out) = (slot.excluded != 0, slot.kept_out != 0);
        // INVARIANT: The claim is counted, and pins the slot's mm.
        Some(Claim {
            id: SlotId(id),
            mm,
            address: 0,
            excluded,
            kept_out,
        })
    }

    /// Claims the mm in a slot, if there is one, wherever the cursor is. Returns what the governor
    /// remembers of it, too.
    pub fn claim_slot(&mut self, id: SlotId) -> Option<(Claim<M>, Watch)> {
        let slot = self.slot(id.0).filter(|slot| slot.state == State::Live)?;
        let (key, watch) = (slot.key, slot.watch);
        Some((self.claim_key(key)?, watch))
    }

    /// Changes what the governor remembers of the claimed mm. Has no effect if it has left.
    pub fn set_watch(&mut self, claim: &Claim<M>, watch: Watch) {
        if let Some(slot) = self.slot_mut(claim.id.0) {
            slot.watch = watch;
        }
    }

    /// Ends a full scan that is in progress, as the scanner is to go by other rules.
    pub fn abandon_scan(&mut self) {
        self.scanning = false;
        self.cursor = NIL;
        self.address = 0;
    }

    /// Moves the cursor within the claimed mm. Has no effect if the mm has left.
    pub fn move_to(&mut self, claim: &Claim<M>, address: usize) {
        if self.cursor == claim.id.0 {
            self.address = address;
        }
    }

    /// Moves the cursor to the next mm. Has no effect if it is no longer on the claimed one.
    pub fn advance(&mut self, claim: &Claim<M>) {
        if self.cursor == claim.id.0 {
            self.step();
        }
    }

    /// Unregisters the claimed mm, which the scanner has found exiting.
    ///
    /// Returns false if its exit has been reported already. The mm can be reaped when all claims
    /// are released.
    pub fn unregister(&mut self, claim: &Claim<M>) -> bool {
        let id = claim.id.0;
        if self.state(id) != Some(State::Live) {
            return false;
        }
        self.unlink(id);
        if let Some(slot) = self.slot_mut(id) {
            slot.state = State::Leaving;
            self.nr_leaving += 1;
        }
        true
    }

    /// Ends a visit. `tracked`: whether the engine knows something of this mm now.
    ///
    /// The caller has dropped the mmap lock: once the slot is not claimed, nothing but the returned
    /// pin keeps the `mm_struct`.
    ///
    /// # Context
    ///
    /// The caller has held the lock that protects the page state since it determined `tracked`.
    pub fn release(&mut self, claim: Claim<M>, tracked: bool) -> Released<M> {
        let Claim { id, mm: pin, .. } = claim;
        let mut reap = false;
        if let Some(slot) = self.slot_mut(id.0) {
            slot.claims = slot.claims.saturating_sub(1);
            slot.tracked = tracked;
            if slot.claims == 0 && slot.state == State::Leaving {
                self.nr_leaving -= 1;
                self.queue_dead(id.0);
                reap = true;
            }
        }
        Released { _pin: pin, reap }
    }

    /// Pins the mm of a slot that the engine has page state for. Returns `None` if it has left.
    ///
    /// # Context
    ///
    /// The caller holds the lock that protects the page state, so `id` has not been reused.
    pub fn pin(&self, id: SlotId) -> Option<M> {
        let slot = self.slot(id.0)?;
        if slot.state != State::Live {
            return None;
        }
        slot.mm.as_ref().map(M::clone_pin)
    }

    // The dead.

    /// Takes the mm that has been dead longest off the dead list.
    ///
    /// The caller drops its page state and then frees the slot with [`Registry::free`].
    pub fn pop_dead(&mut self) -> Option<Dead<M>> {
        let id = self.dead.head;
        let slot = self.slot_mut(id)?;
        let mm = slot.mm.take()?;
        let next = slot.next;
        slot.state = State::Reaping;
        self.dead.head = next;
        if next == NIL {
            self.dead.tail = NIL;
        }
        self.dead.len -= 1;
        self.nr_reaping += 1;
        // INVARIANT: The slot is `Reaping`, and this is the pin that it had.
        Some(Dead { id: SlotId(id), mm })
    }

    /// Frees the slot of an mm that has left. The mm is to be dropped after unlocking.
    #[must_use = "the mm is to be dropped after unlocking"]
    pub fn free(&mut self, dead: Dead<M>) -> M {
        let Dead { id, mm } = dead;
        if self.state(id.0) == Some(State::Reaping) {
            self.nr_reaping -= 1;
            self.push_free(id.0);
        }
        mm
    }

    /// Puts an mm back that [`Registry::pop_dead`] has taken, with some of its page state left.
    pub fn put_back(&mut self, dead: Dead<M>) {
        let Dead { id, mm } = dead;
        if let Some(slot) = self.slot_mut(id.0) {
            slot.mm = Some(mm);
            self.nr_reaping -= 1;
            self.queue_dead(id.0);
        }
    }

    /// Takes any mm, dead or live, as [`Registry::pop_dead`] does.
    ///
    /// For the end of the module and for a load that failed. Skips claimed slots, of which there
    /// are none once the scanner has stopped.
    pub fn drain(&mut self) -> Option<Dead<M>> {
        if let Some(dead) = self.pop_dead() {
            return Some(dead);
        }
        let (id, _) = self
            .iter()
            .find(|(id, _)| self.slot(id.0).is_some_and(|slot| slot.claims == 0))?;
        self.unlink(id.0);
        self.queue_dead(id.0);
        self.pop_dead()
    }

    // Unmerging.

    /// Ends a full scan that is in progress and puts the cursor on the first mm.
    ///
    /// Until [`Registry::unmerge_end`], new mms are inserted ahead of the cursor. The caller visits
    /// the mms with [`Registry::claim`].
    ///
    /// # Context
    ///
    /// The caller holds the lock that keeps the scanner out.
    pub fn unmerge_begin(&mut self) {
        self.unmerging = true;
        self.restart();
    }

    /// Ends unmerging, complete or not. The next full scan begins at the first mm.
    pub fn unmerge_end(&mut self) {
        self.unmerging = false;
        self.abandon_scan();
    }

    // Excluding.

    /// Excludes the mm with `key`: visits find that it is passed over. Returns whether that is new,
    /// `None` if the mm is not registered.
    ///
    /// `sweep` is the number of the sweep over all processes that says so, not 0. Where `begin` is
    /// false, an mm that is not yet excluded is left as it is.
    pub fn exclude(&mut self, key: usize, sweep: u32, begin: bool) -> Option<bool> {
        let id = self.find(key)?;
        let slot = self.slot_mut(id)?;
        let new = slot.excluded == 0;
        if begin || !new {
            slot.excluded = sweep;
        }
        Some(new)
    }

    /// Returns whether the mm with `key` is registered and excluded.
    pub fn is_excluded(&self, key: usize) -> bool {
        let slot = self.find(key).and_then(|id| self.slot(id));
        slot.is_some_and(|slot| slot.excluded != 0)
    }

    /// Readmits those mms of `count` slots from number `from` on that were excluded, but not by
    /// this sweep. Returns the number of the slot to go on with.
    pub fn readmit_in(&mut self, from: u32, count: u32, sweep: u32) -> Option<u32> {
        let end = from.saturating_add(count).min(self.capacity);
        for id in from..end {
            if let Some(slot) = self.slot_mut(id) {
                if slot.excluded != sweep {
                    slot.excluded = 0;
                }
            }
        }
        (end < self.capacity).then_some(end)
    }

    /// Has visits pass over the mm with `key` until as many calls of [`Registry::let_in`]. Returns
    /// whether it is registered, and not kept out by too many already.
    pub fn keep_out(&mut self, key: usize) -> bool {
        let Some(slot) = self.find(key).and_then(|id| self.slot_mut(id)) else {
            return false;
        };
        match slot.kept_out.checked_add(1) {
            Some(kept_out) => slot.kept_out = kept_out,
            None => return false,
        }
        true
    }

    /// Undoes one call of [`Registry::keep_out`], unless the mm has left. It is still pinned, so
    /// that no other has its key.
    pub fn let_in(&mut self, key: usize) {
        if let Some(slot) = self.find(key).and_then(|id| self.slot_mut(id)) {
            slot.kept_out = slot.kept_out.saturating_sub(1);
        }
    }

    // What is registered.

    /// Returns the number of registered mms, without those that have left.
    pub fn len(&self) -> usize {
        self.nr_live as usize
    }

    /// Returns whether no mm is registered.
    pub fn is_empty(&self) -> bool {
        self.nr_live == 0
    }

    /// Returns the number of mms that have left and are still pinned.
    pub fn nr_left(&self) -> usize {
        self.nr_leaving as usize + self.dead.len as usize + self.nr_reaping as usize
    }

    /// Returns the memory that the slots take, in bytes.
    pub fn bytes(&self) -> usize {
        self.capacity as usize * size_of::<MmSlot<M>>()
    }

    /// Returns the registered mms in scan order.
    pub fn iter(&self) -> impl Iterator<Item = (SlotId, &M)> {
        let mut next = self.first;
        core::iter::from_fn(move || {
            let (id, slot) = (next, self.slot(next)?);
            next = slot.next;
            Some((SlotId(id), slot.mm.as_ref()?))
        })
    }

    /// Calls `f` with each registered mm of `count` slots from number `from` on, and whether a rule
    /// has excluded it, until it returns false. Returns the number of the slot to go on with: that
    /// of the mm for which `f` returned false.
    pub fn visit_in(
        &self,
        from: u32,
        count: u32,
        mut f: impl FnMut(SlotId, &M, bool) -> bool,
    ) -> Option<u32> {
        let end = from.saturating_add(count).min(self.capacity);
        for id in from..end {
            let live = self.slot(id).filter(|slot| slot.state == State::Live);
            let Some(slot) = live else { continue };
            let Some(mm) = &slot.mm else { continue };
            if !f(SlotId(id), mm, slot.excluded != 0) {
                return Some(id);
            }
        }
        (end < self.capacity).then_some(end)
    }

    /// Calls `f` with each registered mm of `count` slots from number `from` on, and with what the
    /// governor remembers of it. Those that are to be passed over count as looked at. Returns the
    /// number of the slot to go on with.
    pub fn watch_in(
        &mut self,
        from: u32,
        count: u32,
        now: Tick,
        mut f: impl FnMut(SlotId, &M, &mut Watch),
    ) -> Option<u32> {
        let end = from.saturating_add(count).min(self.capacity);
        for id in from..end {
            let live = self.slot_mut(id).filter(|slot| slot.state == State::Live);
            let Some(slot) = live else { continue };
            if slot.excluded != 0 || slot.kept_out != 0 {
                slot.watch.pass_over(now);
            } else if let Some(mm) = &slot.mm {
                f(SlotId(id), mm, &mut slot.watch);
            }
        }
        (end < self.capacity).then_some(end)
    }

    /// Calls `f` with each mm of `count` slots from number `from` on, those that left included.
    /// Returns the number of the slot to go on with.
    pub fn for_each_in(&self, from: u32, count: u32, mut f: impl FnMut(&M)) -> Option<u32> {
        let end = from.saturating_add(count).min(self.capacity);
        for id in from..end {
            if let Some(mm) = self.slot(id).and_then(|slot| slot.mm.as_ref()) {
                f(mm);
            }
        }
        (end < self.capacity).then_some(end)
    }

    // Slots.

    /// Returns a slot's chunk and its offset in that chunk.
    fn locate(id: u32) -> (usize, usize) {
        let chunk = ((id >> FIRST_CHUNK_SHIFT) + 1).ilog2() as usize;
        let offset = id.wrapping_sub(SlotChunk::<M>::base(chunk.min(MAX_CHUNKS)));
        (chunk, offset as usize)
    }

    fn slot(&self, id: u32) -> Option<&MmSlot<M>> {
        let (chunk, offset) = Self::locate(id);
        self.chunks.get(chunk)?.get(offset)
    }

    fn slot_mut(&mut self, id: u32) -> Option<&mut MmSlot<M>> {
        let (chunk, offset) = Self::locate(id);
        self.chunks.get_mut(chunk)?.get_mut(offset)
    }

    fn state(&self, id: u32) -> Option<State> {
        self.slot(id).map(|slot| slot.state)
    }

    /// Puts a slot that is on no list and has no mm on the free list.
    fn push_free(&mut self, id: u32) {
        let free = self.free;
        if let Some(slot) = self.slot_mut(id) {
            debug_assert!(slot.mm.is_none() && slot.claims == 0);
            slot.state = State::Free;
            slot.next = free;
            self.free = id;
            self.nr_free += 1;
        }
    }

    /// Puts a slot that is on no list on the dead list.
    fn queue_dead(&mut self, id: u32) {
        let Some(slot) = self.slot_mut(id) else {
            return;
        };
        slot.state = State::Dead;
        slot.next = NIL;
        let tail = core::mem::replace(&mut self.dead.tail, id);
        match self.slot_mut(tail) {
            Some(slot) => slot.next = id,
            None => self.dead.head = id,
        }
        self.dead.len += 1;
    }

    // The scan list.

    /// Inserts a slot before another, or at the end.
    fn link(&mut self, id: u32, before: u32) {
        let prev = match self.slot_mut(before) {
            Some(slot) => core::mem::replace(&mut slot.prev, id),
            None => core::mem::replace(&mut self.last, id),
        };
        match self.slot_mut(prev) {
            Some(slot) => slot.next = id,
            None => self.first = id,
        }
        if let Some(slot) = self.slot_mut(id) {
            slot.prev = prev;
            slot.next = before;
        }
        self.nr_live += 1;
    }

    /// Takes a `Live` slot off the scan list and out of the hash. Moves the cursor off it.
    ///
    /// The caller sets the slot's new state.
    fn unlink(&mut self, id: u32) {
        if self.cursor == id {
            self.step();
        }
        self.unhash(id);
        let Some(&MmSlot { prev, next, .. }) = self.slot(id) else {
            return;
        };
        match self.slot_mut(prev) {
            Some(slot) => slot.next = next,
            None => self.first = next,
        }
        match self.slot_mut(next) {
            Some(slot) => slot.prev = prev,
            None => self.last = prev,
        }
        self.nr_live -= 1;
    }

    /// Moves the cursor to the next mm.
    fn step(&mut self) {
        self.cursor = self.slot(self.cursor).map_or(NIL, |slot| slot.next);
        self.address = 0;
    }

    /// Puts the cursor on the first mm.
    fn restart(&mut self) {
        self.scanning = true;
        self.visited = false;
        self.cursor = self.first;
        self.address = 0;
    }

    // The hash.

    /// Returns the bucket of `key` among `buckets`, which is not 0.
    fn bucket_of(key: usize, buckets: u32) -> u32 {
        // 2^64 divided by the golden ratio, as in the kernel's hash_64().
        let hash = ((key as u64).wrapping_mul(0x61c8_8646_80b5_83eb) >> 32) as u32;
        let mask = buckets.next_power_of_two() - 1;
        let bucket = hash & mask;
        if bucket < buckets {
            bucket
        } else {
            bucket & (mask >> 1)
        }
    }

    /// Returns the `Live` slot with `key`.
    fn find(&self, key: usize) -> Option<u32> {
        if self.buckets == 0 {
            return None;
        }
        let mut id = self.slot(Self::bucket_of(key, self.buckets))?.bucket;
        while let Some(slot) = self.slot(id) {
            if slot.key == key {
                return Some(id);
            }
            id = slot.chain;
        }
        None
    }

    /// Inserts a slot into the hash.
    fn hash(&mut self, id: u32, key: usize) {
        let head = match self.slot_mut(Self::bucket_of(key, self.buckets)) {
            Some(slot) => core::mem::replace(&mut slot.bucket, id),
            None => NIL,
        };
        if let Some(slot) = self.slot_mut(id) {
            slot.chain = head;
        }
    }

    /// Removes a slot from the hash.
    fn unhash(&mut self, id: u32) {
        let Some(&MmSlot { key, chain, .. }) = self.slot(id) else {
            return;
        };
        let Some(bucket) = self.slot_mut(Self::bucket_of(key, self.buckets)) else {
            return;
        };
        if bucket.bucket == id {
            bucket.bucket = chain;
            return;
        }
        let mut at = bucket.bucket;
        while let Some(slot) = self.slot_mut(at) {
            if slot.chain == id {
                slot.chain = chain;
                return;
            }
            at = slot.chain;
        }
    }

    /// Adds one bucket if there are more mms than buckets, and moves the mms that belong there.
    fn split_bucket(&mut self) {
        let new = self.buckets;
        if new >= self.capacity || self.nr_live <= new {
            return;
        }
        self.buckets = new + 1;
        let old = new & ((self.buckets.next_power_of_two() - 1) >> 1);
        let mut at = match self.slot_mut(old) {
            Some(slot) => core::mem::replace(&mut slot.bucket, NIL),
            None => NIL,
        };
        while let Some(&MmSlot { key, chain, .. }) = self.slot(at) {
            self.hash(at, key);
            at = chain;
        }
    }

    /// Checks every invariant, for tests and debugging. Takes time in proportion to the capacity.
    ///
    /// # Errors
    ///
    /// A description of the invariant that does not hold.
    pub fn check(&self) -> Result<(), &'static str> {
        let mut counts = [0u32; 5];
        for id in 0..self.capacity {
            let Some(slot) = self.slot(id) else {
                return Err("a slot is missing");
            };
            let (has_mm, has_claims) = (slot.mm.is_some(), slot.claims != 0);
            let ok = match slot.state {
                State::Free | State::Reaping => !has_mm && !has_claims,
                State::Live => has_mm,
                State::Leaving => has_mm && has_claims,
                State::Dead => has_mm && !has_claims,
            };
            if !ok {
                return Err("a slot's mm or claims do not fit its state");
            }
            if slot.state == State::Live {
                if slot.mm.as_ref().map(M::key) != Some(slot.key) {
                    return Err("a slot has another key than its mm");
                }
                if self.find(slot.key) != Some(id) {
                    return Err("a live slot is not the one that is hashed");
                }
            }
            if let Some(count) = counts.get_mut(slot.state as usize) {
                *count += 1;
            }
        }
        let expected = [
            self.nr_free,
            self.nr_live,
            self.nr_leaving,
            self.dead.len,
            self.nr_reaping,
        ];
        if counts != expected {
            return Err("slots in a state differ from their count");
        }
        self.check_list(self.free, self.nr_free, State::Free)?;
        self.check_list(self.dead.head, self.dead.len, State::Dead)?;
        self.check_list(self.first, self.nr_live, State::Live)?;

        let mut hashed = 0;
        for bucket in 0..self.capacity {
            let mut id = self.slot(bucket).map_or(NIL, |slot| slot.bucket);
            while let Some(slot) = self.slot(id) {
                if slot.state != State::Live || Self::bucket_of(slot.key, self.buckets) != bucket {
                    return Err("a hash bucket has a slot that does not belong there");
                }
                hashed += 1;
                if hashed > self.nr_live {
                    return Err("the hash has a loop or a leftover");
                }
                id = slot.chain;
            }
        }
        if self.cursor != NIL && (!self.scanning || self.state(self.cursor) != Some(State::Live)) {
            return Err("the cursor is on a slot that is not to be scanned");
        }
        Ok(())
    }

    /// Checks that `len` slots in `state` are linked from `head`, and backwards too if `Live`.
    fn check_list(&self, head: u32, len: u32, state: State) -> Result<(), &'static str> {
        let (mut id, mut prev, mut seen) = (head, NIL, 0);
        while let Some(slot) = self.slot(id) {
            seen += 1;
            if slot.state != state || seen > len {
                return Err("a list has a slot that does not belong there");
            }
            if state == State::Live && slot.prev != prev {
                return Err("the scan list is not linked both ways");
            }
            prev = id;
            id = slot.next;
        }
        let tail = match state {
            State::Live => self.last,
            State::Dead => self.dead.tail,
            _ => prev,
        };
        if id != NIL || seen != len || tail != prev {
            return Err("a list is cut short");
        }
        Ok(())
    }
}

impl<M: MmPin> Default for Registry<M> {
    fn default() -> Self {
        Self::new()
    }
}
