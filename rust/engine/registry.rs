// SPDX-License-Identifier: GPL-2.0-only

//! The registry: which mms take part in KSM, and in which order they are scanned.
//!
//! A registered mm has a *slot*. Slots are linked in scan order and hashed by the address of
//! their `mm_struct`. The scanner has a cursor on that list; processes come and go beside it,
//! from tracepoint probes that must neither sleep nor allocate.
//!
//! # Locking
//!
//! A [`Registry`] is a plain value that its owner puts behind one spinlock, `mmlist_lock`. That
//! lock is a leaf: no other lock is taken under it. Nothing here allocates or frees, and nothing
//! here drops an mm: whatever leaves the registry is returned, and the caller lets go of it after
//! unlocking. A dropped pin may be the last one, and `mmdrop()` of the last one frees page tables
//! and takes locks.
//!
//! One lock decides who removes a slot, and the loser sees that it is gone: two releases of one
//! mm (a process exits, the scanner gives it up, the module unloads) cannot both remove it.
//!
//! # Life of a slot
//!
//! ```text
//!            enter                    exit: idle and nothing tracked
//!   Free ─────────────► Live ───────────────────────────────────────► Free
//!                        │ │
//!                        │ └─ exit or expel, while claimed ─► Doomed
//!                        │                                      │ the last claim is released
//!                        └─ exit: idle but pages tracked ──► Dead
//!                        │                                      │ pop_dead
//!                        └─ drain ──────────────────────────► Reaping
//!                                                               │ free
//!                                                               ▼
//!                                                              Free
//! ```
//!
//! Only a `Live` slot is on the scan list and in the hash. A slot with claims is never freed, so
//! an id stays good for as long as the claim on it is held.

use super::types::SlotId;

use kernel::{
    alloc::{
        AllocError,
        Flags, //
    },
    prelude::*, //
};

/// End of a list, and the cursor's value between two full scans.
const NIL: u32 = u32::MAX;

/// Slots in the first chunk, as a power of two. Each further chunk is twice as large.
const FIRST_CHUNK_SHIFT: u32 = 8;

/// Chunks that a registry can hold: 8,388,352 slots, twice the largest `pid_max`.
const MAX_CHUNKS: usize = 15;

/// Free slots below which more are asked for, besides an eighth of the capacity.
const LOW_WATER: u32 = 64;

/// An owned reference that keeps an `mm_struct` allocated, but not its memory: `mm_count`.
///
/// Dropping it is `mmdrop()`, which the registry leaves to its callers.
pub trait PinnedMm: Sized {
    /// The address of the `mm_struct`, which no other mm can have while it is pinned.
    fn key(&self) -> usize;

    /// Whether the last user of the address space is gone (`mm_users` is zero).
    ///
    /// Called under the registry's lock; must not sleep.
    fn exiting(&self) -> bool;

    /// Takes another reference to the same mm.
    ///
    /// Called under the registry's lock; must not sleep.
    fn clone_pin(&self) -> Self;
}

/// Where a slot is in its life; see the module's description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// On the free list; has no mm.
    Free,
    /// On the scan list and in the hash.
    Live,
    /// Its mm has left or was expelled while the slot was claimed. On no list.
    Doomed,
    /// Waiting on the dead list for its page state to be dropped.
    Dead,
    /// Taken off the dead list; a [`Dead`] has its mm.
    Reaping,
}

/// One slot, and one bucket of the hash, which has as many of these as there are slots.
struct Slot<M> {
    /// Present while `Live`, `Doomed` or `Dead`.
    mm: Option<M>,
    /// `mm.key()`, to look it up without following a pointer.
    key: usize,
    /// Next on the scan list (`Live`), the dead list (`Dead`) or the free list (`Free`).
    next: u32,
    /// Previous on the scan list (`Live`).
    prev: u32,
    /// Next slot of the same hash bucket (`Live`).
    chain: u32,
    /// First slot of the hash bucket that has this slot's number.
    bucket: u32,
    /// Visits under way.
    claims: u32,
    state: State,
    /// Whether the engine has page state for this mm.
    tracked: bool,
}

/// Room for more slots, allocated by the caller where it can sleep.
///
/// Made by [`Chunk::new`] for the number that [`Registry::wanted`] gave.
#[must_use = "a chunk is of use only in a registry"]
pub struct Chunk<M> {
    number: usize,
    slots: KVVec<Slot<M>>,
}

