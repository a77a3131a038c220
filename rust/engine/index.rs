// SPDX-License-Identifier: GPL-2.0-only

//! Finds merged pages and candidates by fingerprint.
//!
//! A linear hash table (W. Litwin, "Linear Hashing: A New Tool for File and Table Addressing", VLDB
//! 1980). A bucket is a pair of cache lines with sixteen 8-byte entries. As entries are added, the
//! buckets are split one after the other; as entries go, they are joined in the reverse order. At
//! most two buckets are rehashed by one call, and the memory follows the number of entries.
//!
//! A bucket with more than sixteen entries continues in overflow lines of half that size, which are
//! kept without gaps too. Buckets of one cache line would be faster to read, but the number of
//! entries in a bucket would vary more, and more memory would be unused in overflow lines.
//!
//! An entry holds 22 bits of its fingerprint, the tag. The number of the bucket comes from the bits
//! below the tag and, as the index grows, from bits of the tag itself, which tell a split where the
//! entry goes. So [`Index::find`] yields entries with the right fingerprint and, rarely, another
//! one, so the caller checks what the entry refers to: with a million entries one search in 16,000
//! yields a wrong entry, with a thousand million one in 16. The whole fingerprint is not stored
//! here; when a small index splits, the caller supplies it.
//!
//! All entries of one fingerprint are in one bucket. A search for that fingerprint, a split of that
//! bucket and the removal of such an entry take time in proportion to their number. An attacker
//! must not be able to choose fingerprints, so the caller hashes with a secret key
//! ([`super::content_hash`]).
//!
//! # Examples
//!
//! ```
//! use engine::{
//!     index::{Entry, Index},
//!     types::{Fingerprint, NodeId},
//! };
//! use kernel::prelude::*;
//!
//! let mut index = Index::new();
//! let (contents, node) = (Fingerprint::new(0x1234, 0), Entry::Stable(NodeId(7)));
//! index.insert(contents, node, GFP_KERNEL, |_| Some(contents))?;
//! assert!(index.find(contents).eq([node]));
//! assert!(index.remove(contents, node));
//! assert!(index.is_empty());
//! # Ok::<(), Error>(())
//! ```

use super::{
    container::{
        alloc_size::GFP_SHRINK,
        paged_vec::PagedVec, //
    },
    types::{
        Fingerprint,
        NodeId,
        PageId, //
    },
};

use kernel::{
    alloc::Flags,
    prelude::*, //
};

/// What an entry of the index refers to.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Entry {
    /// A merged page.
    Stable(NodeId),
    /// A page that is not merged, whose contents have not changed between two scans.
    Candidate(PageId),
}

/// Number of words in a bucket, and of its entries if it has no overflow line.
const BUCKET_WORDS: usize = 16;

/// Number of words in an overflow line. One of them is a link.
const LINE_WORDS: usize = 8;

/// Number of entries per bucket above which another bucket is split off.
const GROW: usize = 15;

/// Number of entries per bucket below which two buckets are joined.
const SHRINK: usize = 8;

/// Largest number of overflow lines that joining two buckets can need beyond those that they have:
/// both are full and have none.
const JOIN_LINES: usize = lines_for(2 * BUCKET_WORDS);

/// End of a chain and of the list of spare lines. Also the number of lines that can be addressed.
const NONE: u32 = (1 << 31) - 1;

/// The bucket in the link of a spare line.
const SPARE: u32 = NONE;

/// A word of a line: empty, an entry or a link.
///
/// | bits   | entry        | link                                    |
/// |--------|--------------|-----------------------------------------|
/// | 0, 1   | kind         | kind                                    |
/// | 2..42  | node or page | 2..33: next overflow line, or [`NONE`]  |
/// | 42..64 | tag          | 33..64: bucket that the line belongs to |
#[derive(Clone, Copy, Eq, PartialEq)]
struct Word(u64);

const KIND: u64 = 3;
const KIND_STABLE: u64 = 1;
const KIND_CANDIDATE: u64 = 2;
const KIND_LINK: u64 = 3;
const VALUE_SHIFT: u32 = 2;
const VALUE_MASK: u64 = (1 << PageId::BITS) - 1;
const TAG_SHIFT: u32 = VALUE_SHIFT + PageId::BITS;
const BUCKET_SHIFT: u32 = VALUE_SHIFT + 31;

