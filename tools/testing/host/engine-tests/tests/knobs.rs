// SPDX-License-Identifier: GPL-2.0-only

//! The files: what a write to each is taken for, and what a read of each shows.

use engine_tests::engine::{
    governor::Limits,
    stats::{
        Counters,
        Snapshot, //
    },
    sysfs::{
        attribute::{
            chosen,
            Attribute,
            ATTRIBUTES,
            *, //
        },
        knobs::{
            Action,
            AdvisorMode,
            GovernorMode,
            Knobs,
            RunState,
            StoreCtx, //
        }, //
    }, //
};

use kernel::error::{
    code::{
        EBUSY,
        EINVAL,
        EIO,
        ERANGE, //
    },
    Error,
    Result, //
};

use proptest::prelude::*;

const CPUS: u32 = 4;

/// Nothing is merged.
const IDLE: StoreCtx = StoreCtx {
    pages_shared: 0,
    cpus: CPUS,
};

/// One page is merged.
const BUSY: StoreCtx = StoreCtx {
    pages_shared: 1,
    cpus: CPUS,
};

fn show(knobs: &Knobs, file: &'static Attribute) -> String {
    shown(knobs, file, &Snapshot::default())
}

fn shown(knobs: &Knobs, file: &'static Attribute, stats: &Snapshot) -> String {
    let mut text = String::new();
    (file.show)(knobs, stats, &mut text).unwrap();
    assert!(text.ends_with('\n') && !text.trim_end().contains('\n'));
    assert_eq!(file.line(knobs, stats).unwrap().as_bytes(), text.as_bytes());
    text
}

