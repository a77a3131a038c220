// SPDX-License-Identifier: GPL-2.0-only
//! Amounts: one way of writing each, and of reading it. JSON has plain bytes.

use std::time::Duration;

/// Bytes of a page.
pub fn page_size() -> u64 {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|n| u64::try_from(n).ok())
        .unwrap_or(4096)
}

/// "512 B", "1.5 KiB", "41 MiB", "2.31 GiB": three digits at most.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = n as f64;
    let mut unit = 0;
    // What would round to 1000 or more takes the next unit, so that no column overflows.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = match value {
        _ if unit == 0 || value >= 99.95 => 0,
        v if v >= 9.995 => 1,
        _ => 2,
    };
    let text = format!("{value:.digits$}");
    let text = if digits > 0 {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        &text
    };
    format!("{text} {}", UNITS[unit])
}

/// As [`bytes`], with a minus where negative.
pub fn signed_bytes(n: i64) -> String {
    let sign = if n < 0 { "-" } else { "" };
    format!("{sign}{}", bytes(n.unsigned_abs()))
}

/// "0.4 %", "12 %": of a value in percent.
pub fn percent(value: f64) -> String {
    let digits = usize::from(value.abs() < 9.95);
    format!("{value:.digits$} %")
}

/// "2,097,152"
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// "1 process", "2 processes", for nouns whose plural is `plural`.
pub fn counted(n: u64, one: &str, plural: &str) -> String {
    format!("{} {}", count(n), if n == 1 { one } else { plural })
}

/// "6.8 s", "12 min", "3.5 h".
pub fn duration(time: Duration) -> String {
    match time.as_secs_f64() {
        s if s < 0.0995 => format!("{:.0} ms", s * 1e3),
        s if s < 99.5 => format!("{s:.1} s"),
        s if s < 5970.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

/// Reads "10", "10%", "0.5 %".
pub fn parse_percent(text: &str) -> Result<f64, String> {
    let number = text.trim().trim_end_matches('%').trim_end();
    match number.parse::<f64>() {
        Ok(p) if p > 0.0 && p <= 100.0 => Ok(p),
        _ => Err("a percentage over 0 and up to 100 is wanted".into()),
    }
}

/// Reads seconds: "5", "0.5".
pub fn parse_seconds(text: &str) -> Result<Duration, String> {
    match text.trim().trim_end_matches('s').trim_end().parse::<f64>() {
        Ok(s) if (0.01..=86400.0).contains(&s) => Ok(Duration::from_secs_f64(s)),
        _ => Err("seconds from 0.01 to 86400 are wanted".into()),
    }
}

/// Addresses of a process, as /proc/PID/maps has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressRange {
    pub start: u64,
    pub end: u64,
}

/// Reads "7f0000000000-7f0000200000", in hexadecimal with or without 0x.
pub fn parse_range(text: &str) -> Result<AddressRange, String> {
    let hex = |s: &str| u64::from_str_radix(s.trim_start_matches("0x"), 16).ok();
    text.split_once('-')
        .and_then(|(start, end)| Some((hex(start)?, hex(end)?)))
        .filter(|(start, end)| start < end && start % page_size() == 0 && end % page_size() == 0)
        .map(|(start, end)| AddressRange { start, end })
        .ok_or_else(|| "START-END is wanted, of whole pages, as in /proc/PID/maps".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts() {
        let expected = [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.98 KiB"),
            (1536, "1.5 KiB"),
            (4096, "4 KiB"),
            (41 << 20, "41 MiB"),
            (2_480_343_613, "2.31 GiB"),
            (16 << 30, "16 GiB"),
            (1000 << 20, "0.98 GiB"),
            (u64::MAX, "16 EiB"),
        ];
        for (n, text) in expected {
            assert_eq!(bytes(n), text);
        }
        assert_eq!(signed_bytes(-4096), "-4 KiB");
        assert_eq!(percent(0.42), "0.4 %");
        assert_eq!(percent(12.4), "12 %");
        assert_eq!(count(2_097_152), "2,097,152");
        assert_eq!(count(12), "12");
        assert_eq!(counted(1, "page", "pages"), "1 page");
        assert_eq!(duration(Duration::from_millis(6800)), "6.8 s");
        assert_eq!(duration(Duration::from_millis(7)), "7 ms");
        assert_eq!(duration(Duration::from_secs(720)), "12 min");
    }

    #[test]
    fn arguments() {
        assert_eq!(parse_percent("10%"), Ok(10.0));
        assert!(parse_percent("0").is_err() && parse_percent("x").is_err());
        assert_eq!(parse_seconds("0.5"), Ok(Duration::from_millis(500)));
        assert_eq!(
            parse_range("0x1000-3000"),
            Ok(AddressRange {
                start: 0x1000,
                end: 0x3000
            })
        );
        assert!(parse_range("3000-1000").is_err() && parse_range("1001-2000").is_err());
    }
}
