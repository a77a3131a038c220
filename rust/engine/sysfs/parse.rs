// SPDX-License-Identifier: GPL-2.0-only

//! Numbers and words of a write, as the kernel's `lib/kstrtox.c` and `lib/string_helpers.c` take
//! them.

use kernel::prelude::*;

/// The part of a buffer that the kernel's string functions see: up to the first NUL.
pub(super) fn text(buf: &[u8]) -> &[u8] {
    buf.split(|&byte| byte == 0).next().unwrap_or(buf)
}

/// The word in brackets, of a file that shows all its words.
pub(super) fn bracketed(shown: &[u8]) -> Option<&[u8]> {
    let from = shown.iter().position(|&byte| byte == b'[')?;
    let len = shown.get(from..)?.iter().position(|&byte| byte == b']')?;
    shown.get(from + 1..from + len)
}

/// Parses digits and one newline after them, as `_kstrtoull()` does.
///
/// All digits are read before anything else is looked at: a number out of range is `ERANGE`,
/// whatever follows it.
fn digits(text: &[u8]) -> Result<u64> {
    let len = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (digits, rest) = text.split_at_checked(len).ok_or(EINVAL)?;
    let value = digits.iter().try_fold(0u64, |value, digit| {
        value.checked_mul(10)?.checked_add(u64::from(digit - b'0'))
    });
    let value = value.ok_or(ERANGE)?;
    match (digits, rest) {
        ([_, ..], [] | [b'\n']) => Ok(value),
        _ => Err(EINVAL),
    }
}

/// Parses an `unsigned long`, as `kstrtoul()` in base 10: one plus sign may come first.
pub(super) fn kstrtoul(text: &[u8]) -> Result<u64> {
    digits(text.strip_prefix(b"+").unwrap_or(text))
}

/// Parses an `unsigned int`, as `kstrtouint()` in base 10.
pub(super) fn kstrtouint(text: &[u8]) -> Result<u32> {
    kstrtoul(text)?.try_into().map_err(|_| ERANGE)
}

/// Parses an `int`, as `kstrtoint()` in base 10: one sign may come first.
pub(super) fn kstrtoint(text: &[u8]) -> Result<i32> {
    let value = match text.strip_prefix(b"-") {
        Some(text) => -i128::from(digits(text)?),
        None => i128::from(kstrtoul(text)?),
    };
    value.try_into().map_err(|_| ERANGE)
}

/// Parses a truth value by its first letters, as `kstrtobool()`.
pub(super) fn kstrtobool(text: &[u8]) -> Result<bool> {
    match text {
        [b'e' | b'E' | b'y' | b'Y' | b't' | b'T' | b'1', ..] => Ok(true),
        [b'd' | b'D' | b'n' | b'N' | b'f' | b'F' | b'0', ..] => Ok(false),
        [b'o' | b'O', b'n' | b'N', ..] => Ok(true),
        [b'o' | b'O', b'f' | b'F', ..] => Ok(false),
        _ => Err(EINVAL),
    }
}

/// Whether the text is `word`, or `word` and a newline, as `sysfs_streq()`.
pub(super) fn sysfs_streq(text: &[u8], word: &str) -> bool {
    text.strip_suffix(b"\n").unwrap_or(text) == word.as_bytes()
}

/// [`kstrtouint`], with `EINVAL` also for a number out of range, as most files have it.
pub(super) fn uint(text: &[u8]) -> Result<u32> {
    kstrtouint(text).map_err(|_| EINVAL)
}

/// [`kstrtoul`], with `EINVAL` also for a number out of range, as most files have it.
pub(super) fn ulong(text: &[u8]) -> Result<u64> {
    kstrtoul(text).map_err(|_| EINVAL)
}