impl<M> Chunk<M> {
    /// Allocates chunk `number`.
    ///
    /// Context: as `flags` says; not under the registry's lock.
    pub fn new(number: usize, flags: Flags) -> Result<Self, AllocError> {
        if number >= MAX_CHUNKS {
            return Err(AllocError);
        }
        let len = Self::len(number);
        let base = Self::base(number);
        let mut slots = KVVec::with_capacity(len as usize, flags)?;
        for i in 0..len {
            slots.push(
                Slot {
                    mm: None,
                    key: 0,
                    next: if i + 1 < len { base + i + 1 } else { NIL },
                    prev: NIL,
                    chain: NIL,
                    bucket: NIL,
                    claims: 0,
                    state: State::Free,
                    tracked: false,
                },
                flags,
            )?;
        }
        Ok(Self { number, slots })
    }

    /// Number of slots in chunk `number`.
    const fn len(number: usize) -> u32 {
        1 << (FIRST_CHUNK_SHIFT + number as u32)
    }

    /// Number of the first slot of chunk `number`.
    const fn base(number: usize) -> u32 {
        ((1 << number as u32) - 1) << FIRST_CHUNK_SHIFT
    }
}

/// What came of [`Registry::enter`]. Every mm in it is to be dropped after unlocking.
#[must_use = "the mm in it is to be dropped after unlocking"]
#[derive(Debug)]
pub enum Enter<M> {
    /// The mm has a slot now.
    Registered {
        /// No mm was registered before: a scanner that sleeps for want of mms is to be woken.
        was_empty: bool,
        /// Free slots run low: [`Registry::wanted`] names the chunk to add.
        low: bool,
    },
    /// It had one already.
    AlreadyThere(M),
    /// Its last user is gone, so its exit has been reported or is about to be.
    Exiting(M),
    /// There is no free slot. [`Registry::take_missed`] tells of it later.
    NoRoom(M),
}

/// What came of [`Registry::exit`]. The mm in it is to be dropped after unlocking.
#[must_use = "the mm in it is to be dropped after unlocking"]
#[derive(Debug)]
pub enum Exit<M> {
    /// It has no slot, or has it no more.
    NotFound,
    /// Nothing of it was tracked: its slot is free again.
    Freed(M),
    /// It is scanned no more, but stays pinned until its page state is dropped.
    Deferred {
        /// It can be reaped now: whoever reaps is to be woken. Where this is false, the release
        /// of the last claim says so instead.
        reap: bool,
    },
}

/// What [`Registry::claim`] found at the cursor.
#[must_use = "a claim is to be released"]
#[derive(Debug)]
pub enum Next<M> {
    /// The mm to go on with.
    Visit(Claim<M>),
    /// Every mm has been visited: the full scan is over.
    End,
    /// No full scan is under way, or every mm left before the first was visited.
    Idle,
}

/// A visit to one mm. While it is held, its slot is not freed and its id not given to another.
///
/// # Invariants
///
/// The slot `id` counts this claim, and `mm` pins the mm that the slot has.
#[must_use = "a claim is to be released"]
#[derive(Debug)]
pub struct Claim<M> {
    id: SlotId,
    mm: M,
    address: usize,
}

impl<M> Claim<M> {
    /// The slot.
    pub fn id(&self) -> SlotId {
        self.id
    }

    /// The mm, pinned for as long as the claim is held.
    pub fn mm(&self) -> &M {
        &self.mm
    }

    /// The user address to go on from.
    pub fn address(&self) -> usize {
        self.address
    }
}

/// What is left of a [`Claim`] after [`Registry::release`].
#[must_use = "the pin is to be dropped after unlocking"]
#[derive(Debug)]
pub struct Released<M> {
    /// The claim's own pin, to be dropped after unlocking.
    pub pin: M,
    /// The mm left meanwhile and this was the last claim: it can be reaped now.
    pub reap: bool,
}

/// A slot whose mm has left, in the hands of whoever drops its page state.
///
/// # Invariants
///
/// The slot `id` is [`State::Reaping`], and `mm` is the pin that it had.
#[must_use = "the slot is lost unless it is given to `Registry::free`"]
#[derive(Debug)]
pub struct Dead<M> {
    id: SlotId,
    mm: M,
}

impl<M> Dead<M> {
    /// The slot, whose page state is to be dropped.
    pub fn id(&self) -> SlotId {
        self.id
    }

