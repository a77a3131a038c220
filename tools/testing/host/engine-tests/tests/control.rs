// SPDX-License-Identifier: GPL-2.0-only

//! `/dev/rksm`: which bytes are a call, and what comes back.

mod common;

use engine_tests::engine::control::{
    cgroup_path::{
        CgroupPath,
        PATH_LEN_MAX, //
    },
    layout::{
        Layout,
        LAYOUTS,
        NR_REFUSALS, //
    },
    reply::{
        ListReply,
        MergeReply,
        Opted,
        RuleRecord,
        StatRecord,
        UnmergeReply,
        WhyReply, //
    },
    request::{
        Call,
        Change,
        ListRequest,
        MergeRequest,
        Request,
        RuleRequest,
        Subject,
        UnmergeRequest,
        WhyRequest, //
    },
    rules::Action, //
};

use kernel::{
    alloc::{
        flags::GFP_KERNEL,
        KVec, //
    },
    error::{
        code::{
            E2BIG,
            EINVAL,
            ENOMEM,
            ENOTTY, //
        },
        Result, //
    },
    page::PAGE_SIZE,
    testing::{
        self,
        Fail, //
    }, //
};

use proptest::prelude::*;

const ALL: u64 = u64::MAX;
const PAGE: u64 = PAGE_SIZE as u64;

fn layout(name: &str) -> &'static Layout {
    LAYOUTS.iter().find(|layout| layout.name == name).unwrap()
}

fn layout_of(call: Call) -> &'static Layout {
    layout(match call {
        Call::Rule => "rksm_rule",
        Call::Rules | Call::Stat => "rksm_list",
        Call::Merge => "rksm_merge",
        Call::Unmerge => "rksm_unmerge",
        Call::Why => "rksm_why",
    })
}

/// The bytes of a struct, by its fields' names.
#[derive(Clone, Debug, PartialEq)]
struct Struct {
    layout: &'static Layout,
    bytes: Vec<u8>,
}

impl Struct {
    fn new(layout: &'static Layout) -> Self {
        let bytes = vec![0; layout.size];
        Self { layout, bytes }.with("size", layout.size as u64)
    }

    fn field(&self, name: &str) -> std::ops::Range<usize> {
        let mut fields = self.layout.fields.iter();
        let (_, at, size) = fields.find(|(field, ..)| *field == name).expect(name);
        *at..at + size
    }

    fn with(mut self, name: &str, value: u64) -> Self {
        let field = self.field(name);
        let len = field.len();
        self.bytes[field].copy_from_slice(&value.to_ne_bytes()[..len]);
        self
    }

    /// Bytes more than are known, of which the last is `last`.
    fn longer(mut self, by: usize, last: u8) -> Self {
        let len = self.layout.size + by;
        self.bytes.resize(len, 0);
        *self.bytes.last_mut().unwrap() = last;
        self.with("size", len as u64)
    }

    fn get(&self, name: &str) -> u64 {
        let mut value = [0; 8];
        let field = self.field(name);
        value[..field.len()].copy_from_slice(&self.bytes[field]);
        u64::from_ne_bytes(value)
    }

    fn refused(&self) -> Vec<u64> {
        let values = self.bytes[self.field("refused")].chunks(8);
        let values = values.map(|value| u64::from_ne_bytes(value.try_into().unwrap()));
        values.collect()
    }
}

/// An argument that is accepted, to begin with.
fn good(call: Call) -> Struct {
    let argument = Struct::new(layout_of(call));
    match call {
        Call::Rule => argument.with("pidfd", 3).with("action", 1),
        Call::Rules => argument.with("records", 0x1000).with("len", 24),
        Call::Stat => argument.with("records", 0x1000).with("len", 192),
        Call::Merge | Call::Unmerge => argument.with("pidfd", 3).with("end", ALL),
        Call::Why => argument.with("pidfd", 3),
    }
}

fn good_cgroup() -> Struct {
    let argument = good(Call::Rule).with("pidfd", -1i64 as u64);
    argument.with("path", 0x7000).with("path_len", 5)
}

fn parse(call: Call, argument: &Struct) -> Result<Request> {
    Request::parse(call, &argument.bytes)
}

