// SPDX-License-Identifier: GPL-2.0-only

//! Makes one copy of the engine's registry as it is, and one for each fix that is taken out.
//!
//! The engine itself knows nothing of this: a fix is taken out by replacing a piece of its text,
//! and the build fails if that piece is not there any more.

use std::{
    env,
    fmt::Write,
    fs,
    path::Path, //
};

/// The engine's files that the models run, and the threads that run them.
const ENGINE: [&str; 8] = [
    "types/mod",
    "types/fingerprint",
    "types/id",
    "types/mm_pin",
    "types/progress",
    "types/refusal",
    "registry",
    "mm_list",
];
const THREADS: &str = "threads";

/// A piece of text in one of the files, and what takes its place.
struct Edit {
    file: &'static str,
    from: &'static str,
    to: &'static str,
}

/// A fix that is taken out.
struct Break {
    name: &'static str,
    doc: &'static str,
    edits: &'static [Edit],
}

const BREAKS: &[Break] = &[
    Break {
        name: "unlock_order",
        doc: "Lesson 1: the scanner relies on the slot's pin, and drops the mmap lock after the registry's.",
        edits: &[
            Edit {
                file: "types/mm_pin",
                from: "pub trait MmPin: Sized {",
                to: "pub trait MmPin: Sized + crate::sim::Borrowed {",
            },
            Edit {
                file: "registry",
                from: "slot.mm.as_ref().map(M::clone_pin) else {\n            return Next::Idle;",
                to: "slot.mm.as_ref().map(M::borrowed) else {\n            return Next::Idle;",
            },
            Edit {
                file: THREADS,
                from: "    tracked: BTreeMap<SlotId, usize>,\n}",
                to: "    tracked: BTreeMap<SlotId, usize>,\n    kept: Option<MmapRead>,\n}",
            },
            Edit {
                file: THREADS,
                from: "drop(space);\n    visited",
                to: "engine.kept = Some(space);\n    visited",
            },
            Edit {
                file: THREADS,
                from: "// The mmap lock was dropped in there.",
                to: "engine.kept = None;",
            },
        ],
    },
    Break {
        name: "exit_check",
        doc: "Lesson 2: whether the mm is exiting is looked at before the mmap lock is there.",
        edits: &[Edit {
            file: THREADS,
            from: "let space = mm.mmap_read_lock();\n    let live = !mm.exiting();",
            to: "let live = !mm.exiting();\n    let space = mm.mmap_read_lock();",
        }],
    },
    Break {
        name: "two_deletions",
        doc: "Lesson 3: exit finds the slot under the lock, and removes it under the lock again.",
        edits: &[
            Edit {
                file: "registry",
                from: "pub fn exit(&mut self, key: usize) -> Exit<M> {\n        let Some(id) = self.find(key) else {\n            return Exit::NotFound;\n        };",
                to: "pub fn exit(&mut self, id: u32) -> Exit<M> {",
            },
            Edit {
                file: "registry",
                from: "    fn find(&self, key: usize) -> Option<u32> {",
                to: "    pub fn find(&self, key: usize) -> Option<u32> {",
            },
            Edit {
                file: "mm_list",
                from: "match self.locked(|registry| registry.exit(key)) {",
                to: "let Some(id) = self.locked(|registry| registry.find(key)) else {\n            return false;\n        };\n        match self.locked(|registry| registry.exit(id)) {",
            },
        ],
    },
    Break {
        name: "exit_waits",
        doc: "Lesson 4: exit waits until the scanner is done with the mm.",
        edits: &[
            Edit {
                file: "mm_list",
                from: "    type Mm: MmPin;",
                to: "    type Mm: MmPin;\n\n    /// Waits.\n    fn wait(&self);",
            },
            Edit {
                file: "mm_list",
                from: "Exit::Deferred { reap } => reap,",
                to: "Exit::Deferred { reap } => {\n                self.wait();\n                reap\n            }",
            },
            Edit {
                file: THREADS,
                from: "    type Mm = Pin;",
                to: "    type Mm = Pin;\n\n    fn wait(&self) {\n        drop(self.engine.lock().unwrap());\n    }",
            },
        ],
    },
    Break {
        name: "late_reference",
        doc: "Lesson 5: the anon_vma is referenced after the rmap item is on its list.",
        edits: &[Edit {
            file: THREADS,
            from: "let item = Item::new(anon_vma);\n    node.lock().unwrap().push(anon_vma);\n    drop(space);\n    item",
            to: "node.lock().unwrap().push(anon_vma);\n    drop(space);\n    Item::new(anon_vma)",
        }],
    },
    Break {
        name: "uncounted_claim",
        doc: "Exit frees a slot although the scanner works on it.",
        edits: &[Edit {
            file: "registry",
            from: "slot.claims += 1;",
            to: "",
        }],
    },
    Break {
        name: "late_enter",
        doc: "An mm is registered after its exit was reported.",
        edits: &[Edit {
            file: "registry",
            from: "if mm.exiting() {",
            to: "if false {",
        }],
    },
    Break {
        name: "enter_behind_unmerge",
        doc: "A child that is forked while everything is unmerged goes behind the cursor.",
        edits: &[Edit {
            file: "registry",
            from: "if self.unmerging { NIL } else { self.cursor }",
            to: "self.cursor",
        }],
    },
    Break {
        name: "drop_under_lock",
        doc: "An mm is dropped under the registry's lock.",
        edits: &[Edit {
            file: "mm_list",
            from: "drop(self.locked(|registry| registry.free(dead)));",
            to: "self.locked(|registry| drop(registry.free(dead)));",
        }],
    },
    Break {
        name: "forgotten_mm",
        doc: "An mm that found no room is not remembered.",
        edits: &[Edit {
            file: "registry",
            from: "self.missed = true;\n            return Enter::NoRoom(mm);",
            to: "return Enter::NoRoom(mm);",
        }],
    },
];

