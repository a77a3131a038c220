// SPDX-License-Identifier: GPL-2.0-only

//! Makes one copy of the engine's registry as it is, and one for each fix that is taken out.
//!
//! The engine itself knows nothing of this: a patch of `tools/testing/races` takes the fix out,
//! of which the models need what it changes in the files below. The build fails if that does not
//! apply. What a scenario is to find then stands in the patch's head, as `model: SCENARIO: TEXT`.

use std::{
    env,
    fmt::Write,
    fs,
    path::{
        Path,
        PathBuf, //
    },
    process::Command, //
};

/// The project's files that the models run: some of the engine, and the threads that run them.
const FILES: [&str; 15] = [
    "rust/engine/types/mod.rs",
    "rust/engine/types/fingerprint.rs",
    "rust/engine/types/id.rs",
    "rust/engine/types/mm_pin.rs",
    "rust/engine/types/progress.rs",
    "rust/engine/types/refusal.rs",
    "rust/engine/governor/budget.rs",
    "rust/engine/governor/mod.rs",
    "rust/engine/governor/nap.rs",
    "rust/engine/governor/pause.rs",
    "rust/engine/governor/queue.rs",
    "rust/engine/governor/watch.rs",
    "rust/engine/registry.rs",
    "rust/engine/mm_list.rs",
    "tools/testing/host/models/src/threads.rs",
];

fn main() {
    let here = env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let top = Path::new(&here).join("../../../..");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let out = Path::new(&out);
    let races = top.join("tools/testing/races");
    for path in FILES
        .iter()
        .map(|file| top.join(file))
        .chain([races.clone()])
    {
        println!("cargo::rerun-if-changed={}", path.display());
    }

    let mut modules = String::new();
    let mut tests = String::new();
    write_variant(&top, out, "fixed", "The engine as it is.", &mut modules);
    let mut patches: Vec<_> = fs::read_dir(&races)
        .unwrap_or_else(|err| panic!("cannot read {}: {err}", races.display()))
        .map(|entry| entry.expect("the folder can be read").path())
        .filter(|path| path.extension().is_some_and(|it| it == "patch"))
        .collect();
    patches.sort();
    for path in patches {
        let text = fs::read_to_string(&path).expect("a patch can be read");
        let name = path.file_stem().expect("it has a name").to_string_lossy();
        let name = name.replace('-', "_");
        let (head, body) = text.split_at(text.find("\n--- ").expect("a patch changes a file") + 1);
        let doc = head.lines().next().unwrap_or_default();
        let dir = write_variant(&top, out, &name, doc, &mut modules);
        apply(&dir, &name, body);
        write_tests(&name, head, &mut tests);
    }
    fs::write(out.join("variants.rs"), modules).expect("OUT_DIR can be written to");
    fs::write(out.join("without_fix.rs"), tests).expect("OUT_DIR can be written to");
}

/// Copies the files for one variant, and writes the modules that have them.
fn write_variant(top: &Path, out: &Path, name: &str, doc: &str, modules: &mut String) -> PathBuf {
    let dir = out.join(name);
    writeln!(modules, "/// {doc}\npub mod {name} {{").unwrap();
    for file in FILES {
        let to = dir.join(file);
        fs::create_dir_all(to.parent().unwrap()).expect("OUT_DIR can be written to");
        let text = fs::read_to_string(top.join(file))
            .unwrap_or_else(|err| panic!("cannot read {file}: {err}"))
            // The engine's examples are tests of the engine, and not once more of each variant.
            .replace("//! ```\n//! use engine", "//! ```text\n//! use engine");
        fs::write(&to, text).expect("OUT_DIR can be written to");
        // A folder's files are found by its `mod.rs`.
        let module = file.trim_end_matches("/mod.rs").trim_end_matches(".rs");
        let module = module.trim_start_matches("rust/engine/");
        let module = module.trim_start_matches("tools/testing/host/models/src/");
        if !module.contains('/') {
            writeln!(modules, "    #[path = {to:?}]\n    pub mod {module};").unwrap();
        }
    }
    modules.push_str("}\n\n");
    dir
}

/// Applies what a patch changes in [`FILES`].
fn apply(dir: &Path, name: &str, body: &str) {
    let mut ours = String::new();
    let mut taken = false;
    for line in body.lines() {
        if let Some(file) = line.strip_prefix("--- a/") {
            taken = FILES.contains(&file);
        }
        if taken {
            writeln!(ours, "{line}").unwrap();
        }
    }
    let path = dir.join("patch");
    fs::write(&path, ours).expect("OUT_DIR can be written to");
    let result = Command::new("patch")
        .args([
            "-p1",
            "--batch",
            "--forward",
            "--no-backup-if-mismatch",
            "-d",
        ])
        .args([dir, Path::new("-i"), &path])
        .output()
        .expect("patch is installed");
    assert!(
        result.status.success(),
        "models: the fix '{name}' cannot be taken out:\n{}",
        String::from_utf8_lossy(&result.stdout)
    );
}

/// Writes a test for each scenario that finds the fix missing.
fn write_tests(name: &str, head: &str, tests: &mut String) {
    let mut scenarios = 0;
    writeln!(tests, "mod without_{name} {{").unwrap();
    for line in head.lines() {
        let Some((scenario, expected)) = line
            .strip_prefix("model: ")
            .and_then(|rest| rest.split_once(": "))
        else {
            continue;
        };
        writeln!(
            tests,
            "    #[test]\n    fn {scenario}() {{\n        super::fails(\n            \
             \"{scenario} without {name}\",\n            \
             models::{name}::threads::{scenario},\n            {expected:?},\n        );\n    }}"
        )
        .unwrap();
        scenarios += 1;
    }
    tests.push_str("}\n\n");
    assert!(scenarios != 0, "models: no scenario finds '{name}'");
}