#[test]
fn calls_are_known_by_their_numbers() {
    for (nr, call) in Call::ALL.into_iter().enumerate() {
        assert_eq!(call.cmd(), 0xBD00 + nr as u32);
        assert_eq!(Call::from_cmd(call.cmd()), Ok(call));
    }
    // Others, those with a size or direction, and those of other devices.
    for cmd in [
        0xBD06,
        0xBDFF,
        0x4020_BD00,
        0xC020_BD00,
        0xBE00,
        0,
        u32::MAX,
    ] {
        assert_eq!(Call::from_cmd(cmd), Err(ENOTTY), "{cmd:#x}");
    }
}

#[test]
fn sizes_are_between_the_first_version_and_a_page() {
    for call in Call::ALL {
        assert_eq!(call.size(), layout_of(call).size);
        assert!((call.first_size()..=PAGE_SIZE).contains(&call.size()));
        let first = call.first_size() as u32;
        for size in [0, 4, first - 1] {
            assert_eq!(call.check_size(size), Err(EINVAL), "{call:?} {size}");
        }
        for size in [first, first + 1, 4096] {
            assert_eq!(call.check_size(size), Ok(size as usize), "{call:?}");
        }
        for size in [4097, u32::MAX] {
            assert_eq!(call.check_size(size), Err(E2BIG), "{call:?} {size}");
        }
    }
}

#[test]
fn the_size_is_that_of_the_bytes() {
    for call in Call::ALL {
        let good = good(call);
        assert!(parse(call, &good).is_ok());
        for len in 0..call.first_size() {
            let short = Struct {
                bytes: good.bytes[..len].to_vec(),
                ..good
            };
            assert_eq!(parse(call, &short), Err(EINVAL), "{call:?} {len}");
        }
        // It was another one when it was read first.
        for size in [0, call.size() + 8] {
            let other = good.clone().with("size", size as u64);
            assert_eq!(parse(call, &other), Err(EINVAL), "{call:?} {size}");
        }
        let other = good.clone().longer(8, 0).with("size", call.size() as u64);
        assert_eq!(parse(call, &other), Err(EINVAL), "{call:?}");
        let other = good.clone().with("size", PAGE + 1);
        assert_eq!(parse(call, &other), Err(E2BIG), "{call:?}");
    }
}

#[test]
fn what_is_not_known_must_be_zero() {
    for call in Call::ALL {
        let good = good(call);
        let expected = parse(call, &good);
        assert!(expected.is_ok());
        let room = PAGE_SIZE - call.size();
        for by in [1, 8, 9, room] {
            assert_eq!(parse(call, &good.clone().longer(by, 0)), expected);
            assert_eq!(parse(call, &good.clone().longer(by, 1)), Err(E2BIG));
        }
        assert_eq!(parse(call, &good.clone().longer(room + 1, 0)), Err(E2BIG));

        let known = match call {
            Call::Rule | Call::Merge | Call::Unmerge => 1,
            Call::Rules | Call::Stat => 0,
            Call::Why => 3,
        };
        for bit in (0..32).map(|bit| 1 << bit).filter(|bit| bit & known == 0) {
            let flagged = good.clone().with("flags", bit);
            assert_eq!(parse(call, &flagged), Err(EINVAL), "{call:?} {bit:#x}");
        }
        if !matches!(call, Call::Rules | Call::Stat) {
            for value in [1, 1 << 31] {
                let reserved = good.clone().with("reserved", value);
                assert_eq!(parse(call, &reserved), Err(EINVAL), "{call:?}");
            }
        }
    }
}

#[test]
fn fields_that_are_written_are_not_read() {
    for (call, fields) in [
        (Call::Rules, &["count"][..]),
        (Call::Stat, &["count"]),
        (
            Call::Merge,
            &["at", "scanned", "merged", "zeroed", "bytes_saved"],
        ),
        (Call::Unmerge, &["at", "pages"]),
        (Call::Why, &["merged", "zero", "pinned", "fresh", "flags"]),
    ] {
        let expected = parse(call, &good(call));
        for field in fields {
            let left = good(call).with(field, 3);
            assert_eq!(parse(call, &left), expected, "{call:?} {field}");
        }
    }
}

