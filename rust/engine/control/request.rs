// SPDX-License-Identifier: GPL-2.0-only

//! What a program asks for.

use super::{
    cgroup_path::PATH_LEN_MAX,
    layout::{
        Bytes,
        List,
        Merge,
        Rule,
        RuleRecord,
        StatRecord,
        Unmerge,
        Why,
        MERGE_ENABLE,
        RULE_REMOVE,
        STAT_EXCLUDED,
        STAT_MERGE_ANY,
        UNMERGE_DISABLE, //
    },
    rules::Action, //
};
use core::ops::Range;

use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// `RKSM_IOC_MAGIC`.
const IOC_MAGIC: u32 = 0xBD;

/// The pidfd of a rule for a cgroup.
const NO_PIDFD: i32 = -1;

/// All memory.
const ALL: Range<usize> = 0..usize::MAX;

/// A call of `ioctl()` on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `RKSM_IOC_RULE`: sets or removes a rule.
    Rule,
    /// `RKSM_IOC_RULES`: lists the rules.
    Rules,
    /// `RKSM_IOC_MERGE`: merges memory of a process now.
    Merge,
    /// `RKSM_IOC_UNMERGE`: gives pages of a process copies of their own.
    Unmerge,
    /// `RKSM_IOC_STAT`: lists the processes whose memory is registered.
    Stat,
    /// `RKSM_IOC_WHY`: says what the memory of a process is to KSM.
    Why,
}

impl Call {
    /// Every call, in the order of the numbers.
    pub const ALL: [Self; 6] = [
        Self::Rule,
        Self::Rules,
        Self::Merge,
        Self::Unmerge,
        Self::Stat,
        Self::Why,
    ];

    /// Returns the number of the call: `_IO()`, whatever its argument.
    pub const fn cmd(self) -> u32 {
        IOC_MAGIC << 8 | self as u32
    }

    /// Returns the call of this number.
    ///
    /// # Errors
    ///
    /// `ENOTTY` if there is none.
    pub fn from_cmd(cmd: u32) -> Result<Self> {
        let call = Self::ALL.into_iter().find(|call| call.cmd() == cmd);
        call.ok_or(ENOTTY)
    }

    /// Returns the size of the argument as far as it is known here.
    pub const fn size(self) -> usize {
        match self {
            Self::Rule => size_of::<Rule>(),
            Self::Rules | Self::Stat => size_of::<List>(),
            Self::Merge => size_of::<Merge>(),
            Self::Unmerge => size_of::<Unmerge>(),
            Self::Why => size_of::<Why>(),
        }
    }

    /// Returns the size of the argument's first version. It never changes.
    pub const fn first_size(self) -> usize {
        match self {
            Self::Rule | Self::Rules | Self::Stat => 32,
            Self::Merge => 200,
            Self::Unmerge => 48,
            Self::Why => 80,
        }
    }

    /// Returns how many bytes of the argument are to be read, and written back: as many as its
    /// `size` says.
    ///
    /// # Errors
    ///
    /// `EINVAL` if that is less than the first version had, `E2BIG` if it is more than a page.
    pub fn check_size(self, size: u32) -> Result<usize> {
        let size = usize::try_from(size)?;
        if size < self.first_size() {
            return Err(EINVAL);
        }
        if size > PAGE_SIZE {
            return Err(E2BIG);
        }
        Ok(size)
    }
}

/// Whom a rule is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// The process of a pidfd.
    Process(i32),
    /// The cgroup whose path is in the program's memory.
    Cgroup {
        /// Where.
        addr: usize,
        /// Bytes, at least one and [`PATH_LEN_MAX`] at most.
        len: usize,
    },
}

/// What is to happen with a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is added, or what it says is replaced.
    Set(Action),
    /// It is removed.
    Remove,
}

/// Sets or removes a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleRequest {
    /// Whose rule.
    pub subject: Subject,
    /// What is to happen with it.
    pub change: Change,
}

/// Fills a buffer of the program with records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListRequest {
    /// Where to begin: 0, or where the last call has ended.
    pub cursor: u64,
    /// Where the buffer is.
    pub addr: usize,
    /// Its bytes; one record without a path has room.
    pub len: usize,
}

/// Merges memory now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergeRequest {
    /// The process.
    pub pidfd: i32,
    /// Which addresses. An end of `usize::MAX` is that of all memory, others are page-aligned.
    pub range: Range<usize>,
    /// Whether all its memory is to be mergeable from now on.
    pub enable: bool,
}

/// Gives pages copies of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnmergeRequest {
    /// The process.
    pub pidfd: i32,
    /// Which addresses, as in [`MergeRequest`].
    pub range: Range<usize>,
    /// Whether none of its memory is to be mergeable from now on. The range is all memory then.
    pub disable: bool,
}

/// Says what memory is to KSM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WhyRequest {
    /// The process.
    pub pidfd: i32,
    /// The address to begin at, page-aligned, or `usize::MAX`: at the end.
    pub at: usize,
}

/// What a program asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// See [`Call::Rule`].
    Rule(RuleRequest),
    /// See [`Call::Rules`].
    Rules(ListRequest),
    /// See [`Call::Merge`].
    Merge(MergeRequest),
    /// See [`Call::Unmerge`].
    Unmerge(UnmergeRequest),
    /// See [`Call::Stat`].
    Stat(ListRequest),
    /// See [`Call::Why`].
    Why(WhyRequest),
}

