// SPDX-License-Identifier: GPL-2.0-only

//! What is known of every page that the scanner has seen and may see again.
//!
//! One 64-bit word for each tracked page. The pages of an mm are grouped in aligned ranges of
//! [`RANGE_PAGES`] pages: a bitmap of the pages that are tracked and a vector of their words
//! without gaps ([`range`]). The ranges of all mms are in one arena ([`range_arena`]) and never
//! move, so a [`PageId`] can name a page in 40 bits. For each mm, a [`directory`] has its ranges in
//! the order of their addresses.
//!
//! The scanner visits addresses in ascending order. A cursor remembers the range that was used
//! last, and one that does not exist, so each of those visits takes constant time.
//!
//! The states do not own what they refer to. Before a page is untracked, the caller removes its
//! entry from the index (`indexed`) or frees its rmap item (`Merged`).
//!
//! # Examples
//!
//! ```
//! use engine::{
//!     page_state::{PageState, PageStates},
//!     types::{ItemId, SlotId},
//! };
//! use kernel::prelude::*;
//!
//! let (mut states, mm) = (PageStates::new(), SlotId(0));
//! let page = states.track(mm, 0x7f00_0000_1000, GFP_KERNEL)?;
//! assert_eq!(states.get(page), Some(PageState::NEW));
//! states.set(page, PageState::Merged(ItemId::new(3)));
//! assert_eq!(states.at(mm, 0x7f00_0000_1000), Some((page, PageState::Merged(ItemId::new(3)))));
//! assert_eq!(states.untrack(page), Some(PageState::Merged(ItemId::new(3))));
//! assert_eq!(states.tracked_total(), 0);
//! # Ok::<(), Error>(())
//! ```

mod counts;
mod directory;
mod due;
mod range;
mod range_arena;
mod state;

use super::{
    container::paged_vec::PagedVec,
    governor::watch::Watch,
    types::{
        Fingerprint,
        PageId,
        RangeId,
        SlotId,
        RANGE_PAGES,
        RANGE_SHIFT, //
    },
};

use directory::{
    Directory,
    Position, //
};
use due::Ranges;
use range::Range;
use range_arena::RangeArena;
use state::LINKED;

pub use counts::PageCounts;
pub use due::{
    Run,
    View, //
};
pub use state::{
    PageState,
    Tracked, //
};

use kernel::{
    alloc::Flags,
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*, //
};

/// Splits an address into the number of its range and the offset of its page in that range.
#[inline]
const fn split(addr: usize) -> (usize, usize) {
    (addr >> RANGE_SHIFT, addr >> PAGE_SHIFT & (RANGE_PAGES - 1))
}

/// Returns the address that [`split`] has split.
#[inline]
const fn join(number: usize, offset: usize) -> usize {
    number << RANGE_SHIFT | offset << PAGE_SHIFT
}

/// The range that was used last.
#[derive(Clone, Copy)]
struct Cursor {
    slot: SlotId,
    number: usize,
    id: RangeId,
    at: Position,
}

/// Where the last look-ups were. New pages come in runs as well, so an absent range is kept too.
#[derive(Clone, Copy)]
struct Near {
    cursor: Option<Cursor>,
    /// A slot and the number of a range that it does not have.
    absent: Option<(SlotId, usize)>,
}

impl Near {
    const NOTHING: Self = Self {
        cursor: None,
        absent: None,
    };
}

/// The states of all tracked pages of all mms.
///
/// Addresses may be anywhere in a page. The memory that this takes ([`PageStates::bytes`]) is
/// bounded by the address space that the caller has it track.
///
/// # Invariants
///
/// 1. Every range in the arena is in the directory of its slot, and every range in a directory is
///    in the arena.
/// 2. Every range has tracked pages.
/// 3. `tracked` of each directory is the number of tracked pages in its ranges, and `tracked` of
///    `self` is the sum of those.
/// 4. `bytes` is the memory of the values of the ranges and of the leaves of the directories.
/// 5. The cursor's range exists and its fields are right. The absent range does not exist.
pub struct PageStates {
    table: Table,
    near: Near,
    tracked: usize,
    bytes: usize,
}

/// The ranges, and the directory of each slot.
struct Table {
    arena: RangeArena,
    slots: PagedVec<Directory>,
}

