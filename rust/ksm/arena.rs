// SPDX-License-Identifier: GPL-2.0-only

//! Numbered objects of 48 bytes that never move.
//!
//! The core of mm follows pointers into stable nodes and rmap items, so they must stay where they
//! are; the engine names them by 32-bit numbers, so that a page's state fits in 8 bytes. Objects
//! lie in chunks of one page, with the chunk's number at its start, so that an object's number
//! follows from its address; a chunk without objects is freed.
//!
//! Others hold pointers to objects while the arena changes, so a chunk is only accessed through
//! raw pointers: no reference to it, or to a part of it, ever exists here.

use core::{
    mem::{
        offset_of,
        MaybeUninit, //
    },
    ptr::NonNull, //
};
use kernel::{
    alloc::Flags,
    prelude::*, //
};

/// Objects of a chunk.
const SLOTS: usize = 84;

/// Bits of an object's number that select one of its chunk.
const SHIFT: u32 = 7;

/// Alignment and size of a chunk.
const CHUNK_SIZE: usize = 4096;

/// A chunk of objects.
///
/// # Invariants
///
/// `slots[i]` is initialised if and only if bit `i` of `used` is set.
#[repr(C, align(4096))]
struct Chunk<T> {
    used: u128,
    number: u32,
    slots: [MaybeUninit<T>; SLOTS],
}

const ALL_USED: u128 = (1 << SLOTS) - 1;

static_assert!(size_of::<Chunk<[u64; 6]>>() == CHUNK_SIZE && SLOTS <= 1 << SHIFT);

/// Owns a chunk.
///
/// # Invariants
///
/// The pointer is that of a box, which this owns. It is valid for the whole chunk.
struct ChunkBox<T>(NonNull<Chunk<T>>);

impl<T> ChunkBox<T> {
    /// Allocates a chunk without objects.
    fn new(number: u32, flags: Flags) -> Result<Self> {
        let uninit = KBox::<Chunk<T>>::new_uninit(flags)?;
        let chunk = KBox::into_raw(uninit).cast::<Chunk<T>>();
        // SAFETY: The memory has just been allocated, and slots need not be initialised.
        // INVARIANT: No slot is initialised, and no bit is set. The box is given up for this.
        unsafe {
            (&raw mut (*chunk).used).write(0);
            (&raw mut (*chunk).number).write(number);
            Ok(Self(NonNull::new_unchecked(chunk)))
        }
    }

    fn used(&self) -> u128 {
        // SAFETY: By the invariant the chunk is there. `used` changes only through `&mut self`.
        unsafe { (&raw const (*self.0.as_ptr()).used).read() }
    }

    /// Sets `used`. The caller keeps the invariant of [`Chunk`].
    fn set_used(&mut self, used: u128) {
        // SAFETY: By the invariant the chunk is there; nothing else accesses `used`.
        unsafe { (&raw mut (*self.0.as_ptr()).used).write(used) };
    }

    /// The address of a slot.
    #[inline]
    fn slot(&self, i: usize) -> Option<NonNull<T>> {
        if i >= SLOTS {
            return None;
        }
        // SAFETY: By the invariant the chunk is there, and has this slot.
        NonNull::new(unsafe { (&raw mut (*self.0.as_ptr()).slots).cast::<T>().add(i) })
    }
}

impl<T> Drop for ChunkBox<T> {
    fn drop(&mut self) {
        // SAFETY: By the invariant it is the pointer of a box, of an uninitialised chunk. Objects
        // have been taken out before.
        drop(unsafe { KBox::from_raw(self.0.as_ptr().cast::<MaybeUninit<Chunk<T>>>()) });
    }
}

/// What is known of a chunk number.
struct Entry<T> {
    chunk: Option<ChunkBox<T>>,
    /// The number is in [`ObjectArena::partial`].
    listed: bool,
}

/// An arena of `T`.
///
/// # Invariants
///
/// - `partial` holds a number at most once, and if and only if its entry is `listed`. Every chunk
///   that has a free slot is listed; numbers whose chunk has been filled or freed since are dropped
///   when [`ObjectArena::insert`] meets them.
/// - `holes` holds the number of every entry without a chunk, once.
/// - The capacity of `partial` and of `holes` is at least `chunks.len()`.
pub(crate) struct ObjectArena<T> {
    chunks: KVVec<Entry<T>>,
    partial: KVVec<u32>,
    holes: KVVec<u32>,
    len: usize,
    live_chunks: usize,
    flags: Flags,
}

