// SPDX-License-Identifier: GPL-2.0-only

//! Writes to the files of sysfs: any bytes are taken or refused, and a refusal changes nothing.

#![cfg_attr(fuzzing, no_main)]

use engine_tests::engine::{
    stats::Snapshot,
    sysfs::{
        attribute::{
            Attribute,
            ATTRIBUTES, //
        },
        knobs::{
            Knobs,
            StoreCtx, //
        }, //
    }, //
};

/// What a read of a file shows.
fn show(file: &Attribute, knobs: &Knobs) -> Vec<u8> {
    let line = file.line(knobs, &Snapshot::default());
    line.expect("a line fits").as_bytes().to_vec()
}

/// A byte for the file, one for whether pages are merged, and the length and text of a write, over
/// and over.
fn writes(mut data: &[u8]) {
    let mut knobs = Knobs::default();
    while let [file, merged, len, rest @ ..] = data {
        let (text, rest) = rest.split_at(usize::from(*len).min(rest.len()));
        data = rest;
        let file = ATTRIBUTES[usize::from(*file) % ATTRIBUTES.len()];
        let ctx = StoreCtx {
            pages_shared: u64::from(merged % 2),
            cpus: 4,
        };
        let before = knobs;
        let change = file.parse(text);
        if change.and_then(|change| knobs.apply(change, &ctx)).is_err() {
            assert_eq!(knobs, before, "a refused write has changed something");
        }
        let shown = show(file, &knobs);
        assert_eq!(shown.last(), Some(&b'\n'));
        // What is shown can be written back, and changes nothing. Words are shown among others.
        if file.store.is_some() && !shown.contains(&b'[') {
            let before = knobs;
            let change = file.parse(&shown).expect("what is shown can be parsed");
            let _ = knobs.apply(change, &ctx);
            assert_eq!(knobs, before, "{:?} is not what was written", file.name);
        }
    }
}

fuzz::target!(writes);
