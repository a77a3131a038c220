// SPDX-License-Identifier: GPL-2.0-only
//! Processes and what KSM does for them, from /proc.

use crate::exit::Failure;
use crate::host::Host;
use serde::{Deserialize, Serialize};

/// One process, as it was when it was looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: i32,
    pub comm: String,
    pub cmdline: Vec<String>,
    /// Its effective user id.
    pub uid: u32,
    /// Its path in cgroup v2, from "/".
    pub cgroup: Option<String>,
    /// The systemd unit that the path tells.
    pub unit: Option<String>,
    /// The name of the virtual machine that it runs.
    pub vm: Option<String>,
    /// VmRSS and RssAnon, in bytes.
    pub rss_bytes: u64,
    pub anon_bytes: u64,
    pub ksm: KsmStat,
}

/// /proc/PID/ksm_stat. Nothing where the kernel does not tell, or not to us.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KsmStat {
    pub rmap_items: Option<u64>,
    pub zero_pages: Option<u64>,
    pub merging_pages: Option<u64>,
    /// Bytes; below zero where the metadata is more than what is saved.
    pub process_profit: Option<i64>,
    /// Whether prctl or a rule has opened all its memory to merging.
    pub merge_any: Option<bool>,
    /// Whether any of its memory is open to merging.
    pub mergeable: Option<bool>,
}

/// Which processes a command is about. Several conditions are never given at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    pub pids: Vec<i32>,
    pub unit: Option<String>,
    pub cgroup: Option<String>,
    pub vm: Option<String>,
    pub all: bool,
}

impl Selector {
    /// The processes, by pid, without kernel threads; at least one, but for `all`.
    pub fn select(&self, host: &Host) -> Result<Vec<Process>, Failure> {
        if let Some(unit) = &self.unit {
            let found = filtered(host, |p| p.in_unit(unit))?;
            some(found, || format!("unit {unit} has no processes"))
        } else if let Some(cgroup) = &self.cgroup {
            let path = cgroup_path(cgroup);
            if !host.exists(format!("/sys/fs/cgroup{path}")) {
                return Err(Failure::failed(format!("no cgroup {path}")));
            }
            let found = filtered(host, |p| p.in_cgroup(&path))?;
            some(found, || format!("cgroup {path} has no processes"))
        } else if let Some(vm) = &self.vm {
            let found = filtered(host, |p| p.vm.as_ref() == Some(vm))?;
            some(found, || format!("no VM named {vm}"))
        } else if self.all {
            list(host)
        } else {
            let mut pids = self.pids.clone();
            pids.sort_unstable();
            pids.dedup();
            pids.iter()
                .map(|pid| {
                    read(host, *pid)?.ok_or_else(|| Failure::failed(format!("no process {pid}")))
                })
                .collect()
        }
    }
}

fn filtered(host: &Host, wanted: impl Fn(&Process) -> bool) -> Result<Vec<Process>, Failure> {
    Ok(list(host)?.into_iter().filter(wanted).collect())
}

fn some(found: Vec<Process>, none: impl FnOnce() -> String) -> Result<Vec<Process>, Failure> {
    if found.is_empty() {
        Err(Failure::failed(none()))
    } else {
        Ok(found)
    }
}

impl Process {
    /// Whether a unit of this name, a slice for instance, is on its cgroup's path. A name without
    /// a suffix is a service's, as for systemctl.
    pub fn in_unit(&self, unit: &str) -> bool {
        let service = format!("{unit}.service");
        let wanted = if SUFFIXES.iter().any(|s| unit.ends_with(s)) {
            unit
        } else {
            &service
        };
        let path = self.cgroup.as_deref().unwrap_or("/");
        path.split('/').any(|part| unescaped(part) == wanted)
    }

    /// Whether it is in the cgroup with this path, or in one below it.
    pub fn in_cgroup(&self, path: &str) -> bool {
        let Some(own) = &self.cgroup else {
            return false;
        };
        match own.strip_prefix(path.trim_end_matches('/')) {
            Some(rest) => rest.is_empty() || rest.starts_with('/'),
            None => false,
        }
    }

    /// What to call it in a line: the VM, or the command.
    pub fn title(&self) -> &str {
        self.vm.as_deref().unwrap_or(&self.comm)
    }
}

/// "/machine.slice" of that, of "machine.slice" and of "/sys/fs/cgroup/machine.slice/".
pub fn cgroup_path(text: &str) -> String {
    let path = text.strip_prefix("/sys/fs/cgroup").unwrap_or(text);
    format!("/{}", path.trim_matches('/'))
}

