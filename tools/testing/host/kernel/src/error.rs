// SPDX-License-Identifier: GPL-2.0-only

//! Kernel errors.

use crate::{
    alloc::AllocError,
    fmt, //
};

use core::num::{
    NonZeroI32,
    TryFromIntError, //
};

/// The error codes, by their C names.
pub mod code {
    macro_rules! declare_err {
        ($($err:ident = $errno:literal, $doc:literal;)*) => {
            $(
                #[doc = $doc]
                pub const $err: super::Error = match super::Error::try_from_errno(-$errno) {
                    Some(err) => err,
                    None => panic!("invalid errno"),
                };
            )*

            pub(super) fn name(errno: i32) -> Option<&'static str> {
                match errno {
                    $($errno => Some(stringify!($err)),)*
                    _ => None,
                }
            }
        };
    }

    declare_err! {
        EPERM = 1, "Operation not permitted.";
        ENOENT = 2, "No such file or directory.";
        ESRCH = 3, "No such process.";
        EINTR = 4, "Interrupted system call.";
        EIO = 5, "I/O error.";
        E2BIG = 7, "Argument list too long.";
        EAGAIN = 11, "Try again.";
        ENOMEM = 12, "Out of memory.";
        EACCES = 13, "Permission denied.";
        EFAULT = 14, "Bad address.";
        EBUSY = 16, "Device or resource busy.";
        EEXIST = 17, "File exists.";
        ENODEV = 19, "No such device.";
        EINVAL = 22, "Invalid argument.";
        ENOTTY = 25, "Not a typewriter.";
        ENOSPC = 28, "No space left on device.";
        EDOM = 33, "Math argument out of domain of func.";
        ERANGE = 34, "Math result not representable.";
        ENODATA = 61, "No data available.";
        EOVERFLOW = 75, "Value too large for defined data type.";
        EOPNOTSUPP = 95, "Operation not supported on transport endpoint.";
        ESTALE = 116, "Stale file handle.";
        ERESTARTSYS = 512, "Restart the system call.";
    }
}

/// Generic integer kernel error.
///
/// # Invariants
///
/// The value is a valid errno: at least `-MAX_ERRNO` and below 0.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Error(NonZeroI32);

const MAX_ERRNO: i32 = 4095;

impl Error {
    /// Creates an [`Error`] from a negative errno; anything else is a bug and yields
    /// [`code::EINVAL`].
    pub fn from_errno(errno: core::ffi::c_int) -> Error {
        Self::try_from_errno(errno).unwrap_or(code::EINVAL)
    }

    const fn try_from_errno(errno: core::ffi::c_int) -> Option<Error> {
        if errno < -MAX_ERRNO || errno >= 0 {
            return None;
        }
        match NonZeroI32::new(errno) {
            Some(errno) => Some(Error(errno)),
            None => None,
        }
    }

    /// Returns the (negative) errno.
    pub fn to_errno(self) -> core::ffi::c_int {
        self.0.get()
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match code::name(-self.to_errno()) {
            Some(name) => f.write_str(name),
            None => f.debug_tuple("Error").field(&-self.to_errno()).finish(),
        }
    }
}

impl From<AllocError> for Error {
    fn from(_: AllocError) -> Error {
        code::ENOMEM
    }
}

impl From<TryFromIntError> for Error {
    fn from(_: TryFromIntError) -> Error {
        code::EINVAL
    }
}

impl From<fmt::Error> for Error {
    fn from(_: fmt::Error) -> Error {
        code::EINVAL
    }
}

/// A [`Result`](core::result::Result) with an [`Error`] by default.
pub type Result<T = (), E = Error> = core::result::Result<T, E>;
