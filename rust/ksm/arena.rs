// SPDX-License-Identifier: GPL-2.0-only

//! Numbered objects of 48 bytes that never move.
//!
//! The core of mm follows pointers into stable nodes and rmap items, so they must stay where they are; the
//! engine names them by 32-bit numbers, so that a page's state fits in 8 bytes. Objects lie in chunks of one page,
//! with the chunk's number at its start, so that an object's number follows from its address; a chunk without objects
//! is freed.

use core::{
    cell::UnsafeCell,
    mem::MaybeUninit,
    ptr::NonNull, //
};
use kernel::{
    alloc::flags::*,
    prelude::*, //
};

/// Objects of a chunk.
const CHUNK: usize = 84;

/// Bits of an object's number that say which one of its chunk it is.
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
    slots: [UnsafeCell<MaybeUninit<T>>; CHUNK],
}

const ALL_USED: u128 = (1 << CHUNK) - 1;

static_assert!(size_of::<Chunk<[u64; 6]>>() == CHUNK_SIZE && CHUNK <= 1 << SHIFT);

/// What is known of a chunk number.
struct Entry<T> {
    chunk: Option<KBox<Chunk<T>>>,
    /// The number stands in [`Arena::partial`].
    listed: bool,
}

/// An arena of `T`.
///
/// # Invariants
///
/// - `partial` holds a number once, and exactly if its entry is `listed`. Every chunk that has a free slot is
///   listed; numbers whose chunk has been filled or freed since are dropped when [`Arena::insert`] meets them.
/// - `holes` holds the number of every entry without a chunk, once.
/// - The capacity of `partial` and of `holes` is at least `chunks.len()`.
pub(crate) struct Arena<T> {
    chunks: KVVec<Entry<T>>,
    partial: KVVec<u32>,
    holes: KVVec<u32>,
    len: usize,
    live_chunks: usize,
}

impl<T> Arena<T> {
    /// An empty arena. Allocates nothing.
    pub(crate) const fn new() -> Self {
        // INVARIANT: There are no chunks.
        Self {
            chunks: KVVec::new(),
            partial: KVVec::new(),
            holes: KVVec::new(),
            len: 0,
            live_chunks: 0,
        }
    }

    /// Objects in use.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Bytes of memory taken.
    pub(crate) fn bytes(&self) -> usize {
        self.live_chunks * size_of::<Chunk<T>>()
            + self.chunks.capacity() * size_of::<Entry<T>>()
            + (self.partial.capacity() + self.holes.capacity()) * size_of::<u32>()
    }

    /// The number of a chunk with a free slot, made if there is none.
    fn chunk_with_room(&mut self) -> Result<u32> {
        while let Some(&number) = self.partial.last() {
            if let Some(entry) = self.chunks.get_mut(number as usize) {
                if entry.chunk.as_ref().is_some_and(|c| c.used != ALL_USED) {
                    return Ok(number);
                }
                entry.listed = false;
            }
            // INVARIANT: The entry is no longer `listed`.
            self.partial.pop();
        }
        let flags = GFP_KERNEL | __GFP_NOWARN;
        let mut chunk = KBox::<Chunk<T>>::new_uninit(flags)?;
        let number = match self.holes.pop() {
            Some(number) => number,
            None => {
                let want = self.chunks.len() + 1;
                keep_capacity(&mut self.partial, want)?;
                keep_capacity(&mut self.holes, want)?;
                let number = u32::try_from(self.chunks.len())
                    .ok()
                    .filter(|n| *n < u32::MAX >> SHIFT)
                    .ok_or(ENOMEM)?;
                let entry = Entry {
                    chunk: None,
                    listed: false,
                };
                self.chunks.push(entry, flags)?;
                number
            }
        };
        let place = chunk.as_mut_ptr();
        // INVARIANT: No slot is initialised, and no bit is set.
        // SAFETY: The chunk is ours, and slots need not be initialised.
        let chunk = unsafe {
            (&raw mut (*place).used).write(0);
            (&raw mut (*place).number).write(number);
            chunk.assume_init()
        };
        if let Some(entry) = self.chunks.get_mut(number as usize) {
            entry.chunk = Some(chunk);
            self.live_chunks += 1;
            Self::list(&mut self.partial, entry, number);
        }
        Ok(number)
    }

