// SPDX-License-Identifier: GPL-2.0-only
//! How the program ends: 0, 1 failed, 2 usage, 3 needs rksm, 4 done in part.

use std::fmt;
use std::process::ExitCode;

/// How a verb that did not fail ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// All was done.
    Ok,
    /// Done for some, not for others; the verb has said for which not.
    Partial,
    /// As a command that it was to run has ended.
    Command(u8),
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> Self {
        match status {
            Status::Ok => ExitCode::SUCCESS,
            Status::Partial => ExitCode::from(4),
            Status::Command(code) => ExitCode::from(code),
        }
    }
}

/// Why a verb failed, in one sentence without a full stop, and the exit status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub status: u8,
    pub message: String,
}

impl Failure {
    /// It was tried, and failed.
    pub fn failed(message: impl Into<String>) -> Self {
        Self {
            status: 1,
            message: message.into(),
        }
    }

    /// The command line cannot be understood.
    pub fn usage(message: impl Into<String>) -> Self {
        Self {
            status: 2,
            message: message.into(),
        }
    }

    /// Only rksm can do `what`, as in "merging on request".
    pub fn needs_rksm(what: impl fmt::Display) -> Self {
        Self {
            status: 3,
            message: format!("{what} needs rksm, which is not loaded"),
        }
    }

    /// The same, with what was being done before it: "CONTEXT: MESSAGE".
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// The kernel's words for an error, without its number.
pub fn reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error ") {
        Some(end) => text[..end].to_string(),
        None => text,
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::failed(reason(&error))
    }
}

impl From<nix::Error> for Failure {
    fn from(error: nix::Error) -> Self {
        Self::failed(error.desc())
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Self::failed(error.to_string())
    }
}

impl From<anyhow::Error> for Failure {
    /// A [`Failure`] inside keeps its status; the context is in the message, outermost first.
    fn from(error: anyhow::Error) -> Self {
        let status = error.downcast_ref::<Failure>().map_or(1, |f| f.status);
        let parts: Vec<String> = error
            .chain()
            .map(|e| match e.downcast_ref::<std::io::Error>() {
                Some(e) => reason(e),
                None => e.to_string(),
            })
            .collect();
        Self {
            status,
            message: parts.join(": "),
        }
    }
}

/// Adds to an error what was being done.
pub trait Doing<T> {
    /// Turns an error into the failure "WHAT: ERROR".
    fn doing(self, what: impl fmt::Display) -> Result<T, Failure>;
}

impl<T, E: Into<Failure>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl fmt::Display) -> Result<T, Failure> {
        self.map_err(|e| e.into().context(what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    #[test]
    fn context_is_kept() {
        let gone = || std::io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(
            Err::<(), _>(gone()).doing("cannot read x").unwrap_err(),
            Failure::failed("cannot read x: No such file or directory")
        );
        let error = Err::<(), _>(gone()).context("outer").unwrap_err();
        assert_eq!(
            Failure::from(error).message,
            "outer: No such file or directory"
        );
    }

    #[test]
    fn status_survives_anyhow() {
        let error = anyhow::Error::new(Failure::needs_rksm("merging on request")).context("merge");
        let failure = Failure::from(error);
        assert_eq!(failure.status, 3);
        assert_eq!(
            failure.message,
            "merge: merging on request needs rksm, which is not loaded"
        );
    }
}
