// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl export`.

mod common;

use common::{golden, rksmctl, Fixture};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn machine(rksm: bool) -> Fixture {
    let fixture = Fixture::new();
    if rksm {
        fixture.rksm();
    } else {
        fixture.builtin();
    }
    fixture.processes();
    fixture.file("/proc/vmstat", "nr_free_pages 1\ncow_ksm 77\n");
    fixture
}

/// What a family is: its type, its unit, and its samples as name, labels and value.
#[derive(Debug, Default)]
struct Family {
    kind: String,
    unit: String,
    help: String,
    samples: Vec<(String, BTreeMap<String, String>, f64)>,
}

fn is_name(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with(|c: char| c.is_ascii_digit())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Labels of `a="b",c="d"}`, and what follows.
fn labels(mut text: &str) -> (BTreeMap<String, String>, &str) {
    let mut labels = BTreeMap::new();
    loop {
        let (name, rest) = text.split_once("=\"").expect("a label");
        assert!(is_name(name), "{name}");
        let mut value = String::new();
        let mut chars = rest.char_indices();
        let end = loop {
            match chars.next().expect("the end of a label's value") {
                (_, '\\') => match chars.next() {
                    Some((_, 'n')) => value.push('\n'),
                    Some((_, c @ ('"' | '\\'))) => value.push(c),
                    other => panic!("bad escape {other:?}"),
                },
                (i, '"') => break i,
                (_, c) => value.push(c),
            }
        };
        assert_eq!(
            labels.insert(name.into(), value),
            None,
            "{name} is there twice"
        );
        let rest = &rest[end + 1..];
        match rest.strip_prefix(',') {
            Some(more) => text = more,
            None => return (labels, rest.strip_prefix('}').expect("a brace")),
        }
    }
}

/// Reads OpenMetrics, and panics at whatever the standard does not allow.
fn parse(text: &str) -> BTreeMap<String, Family> {
    let body = text.strip_suffix("# EOF\n").expect("# EOF at the end");
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut current = String::new();
    for line in body.lines() {
        if let Some(rest) = line.strip_prefix("# ") {
            let mut words = rest.splitn(3, ' ');
            let (what, name, text) = (
                words.next().unwrap(),
                words.next().unwrap(),
                words.next().unwrap(),
            );
            assert!(is_name(name), "{line}");
            if name != current {
                assert!(!families.contains_key(name), "{name} is not in one piece");
                current = name.into();
            }
            let family = families.entry(name.into()).or_default();
            assert!(family.samples.is_empty(), "{line} after its samples");
            let place = match what {
                "TYPE" => &mut family.kind,
                "UNIT" => &mut family.unit,
                "HELP" => &mut family.help,
                _ => panic!("{line}"),
            };
            assert!(place.is_empty() && !text.is_empty(), "{line}");
            *place = text.into();
        } else {
            let end = line.find(['{', ' ']).expect("a value");
            let (name, rest) = line.split_at(end);
            let (labels, rest) = match rest.strip_prefix('{') {
                Some(rest) => labels(rest),
                None => (BTreeMap::new(), rest),
            };
            let value: f64 = rest.strip_prefix(' ').unwrap().parse().expect(line);
            let family = families.get_mut(&current).expect(line);
            let expected = match family.kind.as_str() {
                "counter" => {
                    assert!(value >= 0.0, "{line}");
                    format!("{current}_total")
                }
                "gauge" => current.clone(),
                other => panic!("type {other}"),
            };
            assert_eq!(name, expected);
            assert!(
                !family.samples.iter().any(|(_, other, _)| *other == labels),
                "{line} is there twice"
            );
            family.samples.push((name.into(), labels, value));
        }
    }
    for (name, family) in &families {
        assert!(!family.samples.is_empty(), "{name} has no samples");
        assert!(!family.help.is_empty(), "{name} has no help");
        if !family.unit.is_empty() {
            assert!(name.ends_with(&format!("_{}", family.unit)), "{name}");
        }
        assert!(!name.ends_with("_total"), "{name}");
    }
    families
}

fn exported(fixture: &Fixture) -> BTreeMap<String, Family> {
    let output = rksmctl(fixture, "export");
    assert!(output.status.success(), "{output:?}");
    parse(&String::from_utf8(output.stdout).unwrap())
}

#[test]
fn both_kinds() {
    golden("export-builtin", &machine(false), "export");
    golden("export-rksm", &machine(true), "export");
    golden(
        "export-prometheus",
        &machine(true),
        "export --format prometheus",
    );
    golden("export-json", &machine(true), "export --json");
    golden("export-none", &Fixture::new(), "export");
}

#[test]
fn values() {
    let families = exported(&machine(true));
    let value = |name: &str| families[name].samples[0].2;
    assert_eq!(value("ksm_saved_bytes"), 3096.0 * 4096.0);
    assert_eq!(value("ksm_profit_bytes"), 12e6);
    assert_eq!(value("ksm_cpu_seconds"), 5.6);
    assert_eq!(value("ksm_pages_broken"), 77.0);
    assert_eq!(value("rksm_longest_hold_seconds"), 0.0039);
    assert_eq!(value("rksm_cpu_limit_ratio"), 0.05);
    assert_eq!(value("rksm_pressure_cpu_limit_ratio"), 0.1);
    assert_eq!(value("rksm_memory_pressure"), 0.0);
    let refused = &families["rksm_refused"].samples;
    let pinned = refused.iter().find(|(_, l, _)| l["reason"] == "pinned");
    assert_eq!(pinned.unwrap().2, 113.0);
    let units: Vec<_> = families["ksm_unit_merged_bytes"]
        .samples
        .iter()
        .map(|(_, labels, value)| (labels["unit"].as_str(), *value))
        .collect();
    assert_eq!(units, [("100.scope", 8192e3), ("101.scope", 8192e3)]);
    assert!(exported(&machine(false))
        .keys()
        .all(|name| !name.starts_with("rksm")));
}

#[test]
fn names_of_units_are_escaped() {
    let fixture = machine(false);
    let unit = "a\\x2d\"b\".service";
    fixture.process(&common::fixture::Proc {
        pid: 5,
        cgroup: &format!("/system.slice/{unit}"),
        merging_pages: 1,
        ..Default::default()
    });
    let families = exported(&fixture);
    let samples = &families["ksm_unit_merged_bytes"].samples;
    assert!(samples
        .iter()
        .any(|(_, l, v)| l["unit"] == unit && *v == 4096.0));
}

/// Kernels before 6.x lack some.
#[test]
fn what_is_not_there_is_left_out() {
    let fixture = machine(false);
    fixture.remove("/sys/kernel/mm/ksm/general_profit");
    fixture.remove("/proc/vmstat");
    for pid in [1, 800, 4211, 4212] {
        fixture.remove(&format!("/proc/{pid}/ksm_stat"));
    }
    let families = exported(&fixture);
    for name in [
        "ksm_profit_bytes",
        "ksm_pages_broken",
        "ksm_unit_merged_bytes",
    ] {
        assert!(!families.contains_key(name), "{name}");
    }
}

/// Documentation/operating/metrics.md has all of them, and no others.
#[test]
fn documented() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../Documentation/operating/metrics.md"
    );
    let text = std::fs::read_to_string(path).unwrap();
    // name -> (type, unit, labels)
    let mut rows = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let plain = |i: usize| cells[i].replace('`', "");
        assert!(!cells[5].is_empty(), "{line}");
        let old = rows.insert(plain(1), (plain(2), plain(3), plain(4)));
        assert_eq!(old, None, "{line}");
    }
    let mut seen = BTreeMap::new();
    for rksm in [false, true] {
        let names: BTreeSet<_> = exported(&machine(rksm))
            .into_values()
            .map(|family| {
                let (name, labels, _) = &family.samples[0];
                let labels: Vec<&str> = labels.keys().map(String::as_str).collect();
                let facts = (family.kind.clone(), family.unit, labels.join(", "));
                seen.insert(name.clone(), facts);
                name.clone()
            })
            .collect();
        let expected: BTreeSet<_> = rows
            .keys()
            .filter(|name| rksm || !name.starts_with("rksm_"))
            .cloned()
            .collect();
        assert_eq!(names, expected);
    }
    assert_eq!(seen, rows);
}