/// Reads states that do not change meanwhile. Several threads can read at once, each with a reader
/// of its own.
pub struct Reader<'a> {
    table: &'a Table,
    near: Near,
}

impl Reader<'_> {
    /// As [`PageStates::at`].
    #[inline]
    pub fn at(&mut self, slot: SlotId, addr: usize) -> Option<(PageId, PageState)> {
        self.table.at(&mut self.near, slot, addr)
    }

    /// As [`PageStates::first_in`].
    pub fn first_in(
        &mut self,
        slot: SlotId,
        within: core::ops::Range<usize>,
    ) -> Option<(PageId, usize, PageState)> {
        self.table.first_in(&mut self.near.cursor, slot, within)
    }
}

impl Default for PageStates {
    fn default() -> Self {
        Self::new()
    }
}

impl PageStates {
    /// Returns a table without pages, without allocating.
    pub const fn new() -> Self {
        // INVARIANT: 1. to 5. hold without pages.
        Self {
            table: Table {
                arena: RangeArena::new(),
                slots: PagedVec::new(),
            },
            near: Near::NOTHING,
            tracked: 0,
            bytes: 0,
        }
    }

    /// Returns the number of tracked pages of all mms.
    pub const fn tracked_total(&self) -> usize {
        self.tracked
    }

    /// Returns the number of tracked pages of one mm.
    pub fn tracked(&self, slot: SlotId) -> usize {
        self.table.directory(slot).map_or(0, Directory::tracked)
    }

    /// Returns how many pages of one mm are tracked, by what is known of them. Takes time in
    /// proportion to the number of its ranges.
    pub fn counts(&self, slot: SlotId) -> PageCounts {
        let mut counts = PageCounts::default();
        if let Some(directory) = self.table.directory(slot) {
            directory.for_each(|id| {
                if let Some(range) = self.table.arena.get(id) {
                    counts.add(range.counts());
                }
            });
        }
        counts
    }

    /// Returns the memory that the table takes, in bytes.
    pub fn bytes(&self) -> usize {
        self.table.arena.bytes() + self.table.slots.bytes() + self.bytes
    }

    /// Returns the page at an address if it is tracked.
    #[inline]
    pub fn lookup(&mut self, slot: SlotId, addr: usize) -> Option<PageId> {
        let (number, offset) = split(addr);
        let id = self.table.find(&mut self.near, slot, number)?;
        self.table
            .arena
            .get(id)?
            .contains(offset)
            .then_some(PageId::new(id, offset))
    }

    /// Returns the page at an address and its state, if it is tracked.
    #[inline]
    pub fn at(&mut self, slot: SlotId, addr: usize) -> Option<(PageId, PageState)> {
        self.table.at(&mut self.near, slot, addr)
    }

