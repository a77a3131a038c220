// SPDX-License-Identifier: GPL-2.0-only
//! The memory of other processes: what is mapped, what is present, and what it holds.

use crate::exit::reason;
use crate::host::Host;
use crate::sampler::Frame;
use crate::units::page_size;
use nix::errno::Errno;
use nix::sys::uio::{process_vm_readv, RemoteIoVec};
use nix::unistd::Pid;
use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Why a process cannot be looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// It has ended, or has no memory any more.
    Ended,
    /// We may not: in the kernel's words.
    Denied(String),
}

impl From<std::io::Error> for Unreadable {
    fn from(error: std::io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) => Self::Ended,
            _ => Self::Denied(reason(&error)),
        }
    }
}

/// What KSM can do with a mapping, as `ksm_compatible()` in the kernel's mm/ksm.c has it. That a
/// file is on DAX is not to be seen from outside; its pages are no anonymous ones, anyway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It may merge its anonymous pages.
    Private,
    /// Shared, of a file or not.
    Shared,
    Hugetlb,
    /// Of a device or of the kernel's, or droppable.
    Special,
}

/// One mapping of /proc/PID/smaps, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vma {
    pub start: u64,
    pub end: u64,
    /// The file, "[heap]", or nothing.
    pub name: String,
    pub rss: u64,
    pub anonymous: u64,
    /// Nothing on kernels that do not tell.
    pub ksm: Option<u64>,
    pub anon_huge: u64,
    pub hugetlb: u64,
    pub swap: u64,
    /// Two letters each.
    flags: Vec<[u8; 2]>,
}

impl Vma {
    /// Whether VmFlags has a flag.
    pub fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|f| f == flag.as_bytes())
    }

    pub fn kind(&self) -> Kind {
        let any = |flags: &[&str]| flags.iter().any(|f| self.has(f));
        if any(&["ht"]) {
            Kind::Hugetlb
        } else if any(&["sh", "ms"]) {
            Kind::Shared
        } else if any(&["pf", "mm", "io", "de", "dp"]) {
            Kind::Special
        } else {
            Kind::Private
        }
    }

    /// Whether it is memory that processes share, and not a file of a disk.
    pub fn is_shared_memory(&self) -> bool {
        self.kind() == Kind::Shared
            && ["/memfd:", "/dev/shm/", "/dev/zero", "/SYSV", "/run/shm/"]
                .iter()
                .any(|p| self.name.starts_with(p))
    }
}

/// Reads the text of /proc/PID/smaps. Lines that are not understood are passed over.
pub fn parse_smaps(text: &str) -> Vec<Vma> {
    let mut all: Vec<Vma> = Vec::new();
    for line in text.lines() {
        if let Some(vma) = header(line) {
            all.push(vma);
            continue;
        }
        let (Some(vma), Some((name, value))) = (all.last_mut(), line.split_once(':')) else {
            continue;
        };
        if name == "VmFlags" {
            let flags = value.split_whitespace();
            vma.flags = flags.filter_map(|f| f.as_bytes().try_into().ok()).collect();
            continue;
        }
        let Some(bytes) = kibibytes(value) else {
            continue;
        };
        match name {
            "Rss" => vma.rss = bytes,
            "Anonymous" => vma.anonymous = bytes,
            "KSM" => vma.ksm = Some(bytes),
            "AnonHugePages" => vma.anon_huge = bytes,
            "Shared_Hugetlb" | "Private_Hugetlb" => vma.hugetlb += bytes,
            "Swap" => vma.swap = bytes,
            _ => {}
        }
    }
    all
}

/// "55e2ed822000-55e2ed824000 r--p 00000000 fe:00 247030      /usr/bin/cat"
fn header(line: &str) -> Option<Vma> {
    let (range, rest) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let hex = |s: &str| u64::from_str_radix(s, 16).ok();
    // Permissions, offset, device and inode go before the name.
    let mut rest = rest.trim_start();
    for _ in 0..4 {
        rest = rest
            .split_once(' ')
            .map_or("", |(_, rest)| rest.trim_start());
    }
    Some(Vma {
        start: hex(start)?,
        end: hex(end).filter(|end| Some(*end) >= hex(start))?,
        name: rest.to_string(),
        ..Vma::default()
    })
}

