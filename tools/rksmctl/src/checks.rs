// SPDX-License-Identifier: GPL-2.0-only
//! What can stand in the way of merging. Each check looks at one thing of a [`Machine`]; files
//! that cannot be read make it say nothing, never fail.

use crate::backend::{detect, release, Backend, Own};
use crate::exit::Failure;
use crate::host::{Host, KSM};
use crate::process::{self, Process};
use crate::units::{bytes, count, counted, duration, page_size};
use serde::Serialize;
use std::fmt::Display;
use std::io::{Read, Seek, SeekFrom};
use std::time::Duration;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing.
    Note,
    /// It costs savings or time.
    Warning,
    /// Nothing can be merged, or soon something fails.
    Problem,
}

impl Level {
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Problem => "problem",
        }
    }
}

/// What a check has found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check's name, which stays the same from version to version.
    pub check: &'static str,
    pub level: Level,
    pub text: String,
    pub remedy: Option<String>,
}

/// A finding before it has its check's name.
type Found = (Level, String, Option<String>);

fn ok(text: impl Display) -> Option<Found> {
    Some((Level::Ok, text.to_string(), None))
}

fn found(level: Level, text: impl Display, remedy: impl Display) -> Option<Found> {
    Some((level, text.to_string(), Some(remedy.to_string())))
}

/// All that the checks look at, looked up once.
pub struct Machine {
    pub host: Host,
    pub processes: Vec<Process>,
    /// Nothing where the kernel has no KSM.
    pub backend: Option<Box<dyn Backend>>,
    release: String,
}

impl Machine {
    /// Fails where there is no /proc to look at.
    pub fn look(host: &Host) -> Result<Self, Failure> {
        Ok(Self {
            release: release(host)?,
            processes: process::list(host)?,
            backend: detect(host).ok(),
            host: host.clone(),
        })
    }

    fn text(&self, path: &str) -> Option<String> {
        self.host.read_if_there(path).ok().flatten()
    }

    fn ksm(&self, name: &str) -> Option<u64> {
        self.text(&format!("{KSM}/{name}"))?.trim().parse().ok()
    }

    /// What only rksm has; nothing on the built-in.
    fn own(&self) -> Option<Own> {
        self.backend.as_ref()?.own().ok()?
    }

    fn is_governed(&self) -> bool {
        self.own().is_some_and(|own| own.is_governed())
    }

    fn has_rksm(&self) -> bool {
        self.backend.as_ref().is_some_and(|b| b.is_rksm())
    }
}

type Check = fn(&Machine) -> Option<Found>;

/// The checks in the order in which one would look.
const CHECKS: [(&str, Check); 16] = [
    ("kernel", kernel),
    ("module", module),
    ("secure_boot", secure_boot),
    ("run", running),
    ("permission", permission),
    ("opted_in", opted_in),
    ("guests", guests),
    ("governor", governor),
    ("tuners", tuners),
    ("thp", thp),
    ("map_count", map_count),
    ("zero_pages", zero_pages),
    ("sharing", sharing),
    ("nodes", nodes),
    ("smart_scan", smart_scan),
    ("memory", memory),
];

/// What all checks find.
pub fn findings(machine: &Machine) -> Vec<Finding> {
    let finding = |(check, look): &(&'static str, Check)| {
        look(machine).map(|(level, text, remedy)| Finding {
            check,
            level,
            text,
            remedy,
        })
    };
    CHECKS.iter().filter_map(finding).collect()
}

fn kernel(m: &Machine) -> Option<Found> {
    if m.backend.is_some() {
        return ok(format!("Linux {} has KSM", m.release));
    }
    found(
        Level::Problem,
        format!("Linux {} has no KSM: there is no {KSM}", m.release),
        "boot a kernel with CONFIG_KSM=y, as distributions' kernels are",
    )
}

/// The files that rksm can be, with the directories in which DKMS and others put them.
const DIRECTORIES: [&str; 4] = ["updates/dkms", "updates", "extra", "extra/rksm"];
const FILES: [&str; 4] = ["rksm.ko", "rksm.ko.xz", "rksm.ko.zst", "rksm.ko.gz"];