    /// Returns a reader, with which a thread can read the states beside others.
    pub fn reader(&self) -> Reader<'_> {
        Reader {
            table: &self.table,
            near: self.near,
        }
    }

    /// Starts to track the page at an address, in state [`PageState::NEW`]. A page that is tracked
    /// already keeps its state.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory. Nothing has changed then.
    #[allow(dead_code, reason = "the module tracks whole walks with `track_all`")]
    pub fn track(&mut self, slot: SlotId, addr: usize, flags: Flags) -> Result<PageId> {
        self.track_in_range(slot, addr..addr + PAGE_SIZE, flags);
        self.lookup(slot, addr).ok_or(ENOMEM)
    }

    /// Starts to track all pages at these page-aligned addresses that are not tracked yet.
    ///
    /// Returns the number of new pages, which is smaller if there is no memory.
    pub fn track_all(
        &mut self,
        slot: SlotId,
        within: core::ops::Range<usize>,
        flags: Flags,
    ) -> usize {
        let before = self.tracked;
        let mut at = within.start;
        while at < within.end {
            let next = (at + 1).next_multiple_of(1 << RANGE_SHIFT);
            let end = next.min(within.end);
            if !self.track_in_range(slot, at..end, flags) {
                break;
            }
            at = end;
        }
        self.tracked - before
    }

    /// Starts to track the pages at addresses in one range. Returns whether all are tracked now.
    #[inline]
    fn track_in_range(
        &mut self,
        slot: SlotId,
        within: core::ops::Range<usize>,
        flags: Flags,
    ) -> bool {
        let (number, offset) = split(within.start);
        let id = match self.table.find(&mut self.near, slot, number) {
            Some(id) => Ok(id),
            None => self.add_range(slot, number, flags),
        };
        let Some(range) = id.ok().and_then(|id| self.table.arena.get_mut(id)) else {
            return false;
        };
        let (bytes, len) = (range.value_bytes(), range.len());
        let end = offset + (within.end - within.start) / PAGE_SIZE;
        // INVARIANT: 2. A new range has memory for its first page.
        let all = range.insert_all(offset..end, PageState::NEW.to_bits(), flags);
        // INVARIANT: 3. and 4. The differences of the range are added.
        self.bytes = self.bytes + range.value_bytes() - bytes;
        let new = range.len() - len;
        self.tracked += new;
        if let Some(directory) = self.table.slots.get_mut(slot.0 as usize) {
            *directory.tracked_mut() += new;
        }
        all.is_ok()
    }

    /// Stops tracking a page. Returns its last state, `None` if it was not tracked.
    ///
    /// The caller has released what the state refers to, or does so next.
    pub fn untrack(&mut self, page: PageId) -> Option<PageState> {
        let range = self.table.arena.get_mut(page.range())?;
        let before = range.value_bytes();
        let bits = range.remove(page.offset())?;
        let (slot, empty) = (range.slot(), range.len() == 0);
        // INVARIANT: 3. and 4. The differences of the range are subtracted.
        self.bytes = self.bytes + range.value_bytes() - before;
        self.tracked -= 1;
        if let Some(directory) = self.table.slots.get_mut(slot.0 as usize) {
            *directory.tracked_mut() -= 1;
        }
        if empty {
            self.remove_range(page.range());
        }
        Some(PageState::from_bits(bits))
    }

    /// Returns the state of a page, `None` if it is not tracked.
    #[inline]
    pub fn get(&self, page: PageId) -> Option<PageState> {
        self.table.get(page)
    }

    /// Changes the state of a page. Returns the previous state; does nothing and returns `None` if
    /// the page is not tracked.
    #[inline]
    pub fn set(&mut self, page: PageId, state: PageState) -> Option<PageState> {
        let range = self.table.arena.get_mut(page.range())?;
        let bits = range.replace(page.offset(), state.to_bits())?;
        Some(PageState::from_bits(bits))
    }

    /// Returns the fingerprint of a page that is tracked and not merged.
    ///
    /// The index asks for it when it moves the entry of a candidate.
    #[inline]
    pub fn fingerprint(&self, page: PageId) -> Option<Fingerprint> {
        match self.get(page)? {
            PageState::Tracked(tracked) => Some(tracked.fingerprint()),
            PageState::Merged(_) => None,
        }
    }

    /// Returns the slot of the mm and the address of a page, `None` if it is not tracked.
    #[inline]
    pub fn locate(&self, page: PageId) -> Option<(SlotId, usize)> {
        let range = self.table.arena.get(page.range())?;
        range
            .contains(page.offset())
            .then_some((range.slot(), join(range.number(), page.offset())))
    }

    /// Returns the first tracked page of an mm with an address in `within`, its address and state.
    ///
    /// To visit all pages, continue after the returned address. Pages may be tracked and untracked
    /// in between.
    pub fn first_in(
        &mut self,
        slot: SlotId,
        within: core::ops::Range<usize>,
    ) -> Option<(PageId, usize, PageState)> {
        self.table.first_in(&mut self.near.cursor, slot, within)
    }

    /// Returns the last tracked page of an mm with an address in `within`, its address and state.
    ///
    /// To untrack many pages, untrack the last one repeatedly: that never moves the states of
    /// others.
    pub fn last_in(
        &mut self,
        slot: SlotId,
        within: core::ops::Range<usize>,
    ) -> Option<(PageId, usize, PageState)> {
        let last = within.end.checked_sub(1)?;
        let (number, offset) = split(last);
        let floor = self.table.floor(self.near.cursor, slot, number)?;
        let to = if floor.number == number {
            offset
        } else {
            RANGE_PAGES - 1
        };
        let (cursor, offset) = match self.table.arena.get(floor.id)?.prev(to) {
            Some(offset) => (floor, offset),
            None => {
                let at = self.table.directory(slot)?.before(floor.at)?;
                let cursor = self.table.cursor_at(slot, at)?;
                (
                    cursor,
                    self.table.arena.get(cursor.id)?.prev(RANGE_PAGES - 1)?,
                )
            }
        };
        let addr = join(cursor.number, offset);
        if addr < within.start {
            return None;
        }
        self.near.cursor = Some(cursor);
        let page = PageId::new(cursor.id, offset);
        Some((page, addr, self.get(page)?))
    }

    /// Returns the first tracked page of an mm at or after `from` that is a candidate or merged,
    /// its address and state.
    pub fn next_linked(&mut self, slot: SlotId, from: usize) -> Option<(PageId, usize, PageState)> {
        let (number, mut offset) = split(from.checked_next_multiple_of(PAGE_SIZE)?);
        let floor = self.table.floor(self.near.cursor, slot, number);
        let mut cursor = match floor {
            Some(cursor) if cursor.number == number => cursor,
            _ => {
                offset = 0;
                let directory = self.table.directory(slot)?;
                let at = floor.map_or(Directory::FIRST, |cursor| directory.after(cursor.at));
                self.table.cursor_at(slot, at)?
            }
        };
        loop {
            let found = self.table.arena.get(cursor.id)?.next_with(offset, LINKED);
            if let Some((offset, bits)) = found {
                self.near.cursor = Some(cursor);
                let page = PageId::new(cursor.id, offset);
                return Some((
                    page,
                    join(cursor.number, offset),
                    PageState::from_bits(bits),
                ));
            }
            offset = 0;
            cursor = self
                .table
                .cursor_at(slot, self.table.directory(slot)?.after(cursor.at))?;
        }
    }

    /// Returns what is to be looked at first at or after `from`, `None` if there is nothing. Tells
    /// `watch` of the ranges that are passed.
    ///
    /// `from` is the start of a range, or lies in one that is being looked at.
    pub fn next_run(
        &self,
        slot: SlotId,
        from: usize,
        view: &View,
        watch: &mut Watch,
    ) -> Option<Run> {
        self.table.ranges(slot).next_run(from, view, watch)
    }

    /// Records that the pages of those ranges which start in `within` have been looked at. Tells
    /// `watch` of them.
    pub fn looked(
        &mut self,
        slot: SlotId,
        within: core::ops::Range<usize>,
        view: &View,
        watch: &mut Watch,
    ) {
        // The first may have been begun before.
        let mut start = within.start >> RANGE_SHIFT << RANGE_SHIFT;
        let end = within.end >> RANGE_SHIFT << RANGE_SHIFT;
        while let Some((id, next)) = self.table.ranges(slot).next_in(start..end) {
            if let Some(range) = self.table.arena.get_mut(id) {
                range.looked(view.now, view.pressure);
                if let Some(due) = range.pause().due(view.pressure, range.number()) {
                    watch.pass(1, view.now, due);
                }
            }
            start = next;
        }
    }

    /// Stops tracking all pages of an mm. Returns their number.
    ///
    /// The caller has released what their states refer to. Takes time in proportion to the number
    /// of ranges.
    pub fn remove_slot(&mut self, slot: SlotId) -> usize {
        let Some(directory) = self.table.slots.get_mut(slot.0 as usize) else {
            return 0;
        };
        let directory = core::mem::replace(directory, Directory::new());
        let (arena, bytes) = (&mut self.table.arena, &mut self.bytes);
        *bytes -= directory.bytes();
        directory.for_each(|id| {
            *bytes -= arena.get(id).map_or(0, Range::value_bytes);
            arena.remove(id);
        });
        self.tracked -= directory.tracked();
        self.near.cursor = None;
        // Low slots are used first, so the memory of unused ones at the end can be freed.
        while let Some(last) = self.table.slots.len().checked_sub(1) {
            if self.table.slots.get(last).is_none_or(|d| !d.is_empty()) {
                break;
            }
            self.table.slots.pop();
        }
        directory.tracked()
    }

    /// Checks every invariant, for tests and debugging. Takes time in proportion to the number of
    /// tracked pages.
    ///
    /// # Errors
    ///
    /// A description of the invariant that does not hold.
    pub fn check(&self) -> Result<(), &'static str> {
        self.table.arena.check()?;
        let (mut listed, mut tracked, mut bytes) = (0, 0, 0);
        for s in 0..self.table.slots.len() {
            let slot = SlotId(s as u32);
            let Some(directory) = self.table.slots.get(s) else {
                return Err("page state: a slot is missing");
            };
            directory.check(&self.table.arena)?;
            let (mut pages, mut alien) = (0, false);
            directory.for_each(|id| {
                let range = self.table.arena.get(id);
                alien |= range.map(Range::slot) != Some(slot);
                pages += range.map_or(0, Range::len);
                listed += 1;
            });
            if alien {
                return Err("page state: a range in another mm's directory");
            }
            if pages != directory.tracked() {
                return Err("page state: the number of an mm's tracked pages is wrong");
            }
            tracked += directory.tracked();
            bytes += directory.bytes();
        }
        self.table.arena.for_each(|_, range| {
            listed -= 1;
            bytes += range.value_bytes();
            if range.len() == 0 {
                return Err("page state: a range without pages");
            }
            range.check()
        })?;
        if listed != 0 {
            return Err("page state: not every range is in one directory");
        }
        if tracked != self.tracked {
            return Err("page state: the number of tracked pages is wrong");
        }
        if bytes != self.bytes {
            return Err("page state: the number of bytes is wrong");
        }
        if let Some(cursor) = self.near.cursor {
            let found = self.table.cursor_at(cursor.slot, cursor.at);
            if found.is_none_or(|found| found.id != cursor.id || found.number != cursor.number) {
                return Err("page state: the cursor is wrong");
            }
        }
        if let Some((slot, number)) = self.near.absent {
            let found = self.table.floor(None, slot, number);
            if found.is_some_and(|found| found.number == number) {
                return Err("page state: an absent range is there");
            }
        }
        Ok(())
    }

    /// Adds a range that the slot does not have yet, and makes it the cursor.
    ///
    /// The caller tracks a page in it next, which cannot fail.
    #[cold]
    fn add_range(&mut self, slot: SlotId, number: usize, flags: Flags) -> Result<RangeId> {
        while self.table.slots.len() <= slot.0 as usize {
            self.table.slots.push(Directory::new(), flags)?;
        }
        let directory = self.table.slots.get_mut(slot.0 as usize).ok_or(EINVAL)?;
        let range = Range::new(slot, number, flags)?;
        let value_bytes = range.value_bytes();
        let id = self.table.arena.insert(range, flags)?;
        match directory.insert(&self.table.arena, id, &mut self.bytes, flags) {
            Ok(at) => {
                // INVARIANT: 1. The range is in the arena and in the directory. 4. Its values are
                // counted. 5. The cursor is the new range, and none is known to be absent.
                self.bytes += value_bytes;
                let cursor = Cursor {
                    slot,
                    number,
                    id,
                    at,
                };
                self.near = Near {
                    cursor: Some(cursor),
                    absent: None,
                };
                Ok(id)
            }
            Err(error) => {
                self.table.arena.remove(id);
                // The directory may have been rearranged.
                self.near.cursor = None;
                Err(error.into())
            }
        }
    }

    /// Removes a range without tracked pages.
    #[cold]
    fn remove_range(&mut self, id: RangeId) {
        let Some(range) = self.table.arena.get(id) else {
            return;
        };
        let (slot, number) = (range.slot(), range.number());
        let at = self
            .table
            .floor(self.near.cursor, slot, number)
            .map(|cursor| cursor.at);
        if let (Some(directory), Some(at)) = (self.table.slots.get_mut(slot.0 as usize), at) {
            // INVARIANT: 1. The range leaves directory and arena. 4. Its memory is subtracted. 5.
            // The positions of later ranges change, so the cursor is dropped.
            directory.remove(&self.table.arena, at, &mut self.bytes);
            self.bytes -= range.value_bytes();
            self.table.arena.remove(id);
            self.near.cursor = None;
        }
    }
}

