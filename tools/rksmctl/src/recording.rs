// SPDX-License-Identifier: GPL-2.0-only
//! Recordings: JSON lines, a header first, then samples.

use crate::exit::{reason, Doing, Failure};
use crate::sample::Sample;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// What the header's `format` says.
pub const FORMAT: &str = "rksmctl-recording";
/// Grows when older programs could no longer read it rightly; new fields alone do not count.
pub const VERSION: u64 = 1;
/// More than any sample has; a file without line ends shall not fill the memory.
const LONGEST_LINE: u64 = 64 << 20;

/// The first line.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Header {
    pub format: String,
    pub version: u64,
    /// This program's version.
    #[serde(default)]
    pub rksmctl: String,
    /// As [`crate::backend::Backend::name`] and its version, when the recording began.
    #[serde(default)]
    pub backend: String,
    #[serde(default)]
    pub backend_version: String,
    /// The kernel's release.
    #[serde(default)]
    pub kernel: String,
    #[serde(default)]
    pub interval_seconds: f64,
    /// When it began, in seconds since 1970.
    #[serde(default)]
    pub started_seconds: f64,
    /// Bytes of a page.
    pub page_bytes: u64,
    /// MemTotal.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// The command that was run meanwhile.
    #[serde(default)]
    pub command: Vec<String>,
}

/// A recording that is being written.
#[derive(Debug)]
pub struct Writer {
    file: File,
    path: PathBuf,
    bytes: u64,
    regular: bool,
}

impl Writer {
    /// Makes the file. What is there already is replaced only with `force`.
    pub fn create(path: &Path, force: bool) -> Result<Self, Failure> {
        let regular = !std::fs::metadata(path).is_ok_and(|there| !there.is_file());
        let mut options = OpenOptions::new();
        options.write(true);
        if regular && force {
            options.create(true).truncate(true);
        } else if regular {
            options.create_new(true);
        }
        let file = options.open(path).map_err(|e| {
            let name = path.display();
            if e.kind() == ErrorKind::AlreadyExists {
                Failure::failed(format!("{name} exists; --force would replace it"))
            } else {
                Failure::failed(format!("cannot write {name}: {}", reason(&e)))
            }
        })?;
        Ok(Self {
            file,
            path: path.to_path_buf(),
            bytes: 0,
            regular,
        })
    }