fn kibibytes(text: &str) -> Option<u64> {
    let number = text.trim().strip_suffix("kB")?.trim_end();
    number.parse::<u64>().ok()?.checked_mul(1024)
}

/// The mappings of a process.
pub fn mappings(host: &Host, pid: i32) -> Result<Vec<Vma>, Unreadable> {
    let text = std::fs::read(host.path(format!("/proc/{pid}/smaps")))?;
    Ok(parse_smaps(&String::from_utf8_lossy(&text)))
}

/// Present pages that lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub start: u64,
    pub end: u64,
}

impl Run {
    pub fn pages(&self) -> u64 {
        (self.end - self.start) / page_size()
    }
}

/// An entry of /proc/PID/pagemap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageEntry(pub u64);

impl PageEntry {
    fn bit(self, n: u32) -> bool {
        (self.0 >> n) & 1 != 0
    }

    /// Nobody else maps it.
    pub fn is_exclusive(self) -> bool {
        self.bit(56)
    }

    /// Write-protected by userfaultfd.
    pub fn is_uffd_wp(self) -> bool {
        self.bit(57)
    }

    /// Of a file, or shared memory.
    pub fn is_file(self) -> bool {
        self.bit(61)
    }

    pub fn is_present(self) -> bool {
        self.bit(63)
    }

    /// The number of its frame; nothing where we may not know.
    pub fn frame(self) -> Option<u64> {
        let number = self.0 & ((1 << 55) - 1);
        (self.is_present() && number != 0).then_some(number)
    }
}

/// The flags of frames, for root only.
pub struct FrameFlags {
    file: Option<File>,
}

const KPF_KSM: u64 = 1 << 21;
const KPF_ZERO_PAGE: u64 = 1 << 24;

impl FrameFlags {
    pub fn open(host: &Host) -> Self {
        Self {
            file: File::open(host.path("/proc/kpageflags")).ok(),
        }
    }

    fn of(&self, frame: u64) -> Option<u64> {
        let mut flags = [0; 8];
        let file = self.file.as_ref()?;
        file.read_exact_at(&mut flags, frame * 8).ok()?;
        Some(u64::from_ne_bytes(flags))
    }
}

/// What kind of frame a page has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    Frame(Frame),
    /// The zero page, or, where it holds zeroes, probably that.
    Zero,
    PerhapsZero,
}

mod scan {
    //! The ioctl of /proc/PID/pagemap (since Linux 6.7).

    #[repr(C)]
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Region {
        pub start: u64,
        pub end: u64,
        pub categories: u64,
    }

    #[repr(C)]
    #[derive(Debug, Default)]
    pub struct Arg {
        pub size: u64,
        pub flags: u64,
        pub start: u64,
        pub end: u64,
        pub walk_end: u64,
        pub vec: u64,
        pub vec_len: u64,
        pub max_pages: u64,
        pub category_inverted: u64,
        pub category_mask: u64,
        pub category_anyof_mask: u64,
        pub return_mask: u64,
    }

    pub const FILE: u64 = 1 << 2;
    pub const PRESENT: u64 = 1 << 3;
    pub const PFNZERO: u64 = 1 << 5;

    nix::ioctl_readwrite!(pagemap_scan, b'f', 16, Arg);
}

/// Reads one process.
pub struct Reader {
    pid: i32,
    pagemap: File,
    memory: File,
    /// Not made up by a test.
    real: bool,
    /// Whether present pages may be mappings of the zero page.
    perhaps_zero: bool,
}

/// Entries of pagemap in a read.
const ENTRIES: usize = 4096;
/// What the kernel takes in a call (IOV_MAX).
const PIECES: usize = 1024;