fn module_file(m: &Machine, release: &str) -> Option<String> {
    DIRECTORIES
        .iter()
        .flat_map(|dir| FILES.map(|file| format!("/lib/modules/{release}/{dir}/{file}")))
        .find(|path| m.host.exists(path))
}

fn module(m: &Machine) -> Option<Found> {
    if m.has_rksm() {
        let version = m.backend.as_ref()?.version().unwrap_or_default();
        return ok(format!("rksm {version} is loaded"));
    }
    if let Some(file) = module_file(m, &m.release) {
        return found(
            Level::Note,
            format!("rksm is not loaded, the built-in KSM works; {file} is there"),
            "modprobe rksm; where it fails, dmesg has the reason",
        );
    }
    let others = m.host.list("/lib/modules").unwrap_or_default();
    let other = others.iter().find(|r| module_file(m, r).is_some());
    match other {
        Some(other) => found(
            Level::Warning,
            format!(
                "rksm is not built for this kernel, {}, but for {other}",
                m.release
            ),
            format!(
                "install this kernel's headers, then: dkms autoinstall -k {}",
                m.release
            ),
        ),
        None => Some((
            Level::Note,
            "rksm is not installed, the built-in KSM works".into(),
            None,
        )),
    }
}

const SECURE_BOOT: &str =
    "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";

/// Who wants modules to be signed; nothing where nobody does.
fn wants_signature(m: &Machine) -> Option<&'static str> {
    // Four bytes of attributes, then the value.
    let secure_boot = std::fs::read(m.host.path(SECURE_BOOT)).unwrap_or_default();
    let lockdown = m.text("/sys/kernel/security/lockdown").unwrap_or_default();
    let enforced = m.text("/sys/module/module/parameters/sig_enforce");
    if lockdown.contains("[integrity]") || lockdown.contains("[confidentiality]") {
        Some(if secure_boot.get(4) == Some(&1) {
            "Secure Boot is on"
        } else {
            "the kernel is locked down"
        })
    } else if enforced.as_deref() == Some("Y") {
        Some("the kernel enforces signatures (sig_enforce)")
    } else {
        None
    }
}

/// Whether a signature is at the end of the file. Nothing where it is compressed: it is inside.
fn signed(m: &Machine, path: &str) -> Option<bool> {
    const MAGIC: &[u8] = b"~Module signature appended~\n";
    if !path.ends_with(".ko") {
        return None;
    }
    let mut file = std::fs::File::open(m.host.path(path)).ok()?;
    let mut end = Vec::new();
    let length = file.metadata().ok()?.len();
    let from = length.saturating_sub(MAGIC.len() as u64);
    file.seek(SeekFrom::Start(from)).ok()?;
    file.read_to_end(&mut end).ok()?;
    Some(end == MAGIC)
}

fn secure_boot(m: &Machine) -> Option<Found> {
    let Some(who) = wants_signature(m) else {
        return ok("modules need no signature");
    };
    if m.has_rksm() {
        return ok(format!("{who}, and rksm is loaded"));
    }
    let enroll = "enroll the key that signed it: mokutil --import KEY.der, then reboot";
    match module_file(m, &m.release) {
        None => found(
            Level::Note,
            format!("{who}: only modules signed with an enrolled key can be loaded"),
            enroll,
        ),
        Some(file) => match signed(m, &file) {
            Some(false) => found(
                Level::Problem,
                format!("{who}, and {file} is not signed"),
                "sign it with a key that is enrolled (mokutil --list-enrolled); DKMS does by \
                 itself with its own key",
            ),
            _ => found(
                Level::Note,
                format!("{who}: {file} can be loaded only if its key is enrolled"),
                enroll,
            ),
        },
    }
}

fn running(m: &Machine) -> Option<Found> {
    let remedy = format!("echo 1 > {KSM}/run");
    match m.ksm("run")? {
        1 => ok("run is 1"),
        0 => found(Level::Problem, "run is 0: nothing is scanned", remedy),
        _ => found(
            Level::Problem,
            "run is 2: everything is unmerged, and nothing scanned",
            remedy,
        ),
    }
}

/// Whether the kernel has told anything about it: ksm_stat of others is root's.
fn is_told(p: &Process) -> bool {
    p.ksm.rmap_items.is_some() || p.ksm.mergeable.is_some()
}