impl Table {
    #[inline]
    fn at(&self, near: &mut Near, slot: SlotId, addr: usize) -> Option<(PageId, PageState)> {
        let (number, offset) = split(addr);
        let id = self.find(near, slot, number)?;
        let bits = self.arena.get(id)?.get(offset)?;
        Some((PageId::new(id, offset), PageState::from_bits(bits)))
    }

    #[inline]
    fn get(&self, page: PageId) -> Option<PageState> {
        let bits = self.arena.get(page.range())?.get(page.offset())?;
        Some(PageState::from_bits(bits))
    }

    fn first_in(
        &self,
        hint: &mut Option<Cursor>,
        slot: SlotId,
        within: core::ops::Range<usize>,
    ) -> Option<(PageId, usize, PageState)> {
        // A page belongs to `within` by the address of its start.
        let start = within.start.checked_next_multiple_of(PAGE_SIZE)?;
        let (number, offset) = split(start);
        let floor = self.floor(*hint, slot, number);
        let in_range = floor.and_then(|cursor| {
            let from = if cursor.number == number {
                offset
            } else {
                RANGE_PAGES
            };
            Some((cursor, self.arena.get(cursor.id)?.next(from)?))
        });
        let (cursor, offset) = match in_range {
            Some(found) => found,
            None => {
                let directory = self.directory(slot)?;
                let at = floor.map_or(Directory::FIRST, |cursor| directory.after(cursor.at));
                let cursor = self.cursor_at(slot, at)?;
                (cursor, self.arena.get(cursor.id)?.next(0)?)
            }
        };
        let addr = join(cursor.number, offset);
        if addr >= within.end {
            return None;
        }
        *hint = Some(cursor);
        let page = PageId::new(cursor.id, offset);
        Some((page, addr, self.get(page)?))
    }