impl Request {
    /// Parses the argument of a call, all of its bytes as [`Call::check_size`] has counted them.
    ///
    /// What the module does not know yet is 0 for it; what the program does not know yet is taken
    /// for 0. Fields that only the module writes are not looked at: a program calls again with
    /// what the last call has left.
    ///
    /// # Errors
    ///
    /// `E2BIG` if behind what is known here are more bytes than a page has, or any but zeroes.
    /// `EINVAL` if anything else is not as the header says; also if the argument's `size` is no
    /// longer the one it was when it was read first.
    pub fn parse(call: Call, bytes: &[u8]) -> Result<Self> {
        let size = bytes.first_chunk().map(|size| u32::from_ne_bytes(*size));
        if call.check_size(size.ok_or(EINVAL)?)? != bytes.len() {
            return Err(EINVAL);
        }
        let unknown = bytes.get(call.size()..).unwrap_or_default();
        if unknown.iter().any(|&byte| byte != 0) {
            return Err(E2BIG);
        }
        Ok(match call {
            Call::Rule => Self::Rule(rule(&Rule::read(bytes))?),
            Call::Rules => Self::Rules(list(&List::read(bytes), size_of::<RuleRecord>())?),
            Call::Merge => Self::Merge(merge(&Merge::read(bytes))?),
            Call::Unmerge => Self::Unmerge(unmerge(&Unmerge::read(bytes))?),
            Call::Stat => Self::Stat(list(&List::read(bytes), size_of::<StatRecord>())?),
            Call::Why => Self::Why(why(&Why::read(bytes))?),
        })
    }
}

/// Refuses what is not so with `EINVAL`.
fn ensure(holds: bool) -> Result {
    holds.then_some(()).ok_or(EINVAL)
}

/// Refuses all flags but those that are known, and what is reserved.
fn check_flags(flags: u32, known: u32, reserved: u32) -> Result {
    ensure(flags & !known == 0 && reserved == 0)
}

/// An address of a page, or the end of all memory.
fn page(addr: u64) -> Result<usize> {
    let addr = usize::try_from(addr)?;
    ensure(addr % PAGE_SIZE == 0 || addr == ALL.end)?;
    Ok(addr)
}

/// Addresses that are not none. [`ALL`]'s end is no address to begin at, as nothing is behind it.
fn pages(start: u64, end: u64) -> Result<Range<usize>> {
    let range = page(start)?..page(end)?;
    ensure(!range.is_empty())?;
    Ok(range)
}

/// A pidfd of a call that needs one. Whether it is one is for the caller to find.
fn pidfd(fd: i32) -> Result<i32> {
    ensure(fd >= 0)?;
    Ok(fd)
}

fn rule(arg: &Rule) -> Result<RuleRequest> {
    check_flags(arg.flags, RULE_REMOVE, arg.reserved)?;
    let action = Action::from_raw(arg.action)?;
    let (addr, len) = (usize::try_from(arg.path)?, usize::try_from(arg.path_len)?);
    let subject = if arg.pidfd == NO_PIDFD {
        ensure(addr != 0 && (1..=PATH_LEN_MAX).contains(&len))?;
        Subject::Cgroup { addr, len }
    } else {
        ensure(addr == 0 && len == 0)?;
        Subject::Process(pidfd(arg.pidfd)?)
    };
    let change = if arg.flags & RULE_REMOVE != 0 {
        // A rule that is removed says nothing.
        ensure(arg.action == 0)?;
        Change::Remove
    } else {
        Change::Set(action)
    };
    Ok(RuleRequest { subject, change })
}

/// `record` is the least that a buffer must hold: no records would mean that there are no more.
fn list(arg: &List, record: usize) -> Result<ListRequest> {
    check_flags(arg.flags, 0, 0)?;
    let (addr, len) = (usize::try_from(arg.records)?, usize::try_from(arg.len)?);
    ensure(len >= record)?;
    Ok(ListRequest {
        cursor: arg.cursor,
        addr,
        len,
    })
}

fn merge(arg: &Merge) -> Result<MergeRequest> {
    check_flags(arg.flags, MERGE_ENABLE, arg.reserved)?;
    Ok(MergeRequest {
        pidfd: pidfd(arg.pidfd)?,
        range: pages(arg.start, arg.end)?,
        enable: arg.flags & MERGE_ENABLE != 0,
    })
}

fn unmerge(arg: &Unmerge) -> Result<UnmergeRequest> {
    check_flags(arg.flags, UNMERGE_DISABLE, arg.reserved)?;
    let range = pages(arg.start, arg.end)?;
    let disable = arg.flags & UNMERGE_DISABLE != 0;
    // Being mergeable is of the process, not of a range.
    ensure(!disable || range == ALL)?;
    Ok(UnmergeRequest {
        pidfd: pidfd(arg.pidfd)?,
        range,
        disable,
    })
}

fn why(arg: &Why) -> Result<WhyRequest> {
    // The flags are those that the last call may have left.
    check_flags(arg.flags, STAT_EXCLUDED | STAT_MERGE_ANY, arg.reserved)?;
    Ok(WhyRequest {
        pidfd: pidfd(arg.pidfd)?,
        at: page(arg.at)?,
    })
}
