// SPDX-License-Identifier: GPL-2.0-only

//! The ranges of one mm, in the order of their addresses.

use super::{
    super::{
        container::alloc_size::{
            shrink,
            vec_bytes, //
        },
        types::RangeId,
    },
    range_arena::RangeArena, //
};

use kernel::{
    alloc::{
        AllocError,
        Flags, //
    },
    prelude::*, //
};

/// Largest number of ranges in a leaf: 1 GiB of address space. Bounds what one insertion moves.
const LEAF_RANGES: usize = 512;

/// Capacity of the first buffer of a leaf: a `kmalloc-8` object.
const MIN_RANGES: usize = 2;

/// A piece of the sorted sequence.
struct Leaf {
    /// Address of the first range, in units of ranges.
    first: usize,
    ids: KVec<RangeId>,
}

/// Position of a range in a [`Directory`]. Valid until a range is inserted or removed there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Position {
    leaf: usize,
    index: usize,
}

/// The ranges of one mm, sorted by address, in leaves of bounded size: a B+ tree of two levels.
///
/// # Invariants
///
/// 1. The addresses of all ranges ascend, within leaves and from leaf to leaf.
/// 2. No leaf is empty.
/// 3. `first` of a leaf is the address of its first range.
pub(super) struct Directory {
    leaves: KVVec<Leaf>,
    tracked: usize,
}

impl Directory {
    /// Returns a directory without ranges, without allocating.
    pub(super) const fn new() -> Self {
        // INVARIANT: 1. to 3. hold without leaves.
        Self {
            leaves: KVVec::new(),
            tracked: 0,
        }
    }

    /// Returns whether there are no ranges.
    pub(super) fn is_empty(&self) -> bool {
        self.leaves.is_empty()
    }

    /// Returns the number of tracked pages in all ranges, for the caller to update.
    pub(super) fn tracked_mut(&mut self) -> &mut usize {
        &mut self.tracked
    }

    /// Returns the number of tracked pages in all ranges.
    pub(super) const fn tracked(&self) -> usize {
        self.tracked
    }

    /// Returns the memory that the directory takes, in bytes. Takes time in proportion to the
    /// number of leaves.
    pub(super) fn bytes(&self) -> usize {
        let ids: usize = self.leaves.iter().map(|leaf| vec_bytes(&leaf.ids)).sum();
        vec_bytes(&self.leaves) + ids
    }

    /// Returns the range at a position.
    #[inline]
    pub(super) fn get(&self, at: Position) -> Option<RangeId> {
        self.leaves.get(at.leaf)?.ids.get(at.index).copied()
    }

    /// Position of the first range.
    pub(super) const FIRST: Position = Position { leaf: 0, index: 0 };

    /// Returns the position after this one.
    #[inline]
    pub(super) fn after(&self, at: Position) -> Position {
        match self.leaves.get(at.leaf) {
            Some(leaf) if at.index + 1 < leaf.ids.len() => Position {
                index: at.index + 1,
                ..at
            },
            _ => Position {
                leaf: at.leaf + 1,
                index: 0,
            },
        }
    }

    /// Returns the position before this one, if there is one.
    #[inline]
    pub(super) fn before(&self, at: Position) -> Option<Position> {
        match at.index.checked_sub(1) {
            Some(index) => Some(Position { index, ..at }),
            None => {
                let leaf = at.leaf.checked_sub(1)?;
                let index = self.leaves.get(leaf)?.ids.len().checked_sub(1)?;
                Some(Position { leaf, index })
            }
        }
    }

    /// Returns the position of the last range whose address is not above `number`.
    pub(super) fn floor(&self, arena: &RangeArena, number: usize) -> Option<Position> {
        let leaf = self
            .leaves
            .partition_point(|leaf| leaf.first <= number)
            .checked_sub(1)?;
        let index = self
            .leaves
            .get(leaf)?
            .ids
            .partition_point(|&id| arena.number(id) <= number)
            .checked_sub(1)?;
        Some(Position { leaf, index })
    }