/// All processes that have memory of their own, by pid.
pub fn list(host: &Host) -> Result<Vec<Process>, Failure> {
    let mut pids: Vec<i32> = host
        .list("/proc")?
        .iter()
        .filter_map(|name| name.parse().ok())
        .collect();
    pids.sort_unstable();
    let mut all = Vec::new();
    for pid in pids {
        all.extend(read(host, pid)?);
    }
    Ok(all)
}

/// One process; nothing where there is none, or only a kernel thread or a zombie.
pub fn read(host: &Host, pid: i32) -> Result<Option<Process>, Failure> {
    let Some(status) = host.read_if_there(format!("/proc/{pid}/status"))? else {
        return Ok(None);
    };
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
    };
    // Without an mm the file has no such lines.
    let Some(rss_bytes) = field("VmRSS").and_then(kibibytes) else {
        return Ok(None);
    };
    // The thread group's: in a namespace's /proc a thread's id has a directory, too.
    if field("Tgid").is_some_and(|tgid| tgid != pid.to_string()) {
        return Ok(None);
    }
    let text = |name: &str| host.read_if_there(format!("/proc/{pid}/{name}"));
    let cmdline: Vec<String> = text("cmdline")?
        .unwrap_or_default()
        .split_terminator('\0')
        .map(str::to_string)
        .collect();
    let cgroup = text("cgroup")?.and_then(|lines| {
        lines
            .lines()
            .find_map(|line| line.strip_prefix("0::"))
            .map(str::to_string)
    });
    Ok(Some(Process {
        pid,
        comm: text("comm")?
            .or_else(|| field("Name").map(str::to_string))
            .unwrap_or_default(),
        uid: field("Uid")
            .and_then(|ids| ids.split_whitespace().nth(1)?.parse().ok())
            .unwrap_or(0),
        unit: cgroup.as_deref().and_then(unit_of),
        vm: vm_of(&cmdline),
        cgroup,
        cmdline,
        rss_bytes,
        anon_bytes: field("RssAnon").and_then(kibibytes).unwrap_or(0),
        ksm: ksm_stat(&text("ksm_stat")?.unwrap_or_default()),
    }))
}