fn main() {
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let out = Path::new(&out);
    let here = env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let here = Path::new(&here);
    let engine = here.join("../../../../rust/engine");

    let mut files: Vec<(&str, String)> = Vec::new();
    for (name, dir) in ENGINE
        .iter()
        .map(|name| (*name, engine.as_path()))
        .chain([(THREADS, here.join("src").as_path())])
    {
        let path = dir.join(name).with_extension("rs");
        println!("cargo::rerun-if-changed={}", path.display());
        let text = fs::read_to_string(&path)
            .unwrap_or_else(|err| panic!("cannot read {}: {err}", path.display()));
        files.push((name, text));
    }

    let mut modules = String::new();
    let fixed = Break {
        name: "fixed",
        doc: "The engine as it is.",
        edits: &[],
    };
    for variant in [&fixed].into_iter().chain(BREAKS) {
        write_variant(out, variant, &files, &mut modules);
    }
    fs::write(out.join("variants.rs"), modules).expect("OUT_DIR can be written to");
}

/// Writes the files of one variant, and the modules that have them.
fn write_variant(out: &Path, variant: &Break, files: &[(&str, String)], modules: &mut String) {
    let dir = out.join(variant.name);
    fs::create_dir_all(&dir).expect("OUT_DIR can be written to");
    writeln!(modules, "/// {}\npub mod {} {{", variant.doc, variant.name).unwrap();
    for (name, text) in files {
        let mut text = text.clone();
        for edit in variant.edits.iter().filter(|edit| edit.file == *name) {
            let found = text.matches(edit.from).count();
            assert!(
                found == 1,
                "models: to take out the fix '{}', this was looked for in {name}.rs and found {found} times:\n{}",
                variant.name,
                edit.from
            );
            text = text.replace(edit.from, edit.to);
        }
        let path = dir.join(name).with_extension("rs");
        fs::create_dir_all(path.parent().unwrap()).expect("OUT_DIR can be written to");
        fs::write(&path, text).expect("OUT_DIR can be written to");
        // A folder's files are found by its `mod.rs`.
        let module = name.strip_suffix("/mod").unwrap_or(name);
        if !module.contains('/') {
            writeln!(modules, "    #[path = {path:?}]\n    pub mod {module};").unwrap();
        }
    }
    modules.push_str("}\n\n");
}
