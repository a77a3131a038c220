// SPDX-License-Identifier: GPL-2.0-only

//! The path of a cgroup below the mount of cgroup v2.

use core::ffi::CStr;

use kernel::{
    alloc::Flags,
    prelude::*, //
};

/// Bytes of the longest path: `PATH_MAX` without the NUL.
pub const PATH_LEN_MAX: usize = 4095;

/// The path of a cgroup, which is there or not. Of each cgroup there is one path.
///
/// # Invariants
///
/// 1. The last byte is NUL, and no other is.
/// 2. The bytes before are `/`, or each component behind a `/`: at least one, none of them empty,
///    `.` or `..`.
/// 3. These are [`PATH_LEN_MAX`] at most.
#[derive(Debug, PartialEq, Eq)]
pub struct CgroupPath(KVec<u8>);

impl CgroupPath {
    /// Takes a path, without a NUL. Does not allocate where the vector has room for one byte more.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it is no such path, or not the only one of its cgroup: without the `/` at the
    /// beginning or with one at the end, with `//`, `.` or `..`. `ENOMEM` if there is no memory.
    pub fn new(mut path: KVec<u8>, flags: Flags) -> Result<Self> {
        let below = path.strip_prefix(b"/").ok_or(EINVAL)?;
        let proper = |name: &[u8]| !matches!(name, b"" | b"." | b"..");
        if path.len() > PATH_LEN_MAX
            || path.contains(&0)
            || !below.is_empty() && !below.split(|&byte| byte == b'/').all(proper)
        {
            return Err(EINVAL);
        }
        path.push(0, flags)?;
        // INVARIANT: 1, there was no NUL, and one has been appended; 2 and 3 have been checked.
        Ok(Self(path))
    }

    /// Returns the path without the NUL.
    pub fn as_bytes(&self) -> &[u8] {
        // By invariant 1 the default is not needed.
        self.0.split_last().map_or(&[], |(_, path)| path)
    }

    /// Returns the path for C.
    pub fn as_c_str(&self) -> &CStr {
        // By invariant 1 the default is not needed.
        CStr::from_bytes_with_nul(&self.0).unwrap_or_default()
    }

    /// Returns how far below the root the cgroup is, which itself is at 0. At most half of
    /// [`PATH_LEN_MAX`].
    pub fn depth(&self) -> usize {
        match self.as_bytes() {
            b"/" => 0,
            path => path.iter().filter(|&&byte| byte == b'/').count(),
        }
    }
}