/// A write to a file.
trait Store {
    fn store(&mut self, file: &'static Attribute, buf: &[u8], ctx: &StoreCtx) -> Result<Action>;
}

impl Store for Knobs {
    fn store(&mut self, file: &'static Attribute, buf: &[u8], ctx: &StoreCtx) -> Result<Action> {
        self.apply(file.parse(buf)?, ctx)
    }
}

/// Stores, and does what the caller of the engine does when all goes well.
fn store(
    knobs: &mut Knobs,
    file: &'static Attribute,
    buf: &[u8],
    ctx: &StoreCtx,
) -> Result<Action> {
    let action = knobs.store(file, buf, ctx)?;
    if let Action::RemoveNodes(pending) = action {
        knobs.commit(pending);
    }
    Ok(action)
}

#[test]
fn the_files_are_those_of_the_built_in() {
    let expected = [
        ("sleep_millisecs", 0o644, "20"),
        ("pages_to_scan", 0o644, "100"),
        ("run", 0o644, "0"),
        ("pages_scanned", 0o444, "0"),
        ("pages_shared", 0o444, "0"),
        ("pages_sharing", 0o444, "0"),
        ("pages_unshared", 0o444, "0"),
        ("pages_volatile", 0o444, "0"),
        ("pages_skipped", 0o444, "0"),
        ("ksm_zero_pages", 0o444, "0"),
        ("full_scans", 0o444, "0"),
        ("merge_across_nodes", 0o644, "1"),
        ("max_page_sharing", 0o644, "256"),
        ("stable_node_chains", 0o444, "0"),
        ("stable_node_dups", 0o444, "0"),
        ("stable_node_chains_prune_millisecs", 0o644, "2000"),
        ("use_zero_pages", 0o644, "0"),
        ("general_profit", 0o444, "0"),
        ("smart_scan", 0o644, "1"),
        ("advisor_mode", 0o644, "[none] scan-time"),
        ("advisor_max_cpu", 0o644, "70"),
        ("advisor_min_pages_to_scan", 0o644, "500"),
        ("advisor_max_pages_to_scan", 0o644, "30000"),
        ("advisor_target_scan_time", 0o644, "200"),
        // Ours, after theirs.
        ("scan_threads", 0o644, "1"),
        ("governor", 0o644, "[knobs] auto"),
        ("cpu_percent", 0o644, "5"),
        ("pressure_cpu_percent", 0o644, "10"),
        ("cpu_burst_millisecs", 0o644, "2000"),
        ("memory_pressure", 0o444, "0"),
        ("longest_hold_usecs", 0o444, "0"),
        ("wakeups", 0o444, "0"),
        ("cpu_microsecs", 0o444, "0"),
        ("processes", 0o444, "0"),
        ("metadata_bytes", 0o444, "0"),
        ("version", 0o444, RELEASE),
    ];
    let knobs = Knobs::default();
    let rows: Vec<_> = ATTRIBUTES
        .iter()
        .map(|&file| (file.name.to_str().unwrap(), file.mode(), show(&knobs, file)))
        .collect();
    assert_eq!(rows.len(), expected.len());
    for ((name, mode, text), (ename, emode, etext)) in rows.iter().zip(expected) {
        assert_eq!(
            (*name, *mode, text.as_str()),
            (ename, emode, format!("{etext}\n").as_str())
        );
    }
}

#[test]
fn counters_show_in_their_own_files() {
    let stats = Snapshot {
        counters: Counters {
            pages_scanned: u64::MAX,
            pages_shared: 2,
            pages_sharing: 3,
            pages_unshared: 4,
            pages_skipped: 5,
            full_scans: 6,
            stable_node_chains: 7,
            stable_node_dups: 8,
            tracked: 100,
            ..Counters::default()
        },
        zero_pages: -9,
        metadata_bytes: 1000,
        longest_hold_usecs: 10,
        wakeups: 11,
        cpu_microsecs: 12,
        processes: 13,
        memory_pressure: true,
        ..Snapshot::default()
    };
    let knobs = Knobs::new();
    for (file, text) in [
        (&PAGES_SCANNED, "18446744073709551615\n"),
        (&PAGES_SHARED, "2\n"),
        (&PAGES_SHARING, "3\n"),
        (&PAGES_UNSHARED, "4\n"),
        (&PAGES_VOLATILE, "91\n"),
        (&PAGES_SKIPPED, "5\n"),
        (&FULL_SCANS, "6\n"),
        (&STABLE_NODE_CHAINS, "7\n"),
        (&STABLE_NODE_DUPS, "8\n"),
        (&KSM_ZERO_PAGES, "-9\n"),
        (&GENERAL_PROFIT, "-25576\n"),
        (&LONGEST_HOLD_USECS, "10\n"),
        (&WAKEUPS, "11\n"),
        (&CPU_MICROSECS, "12\n"),
        (&PROCESSES, "13\n"),
        (&MEMORY_PRESSURE, "1\n"),
        (&METADATA_BYTES, "1000\n"),
    ] {
        assert_eq!(shown(&knobs, file, &stats), text, "{file:?}");
    }
}

/// What a number becomes in a file that takes numbers.
struct Number {
    file: &'static Attribute,
    signed: bool,
    /// The widest type that the file parses.
    max: i128,
    /// What the file accepts of it.
    valid: fn(i128) -> bool,
    /// How the value is kept.
    kept: fn(i128) -> i128,
    /// Whether ERANGE is reported as such.
    erange: bool,
}

const U32: i128 = u32::MAX as i128;
const U64: i128 = u64::MAX as i128;

fn numbers() -> Vec<Number> {
    let number = |file, max| Number {
        file,
        signed: false,
        max,
        valid: |_| true,
        kept: |value| value,
        erange: false,
    };
    vec![
        number(&SLEEP_MILLISECS, U32),
        number(&PAGES_TO_SCAN, U32),
        number(&STABLE_NODE_CHAINS_PRUNE_MILLISECS, U32),
        number(&ADVISOR_MIN_PAGES_TO_SCAN, U64),
        number(&ADVISOR_MAX_PAGES_TO_SCAN, U64),
        Number {
            valid: |value| value <= 2,
            ..number(&RUN, U32)
        },
        Number {
            kept: |value| value & U32,
            ..number(&ADVISOR_MAX_CPU, U64)
        },
        Number {
            valid: |value| value >= 1,
            ..number(&ADVISOR_TARGET_SCAN_TIME, U64)
        },
        Number {
            valid: |value| value <= 1,
            erange: true,
            ..number(&MERGE_ACROSS_NODES, U64)
        },
        Number {
            signed: true,
            valid: |value| value >= 2,
            erange: true,
            ..number(&MAX_PAGE_SHARING, i128::from(i32::MAX))
        },
    ]
}

/// What `lib/kstrtox.c` makes of the text in base 10, in plain words.
fn kstrto(buf: &[u8], signed: bool, max: i128) -> Result<i128> {
    let text: Vec<u8> = buf.iter().copied().take_while(|&byte| byte != 0).collect();
    let (negative, text) = match text.split_first() {
        Some((b'+', rest)) => (false, rest),
        Some((b'-', rest)) if signed => (true, rest),
        _ => (false, &text[..]),
    };
    let end = text
        .iter()
        .position(|byte: &u8| !byte.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    let digits = std::str::from_utf8(digits).unwrap();
    let significant = digits.trim_start_matches('0');
    // No unsigned long long has more than 20 digits.
    if significant.len() > 20 {
        return Err(ERANGE);
    }
    let value: i128 = format!("0{significant}").parse().unwrap();
    if value > U64 {
        return Err(ERANGE);
    }
    if digits.is_empty() || !(rest.is_empty() || rest == b"\n") {
        return Err(EINVAL);
    }
    let value = if negative { -value } else { value };
    let min = if signed { -max - 1 } else { 0 };
    if value < min || value > max {
        return Err(ERANGE);
    }
    Ok(value)
}

fn expect(number: &Number, buf: &[u8]) -> Result<i128> {
    let value = kstrto(buf, number.signed, number.max).map_err(|err| match number.erange {
        true => err,
        false => EINVAL,
    })?;
    if !(number.valid)(value) {
        return Err(EINVAL);
    }
    Ok((number.kept)(value))
}

/// Bytes that number and word parsers care about, and now and then any other.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![
        12 => prop::sample::select(&b"0123456789"[..]),
        4 => prop::sample::select(&b"+- \t\n\0xX.aAeE"[..]),
        1 => any::<u8>(),
    ];
    let limit = prop_oneof![
        Just(1i128 << 31),
        Just(1 << 32),
        Just(1 << 63),
        Just(1 << 64),
        Just(10i128.pow(19)),
        Just(10i128.pow(20)),
        0..300i128,
        0..=U64,
    ];
    let sign = prop::sample::select(vec!["", "", "+", "-", "+-", " "]);
    let tail = prop::sample::select(vec!["", "\n", "\n\n", " ", "\0", "\n\0junk", "x", "\r\n"]);
    let near_limit =
        (sign, 0..30usize, limit, -2..=2i128, tail).prop_map(|(sign, zeroes, limit, off, tail)| {
            let value = (limit + off).max(0);
            format!("{sign}{}{value}{tail}", "0".repeat(zeroes)).into_bytes()
        });
    prop_oneof![prop::collection::vec(byte, 1..40), near_limit]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn numbers_are_parsed_as_by_kstrto(buf in bytes()) {
        for number in numbers() {
            let mut knobs = Knobs::new();
            let before = knobs;
            match (store(&mut knobs, number.file, &buf, &IDLE), expect(&number, &buf)) {
                (Ok(_), Ok(value)) => {
                    prop_assert_eq!(show(&knobs, number.file), format!("{value}\n"));
                }
                (Err(err), Err(expected)) => {
                    prop_assert_eq!(err, expected);
                    prop_assert_eq!(knobs, before);
                }
                (got, expected) => panic!("{:?}: {got:?}, not {expected:?}", number.file),
            }
        }
    }

}