fn permission(m: &Machine) -> Option<Found> {
    let hidden = m.processes.iter().filter(|p| !is_told(p)).count() as u64;
    if hidden == 0 {
        return ok("all processes can be looked at");
    }
    // Before 6.1 there is none at all.
    if hidden == m.processes.len() as u64
        && !m
            .processes
            .iter()
            .any(|p| m.host.exists(format!("/proc/{}/ksm_stat", p.pid)))
    {
        return found(
            Level::Note,
            "this kernel tells nothing about single processes: there is no /proc/PID/ksm_stat",
            "Linux 6.1 and later have it",
        );
    }
    found(
        Level::Warning,
        format!(
            "{} of {} may not be looked at",
            count(hidden),
            counted(m.processes.len() as u64, "process", "processes")
        ),
        "run this as root",
    )
}

/// Those that have offered memory, as far as the kernel tells.
fn offering(m: &Machine) -> impl Iterator<Item = &Process> {
    m.processes.iter().filter(|p| {
        let items = || p.ksm.rmap_items.unwrap_or(0) > 0;
        p.ksm.mergeable == Some(true) || p.ksm.merge_any == Some(true) || items()
    })
}

fn opted_in(m: &Machine) -> Option<Found> {
    let offering = offering(m).count() as u64;
    if offering > 0 {
        let what = counted(offering, "process offers", "processes offer");
        return ok(format!("{what} memory for merging"));
    }
    if m.backend.is_none() || !m.processes.iter().any(is_told) {
        return None;
    }
    found(
        Level::Problem,
        "no process offers memory for merging",
        "MemoryKSM=yes in a systemd unit, or rksmctl run -- CMD, or with rksm: rksmctl enable; \
         QEMU offers its guests' memory by itself",
    )
}

/// Programs that run virtual machines, by the beginnings of their names.
const MONITORS: [&str; 6] = [
    "qemu-system",
    "qemu-kvm",
    "kvm",
    "cloud-hypervisor",
    "firecracker",
    "crosvm",
];

fn runs_guest(p: &Process) -> bool {
    let program = p.cmdline.first().map_or(p.comm.as_str(), String::as_str);
    let name = program.rsplit('/').next().unwrap_or(program);
    MONITORS.iter().any(|m| name.starts_with(m))
}

/// Bytes of writable shared mappings of at least 64 MiB, which only guests' memory is.
fn shared_bytes(maps: &str) -> u64 {
    let size = |line: &str| -> Option<u64> {
        let mut words = line.split(' ');
        let (start, end) = words.next()?.split_once('-')?;
        if words.next()? != "rw-s" || line.contains("anon_inode:") || line.contains("/dev/dri") {
            return None;
        }
        let start = u64::from_str_radix(start, 16).ok()?;
        u64::from_str_radix(end, 16).ok()?.checked_sub(start)
    };
    maps.lines()
        .filter_map(size)
        .filter(|bytes| *bytes >= 64 << 20)
        .sum()
}

fn guests(m: &Machine) -> Option<Found> {
    let guests: Vec<&Process> = m.processes.iter().filter(|p| runs_guest(p)).collect();
    let shared: Vec<(&Process, u64)> = guests
        .iter()
        .filter_map(|p| Some((*p, shared_bytes(&m.text(&format!("/proc/{}/maps", p.pid))?))))
        .filter(|(_, bytes)| *bytes > 0)
        .collect();
    let Some((first, _)) = shared.first() else {
        return match guests.len() {
            0 => None,
            n => ok(counted(n as u64, "guest has", "guests have").to_string() + " private memory"),
        };
    };
    let more = match shared.len() {
        1 => String::new(),
        n => format!(" and {}", counted(n as u64 - 1, "other", "others")),
    };
    found(
        Level::Warning,
        format!(
            "{} ({}){more}: {} of guest memory is a shared mapping, which is never merged",
            first.title(),
            first.pid,
            bytes(shared.iter().map(|(_, bytes)| bytes).sum())
        ),
        "start with private memory: QEMU without share=on, cloud-hypervisor with --memory \
         shared=off; vhost-user and virtiofs need it shared",
    )
}