impl Reader {
    pub fn open(host: &Host, pid: i32) -> Result<Self, Unreadable> {
        Ok(Self {
            pid,
            pagemap: File::open(host.path(format!("/proc/{pid}/pagemap")))?,
            memory: File::open(host.path(format!("/proc/{pid}/mem")))?,
            real: host.is_real(),
            perhaps_zero: false,
        })
    }

    /// The present anonymous pages of a range, without mappings of the zero page where the kernel
    /// tells these.
    pub fn present(&mut self, start: u64, end: u64) -> Result<Vec<Run>, Unreadable> {
        if !self.perhaps_zero {
            match self.scan(start, end) {
                Err(Errno::ENOTTY | Errno::EINVAL) => self.perhaps_zero = true,
                Err(Errno::ESRCH) => return Err(Unreadable::Ended),
                Err(e) => return Err(Unreadable::Denied(e.desc().into())),
                Ok(runs) => return Ok(runs),
            }
        }
        let page = page_size();
        let mut runs = Vec::new();
        let mut at = start;
        while at < end {
            let entries = self.entries(at, (end - at) / page)?;
            if entries.is_empty() {
                break;
            }
            for entry in entries {
                if entry.is_present() && !entry.is_file() {
                    push(&mut runs, at, at + page);
                }
                at += page;
            }
        }
        Ok(runs)
    }

    fn scan(&self, start: u64, end: u64) -> Result<Vec<Run>, Errno> {
        const REGIONS: usize = 1024;
        let mut regions = vec![scan::Region::default(); REGIONS];
        let mut runs = Vec::new();
        let mut at = start;
        while at < end {
            let mut arg = scan::Arg {
                size: std::mem::size_of::<scan::Arg>() as u64,
                start: at,
                end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: REGIONS as u64,
                category_inverted: scan::FILE | scan::PFNZERO,
                category_mask: scan::PRESENT | scan::FILE | scan::PFNZERO,
                return_mask: scan::PRESENT,
                ..scan::Arg::default()
            };
            // SAFETY: `arg` is what the call is for, and tells the length of `regions`, which
            // live longer than the call.
            let found = unsafe { scan::pagemap_scan(self.pagemap.as_raw_fd(), &mut arg) };
            let found = match found {
                Err(Errno::EINTR) => continue,
                other => usize::try_from(other?).unwrap_or(0),
            };
            for region in regions.iter().take(found) {
                push(&mut runs, region.start, region.end);
            }
            if arg.walk_end <= at {
                break;
            }
            at = arg.walk_end;
        }
        Ok(runs)
    }

    /// The entries of up to `n` pages from an address on: fewer if there is more than fits, none
    /// if the process has ended.
    pub fn entries(&self, start: u64, n: u64) -> Result<Vec<PageEntry>, Unreadable> {
        let n = usize::try_from(n).unwrap_or(ENTRIES).min(ENTRIES);
        let mut bytes = vec![0; n * 8];
        let length = self
            .pagemap
            .read_at(&mut bytes, start / page_size() * 8)
            .map_err(Unreadable::from)?;
        bytes.truncate(length);
        Ok(bytes
            .chunks_exact(8)
            .filter_map(|b| Some(PageEntry(u64::from_ne_bytes(b.try_into().ok()?))))
            .collect())
    }

    /// What is behind a page.
    pub fn backing(&self, entry: PageEntry, flags: &FrameFlags) -> Backing {
        if entry.is_exclusive() {
            return Backing::Frame(Frame::Own);
        }
        let Some(number) = entry.frame() else {
            return if self.perhaps_zero {
                Backing::PerhapsZero
            } else {
                Backing::Frame(Frame::Own)
            };
        };
        match flags.of(number) {
            Some(flags) if flags & KPF_KSM != 0 => Backing::Frame(Frame::Merged(number)),
            Some(flags) if flags & KPF_ZERO_PAGE != 0 => Backing::Zero,
            None if self.perhaps_zero => Backing::PerhapsZero,
            _ => Backing::Frame(Frame::Shared(number)),
        }
    }

