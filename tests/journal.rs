//! The last words of failed boots, read by the real journalctl from real journal files.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::as_conversions,
    reason = "tests"
)]

use std::path::Path;
use std::sync::Arc;

use secrecy::SecretString;
use tempfile::TempDir;
use twinboot::config::{Report, Whole};
use twinboot::journal::JournalFolder;
use twinboot::update::{BootId, FailedBoot};

#[path = "support/journal.rs"]
mod journal;

use journal::{Machine, entry};

/// Boots as the kernel names them.
const OLD: &str = "0a000000-0000-4000-8000-00000000000a";
const FAILED: &str = "0b000000-0000-4000-8000-00000000000b";
const HOME: &str = "0c000000-0000-4000-8000-00000000000c";
const LATER: &str = "0d000000-0000-4000-8000-00000000000d";

const OWN_KEY: &str = "c2VjcmV0LWtleS1vZi1waS0xLW5ldmVyLXRvLWJlLXNlZW4=";

fn folder(path: &Path, lines: u64) -> JournalFolder {
    let report = Report {
        journal_directory: path.to_owned(),
        journal_lines: Whole::of(lines),
        ..Report::default()
    };
    let secrets = Arc::new(|| vec![SecretString::from(OWN_KEY)]);
    JournalFolder::new(&report, secrets).unwrap()
}

fn boot(name: &str) -> BootId {
    BootId(name.to_owned())
}

fn known(name: &str) -> FailedBoot {
    FailedBoot::Known(boot(name))
}

/// The boot that came after `after` and is none of these.
fn unknown(after: &str, others: &[&str]) -> FailedBoot {
    let others = others.iter().map(|name| boot(name)).collect();
    FailedBoot::Unknown { after: boot(after), others }
}

/// A boot in which one thing was said.
fn says(machine: Machine, name: &str, what: &str) -> Machine {
    machine.boot(name, &[entry(1500, 6, "app", what)])
}

#[test]
fn the_boot_that_failed_is_found_among_those_of_both_slots() {
    for shared_machine_id in [true, false] {
        let place = TempDir::new().unwrap();
        let mut a = Machine::new(place.path(), 0xa);
        a = says(says(a, LATER, "long ago"), OLD, "old");
        if shared_machine_id {
            a = says(a, FAILED, "failed");
        } else {
            says(Machine::new(place.path(), 0xb).at_hour(2), FAILED, "failed").write();
            a = a.at_hour(3);
        }
        says(a, HOME, "home").write();
        let folder = folder(place.path(), 20);
        let none: [&str; 0] = [];
        for (failed, expected) in [
            (known(FAILED), &["1.5s app: failed"][..]),
            (known(&FAILED.to_uppercase()), &["1.5s app: failed"]),
            (unknown(OLD, &[HOME]), &["1.5s app: failed"]),
            // Back home the power went before the agent started: that boot did not fail.
            (unknown(OLD, &[]), &["1.5s app: failed"]),
            // It never reached its journal: no other boot is taken for it.
            (known("0e000000-0000-4000-8000-00000000000e"), &none),
            (unknown(OLD, &[HOME, FAILED]), &none),
            (unknown(HOME, &[]), &none),
            // The old boot's journal is gone, so nothing tells what came after.
            (unknown("0e000000-0000-4000-8000-00000000000e", &[HOME]), &none),
        ] {
            assert_eq!(folder.read(&failed).unwrap(), expected, "{failed:?} {shared_machine_id}");
        }
    }
}

#[test]
fn a_boot_without_a_clock_is_found_by_its_name_and_by_the_order_of_one_machine() {
    let place = TempDir::new().unwrap();
    let machine = Machine::new(place.path(), 0xa).at_hour(500);
    let machine = says(machine, OLD, "old").at_hour(0);
    says(says(machine, FAILED, "failed").at_hour(501), HOME, "home").write();
    let folder = folder(place.path(), 20);
    assert_eq!(folder.read(&known(FAILED)).unwrap(), ["1.5s app: failed"]);
    assert_eq!(folder.read(&unknown(OLD, &[HOME])).unwrap(), ["1.5s app: failed"]);
}