proptest! {
    #[test]
    fn a_rejected_write_changes_nothing(
        writes in prop::collection::vec((0..ATTRIBUTES.len(), bytes(), any::<bool>()), 1..40),
        advisor in any::<bool>(),
    ) {
        let mut knobs = Knobs::new();
        if advisor {
            assert!(knobs.store(&ADVISOR_MODE, b"scan-time", &IDLE).is_ok());
        }
        for (file, buf, busy) in writes {
            let file = ATTRIBUTES[file];
            let before = knobs;
            let ctx = if busy { BUSY } else { IDLE };
            let result = store(&mut knobs, file, &buf, &ctx);
            if result.is_err() {
                prop_assert_eq!(knobs, before);
            }
            if file.store.is_none() {
                prop_assert_eq!(result, Err(EIO));
            }
        }
    }

    #[test]
    fn what_the_built_in_shows_is_taken_over_and_handed_back(
        writes in prop::collection::vec((0..ATTRIBUTES.len(), bytes()), 0..40),
        advisor in any::<bool>(),
    ) {
        let mut there = Knobs::new();
        for (file, buf) in writes {
            let _ = store(&mut there, ATTRIBUTES[file], &buf, &IDLE);
        }
        if advisor {
            assert!(there.store(&ADVISOR_MODE, b"scan-time", &IDLE).is_ok());
        }
        let writable = || ATTRIBUTES.iter().filter(|file| file.store.is_some());

        let mut here = Knobs::new();
        for file in writable() {
            file.take_over(&mut here, show(&there, file).as_bytes()).unwrap();
        }
        prop_assert_eq!(here, there);

        // pages_to_scan goes back first, while there is no advisor, and advisor_mode last.
        let mut back = Knobs::new();
        let last = &ADVISOR_MODE;
        for file in writable().filter(|&&file| file != last) {
            let text = show(&here, file);
            prop_assert!(store(&mut back, file, chosen(text.as_bytes()), &IDLE).is_ok());
        }
        let text = show(&here, last);
        prop_assert!(store(&mut back, last, chosen(text.as_bytes()), &IDLE).is_ok());
        for file in writable().filter(|&&file| file != &PAGES_TO_SCAN) {
            prop_assert_eq!(show(&back, file), show(&there, file));
        }
        if there.advisor_mode == AdvisorMode::None {
            prop_assert_eq!(back, there);
        }
    }
}

