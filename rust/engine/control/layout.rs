// SPDX-License-Identifier: GPL-2.0-only

//! The structs of `tools/include/uapi/linux/rksm.h`, and their bytes.

use super::super::types::{
    Refusal,
    Refusals, //
};
use core::mem::offset_of;

use kernel::prelude::*;

/// `RKSM_NR_REFUSALS`.
pub const NR_REFUSALS: usize = 16;

static_assert!(Refusal::ALL.len() <= NR_REFUSALS);

/// `RKSM_RULE_REMOVE`.
pub const RULE_REMOVE: u32 = 1 << 0;

/// `RKSM_STAT_EXCLUDED`.
pub const STAT_EXCLUDED: u32 = 1 << 0;

/// `RKSM_STAT_MERGE_ANY`.
pub const STAT_MERGE_ANY: u32 = 1 << 1;

/// `RKSM_MERGE_ENABLE`.
pub const MERGE_ENABLE: u32 = 1 << 0;

/// `RKSM_UNMERGE_DISABLE`.
pub const UNMERGE_DISABLE: u32 = 1 << 0;

/// Refusals as the structs have them.
pub fn refused(refusals: &Refusals) -> [u64; NR_REFUSALS] {
    let mut refused = [0; NR_REFUSALS];
    for (count, &refusal) in refused.iter_mut().zip(Refusal::ALL) {
        *count = refusals.get(refusal);
    }
    refused
}

/// A field's value, in the machine's byte order.
pub(super) trait Value: Sized {
    /// Reads it at an offset; 0 where the bytes end before.
    fn read(bytes: &[u8], at: usize) -> Self;

    /// Writes it at an offset; nothing where the bytes end before.
    fn write(&self, bytes: &mut [u8], at: usize);
}

macro_rules! impl_value {
    ($($int:ty)*) => {
        $(impl Value for $int {
            fn read(bytes: &[u8], at: usize) -> Self {
                let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
                field.map_or(0, |field| Self::from_ne_bytes(*field))
            }

            fn write(&self, bytes: &mut [u8], at: usize) {
                let field = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut());
                if let Some(field) = field {
                    *field = self.to_ne_bytes();
                }
            }
        })*
    };
}

impl_value!(u32 i32 u64 i64);

impl Value for [u64; NR_REFUSALS] {
    fn read(bytes: &[u8], at: usize) -> Self {
        core::array::from_fn(|i| u64::read(bytes, at + i * size_of::<u64>()))
    }

    fn write(&self, bytes: &mut [u8], at: usize) {
        for (i, value) in self.iter().enumerate() {
            value.write(bytes, at + i * size_of::<u64>());
        }
    }
}

/// A struct and its bytes. Of fewer bytes, those fields count that are there as a whole.
pub(super) trait Bytes: Sized {
    /// Reads it from its bytes.
    fn read(bytes: &[u8]) -> Self;

    /// Writes it over its bytes.
    fn write(&self, bytes: &mut [u8]);
}

/// A struct of the header.
#[allow(dead_code, reason = "a host test holds the header against it")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Its name.
    pub name: &'static str,
    /// Its size.
    pub size: usize,
    /// The names, offsets and sizes of its fields.
    pub fields: &'static [(&'static str, usize, usize)],
}

/// Declares the structs, each with its name in the header.
macro_rules! layouts {
    ($($(#[$doc:meta])* $name:ident = $c:literal { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            pub(super) struct $name {
                $(pub(super) $field: $type,)*
            }

            impl Bytes for $name {
                fn read(bytes: &[u8]) -> Self {
                    Self {
                        $($field: Value::read(bytes, offset_of!(Self, $field)),)*
                    }
                }

                fn write(&self, bytes: &mut [u8]) {
                    $(self.$field.write(bytes, offset_of!(Self, $field));)*
                }
            }
        )*

        /// Every struct, in the order of the header.
        #[allow(dead_code, reason = "a host test holds the header against it")]
        pub const LAYOUTS: &[Layout] = &[
            $(Layout {
                name: $c,
                size: size_of::<$name>(),
                fields: &[
                    $((
                        stringify!($field),
                        offset_of!($name, $field),
                        size_of::<$type>(),
                    ),)*
                ],
            },)*
        ];
    };
}

layouts! {
    /// The argument of `RKSM_IOC_RULE`.
    Rule = "rksm_rule" {
        size: u32,
        flags: u32,
        pidfd: i32,
        action: u32,
        path: u64,
        path_len: u32,
        reserved: u32,
    }
    /// The argument of `RKSM_IOC_RULES` and `RKSM_IOC_STAT`.
    List = "rksm_list" {
        size: u32,
        flags: u32,
        cursor: u64,
        records: u64,
        len: u32,
        count: u32,
    }
    /// A record of `RKSM_IOC_RULES`.
    RuleRecord = "rksm_rule_record" {
        size: u32,
        action: u32,
        pid: i32,
        path_len: u32,
        processes: u32,
        reserved: u32,
    }
    /// A record of `RKSM_IOC_STAT`.
    StatRecord = "rksm_stat_record" {
        size: u32,
        flags: u32,
        pid: i32,
        reserved: u32,
        merged: u64,
        unique: u64,
        changing: u64,
        fresh: u64,
        zero: u64,
        broken: u64,
        refused: [u64; NR_REFUSALS],
    }
    /// The argument of `RKSM_IOC_MERGE`.
    Merge = "rksm_merge" {
        size: u32,
        flags: u32,
        pidfd: i32,
        reserved: u32,
        start: u64,
        end: u64,
        at: u64,
        scanned: u64,
        merged: u64,
        zeroed: u64,
        bytes_saved: i64,
        refused: [u64; NR_REFUSALS],
    }
    /// The argument of `RKSM_IOC_UNMERGE`.
    Unmerge = "rksm_unmerge" {
        size: u32,
        flags: u32,
        pidfd: i32,
        reserved: u32,
        start: u64,
        end: u64,
        at: u64,
        pages: u64,
    }
    /// The argument of `RKSM_IOC_WHY`.
    Why = "rksm_why" {
        size: u32,
        flags: u32,
        pidfd: i32,
        reserved: u32,
        at: u64,
        merged: u64,
        zero: u64,
        pinned: u64,
        unsplit: u64,
        unique: u64,
        changing: u64,
        fresh: u64,
    }
}
