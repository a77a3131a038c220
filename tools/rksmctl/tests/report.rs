// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl report`.

mod common;

use common::{golden, rksmctl, Fixture};
use serde_json::{json, Value};
use std::fs;
use std::path::Path;

/// A recording as version 1 has it, of one minute in which two guests are merged.
fn recording(rksm: bool) -> String {
    let header = json!({
        "format": "rksmctl-recording", "version": 1, "rksmctl": "0.5.0",
        "backend": if rksm { "rksm" } else { "built-in KSM" },
        "backend_version": if rksm { "0.4.0" } else { "7.3.4+deb13-amd64" },
        "kernel": "7.3.4+deb13-amd64", "interval_seconds": 2.0,
        "started_seconds": 1_769_860_800.25, "page_bytes": 4096, "memory_bytes": 1u64 << 34,
        "command": if rksm { vec!["sh", "-c", "a <b> \"&\""] } else { vec![] },
    });
    // serde_json sorts the fields, and the format comes first.
    let mut text = header.to_string();
    assert!(text.contains("\"format\":\"rksmctl-recording\""));
    text.push('\n');
    for i in 0..=30u64 {
        let merged = 1000 * i * (60 - i) / 4;
        let unit = |pages: u64| {
            json!({"processes": 1, "anon_bytes": 4000u64 << 20, "merging_pages": pages,
                   "zero_pages": 0, "mergeable": true})
        };
        let mut sample = json!({
            "seconds": (i * 2) as f64, "backend": header["backend"],
            "counters": {
                "pages_shared": merged / 4, "pages_sharing": merged, "pages_unshared": 90_000 - i,
                "pages_volatile": 900 - i * 20, "full_scans": i / 10, "stable_node_chains": 0,
                "stable_node_dups": 0, "pages_scanned": i * 100_000, "pages_skipped": i,
                "ksm_zero_pages": 10, "general_profit": merged as i64 * 4096 - 5_000_000,
            },
            "knobs": {
                "run": 1, "pages_to_scan": if i < 15 { 100 } else { 1000 }, "sleep_millisecs": 20,
                "max_page_sharing": 256, "merge_across_nodes": true, "use_zero_pages": false,
                "smart_scan": true, "advisor_mode": "none",
            },
            "own": null, "cpu_seconds": i as f64 * 0.08,
            "available_bytes": (10u64 << 30) + merged * 4096,
            "broken_pages": if rksm { json!(i * i) } else { Value::Null },
            "units": {"100.scope": unit(merged / 2), "101.scope": unit(merged / 2 + merged / 4),
                      "ssh<&>.service": {"processes": 1, "anon_bytes": 4096, "merging_pages": 0,
                                         "zero_pages": 0, "mergeable": false}},
        });
        if rksm {
            sample["own"] = json!({"refused": {"pinned": i, "gone": 1}, "metadata_bytes": 1 << 20});
        }
        text += &sample.to_string();
        text.push('\n');
    }
    text
}

