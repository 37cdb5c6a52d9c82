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

#[path = "support/rig.rs"]
mod rig;

use rig::{Act, Cut, Fault, Rig, Scenario, Script, When};
use twinboot::update::{FailureKind, OutcomeKind};

fn scenario(script: Script, fault: Fault, acts: &[(When, Act)], cuts: &[Cut]) -> Scenario {
    Scenario { script, fault, acts: acts.to_vec(), cuts: cuts.to_vec() }
}

fn live(scenario: Scenario) -> Rig {
    let rig = Rig::new(scenario);
    rig.live();
    rig.check();
    rig
}

const INSTALL: &[(When, Act)] = &[(When::AtRest, Act::Install(2))];

#[test]
fn undisturbed_updates_end_as_they_should() {
    for script in Script::ALL {
        let rig = live(scenario(script, Fault::None, INSTALL, &[]));
        println!(
            "{script:?}: {} operations, {:?}",
            rig.machine().operations,
            rig.last().map(|l| l.kind)
        );
        assert_eq!(rig.version(), 2);
    }
}
