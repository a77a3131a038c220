// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl top` in a terminal, and without one.

mod common;

use common::fixture::Proc;
use common::{golden, rksmctl, Fixture};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{channel, Receiver};
use std::time::{Duration, Instant};

/// How long a screen may take; the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(20);

/// The program in a terminal, and what that shows.
struct Pty {
    master: File,
    slave: File,
    child: Child,
    output: Receiver<Vec<u8>>,
    screen: vt100::Parser,
}

fn size(rows: u16, columns: u16) -> libc::winsize {
    libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

impl Pty {
    fn start(fixture: &Fixture, rows: u16, columns: u16, arguments: &str) -> Self {
        let (mut master, mut slave) = (-1, -1);
        // SAFETY: Both are given room for a descriptor; name and termios may be left out.
        let result = unsafe {
            libc::openpty(
                &mut master,
                &mut slave,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                &size(rows, columns),
            )
        };
        assert_eq!(result, 0, "no pty");
        // SAFETY: They are new, and nobody else's.
        let (master, slave) = unsafe { (File::from_raw_fd(master), File::from_raw_fd(slave)) };
        let end = || OwnedFd::from(slave.try_clone().unwrap());
        let mut command = Command::new(env!("CARGO_BIN_EXE_rksmctl"));
        command
            .arg("--root")
            .arg(fixture.root())
            .args(arguments.split_whitespace())
            .env("TERM", "xterm-256color")
            .stdin(end())
            .stdout(end())
            .stderr(end());
        // SAFETY: Both are system calls, which may be made between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        let (sender, output) = channel();
        let mut reader = master.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self {
            master,
            slave,
            child,
            output,
            screen: vt100::Parser::new(rows, columns, 0),
        }
    }

    fn lines(&self) -> Vec<String> {
        let (_, columns) = self.screen.screen().size();
        let rows = self.screen.screen().rows(0, columns);
        rows.map(|row| row.trim_end().to_string()).collect()
    }

    /// Waits until the screen is as wanted, and gives its lines.
    #[track_caller]
    fn wait(&mut self, wanted: impl Fn(&[String]) -> bool) -> Vec<String> {
        let until = Instant::now() + PATIENCE;
        loop {
            let lines = self.lines();
            if wanted(&lines) {
                return lines;
            }
            let left = until.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.screen.process(&bytes),
                Err(_) => panic!("not on the screen:\n{}", lines.join("\n")),
            }
        }
    }

    fn keys(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    fn resize(&mut self, rows: u16, columns: u16) {
        // SAFETY: The size is only read.
        unsafe {
            libc::ioctl(
                self.master.as_raw_fd(),
                libc::TIOCSWINSZ,
                &size(rows, columns),
            )
        };
        // vt100 fails where a character is as wide as its screen.
        self.screen.set_size(rows.max(2), columns.max(2));
    }

    fn is_raw(&self) -> bool {
        let mut termios = std::mem::MaybeUninit::<libc::termios>::zeroed();
        // SAFETY: There is room for the answer, and zeroes are a value of this plain data.
        let termios = unsafe {
            libc::tcgetattr(self.slave.as_raw_fd(), termios.as_mut_ptr());
            termios.assume_init()
        };
        termios.c_lflag & libc::ICANON == 0
    }

    /// Waits for the end, after which the terminal has to be as it was.
    #[track_caller]
    fn end(mut self) -> ExitStatus {
        let until = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < until, "it goes on");
            std::thread::sleep(Duration::from_millis(20));
        };
        while let Ok(bytes) = self.output.recv_timeout(Duration::from_millis(200)) {
            self.screen.process(&bytes);
        }
        assert!(!self.is_raw(), "still raw");
        let screen = self.screen.screen();
        assert!(!screen.alternate_screen() && !screen.hide_cursor());
        status
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn machine() -> Fixture {
    let fixture = Fixture::new();
    fixture.builtin();
    fixture.processes();
    fixture
}

#[test]
fn wide_screen() {
    let fixture = machine();
    let mut pty = Pty::start(&fixture, 24, 100, "top --interval 0.1");
    let lines = pty.wait(|lines| lines[0].contains("CPU") && lines[5].contains("4212"));
    assert!(
        lines[0].starts_with("built-in KSM  saved 11.4 MiB net"),
        "{lines:?}"
    );
    assert!(lines[1].starts_with("UNIT / PID  "), "{lines:?}");
    let words: Vec<&str> = lines[3].split_whitespace().collect();
    assert_eq!(
        words[..8],
        ["4211", "clone1", "8", "MiB", "3.91", "GiB", "-", "-"]
    );
    assert!(
        lines[23].ends_with("(UNIQUE, CHANGING and BROKEN/s need rksm)"),
        "{lines:?}"
    );
    assert!(pty.is_raw() && pty.screen.screen().alternate_screen());

    // Down to the second unit, fold it; then all that offers nothing.
    pty.keys("\x1b[B\x1b[B ");
    pty.wait(|lines| lines[4].starts_with("+ 101.scope") && lines[5].is_empty());
    pty.keys("a");
    pty.wait(|lines| lines.iter().any(|line| line.contains("800 sshd")));
    pty.keys("a\x1b[A");
    pty.wait(|lines| !lines.iter().any(|line| line.contains("sshd")));

    // Why.
    let smaps = "1000-2000 r--p 0 08:01 7 /bin/x\nRss: 4 kB\nAnonymous: 0 kB\nVmFlags: rd mr\n";
    fixture.file("/proc/4211/smaps", smaps);
    pty.keys("w");
    pty.wait(|lines| {
        lines[1].starts_with("clone1 (4211), 4 GiB resident: ")
            && lines[2].ends_with("file mappings: the page cache has each page once already")
    });
    pty.keys("w");
    pty.wait(|lines| lines[1].starts_with("UNIT / PID"));

    // One comes, and one goes.
    fixture.process(&Proc {
        pid: 5000,
        comm: "late",
        cgroup: "/late.service",
        merging_pages: 9000,
        merge_any: true,
        ..Proc::default()
    });
    pty.wait(|lines| lines[2].starts_with("- late.service"));
    std::fs::remove_dir_all(fixture.root().join("proc/4211")).unwrap();
    pty.wait(|lines| !lines.iter().any(|line| line.contains("4211")));
    pty.keys("q");
    assert_eq!(pty.end().code(), Some(0));
}

#[test]
fn small_screen_and_back() {
    let fixture = machine();
    let mut pty = Pty::start(&fixture, 5, 20, "top");
    let lines = pty.wait(|lines| lines[4].ends_with('q'));
    assert_eq!(
        lines,
        [
            "built-in KSM  saved",
            "UNIT / PID     SAVED",
            "- 100.scope    8 MiB",
            "   4211 clo    8 MiB",
            "s c u b  w why  q"
        ]
    );
    pty.resize(10, 60);
    pty.wait(|lines| lines[9].starts_with("sort: s c u b") && lines[5].contains("4212 clone2"));
    pty.resize(1, 1);
    pty.keys("\x03");
    // crossterm may leave a key that comes with a change of size until the next one comes.
    std::thread::sleep(Duration::from_millis(200));
    pty.keys("\x03");
    assert_eq!(pty.end().code(), Some(0));
}

#[test]
fn sigterm_gives_the_terminal_back() {
    let fixture = machine();
    let mut pty = Pty::start(&fixture, 24, 80, "top");
    pty.wait(|lines| lines[2].contains("100.scope"));
    kill(Pid::from_raw(pty.child.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(pty.end().signal(), Some(libc::SIGTERM));
}

#[test]
fn failure_gives_the_terminal_back() {
    let fixture = machine();
    let mut pty = Pty::start(&fixture, 24, 80, "top --interval 0.1");
    pty.wait(|lines| lines[2].contains("100.scope"));
    fixture.file("/sys/kernel/mm/ksm/full_scans", "x\n");
    assert_eq!(pty.end().code(), Some(1));
}

#[test]
fn without_a_terminal() {
    let fixture = machine();
    golden("top-no-terminal", &fixture, "top");
    golden("top-once", &fixture, "top --once");
    golden("top-once-all-json", &fixture, "top --once --all --json");
    golden("top-none", &Fixture::new(), "top");
    let output = rksmctl(&fixture, "top --batch 2 --interval 0.1");
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.matches("UNIT / PID").count(), 2, "{text}");
}

#[test]
fn rksm_without_a_device() {
    let fixture = machine();
    fixture.rksm();
    golden("top-rksm", &fixture, "top --once");
}

#[test]
fn budget() {
    let fixture = machine();
    fixture.rksm();
    let top = || {
        let output = rksmctl(&fixture, "top --batch 2 --interval 0.05");
        String::from_utf8(output.stdout).unwrap()
    };
    let file = |name: &str, value: &str| {
        fixture.file(&format!("/sys/kernel/mm/rksm/{name}"), value);
    };
    let text = top();
    assert!(text.contains("  CPU 0.0 % of 5 %  "), "{text}");
    file("memory_pressure", "1\n");
    let text = top();
    assert!(
        text.contains("  CPU 0.0 % of 10 %  ") && text.contains("  memory short"),
        "{text}"
    );
    file("governor", "[knobs] auto\n");
    let text = top();
    assert!(
        text.contains("  CPU 0.0 %  ") && !text.contains("memory short"),
        "{text}"
    );
}