/// The bit of the fingerprint that is the lowest one of the tag.
const TAG_FROM: u32 = 12;

static_assert!(TAG_FROM + u64::BITS - TAG_SHIFT <= Fingerprint::BITS);

impl Word {
    const EMPTY: Self = Self(0);

    #[inline]
    const fn entry(fingerprint: Fingerprint, entry: Entry) -> Self {
        let (kind, value) = match entry {
            Entry::Stable(node) => (KIND_STABLE, node.0 as u64),
            Entry::Candidate(page) => (KIND_CANDIDATE, page.to_bits()),
        };
        Self((fingerprint.to_bits() >> TAG_FROM) << TAG_SHIFT | value << VALUE_SHIFT | kind)
    }

    #[inline]
    const fn link(next: u32, bucket: u32) -> Self {
        Self((bucket as u64) << BUCKET_SHIFT | (next as u64) << VALUE_SHIFT | KIND_LINK)
    }

    #[inline]
    const fn is_empty(self) -> bool {
        self.0 == 0
    }

    #[inline]
    const fn is_link(self) -> bool {
        self.0 & KIND == KIND_LINK
    }

    /// Returns the overflow line that a link leads to, or [`NONE`].
    #[inline]
    const fn next(self) -> u32 {
        (self.0 >> VALUE_SHIFT) as u32 & NONE
    }

    /// Returns the bucket that a link names.
    const fn bucket(self) -> u32 {
        (self.0 >> BUCKET_SHIFT) as u32
    }

    #[inline]
    const fn tag(self) -> u64 {
        self.0 >> TAG_SHIFT
    }

    /// Returns a bit of the entry's fingerprint, if it is in the tag.
    #[inline]
    const fn bit(self, bit: u32) -> Option<bool> {
        match bit.checked_sub(TAG_FROM) {
            Some(bit) if bit < u64::BITS - TAG_SHIFT => Some(self.tag() >> bit & 1 != 0),
            _ => None,
        }
    }

    /// Returns the entry that the word holds, `None` if it is empty or a link.
    #[inline]
    const fn to_entry(self) -> Option<Entry> {
        let value = self.0 >> VALUE_SHIFT & VALUE_MASK;
        match self.0 & KIND {
            KIND_STABLE => Some(Entry::Stable(NodeId(value as u32))),
            KIND_CANDIDATE => Some(Entry::Candidate(PageId::from_bits(value))),
            _ => None,
        }
    }
}

/// A bucket or an overflow line.
///
/// # Invariants
///
/// 1. Entries come before empty words. Only the last word can be a link.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line<const WORDS: usize>([Word; WORDS]);

type Bucket = Line<BUCKET_WORDS>;
type Overflow = Line<LINE_WORDS>;

impl<const WORDS: usize> Line<WORDS> {
    const EMPTY: Self = Self([Word::EMPTY; WORDS]);
}

// These functions work on buckets and overflow lines alike, as slices of words.

/// Returns the last word: a link, an entry or empty.
#[inline]
fn link(line: &[Word]) -> Word {
    line.last().copied().unwrap_or(Word::EMPTY)
}

/// Replaces the last word.
fn set_link(line: &mut [Word], link: Word) {
    if let Some(last) = line.last_mut() {
        *last = link;
    }
}

/// Returns the overflow line that follows, if there is one.
#[inline]
fn next(line: &[Word]) -> Option<u32> {
    let link = link(line);
    (link.is_link() && link.next() != NONE).then_some(link.next())
}

/// Returns the words that are entries.
fn entries(line: &[Word]) -> impl Iterator<Item = Word> + '_ {
    line.iter()
        .copied()
        .take_while(|word| !word.is_empty() && !word.is_link())
}

/// Appends a word to the entries. Returns whether there was room.
fn push(line: &mut [Word], word: Word) -> bool {
    // INVARIANT: 1. of `Line`: The word goes to the first empty place.
    match line.iter_mut().find(|at| at.is_empty()) {
        Some(empty) => {
            *empty = word;
            true
        }
        None => false,
    }
}