/// Bytes of "1234 kB".
fn kibibytes(text: &str) -> Option<u64> {
    text.strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

fn ksm_stat(text: &str) -> KsmStat {
    let mut stat = KsmStat::default();
    for line in text.lines() {
        let Some((name, value)) = line.split_once(' ') else {
            continue;
        };
        let value = value.trim();
        let yes = || match value {
            "yes" => Some(true),
            "no" => Some(false),
            _ => None,
        };
        match name.trim_end_matches(':') {
            "ksm_rmap_items" => stat.rmap_items = value.parse().ok(),
            "ksm_zero_pages" => stat.zero_pages = value.parse().ok(),
            "ksm_merging_pages" => stat.merging_pages = value.parse().ok(),
            "ksm_process_profit" => stat.process_profit = value.parse().ok(),
            "ksm_merge_any" => stat.merge_any = yes(),
            "ksm_mergeable" => stat.mergeable = yes(),
            _ => {}
        }
    }
    stat
}

const SUFFIXES: [&str; 6] = [".service", ".scope", ".slice", ".socket", ".mount", ".swap"];

/// systemd puts a "_" before names that the kernel could take for its own files.
fn unescaped(part: &str) -> &str {
    part.strip_prefix('_').unwrap_or(part)
}

/// The unit of a path, as systemd finds it: the first that is no slice; of a user's manager, the
/// user's own unit.
fn unit_of(path: &str) -> Option<String> {
    let mut units = path
        .split('/')
        .map(unescaped)
        .filter(|part| SUFFIXES.iter().any(|s| part.ends_with(s)) && !part.ends_with(".slice"));
    let first = units.next()?;
    let unit = if first.starts_with("user@") {
        units.next().unwrap_or(first)
    } else {
        first
    };
    Some(unit.to_string())
}

/// The name of the VM, of the command line of QEMU (libvirt, Proxmox), cloud-hypervisor or
/// Firecracker.
fn vm_of(cmdline: &[String]) -> Option<String> {
    let program = cmdline.first()?.rsplit('/').next()?;
    let option = |name: &str| {
        cmdline.iter().enumerate().find_map(|(i, arg)| {
            let rest = arg.strip_prefix(name)?;
            if rest.is_empty() {
                cmdline.get(i + 1).map(String::as_str)
            } else {
                rest.strip_prefix('=')
            }
        })
    };
    let name = if program.starts_with("qemu-system") || matches!(program, "kvm" | "qemu-kvm") {
        let value = option("-name").or_else(|| option("--name"))?;
        value
            .split(',')
            .find_map(|part| part.strip_prefix("guest="))
            .or_else(|| value.split(',').next().filter(|part| !part.contains('=')))?
    } else if program.starts_with("cloud-hypervisor") {
        // It has no name but that of its socket.
        let value = option("--api-socket")?;
        let path = value
            .split(',')
            .find_map(|part| part.strip_prefix("path="))
            .unwrap_or(value);
        let file = path.rsplit('/').next()?;
        file.split('.').next()?
    } else if program.starts_with("firecracker") {
        option("--id")?
    } else {
        return None;
    };
    (!name.is_empty()).then(|| name.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    fn vm(line: &str) -> Option<String> {
        let words: Vec<String> = line.split(' ').map(str::to_string).collect();
        vm_of(&words)
    }

    #[test]
    fn vm_names() {
        for (line, name) in [
            (
                "/usr/bin/qemu-system-x86_64 -name guest=web,debug-threads=on",
                Some("web"),
            ),
            (
                "/usr/bin/kvm -id 100 -name clone1,debug-threads=on",
                Some("clone1"),
            ),
            ("qemu-system-x86_64 -name debug-threads=on", None),
            ("qemu-system-x86_64 -m 1G", None),
            ("cloud-hypervisor --api-socket /run/ch/db.sock", Some("db")),
            (
                "cloud-hypervisor --api-socket=path=/run/ch/db.sock",
                Some("db"),
            ),
            ("firecracker --id fc1 --api-sock /x", Some("fc1")),
            ("bash -name guest=x", None),
        ] {
            assert_eq!(vm(line).as_deref(), name, "{line}");
        }
    }

    #[test]
    fn units() {
        for (path, unit) in [
            ("/", None),
            ("/init.scope", Some("init.scope")),
            ("/system.slice/ssh.service", Some("ssh.service")),
            ("/qemu.slice/100.scope", Some("100.scope")),
            (
                "/machine.slice/machine-a.scope/payload/ssh.service",
                Some("machine-a.scope"),
            ),
            (
                "/user.slice/user-1.slice/user@1.service/app.slice/x.service",
                Some("x.service"),
            ),
            ("/docker/abc", None),
        ] {
            assert_eq!(unit_of(path).as_deref(), unit, "{path}");
        }
    }

    #[test]
    fn selectors() {
        let fixture = Fixture::new();
        fixture.builtin();
        fixture.processes();
        let host = Host::new(fixture.root());
        let pids = |s: Selector| -> Result<Vec<i32>, String> {
            s.select(&host)
                .map(|found| found.iter().map(|p| p.pid).collect())
                .map_err(|f| f.message)
        };
        let unit = |u: &str| Selector {
            unit: Some(u.into()),
            ..Selector::default()
        };
        let cgroup = |c: &str| Selector {
            cgroup: Some(c.into()),
            ..Selector::default()
        };
        let vm = |v: &str| Selector {
            vm: Some(v.into()),
            ..Selector::default()
        };
        let by_pid = |pids: &[i32]| Selector {
            pids: pids.into(),
            ..Selector::default()
        };
        let all = Selector {
            all: true,
            ..Selector::default()
        };
        assert_eq!(pids(all), Ok(vec![1, 800, 4211, 4212]));
        assert_eq!(pids(by_pid(&[4211, 1, 1])), Ok(vec![1, 4211]));
        assert_eq!(pids(by_pid(&[1, 9])), Err("no process 9".into()));
        assert_eq!(pids(unit("qemu.slice")), Ok(vec![4211, 4212]));
        assert_eq!(pids(unit("ssh")), Ok(vec![800]));
        assert_eq!(pids(unit("x")), Err("unit x has no processes".into()));
        assert_eq!(pids(cgroup("qemu.slice/100.scope")), Ok(vec![4211]));
        assert_eq!(
            pids(cgroup("/sys/fs/cgroup/qemu.slice/")),
            Ok(vec![4211, 4212])
        );
        assert_eq!(pids(cgroup("/qemu")), Err("no cgroup /qemu".into()));
        assert_eq!(pids(vm("clone2")), Ok(vec![4212]));
        assert_eq!(pids(vm("x")), Err("no VM named x".into()));
    }

    #[test]
    fn facts() {
        let fixture = Fixture::new();
        fixture.processes();
        let process = read(&Host::new(fixture.root()), 4211).unwrap().unwrap();
        assert_eq!(process.title(), "clone1");
        assert_eq!(process.uid, 64055);
        assert_eq!(process.rss_bytes, 4096 << 20);
        assert_eq!(process.anon_bytes, 4000 << 20);
        assert_eq!(process.ksm.merging_pages, Some(2000));
        assert_eq!(process.ksm.process_profit, Some(8_126_464));
        assert_eq!(process.ksm.merge_any, Some(true));
        assert_eq!(process.unit.as_deref(), Some("100.scope"));
    }
}
