// SPDX-License-Identifier: GPL-2.0-only
//! A directory with a made-up /sys and /proc. The library's unit tests include this file, too.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// The directory; it goes away with this.
pub struct Fixture {
    root: PathBuf,
}

/// What a process is made of; `..Proc::default()` fills in the rest.
pub struct Proc<'a> {
    pub pid: u32,
    pub comm: &'a str,
    /// Words with a space between each two.
    pub cmdline: &'a str,
    pub uid: u32,
    pub cgroup: &'a str,
    pub rss_kib: u64,
    pub anon_kib: u64,
    pub merging_pages: u64,
    pub zero_pages: u64,
    pub rmap_items: u64,
    pub merge_any: bool,
}

impl Default for Proc<'_> {
    fn default() -> Self {
        Self {
            pid: 1,
            comm: "init",
            cmdline: "/sbin/init",
            uid: 0,
            cgroup: "/",
            rss_kib: 10_240,
            anon_kib: 4096,
            merging_pages: 0,
            zero_pages: 0,
            rmap_items: 0,
            merge_any: false,
        }
    }
}

#[allow(dead_code)] // Not every test uses all of it.
impl Fixture {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("rksmctl-test-{}-{n}", std::process::id());
        let root = std::env::temp_dir().join(name);
        fs::create_dir_all(&root).unwrap();
        Self { root }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Writes a file, given by its path on a real machine.
    pub fn file(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.root.join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    pub fn remove(&self, path: &str) {
        fs::remove_file(self.root.join(path.trim_start_matches('/'))).unwrap();
    }

    /// A machine of 16 GiB with the built-in KSM, 12.34 s of CPU time of ksmd.
    pub fn builtin(&self) {
        self.file("/proc/sys/kernel/osrelease", "7.3.4+deb13-amd64\n");
        self.file(
            "/proc/meminfo",
            "MemTotal:       16777216 kB\nMemFree:         8388608 kB\nMemAvailable:   10485760 kB\n",
        );
        self.file("/proc/uptime", "1000.00 1900.00\n");
        self.kthread(50, "ksmd", 34, 1200);
        for (name, value) in [
            ("advisor_max_cpu", "70"),
            ("advisor_max_pages_to_scan", "30000"),
            ("advisor_min_pages_to_scan", "500"),
            ("advisor_mode", "[none] scan-time"),
            ("advisor_target_scan_time", "200"),
            ("full_scans", "7"),
            ("general_profit", "12000000"),
            ("ksm_zero_pages", "96"),
            ("max_page_sharing", "256"),
            ("merge_across_nodes", "1"),
            ("pages_scanned", "500000"),
            ("pages_shared", "1000"),
            ("pages_sharing", "3000"),
            ("pages_skipped", "20000"),
            ("pages_to_scan", "100"),
            ("pages_unshared", "5000"),
            ("pages_volatile", "400"),
            ("run", "1"),
            ("sleep_millisecs", "20"),
            ("smart_scan", "1"),
            ("stable_node_chains", "0"),
            ("stable_node_chains_prune_millisecs", "2000"),
            ("stable_node_dups", "0"),
            ("use_zero_pages", "0"),
        ] {
            self.file(&format!("/sys/kernel/mm/ksm/{name}"), format!("{value}\n"));
        }
    }

    /// The same machine with rksm loaded, 5.6 s of CPU time of its two threads.
    pub fn rksm(&self) {
        self.builtin();
        self.kthread(60, "rksmd", 20, 500);
        self.kthread(61, "rksmd/1", 10, 30);
        for (name, value) in [
            ("cpu_burst_millisecs", "2000"),
            ("cpu_percent", "5"),
            ("domains", "user"),
            ("governor", "knobs [auto]"),
            ("longest_hold_usecs", "3900"),
            ("memory_pressure", "0"),
            ("metadata_bytes", "42991616"),
            ("pressure_cpu_percent", "10"),
            ("processes", "3"),
            ("refused/busy", "0"),
            ("refused/differs", "1"),
            ("refused/far_node", "0"),
            ("refused/gone", "12"),
            ("refused/locked", "4"),
            ("refused/no_memory", "0"),
            ("refused/pinned", "113"),
            ("refused/same", "0"),
            ("refused/stale", "2"),
            ("refused/unsplit", "0"),
            ("refused/userfault", "0"),
            ("scan_threads", "1"),
            ("version", "0.4.0"),
            ("wakeups", "1000"),
        ] {
            self.file(&format!("/sys/kernel/mm/rksm/{name}"), format!("{value}\n"));
        }
    }

    /// The same with a version of rksm that has no governor.
    pub fn rksm_before_governor(&self) {
        self.rksm();
        for name in [
            "cpu_burst_millisecs",
            "cpu_percent",
            "domains",
            "governor",
            "memory_pressure",
            "pressure_cpu_percent",
        ] {
            self.remove(&format!("/sys/kernel/mm/rksm/{name}"));
        }
    }

    /// A kernel thread that has used so many ticks.
    pub fn kthread(&self, pid: u32, comm: &str, utime: u64, stime: u64) {
        self.file(
            &format!("/proc/{pid}/stat"),
            format!(
                "{pid} ({comm}) S 2 0 0 0 -1 2129984 0 0 0 0 {utime} {stime} 0 0 25 5 1 0 60\n"
            ),
        );
        self.file(
            &format!("/proc/{pid}/status"),
            format!("Name:\t{comm}\nTgid:\t{pid}\nPid:\t{pid}\nPPid:\t2\nUid:\t0\t0\t0\t0\n"),
        );
        self.file(&format!("/proc/{pid}/comm"), format!("{comm}\n"));
        self.file(&format!("/proc/{pid}/cmdline"), "");
        self.file(&format!("/proc/{pid}/cgroup"), "0::/\n");
    }

    pub fn process(&self, p: &Proc<'_>) {
        let Proc { pid, comm, uid, .. } = p;
        let file = |name: &str, content: String| self.file(&format!("/proc/{pid}/{name}"), content);
        file("comm", format!("{comm}\n"));
        file("cmdline", p.cmdline.replace(' ', "\0") + "\0");
        file("cgroup", format!("0::{}\n", p.cgroup));
        file(
            "stat",
            format!("{pid} ({comm}) S 1 1 1 0 -1 4194560 0 0 0 0 100 50 0 0 20 0 1 0 900\n"),
        );
        file(
            "status",
            format!(
                "Name:\t{comm}\nTgid:\t{pid}\nPid:\t{pid}\nPPid:\t1\n\
                 Uid:\t{uid}\t{uid}\t{uid}\t{uid}\n\
                 VmRSS:\t{} kB\nRssAnon:\t{} kB\n",
                p.rss_kib, p.anon_kib
            ),
        );
        let yes = if p.merge_any { "yes" } else { "no" };
        let profit = (p.merging_pages + p.zero_pages) as i64 * 4096 - p.rmap_items as i64 * 64;
        file(
            "ksm_stat",
            format!(
                "ksm_rmap_items {}\nksm_zero_pages {}\nksm_merging_pages {}\n\
                 ksm_process_profit {profit}\nksm_merge_any: {yes}\nksm_mergeable: {yes}\n",
                p.rmap_items, p.zero_pages, p.merging_pages
            ),
        );
        self.file(&format!("/sys/fs/cgroup{}/cgroup.procs", p.cgroup), "");
    }

    /// Four: init, sshd, and two QEMU guests of Proxmox.
    pub fn processes(&self) {
        self.process(&Proc {
            cgroup: "/init.scope",
            ..Proc::default()
        });
        self.process(&Proc {
            pid: 800,
            comm: "sshd",
            cmdline: "sshd: /usr/sbin/sshd -D",
            cgroup: "/system.slice/ssh.service",
            ..Proc::default()
        });
        for n in 1..=2 {
            self.process(&Proc {
                pid: 4210 + n,
                comm: "kvm",
                cmdline: &format!(
                    "/usr/bin/kvm -id {} -name clone{n},debug-threads=on",
                    99 + n
                ),
                uid: 64055,
                cgroup: &format!("/qemu.slice/{}.scope", 99 + n),
                rss_kib: 4096 << 10,
                anon_kib: 4000 << 10,
                merging_pages: 2000,
                zero_pages: 48,
                rmap_items: 4096,
                merge_any: true,
            });
        }
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}