/// Removes the last entry.
fn pop(line: &mut [Word]) -> Option<Word> {
    let last = entries(line).count().checked_sub(1)?;
    // INVARIANT: 1. of `Line`: What follows is empty already.
    let word = line.get_mut(last)?;
    Some(core::mem::replace(word, Word::EMPTY))
}

/// Merged pages and candidates by fingerprint; see the description of the module.
///
/// Entries are unique: the caller inserts no entry twice, and removes an entry under the
/// fingerprint under which it was inserted.
///
/// # Invariants
///
/// 1. The entries of a fingerprint are in the bucket that [`Index::bucket`] returns, or in an
///    overflow line of its chain.
/// 2. The chain of a bucket is as short as possible. Only its first line may have room.
/// 3. Every overflow line is in the chain of the bucket that its link names.
/// 4. `len` is the number of entries.
pub struct Index {
    buckets: PagedVec<Bucket>,
    overflow: PagedVec<Overflow>,
    len: usize,
}

impl Default for Index {
    fn default() -> Self {
        Self::new()
    }
}

impl Index {
    /// Returns an empty index, without allocating.
    pub const fn new() -> Self {
        // INVARIANT: 1. to 4. hold without buckets.
        Self {
            buckets: PagedVec::new(),
            overflow: PagedVec::new(),
            len: 0,
        }
    }

    /// Returns the number of entries.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Returns whether there are no entries.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the memory that the index takes, in bytes.
    pub fn bytes(&self) -> usize {
        self.buckets.bytes() + self.overflow.bytes()
    }