    fn list(partial: &mut KVVec<u32>, entry: &mut Entry<T>, number: u32) {
        if !entry.listed {
            // INVARIANT: The capacity holds every number once. A number that could not be listed would only
            // leave its chunk's room unused.
            entry.listed = partial.push_within_capacity(number).is_ok();
        }
    }

    /// Adds an object; its address holds until [`Arena::remove`].
    ///
    /// # Errors
    ///
    /// `ENOMEM`; `value` is dropped.
    pub(crate) fn insert(&mut self, value: T) -> Result<(u32, NonNull<T>)> {
        let number = self.chunk_with_room()?;
        let entry = self.chunks.get_mut(number as usize).ok_or(ENOMEM)?;
        let chunk = entry.chunk.as_mut().ok_or(ENOMEM)?;
        let bit = chunk.used.trailing_ones() as usize;
        let cell = chunk.slots.get(bit).ok_or(ENOMEM)?.get();
        // SAFETY: `cell` points into the chunk, where by the type's invariant nothing is yet.
        let object = unsafe {
            (*cell).write(value);
            NonNull::new_unchecked((*cell).as_mut_ptr())
        };
        // INVARIANT: The slot has just been initialised.
        chunk.used |= 1 << bit;
        self.len += 1;
        Ok((number << SHIFT | bit as u32, object))
    }

    /// The object of this number.
    #[inline]
    pub(crate) fn get(&self, id: u32) -> Option<NonNull<T>> {
        let chunk = self.chunks.get((id >> SHIFT) as usize)?.chunk.as_ref()?;
        let bit = id % (1 << SHIFT);
        if chunk.used >> bit & 1 == 0 {
            return None;
        }
        NonNull::new(chunk.slots.get(bit as usize)?.get().cast())
    }

    /// The number of an object.
    ///
    /// # Safety
    ///
    /// The object is in an arena.
    pub(crate) unsafe fn number_of(object: NonNull<T>) -> u32 {
        let at = object.as_ptr() as usize;
        let chunk = (at & !(CHUNK_SIZE - 1)) as *const Chunk<T>;
        let offset = at % CHUNK_SIZE - core::mem::offset_of!(Chunk<T>, slots);
        // SAFETY: A chunk begins at the multiple of its size below its objects.
        let number = unsafe { (*chunk).number };
        number << SHIFT | (offset / size_of::<T>()) as u32
    }

    /// Takes an object out, ending its address.
    pub(crate) fn remove(&mut self, id: u32) -> Option<T> {
        let number = id >> SHIFT;
        let object = self.get(id)?;
        let entry = self.chunks.get_mut(number as usize)?;
        let chunk = entry.chunk.as_mut()?;
        // INVARIANT: The object is moved out below.
        chunk.used &= !(1 << (id % (1 << SHIFT)));
        let empty = chunk.used == 0;
        // SAFETY: By the invariant the slot was initialised, and `used` no longer says so.
        let value = unsafe { object.read() };
        self.len -= 1;
        if empty {
            entry.chunk = None;
            self.live_chunks -= 1;
            // INVARIANT: The capacity holds every number once.
            let _ = self.holes.push_within_capacity(number);
        } else {
            Self::list(&mut self.partial, entry, number);
        }
        Some(value)
    }

    /// The number of the first object after `after`.
    pub(crate) fn next(&self, after: Option<u32>) -> Option<u32> {
        let from = after.map_or(0, |id| id + 1);
        let mut used = u128::MAX << (from % (1 << SHIFT));
        for (number, entry) in self
            .chunks
            .iter()
            .enumerate()
            .skip((from >> SHIFT) as usize)
        {
            used &= entry.chunk.as_ref().map_or(0, |chunk| chunk.used);
            if used != 0 {
                return Some((number as u32) << SHIFT | used.trailing_zeros());
            }
            used = u128::MAX;
        }
        None
    }
}

fn keep_capacity(list: &mut KVVec<u32>, want: usize) -> Result {
    if list.capacity() < want {
        let more = (want - list.len()).max(list.capacity());
        list.reserve(more, GFP_KERNEL | __GFP_NOWARN)?;
    }
    Ok(())
}

impl<T> Drop for Arena<T> {
    fn drop(&mut self) {
        let mut at = None;
        while let Some(id) = self.next(at) {
            drop(self.remove(id));
            at = Some(id);
        }
    }
}