/// Compares the page with a golden one, as [`golden`] does.
#[track_caller]
fn golden_page(name: &str, page: &Path) -> String {
    let text = fs::read_to_string(page).unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.html"));
    if std::env::var("RKSM_GOLDEN").is_ok_and(|v| v == "write") {
        fs::write(&path, &text).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert!(text == expected, "not as {}", path.display());
    text
}

/// Runs it in the fixture's directory, so that nothing that is printed has its name.
fn report(fixture: &Fixture, arguments: &[&str]) -> (i32, String, String) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_rksmctl"))
        .arg("report")
        .args(arguments)
        .current_dir(fixture.root())
        .output()
        .unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn pages() {
    for (name, rksm) in [("report-builtin", false), ("report-rksm", true)] {
        let fixture = Fixture::new();
        fixture.file("/f", recording(rksm));
        let (code, stdout, stderr) = report(&fixture, &["f"]);
        assert_eq!((code, stderr.as_str()), (0, ""));
        assert_eq!(
            stdout,
            "f.html: 31 records in 60.0 s, 879 MiB saved at the end\n"
        );
        let page = golden_page(name, &fixture.root().join("f.html"));
        for outside in ["http", "src=", "href", "<script", "url(", "@import"] {
            assert!(!page.contains(outside), "{outside}");
        }
        for label in ["MiB<", "% of one CPU<", "time, s<"] {
            let label = label.trim_end_matches('<');
            assert!(page.contains(label), "{label}");
        }
        assert_eq!(page.matches("<svg").count(), if rksm { 6 } else { 5 });
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert!(page.contains("ssh&lt;&amp;&gt;.service") && !page.contains("ssh<"));
    }
}

#[test]
fn facts() {
    let fixture = Fixture::new();
    fixture.file("/f", recording(true));
    let (code, stdout, _) = report(&fixture, &["f", "-o", "g", "--json"]);
    assert_eq!(code, 0);
    let facts: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(facts["output"], "g");
    assert_eq!(facts["cut_off"], false);
    assert_eq!(facts["records"], 31);
    assert_eq!(facts["seconds"], 60.0);
    assert_eq!(
        facts["saved_bytes"]["last"],
        f64::from((225_000 + 10) * 4096)
    );
    assert!((facts["cpu_seconds"].as_f64().unwrap() - 2.4).abs() < 1e-9);
    assert!((facts["cpu_percent"].as_f64().unwrap() - 4.0).abs() < 1e-9);
    assert_eq!(facts["full_scans"], 3.0);
    assert_eq!(facts["broken_pages"], 900.0);
    assert_eq!(facts["refused"]["pinned"], 30.0);
    assert_eq!(facts["knob_changes"][0]["knob"], "pages_to_scan");
    assert_eq!(facts["knob_changes"][0]["seconds"], 30.0);
    assert_eq!(facts["header"]["command"][0], "sh");
}

#[test]
fn cut_off() {
    let fixture = Fixture::new();
    let text = recording(false);
    fixture.file("/f", &text[..text.len() - 100]);
    let (code, stdout, stderr) = report(&fixture, &["f"]);
    assert_eq!(code, 4);
    assert_eq!(
        stdout,
        "f.html: 30 records in 58.0 s, 878 MiB saved at the end\n"
    );
    assert_eq!(
        stderr,
        "rksmctl: f is cut off within a line; the page is about what is before it\n"
    );
    let page = fs::read_to_string(fixture.root().join("f.html")).unwrap();
    assert!(page.contains("class=\"note\""));
}

#[test]
fn what_cannot_be_read() {
    let text = recording(false);
    let header = text.lines().next().unwrap().to_string() + "\n";
    let newer = header.replace("\"version\":1", "\"version\":2");
    for (content, message) in [
        (String::new(), "f is empty"),
        (header.clone(), "f has no whole record"),
        (header.clone() + "{\"sec", "f has no whole record"),
        ("<html>\n".into(), "f is not a recording of rksmctl"),
        (
            newer,
            "f has format version 2, which only a newer rksmctl reads; this one reads 1",
        ),
        (
            header + "x\n" + &text,
            "line 2 of f is not understood: expected value",
        ),
    ] {
        let fixture = Fixture::new();
        fixture.file("/f", content);
        let (code, stdout, stderr) = report(&fixture, &["f"]);
        assert_eq!((code, stdout.as_str()), (1, ""));
        assert_eq!(stderr, format!("rksmctl: {message}\n"));
        assert!(!fixture.root().join("f.html").exists());
    }
    golden("report-none", &Fixture::new(), "report /none");
    let fixture = Fixture::new();
    fixture.file("/f", recording(false));
    let (code, _, stderr) = report(&fixture, &["f", "-o", "./f"]);
    assert_eq!(
        (code, stderr.as_str()),
        (2, "rksmctl: f is the recording itself\n")
    );
    assert_eq!(report(&fixture, &["f", "-o", "/dev/full"]).0, 1);
}

/// What record writes, report reads; one record is enough.
#[test]
fn of_a_real_recording() {
    for rksm in [false, true] {
        let fixture = Fixture::new();
        fixture.processes();
        if rksm {
            fixture.rksm();
        } else {
            fixture.builtin();
        }
        let file = fixture.root().join("f");
        let line = format!("record -o {} -- true", file.display());
        assert!(rksmctl(&fixture, &line).status.success());
        let (code, stdout, stderr) = report(&fixture, &["f"]);
        assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
        let text = fs::read_to_string(&file).unwrap();
        let two: Vec<&str> = text.lines().take(2).collect();
        fs::write(&file, two.join("\n")).unwrap();
        let (code, stdout, _) = report(&fixture, &["f"]);
        assert_eq!(code, 0);
        assert!(stdout.contains(": 1 record in "), "{stdout}");
    }
}