    /// Reads `length` bytes at each address, one after the other into `buffer`. Gives which of
    /// them could be read.
    pub fn read(
        &self,
        addresses: &[u64],
        length: usize,
        buffer: &mut Vec<u8>,
    ) -> Result<Vec<bool>, Unreadable> {
        buffer.clear();
        buffer.resize(addresses.len() * length, 0);
        let pieces = addresses.iter().zip(buffer.chunks_exact_mut(length));
        Ok(pieces
            .map(|(at, piece)| self.memory.read_exact_at(piece, *at).is_ok())
            .collect())
    }

    /// The same in fewer calls, for pages that nobody else maps: process_vm_readv() pins what it
    /// reads, and before that the kernel gives a process its own copy of a page that is shared,
    /// which would undo merging.
    pub fn read_exclusive(
        &self,
        addresses: &[u64],
        length: usize,
        buffer: &mut Vec<u8>,
    ) -> Result<Vec<bool>, Unreadable> {
        if !self.real {
            return self.read(addresses, length, buffer);
        }
        buffer.clear();
        buffer.resize(addresses.len() * length, 0);
        let mut done = vec![false; addresses.len()];
        let mut at = 0;
        while at < addresses.len() {
            let to = (at + PIECES).min(addresses.len());
            let (Some(wanted), Some(room)) = (
                addresses.get(at..to),
                buffer.get_mut(at * length..to * length),
            ) else {
                break;
            };
            let remote: Vec<RemoteIoVec> = wanted
                .iter()
                .map(|base| RemoteIoVec {
                    base: *base as usize,
                    len: length,
                })
                .collect();
            let mut local = [IoSliceMut::new(room)];
            let read = match process_vm_readv(Pid::from_raw(self.pid), &mut local, &remote) {
                Ok(bytes) => bytes / length,
                // Of the first.
                Err(Errno::EFAULT) => 0,
                Err(Errno::EINTR) => continue,
                // As with seccomp in containers.
                Err(Errno::ENOSYS | Errno::EPERM) => {
                    return self.read(addresses, length, buffer);
                }
                Err(Errno::ESRCH) => return Err(Unreadable::Ended),
                Err(e) => return Err(Unreadable::Denied(e.desc().into())),
            };
            done.iter_mut().skip(at).take(read).for_each(|d| *d = true);
            // It ends at the first that is not there; the next may be.
            at += read;
            if at < to {
                at += 1;
            }
        }
        Ok(done)
    }
}

