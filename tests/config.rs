//! The shipped configuration, the documentation and the program know the same keys.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use twinboot::config::Config;

const SHIPPED: &str = include_str!("../config/twinboot.toml");
const MANUAL: &str = include_str!("../docs/configuration.md");

/// Every `section.key` of the shipped file with its value; `None` where the value is an example.
fn shipped() -> BTreeMap<String, Option<String>> {
    let mut section = String::new();
    let mut keys = BTreeMap::new();
    for line in SHIPPED.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']').to_owned();
        } else if let Some((key, value)) = setting(line) {
            let value = if value.contains(" # not set") { None } else { Some(value) };
            keys.insert(format!("{section}.{key}"), value.map(|value| value.trim().to_owned()));
        }
    }
    keys
}

/// `#key = value` or `key = value`; sentences are none.
fn setting(line: &str) -> Option<(&str, &str)> {
    let line = line.strip_prefix('#').unwrap_or(line);
    let (key, value) = line.split_once(" = ")?;
    key.chars().all(|c| c.is_ascii_lowercase() || c == '_').then_some((key, value))
}

/// Every key that the program knows, as it lists them itself when it meets a wrong one.
fn known(section: &str, keys: &mut BTreeSet<String>) {
    let header = if section.is_empty() { String::new() } else { format!("[{section}]\n") };
    let error = Config::parse(&format!("{header}no_such_key = 1\n")).unwrap_err().to_string();
    let list = error.split_once("expected ").unwrap_or_else(|| panic!("{error}")).1;
    for name in list.split('`').skip(1).step_by(2) {
        let path = if section.is_empty() { name.to_owned() } else { format!("{section}.{name}") };
        let as_table = Config::parse(&format!("[{path}]\nno_such_key = 1\n"));
        if as_table.unwrap_err().to_string().contains("unknown field `no_such_key`") {
            known(&path, keys);
        } else {
            keys.insert(path);
        }
    }
}

#[test]
fn the_shipped_file_is_good_and_names_every_key() {
    Config::parse(SHIPPED).unwrap();
    let mut keys = BTreeSet::new();
    known("", &mut keys);
    assert_eq!(shipped().into_keys().collect::<BTreeSet<_>>(), keys);
}

#[test]
fn the_shipped_file_shows_the_defaults() {
    let mut text = String::new();
    for line in SHIPPED.lines() {
        match setting(line) {
            Some((_, value)) if value.contains(" # not set") => {}
            Some((key, value)) => text.push_str(&format!("{key} = {value}\n")),
            None => text.push_str(&format!("{line}\n")),
        }
    }
    let shown = Config::parse(&text).unwrap();
    assert_eq!(format!("{shown:#?}"), format!("{:#?}", Config::default()));
}

#[test]
fn every_example_of_an_unset_key_is_a_good_value() {
    let text: String = SHIPPED
        .lines()
        .map(|line| match setting(line) {
            Some((key, value)) => format!("{key} = {value}\n"),
            None => format!("{line}\n"),
        })
        .collect();
    Config::parse(&text).unwrap();
}

#[test]
fn the_manual_names_every_key_with_its_default() {
    let mut manual = BTreeMap::new();
    for row in MANUAL.lines().filter_map(|line| line.strip_prefix("| `")) {
        let mut cells = row.split(" | ");
        let key = cells.next().unwrap().trim_end_matches('`').to_owned();
        let default = cells.next().unwrap();
        let default = default.strip_prefix('`').and_then(|text| text.strip_suffix('`'));
        let (range, meaning) = (cells.next().unwrap(), cells.next().unwrap());
        assert!(!range.is_empty() && meaning.len() > 10, "{key}: say the range and the meaning");
        manual.insert(key, default.map(str::to_owned));
    }
    assert_eq!(manual, shipped());
}

#[test]
fn ranges_in_the_manual_are_those_of_the_program() {
    let mut checked = 0;
    for row in MANUAL.lines().filter_map(|line| line.strip_prefix("| `")) {
        let cells: Vec<&str> = row.split(" | ").collect();
        let key = cells[0].trim_end_matches('`');
        let Some((low, high)) = cells[2].split_once(" to ") else { continue };
        let (section, name) = key.rsplit_once('.').unwrap();
        let (low, high): (i64, i64) = (low.parse().unwrap(), high.parse().unwrap());
        let good = |value: i64| Config::parse(&format!("[{section}]\n{name} = {value}\n")).is_ok();
        assert!(good(low) && good(high) && !good(high + 1) && !good(low - 1), "{key}");
        checked += 1;
    }
    assert!(checked > 20);
}

#[test]
fn refuses_what_it_cannot_use_and_says_why() {
    for (text, complaints) in [
        (
            "[update]\ntrial_limit_s = 1",
            &["line 2", "`update.trial_limit_s`", "`1`", "from 5 to 86400 (seconds)"][..],
        ),
        ("[update]\nmax_attempts = \"many\"", &["`update.max_attempts`", "many", "from 1 to 100"]),
        ("[update]\ntrail_limit_s = 60", &["line 2", "`trail_limit_s`", "`trial_limit_s`"]),
        ("[hub]\nport = 70000", &["`hub.port`", "`70000`", "from 1 to 65535"]),
        (
            "[hub]\ntransport = \"amqp\"",
            &["`hub.transport`", "unknown variant `amqp`", "`tcp`", "`websocket`"],
        ),
        ("[hub]\ncertificate_file = \"/a\"", &["hub.private_key_file", "both or none"]),
        ("[boot]\nkind = \"custom\"", &["boot.custom.command = []"]),
        ("[install]\nkind = \"command\"", &["install.command = []"]),
        ("[restart]\ncommand = []", &["restart.command = []"]),
        ("[boot]\nkind = \"tryboot\"\n[restart]\ncommand = [\"reboot\"]", &["{argument}"]),
        ("[slots]\na.device = \"/x\"\nb.device = \"/x\"", &["must be two different devices"]),
        ("nonsense", &["line 1"]),
    ] {
        let error = Config::parse(text).unwrap_err().to_string();
        for complaint in complaints {
            assert!(error.contains(complaint), "{text}\n{error}");
        }
    }
    let error = Config::load(Path::new("/no/such/file")).unwrap_err().to_string();
    assert!(error.contains("/no/such/file"), "{error}");
}

#[test]
fn a_secret_that_somebody_put_into_the_file_is_not_shown() {
    for line in [
        "proxy = \"http://user:hunter2@proxy:3128\"",
        "proxy = \"http://user:hunter2@proxy:3128",
        "proxy = http://user:hunter2@proxy:3128",
        "proxy = [\"http://user:hunter2@proxy:3128\"]",
        "proxi = \"http://user:hunter2@proxy:3128\"",
        "HostName=h;DeviceId=d;SharedAccessKey=hunter2",
        "connection_string = \"HostName=h;DeviceId=d;SharedAccessKey=hunter2\"",
    ] {
        let error = Config::parse(&format!("[hub]\n{line}\n")).unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
    }
}
