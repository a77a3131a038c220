// SPDX-License-Identifier: GPL-2.0-only
//! Files that are written as a whole.

use crate::exit::{Doing, Failure};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Puts a file of this content in place of what has been there: whoever reads it sees the one or
/// the other, never a part. Of devices and pipes it is written to the one that is there.
pub fn write_whole(path: &Path, content: &[u8]) -> Result<(), Failure> {
    let what = format!("cannot write {}", path.display());
    if fs::metadata(path).is_ok_and(|there| !there.is_file()) {
        let mut file = OpenOptions::new().write(true).open(path).doing(&what)?;
        return file.write_all(content).doing(&what);
    }
    let temporary = temporary(path).ok_or_else(|| Failure::failed(format!("{what}: no name")))?;
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&temporary)?;
        file.write_all(content)?;
        // Else a crash could leave the name with nothing in it.
        file.sync_data()?;
        drop(file);
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.doing(what)
}

/// A name beside it that has not its suffix: node_exporter reads all that end in ".prom".
fn temporary(path: &Path) -> Option<PathBuf> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name()?);
    name.push(format!(".{}.tmp", std::process::id()));
    Some(path.with_file_name(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    #[test]
    fn whole() {
        let fixture = Fixture::new();
        let path = fixture.root().join("a.prom");
        write_whole(&path, b"one").unwrap();
        // Whoever has opened the old one goes on reading the old one.
        let mut old = fs::File::open(&path).unwrap();
        write_whole(&path, b"two").unwrap();
        let mut text = String::new();
        std::io::Read::read_to_string(&mut old, &mut text).unwrap();
        assert_eq!(text, "one");
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(fs::read_dir(fixture.root()).unwrap().count(), 1);
        let failure = write_whole(&fixture.root().join("none/a"), b"x").unwrap_err();
        assert!(failure
            .message
            .ends_with("none/a: No such file or directory"));
        let failure = write_whole(Path::new("/dev/full"), b"x").unwrap_err();
        assert_eq!(
            failure.message,
            "cannot write /dev/full: No space left on device"
        );
    }
}
