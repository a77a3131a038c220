// SPDX-License-Identifier: GPL-2.0-only

//! The simulated hosts over time, as CSV files for `scripts/governor-curves`.

use crate::{
    host::{
        Host,
        Kind,
        MSEC,
        SEC, //
    },
    scenarios::{
        churn,
        clone_storm,
        fares,
        fork_storm,
        pressure,
        quiet,
        virtual_machines,
        volatile,
        MIB, //
    },
};

use std::{
    env,
    fmt::Write,
    fs,
    path::{
        Path,
        PathBuf, //
    },
};

/// Writes what a host has seen, and prints what it comes to.
fn save(out: &Path, name: &str, host: &Host) {
    let mut text =
        String::from("seconds,cpu_ms,wakeups,merged_mib,merges,broken,late_ms,pressure\n");
    let begin = host.samples[0].at;
    for sample in &host.samples {
        writeln!(
            text,
            "{:.3},{:.3},{},{:.2},{},{},{},{}",
            (sample.at - begin) as f64 / SEC as f64,
            sample.cpu as f64 / MSEC as f64,
            sample.wakeups,
            sample.merged as f64 / MIB as f64,
            sample.merges,
            sample.broken,
            sample.late / MSEC,
            u8::from(sample.pressure),
        )
        .unwrap();
    }
    fs::write(out.join(name).with_extension("csv"), text).expect("it can be written");
    let secs = (host.now - begin) as f64 / SEC as f64;
    println!(
        "| {name} | {:.3} | {:.2} | {} | {} | {} | {:.1} |",
        host.cpu as f64 / SEC as f64 / secs * 100.0,
        host.wakeups as f64 / secs,
        host.merges,
        host.broken,
        host.assert_budget(0) / MSEC,
        host.late.old.max(host.late.new) as f64 / SEC as f64,
    );
}

#[test]
#[ignore = "writes files"]
fn curves() {
    let out = env::var_os("RKSM_GOVERNOR_OUT").expect("RKSM_GOVERNOR_OUT says where to");
    let out = PathBuf::from(out);
    println!("| host | % of a CPU | wake-ups/s | merges | broken | ms beyond | s late |");
    save(&out, "quiet-unique", &quiet(Kind::Unique));
    save(&out, "quiet-merged", &quiet(Kind::Copies));
    save(&out, "clones", &clone_storm(0).0);
    save(&out, "churn", &churn());
    save(&out, "volatile-4s", &volatile(0.75));
    save(&out, "volatile-20s", &volatile(0.95));
    save(&out, "pressure", &pressure());
    save(&out, "forks", &fork_storm(100));
    save(&out, "2TiB", &virtual_machines(400, 5, 128, 3600));
    let mut text = String::from("life_s,merges_per_s,held_percent,cpu_percent\n");
    for life in [
        0.5, 1.0, 2.0, 3.5, 5.0, 7.0, 10.0, 14.0, 20.0, 35.0, 50.0, 100.0, 200.0, 1000.0,
    ] {
        let (merges, held, cpu) = fares(f64::exp(-1.0 / life));
        writeln!(text, "{life},{merges:.1},{:.1},{cpu:.3}", 100.0 * held).unwrap();
    }
    print!("{text}");
    fs::write(out.join("lives.csv"), text).expect("it can be written");
}