    /// Writes one line, at once. After an error the file ends with the last whole line.
    pub fn line<T: Serialize>(&mut self, value: &T) -> Result<(), Failure> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        let written = self.file.write_all(&line);
        if written.is_err() && self.regular {
            let _ = self.file.set_len(self.bytes);
        }
        written.doing(format!("cannot write {}", self.path.display()))?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    /// Removes the file, as nothing has come of it.
    pub fn discard(self) {
        if self.regular {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A recording that is being read, sample by sample.
#[derive(Debug)]
pub struct Reader<R> {
    pub header: Header,
    lines: Lines<R>,
    last_seconds: f64,
    /// Whether it ends within a line.
    pub cut_off: bool,
}

/// Opens a recording.
pub fn open(path: &Path) -> Result<Reader<BufReader<File>>, Failure> {
    let name = path.display().to_string();
    let file = File::open(path).doing(format!("cannot read {name}"))?;
    Reader::new(BufReader::new(file), name)
}

#[derive(Debug)]
struct Lines<R> {
    from: R,
    name: String,
    number: u64,
}

impl<R: BufRead> Lines<R> {
    /// The next line, and whether it has its line end; nothing after the last.
    fn next(&mut self) -> Result<Option<(Vec<u8>, bool)>, Failure> {
        let mut line = Vec::new();
        let mut part = std::io::Read::take(&mut self.from, LONGEST_LINE);
        let what = || format!("cannot read {}", self.name);
        let bytes = part.read_until(b'\n', &mut line).doing(what())?;
        self.number += 1;
        let whole = line.ends_with(b"\n");
        if !whole && bytes as u64 == LONGEST_LINE {
            return Err(self.error("is too long"));
        }
        Ok((bytes > 0).then_some((line, whole)))
    }

    fn error(&self, what: &str) -> Failure {
        Failure::failed(format!("line {} of {} {what}", self.number, self.name))
    }
}

impl<R: BufRead> Reader<R> {
    /// Reads the header; errors call the recording `name`.
    pub fn new(from: R, name: String) -> Result<Self, Failure> {
        let mut lines = Lines {
            from,
            name,
            number: 0,
        };
        let name = lines.name.clone();
        let Some((line, whole)) = lines.next()? else {
            return Err(Failure::failed(format!("{name} is empty")));
        };
        // First the version alone: the rest may be different in others.
        let value: serde_json::Value = match serde_json::from_slice(&line) {
            Err(_) if !whole && line.starts_with(b"{\"format\":") => {
                return Err(Failure::failed(format!(
                    "{name} is cut off within its first line"
                )));
            }
            other => other.unwrap_or_default(),
        };
        if value.get("format").and_then(|f| f.as_str()) != Some(FORMAT) {
            return Err(Failure::failed(format!(
                "{name} is not a recording of rksmctl"
            )));
        }
        match value.get("version").and_then(serde_json::Value::as_u64) {
            Some(VERSION) => {}
            Some(newer) if newer > VERSION => {
                return Err(Failure::failed(format!(
                    "{name} has format version {newer}, which only a newer rksmctl reads; \
                     this one reads {VERSION}"
                )));
            }
            _ => return Err(lines.error("has no valid format version")),
        }
        let header: Header = serde_json::from_value(value)
            .map_err(|e| lines.error(&format!("is not understood: {e}")))?;
        Ok(Self {
            header,
            lines,
            last_seconds: 0.0,
            cut_off: false,
        })
    }

    /// The next sample; nothing at the end, also where that is within a line.
    pub fn next_sample(&mut self) -> Result<Option<Sample>, Failure> {
        if self.cut_off {
            return Ok(None);
        }
        let Some((line, whole)) = self.lines.next()? else {
            return Ok(None);
        };
        let sample: Sample = match serde_json::from_slice(&line) {
            Ok(sample) => sample,
            Err(_) if !whole => {
                self.cut_off = true;
                return Ok(None);
            }
            Err(e) => {
                // It has its own line and column, which are not the file's.
                let text = e.to_string();
                let text = text.split(" at line ").next().unwrap_or_default();
                return Err(self.lines.error(&format!("is not understood: {text}")));
            }
        };
        if sample.seconds < self.last_seconds {
            return Err(self.lines.error("is earlier than the one before"));
        }
        self.last_seconds = sample.seconds;
        Ok(Some(sample))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> String {
        format!("{{\"format\":\"{FORMAT}\",\"version\":1,\"page_bytes\":4096}}\n")
    }

    fn sample(seconds: f64) -> String {
        let sample = Sample {
            seconds,
            ..Sample::default()
        };
        serde_json::to_string(&sample).unwrap() + "\n"
    }

    fn read(text: &str) -> Result<(usize, bool), String> {
        let message = |f: Failure| f.message;
        let mut reader = Reader::new(text.as_bytes(), "f".into()).map_err(message)?;
        let mut n = 0;
        while reader.next_sample().map_err(message)?.is_some() {
            n += 1;
        }
        Ok((n, reader.cut_off))
    }

    #[test]
    fn cut_off_anywhere() {
        let text = header() + &sample(0.0) + &sample(1.0);
        let first = header().len();
        let second = first + sample(0.0).len();
        assert_eq!(read(&text), Ok((2, false)));
        for end in 0..text.len() {
            let expected = match end {
                0 => Err("f is empty".to_string()),
                e if e < "{\"format\":".len() => Err("f is not a recording of rksmctl".into()),
                e if e < first - 1 => Err("f is cut off within its first line".into()),
                e if e <= first => Ok((0, false)),
                // All but the line end is there.
                e if e == second - 1 || e == second => Ok((1, false)),
                e if e == text.len() - 1 => Ok((2, false)),
                e if e < second => Ok((0, true)),
                _ => Ok((1, true)),
            };
            assert_eq!(read(&text[..end]), expected, "{end}");
        }
    }

    #[test]
    fn what_is_no_recording() {
        let header = header();
        for (text, message) in [
            ("\n".into(), "f is not a recording of rksmctl"),
            ("[]\n".into(), "f is not a recording of rksmctl"),
            (
                "{\"format\":\"x\"}".into(),
                "f is not a recording of rksmctl",
            ),
            (
                header.replace("version\":1", "version\":2"),
                "f has format version 2, which only a newer rksmctl reads; this one reads 1",
            ),
            (
                header.replace("version\":1", "version\":0"),
                "line 1 of f has no valid format version",
            ),
            (
                header.replace(",\"version\":1", ""),
                "line 1 of f has no valid format version",
            ),
            (
                header.replace(",\"page_bytes\":4096", ""),
                "line 1 of f is not understood: missing field `page_bytes`",
            ),
            (
                header.clone() + "{\n" + &sample(1.0),
                "line 2 of f is not understood: EOF while parsing an object",
            ),
            (
                header.clone() + "{}\n",
                "line 2 of f is not understood: missing field `seconds`",
            ),
            (
                header + &sample(2.0) + &sample(1.0),
                "line 3 of f is earlier than the one before",
            ),
        ] {
            assert_eq!(read(&text), Err(message.into()), "{text}");
        }
    }

    /// As a later version may write it.
    #[test]
    fn unknown_fields_are_passed_over() {
        let more = |line: String| line.replacen('{', "{\"later\":[1],", 1);
        let text = more(header()) + &more(sample(0.0));
        assert_eq!(read(&text), Ok((1, false)));
    }
}