fn tuners(m: &Machine) -> Option<Found> {
    const TUNERS: [&str; 4] = ["ksmtuned", "uksmd", "ksmtune", "momd"];
    let is_tuner = |p: &&Process| {
        let script = p
            .cmdline
            .iter()
            .take(2)
            .filter_map(|arg| arg.rsplit('/').next());
        std::iter::once(p.comm.as_str())
            .chain(script)
            .any(|name| TUNERS.contains(&name))
    };
    let Some(tuner) = m.processes.iter().find(is_tuner) else {
        return ok("nobody else sets the knobs");
    };
    let unit = tuner.unit.as_deref().unwrap_or(&tuner.comm);
    let (comm, pid) = (&tuner.comm, tuner.pid);
    if m.is_governed() {
        return found(
            Level::Warning,
            format!(
                "{comm} ({pid}) starts and stops the scanner by run; what it writes to \
                 pages_to_scan and sleep_millisecs has no effect with governor=auto"
            ),
            format!(
                "systemctl disable --now {unit}, and echo 1 > {KSM}/run; or leave the scanner to \
                 it: rksmctl tune knobs"
            ),
        );
    }
    found(
        Level::Warning,
        format!("{comm} ({pid}) sets run, pages_to_scan and sleep_millisecs, too"),
        format!("systemctl disable --now {unit}; or leave the knobs and advisor_mode to it"),
    )
}

/// A full scan that takes so many seconds is worth a word.
const LONG_SCAN: u64 = 300;

fn governor(m: &Machine) -> Option<Found> {
    let own = m.own()?;
    own.governor.as_ref()?;
    if let Some(percent) = own.budget() {
        let short = match own.memory_pressure {
            Some(true) => ", as memory is short",
            _ => "",
        };
        return ok(format!("the governor keeps to {percent} % of a CPU{short}"));
    }
    let knobs = m.backend.as_ref()?.knobs().ok()?;
    let untouched = knobs.pages_to_scan == 100
        && knobs.sleep_millisecs == 20
        && knobs.advisor_mode.is_none_or(|mode| mode == "none");
    let memory: u64 = offering(m).map(|p| p.anon_bytes).sum();
    let per_second = knobs.pages_to_scan * page_size() * 1000 / knobs.sleep_millisecs.max(1);
    let seconds = memory / per_second.max(1);
    if untouched && seconds >= LONG_SCAN {
        return found(
            Level::Warning,
            format!(
                "a full scan of the {} that are offered takes {} at least, as pages_to_scan and \
                 sleep_millisecs have their defaults, and nothing is merged before the second",
                bytes(memory),
                duration(Duration::from_secs(seconds))
            ),
            "rksmctl tune balanced: the governor looks at new memory within a second",
        );
    }
    ok("the knobs pace the scanner (governor=knobs)")
}

fn thp(m: &Machine) -> Option<Found> {
    let enabled = m.text("/sys/kernel/mm/transparent_hugepage/enabled")?;
    if !enabled.contains("[always]") {
        return ok("huge pages are used only where they are asked for, or not at all");
    }
    found(
        Level::Note,
        "huge pages are used everywhere: merging splits them, and zeroes that a split drops are \
         not counted as saved",
        "where savings matter more than speed: echo madvise > \
         /sys/kernel/mm/transparent_hugepage/enabled",
    )
}

fn map_count(m: &Machine) -> Option<Found> {
    let limit: u64 = m.text("/proc/sys/vm/max_map_count")?.trim().parse().ok()?;
    let (most, maps) = offering(m)
        .filter_map(|p| {
            let maps = m.text(&format!("/proc/{}/maps", p.pid))?;
            Some((p, maps.lines().count() as u64))
        })
        .max_by_key(|(_, maps)| *maps)?;
    if maps * 5 < limit * 4 {
        return ok(format!(
            "at most {} in a process that offers memory, of {} allowed",
            counted(maps, "mapping", "mappings"),
            count(limit)
        ));
    }
    found(
        Level::Warning,
        format!(
            "{} ({}) has {} mappings of {} allowed: soon it can make none, nor split one by \
             madvise",
            most.title(),
            most.pid,
            count(maps),
            count(limit)
        ),
        format!("sysctl vm.max_map_count={}", limit.saturating_mul(4)),
    )
}

