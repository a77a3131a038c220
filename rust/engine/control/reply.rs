// SPDX-License-Identifier: GPL-2.0-only

//! What goes back to a program.
//!
//! A reply is written into the bytes of the argument that was parsed, whose other fields stay as
//! they are. A record is written to the beginning of a buffer.

use super::{
    layout::{
        self,
        Bytes,
        List,
        Merge,
        Unmerge,
        Why,
        NR_REFUSALS,
        STAT_EXCLUDED,
        STAT_MERGE_ANY, //
    },
    rules::Action, //
};

use kernel::prelude::*;

/// Of what a record's size is a multiple.
const RECORD_ALIGN: usize = 8;

/// What rules and process have decided, for `flags`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Opted {
    /// `RKSM_STAT_EXCLUDED`: a rule says never.
    pub excluded: bool,
    /// `RKSM_STAT_MERGE_ANY`: all its memory is mergeable.
    pub merge_any: bool,
}

impl Opted {
    fn flags(self) -> u32 {
        let flag = |set, flag| if set { flag } else { 0 };
        flag(self.excluded, STAT_EXCLUDED) | flag(self.merge_any, STAT_MERGE_ANY)
    }
}

/// What has come of a list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListReply {
    /// Where to go on.
    pub cursor: u64,
    /// Records in the buffer.
    pub count: u32,
}

impl ListReply {
    /// Writes it into the argument.
    pub fn encode(&self, argument: &mut [u8]) {
        let reply = List {
            cursor: self.cursor,
            count: self.count,
            ..List::read(argument)
        };
        reply.write(argument);
    }
}

/// What has come of a merge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MergeReply {
    /// Where to go on.
    pub at: u64,
    /// Pages that were looked at.
    pub scanned: u64,
    /// Pages that are mappings of a merged page now.
    pub merged: u64,
    /// Pages that are mappings of the zero page now.
    pub zeroed: u64,
    /// Bytes saved.
    pub bytes_saved: i64,
    /// See [`layout::refused`].
    pub refused: [u64; NR_REFUSALS],
}

impl MergeReply {
    /// Writes it into the argument.
    pub fn encode(&self, argument: &mut [u8]) {
        let reply = Merge {
            at: self.at,
            scanned: self.scanned,
            merged: self.merged,
            zeroed: self.zeroed,
            bytes_saved: self.bytes_saved,
            refused: self.refused,
            ..Merge::read(argument)
        };
        reply.write(argument);
    }
}

/// What has come of an unmerge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnmergeReply {
    /// Where to go on.
    pub at: u64,
    /// Pages that have a copy of their own now.
    pub pages: u64,
}

impl UnmergeReply {
    /// Writes it into the argument.
    pub fn encode(&self, argument: &mut [u8]) {
        let reply = Unmerge {
            at: self.at,
            pages: self.pages,
            ..Unmerge::read(argument)
        };
        reply.write(argument);
    }
}

/// What memory is to KSM, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WhyReply {
    /// What rules and process have decided.
    pub opted: Opted,
    /// Where to go on; `u64::MAX` at the end.
    pub at: u64,
    /// Merged.
    pub merged: u64,
    /// Mappings of the zero page.
    pub zero: u64,
    /// Somebody holds a reference.
    pub pinned: u64,
    /// Of huge pages that cannot be split now.
    pub unsplit: u64,
    /// Unchanged, and no equal page has been found.
    pub unique: u64,
    /// Changed between the last two looks.
    pub changing: u64,
    /// Looked at once, or not yet.
    pub fresh: u64,
}

impl WhyReply {
    /// Writes it into the argument.
    pub fn encode(&self, argument: &mut [u8]) {
        let reply = Why {
            flags: self.opted.flags(),
            at: self.at,
            merged: self.merged,
            zero: self.zero,
            pinned: self.pinned,
            unsplit: self.unsplit,
            unique: self.unique,
            changing: self.changing,
            fresh: self.fresh,
            ..Why::read(argument)
        };
        reply.write(argument);
    }
}

/// A process whose memory is registered, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatRecord {
    /// What rules and process have decided.
    pub opted: Opted,
    /// In the reader's pid namespace; 0 where there is none.
    pub pid: i32,
    /// Merged.
    pub merged: u64,
    /// Unchanged, and no equal page has been found.
    pub unique: u64,
    /// Changed between the last two looks.
    pub changing: u64,
    /// Looked at once, or not yet.
    pub fresh: u64,
    /// Mappings of the zero page placed by KSM.
    pub zero: u64,
    /// Merged pages that have been written to.
    pub broken: u64,
    /// See [`layout::refused`].
    pub refused: [u64; NR_REFUSALS],
}

impl StatRecord {
    /// Writes it to the beginning of a buffer, and returns its bytes. None if there is no room;
    /// nothing is written then.
    pub fn encode(&self, out: &mut [u8]) -> Option<usize> {
        let size = size_of::<layout::StatRecord>();
        let record = layout::StatRecord {
            size: u32::try_from(size).ok()?,
            flags: self.opted.flags(),
            pid: self.pid,
            reserved: 0,
            merged: self.merged,
            unique: self.unique,
            changing: self.changing,
            fresh: self.fresh,
            zero: self.zero,
            broken: self.broken,
            refused: self.refused,
        };
        record.write(out.get_mut(..size)?);
        Some(size)
    }
}

/// A rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleRecord<'a> {
    /// What it says.
    pub action: Action,
    /// The process, or 0 where the rule is for a cgroup.
    pub pid: i32,
    /// To how many processes it applied.
    pub processes: u32,
    /// The path of the cgroup; empty where the rule is for a process.
    pub path: &'a [u8],
}

impl RuleRecord<'_> {
    /// Writes it to the beginning of a buffer, and returns its bytes. None if there is no room;
    /// nothing is written then.
    pub fn encode(&self, out: &mut [u8]) -> Option<usize> {
        let fixed = size_of::<layout::RuleRecord>();
        let size = fixed
            .checked_add(self.path.len())?
            .checked_next_multiple_of(RECORD_ALIGN)?;
        let record = layout::RuleRecord {
            size: u32::try_from(size).ok()?,
            action: self.action as u32,
            pid: self.pid,
            path_len: u32::try_from(self.path.len()).ok()?,
            processes: self.processes,
            reserved: 0,
        };
        let (head, tail) = out.get_mut(..size)?.split_at_mut_checked(fixed)?;
        let (path, zeroes) = tail.split_at_mut_checked(self.path.len())?;
        record.write(head);
        path.copy_from_slice(self.path);
        zeroes.fill(0);
        Some(size)
    }
}