#[test]
fn truth_values_go_by_their_first_letters() {
    let truths = [
        "e", "E", "yes", "Y", "t", "T", "1", "10", "1\n", "on", "ON", "oNo", "1\0",
    ];
    let lies = [
        "d", "D", "no", "N", "f", "F", "0", "01", "0 1", "off", "OFf", "of",
    ];
    let neither = [
        "\n", "\0", "\x001", "2", "o", "o\n", "o\0n", "-1", "+1", " 1", "a", "\x7f",
    ];
    for file in [&USE_ZERO_PAGES, &SMART_SCAN] {
        for (texts, expected) in [(truths.as_slice(), "1\n"), (lies.as_slice(), "0\n")] {
            for text in texts {
                let mut knobs = Knobs::new();
                let start: &[u8] = if expected == "1\n" { b"0" } else { b"1" };
                assert_eq!(knobs.store(file, start, &IDLE), Ok(Action::Done));
                let result = knobs.store(file, text.as_bytes(), &IDLE);
                assert_eq!(result, Ok(Action::Done), "{text:?}");
                assert_eq!(show(&knobs, file), expected, "{text:?}");
            }
        }
        for text in neither {
            let result = Knobs::new().store(file, text.as_bytes(), &IDLE);
            assert_eq!(result, Err(EINVAL), "{text:?}");
        }
    }
    assert_eq!(Knobs::new().store(&SMART_SCAN, b"\xc3", &IDLE), Err(EINVAL));
}

#[test]
fn advisor_mode_takes_two_words() {
    let mode = |text: &str| {
        let mut knobs = Knobs::new();
        knobs
            .store(&ADVISOR_MODE, text.as_bytes(), &IDLE)
            .map(|_| knobs.advisor_mode)
    };
    for text in [
        "scan-time",
        "scan-time\n",
        "scan-time\0\n",
        "scan-time\n\0none",
    ] {
        assert_eq!(mode(text), Ok(AdvisorMode::ScanTime), "{text:?}");
    }
    for text in ["none", "none\n"] {
        assert_eq!(mode(text), Ok(AdvisorMode::None), "{text:?}");
    }
    for text in [
        "\n",
        "\0",
        "scan-tim",
        "scan-times",
        "scan-time\n\n",
        " none",
        "none ",
        "None",
        "[none] scan-time",
        "0",
    ] {
        assert_eq!(mode(text), Err(EINVAL), "{text:?}");
    }
}

