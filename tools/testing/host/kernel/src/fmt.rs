// SPDX-License-Identifier: GPL-2.0-only

//! Formatting.

pub use core::fmt::{
    Alignment,
    Arguments,
    Binary,
    Debug,
    Display,
    Error,
    Formatter,
    LowerExp,
    LowerHex,
    Octal,
    Pointer,
    Result,
    UpperExp,
    UpperHex,
    Write, //
};