    /// The mm that left.
    pub fn mm(&self) -> &M {
        &self.mm
    }
}

/// A singly linked list of slots by `next`, in order of arrival.
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
/// 4. A slot with claims is `Live` or `Doomed`, and a `Doomed` slot has claims.
/// 5. A slot has an mm unless it is `Free` or `Reaping`.
pub struct Registry<M> {
    chunks: [KVVec<Slot<M>>; MAX_CHUNKS],
    nr_chunks: usize,
    capacity: u32,
    /// Hash buckets in use: 0, or at least the first chunk's length and at most `capacity`.
    buckets: u32,
    free: u32,
    nr_free: u32,
    first: u32,
    last: u32,
    nr_live: u32,
    nr_doomed: u32,
    nr_reaping: u32,
    dead: Queue,
    cursor: u32,
    address: usize,
    scanning: bool,
    /// A visit was handed out since the scan began.
    visited: bool,
    unmerging: bool,
    missed: bool,
}

impl<M: PinnedMm> Registry<M> {
    /// Makes a registry that has no room yet.
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
            nr_doomed: 0,
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

    /// The number of the chunk that is to be added, if free slots run low.
    ///
    /// The caller unlocks, allocates it with [`Chunk::new`], and gives it to
    /// [`Registry::add_chunk`].
    pub fn wanted(&self) -> Option<usize> {
        let low = self.nr_free < LOW_WATER + self.capacity / 8;
        (low && self.nr_chunks < MAX_CHUNKS).then_some(self.nr_chunks)
    }

    /// Adds a chunk. Gives it back if somebody else has added that one first.
    pub fn add_chunk(&mut self, chunk: Chunk<M>) -> Result<(), Chunk<M>> {
        if chunk.number != self.nr_chunks {
            return Err(chunk);
        }
        let len = Chunk::<M>::len(chunk.number);
        let base = Chunk::<M>::base(chunk.number);
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
        // INVARIANT: the new slots are `Free`, and come linked among themselves.
        let free = core::mem::replace(&mut self.free, base);
        if let Some(tail) = self.slot_mut(base + len - 1) {
            tail.next = free;
        }
        self.nr_free += len;
        Ok(())
    }

    /// Whether an mm found no room since this was last asked.
    ///
    /// Such mms are known to the built-in registry only, and are to be entered from there.
    pub fn take_missed(&mut self) -> bool {
        core::mem::take(&mut self.missed)
    }

    /// Has [`Registry::take_missed`] tell once more of mms that could not be entered even then.
    pub fn set_missed(&mut self) {
        self.missed = true;
    }

    // Processes that come and go.

    /// Registers an mm.
    ///
    /// It goes just behind the cursor, so that it has the longest time to settle before it is
    /// scanned: a fork that is followed by exec is gone by then. While unmerging it goes ahead of
    /// the cursor, so that no merged page that it inherited is forgotten.
    pub fn enter(&mut self, mm: M) -> Enter<M> {
        // Its exit is reported after `mm_users` is zero, and looks for a slot under the lock that
        // is held here: either that finds the slot, or this finds `mm_users` zero.
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
        slot.state = State::Live;
        self.free = free;
        self.nr_free -= 1;

        let was_empty = self.nr_live == 0;
        let before = if self.unmerging { NIL } else { self.cursor };
        // INVARIANT: a `Live` slot is on the scan list and in the hash; its key is in neither.
        self.link(id, before);
        self.hash(id, key);
        self.split_bucket();
        Enter::Registered {
            was_empty,
            low: self.wanted().is_some(),
        }
    }

    /// Takes note that the mm with `key` is going away.
    ///
    /// Never waits for the scanner: what it cannot free at once it leaves on the dead list.
    pub fn exit(&mut self, key: usize) -> Exit<M> {
        let Some(id) = self.find(key) else {
            return Exit::NotFound;
        };
        self.unlink(id);
        let Some(slot) = self.slot_mut(id) else {
            return Exit::NotFound;
        };
        if slot.claims != 0 {
            // INVARIANT: a slot with claims is `Doomed` once it is off the lists.
            slot.state = State::Doomed;
            self.nr_doomed += 1;
            return Exit::Deferred { reap: false };
        }
        if slot.tracked {
            self.bury(id);
            return Exit::Deferred { reap: true };
        }
        match slot.mm.take() {
            Some(mm) => {
                self.give_back(id);
                Exit::Freed(mm)
            }
            None => Exit::NotFound,
        }
    }

