// SPDX-License-Identifier: GPL-2.0-only

//! Values that are named by small numbers.

use super::paged_vec::PagedVec;

use kernel::{
    alloc::{
        AllocError,
        Flags, //
    },
    prelude::*, //
};

/// Places are used again once more than one in so many is vacant: a search for one then takes about
/// so many steps.
const VACANT_SHARE: usize = 8;

/// Values, each with a number that stays until it is removed.
///
/// # Invariants
///
/// 1. `len` is the number of places with a value.
/// 2. The last place has a value.
pub struct IdTable<T> {
    places: PagedVec<Option<T>>,
    /// Where the search for a vacant place goes on.
    search: usize,
    len: usize,
}

impl<T> Default for IdTable<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> IdTable<T> {
    /// Returns a table without values, without allocating.
    pub const fn new() -> Self {
        // INVARIANT: 1. and 2. hold without places.
        Self {
            places: PagedVec::new(),
            search: 0,
            len: 0,
        }
    }

    /// Returns the number of values.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Returns whether there is no value.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the value with this number.
    #[inline]
    pub fn get(&self, id: u32) -> Option<&T> {
        self.places.get(id as usize)?.as_ref()
    }

    /// Adds a value. Returns its number.
    ///
    /// # Errors
    ///
    /// `AllocError` if there is no memory or no number. Nothing has changed then.
    pub fn insert(&mut self, value: T, flags: Flags) -> Result<u32, AllocError> {
        let vacant = self.places.len() - self.len;
        let id = match vacant * VACANT_SHARE > self.places.len() {
            true => self.find_vacant(),
            false => None,
        };
        let id = match id {
            Some(id) => {
                if let Some(place) = self.places.get_mut(id) {
                    *place = Some(value);
                }
                id
            }
            None => {
                self.places.push(Some(value), flags)?;
                self.places.len() - 1
            }
        };
        // INVARIANT: 1. A place more has a value.
        self.len += 1;
        let number = u32::try_from(id);
        if number.is_err() {
            self.take(id);
        }
        number.map_err(|_| AllocError)
    }

    /// Returns the next vacant place, after the last one that was found.
    fn find_vacant(&mut self) -> Option<usize> {
        let vacant = |id: &usize| self.places.get(*id).is_some_and(Option::is_none);
        let found = (self.search..self.places.len())
            .find(vacant)
            .or_else(|| (0..self.search).find(vacant))?;
        self.search = found + 1;
        Some(found)
    }

    /// Removes the value with this number, and returns it.
    pub fn remove(&mut self, id: u32) -> Option<T> {
        self.take(id as usize)
    }

    fn take(&mut self, id: usize) -> Option<T> {
        let value = self.places.get_mut(id)?.take()?;
        // INVARIANT: 1. A place less has a value. 2. Vacant places at the end go.
        self.len -= 1;
        while let Some(last) = self.places.len().checked_sub(1) {
            if self.places.get(last).is_some_and(Option::is_some) {
                break;
            }
            self.places.pop();
        }
        if self.is_empty() {
            *self = Self::new();
        }
        Some(value)
    }

    /// Returns the smallest number above `after` that a value has; the smallest of all for `None`.
    pub fn next(&self, after: Option<u32>) -> Option<u32> {
        let from = after.map_or(0, |id| id as usize + 1);
        (from..self.places.len())
            .map(|id| id as u32)
            .find(|id| self.get(*id).is_some())
    }

    /// Returns the memory that the table takes, in bytes.
    pub fn bytes(&self) -> usize {
        self.places.bytes()
    }
}