#[test]
fn an_advisor_brings_its_own_pages_to_scan() {
    let mut knobs = Knobs::new();
    assert_eq!(
        knobs.store(&PAGES_TO_SCAN, b"1234", &IDLE),
        Ok(Action::Done)
    );
    // Nothing changes by choosing what there is already.
    assert!(knobs.store(&ADVISOR_MODE, b"none", &IDLE).is_ok());
    assert_eq!(show(&knobs, &PAGES_TO_SCAN), "1234\n");

    assert!(knobs.store(&ADVISOR_MODE, b"scan-time", &IDLE).is_ok());
    assert_eq!(show(&knobs, &ADVISOR_MODE), "none [scan-time]\n");
    assert_eq!(show(&knobs, &PAGES_TO_SCAN), "500\n");
    assert_eq!(knobs.store(&PAGES_TO_SCAN, b"1", &IDLE), Err(EINVAL));
    assert_eq!(knobs.store(&PAGES_TO_SCAN, b"x", &IDLE), Err(EINVAL));
    assert_eq!(show(&knobs, &PAGES_TO_SCAN), "500\n");

    assert!(knobs.store(&ADVISOR_MODE, b"none", &IDLE).is_ok());
    assert_eq!(show(&knobs, &PAGES_TO_SCAN), "100\n");

    // pages_to_scan is 32 bits wide, what it starts from is 64.
    let wide = b"4294967303";
    assert!(knobs.store(&ADVISOR_MIN_PAGES_TO_SCAN, wide, &IDLE).is_ok());
    assert!(knobs.store(&ADVISOR_MODE, b"scan-time", &IDLE).is_ok());
    assert_eq!(show(&knobs, &PAGES_TO_SCAN), "7\n");
}

#[test]
fn the_advisor_forgets_what_was_before_it_was_switched_on() {
    let sec = 1_000_000_000;
    let mut knobs = Knobs::new();
    assert!(knobs.store(&ADVISOR_MODE, b"scan-time", &IDLE).is_ok());
    knobs.scan_started(100 * sec);
    let first = knobs.scan_ended(200 * sec, 0).unwrap();
    assert!(knobs.store(&ADVISOR_MODE, b"none", &IDLE).is_ok());
    knobs.scan_started(300 * sec);
    assert_eq!(knobs.scan_ended(400 * sec, 0), None);
    assert_eq!(show(&knobs, &PAGES_TO_SCAN), "100\n");

    assert!(knobs.store(&ADVISOR_MODE, b"scan-time", &IDLE).is_ok());
    knobs.scan_started(500 * sec);
    assert_eq!(knobs.scan_ended(600 * sec, 0), Some(first));
}

#[test]
fn a_wake_up_follows_where_the_built_in_gives_one() {
    let mut knobs = Knobs::new();
    let mut action = |file, text: &str| knobs.store(file, text.as_bytes(), &IDLE);
    // Even if nothing changes.
    assert_eq!(action(&SLEEP_MILLISECS, "20"), Ok(Action::WakeIter));
    assert_eq!(action(&RUN, "0"), Ok(Action::RunChanged));
    assert_eq!(action(&RUN, "1"), Ok(Action::RunChanged));
    assert_eq!(action(&RUN, "1"), Ok(Action::RunChanged));
    assert_eq!(action(&RUN, "2"), Ok(Action::Unmerge));
    assert_eq!(action(&RUN, "2"), Ok(Action::RunChanged));
    assert_eq!(action(&RUN, "0"), Ok(Action::RunChanged));
    assert_eq!(action(&RUN, "2"), Ok(Action::Unmerge));
    assert_eq!(action(&PAGES_TO_SCAN, "7"), Ok(Action::Done));
    assert_eq!(action(&RUN, "3"), Err(EINVAL));
    assert_eq!(action(&RUN, "4"), Err(EINVAL));
}

#[test]
fn run_shows_what_became_of_it() {
    let mut knobs = Knobs::new();
    assert_eq!(knobs.store(&RUN, b"2", &BUSY), Ok(Action::Unmerge));
    assert_eq!(show(&knobs, &RUN), "2\n");
    knobs.unmerge_failed();
    assert_eq!(
        (show(&knobs, &RUN), knobs.run),
        ("0\n".into(), RunState::Stop)
    );

    assert!(knobs.store(&RUN, b"1", &BUSY).is_ok());
    knobs.offline = true;
    assert_eq!((show(&knobs, &RUN), knobs.run_bits()), ("5\n".into(), 5));
    knobs.offline = false;
    assert_eq!((show(&knobs, &RUN), knobs.run_bits()), ("1\n".into(), 1));
}

