// SPDX-License-Identifier: GPL-2.0-only

//! Memory for ranges, which never move, so that a [`PageId`](super::super::types::PageId) can name
//! them.

use super::{
    super::{
        container::alloc_size::{
            allocated_bytes,
            vec_bytes, //
        },
        types::RangeId,
    },
    range::Range, //
};

use kernel::{
    alloc::{
        AllocError,
        Flags, //
    },
    prelude::*, //
};

/// Number of ranges in a chunk: a page of memory.
const PER_CHUNK: usize = 32;

/// Memory that the ranges of a chunk take.
const CHUNK_BYTES: usize = allocated_bytes(PER_CHUNK * size_of::<Range>());

/// End of a list of chunks.
const NONE: u32 = u32::MAX;

/// One page of ranges.
///
/// # Invariants
///
/// 1. Bit `i` of `used` is set if and only if `ranges[i]` is in use.
/// 2. `ranges` has capacity for [`PER_CHUNK`] if any is in use, and none otherwise.
/// 3. `prev` and `next` link the chunk into the list that it is on by the invariants of
///    [`RangeArena`].
struct Chunk {
    ranges: KVec<Range>,
    used: u32,
    prev: u32,
    next: u32,
}

/// All ranges of all mms.
///
/// # Invariants
///
/// 1. Chunks with some ranges in use and some not are on the doubly linked list that starts at
///    `with_room`.
/// 2. Chunks with none in use are on the list that starts at `empty`, linked by `next`.
/// 3. `allocated` is the number of chunks with some in use.
pub(super) struct RangeArena {
    chunks: KVVec<Chunk>,
    with_room: u32,
    empty: u32,
    allocated: usize,
}

impl RangeArena {
    /// Returns an arena without ranges, without allocating.
    pub(super) const fn new() -> Self {
        // INVARIANT: 1. to 3. hold without chunks.
        Self {
            chunks: KVVec::new(),
            with_room: NONE,
            empty: NONE,
            allocated: 0,
        }
    }

    /// Returns a range that is in use. For one that is not, returns `None` or [`Range::VACANT`].
    #[inline]
    pub(super) fn get(&self, id: RangeId) -> Option<&Range> {
        let id = id.get() as usize;
        self.chunks.get(id / PER_CHUNK)?.ranges.get(id % PER_CHUNK)
    }

    /// As [`RangeArena::get`], for writing.
    #[inline]
    pub(super) fn get_mut(&mut self, id: RangeId) -> Option<&mut Range> {
        let id = id.get() as usize;
        self.chunks
            .get_mut(id / PER_CHUNK)?
            .ranges
            .get_mut(id % PER_CHUNK)
    }

    /// Returns the address of a range, in units of ranges.
    #[inline]
    pub(super) fn number(&self, id: RangeId) -> usize {
        self.get(id).map_or(usize::MAX, Range::number)
    }

    /// Stores a range. Returns its handle.
    ///
    /// # Errors
    ///
    /// `AllocError` if there is no memory or no handle. Nothing has changed then.
    pub(super) fn insert(&mut self, range: Range, flags: Flags) -> Result<RangeId, AllocError> {
        let c = match self.with_room {
            NONE => self.allocate_chunk(flags)?,
            c => c,
        };
        let chunk = self.chunks.get_mut(c as usize).ok_or(AllocError)?;
        let i = chunk.used.trailing_ones() as usize;
        match chunk.ranges.get_mut(i) {
            Some(vacant) => *vacant = range,
            // The lowest vacant place is taken, so a place that was never used is behind the last
            // one.
            None => chunk.ranges.push(range, flags)?,
        }
        // INVARIANT: 1. of `Chunk`: The range is in use now. 1. of `RangeArena`: A full chunk
        // leaves the list.
        chunk.used |= 1 << i;
        if chunk.used == u32::MAX {
            self.unlink(c);
        }
        RangeId::new(c * PER_CHUNK as u32 + i as u32).ok_or(AllocError)
    }

    /// Frees a range, whose handle becomes invalid.
    pub(super) fn remove(&mut self, id: RangeId) {
        let (c, i) = (id.get() / PER_CHUNK as u32, id.get() as usize % PER_CHUNK);
        let Some(chunk) = self.chunks.get_mut(c as usize) else {
            return;
        };
        if let Some(range) = chunk.ranges.get_mut(i) {
            *range = Range::VACANT;
        }
        let was_full = chunk.used == u32::MAX;
        // INVARIANT: 1. of `Chunk`: The range is no longer in use. 1. of `RangeArena`: A chunk that
        // was full has room now and is linked below.
        chunk.used &= !(1 << i);
        let emptied = chunk.used == 0;
        if was_full {
            self.link(c);
        }
        if emptied {
            self.release_chunk(c);
        }
    }

