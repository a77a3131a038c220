// SPDX-License-Identifier: GPL-2.0-only
//! What systemd knows of a unit, and its drop-in.

use crate::exit::{Doing, Failure};
use crate::host::Host;
use crate::process::{self, cgroup_path};
use crate::rule_files::write_file;
use std::process::Command;

const SUFFIXES: [&str; 6] = [".service", ".scope", ".slice", ".socket", ".mount", ".swap"];
/// The first that has MemoryKSM=.
const FIRST: u32 = 254;

/// A unit and where its processes are, or will be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    pub name: String,
    pub cgroup: String,
}

impl Unit {
    /// Finds a unit by its name, which may lack ".service". `gone` is whether one that systemd
    /// does not know will do.
    pub fn find(host: &Host, name: &str, gone: bool) -> Result<Self, Failure> {
        let name = full_name(name)?;
        let query = ["show", "-p", "ControlGroup,Slice,LoadState", "--", &name];
        let answer = systemctl(host, &query);
        let mut cgroup = answer.as_ref().and_then(|text| shown(text, &name));
        if cgroup.is_none() {
            // Of another manager, as a user's, or of a machine where systemd does not answer.
            cgroup = process::list(host)?
                .iter()
                .find_map(|p| path_to(p.cgroup.as_deref()?, &name));
        }
        match cgroup {
            None if answer.is_some() && !gone => {
                Err(Failure::failed(format!("systemd knows no unit {name}")))
            }
            cgroup => Ok(Self {
                cgroup: cgroup.unwrap_or_else(|| usual_path(&name)),
                name,
            }),
        }
    }

    /// Whether a drop-in can say it.
    pub fn is_service(&self) -> bool {
        self.name.ends_with(".service")
    }

    /// The file by which systemd itself opens the unit's memory to merging when it starts.
    pub fn drop_in(&self) -> String {
        format!("/etc/systemd/system/{}.d/50-rksm.conf", self.name)
    }

    /// Writes the drop-in.
    pub fn write_drop_in(&self, host: &Host) -> Result<(), Failure> {
        let text = "# Written by rksmctl enable --unit.\n[Service]\nMemoryKSM=yes\n";
        write_file(host, &self.drop_in(), text)
    }

    /// Removes the drop-in. False where there was none.
    pub fn remove_drop_in(&self, host: &Host) -> Result<bool, Failure> {
        let file = self.drop_in();
        match std::fs::remove_file(host.path(&file)) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e).doing(format!("cannot remove {file}")),
        }
        // Stays where others have drop-ins there.
        if let Some(dir) = host.path(&file).parent() {
            let _ = std::fs::remove_dir(dir);
        }
        Ok(true)
    }
}

/// The part of a cgroup's path that ends with this unit.
fn path_to(cgroup: &str, unit: &str) -> Option<String> {
    let parts: Vec<&str> = cgroup.split('/').collect();
    // systemd puts a "_" before names that the kernel could take for its own files.
    let is_unit = |part: &&str| part.strip_prefix('_').unwrap_or(part) == unit;
    let at = parts.iter().position(is_unit)?;
    Some(parts.get(..=at)?.join("/"))
}

/// Whether this machine was booted with systemd, as sd_booted(3) finds it.
pub fn has_systemd(host: &Host) -> bool {
    host.exists("/run/systemd/system")
}

/// Why systemd would not take a drop-in.
pub fn too_old(host: &Host) -> Option<String> {
    if !has_systemd(host) {
        return Some("no systemd runs here, so no drop-in was written".into());
    }
    let version = parse_version(&systemctl(host, &["--version"])?)?;
    (version < FIRST).then(|| {
        format!("systemd {version} has no MemoryKSM= ({FIRST} has), so no drop-in was written")
    })
}

/// Has systemd read its files again. False where that was not possible.
pub fn reload(host: &Host) -> bool {
    systemctl(host, &["daemon-reload"]).is_some()
}

/// What systemctl prints; nothing where it fails or is not there, or the files are a test's.
fn systemctl(host: &Host, arguments: &[&str]) -> Option<String> {
    if !host.is_real() {
        return None;
    }
    let output = Command::new("systemctl").args(arguments).output().ok()?;
    let ok = output.status.success();
    ok.then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// "systemd 257 (257.5-2)"
fn parse_version(text: &str) -> Option<u32> {
    let word = text.split_whitespace().nth(1)?;
    word.split(|c: char| !c.is_ascii_digit())
        .next()?
        .parse()
        .ok()
}

/// The path that `systemctl show` tells; nothing for a unit that systemd does not know.
fn shown(text: &str, name: &str) -> Option<String> {
    let property = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .filter(|value| !value.is_empty())
    };
    if let Some(path) = property("ControlGroup") {
        return Some(cgroup_path(path));
    }
    if property("LoadState") == Some("not-found") {
        return None;
    }
    Some(match property("Slice") {
        Some(slice) if !name.ends_with(".slice") => below(&slice_path(slice), name),
        _ => usual_path(name),
    })
}