#[test]
fn what_an_operator_wants_to_see_goes_before_what_a_boot_always_says() {
    let place = TempDir::new().unwrap();
    let mut said = vec![
        entry(900, 4, "kernel", "mmc1: error -110").of_no_service(),
        entry(12_400, 5, "twinbootd", "slot B runs version 2.0.0 on trial"),
        entry(13_000, 4, "twinbootd", "no hub session").with("TWINBOOT_WHY", "no such host"),
        entry(14_000, 3, "app", "cannot open /dev/ttyS7"),
        entry(14_100, 4, "init", "app.service: Failed with result 'exit-code'.").of_no_service(),
    ];
    let chatter = |at| entry(at, 6, "chatter", &format!("I am well at {at}"));
    said.extend((0..300).map(|number| chatter(20_000 + number)));
    said.push(entry(612_900, 4, "twinbootd", "going back to slot A: app.service is not active"));
    said.extend([
        entry(613_000, 6, "systemd", "Stopping app.service...").of_no_service(),
        entry(613_500, 6, "systemd-shutdown", "Rebooting.").of_no_service(),
    ]);
    Machine::new(place.path(), 0xa).boot(FAILED, &said).write();

    let told = folder(place.path(), 9).read(&known(FAILED)).unwrap();
    assert_eq!(
        told,
        [
            "0.9s warning kernel: mmc1: error -110",
            "12.4s twinbootd: slot B runs version 2.0.0 on trial",
            "13.0s warning twinbootd: no hub session why=no such host",
            "14.0s err app: cannot open /dev/ttyS7",
            "14.1s warning init: app.service: Failed with result 'exit-code'.",
            "20.2s chatter: I am well at 20299",
            "612.9s warning twinbootd: going back to slot A: app.service is not active",
            "613.0s systemd: Stopping app.service...",
            "613.5s systemd-shutdown: Rebooting.",
        ]
    );
    // What is said again and again takes one line, with its newest words.
    let why = |at, why| entry(at, 4, "twinbootd", "no hub session").with("TWINBOOT_WHY", why);
    let again = [entry(1000, 3, "app", "once"), why(2000, "slow"), why(3000, "refused")];
    let other = "0e000000-0000-4000-8000-00000000000e";
    Machine::new(place.path(), 0xb).boot(other, &again).write();
    let told = folder(place.path(), 2).read(&known(other)).unwrap();
    let (once, twice) = ("1.0s err app: once", "3.0s warning twinbootd (2 times): no hub session");
    assert_eq!(told, [once, &format!("{twice} why=refused")]);
    // Few lines: a part is still from the end, and the newest of what tells most.
    let told = folder(place.path(), 2).read(&known(FAILED)).unwrap();
    assert_eq!(
        told,
        [
            "612.9s warning twinbootd: going back to slot A: app.service is not active",
            "613.5s systemd-shutdown: Rebooting.",
        ]
    );
    assert_eq!(folder(place.path(), 50).read(&known(FAILED)).unwrap().len(), 50);
}

#[test]
fn secrets_are_cut_out_wherever_they_were_said() {
    let place = TempDir::new().unwrap();
    let key = "-----BEGIN PRIVATE KEY-----";
    let said = [
        entry(1000, 3, "app", &format!("refused: {OWN_KEY}")),
        entry(2000, 3, "app", "GET https://me:hunter2@h/x?sig=hunter2 failed"),
        entry(3000, 6, "app", key),
        entry(3001, 6, "app", "hunter2hunter2"),
        entry(3002, 6, "app", "-----END PRIVATE KEY-----"),
        entry(4000, 6, "app", "password=hunter2"),
        entry(5000, 6, "token=hunter2", "hello"),
    ];
    Machine::new(place.path(), 0xa).boot(FAILED, &said).write();
    assert_eq!(
        folder(place.path(), 20).read(&known(FAILED)).unwrap(),
        [
            "1.0s err app: refused: [redacted]",
            "2.0s err app: GET https://[redacted]@h/x?[redacted] failed",
            "3.0s app: [redacted]",
            "3.0s app: [redacted]",
            "3.0s app: -----END PRIVATE KEY-----",
            "4.0s app: password=[redacted]",
            "5.0s token=[redacted] hello",
        ]
        .map(|line| line.replace("] hello", "]: hello"))
    );
}