impl<T> ObjectArena<T> {
    /// Creates an empty arena, without allocating. It will allocate with these flags.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) const fn new(flags: Flags) -> Self {
        // INVARIANT: There are no chunks.
        Self {
            chunks: KVVec::new(),
            partial: KVVec::new(),
            holes: KVVec::new(),
            len: 0,
            live_chunks: 0,
            flags,
        }
    }

    /// Returns the number of objects.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Returns the bytes of memory that the arena takes.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn bytes(&self) -> usize {
        self.live_chunks * size_of::<Chunk<T>>()
            + self.chunks.capacity() * size_of::<Entry<T>>()
            + (self.partial.capacity() + self.holes.capacity()) * size_of::<u32>()
    }

    /// Returns the number of a chunk with a free slot, which is allocated if there is none.
    fn chunk_with_room(&mut self) -> Result<u32> {
        while let Some(&number) = self.partial.last() {
            if let Some(entry) = self.chunks.get_mut(number as usize) {
                if entry.chunk.as_ref().is_some_and(|c| c.used() != ALL_USED) {
                    return Ok(number);
                }
                entry.listed = false;
            }
            // INVARIANT: The entry is no longer `listed`.
            self.partial.pop();
        }
        let number = match self.holes.last() {
            Some(&number) => number,
            None => {
                let want = self.chunks.len() + 1;
                keep_capacity(&mut self.partial, want, self.flags)?;
                keep_capacity(&mut self.holes, want, self.flags)?;
                let number = u32::try_from(self.chunks.len())
                    .ok()
                    .filter(|n| *n < u32::MAX >> SHIFT)
                    .ok_or(ENOMEM)?;
                let entry = Entry {
                    chunk: None,
                    listed: false,
                };
                self.chunks.push(entry, self.flags)?;
                // INVARIANT: The entry has no chunk. The capacity holds every number.
                let _ = self.holes.push_within_capacity(number);
                number
            }
        };
        // Where this fails, the number stays a hole.
        let chunk = ChunkBox::new(number, self.flags)?;
        if let Some(entry) = self.chunks.get_mut(number as usize) {
            // INVARIANT: The entry has a chunk now.
            self.holes.pop();
            entry.chunk = Some(chunk);
            self.live_chunks += 1;
            Self::list(&mut self.partial, entry, number);
        }
        Ok(number)
    }

    fn list(partial: &mut KVVec<u32>, entry: &mut Entry<T>, number: u32) {
        if !entry.listed {
            // INVARIANT: The capacity holds every number once. A number that could not be listed
            // would only leave its chunk's room unused.
            entry.listed = partial.push_within_capacity(number).is_ok();
        }
    }

    /// Adds an object, whose address is valid until [`ObjectArena::remove`].
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; `value` is dropped.
    pub(crate) fn insert(&mut self, value: T) -> Result<(u32, NonNull<T>)> {
        let number = self.chunk_with_room()?;
        let entry = self.chunks.get_mut(number as usize).ok_or(ENOMEM)?;
        let chunk = entry.chunk.as_mut().ok_or(ENOMEM)?;
        let used = chunk.used();
        let bit = used.trailing_ones();
        let object = chunk.slot(bit as usize).ok_or(ENOMEM)?;
        // SAFETY: The slot lies in the chunk. By the invariant of `Chunk` nothing is there, so
        // nobody has a pointer to it.
        unsafe { object.write(value) };
        // INVARIANT: The slot has just been initialised.
        chunk.set_used(used | 1 << bit);
        self.len += 1;
        Ok((number << SHIFT | bit, object))
    }

    /// Returns the object with this number.
    ///
    /// # Context
    ///
    /// Any.
    #[inline]
    pub(crate) fn get(&self, id: u32) -> Option<NonNull<T>> {
        let chunk = self.chunks.get((id >> SHIFT) as usize)?.chunk.as_ref()?;
        let bit = id % (1 << SHIFT);
        if chunk.used() >> bit & 1 == 0 {
            return None;
        }
        chunk.slot(bit as usize)
    }

    /// Returns the number of an object.
    ///
    /// # Context
    ///
    /// Any.
    ///
    /// # Safety
    ///
    /// The object is in an arena, whose [`ObjectArena::insert`] or [`ObjectArena::get`] has given
    /// out the pointer.
    pub(crate) unsafe fn number_of(object: NonNull<T>) -> u32 {
        let offset = object.as_ptr().addr() % CHUNK_SIZE;
        // A chunk begins at the multiple of its size below its objects.
        let chunk = object.as_ptr().wrapping_byte_sub(offset).cast::<Chunk<T>>();
        // SAFETY: By the contract the pointer is one into the chunk, and valid for all of it.
        let number = unsafe { (&raw const (*chunk).number).read() };
        let slot = (offset - offset_of!(Chunk<T>, slots)) / size_of::<T>();
        number << SHIFT | slot as u32
    }

    /// Removes an object, and returns it. Its address is invalid from then on.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn remove(&mut self, id: u32) -> Option<T> {
        let number = id >> SHIFT;
        let object = self.get(id)?;
        let entry = self.chunks.get_mut(number as usize)?;
        let chunk = entry.chunk.as_mut()?;
        let used = chunk.used() & !(1 << (id % (1 << SHIFT)));
        // INVARIANT: The object is moved out below.
        chunk.set_used(used);
        // SAFETY: By the invariant the slot was initialised, and `used` no longer says so.
        let value = unsafe { object.read() };
        self.len -= 1;
        if used == 0 {
            entry.chunk = None;
            self.live_chunks -= 1;
            // INVARIANT: The capacity holds every number once.
            let _ = self.holes.push_within_capacity(number);
        } else {
            Self::list(&mut self.partial, entry, number);
        }
        Some(value)
    }

    /// Returns the number of the first object after `after`; of the first one for `None`.
    ///
    /// # Context
    ///
    /// Any.
    pub(crate) fn next(&self, after: Option<u32>) -> Option<u32> {
        let from = match after {
            Some(id) => id.checked_add(1)?,
            None => 0,
        };
        let mut mask = u128::MAX << (from % (1 << SHIFT));
        let first = (from >> SHIFT) as usize;
        for (number, entry) in self.chunks.iter().enumerate().skip(first) {
            let used = mask & entry.chunk.as_ref().map_or(0, ChunkBox::used);
            if used != 0 {
                return Some((number as u32) << SHIFT | used.trailing_zeros());
            }
            mask = u128::MAX;
        }
        None
    }
}

fn keep_capacity(list: &mut KVVec<u32>, want: usize, flags: Flags) -> Result {
    if list.capacity() < want {
        let more = (want - list.len()).max(list.capacity());
        list.reserve(more, flags)?;
    }
    Ok(())
}

impl<T> Drop for ObjectArena<T> {
    fn drop(&mut self) {
        let mut at = None;
        while let Some(id) = self.next(at) {
            drop(self.remove(id));
            at = Some(id);
        }
    }
}