#[test]
fn some_knobs_change_only_while_nothing_is_merged() {
    for (file, same, other, bad) in [
        (&MERGE_ACROSS_NODES, "1", "0", "2"),
        (&MAX_PAGE_SHARING, "256", "2", "1"),
    ] {
        let mut knobs = Knobs::new();
        let before = knobs;
        let write = |knobs: &mut Knobs, text: &str, ctx| knobs.store(file, text.as_bytes(), ctx);
        assert_eq!(write(&mut knobs, other, &BUSY), Err(EBUSY));
        assert_eq!(write(&mut knobs, same, &BUSY), Ok(Action::Done));
        // A value that is wrong by itself is found first.
        assert_eq!(write(&mut knobs, bad, &BUSY), Err(EINVAL));
        assert_eq!(
            write(&mut knobs, "18446744073709551616", &BUSY),
            Err(ERANGE)
        );

        // It takes effect when the stable nodes are gone, and not before.
        let Ok(Action::RemoveNodes(pending)) = write(&mut knobs, other, &IDLE) else {
            panic!("{file:?} was changed at once");
        };
        assert_eq!(knobs, before);
        knobs.commit(pending);
        assert_eq!(show(&knobs, file), format!("{other}\n"));
        assert_eq!(write(&mut knobs, other, &BUSY), Ok(Action::Done));
    }
}

#[test]
fn there_are_no_more_threads_than_cpus() {
    let mut knobs = Knobs::new();
    for threads in 1..=CPUS {
        let written = knobs.store(&SCAN_THREADS, format!("{threads}\n").as_bytes(), &BUSY);
        assert_eq!(written, Ok(Action::Done));
        assert_eq!(knobs.scan_threads, threads);
    }
    for bad in ["0", "5", "-1", "4294967296", "", "two", "2 2"] {
        let written = knobs.store(&SCAN_THREADS, bad.as_bytes(), &IDLE);
        assert_eq!(written, Err(EINVAL), "{bad}");
        assert_eq!(knobs.scan_threads, CPUS);
    }
}

#[test]
fn the_governor_is_one_of_two_words() {
    let mut knobs = Knobs::new();
    for (text, mode, line) in [
        ("auto", GovernorMode::Auto, "knobs [auto]\n"),
        ("auto\n", GovernorMode::Auto, "knobs [auto]\n"),
        ("knobs\n", GovernorMode::Knobs, "[knobs] auto\n"),
        ("knobs", GovernorMode::Knobs, "[knobs] auto\n"),
    ] {
        // Also while pages are merged. The scanner must not sleep on as it was told before.
        let written = knobs.store(&GOVERNOR, text.as_bytes(), &BUSY);
        assert_eq!(written, Ok(Action::WakeIter), "{text:?}");
        assert_eq!(knobs.governor, mode);
        assert_eq!(show(&knobs, &GOVERNOR), line);
    }
    for bad in [
        "", "\n", "Auto", "auto ", " auto", "auto\n\n", "[auto]", "0", "1", "none",
    ] {
        let written = knobs.store(&GOVERNOR, bad.as_bytes(), &IDLE);
        assert_eq!(written, Err(EINVAL), "{bad:?}");
        assert_eq!(knobs.governor, GovernorMode::Knobs);
    }
}

#[test]
fn the_budget_is_between_1_and_all_of_the_machine() {
    for (file, most) in [
        (&CPU_PERCENT, 100 * CPUS),
        (&PRESSURE_CPU_PERCENT, 100 * CPUS),
        (&CPU_BURST_MILLISECS, 60_000),
    ] {
        let mut knobs = Knobs::new();
        for value in [1, 2, most - 1, most] {
            let written = knobs.store(file, format!("{value}\n").as_bytes(), &BUSY);
            assert_eq!(written, Ok(Action::WakeIter), "{file:?}={value}");
            assert_eq!(show(&knobs, file), format!("{value}\n"));
        }
        let before = knobs;
        let beyond = (most + 1).to_string();
        for bad in [
            "0",
            &beyond,
            "-1",
            "4294967296",
            "",
            "5%",
            "5 5",
            "0x5",
            "5.5",
        ] {
            let written = knobs.store(file, bad.as_bytes(), &IDLE);
            assert_eq!(written, Err(EINVAL), "{file:?}={bad}");
            assert_eq!(knobs, before);
        }
    }
}

#[test]
fn the_budget_follows_the_cpus() {
    for (cpus, percent, pressure) in [
        (0, 5, 10),
        (1, 5, 10),
        (11, 5, 10),
        (12, 6, 12),
        (64, 32, 64),
        (1024, 512, 1024),
    ] {
        let limits = Limits::for_cpus(cpus);
        let shown = (limits.percent, limits.pressure_percent, limits.burst_msecs);
        assert_eq!(shown, (percent, pressure, 2000), "{cpus} CPUs");
    }
}