#[test]
fn whatever_was_said_becomes_few_short_harmless_lines() {
    let place = TempDir::new().unwrap();
    let raw = |at, message: &[u8]| journal::Entry {
        message: message.to_vec(),
        ..entry(at, 3, "app", "")
    };
    let said = [
        raw(1000, b"\xff\xfe not \xc3 text"),
        raw(2000, b"two\nlines \x1b[31mred\x1b[0m \x07 bell\x00"),
        raw(3000, &[b'x'; 5000]),
        raw(4000, &"w\u{f6}rter ".repeat(60).into_bytes()),
        raw(5000, b""),
    ];
    Machine::new(place.path(), 0xa).boot(FAILED, &said).write();
    let told = folder(place.path(), 20).read(&known(FAILED)).unwrap();
    assert_eq!(told[0], "1.0s err app: \u{fffd}\u{fffd} not \u{fffd} text");
    assert_eq!(told[1], "2.0s err app: two lines red bell");
    assert_eq!(told[2], "3.0s err app: (no text, or more than 4096 bytes of it)");
    assert!(told[3].starts_with("4.0s err app: w\u{f6}rter w"), "{}", told[3]);
    assert!(told[3].ends_with('\u{2026}') && (190..=200).contains(&told[3].len()), "{}", told[3]);
    assert_eq!(
        (told[4].as_str(), told.len()),
        ("5.0s err app: (no text, or more than 4096 bytes of it)", 5)
    );

    // A boot of long lines stays below what a twin can spare, with the newest of them.
    let long = "\"quoted\" words ".repeat(40);
    let long = |at: u64| entry(at * 1000, 3, "app", &format!("{at} {long}"));
    let said: Vec<_> = (0..100).map(long).collect();
    let place = TempDir::new().unwrap();
    Machine::new(place.path(), 0xa).boot(FAILED, &said).write();
    let told = folder(place.path(), 50).read(&known(FAILED)).unwrap();
    let bytes = serde_json::to_string(&told).unwrap().len();
    assert!((3_700..=4_096).contains(&bytes), "{bytes} bytes");
    assert!(told.last().unwrap().starts_with("99.0s "), "{told:?}");
}

#[test]
fn a_journal_that_cannot_be_read_says_why() {
    let place = TempDir::new().unwrap();
    // A journal nobody wrote to yet is no error.
    assert_eq!(folder(place.path(), 20).read(&known(FAILED)).unwrap(), [""; 0]);
    assert_eq!(folder(place.path(), 20).read(&unknown(OLD, &[])).unwrap(), [""; 0]);
    let nowhere = place.path().join("nowhere");
    for failed in [known(FAILED), unknown(OLD, &[HOME])] {
        let problem = folder(&nowhere, 20).read(&failed).unwrap_err();
        assert!(problem.contains("journalctl ended with"), "{problem}");
        assert!(problem.contains("No such file"), "{problem}");
    }
    for name in ["", "boot 1", "--vacuum-size=1", &"0".repeat(31), &"g".repeat(32)] {
        let problem = folder(place.path(), 20).read(&known(name)).unwrap_err();
        assert!(problem.contains("not one of the kernel's"), "{problem}");
    }
    // A file that a power cut left behind is passed over.
    let broken = place.path().join("0000000000000000000000000000000a");
    std::fs::create_dir(&broken).unwrap();
    std::fs::write(broken.join("system@broken.journal~"), [0; 1000]).unwrap();
    says(Machine::new(place.path(), 0xb), FAILED, "failed").write();
    let told = folder(place.path(), 20).read(&known(FAILED)).unwrap();
    assert_eq!(told, ["1.5s app: failed"]);
}