    #[inline]
    fn directory(&self, slot: SlotId) -> Option<&Directory> {
        self.slots.get(slot.0 as usize)
    }

    /// Returns the ranges of a slot.
    fn ranges(&self, slot: SlotId) -> Ranges<'_> {
        static NONE: Directory = Directory::new();
        Ranges {
            arena: &self.arena,
            directory: self.directory(slot).unwrap_or(&NONE),
        }
    }

    /// Returns the range of a slot with this number, and makes it the cursor.
    #[inline]
    fn find(&self, near: &mut Near, slot: SlotId, number: usize) -> Option<RangeId> {
        match near.cursor {
            Some(cursor) if cursor.number == number && cursor.slot == slot => Some(cursor.id),
            _ if near.absent == Some((slot, number)) => None,
            _ => self.find_elsewhere(near, slot, number),
        }
    }

    /// As [`Table::find`], if the range is neither the cursor nor known to be absent.
    #[inline(never)]
    fn find_elsewhere(&self, near: &mut Near, slot: SlotId, number: usize) -> Option<RangeId> {
        let floor = self.floor(near.cursor, slot, number);
        let found = floor.filter(|found| found.number == number);
        // INVARIANT: 5. The range was found, or was looked for and is absent.
        match found {
            Some(_) => near.cursor = found,
            None => near.absent = Some((slot, number)),
        }
        Some(found?.id)
    }

    /// Returns the last range of a slot whose number is not above `number`, likely near `hint`.
    fn floor(&self, hint: Option<Cursor>, slot: SlotId, number: usize) -> Option<Cursor> {
        let directory = self.directory(slot)?;
        // Most often that is the range that was used last, or the one after it.
        if let Some(cursor) = hint.filter(|c| c.slot == slot && c.number <= number) {
            if cursor.number == number {
                return Some(cursor);
            }
            match self.cursor_at(slot, directory.after(cursor.at)) {
                Some(next) if next.number <= number => {
                    let after = self.cursor_at(slot, directory.after(next.at));
                    if after.is_none_or(|after| after.number > number) {
                        return Some(next);
                    }
                }
                _ => return Some(cursor),
            }
        }
        self.cursor_at(slot, directory.floor(&self.arena, number)?)
    }

    /// Returns the cursor for a position in a slot's directory, if there is a range.
    fn cursor_at(&self, slot: SlotId, at: Position) -> Option<Cursor> {
        let id = self.directory(slot)?.get(at)?;
        Some(Cursor {
            slot,
            number: self.arena.number(id),
            id,
            at,
        })
    }
}