    /// Returns the memory that the arena takes, in bytes, without the values of the ranges.
    pub(super) fn bytes(&self) -> usize {
        vec_bytes(&self.chunks) + self.allocated * CHUNK_BYTES
    }

    /// Allocates the memory of an empty chunk, or a new chunk, and links it as one with room.
    fn allocate_chunk(&mut self, flags: Flags) -> Result<u32, AllocError> {
        let ranges = KVec::with_capacity(PER_CHUNK, flags)?;
        let c = match self.empty {
            NONE => {
                let c = self.chunks.len();
                if c >= RangeId::LIMIT as usize / PER_CHUNK {
                    return Err(AllocError);
                }
                self.chunks.push(
                    Chunk {
                        ranges: KVec::new(),
                        used: 0,
                        prev: NONE,
                        next: NONE,
                    },
                    flags,
                )?;
                c as u32
            }
            c => {
                // INVARIANT: 2. of `RangeArena`: The chunk is taken off the start of the list.
                self.empty = self.chunks.get(c as usize).map_or(NONE, |chunk| chunk.next);
                c
            }
        };
        // INVARIANT: 2. of `Chunk`, 3. of `RangeArena`: The caller is about to use a range of it.
        if let Some(chunk) = self.chunks.get_mut(c as usize) {
            chunk.ranges = ranges;
        }
        self.allocated += 1;
        self.link(c);
        Ok(c)
    }

    /// Frees the memory of a chunk with no range in use and puts it on the list of empty chunks.
    fn release_chunk(&mut self, c: u32) {
        self.unlink(c);
        self.allocated -= 1;
        if self.allocated == 0 {
            *self = Self::new();
        } else if let Some(chunk) = self.chunks.get_mut(c as usize) {
            // INVARIANT: 2. of `Chunk`: Without a range in use it has no capacity. 2. and 3. of
            // `RangeArena`: It goes to the list of empty chunks and is not counted.
            chunk.ranges = KVec::new();
            chunk.next = self.empty;
            self.empty = c;
        }
    }

    /// Puts a chunk at the start of the list of chunks with room.
    fn link(&mut self, c: u32) {
        let next = self.with_room;
        if let Some(chunk) = self.chunks.get_mut(c as usize) {
            chunk.prev = NONE;
            chunk.next = next;
        }
        if let Some(chunk) = self.chunks.get_mut(next as usize) {
            chunk.prev = c;
        }
        self.with_room = c;
    }

    /// Takes a chunk off the list of chunks with room.
    fn unlink(&mut self, c: u32) {
        let Some(chunk) = self.chunks.get(c as usize) else {
            return;
        };
        let (prev, next) = (chunk.prev, chunk.next);
        match self.chunks.get_mut(prev as usize) {
            Some(chunk) => chunk.next = next,
            None => self.with_room = next,
        }
        if let Some(chunk) = self.chunks.get_mut(next as usize) {
            chunk.prev = prev;
        }
    }

    /// Calls `f` for every range in use.
    pub(super) fn for_each(
        &self,
        mut f: impl FnMut(RangeId, &Range) -> Result<(), &'static str>,
    ) -> Result<(), &'static str> {
        for (c, chunk) in self.chunks.iter().enumerate() {
            for (i, range) in chunk.ranges.iter().enumerate() {
                if chunk.used >> i & 1 != 0 {
                    let id = RangeId::new((c * PER_CHUNK + i) as u32);
                    f(id.ok_or("page state: a range without a handle")?, range)?;
                }
            }
        }
        Ok(())
    }

    /// Checks the invariants, for tests and debugging.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        let with_room = self
            .chunks
            .iter()
            .filter(|c| c.used != 0 && c.used != u32::MAX);
        let empty = self.chunks.iter().filter(|c| c.used == 0);
        let (mut c, mut prev, mut listed) = (self.with_room, NONE, 0);
        while let Some(chunk) = self.chunks.get(c as usize) {
            if chunk.prev != prev || chunk.used == 0 || chunk.used == u32::MAX {
                return Err("page state: a chunk is wrongly on the list of those with room");
            }
            (c, prev, listed) = (chunk.next, c, listed + 1);
        }
        if listed != with_room.count() {
            return Err("page state: a chunk with room is not listed");
        }
        let (mut c, mut listed) = (self.empty, 0);
        while let Some(chunk) = self.chunks.get(c as usize) {
            if chunk.used != 0 || chunk.ranges.capacity() != 0 {
                return Err("page state: a chunk is wrongly on the list of empty ones");
            }
            (c, listed) = (chunk.next, listed + 1);
        }
        if listed != empty.count() {
            return Err("page state: an empty chunk is not listed");
        }
        if self.allocated + listed != self.chunks.len() {
            return Err("page state: the number of chunks with memory is wrong");
        }
        Ok(())
    }
}
