// SPDX-License-Identifier: GPL-2.0-only

//! Calls of `/dev/rksm`: any bytes are taken or refused, and a reply changes nothing but its own
//! fields.

#![cfg_attr(fuzzing, no_main)]

use engine_tests::engine::control::{
    cgroup_path::{
        CgroupPath,
        PATH_LEN_MAX, //
    },
    reply::{
        ListReply,
        MergeReply,
        RuleRecord,
        UnmergeReply,
        WhyReply, //
    },
    request::{
        Call,
        Request,
        Subject, //
    },
    rules::Action, //
};

use kernel::{
    alloc::{
        flags::GFP_KERNEL,
        KVec, //
    },
    page::PAGE_SIZE, //
};

/// A number, and an argument that says its size itself.
fn call(data: &[u8]) {
    let Some((cmd, argument)) = data.split_first_chunk() else {
        return;
    };
    let cmd = u32::from_ne_bytes(*cmd);
    // Most numbers are no call's.
    let known = usize::try_from(cmd).expect("64 bits") % Call::ALL.len();
    let call = Call::from_cmd(cmd).unwrap_or(Call::ALL[known]);
    let Some(size) = argument.first_chunk() else {
        return;
    };
    let Ok(size) = call.check_size(u32::from_ne_bytes(*size)) else {
        assert!(Request::parse(call, argument).is_err());
        return;
    };
    assert!((call.first_size()..=PAGE_SIZE).contains(&size));
    let mut argument = argument.to_vec();
    argument.resize(size, 0);
    let Ok(request) = Request::parse(call, &argument) else {
        return;
    };
    match &request {
        Request::Rule(rule) => {
            if let Subject::Cgroup { addr, len } = rule.subject {
                assert!(addr != 0 && (1..=PATH_LEN_MAX).contains(&len));
            }
        }
        Request::Rules(list) | Request::Stat(list) => {
            assert!(list.len > 0);
            ListReply::default().encode(&mut argument);
        }
        Request::Merge(merge) => {
            assert!(!merge.range.is_empty() && merge.range.start % PAGE_SIZE == 0);
            MergeReply::default().encode(&mut argument);
        }
        Request::Unmerge(unmerge) => {
            assert!(!unmerge.range.is_empty() && unmerge.range.start % PAGE_SIZE == 0);
            UnmergeReply::default().encode(&mut argument);
        }
        Request::Why(why) => {
            assert!(why.pidfd >= 0);
            let at = u64::try_from(why.at).expect("64 bits");
            let reply = WhyReply {
                at,
                ..WhyReply::default()
            };
            reply.encode(&mut argument);
        }
    }
    // Only a list's cursor is read again.
    match (Request::parse(call, &argument), request) {
        (Ok(Request::Rules(_)), Request::Rules(_)) | (Ok(Request::Stat(_)), Request::Stat(_)) => {}
        (again, request) => assert_eq!(again, Ok(request), "a reply has changed the request"),
    }
}

/// A path, as a program passes it.
fn path(data: &[u8]) {
    let mut path = KVec::new();
    path.extend_from_slice(data, GFP_KERNEL).expect("memory");
    let Ok(path) = CgroupPath::new(path, GFP_KERNEL) else {
        return;
    };
    assert_eq!(path.as_bytes(), data);
    assert_eq!(path.as_c_str().to_bytes(), data);
    assert!(data.starts_with(b"/") && data.len() <= PATH_LEN_MAX);
    assert!(path.depth() <= PATH_LEN_MAX / 2 + 1);
    let record = RuleRecord {
        action: Action::Never,
        pid: 0,
        processes: 0,
        path: data,
    };
    let size = record.encode(&mut [0; 8192]).expect("there is room");
    assert!(size % 8 == 0 && size >= data.len());
}

fn run(data: &[u8]) {
    call(data);
    path(data);
}

fuzz::target!(run);
