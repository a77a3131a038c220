// SPDX-License-Identifier: GPL-2.0-only
//! Signals as events, for the verbs that go on until they are told to end.

use crate::exit::{Doing, Failure};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigHandler, SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Instant;

/// The code of a signal that the kernel sends, as for a key; the libc crate has no name for it.
const SI_KERNEL: i32 = 0x80;

/// What [`Signals::wait`] has waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The time has come.
    Time,
    /// The descriptor can be read.
    Readable,
    /// A child has changed its state.
    Child,
    /// Somebody wants this program to end. The terminal's signals go to the children, too.
    End { signal: Signal, from_terminal: bool },
}

/// The signals that end a program, and SIGCHLD, held back to be waited for.
#[derive(Debug)]
pub struct Signals {
    fd: SignalFd,
    before: SigSet,
}

impl Signals {
    /// From now on they do not end this program. Threads are to be started later.
    pub fn catch() -> Result<Self, Failure> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGCHLD);
        // SAFETY: The default action has no handler to be sound. With SIGCHLD ignored, as a
        // parent may have left it, there would be no exit status of a child.
        let _ = unsafe { nix::sys::signal::signal(Signal::SIGCHLD, SigHandler::SigDfl) };
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            // nohup, and a shell for what it runs in the background, want it ignored.
            if !is_ignored(signal) {
                set.add(signal);
            }
        }
        let caught = || {
            let before = SigSet::thread_get_mask()?;
            set.thread_block()?;
            let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
            Ok::<_, nix::Error>(Self { fd, before })
        };
        caught().doing("cannot wait for signals")
    }

    /// Has `command` get them as this program would have before.
    pub fn release<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let before = self.before;
        // SAFETY: Between fork and exec it makes one system call, and allocates nothing.
        unsafe { command.pre_exec(move || Ok(before.thread_set_mask()?)) }
    }

    /// Waits for a signal, for `until`, and for `readable`.
    pub fn wait(
        &self,
        until: Option<Instant>,
        readable: Option<BorrowedFd<'_>>,
    ) -> Result<Event, Failure> {
        loop {
            if let Some(event) = self.pending()? {
                return Ok(event);
            }
            let timeout = match until.map(|t| t.saturating_duration_since(Instant::now())) {
                None => PollTimeout::NONE,
                Some(left) if left.is_zero() => return Ok(Event::Time),
                // Rounded up: else the last millisecond would be spent asking.
                Some(left) => i32::try_from(left.as_micros().div_ceil(1000))
                    .ok()
                    .and_then(|ms| PollTimeout::try_from(ms).ok())
                    .unwrap_or(PollTimeout::MAX),
            };
            let mut fds = vec![PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
            fds.extend(readable.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(e).doing("cannot wait for signals"),
            }
            let ready = |fd: &PollFd<'_>| fd.any() == Some(true);
            if !fds.first().is_some_and(ready) && fds.get(1).is_some_and(ready) {
                return Ok(Event::Readable);
            }
        }
    }

    fn pending(&self) -> Result<Option<Event>, Failure> {
        let Some(info) = self.fd.read_signal().doing("cannot wait for signals")? else {
            return Ok(None);
        };
        Ok(match i32::try_from(info.ssi_signo).map(Signal::try_from) {
            Ok(Ok(Signal::SIGCHLD)) => Some(Event::Child),
            Ok(Ok(signal)) => Some(Event::End {
                signal,
                from_terminal: info.ssi_code == SI_KERNEL,
            }),
            _ => None,
        })
    }
}

fn is_ignored(signal: Signal) -> bool {
    let mut old = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: Nothing is set, and `old` has room for what is there; it is plain data, so that
    // zeroes are good where the call fails.
    let old = unsafe {
        libc::sigaction(signal as i32, std::ptr::null(), old.as_mut_ptr());
        old.assume_init()
    };
    old.sa_sigaction == libc::SIG_IGN
}