    // The scanner.

    /// Begins a full scan, unless one is under way. False if there is no mm to scan.
    pub fn begin(&mut self) -> bool {
        if !self.scanning {
            if self.nr_live == 0 {
                return false;
            }
            self.restart();
        }
        true
    }

    /// Whether a full scan is under way.
    pub fn scanning(&self) -> bool {
        self.scanning
    }

    /// Claims the mm at the cursor.
    ///
    /// Several threads may hold claims on one slot. Each moves the cursor on with
    /// [`Registry::move_to`] or [`Registry::advance`] before the next one claims, under a lock of
    /// the caller's own if need be, or the two get the same address.
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
        self.visited = true;
        // INVARIANT: the claim is counted, and pins the slot's mm.
        Next::Visit(Claim {
            id: SlotId(id),
            mm,
            address,
        })
    }

    /// Moves the cursor on within the claimed mm. Has no effect if the mm has left meanwhile.
    pub fn move_to(&mut self, claim: &Claim<M>, address: usize) {
        if self.cursor == claim.id.0 {
            self.address = address;
        }
    }

    /// Moves the cursor on to the next mm. Has no effect if it has moved on already.
    pub fn advance(&mut self, claim: &Claim<M>) {
        if self.cursor == claim.id.0 {
            self.step();
        }
    }

    /// Unregisters the claimed mm, which the scanner found to have nothing to scan any more.
    ///
    /// False if it has left by itself already. It can be reaped when all claims are released.
    pub fn expel(&mut self, claim: &Claim<M>) -> bool {
        let id = claim.id.0;
        if self.state(id) != Some(State::Live) {
            return false;
        }
        self.unlink(id);
        if let Some(slot) = self.slot_mut(id) {
            slot.state = State::Doomed;
            self.nr_doomed += 1;
        }
        true
    }

    /// Ends a visit. `tracked` says whether the engine has page state for this mm now.
    ///
    /// The caller holds the lock that protects the page state from before it looked until this
    /// returns. The mmap lock has been dropped before: as soon as the slot is no longer claimed,
    /// the mm may be gone but for the pin that this returns.
    pub fn release(&mut self, claim: Claim<M>, tracked: bool) -> Released<M> {
        let Claim { id, mm: pin, .. } = claim;
        let mut reap = false;
        if let Some(slot) = self.slot_mut(id.0) {
            slot.claims = slot.claims.saturating_sub(1);
            slot.tracked = tracked;
            if slot.claims == 0 && slot.state == State::Doomed {
                self.nr_doomed -= 1;
                self.bury(id.0);
                reap = true;
            }
        }
        Released { pin, reap }
    }

    /// Pins the mm of a slot that the engine has page state for. None if that mm has left.
    ///
    /// The caller holds the lock that protects the page state, so that `id` is not reused.
    pub fn pin(&self, id: SlotId) -> Option<M> {
        let slot = self.slot(id.0)?;
        if slot.state != State::Live {
            return None;
        }
        slot.mm.as_ref().map(M::clone_pin)
    }

    // The dead.

    /// Whether an mm that has left waits for its page state to be dropped.
    pub fn has_dead(&self) -> bool {
        self.dead.len != 0
    }

    /// Takes the mm that left first. Its page state is to be dropped, and then the slot freed.
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
        // INVARIANT: the slot is `Reaping`, and this is the pin that it had.
        Some(Dead { id: SlotId(id), mm })
    }

    /// Frees the slot of an mm that has left. The mm is to be dropped after unlocking.
    #[must_use = "the mm is to be dropped after unlocking"]
    pub fn free(&mut self, dead: Dead<M>) -> M {
        let Dead { id, mm } = dead;
        if self.state(id.0) == Some(State::Reaping) {
            self.nr_reaping -= 1;
            self.give_back(id.0);
        }
        mm
    }

    /// Takes any mm that is left, dead or alive, as [`Registry::pop_dead`] does.
    ///
    /// For the module's end, and for undoing a load that failed. Skips claimed slots: none of
    /// these are left once the scanner has stopped.
    pub fn drain(&mut self) -> Option<Dead<M>> {
        if let Some(dead) = self.pop_dead() {
            return Some(dead);
        }
        let mut id = self.first;
        while let Some(slot) = self.slot(id) {
            if slot.claims == 0 {
                self.unlink(id);
                self.bury(id);
                return self.pop_dead();
            }
            id = slot.next;
        }
        None
    }

    // Unmerging.

    /// Puts the cursor on the first mm, and has new mms inserted ahead of it until
    /// [`Registry::unmerge_end`].
    ///
    /// A full scan that was under way is over. The caller holds the lock that keeps the scanner
    /// out. The mms are visited with [`Registry::claim`].
    pub fn unmerge_begin(&mut self) {
        self.unmerging = true;
        self.restart();
    }

    /// Ends unmerging, finished or not; the next full scan begins at the first mm.
    pub fn unmerge_end(&mut self) {
        self.unmerging = false;
        self.scanning = false;
        self.cursor = NIL;
        self.address = 0;
    }

    // Looking on.

    /// Number of registered mms, without those that have left.
    pub fn len(&self) -> usize {
        self.nr_live as usize
    }

    /// Whether no mm is registered.
    pub fn is_empty(&self) -> bool {
        self.nr_live == 0
    }

    /// Number of mms that have left and are still pinned.
    pub fn nr_leaving(&self) -> usize {
        self.nr_doomed as usize + self.dead.len as usize + self.nr_reaping as usize
    }

    /// Memory that the slots take, in bytes.
    pub fn bytes(&self) -> usize {
        self.capacity as usize * size_of::<Slot<M>>()
    }

    /// Calls `f` for each registered mm, in scan order. `f` runs under the lock.
    pub fn for_each(&self, mut f: impl FnMut(SlotId, &M)) {
        let mut id = self.first;
        while let Some(slot) = self.slot(id) {
            if let Some(mm) = &slot.mm {
                f(SlotId(id), mm);
            }
            id = slot.next;
        }
    }

    // Slots.

    /// Which chunk a slot is in, and where.
    fn locate(id: u32) -> (usize, usize) {
        let chunk = ((id >> FIRST_CHUNK_SHIFT) + 1).ilog2() as usize;
        let offset = id.wrapping_sub(Chunk::<M>::base(chunk.min(MAX_CHUNKS)));
        (chunk, offset as usize)
    }

    fn slot(&self, id: u32) -> Option<&Slot<M>> {
        let (chunk, offset) = Self::locate(id);
        self.chunks.get(chunk)?.get(offset)
    }

    fn slot_mut(&mut self, id: u32) -> Option<&mut Slot<M>> {
        let (chunk, offset) = Self::locate(id);
        self.chunks.get_mut(chunk)?.get_mut(offset)
    }

    fn state(&self, id: u32) -> Option<State> {
        self.slot(id).map(|slot| slot.state)
    }

    /// Puts a slot that is on no list and has no mm on the free list.
    fn give_back(&mut self, id: u32) {
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
    fn bury(&mut self, id: u32) {
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

    /// Takes a `Live` slot off the scan list and out of the hash. The cursor steps off it.
    ///
    /// The caller gives the slot its new state.
    fn unlink(&mut self, id: u32) {
        if self.cursor == id {
            self.step();
        }
        self.unhash(id);
        let Some(&Slot { prev, next, .. }) = self.slot(id) else {
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

    /// Moves the cursor on to the next mm.
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

    // The hash: linear hashing, so that it grows by one bucket with each mm and never all at once.

    /// The bucket of `key` among `buckets`, which is not 0.
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

    fn hash(&mut self, id: u32, key: usize) {
        let head = match self.slot_mut(Self::bucket_of(key, self.buckets)) {
            Some(slot) => core::mem::replace(&mut slot.bucket, id),
            None => NIL,
        };
        if let Some(slot) = self.slot_mut(id) {
            slot.chain = head;
        }
    }

    fn unhash(&mut self, id: u32) {
        let Some(&Slot { key, chain, .. }) = self.slot(id) else {
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

    /// Adds one bucket if there are more mms than buckets.
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
        while let Some(&Slot { key, chain, .. }) = self.slot(at) {
            self.hash(at, key);
            at = chain;
        }
    }

    /// Checks every invariant. Takes time in proportion to the capacity, for tests and debugging.
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
                State::Doomed => has_mm && has_claims,
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
            self.nr_doomed,
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

    /// Checks that `len` slots in `state` are linked from `head`, and backwards if they are live.
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

impl<M: PinnedMm> Default for Registry<M> {
    fn default() -> Self {
        Self::new()
    }
}
