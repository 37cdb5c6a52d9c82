//! Cuts the power at every operation of an update, and again within the recovery, and checks what
//! boots afterwards and whether the device tells the truth about it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::as_conversions,
    missing_docs,
    reason = "tests"
)]

#[path = "support/rig/mod.rs"]
mod rig;

use rig::{Act, Cut, Fault, Rig, Scenario, Script, When};
use twinboot::update::{FailureKind, OutcomeKind};

use Act::{Cancel, Confirm, Desire, Install, Reboot, RollBack};
use When::{After, AtRest};

/// What operators do with a device.
type Story = &'static [(When, Act)];

const UPDATE: Story = &[(AtRest, Install(2))];
const STORIES: &[(&str, Story)] = &[
    ("an update", UPDATE),
    ("there and back", &[(AtRest, Install(2)), (AtRest, Install(3))]),
    ("desired", &[(AtRest, Desire(Some(2)))]),
    ("desired, then withdrawn", &[(AtRest, Desire(Some(2))), (After(3), Desire(None))]),
    ("desired, then another", &[(AtRest, Desire(Some(2))), (After(3), Desire(Some(3)))]),
    ("cancelled", &[(AtRest, Install(2)), (After(3), Cancel)]),
    ("another while busy", &[(AtRest, Install(2)), (After(3), Install(3))]),
    ("taken back afterwards", &[(AtRest, Install(2)), (AtRest, RollBack)]),
    ("taken back on trial", &[(AtRest, Install(2)), (After(10), RollBack)]),
    ("vouched for on trial", &[(AtRest, Install(2)), (After(10), Confirm)]),
    ("a reboot in the download", &[(AtRest, Install(2)), (After(3), Reboot)]),
    ("a reboot", &[(AtRest, Reboot)]),
];

fn live(script: Script, fault: Fault, story: Story, cuts: &[Cut], log: bool) -> Rig {
    let scenario = Scenario { script, fault, acts: story.to_vec(), cuts: cuts.to_vec() };
    let rig = Rig::new(scenario, log);
    rig.live();
    rig.machine().judge();
    rig.power_cycle(1);
    rig
}

#[test]
fn undisturbed_updates_end_as_they_should() {
    for script in Script::ALL {
        let rig = live(script, Fault::None, UPDATE, &[], true);
        assert_eq!(rig.version(), 2);
    }
}

fn all(script: Script) {
    let begin = std::time::Instant::now();
    let (mut cuts, mut n) = (0, 0);
    let mut bad = std::collections::BTreeMap::<String, (usize, String)>::new();
    for fault in Fault::ALL {
        for (name, story) in STORIES {
            for kind in [Cut::Power, Cut::Kill] {
                for k in 0..150 {
                    let rig = live(script, fault, story, &[kind(k)], false);
                    n += 1;
                    if let Some((kind2, text)) = rig.wrong() {
                        let first = text.chars().take(40).collect::<String>();
                        let key = format!("{kind2:?} {fault:?} | {name} | {first}");
                        bad.entry(key).or_insert_with(|| {
                          (0, live(script, fault, story, &[kind(k)], true).story())
                        }).0 += 1;
                    }
                    if !rig.was_cut() {
                        break;
                    }
                    cuts += 1;
                }
            }
        }
    }
    for (key, (count, _)) in &bad {
        eprintln!("BAD {count:>4} {key}");
    }
    for (key, (_, text)) in bad.iter() {
        eprintln!("STORY {key}\n{text}\n");
    }
    eprintln!("{script:?}: {n} stories, {cuts} cuts, {} bad, {:?}", bad.len(), begin.elapsed());
}

#[test]
fn t() { all(Script::Tryboot) }
#[test]
fn u() { all(Script::Uboot) }
#[test]
fn g() { all(Script::Grub) }