#[test]
fn a_rule_is_for_a_process_or_a_cgroup() {
    let rule = |subject, change| Ok(Request::Rule(RuleRequest { subject, change }));
    let cgroup = || Subject::Cgroup {
        addr: 0x7000,
        len: 5,
    };
    for (raw, action) in [
        (0, Action::Default),
        (1, Action::Always),
        (2, Action::Never),
    ] {
        assert_eq!(
            parse(Call::Rule, &good(Call::Rule).with("action", raw)),
            rule(Subject::Process(3), Change::Set(action))
        );
        assert_eq!(
            parse(Call::Rule, &good_cgroup().with("action", raw)),
            rule(cgroup(), Change::Set(action))
        );
    }
    let removed = |argument: Struct| argument.with("flags", 1).with("action", 0);
    assert_eq!(
        parse(Call::Rule, &removed(good(Call::Rule))),
        rule(Subject::Process(3), Change::Remove)
    );
    assert_eq!(
        parse(Call::Rule, &removed(good_cgroup())),
        rule(cgroup(), Change::Remove)
    );
    assert_eq!(
        parse(Call::Rule, &good(Call::Rule).with("pidfd", 0)),
        rule(Subject::Process(0), Change::Set(Action::Always))
    );
    let longest = good_cgroup().with("path_len", PATH_LEN_MAX as u64);
    assert!(parse(Call::Rule, &longest).is_ok());

    let process = || good(Call::Rule);
    for (what, bad) in [
        ("an unknown action", process().with("action", 3)),
        ("one for a cgroup", good_cgroup().with("action", u64::MAX)),
        ("removal with an action", process().with("flags", 1)),
        ("both", good_cgroup().with("pidfd", 3)),
        ("an address", process().with("path", 1)),
        ("a length", process().with("path_len", 1)),
        ("neither", process().with("pidfd", -1i64 as u64)),
        ("no address", good_cgroup().with("path", 0)),
        ("no length", good_cgroup().with("path_len", 0)),
        ("a long path", good_cgroup().with("path_len", 4096)),
        ("a longer one", good_cgroup().with("path_len", u64::MAX)),
        ("a negative pidfd", process().with("pidfd", -2i64 as u64)),
        ("and a path", good_cgroup().with("pidfd", -2i64 as u64)),
    ] {
        assert_eq!(parse(Call::Rule, &bad), Err(EINVAL), "{what}");
    }
}

#[test]
fn ranges_are_of_pages() {
    let at = |call, start, end| parse(call, &good(call).with("start", start).with("end", end));
    for call in [Call::Merge, Call::Unmerge] {
        for (start, end) in [
            (0, ALL),
            (0, PAGE),
            (PAGE, 2 * PAGE),
            (ALL - PAGE + 1, ALL),
            (PAGE, ALL),
        ] {
            let (range, pidfd) = (start as usize..end as usize, 3);
            let expected = match call {
                Call::Merge => Request::Merge(MergeRequest {
                    pidfd,
                    range,
                    enable: false,
                }),
                _ => Request::Unmerge(UnmergeRequest {
                    pidfd,
                    range,
                    disable: false,
                }),
            };
            assert_eq!(at(call, start, end), Ok(expected));
        }
        for (start, end) in [
            (0, 0),
            (PAGE, PAGE),
            (2 * PAGE, PAGE),
            (PAGE, 0),
            (1, ALL),
            (1, PAGE),
            (0, PAGE - 1),
            (0, PAGE + 8),
            (0, ALL - 1),
            (ALL, ALL),
            (ALL, 0),
        ] {
            let result = at(call, start, end);
            assert_eq!(result, Err(EINVAL), "{call:?} {start:#x} {end:#x}");
        }
    }
    let flagged = |call, end| parse(call, &good(call).with("flags", 1).with("end", end));
    for end in [ALL, PAGE] {
        let merge = MergeRequest {
            pidfd: 3,
            range: 0..end as usize,
            enable: true,
        };
        assert_eq!(flagged(Call::Merge, end), Ok(Request::Merge(merge)));
    }
    let unmerge = UnmergeRequest {
        pidfd: 3,
        range: 0..usize::MAX,
        disable: true,
    };
    assert_eq!(flagged(Call::Unmerge, ALL), Ok(Request::Unmerge(unmerge)));
    // None is mergeable any more, or all that was.
    assert_eq!(flagged(Call::Unmerge, PAGE), Err(EINVAL));
    let part = good(Call::Unmerge).with("flags", 1).with("start", PAGE);
    assert_eq!(parse(Call::Unmerge, &part), Err(EINVAL));
}

