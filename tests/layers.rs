//! Who may use whom: the table in `docs/architecture.md` and the imports in `src/` are the same.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Modules, each with those that it uses.
type Uses = BTreeMap<String, BTreeSet<String>>;

/// Libraries that speak to the outside world over a network. The device command has none of them.
const NETWORK_CRATES: [&str; 3] = ["paho_mqtt", "openssl", "reqwest"];

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The rows of the table, from the lowest layer to the highest.
fn table() -> Vec<(String, BTreeSet<String>)> {
    let text = fs::read_to_string(repository().join("docs/architecture.md")).unwrap();
    let rows = text.lines().skip_while(|line| !line.starts_with("| module |")).skip(2);
    rows.take_while(|line| line.starts_with('|'))
        .map(|row| {
            let cells: Vec<&str> = row.trim_matches('|').split('|').collect();
            let names = |cell: &str| -> Vec<String> {
                cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
            };
            let [module, uses, ..] = cells.as_slice() else { panic!("{row}") };
            (names(module).join(""), names(uses).into_iter().collect())
        })
        .collect()
}

/// The files of each module of the library.
fn modules() -> BTreeMap<String, Vec<String>> {
    let mut modules = sources();
    modules.remove("bin");
    modules
}

/// The files of each module, and those of the device command as `bin`.
fn sources() -> BTreeMap<String, Vec<String>> {
    let mut modules: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut folders = vec![repository().join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let inside = path.strip_prefix(repository().join("src")).unwrap().to_owned();
            let top = inside.components().next().unwrap().as_os_str().to_str().unwrap();
            let module = top.trim_end_matches(".rs").to_owned();
            if !["lib", "main"].contains(&module.as_str()) {
                modules.entry(module).or_default().push(fs::read_to_string(&path).unwrap());
            }
        }
    }
    modules
}

/// The first names behind each `root::` in the code: of `root::a::B` it is `a`, of
/// `root::{a, b::C}` they are `a` and `b`.
fn names_behind(root: &str, text: &str) -> BTreeSet<String> {
    let code: Vec<&str> =
        text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    let code = code.join("\n");
    let mut found = BTreeSet::new();
    for rest in code.split(&format!("{root}::")).skip(1) {
        let first = |text: &str| -> String {
            text.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
        };
        match rest.strip_prefix('{') {
            Some(list) => found.extend(list.split('}').next().unwrap().split(',').map(first)),
            None => {
                found.insert(first(rest));
            }
        }
    }
    found.remove("");
    found
}

fn uses() -> Uses {
    let modules = modules();
    let names: BTreeSet<&String> = modules.keys().collect();
    let used_by = |module: &String, files: &[String]| -> BTreeSet<String> {
        let used = files.iter().flat_map(|text| names_behind("crate", text));
        used.filter(|name| name != module && names.contains(name)).collect()
    };
    modules.iter().map(|(module, files)| (module.clone(), used_by(module, files))).collect()
}

#[test]
fn the_modules_use_what_the_table_in_the_architecture_says_and_nothing_else() {
    let table: Uses = table().into_iter().collect();
    let found = uses();
    assert_eq!(
        table.keys().collect::<Vec<_>>(),
        found.keys().collect::<Vec<_>>(),
        "the modules in docs/architecture.md and in src/"
    );
    for (module, used) in &found {
        assert_eq!(&table[module], used, "what docs/architecture.md and src/ say `{module}` uses");
    }
}

#[test]
fn no_module_uses_one_of_a_layer_above_it() {
    let mut below = BTreeSet::new();
    for (module, uses) in table() {
        let above: Vec<&String> = uses.difference(&below).collect();
        assert!(above.is_empty(), "`{module}` stands below {above:?}, which it uses");
        below.insert(module);
    }
}

#[test]
fn the_core_reads_no_clock_no_disk_and_no_network() {
    for text in &modules()["update"] {
        let code = text.split("#[cfg(test)]").next().unwrap();
        let used = names_behind("std", code);
        let outside = ["env", "fs", "io", "net", "os", "process", "thread"];
        assert!(!outside.iter().any(|name| used.contains(*name)), "std: {used:?}");
        for name in ["tokio", "tracing", "nix::", "Instant", "SystemTime", "now_utc"] {
            assert!(!code.contains(name), "the core uses {name}");
        }
    }
}

/// Everything that the command reaches, directly or not.
fn reached_by_the_command() -> BTreeSet<String> {
    let uses = uses();
    let mut reached = names_behind("twinboot", &sources()["bin"].concat());
    loop {
        let more: BTreeSet<String> =
            reached.iter().filter_map(|module| uses.get(module)).flatten().cloned().collect();
        let before = reached.len();
        reached.extend(more);
        if reached.len() == before {
            return reached;
        }
    }
}

#[test]
fn the_command_reaches_no_module_that_speaks_over_the_network() {
    let modules = modules();
    for module in reached_by_the_command() {
        let text = modules[&module].concat();
        for name in NETWORK_CRATES {
            assert!(!text.contains(name), "the command reaches `{module}`, which uses {name}");
        }
    }
}

/// What is in the library but not reached is dropped by the linker: here is the proof.
#[test]
fn the_command_links_no_mqtt_no_tls_and_no_http() {
    let holds = |program: &str, text: &str| {
        let grep = Command::new("grep").args(["-q", "-a", "-F", text, program]).status().unwrap();
        // 1: not found; 2: it did not look.
        assert!(matches!(grep.code(), Some(0 | 1)), "grep in {program}: {grep}");
        grep.success()
    };
    for needle in
        ["libssl.so", "libcrypto.so", "Paho Asynchronous MQTT C Client Library", "HTTP/1.1"]
    {
        assert!(!holds(env!("CARGO_BIN_EXE_twinboot"), needle), "twinboot holds {needle}");
        // Otherwise the test would not notice what it looks for.
        assert!(holds(env!("CARGO_BIN_EXE_twinbootd"), needle), "twinbootd holds no {needle}");
    }
}
