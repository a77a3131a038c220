// SPDX-License-Identifier: GPL-2.0-only

//! The blocks of the files against everything that has to agree with them: the list, the parameters
//! of the module, the ABI documents, the administration guide.

use engine_tests::engine::{
    stats::Snapshot,
    sysfs::{
        attribute::{
            Attribute,
            Origin,
            ATTRIBUTES,
            RELEASE, //
        },
        knobs::Knobs, //
    },
    types::Refusal, //
};
use std::{
    collections::{
        BTreeMap,
        BTreeSet, //
    },
    fs,
    path::PathBuf, //
};

/// A file of the tree. None where the tests run on a copy of the engine alone.
fn tree(path: &str) -> Option<String> {
    let top = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../..");
    top.join("rust/rksm_main.rs").exists().then(|| {
        fs::read_to_string(top.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    })
}

fn name(file: &Attribute) -> &str {
    file.name.to_str().unwrap()
}

fn names(wanted: impl Fn(&Attribute) -> bool) -> BTreeSet<String> {
    let wanted = ATTRIBUTES.iter().filter(|file| wanted(file));
    wanted.map(|file| name(file).to_owned()).collect()
}

#[test]
fn every_block_is_in_the_list() {
    let Some(source) = tree("rust/engine/sysfs/attribute.rs") else {
        return;
    };
    let blocks: Vec<_> = source
        .lines()
        .filter_map(|line| {
            line.strip_prefix("pub static ")?
                .strip_suffix(": Attribute = Attribute {")
        })
        .map(str::to_lowercase)
        .collect();
    let listed: Vec<_> = ATTRIBUTES.iter().map(|file| name(file)).collect();
    assert_eq!(listed, blocks, "in the order of the blocks");
}

#[test]
fn the_module_has_the_parameters_that_the_blocks_say() {
    let Some(source) = tree("rust/rksm_main.rs") else {
        return;
    };
    let (_, params) = source.split_once("    params: {").unwrap();
    let (params, _) = params.split_once("\n    },").unwrap();
    let there: BTreeSet<_> = params
        .lines()
        .filter_map(|line| line.strip_suffix(" {")?.trim().split_once(": "))
        .map(|(name, _)| name.to_owned())
        .filter(|name| name != "delay")
        .collect();
    assert_eq!(there, names(|file| file.parameter));
    for name in there {
        let source: String = source.split_whitespace().collect();
        let (_, used) = source
            .split_once(&format!("(&attribute::{},", name.to_uppercase()))
            .unwrap_or_else(|| panic!("{name} is not set at the load"));
        let value = used.split("(&attribute::").next().unwrap();
        let value = value.split("];").next().unwrap();
        assert!(
            value.contains(&format!("module_parameters::{name}.value()")),
            "{name} is set to {value}"
        );
    }
}

/// What an ABI document says of each file in `dir`, in one line.
fn abi(path: &str, dir: &str) -> Option<BTreeMap<String, String>> {
    let text = tree(path)?;
    let mut files = BTreeMap::new();
    for entry in text.split("\nWhat:").skip(1) {
        let (what, rest) = entry.split_once('\n').unwrap();
        let name = what.trim().strip_prefix(dir).expect("another directory");
        for tag in ["Date:", "KernelVersion:", "Contact:"] {
            assert!(rest.contains(&format!("{tag}\t")), "{name} lacks {tag}");
        }
        let (_, doc) = rest.split_once("Description:").unwrap();
        let doc = doc.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(files.insert(name.to_owned(), doc).is_none(), "{name} twice");
    }
    Some(files)
}

#[test]
fn the_abi_documents_say_what_the_blocks_say() {
    for (path, dir, origin) in [
        (
            "Documentation/ABI/testing/sysfs-kernel-mm-ksm",
            "/sys/kernel/mm/ksm/",
            Origin::Builtin,
        ),
        (
            "Documentation/ABI/testing/sysfs-kernel-mm-rksm",
            "/sys/kernel/mm/rksm/",
            Origin::Rksm,
        ),
    ] {
        let Some(mut files) = abi(path, dir) else {
            return;
        };
        for file in ATTRIBUTES.iter().filter(|file| file.origin == origin) {
            let access = if file.store.is_some() { "RW" } else { "RO" };
            let expected = format!("({access}) {}", file.doc);
            assert_eq!(files.remove(name(file)), Some(expected), "{file:?}");
        }
        if origin == Origin::Rksm {
            for refusal in Refusal::ALL {
                let name = format!("refused/{}", refusal.name().to_str().unwrap());
                let doc = files.remove(&name);
                assert!(doc.is_some_and(|doc| doc.starts_with("(RO) ")), "{name}");
            }
        }
        assert!(files.is_empty(), "there are no such files: {files:?}");
    }
}

/// The cells of a row of a table.
fn cells(row: &str) -> Vec<&str> {
    row.trim_matches('|').split(" | ").map(str::trim).collect()
}

/// The words in back quotes.
fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

#[test]
fn the_guide_has_every_file_with_its_default() {
    let Some(guide) = tree("Documentation/operating/admin-guide.md") else {
        return;
    };
    let mut told = BTreeSet::new();
    // Whether this is a table of files, and whether with their defaults.
    let (mut of_files, mut has_default) = (false, false);
    for row in guide.lines() {
        let cells = cells(row);
        if !row.starts_with('|') {
            of_files = false;
        } else if cells[0] == "file" {
            (of_files, has_default) = (true, cells[1] == "default");
        }
        if !of_files {
            continue;
        }
        for file in quoted(cells[0]) {
            let Some(file) = ATTRIBUTES.iter().find(|known| name(known) == file) else {
                assert!(file.starts_with("refused/"), "there is no file {file}");
                continue;
            };
            assert!(told.insert(name(file).to_owned()), "{file:?} twice");
            assert_eq!(has_default, file.store.is_some(), "{file:?}");
            if has_default {
                let line = file.line(&Knobs::new(), &Snapshot::default()).unwrap();
                let shown = std::str::from_utf8(line.as_bytes()).unwrap().trim_end();
                let shown = shown
                    .find('[')
                    .map_or(shown, |at| shown[at + 1..].split(']').next().unwrap());
                assert_eq!(cells[1].trim_matches('`'), shown, "{file:?}");
            }
        }
    }
    assert_eq!(told, names(|_| true));
}

#[test]
fn the_version_is_that_of_the_changelog() {
    assert!(
        RELEASE.split('.').count() == 3 && RELEASE.split('.').all(|n| n.parse::<u32>().is_ok())
    );
    let Some(log) = tree("CHANGELOG.md") else {
        return;
    };
    let first = log.lines().find(|line| line.starts_with("## ")).unwrap();
    assert!(first.contains(RELEASE), "{first}, not {RELEASE}");
}