#[test]
fn the_governor_leaves_the_built_ins_files_alone() {
    let mut knobs = Knobs::new();
    assert!(knobs.store(&GOVERNOR, b"auto", &IDLE).is_ok());
    let written = [
        (&SLEEP_MILLISECS, "7"),
        (&PAGES_TO_SCAN, "1234"),
        (&SMART_SCAN, "0"),
        (&ADVISOR_MAX_CPU, "33"),
        (&ADVISOR_MIN_PAGES_TO_SCAN, "600"),
        (&ADVISOR_MAX_PAGES_TO_SCAN, "7000"),
        (&ADVISOR_TARGET_SCAN_TIME, "8"),
    ];
    for (file, text) in written {
        assert!(
            knobs.store(file, text.as_bytes(), &BUSY).is_ok(),
            "{file:?}"
        );
        assert_eq!(show(&knobs, file), format!("{text}\n"));
    }
    // Back and forth: all is as it was left.
    for mode in ["knobs", "auto", "knobs"] {
        assert!(knobs.store(&GOVERNOR, mode.as_bytes(), &BUSY).is_ok());
        for (file, text) in written {
            assert_eq!(
                show(&knobs, file),
                format!("{text}\n"),
                "{file:?} in {mode}"
            );
        }
    }
    // An advisor brings its own pages_to_scan in either mode.
    assert!(knobs.store(&GOVERNOR, b"auto", &IDLE).is_ok());
    assert!(knobs.store(&ADVISOR_MODE, b"scan-time", &IDLE).is_ok());
    assert_eq!(show(&knobs, &ADVISOR_MODE), "none [scan-time]\n");
    assert_eq!(show(&knobs, &PAGES_TO_SCAN), "600\n");
    assert_eq!(knobs.store(&PAGES_TO_SCAN, b"1", &IDLE), Err(EINVAL));
    assert!(knobs.store(&ADVISOR_MODE, b"none", &IDLE).is_ok());
    assert_eq!(show(&knobs, &PAGES_TO_SCAN), "100\n");
}

#[test]
fn module_parameters_set_some_files() {
    let mut knobs = Knobs::new();
    for (file, value, text) in [
        (&RUN, 0, "0\n"),
        (&RUN, 1, "1\n"),
        (&RUN, 2, "2\n"),
        (&PAGES_TO_SCAN, i64::from(u32::MAX), "4294967295\n"),
        (&SLEEP_MILLISECS, 0, "0\n"),
        (&SCAN_THREADS, 4, "4\n"),
    ] {
        let set = file.set_at_load(&mut knobs, value, CPUS);
        assert_eq!(set, Ok(()), "{file:?}={value}");
        assert_eq!(show(&knobs, file), text);
    }
    let before = knobs;
    for (file, value) in [
        (&RUN, 3),
        (&RUN, -1),
        (&PAGES_TO_SCAN, -1),
        (&SLEEP_MILLISECS, 1 << 32),
        (&USE_ZERO_PAGES, 1),
        (&SCAN_THREADS, 0),
        (&SCAN_THREADS, 5),
    ] {
        let set = file.set_at_load(&mut knobs, value, CPUS);
        assert_eq!(set, Err(EINVAL), "{file:?}={value}");
        assert_eq!(knobs, before);
    }
}

#[test]
fn what_the_built_in_cannot_show_is_not_taken_over() {
    let mut knobs = Knobs::new();
    let before = knobs;
    for (file, text) in [
        (&ADVISOR_MODE, "none scan-time\n"),
        (&ADVISOR_MODE, "none [scan-time\n"),
        (&ADVISOR_MODE, "none ]scan-time[\n"),
        (&ADVISOR_MODE, "[later] scan-time\n"),
        (&RUN, "4\n"),
        (&MAX_PAGE_SHARING, "1\n"),
        (&PAGES_SHARED, "1\n"),
    ] {
        let result: Result<(), Error> = file.take_over(&mut knobs, text.as_bytes());
        assert!(result.is_err(), "{text:?}");
        assert_eq!(knobs, before);
    }
}