fn zero_pages(m: &Machine) -> Option<Found> {
    if m.ksm("use_zero_pages")? != 0 {
        return ok("zeroes are merged with the kernel's zero page");
    }
    found(
        Level::Note,
        "pages of zeroes are merged like others, one frame for each max_page_sharing of them",
        format!("echo 1 > {KSM}/use_zero_pages, if guests boot or free much"),
    )
}

fn sharing(m: &Machine) -> Option<Found> {
    let most = m.ksm("max_page_sharing")?;
    let chains = m.ksm("stable_node_chains").unwrap_or(0);
    let copies = m.ksm("stable_node_dups").unwrap_or(0);
    let remedy = format!(
        "echo 2 > {KSM}/run; echo 1024 > {KSM}/max_page_sharing; echo 1 > {KSM}/run: it can be \
         changed only while nothing is merged"
    );
    if most < 64 {
        let text = format!("max_page_sharing is {most}: each {most} equal pages take a frame");
        return found(Level::Warning, text, remedy);
    }
    // Worth a word where the copies of frames are a part of all frames that one would miss.
    if copies.saturating_sub(chains) * 20 > m.ksm("pages_shared").unwrap_or(0) {
        let text = format!(
            "{} occur more than {most} times (max_page_sharing) and take {} frames",
            counted(chains, "content", "contents"),
            count(copies)
        );
        return found(Level::Note, text, remedy);
    }
    ok(format!("max_page_sharing is {most}"))
}

fn nodes(m: &Machine) -> Option<Found> {
    let online = m.text("/sys/devices/system/node/online")?;
    if online.trim() == "0" {
        return None;
    }
    match m.ksm("merge_across_nodes")? {
        0 => found(
            Level::Note,
            format!(
                "merge_across_nodes is 0: pages of NUMA nodes {online} are not merged with \
                     each other, and scanning costs more"
            ),
            format!(
                "echo 2 > {KSM}/run; echo 1 > {KSM}/merge_across_nodes; echo 1 > {KSM}/run, \
                 unless access to remote memory hurts more"
            ),
        ),
        _ => found(
            Level::Note,
            format!("pages of NUMA nodes {online} are merged with each other"),
            format!(
                "if processes are bound to nodes and suffer: echo 2 > {KSM}/run; echo 0 > \
                 {KSM}/merge_across_nodes; echo 1 > {KSM}/run"
            ),
        ),
    }
}

fn smart_scan(m: &Machine) -> Option<Found> {
    // It has no effect then.
    if m.is_governed() {
        return None;
    }
    if m.ksm("smart_scan")? != 0 {
        return ok("smart_scan is on");
    }
    found(
        Level::Note,
        "smart_scan is off: pages without a partner are looked at in each full scan",
        format!("echo 1 > {KSM}/smart_scan"),
    )
}

fn memory(m: &Machine) -> Option<Found> {
    let text = m.text("/proc/meminfo")?;
    let line = |name: &str| -> Option<u64> {
        let rest = text
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
        rest.trim()
            .strip_suffix("kB")?
            .trim_end()
            .parse::<u64>()
            .ok()?
            .checked_mul(1024)
    };
    let (total, available) = (line("MemTotal")?, line("MemAvailable")?);
    let (swap, swap_free) = (
        line("SwapTotal").unwrap_or(0),
        line("SwapFree").unwrap_or(0),
    );
    let saved = m.backend.as_ref()?.counters().ok()?.saved_bytes();
    let remedy = "add swap or memory, or run less: merged pages that are written to take their \
                  memory back";
    if available.saturating_mul(10) < total && swap_free.saturating_mul(2) <= swap {
        let text = format!(
            "short of memory: {} of {} available, {} of {} of swap free",
            bytes(available),
            bytes(total),
            bytes(swap_free),
            bytes(swap)
        );
        return found(Level::Problem, text, remedy);
    }
    if saved > available.saturating_add(swap_free) {
        let text = format!(
            "{} are saved, but only {} with swap are free for when they are written to",
            bytes(saved),
            bytes(available.saturating_add(swap_free))
        );
        return found(Level::Warning, text, remedy);
    }
    ok("what is saved would find room if it were written to")
}
