// SPDX-License-Identifier: GPL-2.0-only

//! The kernel's log, on standard error.

/// Logs at level `emerg`.
#[macro_export]
macro_rules! pr_emerg {
    ($($arg:tt)*) => { ::std::eprint!("emerg: {}", ::core::format_args!($($arg)*)) };
}

/// Logs at level `alert`.
#[macro_export]
macro_rules! pr_alert {
    ($($arg:tt)*) => { ::std::eprint!("alert: {}", ::core::format_args!($($arg)*)) };
}

/// Logs at level `crit`.
#[macro_export]
macro_rules! pr_crit {
    ($($arg:tt)*) => { ::std::eprint!("crit: {}", ::core::format_args!($($arg)*)) };
}

/// Logs at level `err`.
#[macro_export]
macro_rules! pr_err {
    ($($arg:tt)*) => { ::std::eprint!("err: {}", ::core::format_args!($($arg)*)) };
}

/// Logs at level `warn`.
#[macro_export]
macro_rules! pr_warn {
    ($($arg:tt)*) => { ::std::eprint!("warn: {}", ::core::format_args!($($arg)*)) };
}

/// Logs at level `notice`.
#[macro_export]
macro_rules! pr_notice {
    ($($arg:tt)*) => { ::std::eprint!("notice: {}", ::core::format_args!($($arg)*)) };
}

/// Logs at level `info`.
#[macro_export]
macro_rules! pr_info {
    ($($arg:tt)*) => { ::std::eprint!("info: {}", ::core::format_args!($($arg)*)) };
}

/// Logs at level `debug`.
#[macro_export]
macro_rules! pr_debug {
    ($($arg:tt)*) => { ::std::eprint!("debug: {}", ::core::format_args!($($arg)*)) };
}