fn below(slice: &str, name: &str) -> String {
    format!("{}/{name}", slice.trim_end_matches('/'))
}

/// With a suffix, and safe as the name of a file.
fn full_name(name: &str) -> Result<String, Failure> {
    if name.is_empty()
        || name.starts_with(['-', '.'])
        || name.contains(['/', '*', '?', '[', '\0', '\n'])
    {
        return Err(Failure::usage(format!("'{name}' is no name of a unit")));
    }
    if SUFFIXES.iter().any(|s| name.ends_with(s)) {
        Ok(name.into())
    } else {
        Ok(format!("{name}.service"))
    }
}

/// "/a.slice/a-b.slice" of "a-b.slice".
fn slice_path(slice: &str) -> String {
    let stem = slice.trim_end_matches(".slice");
    if stem == "-" {
        return "/".into();
    }
    let mut path = String::new();
    for end in stem
        .match_indices('-')
        .map(|(at, _)| at)
        .chain([stem.len()])
    {
        if let Some(part) = stem.get(..end) {
            path = format!("{path}/{part}.slice");
        }
    }
    path
}

/// Where a unit is that says nothing else.
fn usual_path(name: &str) -> String {
    if name.ends_with(".slice") {
        return slice_path(name);
    }
    match name.split_once('@') {
        // Instances have a slice of their own; in its name a dash would be a level.
        Some((prefix, _)) if name.ends_with(".service") => {
            let slice = format!("system-{}.slice", prefix.replace('-', "\\x2d"));
            below(&slice_path(&slice), name)
        }
        _ => below("/system.slice", name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    #[test]
    fn usual() {
        for (name, path) in [
            ("a.service", "/system.slice/a.service"),
            ("a-b.slice", "/a.slice/a-b.slice"),
            ("-.slice", "/"),
            (
                "g-a@1.service",
                "/system.slice/system-g\\x2da.slice/g-a@1.service",
            ),
        ] {
            assert_eq!(usual_path(name), path);
        }
    }

    #[test]
    fn systemd_says() {
        let show = |text: &str, name: &str| shown(text, name);
        assert_eq!(
            show(
                "Slice=system.slice\nControlGroup=/x.slice/a.service\nLoadState=loaded\n",
                "a.service"
            ),
            Some("/x.slice/a.service".into())
        );
        assert_eq!(
            show(
                "Slice=x-y.slice\nControlGroup=\nLoadState=loaded\n",
                "a.service"
            ),
            Some("/x.slice/x-y.slice/a.service".into())
        );
        assert_eq!(
            show("Slice=\nControlGroup=\nLoadState=loaded\n", "x-y.slice"),
            Some("/x.slice/x-y.slice".into())
        );
        assert_eq!(
            show("Slice=\nControlGroup=\nLoadState=not-found\n", "no.service"),
            None
        );
        assert_eq!(parse_version("systemd 257 (257.5-2)\n+PAM"), Some(257));
        assert_eq!(parse_version("systemd 256~rc3"), Some(256));
    }

    #[test]
    fn found() {
        let fixture = Fixture::new();
        fixture.processes();
        let host = Host::new(fixture.root());
        let find = |name: &str| Unit::find(&host, name, false).map(|u| (u.name, u.cgroup));
        let pair = |a: &str, b: &str| Ok((a.to_string(), b.to_string()));
        assert_eq!(
            find("ssh"),
            pair("ssh.service", "/system.slice/ssh.service")
        );
        assert_eq!(find("qemu.slice"), pair("qemu.slice", "/qemu.slice"));
        assert_eq!(
            find("100.scope"),
            pair("100.scope", "/qemu.slice/100.scope")
        );
        assert_eq!(find("x"), pair("x.service", "/system.slice/x.service"));
        for bad in ["", "../x", "-x", "..", "a*"] {
            assert_eq!(find(bad).unwrap_err().status, 2);
        }
    }

    #[test]
    fn drop_ins() {
        let fixture = Fixture::new();
        let host = Host::new(fixture.root());
        assert!(too_old(&host).is_some());
        let unit = Unit::find(&host, "a", false).unwrap();
        assert_eq!(unit.remove_drop_in(&host), Ok(false));
        unit.write_drop_in(&host).unwrap();
        assert!(host
            .read(unit.drop_in())
            .unwrap()
            .ends_with("\nMemoryKSM=yes"));
        assert_eq!(unit.remove_drop_in(&host), Ok(true));
        assert!(!host.exists("/etc/systemd/system/a.service.d"));
    }
}
