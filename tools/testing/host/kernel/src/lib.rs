// SPDX-License-Identifier: GPL-2.0-only

//! Stand-in for the part of the kernel crate that `rust/engine` uses.
//!
//! Whatever is here has the name, the path and the signature it has in the kernel, so that the
//! engine's files compile unchanged on the host. [`testing`] is the one addition: it makes
//! allocations fail on demand and counts the bytes a kernel would have given out.

#![deny(unsafe_code)]

pub mod alloc;
pub mod error;
pub mod fmt;
pub mod page;
pub mod prelude;
pub mod print;
pub mod testing;

pub use error::{
    Error,
    Result, //
};

/// Fails the build unless the constant expression is true.
#[macro_export]
macro_rules! static_assert {
    ($condition:expr $(, $arg:literal)?) => {
        const _: () = ::core::assert!($condition $(, $arg)?);
    };
}

/// Checked at run time here, at build time in the kernel.
#[macro_export]
macro_rules! build_assert {
    ($condition:expr $(, $arg:literal)? $(,)?) => {
        ::core::assert!($condition $(, $arg)?)
    };
}
