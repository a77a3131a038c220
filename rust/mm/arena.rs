// SPDX-License-Identifier: GPL-2.0

//! Numbered objects of 64 bytes that never move.
//!
//! The core of mm follows pointers into stable nodes and rmap items, so they must stay where they are; the
//! engine names them by 32-bit numbers, so that a page's state fits in 8 bytes. Objects lie in chunks of 64;
//! a chunk without objects is freed.

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
const CHUNK: usize = 64;

/// A chunk of objects.
///
/// # Invariants
///
/// `slots[i]` is initialised if and only if bit `i` of `used` is set.
struct Chunk<T> {
    used: u64,
    slots: KBox<[UnsafeCell<MaybeUninit<T>>; CHUNK]>,
}

/// What is known of a chunk number.
struct Entry<T> {
    chunk: Option<Chunk<T>>,
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
        self.live_chunks * CHUNK * size_of::<T>()
            + self.chunks.capacity() * size_of::<Entry<T>>()
            + (self.partial.capacity() + self.holes.capacity()) * size_of::<u32>()
    }

    /// Makes sure that the next [`Arena::insert`] allocates nothing. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn reserve(&mut self) -> Result {
        self.chunk_with_room().map(|_| ())
    }

    /// The number of a chunk with a free slot, made if there is none.
    fn chunk_with_room(&mut self) -> Result<u32> {
        while let Some(&number) = self.partial.last() {
            if let Some(entry) = self.chunks.get_mut(number as usize) {
                if entry.chunk.as_ref().is_some_and(|c| c.used != u64::MAX) {
                    return Ok(number);
                }
                entry.listed = false;
            }
            // INVARIANT: The entry is no longer `listed`.
            self.partial.pop();
        }
        let flags = GFP_KERNEL | __GFP_NOWARN;
        let slots = KBox::<[UnsafeCell<MaybeUninit<T>>; CHUNK]>::new_uninit(flags)?;
        // SAFETY: An array of uninitialised cells needs no initialisation.
        let slots = unsafe { slots.assume_init() };
        // INVARIANT: No slot is initialised, and no bit is set.
        let chunk = Chunk { used: 0, slots };
        let number = match self.holes.pop() {
            Some(number) => number,
            None => {
                let want = self.chunks.len() + 1;
                keep_capacity(&mut self.partial, want)?;
                keep_capacity(&mut self.holes, want)?;
                let number = u32::try_from(self.chunks.len())
                    .ok()
                    .filter(|n| *n < u32::MAX / CHUNK as u32)
                    .ok_or(ENOMEM)?;
                let entry = Entry {
                    chunk: None,
                    listed: false,
                };
                self.chunks.push(entry, flags)?;
                number
            }
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
        Ok((number * CHUNK as u32 + bit as u32, object))
    }

    /// The object of this number.
    #[inline]
    pub(crate) fn get(&self, id: u32) -> Option<NonNull<T>> {
        let chunk = self.chunks.get(id as usize / CHUNK)?.chunk.as_ref()?;
        let bit = id as usize % CHUNK;
        if chunk.used & (1 << bit) == 0 {
            return None;
        }
        NonNull::new(chunk.slots[bit].get().cast())
    }

    /// Takes an object out, ending its address.
    pub(crate) fn remove(&mut self, id: u32) -> Option<T> {
        let number = id / CHUNK as u32;
        let object = self.get(id)?;
        let entry = self.chunks.get_mut(number as usize)?;
        let chunk = entry.chunk.as_mut()?;
        // INVARIANT: The object is moved out below.
        chunk.used &= !(1 << (id as usize % CHUNK));
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
        let mut id = after.map_or(0, |id| id as usize + 1);
        while id / CHUNK < self.chunks.len() {
            let chunk = self.chunks[id / CHUNK].chunk.as_ref();
            let used = chunk.map_or(0, |c| c.used & (u64::MAX << (id % CHUNK)));
            if used != 0 {
                return Some((id / CHUNK * CHUNK) as u32 + used.trailing_zeros());
            }
            id = (id / CHUNK + 1) * CHUNK;
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