    /// Returns the entries that may have this fingerprint: all that have it and, rarely, another
    /// one.
    #[inline]
    pub fn find(&self, fingerprint: Fingerprint) -> Find<'_> {
        Find {
            index: self,
            line: self.bucket(fingerprint).and_then(|b| self.line(b, None)),
            at: 0,
            tag: Word::entry(fingerprint, Entry::Stable(NodeId(0))).tag(),
        }
    }

    /// Adds an entry, which [`Index::find`] then yields first.
    ///
    /// `fingerprint_of` returns the fingerprint under which another entry was inserted, or `None`
    /// if what the entry refers to does not exist: that entry may be dropped.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory. Nothing has changed then.
    #[inline]
    pub fn insert(
        &mut self,
        fingerprint: Fingerprint,
        entry: Entry,
        flags: Flags,
        fingerprint_of: impl Fn(Entry) -> Option<Fingerprint>,
    ) -> Result {
        // The second round makes up for an earlier split that failed for want of memory.
        for _ in 0..2 {
            if self.len >= self.buckets.len() * GROW && self.split(flags, &fingerprint_of).is_err()
            {
                break;
            }
        }
        let bucket = self.bucket(fingerprint).ok_or(ENOMEM)?;
        let room = self.make_room(bucket, &mut None, flags)?;
        let first = self.word_mut(bucket, None, 0).ok_or(EINVAL)?;
        // INVARIANT: 1. `bucket()` returned the bucket, and the displaced entry stays in it.
        // 4. `len` is updated below.
        let displaced = core::mem::replace(first, Word::entry(fingerprint, entry));
        if let Some(line) = self
            .line_mut(bucket, room)
            .filter(|_| !displaced.is_empty())
        {
            push(line, displaced);
        }
        self.len += 1;
        Ok(())
    }

    /// Removes an entry. Returns whether it was there.
    #[inline]
    pub fn remove(&mut self, fingerprint: Fingerprint, entry: Entry) -> bool {
        let found = self.locate(fingerprint, entry);
        let Some((bucket, line, at)) = found else {
            return false;
        };
        self.take(bucket, line, at);
        // INVARIANT: 4. One entry less.
        self.len -= 1;
        if self.is_empty() {
            *self = Self::new();
        }
        for _ in 0..2 {
            if self.len < self.buckets.len() * SHRINK {
                self.join();
            }
        }
        true
    }

    /// Replaces an entry by another one with the same fingerprint. Returns whether it was there.
    ///
    /// Needs no memory.
    pub fn replace(&mut self, fingerprint: Fingerprint, old: Entry, new: Entry) -> bool {
        match self.locate(fingerprint, old) {
            Some((bucket, line, at)) => {
                if let Some(word) = self.word_mut(bucket, line, at) {
                    *word = Word::entry(fingerprint, new);
                }
                true
            }
            None => false,
        }
    }

    /// Checks every invariant, for tests and debugging. Takes time in proportion to the number of
    /// entries.
    ///
    /// # Errors
    ///
    /// A description of the invariant that does not hold.
    pub fn check(
        &self,
        fingerprint_of: impl Fn(Entry) -> Option<Fingerprint>,
    ) -> Result<(), &'static str> {
        let (mut total, mut lines) = (0, 0);
        for b in 0..self.buckets.len() {
            let (mut id, mut in_bucket, mut in_chain) = (None, 0, 0);
            loop {
                let line = self.line(b, id).ok_or("index: a link to nowhere")?;
                for word in entries(line) {
                    let entry = word.to_entry().ok_or("index: neither entry nor link")?;
                    let Some(fingerprint) = fingerprint_of(entry) else {
                        return Err("index: an entry that refers to nothing");
                    };
                    if self.bucket(fingerprint) != Some(b) {
                        return Err("index: an entry in the wrong bucket");
                    }
                    if Word::entry(fingerprint, entry) != word {
                        return Err("index: an entry with the wrong tag");
                    }
                    in_bucket += 1;
                }
                if id.is_some() && link(line).bucket() as usize != b {
                    return Err("index: an overflow line in another bucket's chain");
                }
                id = next(line);
                if id.is_none() {
                    break;
                }
                in_chain += 1;
            }
            if in_chain != lines_for(in_bucket) {
                return Err("index: a chain that is longer than it must be");
            }
            (total, lines) = (total + in_bucket, lines + in_chain);
        }
        if total != self.len {
            return Err("index: the number of entries is wrong");
        }
        if lines != self.overflow.len() {
            return Err("index: an overflow line that is in no chain");
        }
        Ok(())
    }

    /// Returns the bucket to which a fingerprint belongs, `None` if there are no buckets.
    #[inline]
    fn bucket(&self, fingerprint: Fingerprint) -> Option<usize> {
        let level = self.buckets.len().checked_ilog2()?;
        let bucket = fingerprint.to_bits() as usize & ((2 << level) - 1);
        // This round of splits has not reached that bucket yet: its entries are in the lower half.
        Some(if bucket < self.buckets.len() {
            bucket
        } else {
            bucket & ((1 << level) - 1)
        })
    }

    /// Returns where an entry is: its bucket, its overflow line (`None`: the bucket itself) and its
    /// place in the line.
    fn locate(
        &self,
        fingerprint: Fingerprint,
        entry: Entry,
    ) -> Option<(usize, Option<u32>, usize)> {
        let bucket = self.bucket(fingerprint)?;
        let word = Word::entry(fingerprint, entry);
        let mut id = None;
        loop {
            let line = self.line(bucket, id)?;
            if let Some(at) = line.iter().position(|&w| w == word) {
                return Some((bucket, id, at));
            }
            id = Some(next(line)?);
        }
    }

    /// Returns an overflow line, or the bucket itself for `None`.
    #[inline]
    fn line(&self, bucket: usize, line: Option<u32>) -> Option<&[Word]> {
        Some(match line {
            Some(id) => &self.overflow.get(id as usize)?.0,
            None => &self.buckets.get(bucket)?.0,
        })
    }

    /// As [`Index::line`], for writing.
    #[inline]
    fn line_mut(&mut self, bucket: usize, line: Option<u32>) -> Option<&mut [Word]> {
        Some(match line {
            Some(id) => &mut self.overflow.get_mut(id as usize)?.0,
            None => &mut self.buckets.get_mut(bucket)?.0,
        })
    }

    fn word_mut(&mut self, bucket: usize, line: Option<u32>, at: usize) -> Option<&mut Word> {
        self.line_mut(bucket, line)?.get_mut(at)
    }

    /// Returns a line of a bucket with room for one more entry, `None` for the bucket itself.
    ///
    /// Adds a line to the chain if none has room: a spare one if there is one, else a new one.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory for a new line. Nothing has changed then.
    #[inline]
    fn make_room(
        &mut self,
        bucket: usize,
        spare: &mut Option<u32>,
        flags: Flags,
    ) -> Result<Option<u32>> {
        let line = self.line(bucket, None).ok_or(EINVAL)?;
        let last = link(line);
        if last.is_empty() {
            return Ok(None);
        }
        // INVARIANT: 2. Only the first line of the chain may have room.
        let head = next(line);
        if let Some(first) = head.and_then(|id| self.line(bucket, Some(id))) {
            if entries(first).count() < LINE_WORDS - 1 {
                return Ok(head);
            }
        }

        let mut added = Overflow::EMPTY;
        set_link(
            &mut added.0,
            Word::link(head.unwrap_or(NONE), bucket as u32),
        );
        if !last.is_link() {
            // The link takes the place of an entry, which moves to the new line.
            push(&mut added.0, last);
        }
        let id = match *spare {
            Some(id) => {
                let place = self.overflow.get_mut(id as usize).ok_or(EINVAL)?;
                *spare = next(&place.0);
                *place = added;
                id
            }
            None => {
                let id = self.overflow.len();
                if id >= NONE as usize {
                    return Err(ENOMEM);
                }
                self.overflow.push(added, flags)?;
                id as u32
            }
        };
        // INVARIANT: 3. The line names the bucket, and is the first of its chain.
        if let Some(line) = self.line_mut(bucket, None) {
            set_link(line, Word::link(id, 0));
        }
        Ok(Some(id))
    }

    /// Removes the entry at a place from a bucket.
    fn take(&mut self, bucket: usize, line: Option<u32>, at: usize) {
        // INVARIANT: 2. The gap is filled from the first line of the chain. That line is freed if
        // it is empty then, or if the bucket alone can hold what is left.
        let head = self.line(bucket, None).and_then(next);
        let Some(last) = self.line_mut(bucket, head).and_then(pop) else {
            return;
        };
        match self.word_mut(bucket, line, at) {
            Some(hole) if !hole.is_empty() => *hole = last,
            // The removed entry was the last one itself.
            _ => (),
        }

        let Some(first) = head.and_then(|id| self.line(bucket, Some(id))) else {
            return;
        };
        let mut left = entries(first);
        let new_link = match (left.next(), left.next(), next(first)) {
            (Some(only), None, None) => only,
            (None, _, Some(next)) => Word::link(next, 0),
            _ => return,
        };
        drop(left);
        if let (Some(line), Some(id)) = (self.line_mut(bucket, None), head) {
            set_link(line, new_link);
            self.free_line(id, &mut None);
        }
    }

    /// Frees an overflow line that is in no chain and not on the list of spare lines.
    fn free_line(&mut self, id: u32, spare: &mut Option<u32>) {
        let Some(moved) = self.overflow.pop() else {
            return;
        };
        let from = self.overflow.len() as u32;
        if from == id {
            return;
        }
        // The last line moves to this place, so the link to it is updated.
        if let Some(place) = self.overflow.get_mut(id as usize) {
            *place = moved;
        }
        let bucket = link(&moved.0).bucket();
        let mut line = None;
        if bucket == SPARE {
            if *spare == Some(from) {
                *spare = Some(id);
                return;
            }
            line = *spare;
        }
        // INVARIANT: 3. The chain of its bucket leads to it again.
        while let Some(before) = self.line_mut(bucket as usize, line) {
            match next(before) {
                Some(next) if next == from => {
                    let of = link(before).bucket();
                    return set_link(before, Word::link(id, of));
                }
                Some(next) => line = Some(next),
                None => return,
            }
        }
    }

    /// Empties a bucket and moves each entry to the bucket that `to` returns, or drops it for
    /// `None`.
    ///
    /// Needs no memory if the chains of those buckets together are no longer than the chain of this
    /// one.
    fn redistribute(&mut self, from: usize, to: impl Fn(Word) -> Option<usize>) {
        let Some(bucket) = self.buckets.get_mut(from) else {
            return;
        };
        let emptied = core::mem::replace(bucket, Bucket::EMPTY);
        let mut spare = None;
        self.redistribute_line(&emptied.0, &mut spare, &to);
        let mut chain = next(&emptied.0);
        while let Some(id) = chain {
            // INVARIANT: 3. A line that was read is in no chain. It is on the list of spare lines
            // until another chain gets it or it is freed.
            let mut empty = Overflow::EMPTY;
            set_link(&mut empty.0, Word::link(spare.unwrap_or(NONE), SPARE));
            let Some(line) = self.overflow.get_mut(id as usize) else {
                break;
            };
            let emptied = core::mem::replace(line, empty);
            spare = Some(id);
            self.redistribute_line(&emptied.0, &mut spare, &to);
            chain = next(&emptied.0);
        }
        while let Some(id) = spare {
            spare = self.line(0, Some(id)).and_then(next);
            self.free_line(id, &mut spare);
        }
    }

    /// Moves the entries of a line, which is in no chain, to the buckets that `to` returns.
    fn redistribute_line(
        &mut self,
        line: &[Word],
        spare: &mut Option<u32>,
        to: impl Fn(Word) -> Option<usize>,
    ) {
        for word in entries(line) {
            let added = to(word).is_some_and(|bucket| {
                let room = self.make_room(bucket, spare, GFP_SHRINK);
                room.is_ok_and(|room| {
                    self.line_mut(bucket, room)
                        .is_some_and(|line| push(line, word))
                })
            });
            if !added {
                // INVARIANT: 4. The entry is dropped.
                self.len -= 1;
            }
        }
    }

    /// Adds a bucket and moves the entries that belong there.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory. Nothing has changed then.
    fn split(
        &mut self,
        flags: Flags,
        fingerprint_of: impl Fn(Entry) -> Option<Fingerprint>,
    ) -> Result {
        let new = self.buckets.len();
        if new >= SPARE as usize {
            return Err(ENOMEM);
        }
        self.buckets.push(Bucket::EMPTY, flags)?;
        let Some(level) = new.checked_ilog2() else {
            return Ok(());
        };
        let old = new - (1 << level);
        // INVARIANT: 1. The next higher bit of the fingerprint tells the two buckets apart.
        // 2. Two buckets with the entries of one never need more lines than that one had.
        self.redistribute(old, |word| {
            if let Some(upper) = word.bit(level) {
                return Some(if upper { new } else { old });
            }
            let entry = word.to_entry()?;
            let fingerprint = fingerprint_of(entry).filter(|&f| Word::entry(f, entry) == word)?;
            match fingerprint.to_bits() as usize & ((2 << level) - 1) {
                bucket if bucket == old || bucket == new => Some(bucket),
                // That is not the fingerprint under which the entry was inserted.
                _ => None,
            }
        });
        Ok(())
    }

    /// Removes the last bucket and moves its entries to the one from which it was split.
    ///
    /// Does nothing if there is no memory for that or no other bucket.
    fn join(&mut self) {
        let Some(level) = self.buckets.len().wrapping_sub(1).checked_ilog2() else {
            return;
        };
        let last = self.buckets.len() - 1;
        if self.overflow.reserve(JOIN_LINES, GFP_SHRINK).is_ok() {
            // INVARIANT: 1. Without the last bucket, its entries belong to the one that gets them.
            self.redistribute(last, |_| Some(last - (1 << level)));
            self.buckets.pop();
        }
    }
}

/// Returns the number of overflow lines of a bucket with this many entries.
const fn lines_for(entries: usize) -> usize {
    if entries <= BUCKET_WORDS {
        0
    } else {
        (entries - (BUCKET_WORDS - 1)).div_ceil(LINE_WORDS - 1)
    }
}

/// Iterator over the entries that may have a fingerprint, returned by [`Index::find`].
#[derive(Clone)]
pub struct Find<'a> {
    index: &'a Index,
    line: Option<&'a [Word]>,
    at: usize,
    tag: u64,
}

impl Iterator for Find<'_> {
    type Item = Entry;

    #[inline]
    fn next(&mut self) -> Option<Entry> {
        while let Some(line) = self.line {
            while let Some(word) = line.get(self.at) {
                self.at += 1;
                if word.tag() == self.tag {
                    if let Some(entry) = word.to_entry() {
                        return Some(entry);
                    }
                }
            }
            self.line = next(line).and_then(|id| self.index.line(0, Some(id)));
            self.at = 0;
        }
        None
    }
}