    /// Inserts a range that is in the arena already. Adds the memory that this takes to `bytes` and
    /// returns the position of the range.
    ///
    /// # Errors
    ///
    /// `AllocError` if there is no memory. Nothing has changed then.
    pub(super) fn insert(
        &mut self,
        arena: &RangeArena,
        id: RangeId,
        bytes: &mut usize,
        flags: Flags,
    ) -> Result<Position, AllocError> {
        let number = arena.number(id);
        let mut at = match self.floor(arena, number) {
            Some(Position { leaf, index }) => Position {
                leaf,
                index: index + 1,
            },
            None => Self::FIRST,
        };
        match self.leaves.get(at.leaf).map(|leaf| leaf.ids.len()) {
            Some(len) if len < LEAF_RANGES => (),
            Some(len) if at.index > 0 && at.index < len => {
                self.split(arena, at.leaf, bytes, flags)?;
                if at.index > len / 2 {
                    at = Position {
                        leaf: at.leaf + 1,
                        index: at.index - len / 2,
                    };
                }
            }
            // At either end of a full leaf the range gets a new leaf: insertion in ascending order
            // leaves full leaves.
            len => {
                if at.index > 0 && len.is_some() {
                    at.leaf += 1;
                }
                at.index = 0;
                let ids = KVec::with_capacity(MIN_RANGES, flags)?;
                self.add_leaf(at.leaf, Leaf { first: number, ids }, bytes, flags)?;
            }
        }
        let leaf = self.leaves.get_mut(at.leaf).ok_or(AllocError)?;
        let before = vec_bytes(&leaf.ids);
        leaf.ids.reserve(1, flags)?;
        *bytes = *bytes + vec_bytes(&leaf.ids) - before;
        // INVARIANT: 1. `at` is behind all ranges that are not above the new one. 2. The leaf has a
        // range now. 3. `first` is set below if the new range is the first one.
        if leaf.ids.insert_within_capacity(at.index, id).is_err() {
            return Err(AllocError);
        }
        if at.index == 0 {
            leaf.first = number;
        }
        Ok(at)
    }

    /// Removes the range at a position. Subtracts the memory that this frees from `bytes`.
    ///
    /// The range is still in the arena, as are the others.
    pub(super) fn remove(&mut self, arena: &RangeArena, at: Position, bytes: &mut usize) {
        let Some(leaf) = self.leaves.get_mut(at.leaf) else {
            return;
        };
        let before = vec_bytes(&leaf.ids);
        if leaf.ids.remove(at.index).is_err() {
            return;
        }
        // INVARIANT: 3. `first` follows the first range. 2. A leaf without ranges is removed below.
        if let Some(&first) = leaf.ids.first() {
            leaf.first = arena.number(first);
            shrink(&mut leaf.ids, MIN_RANGES);
            *bytes = *bytes + vec_bytes(&leaf.ids) - before;
            return;
        }
        *bytes -= before;
        if self.leaves.remove(at.leaf).is_ok() && self.leaves.is_empty() {
            *bytes -= vec_bytes(&self.leaves);
            self.leaves = KVVec::new();
        }
    }

    /// Moves the upper half of a leaf to a new one behind it.
    fn split(
        &mut self,
        arena: &RangeArena,
        leaf: usize,
        bytes: &mut usize,
        flags: Flags,
    ) -> Result<(), AllocError> {
        let Some(lower) = self.leaves.get(leaf) else {
            return Ok(());
        };
        let half = lower.ids.len() / 2;
        let upper = lower.ids.get(half..).unwrap_or_default();
        let Some(&first) = upper.first() else {
            return Ok(());
        };
        let mut ids = KVec::with_capacity(LEAF_RANGES, flags)?;
        ids.extend_from_slice(upper, flags)?;
        let first = arena.number(first);
        self.add_leaf(leaf + 1, Leaf { first, ids }, bytes, flags)?;
        // INVARIANT: 1. What is cut off here is in the next leaf. 2. Each leaf has one half.
        if let Some(lower) = self.leaves.get_mut(leaf) {
            lower.ids.truncate(half);
        }
        Ok(())
    }

    /// Inserts a leaf. Adds the memory that this takes to `bytes`.
    fn add_leaf(
        &mut self,
        at: usize,
        leaf: Leaf,
        bytes: &mut usize,
        flags: Flags,
    ) -> Result<(), AllocError> {
        let before = vec_bytes(&self.leaves);
        self.leaves.reserve(1, flags)?;
        *bytes = *bytes + vec_bytes(&self.leaves) - before + vec_bytes(&leaf.ids);
        self.leaves
            .insert_within_capacity(at, leaf)
            .map_err(|_| AllocError)
    }

    /// Calls `f` for every range, in order.
    pub(super) fn for_each(&self, mut f: impl FnMut(RangeId)) {
        for leaf in &self.leaves {
            for &id in &leaf.ids {
                f(id);
            }
        }
    }

    /// Checks the invariants, for tests and debugging.
    pub(super) fn check(&self, arena: &RangeArena) -> Result<(), &'static str> {
        let mut last = None;
        for leaf in &self.leaves {
            match leaf.ids.first() {
                None => return Err("page state: an empty leaf"),
                Some(&id) if arena.number(id) != leaf.first => {
                    return Err("page state: a leaf under a wrong address");
                }
                Some(_) => (),
            }
            for &id in &leaf.ids {
                let number = Some(arena.number(id));
                if number <= last {
                    return Err("page state: ranges out of order");
                }
                last = number;
            }
        }
        Ok(())
    }
}