#[test]
fn to_a_file() {
    let fixture = machine(true);
    let file = fixture.root().join("ksm.prom");
    std::fs::write(&file, "old").unwrap();
    let line = format!("export -o {}", file.display());
    let output = rksmctl(&fixture, &line);
    assert!(
        output.status.success() && output.stdout.is_empty(),
        "{output:?}"
    );
    let text = std::fs::read_to_string(&file).unwrap();
    assert_eq!(text.as_bytes(), rksmctl(&fixture, "export").stdout);
    let left = std::fs::read_dir(fixture.root()).unwrap();
    let left: BTreeSet<_> = left.map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["ksm.prom", "proc", "sys"].map(Into::into).into());
    // What cannot be read leaves the file as it was.
    fixture.remove("/sys/kernel/mm/ksm/run");
    assert_eq!(rksmctl(&fixture, &line).status.code(), Some(1));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
    golden(
        "export-no-directory",
        &machine(true),
        "export -o /none/ksm.prom",
    );
}

#[test]
fn usage() {
    let fixture = machine(true);
    golden("export-not-loopback", &fixture, "export --listen 0.0.0.0:0");
    for bad in [
        "export --listen [::]:0",
        "export --listen 192.0.2.1:9100",
        "export --listen 9100",
        "export --listen 127.0.0.1:0 -o f",
        "export --listen 127.0.0.1:0 --json",
    ] {
        assert_eq!(rksmctl(&fixture, bad).status.code(), Some(2), "{bad}");
    }
}

struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn new(fixture: &Fixture, address: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_rksmctl"))
            .arg("--root")
            .arg(fixture.root())
            .args(["export", "--listen", address])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        stderr.read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("rksmctl: http://").expect(&line);
        let address = address.strip_suffix("/metrics").unwrap().into();
        Self { child, address }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        let time = Some(Duration::from_secs(20));
        stream.set_read_timeout(time).unwrap();
        stream
    }

    /// The response to that, its head and its body.
    fn ask(&self, request: &str) -> (String, String) {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").expect(&text);
        (head.into(), body.into())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const GET: &str = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n";

#[test]
fn served() {
    let fixture = machine(true);
    let mut server = Server::new(&fixture, "127.0.0.1:0");
    let expected = String::from_utf8(rksmctl(&fixture, "export").stdout).unwrap();
    for _ in 0..5 {
        let (head, body) = server.ask(&format!("{GET}\r\n"));
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        let kind = "Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8";
        assert!(head.contains(kind), "{head}");
        assert!(
            head.contains(&format!("Content-Length: {}\r\n", body.len())),
            "{head}"
        );
        assert_eq!(body, expected);
        parse(&body);
    }
    let (head, body) = server.ask(&format!("{GET}Accept: text/plain;version=0.0.4\r\n\r\n"));
    assert!(
        head.contains("Content-Type: text/plain; version=0.0.4"),
        "{head}"
    );
    assert!(!body.contains("# EOF") && body.contains("# TYPE ksm_cpu_seconds_total counter\n"));
    for (request, status) in [
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "404 Not Found"),
        (
            "PUT /metrics HTTP/1.1\r\nHost: x\r\n\r\nbody",
            "405 Method Not Allowed",
        ),
        ("\u{16}\u{3}\u{1}\r\n\r\n", "400 Bad Request"),
    ] {
        let (head, _) = server.ask(request);
        assert!(
            head.starts_with(&format!("HTTP/1.1 {status}\r\n")),
            "{head}"
        );
    }
    let long = format!("{GET}X: {}\r\n\r\n", "x".repeat(20_000));
    let (head, _) = server.ask(&long);
    assert!(head.starts_with("HTTP/1.1 431 "), "{head}");
    // The values are those of the moment; and what cannot be read is said.
    fixture.file("/sys/kernel/mm/ksm/full_scans", "8\n");
    assert!(server
        .ask(&format!("{GET}\r\n"))
        .1
        .contains("ksm_full_scans_total 8\n"));
    fixture.remove("/sys/kernel/mm/ksm/full_scans");
    let (head, body) = server.ask(&format!("{GET}\r\n"));
    assert!(
        head.starts_with("HTTP/1.1 503 ") && body.contains("full_scans"),
        "{head}"
    );

    kill(
        Pid::from_raw(server.child.id().try_into().unwrap()),
        Signal::SIGTERM,
    )
    .unwrap();
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
}

/// Clients that say nothing, or go away, or speak a byte at a time, do not keep others waiting.
#[test]
fn bad_clients() {
    let fixture = machine(false);
    let server = Server::new(&fixture, "[::1]:0");
    let began = Instant::now();
    let silent = server.connect();
    drop(server.connect());
    let mut gone = server.connect();
    gone.write_all(format!("{GET}\r\n").as_bytes()).unwrap();
    drop(gone);
    let mut slow = server.connect();
    let mut writer = slow.try_clone().unwrap();
    let drip = std::thread::spawn(move || {
        for byte in format!("{GET}X: {}", "x".repeat(100)).bytes() {
            if writer.write_all(&[byte]).is_err() {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    let mut text = String::new();
    let _ = slow.read_to_string(&mut text);
    assert!(text.starts_with("HTTP/1.1 408 "), "{text}");
    let (head, _) = server.ask(&format!("{GET}\r\n"));
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(
        began.elapsed() < Duration::from_secs(15),
        "{:?}",
        began.elapsed()
    );
    drop(silent);
    drip.join().unwrap();
}

#[test]
fn a_port_that_is_taken() {
    let fixture = machine(false);
    let server = Server::new(&fixture, "127.0.0.1:0");
    let output = rksmctl(&fixture, &format!("export --listen {}", server.address));
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.ends_with(": Address already in use\n"), "{text}");
}