#[test]
fn processes_are_named_by_pidfds() {
    for call in [Call::Merge, Call::Unmerge, Call::Why] {
        for fd in [-1i64, i64::from(i32::MIN)] {
            let bad = good(call).with("pidfd", fd as u64);
            assert_eq!(parse(call, &bad), Err(EINVAL), "{call:?} {fd}");
        }
        assert!(parse(call, &good(call).with("pidfd", 0)).is_ok());
    }
    for at in [0, PAGE, ALL] {
        let request = WhyRequest {
            pidfd: 3,
            at: at as usize,
        };
        let argument = good(Call::Why).with("at", at);
        assert_eq!(parse(Call::Why, &argument), Ok(Request::Why(request)));
    }
    for at in [1, PAGE + 1, ALL - 1] {
        assert_eq!(
            parse(Call::Why, &good(Call::Why).with("at", at)),
            Err(EINVAL)
        );
    }
}

#[test]
fn a_buffer_has_room_for_a_record() {
    for (call, least) in [(Call::Rules, 24), (Call::Stat, 192)] {
        let list = |len| parse(call, &good(call).with("cursor", ALL).with("len", len));
        for len in [least, u64::from(u32::MAX)] {
            let request = ListRequest {
                cursor: ALL,
                addr: 0x1000,
                len: len as usize,
            };
            assert_eq!(
                list(len),
                Ok(match call {
                    Call::Rules => Request::Rules(request),
                    _ => Request::Stat(request),
                })
            );
        }
        for len in [0, least - 1] {
            assert_eq!(list(len), Err(EINVAL), "{call:?} {len}");
        }
    }
}

/// Numbers with which something begins, ends or is out of range, and any other.
fn number() -> impl Strategy<Value = u64> {
    let near = prop::sample::select(vec![0, 24, 192, PAGE, 3 * PAGE, 1 << 31, 1 << 32, ALL]);
    prop_oneof![
        (near, -2..=2i64).prop_map(|(near, off)| near.wrapping_add_signed(off)),
        any::<u64>(),
        (0..64u64).prop_map(|page| page * PAGE),
    ]
}

fn call() -> impl Strategy<Value = Call> {
    prop::sample::select(Call::ALL.to_vec())
}

/// The bytes of what was parsed, where it is the only way to ask for that.
fn encode(request: &Request) -> Struct {
    let list = |call, list: &ListRequest| {
        let argument = Struct::new(layout_of(call)).with("cursor", list.cursor);
        let argument = argument.with("records", list.addr as u64);
        argument.with("len", list.len as u64)
    };
    let range = |call, pidfd: i32, range: &std::ops::Range<usize>, flag: bool| {
        let argument = Struct::new(layout_of(call)).with("pidfd", pidfd as u64);
        let argument = argument.with("start", range.start as u64);
        let argument = argument.with("end", range.end as u64);
        argument.with("flags", flag.into())
    };
    match request {
        Request::Rule(rule) => {
            let argument = Struct::new(layout_of(Call::Rule));
            let argument = match rule.subject {
                Subject::Process(pidfd) => argument.with("pidfd", pidfd as u64),
                Subject::Cgroup { addr, len } => argument
                    .with("pidfd", ALL)
                    .with("path", addr as u64)
                    .with("path_len", len as u64),
            };
            match rule.change {
                Change::Set(action) => argument.with("action", action as u64),
                Change::Remove => argument.with("flags", 1),
            }
        }
        Request::Rules(request) => list(Call::Rules, request),
        Request::Stat(request) => list(Call::Stat, request),
        Request::Merge(merge) => range(Call::Merge, merge.pidfd, &merge.range, merge.enable),
        Request::Unmerge(unmerge) => {
            let (pidfd, disable) = (unmerge.pidfd, unmerge.disable);
            range(Call::Unmerge, pidfd, &unmerge.range, disable)
        }
        Request::Why(why) => {
            let argument = Struct::new(layout_of(Call::Why));
            let argument = argument.with("pidfd", why.pidfd as u64);
            argument.with("at", why.at as u64)
        }
    }
}

