// SPDX-License-Identifier: GPL-2.0-only

//! The header of `/dev/rksm` for C programs against what the engine makes of their bytes.

use engine_tests::engine::{
    control::{
        layout::{
            self,
            LAYOUTS,
            NR_REFUSALS, //
        },
        request::Call,
        rules::Action, //
    },
    types::{
        Refusal,
        Refusals, //
    }, //
};
use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf, //
};

use kernel::error::code::EINVAL;

/// A struct: its name, its size, and the names, offsets and sizes of its fields.
type Struct = (String, usize, Vec<(String, usize, usize)>);

/// What a header says.
#[derive(Debug, Default)]
struct Header {
    structs: Vec<Struct>,
    numbers: BTreeMap<String, u64>,
    names: Vec<String>,
}

impl Header {
    /// As `cc` would, where every field is an integer or an array of integers.
    fn parse(text: &str) -> Self {
        let mut header = Self::default();
        let mut code = String::new();
        for (i, part) in text.replace("\\\n", " ").split("/*").enumerate() {
            let after = if i == 0 {
                0
            } else {
                part.find("*/").unwrap() + 2
            };
            code.push_str(&part[after..]);
        }
        for line in code.lines() {
            if let Some((name, value)) = line
                .strip_prefix("#define ")
                .and_then(|rest| rest.split_once(' '))
            {
                if name == "RKSM_REFUSALS" {
                    header.names = value
                        .split('"')
                        .skip(1)
                        .step_by(2)
                        .map(Into::into)
                        .collect();
                } else {
                    let value = header.value(value);
                    header.numbers.insert(name.to_owned(), value);
                }
            }
        }
        for text in code.split("\nstruct ").skip(1) {
            let (name, rest) = text.split_once(" {").unwrap();
            let (fields, _) = rest.split_once("};").unwrap();
            let (mut at, mut align, mut found) = (0usize, 1, Vec::new());
            for field in fields.split(';').map(str::trim).filter(|f| !f.is_empty()) {
                let (kind, field) = field.split_once(' ').unwrap();
                let width = match kind {
                    "__u32" | "__s32" => 4,
                    "__u64" | "__s64" => 8,
                    _ => panic!("{name}: {kind}"),
                };
                let (field, number) = match field.split_once('[') {
                    Some((field, number)) => (field, header.value(number.trim_end_matches(']'))),
                    None => (field, 1),
                };
                at = at.next_multiple_of(width);
                align = align.max(width);
                let size = width * number as usize;
                found.push((field.to_owned(), at, size));
                at += size;
            }
            let size = at.next_multiple_of(align);
            header.structs.push((name.to_owned(), size, found));
        }
        header
    }

    fn value(&self, text: &str) -> u64 {
        let text = text.trim();
        if let Some(number) = text.strip_prefix("(1 << ") {
            return 1 << self.value(number.strip_suffix(')').unwrap());
        }
        if let Some(call) = text.strip_prefix("_IO(") {
            let (magic, nr) = call.strip_suffix(')').unwrap().split_once(',').unwrap();
            return self.value(magic) << 8 | self.value(nr);
        }
        match text.strip_prefix("0x") {
            Some(number) => u64::from_str_radix(number, 16).unwrap(),
            None => text.parse().unwrap_or_else(|_| self.numbers[text]),
        }
    }
}

/// None where the tests run on a copy of the engine alone.
fn header() -> Option<Header> {
    let top = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../..");
    top.join("rust/rksm_main.rs").exists().then(|| {
        let path = top.join("tools/include/uapi/linux/rksm.h");
        Header::parse(&fs::read_to_string(path).unwrap())
    })
}

#[test]
fn the_header_has_the_same_structs() {
    let Some(header) = header() else {
        return;
    };
    let ours: Vec<_> = LAYOUTS
        .iter()
        .map(|layout| {
            let fields = layout.fields.iter();
            let fields = fields.map(|&(name, at, size)| (name.to_owned(), at, size));
            (layout.name.to_owned(), layout.size, fields.collect())
        })
        .collect();
    assert_eq!(header.structs, ours);
    // What is between fields would go to programs as it was.
    for layout in LAYOUTS {
        let sizes: usize = layout.fields.iter().map(|(.., size)| size).sum();
        assert_eq!(sizes, layout.size, "{}", layout.name);
        assert_eq!(layout.size % 8, 0, "{}", layout.name);
    }
}

#[test]
fn the_header_has_the_same_numbers() {
    let Some(mut header) = header() else {
        return;
    };
    let mut expected = vec![
        ("RKSM_IOC_MAGIC", 0xBD),
        ("RKSM_RULE_REMOVE", layout::RULE_REMOVE.into()),
        ("RKSM_STAT_EXCLUDED", layout::STAT_EXCLUDED.into()),
        ("RKSM_STAT_MERGE_ANY", layout::STAT_MERGE_ANY.into()),
        ("RKSM_MERGE_ENABLE", layout::MERGE_ENABLE.into()),
        ("RKSM_UNMERGE_DISABLE", layout::UNMERGE_DISABLE.into()),
        ("RKSM_NR_REFUSALS", NR_REFUSALS as u64),
    ];
    for (name, call) in [
        ("RKSM_IOC_RULE", Call::Rule),
        ("RKSM_IOC_RULES", Call::Rules),
        ("RKSM_IOC_MERGE", Call::Merge),
        ("RKSM_IOC_UNMERGE", Call::Unmerge),
        ("RKSM_IOC_STAT", Call::Stat),
        ("RKSM_IOC_WHY", Call::Why),
    ] {
        expected.push((name, call.cmd().into()));
    }
    for (name, action) in [
        ("RKSM_RULE_DEFAULT", Action::Default),
        ("RKSM_RULE_ALWAYS", Action::Always),
        ("RKSM_RULE_NEVER", Action::Never),
    ] {
        assert_eq!(Action::from_raw(action as u32), Ok(action));
        expected.push((name, action as u64));
    }
    assert_eq!(Action::from_raw(3), Err(EINVAL));
    for (name, value) in expected {
        assert_eq!(header.numbers.remove(name), Some(value), "{name}");
    }
    assert!(header.numbers.is_empty(), "{:?}", header.numbers);
}

#[test]
fn refusals_are_in_the_order_of_the_counters() {
    let mut refusals = Refusals::default();
    for (times, &refusal) in Refusal::ALL.iter().enumerate() {
        (0..=times).for_each(|_| refusals.count(refusal));
    }
    let known = Refusal::ALL.len();
    let refused = layout::refused(&refusals);
    assert!(refused[..known].iter().copied().eq(1..=known as u64));
    assert!(refused[known..].iter().all(|&count| count == 0));
    if let Some(header) = header() {
        let names = Refusal::ALL.iter().map(|refusal| refusal.name());
        let names: Vec<_> = names.map(|name| name.to_str().unwrap()).collect();
        assert_eq!(header.names, names);
    }
}
