// SPDX-License-Identifier: GPL-2.0-only
//! The machine's files: /sys and /proc, or what a test puts in their place.

use crate::cli::Global;
use crate::exit::{Doing, Failure};
use serde::Serialize;
use std::fmt::Display;
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The built-in's files; rksm serves the same ones while it is loaded.
pub const KSM: &str = "/sys/kernel/mm/ksm";
/// rksm's own files.
pub const RKSM: &str = "/sys/kernel/mm/rksm";

/// Where /sys, /proc and /etc are. All paths are given as they are on a real machine, and errors
/// name them so.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self::new("/")
    }
}

impl Host {
    /// A machine whose files are below `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Where the file with this absolute path really is.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Whether these are the files of the machine that this program runs on.
    pub fn is_real(&self) -> bool {
        self.root == Path::new("/")
    }

    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.path(path).exists()
    }

    /// The text of a file, without the line end at its end.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<String, Failure> {
        let path = path.as_ref();
        let bytes =
            std::fs::read(self.path(path)).doing(format!("cannot read {}", path.display()))?;
        let mut text = String::from_utf8_lossy(&bytes).into_owned();
        text.truncate(text.trim_end_matches('\n').len());
        Ok(text)
    }

    /// As [`Host::read`]; nothing where there is no such file or it may not be read, and where
    /// the process that it is about has ended.
    pub fn read_if_there(&self, path: impl AsRef<Path>) -> Result<Option<String>, Failure> {
        let path = path.as_ref();
        match std::fs::read(self.path(path)) {
            Ok(bytes) => {
                let mut text = String::from_utf8_lossy(&bytes).into_owned();
                text.truncate(text.trim_end_matches('\n').len());
                Ok(Some(text))
            }
            Err(e)
                if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied)
                    || e.raw_os_error() == Some(libc::ESRCH) =>
            {
                Ok(None)
            }
            Err(e) => Err(e).doing(format!("cannot read {}", path.display())),
        }
    }

    /// The value in a file that holds one.
    pub fn value<T: FromStr>(&self, path: impl AsRef<Path>) -> Result<T, Failure> {
        let path = path.as_ref();
        parse(path, &self.read(path)?)
    }

    /// As [`Host::value`]; nothing where [`Host::read_if_there`] has nothing.
    pub fn value_if_there<T: FromStr>(&self, path: impl AsRef<Path>) -> Result<Option<T>, Failure> {
        let path = path.as_ref();
        self.read_if_there(path)?
            .map(|text| parse(path, &text))
            .transpose()
    }

    /// Writes one value to a file that exists, as those of sysfs.
    pub fn write(&self, path: impl AsRef<Path>, value: impl Display) -> Result<(), Failure> {
        let path = path.as_ref();
        std::fs::OpenOptions::new()
            .write(true)
            .truncate(true)
            .open(self.path(path))
            .and_then(|mut file| file.write_all(format!("{value}\n").as_bytes()))
            .doing(format!("cannot write {value} to {}", path.display()))
    }

    /// The names in a directory, sorted; none where there is no such directory.
    pub fn list(&self, path: impl AsRef<Path>) -> Result<Vec<String>, Failure> {
        let path = path.as_ref();
        let entries = match std::fs::read_dir(self.path(path)) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.doing(format!("cannot read {}", path.display()))?,
        };
        let mut names: Vec<String> = entries
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .collect();
        names.sort();
        Ok(names)
    }
}

fn parse<T: FromStr>(path: &Path, text: &str) -> Result<T, Failure> {
    text.trim().parse().map_err(|_| {
        Failure::failed(format!(
            "{} holds '{text}', which is not understood",
            path.display()
        ))
    })
}

/// What each verb gets.
#[derive(Clone, Debug)]
pub struct Context {
    pub host: Host,
    /// Whether to write JSON instead of text.
    pub json: bool,
    /// The columns of the terminal.
    pub width: usize,
}

impl Context {
    pub fn new(global: &Global) -> Self {
        Self {
            host: Host::new(&global.root),
            json: global.json,
            width: width(),
        }
    }

    /// Prints the result: `value` as JSON, or what `text` makes, line by line.
    pub fn print<T: Serialize>(
        &self,
        value: &T,
        text: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        let text = if self.json {
            serde_json::to_string_pretty(value)?
        } else {
            text()
        };
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", text.trim_end_matches('\n')).doing("cannot write the output")
    }
}

fn width() -> usize {
    let columns = std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok());
    let of_terminal = || {
        std::io::stdout()
            .is_terminal()
            .then(|| crossterm::terminal::size().ok().map(|(w, _)| w.into()))
            .flatten()
    };
    columns
        .or_else(of_terminal)
        .filter(|w| *w >= 20)
        .unwrap_or(80)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    #[test]
    fn values_and_errors_name_the_file() {
        let fixture = Fixture::new();
        fixture.file("/sys/kernel/mm/ksm/run", "1\n");
        let host = Host::new(fixture.root());
        assert_eq!(host.value::<u64>("/sys/kernel/mm/ksm/run").unwrap(), 1);
        host.write("/sys/kernel/mm/ksm/run", 2).unwrap();
        assert_eq!(host.read("/sys/kernel/mm/ksm/run").unwrap(), "2");
        host.write("/sys/kernel/mm/ksm/run", "x").unwrap();
        assert_eq!(
            host.value::<u64>("/sys/kernel/mm/ksm/run")
                .unwrap_err()
                .message,
            "/sys/kernel/mm/ksm/run holds 'x', which is not understood"
        );
        assert_eq!(
            host.write("/sys/kernel/mm/ksm/none", 1)
                .unwrap_err()
                .message,
            "cannot write 1 to /sys/kernel/mm/ksm/none: No such file or directory"
        );
        assert_eq!(host.value_if_there::<u64>("/sys/none").unwrap(), None);
        assert_eq!(host.list("/sys/kernel/mm/ksm").unwrap(), ["run"]);
    }
}