#[test]
fn any_bytes_are_parsed_or_refused() {
    let mut runner = common::runner(20_000);
    let bytes = prop::collection::vec(any::<u8>(), 0..300);
    let result = runner.run(
        &(call(), bytes, any::<bool>()),
        |(call, mut bytes, sized)| {
            let len = (bytes.len() as u32).to_ne_bytes();
            if let (true, Some(size)) = (sized, bytes.first_chunk_mut()) {
                *size = len;
            }
            if let Err(error) = Request::parse(call, &bytes) {
                prop_assert!([EINVAL, E2BIG].contains(&error));
            }
            Ok(())
        },
    );
    result.unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn what_is_accepted_is_what_was_asked_for() {
    let mut runner = common::runner(40_000);
    let changes = prop::collection::vec((any::<prop::sample::Index>(), number()), 0..4);
    let accepted = std::cell::Cell::new(0);
    let result = runner.run(
        &(call(), changes, any::<bool>()),
        |(call, changes, cgroup)| {
            let mut argument = match call {
                Call::Rule if cgroup => good_cgroup(),
                _ => good(call),
            };
            for (field, value) in changes {
                let (name, ..) = field.get(argument.layout.fields);
                if !["size", "refused"].contains(name) {
                    argument = argument.with(name, value);
                }
            }
            let parsed = parse(call, &argument);
            let Ok(request) = parsed else {
                prop_assert_eq!(parsed, Err(EINVAL));
                return Ok(());
            };
            accepted.set(accepted.get() + 1);
            // The same in the fields that are read, and again the same request.
            let again = encode(&request);
            prop_assert_eq!(parse(call, &again), Ok(request));
            let written: &[&str] = match call {
                Call::Rule => &[],
                Call::Rules | Call::Stat => &["count"],
                Call::Merge => &["at", "scanned", "merged", "zeroed", "bytes_saved"],
                Call::Unmerge => &["at", "pages"],
                Call::Why => &[
                    "flags",
                    "merged",
                    "zero",
                    "pinned",
                    "userfault",
                    "unsplit",
                    "unique",
                    "changing",
                    "fresh",
                ],
            };
            for (name, ..) in argument.layout.fields {
                if !written.contains(name) && *name != "refused" {
                    prop_assert_eq!(again.get(name), argument.get(name), "{}", name);
                }
            }
            Ok(())
        },
    );
    result.unwrap_or_else(|failure| panic!("{failure}"));
    assert!(accepted.get() > 0, "all were refused");
}

/// Sixteen different numbers.
fn sixteen(from: u64) -> [u64; NR_REFUSALS] {
    std::array::from_fn(|i| from + i as u64)
}

/// Any bytes, with a size longer than is known, and the reply in them. Compares every byte.
fn check_reply(call: Call, encode: impl Fn(&mut [u8]), fields: &[(&str, u64)], refused: &[u64]) {
    let layout = layout_of(call);
    for len in [layout.size, layout.size + 11] {
        let argument = Struct {
            layout,
            bytes: (0..len).map(|i| i as u8 ^ 0x5a).collect(),
        };
        let mut reply = argument.clone();
        encode(&mut reply.bytes);
        let mut expected = argument;
        for (name, value) in fields {
            expected = expected.with(name, *value);
        }
        if !refused.is_empty() {
            let field = expected.field("refused");
            let bytes: Vec<_> = refused.iter().flat_map(|n| n.to_ne_bytes()).collect();
            expected.bytes[field].copy_from_slice(&bytes);
        }
        assert_eq!(reply, expected, "{call:?}");
    }
    // Nothing goes behind the end, and no field is written in part.
    for len in 0..layout.size {
        let mut short = vec![0x5a; len];
        encode(&mut short);
        for (_, at, size) in layout.fields.iter().filter(|(name, ..)| *name != "refused") {
            if *at < len && at + size > len {
                assert!(short[*at..].iter().all(|&byte| byte == 0x5a), "{call:?}");
            }
        }
    }
}

#[test]
fn replies_are_written_into_the_argument() {
    let list = ListReply {
        cursor: 0x0123_4567_89ab_cdef,
        count: 0x8765_4321,
    };
    for call in [Call::Rules, Call::Stat] {
        let fields = [("cursor", list.cursor), ("count", list.count.into())];
        check_reply(call, |argument| list.encode(argument), &fields, &[]);
    }
    let merge = MergeReply {
        at: 0x1_0000_0001,
        scanned: 2 << 33,
        merged: 3 << 33,
        zeroed: 4 << 33,
        bytes_saved: -4096,
        refused: sixteen(1 << 40),
    };
    check_reply(
        Call::Merge,
        |argument| merge.encode(argument),
        &[
            ("at", merge.at),
            ("scanned", merge.scanned),
            ("merged", merge.merged),
            ("zeroed", merge.zeroed),
            ("bytes_saved", -4096i64 as u64),
        ],
        &merge.refused,
    );
    let unmerge = UnmergeReply {
        at: ALL,
        pages: 5 << 33,
    };
    check_reply(
        Call::Unmerge,
        |argument| unmerge.encode(argument),
        &[("at", ALL), ("pages", unmerge.pages)],
        &[],
    );
    let why = WhyReply {
        opted: Opted {
            excluded: false,
            merge_any: true,
        },
        at: 1 << 34,
        merged: 2 << 34,
        zero: 3 << 34,
        pinned: 4 << 34,
        unsplit: 6 << 34,
        unique: 7 << 34,
        changing: 8 << 34,
        fresh: 9 << 34,
    };
    check_reply(
        Call::Why,
        |argument| why.encode(argument),
        &[
            ("flags", 2),
            ("at", why.at),
            ("merged", why.merged),
            ("zero", why.zero),
            ("pinned", why.pinned),
            ("unsplit", why.unsplit),
            ("unique", why.unique),
            ("changing", why.changing),
            ("fresh", why.fresh),
        ],
        &[],
    );
}

#[test]
fn a_process_is_one_record() {
    let record = StatRecord {
        opted: Opted {
            excluded: true,
            merge_any: false,
        },
        pid: 42,
        merged: 1 << 33,
        unique: 2 << 33,
        changing: 3 << 33,
        fresh: 4 << 33,
        zero: 5 << 33,
        broken: 6 << 33,
        refused: sixteen(7 << 33),
    };
    let layout = layout("rksm_stat_record");
    let mut bytes = vec![0xff; 200];
    assert_eq!(record.encode(&mut bytes), Some(192));
    assert_eq!(bytes[192..], [0xff; 8]);
    let written = Struct { layout, bytes };
    for (name, value) in [
        ("size", 192),
        ("flags", 1),
        ("pid", 42),
        ("reserved", 0),
        ("merged", record.merged),
        ("unique", record.unique),
        ("changing", record.changing),
        ("fresh", record.fresh),
        ("zero", record.zero),
        ("broken", record.broken),
    ] {
        assert_eq!(written.get(name), value, "{name}");
    }
    assert_eq!(written.refused(), record.refused);

    let mut short = [0xff; 191];
    assert_eq!(record.encode(&mut short), None);
    assert_eq!(short, [0xff; 191]);
}

#[test]
fn a_path_follows_its_rule() {
    for len in (0..20).chain([4094, PATH_LEN_MAX]) {
        let path: Vec<_> = (0..len).map(|i| b'a' + (i % 26) as u8).collect();
        let record = RuleRecord {
            action: Action::Never,
            pid: -7,
            processes: 9,
            path: &path,
        };
        let size = (24 + len).next_multiple_of(8);
        let mut bytes = vec![0xff; size + 3];
        assert_eq!(record.encode(&mut bytes), Some(size));
        assert_eq!(bytes[24..24 + len], path);
        assert!(bytes[24 + len..size].iter().all(|&byte| byte == 0));
        assert_eq!(bytes[size..], [0xff; 3]);
        let layout = layout("rksm_rule_record");
        let written = Struct { layout, bytes };
        for (name, value) in [
            ("size", size as u64),
            ("action", 2),
            ("pid", u64::from(-7i32 as u32)),
            ("path_len", len as u64),
            ("processes", 9),
            ("reserved", 0),
        ] {
            assert_eq!(written.get(name), value, "{name}");
        }
        let mut short = vec![0xff; size - 1];
        assert_eq!(record.encode(&mut short), None);
        assert!(short.iter().all(|&byte| byte == 0xff));
    }
}

fn path(bytes: &[u8]) -> Result<CgroupPath> {
    let mut path = KVec::new();
    path.extend_from_slice(bytes, GFP_KERNEL).unwrap();
    CgroupPath::new(path, GFP_KERNEL)
}

#[test]
fn a_cgroup_has_one_path() {
    for (good, depth) in [
        ("/", 0),
        ("/a", 1),
        ("/a/b", 2),
        ("/system.slice/a b.service", 2),
        ("/...", 1),
        ("/.a/..b/c./d..", 4),
        ("/\u{e4}\\x2d", 1),
        ("/\n", 1),
    ] {
        let path = path(good.as_bytes()).unwrap_or_else(|_| panic!("{good:?}"));
        assert_eq!(path.depth(), depth, "{good:?}");
        assert_eq!(path.as_bytes(), good.as_bytes());
        assert_eq!(path.as_c_str().to_bytes(), good.as_bytes());
    }
    for bad in [
        "", "a", "a/b", "./a", "//", "//a", "/a//b", "/a/", "/a//", "/.", "/..", "/./a", "/a/.",
        "/a/../b", "/a/..", "\0", "/\0", "/a\0", "/a\0b", "\0/a",
    ] {
        assert_eq!(path(bad.as_bytes()), Err(EINVAL), "{bad:?}");
    }
    let long = |len| {
        let mut long = vec![b'x'; len];
        long[0] = b'/';
        long
    };
    assert!(path(&long(PATH_LEN_MAX)).is_ok());
    assert_eq!(path(&long(PATH_LEN_MAX + 1)), Err(EINVAL));
    assert_eq!(path(&b"/x".repeat(2047)).unwrap().depth(), 2047);
}

#[test]
fn a_path_may_find_no_memory() {
    let bytes = || {
        let mut bytes = KVec::with_capacity(2, GFP_KERNEL).unwrap();
        bytes.extend_from_slice(b"/a", GFP_KERNEL).unwrap();
        bytes
    };
    let full = bytes();
    testing::fail(Fail::Once(0));
    assert_eq!(CgroupPath::new(full, GFP_KERNEL), Err(ENOMEM));
    let mut roomy = bytes();
    roomy.reserve(1, GFP_KERNEL).unwrap();
    testing::fail(Fail::From(0));
    let path = CgroupPath::new(roomy, GFP_KERNEL);
    testing::fail(Fail::Never);
    assert_eq!(path.unwrap().as_bytes(), b"/a");
}

#[test]
fn paths_are_those_of_their_components() {
    let mut runner = common::runner(20_000);
    let bytes = prop::collection::vec(prop::sample::select(&b"/.ab\0"[..]), 0..12);
    let result = runner.run(&bytes, |bytes| {
        let text = std::str::from_utf8(&bytes).unwrap();
        let components: Vec<_> = text.split('/').collect();
        let proper = |name: &&str| !["", ".", ".."].contains(name);
        let good = text == "/"
            || components.len() > 1
                && components[0].is_empty()
                && components[1..].iter().all(proper)
                && !text.contains('\0');
        let depth = if text == "/" { 0 } else { components.len() - 1 };
        let expected = if good { Ok(depth) } else { Err(EINVAL) };
        prop_assert_eq!(path(&bytes).map(|path| path.depth()), expected);
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
}