/// Adds pages, to the last run if they follow it.
fn push(runs: &mut Vec<Run>, start: u64, end: u64) {
    match runs.last_mut() {
        Some(last) if last.end == start => last.end = end,
        _ => runs.push(Run { start, end }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    const PRESENT: u64 = 1 << 63;
    const EXCLUSIVE: u64 = 1 << 56;
    const FILE: u64 = 1 << 61;
    const SMAPS: &str = "\
55e2ed822000-55e2ed824000 r--p 00000000 fe:00 247030                     /usr/bin/a b
Rss:                   8 kB
Anonymous:             4 kB
KSM:                   0 kB
Swap:                 12 kB
VmFlags: rd mr mw me sd 
7f0000000000-7f0040000000 rw-s 00000000 00:01 1024                       /memfd:ram (deleted)
Rss:             1048576 kB
Anonymous:             0 kB
VmFlags: rd wr sh mr mw me ms sd 
7f0050000000-7f0050200000 rw-p 00000000 00:00 0 
Rss:                2048 kB
Anonymous:          2048 kB
AnonHugePages:      2048 kB
KSM:                  16 kB
ProtectionKey:         0
Rubbish
Rss: many kB
VmFlags: rd wr mr mw me ac sd mg 
7f0060000000-7f0060400000 rw-p 00000000 00:0f 77 /anon_hugepage (deleted)
Shared_Hugetlb:        0 kB
Private_Hugetlb:    4096 kB
VmFlags: rd wr mr mw me de ht 
7ffd3b9f2000-7ffd3b9f4000 r-xp 00000000 00:00 0                          [vdso]
Rss:                   4 kB
VmFlags: rd ex mr mw me de 
";

    #[test]
    fn smaps() {
        let all = parse_smaps(SMAPS);
        let kinds: Vec<Kind> = all.iter().map(Vma::kind).collect();
        assert_eq!(
            kinds,
            [
                Kind::Private,
                Kind::Shared,
                Kind::Private,
                Kind::Hugetlb,
                Kind::Special
            ]
        );
        assert_eq!(all[0].name, "/usr/bin/a b");
        assert_eq!(
            (all[0].start, all[0].end),
            (0x55e2_ed82_2000, 0x55e2_ed82_4000)
        );
        assert_eq!(
            (all[0].rss, all[0].anonymous, all[0].swap),
            (8192, 4096, 12288)
        );
        assert!(all[1].is_shared_memory() && !all[0].is_shared_memory());
        assert_eq!(
            (all[0].ksm, all[1].ksm, all[2].ksm),
            (Some(0), None, Some(16384))
        );
        assert_eq!((all[2].name.as_str(), all[2].anon_huge), ("", 2 << 20));
        assert!(all[2].has("mg") && !all[1].has("mg"));
        assert_eq!(all[3].hugetlb, 4 << 20);
        assert_eq!(all[4].name, "[vdso]");
        for rubbish in ["", "x", "1-", "2000-1000 rw-p", "Rss: 4 kB", "-", "zz-1 a"] {
            assert_eq!(parse_smaps(rubbish), [], "{rubbish}");
        }
    }

    #[test]
    fn pagemap() {
        let entry = PageEntry(PRESENT | EXCLUSIVE | 0x1234);
        assert!(entry.is_present() && entry.is_exclusive() && !entry.is_file());
        assert_eq!(entry.frame(), Some(0x1234));
        assert_eq!(PageEntry(PRESENT).frame(), None);
        assert!(PageEntry(1 << 57).is_uffd_wp());
    }

    /// As on kernels before 6.7.
    #[test]
    fn made_up_process() {
        let fixture = Fixture::new();
        let page = page_size();
        let mut entries = [0_u64; 16];
        entries[2] = PRESENT | EXCLUSIVE;
        entries[3] = PRESENT | 9;
        entries[4] = PRESENT | FILE;
        entries[5] = 1 << 62;
        entries[6] = PRESENT | 10;
        entries[7] = PRESENT | 11;
        let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_ne_bytes()).collect();
        fixture.file("/proc/7/pagemap", bytes);
        fixture.file("/proc/7/mem", vec![5; 4 * page as usize]);
        let mut flags = [0_u64; 12];
        flags[9] = KPF_KSM;
        flags[10] = KPF_ZERO_PAGE;
        let bytes: Vec<u8> = flags.iter().flat_map(|e| e.to_ne_bytes()).collect();
        fixture.file("/proc/kpageflags", bytes);

        let host = Host::new(fixture.root());
        let mut reader = Reader::open(&host, 7).unwrap();
        let run = |start, end| Run {
            start: start * page,
            end: end * page,
        };
        assert_eq!(reader.present(0, 16 * page), Ok(vec![run(2, 4), run(6, 8)]));
        let flags = FrameFlags::open(&host);
        let backing: Vec<Backing> = [2, 3, 6, 7]
            .iter()
            .map(|i| reader.backing(PageEntry(entries[*i]), &flags))
            .collect();
        assert_eq!(
            backing,
            [
                Backing::Frame(Frame::Own),
                Backing::Frame(Frame::Merged(9)),
                Backing::Zero,
                Backing::Frame(Frame::Shared(11))
            ]
        );
        assert_eq!(
            reader.backing(PageEntry(PRESENT), &flags),
            Backing::PerhapsZero
        );
        let mut buffer = Vec::new();
        let done = reader.read(&[0, page, 4 * page], 100, &mut buffer).unwrap();
        assert_eq!(done, [true, true, false]);
        assert_eq!(buffer[..200], [5; 200]);
        assert_eq!(Reader::open(&host, 8).err(), Some(Unreadable::Ended));
    }

    /// This test's own process, with a hole between what is there.
    #[test]
    fn real_process() {
        use nix::sys::mman::{mmap_anonymous, munmap, MapFlags, ProtFlags};
        let page = page_size() as usize;
        let length = std::num::NonZeroUsize::new(8 * page).unwrap();
        // SAFETY: A new mapping; nobody else uses it.
        let base = unsafe {
            mmap_anonymous(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE,
            )
        }
        .unwrap();
        let start = base.as_ptr() as u64;
        // SAFETY: All within that mapping; page 3 is not used after it is unmapped, and page 5 is
        // only read, so that it is one of zeroes.
        let zero = unsafe {
            let bytes = base.as_ptr().cast::<u8>();
            for i in [0, 1, 2, 4] {
                bytes.add(i * page).write_bytes(i as u8 + 1, page);
            }
            munmap(base.add(3 * page), page).unwrap();
            bytes.add(5 * page).read_volatile()
        };
        assert_eq!(zero, 0);
        let page = page as u64;
        let pid = std::process::id() as i32;
        let mut reader = Reader::open(&Host::default(), pid).unwrap();
        let runs = reader.present(start, start + 8 * page).unwrap();
        let pages: u64 = runs.iter().map(Run::pages).sum();
        if !reader.perhaps_zero {
            assert_eq!(pages, 4);
        }
        let addresses: Vec<u64> = (0..5).map(|i| start + i * page + 10).collect();
        let mut buffer = Vec::new();
        for read in [Reader::read, Reader::read_exclusive] {
            let done = read(&reader, &addresses, 256, &mut buffer).unwrap();
            assert_eq!(done, [true, true, true, false, true]);
            assert_eq!((buffer[0], buffer[600], buffer[4 * 256]), (1, 3, 5));
        }
        let many = vec![start; 3000];
        assert!(reader
            .read_exclusive(&many, 8, &mut buffer)
            .unwrap()
            .iter()
            .all(|d| *d));
        let own = mappings(&Host::default(), pid).unwrap();
        assert!(own.iter().any(|v| v.start <= start && start < v.end));
        assert_eq!(mappings(&Host::default(), i32::MAX), Err(Unreadable::Ended));
    }

    /// What fork has left shared, as what is merged, stays so when it is read.
    #[test]
    fn reading_does_not_unshare() {
        use nix::sys::mman::{mmap_anonymous, MapFlags, ProtFlags};
        use nix::unistd::{fork, ForkResult};
        let page = page_size() as usize;
        let length = std::num::NonZeroUsize::new(page).unwrap();
        // SAFETY: A new mapping, which nobody else uses.
        let base = unsafe {
            let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            let base = mmap_anonymous(None, length, prot, MapFlags::MAP_PRIVATE).unwrap();
            base.as_ptr().cast::<u8>().write_bytes(7, page);
            base
        };
        // SAFETY: The child calls nothing but pause().
        let child = match unsafe { fork() }.unwrap() {
            ForkResult::Child => loop {
                nix::unistd::pause();
            },
            ForkResult::Parent { child } => child,
        };
        let at = base.as_ptr() as u64;
        let reader = Reader::open(&Host::default(), child.as_raw());
        let looked = reader.and_then(|reader| {
            let before = reader.entries(at, 1)?;
            let mut buffer = Vec::new();
            let done = reader.read(&[at], page, &mut buffer)?;
            Ok((before, done, buffer, reader.entries(at, 1)?))
        });
        nix::sys::signal::kill(child, nix::sys::signal::SIGKILL).unwrap();
        nix::sys::wait::waitpid(child, None).unwrap();
        let (before, done, buffer, after) = looked.unwrap();
        assert!(before[0].is_present() && !before[0].is_exclusive());
        assert_eq!((done, buffer), (vec![true], vec![7; page]));
        assert_eq!(before, after);
    }
}
