//! Cuts the power at every operation of an update, and again within the recovery, and checks what
//! boots afterwards and whether the device tells the truth about it.
//!
//! The agent is the real one, with its loop and its jobs, on paused time; `support/rig` plays the
//! device around it. Faults that were put into the product by hand, one at a time, and what noticed
//! them:
//!
//! | fault | noticed here as | and by `machine.rs` |
//! |---|---|---|
//! | acting before saving | a run without an outcome, after a cut | no: the loop is not in it |
//! | ignoring a slot that was found healthy | a run without an outcome, after a cut | yes |
//! | accepting a failed read-back | a broken image about to be tried | yes |
//! | confirming before the checks | an image confirmed that passed none | yes |
//! | writing the running slot | a write to the running slot | yes |
//! | not noticing a fall-back in the trial | a success saved while the old slot runs | yes |
//! | assuming that the switch worked | a success saved while the old slot runs | yes |
//! | going back without end | a device that never comes to rest | yes |
//! | accepting a request while busy | a run without an outcome | yes |
//! | writing a slot that was not retired | a write to a slot that may start | yes |
//! | not marking the running slot good again at a start | another slot after some starts | yes |
//! | trying a slot again that was tried with the argument | another end of the update | yes |
//! | confirming a slot that is just being restarted | no | yes |
//! | not noting that the machine goes down cleanly | a good image lost by a restart | no |
//! | not telling the session how long a trial waits | just that | no |
//! | holding on to a restart that did not come | a trial that cannot be saved and never ends | no |

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

use std::io::Write;

use rig::{Act, CABLE_OUT, Cut, Fault, Rig, Scenario, Script, When, Wrong};
use twinboot::agent::Stop;
use twinboot::update::{FailureKind, State};

use Act::{Cancel, Confirm, Desire, Install, Reboot, RollBack, ShutDown};
use When::{After, AtRest};

/// What operators do with a device.
type Story = &'static [(When, Act)];
/// A cut of the power or a kill of the agent, at some operation.
type Kind = fn(usize) -> Cut;

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
    ("a reboot on trial", &[(AtRest, Install(2)), (After(20), Reboot)]),
    ("restarted on trial", &[(AtRest, Install(2)), (After(20), ShutDown(Stop::Restart))]),
    ("switched off on trial", &[(AtRest, Install(2)), (After(20), ShutDown(Stop::Other))]),
    ("restarted in the download", &[(AtRest, Install(2)), (After(3), ShutDown(Stop::Restart))]),
];

/// Of the stories beside the plain update, the agent is killed at every so many operations only:
/// a kill is a power cut that leaves more in place.
const KILL_STRIDE: usize = 4;
/// Of the pairs of cuts, every so many firsts and every so many seconds are taken, but for the
/// plain update on one boot script, where all are.
const PAIR_STRIDE: usize = 8;
/// Wrongs after which no more are looked for.
const ENOUGH: usize = 20;
/// More operations than any story has.
const END: usize = 400;

/// A device that has lived through all that, and was switched off and on once more.
fn device(script: Script, fault: Fault, story: Story, cuts: &[Cut], with_log: bool) -> Rig {
    let scenario = Scenario { script, fault, acts: story.to_vec(), cuts: cuts.to_vec() };
    let rig = Rig::new(scenario, with_log);
    rig.live();
    rig.machine().judge();
    rig.power_cycle(1);
    rig
}

/// What came of many devices.
#[derive(Default)]
struct Tally {
    stories: usize,
    cuts: usize,
    wrongs: [usize; 3],
    worst: Option<(Wrong, String)>,
}

impl Tally {
    /// Lets a device live; tells whether the last cut came.
    fn add(&mut self, script: Script, fault: Fault, story: Story, cuts: &[Cut]) -> bool {
        let rig = device(script, fault, story, cuts, false);
        self.stories += 1;
        let was_cut = rig.was_cut();
        self.cuts += if was_cut { cuts.len() } else { 0 };
        if let Some((wrong, what)) = rig.wrong() {
            self.wrongs[wrong as usize] += 1;
            if self.worst.as_ref().is_none_or(|(worst, _)| wrong < *worst) {
                // The same once more, with a record of it.
                let told = device(script, fault, story, cuts, true).story();
                let head = format!("{what}\n{script:?}, {fault:?}, {story:?}, cuts {cuts:?}");
                self.worst = Some((wrong, format!("{head}\n{told}")));
            }
        }
        was_cut
    }

    fn has_enough(&self) -> bool {
        self.wrongs.iter().sum::<usize>() >= ENOUGH
    }

    /// Cuts at every `stride`th operation, `from` the first to the last there is, behind the cuts
    /// that came already.
    fn cut_all(
        &mut self,
        (script, fault, story): (Script, Fault, Story),
        before: &[Cut],
        kind: Kind,
        (from, stride): (usize, usize),
    ) {
        for at in (from..END).step_by(stride) {
            let cuts = [before, &[kind(at)]].concat();
            if !self.add(script, fault, story, &cuts) || self.has_enough() {
                return;
            }
        }
        panic!("no end after {END} operations: {script:?}, {fault:?}, {story:?}, {before:?}");
    }

    fn cut_all_pairs(&mut self, scene: (Script, Fault, Story), kinds: [Kind; 2], stride: usize) {
        let (script, fault, story) = scene;
        for at in (0..END).step_by(stride) {
            let first = [kinds[0](at)];
            if self.has_enough() || !device(script, fault, story, &first, false).was_cut() {
                return;
            }
            // Not always the same places behind the first cut.
            self.cut_all(scene, &first, kinds[1], (at / stride % stride, stride));
        }
        panic!("no end after {END} operations: {scene:?}");
    }

    /// Tells the figures even if the test passes, and fails if anything was wrong.
    fn judge(self, what: &str) {
        let Tally { stories, cuts, wrongs: [bricks, untruths, unrest], worst } = self;
        let line = format!(
            "{what}: stories {stories}, cuts {cuts}, bricks {bricks}, untruthful reports \
             {untruths}, restless {unrest}\n"
        );
        std::io::stderr().write_all(line.as_bytes()).unwrap();
        if let Some((_, told)) = worst {
            panic!("{line}{told}");
        }
    }
}

/// How an update ends where nothing is cut, and that it stays so.
#[test]
fn undisturbed_updates_end_as_they_should() {
    use FailureKind as K;
    for (fault, version, end) in [
        (Fault::None, 2, "succeeded".to_owned()),
        (Fault::SickSlot, 1, rolled_back(K::Unhealthy)),
        (Fault::SickAfterConfirm, 2, "succeeded".to_owned()),
        (Fault::DeadSlot, 1, rolled_back(K::FellBack)),
        (Fault::LyingDisk, 1, failed(K::ReadBack)),
        (Fault::NoRestart, 1, failed(K::RestartFailed)),
        (Fault::ConfirmsByItself, 2, "succeeded".to_owned()),
        (Fault::NeverGoesBack, 2, failed(K::Stuck)),
        (Fault::StateLost, 2, "succeeded".to_owned()),
        (Fault::StateReverts, 2, "succeeded".to_owned()),
        (Fault::StateFolderFull, 2, "succeeded".to_owned()),
        (Fault::StateReadOnlyInNewSlot, 1, rolled_back(K::FellBack)),
        (Fault::StateReadOnlyAndDeaf, 1, rolled_back(K::FellBack)),
        (Fault::CablePulled, 2, "succeeded".to_owned()),
        (Fault::CableCut, 1, rolled_back(K::Unhealthy)),
        (Fault::SickAndCableCut, 1, rolled_back(K::Unhealthy)),
        (Fault::HubGone, 1, rolled_back(K::Unhealthy)),
        (Fault::NoDriver, 1, rolled_back(K::Unhealthy)),
    ] {
        for script in Script::ALL {
            let rig = device(script, fault, UPDATE, &[], true);
            assert_eq!(rig.wrong(), None, "{}", rig.story());
            assert_eq!((rig.version(), rig.last_end()), (version, end.clone()), "{}", rig.story());
            // More starts than the boot scripts have attempts.
            rig.power_cycle(5);
            assert_eq!(rig.wrong(), None, "{}", rig.story());
            assert_eq!((rig.version(), rig.last_end()), (version, end.clone()), "{}", rig.story());
        }
    }
}

fn rolled_back(kind: FailureKind) -> String {
    format!("rolled back: {}", kind.name())
}

fn failed(kind: FailureKind) -> String {
    format!("failed: {}", kind.name())
}

/// A bootloader that forgets its orders has tried nothing. With tryboot nobody can tell.
#[test]
fn a_bootloader_that_never_tries_is_told() {
    for script in Script::ALL {
        let rig = device(script, Fault::NeverTries, UPDATE, &[], true);
        assert_eq!(rig.wrong(), None, "{}", rig.story());
        let end = match script {
            Script::Tryboot => rolled_back(FailureKind::FellBack),
            Script::Uboot | Script::Grub => failed(FailureKind::FellBack),
        };
        assert_eq!((rig.version(), rig.last_end()), (1, end), "{}", rig.story());
    }
}

/// While a trial waits for the network, the session knows that there is time left, and tries often.
#[test]
fn the_session_is_told_how_long_a_waiting_trial_lasts() {
    let rig = device(Script::Uboot, Fault::CablePulled, UPDATE, &[], true);
    let trial_ends = rig.machine().trial_ends;
    assert!(trial_ends > CABLE_OUT, "{trial_ends:?}\n{}", rig.story());
}

/// Tryboot alone needs the argument, and nobody can tell that it was lost on the way.
#[test]
fn a_restart_that_loses_the_argument_is_told() {
    for script in Script::ALL {
        let rig = device(script, Fault::LosesArgument, UPDATE, &[], true);
        assert_eq!(rig.wrong(), None, "{}", rig.story());
        let end = match script {
            Script::Tryboot => (1, rolled_back(FailureKind::FellBack)),
            Script::Uboot | Script::Grub => (2, "succeeded".to_owned()),
        };
        assert_eq!((rig.version(), rig.last_end()), end, "{}", rig.story());
    }
}

/// Mains that comes, goes and comes again before the agent is there to say that all is well.
#[test]
fn power_that_fails_while_it_boots_does_not_lead_out_of_a_confirmed_slot() {
    for script in Script::ALL {
        let rig = device(script, Fault::None, UPDATE, &[], true);
        for _ in 0..2 {
            rig.machine().start(None);
        }
        rig.power_cycle(1);
        assert_eq!(rig.wrong(), None, "{}", rig.story());
        let end = (rig.version(), rig.last_end());
        assert_eq!(end, (2, "succeeded".to_owned()), "{script:?}\n{}", rig.story());
    }
}

/// Whoever has the machine restarted or switched off while it waits for the network: the image
/// comes back and is confirmed.
#[test]
fn a_good_image_outlives_a_clean_restart_in_its_trial() {
    for name in ["a reboot on trial", "restarted on trial", "switched off on trial"] {
        let story = STORIES.iter().find(|story| story.0 == name).unwrap().1;
        for script in Script::ALL {
            let rig = device(script, Fault::CablePulled, story, &[], true);
            assert_eq!(rig.wrong(), None, "{}", rig.story());
            let end = (rig.version(), rig.last_end());
            assert_eq!(end, (2, "succeeded".to_owned()), "{name}, {script:?}\n{}", rig.story());
            let trials = rig.machine().tries;
            assert_eq!(trials, 2, "{name}, {script:?}: once more after the restart");
        }
    }
}

/// A cut between the last byte of the image and the first boot of the new slot: it is tried all the
/// same, whatever the power took along.
#[test]
fn a_cut_before_the_new_slot_was_tried_does_not_lose_the_update() {
    let mut armed_again = 0;
    for script in Script::ALL {
        for at in 0..END {
            let rig = device(script, Fault::None, UPDATE, &[Cut::Power(at)], true);
            if !rig.was_cut() {
                break;
            }
            // Once the machine is on its way, the new slot may have been tried.
            let on_its_way = |state: &State| matches!(state, State::Switching { left: true, .. });
            let cut_in = rig.machine().cut_in[0].clone();
            match cut_in {
                Some(state @ (State::Verifying { .. } | State::Switching { .. }))
                    if !on_its_way(&state) =>
                {
                    let end = (rig.version(), rig.last_end());
                    assert_eq!(end, (2, "succeeded".to_owned()), "cut at {at}\n{}", rig.story());
                    let machine = rig.machine();
                    let last = machine.saved.as_ref().unwrap().last.as_ref().unwrap();
                    armed_again += u32::from(last.run.as_ref().unwrap().passage.armed_again);
                }
                _ => {}
            }
        }
    }
    assert!(armed_again >= 3, "{armed_again}");
}

/// An image that does not start is tried once, and the reason is told as it is: wherever the power
/// was cut, a bootloader with variables knows whether it had its try. The flag of tryboot alone can
/// be lost on the way without a trace.
#[test]
fn no_cut_has_an_image_that_does_not_start_tried_twice() {
    for script in [Script::Uboot, Script::Grub] {
        for at in 0..END {
            let rig = device(script, Fault::DeadSlot, UPDATE, &[Cut::Power(at)], true);
            assert_eq!(rig.wrong(), None, "{}", rig.story());
            let runs = rig.machine().runs.len();
            let tries = rig.machine().tries;
            let end = (tries, rig.last_end());
            // It may be cut before anything was saved of it.
            let told = if runs == 0 { "none".into() } else { rolled_back(FailureKind::FellBack) };
            assert_eq!(end, (runs, told), "{script:?}, cut at {at}\n{}", rig.story());
            if !rig.was_cut() {
                break;
            }
        }
    }
}

/// The bootloader takes no order any more: the new slot is good, but nobody can make it stay.
#[test]
fn what_cannot_be_confirmed_is_never_told_to_be() {
    for script in Script::ALL {
        let rig = device(script, Fault::BootVariablesReadOnly, UPDATE, &[], true);
        assert_eq!(rig.wrong(), None, "{}", rig.story());
        assert_ne!(rig.last_end(), "succeeded", "{}", rig.story());
    }
}

/// What operators are told, and what comes of what they do.
#[test]
fn operators_get_what_they_asked_for_or_are_told_why_not() {
    use FailureKind as K;
    let told: &[(&str, &[&str], u8, String)] = &[
        ("an update", &["accepted"], 2, "succeeded".into()),
        ("there and back", &["accepted", "accepted"], 3, "succeeded".into()),
        ("desired", &[], 2, "succeeded".into()),
        ("desired, then withdrawn", &[], 1, failed(K::Withdrawn)),
        ("desired, then another", &[], 3, "succeeded".into()),
        ("cancelled", &["accepted", "cancelled"], 1, failed(K::Cancelled)),
        ("another while busy", &["accepted", "busy"], 2, "succeeded".into()),
        ("taken back afterwards", &["accepted", "rollingBack"], 1, "succeeded".into()),
        ("a reboot in the download", &["accepted", "restarting"], 2, "succeeded".into()),
        ("a reboot", &["restarting"], 1, "none".into()),
    ];
    let on_trial: &[(&str, &[&str], u8, String)] = &[
        (
            "taken back on trial",
            &["accepted", "rollingBack"],
            1,
            rolled_back(K::RolledBackByOperator),
        ),
        ("vouched for on trial", &["accepted", "confirming"], 2, "succeeded".into()),
    ];
    for (fault, table) in [(Fault::None, told), (Fault::SickSlot, on_trial)] {
        for (name, answers, version, end) in table {
            let story = STORIES.iter().find(|story| story.0 == *name).unwrap().1;
            for script in Script::ALL {
                let rig = device(script, fault, story, &[], true);
                assert_eq!(rig.wrong(), None, "{}", rig.story());
                assert_eq!(rig.answers(), *answers, "{name}\n{}", rig.story());
                assert_eq!((rig.version(), &rig.last_end()), (*version, end), "{name}");
            }
        }
    }
}

fn every_cut(script: Script) {
    let mut tally = Tally::default();
    for fault in Fault::ALL {
        for (number, (name, story)) in STORIES.iter().enumerate() {
            // What the network does matters in a trial and at the way down, and nowhere else.
            if fault.is_outside() && number > 0 && !name.ends_with("on trial") {
                continue;
            }
            let scene = (script, fault, *story);
            let kill_stride = if number == 0 { 1 } else { KILL_STRIDE };
            tally.cut_all(scene, &[], Cut::Power, (0, 1));
            tally.cut_all(scene, &[], Cut::Kill, (0, kill_stride));
            tally.cut_all_pairs(scene, [Cut::Power, Cut::Power], PAIR_STRIDE);
        }
    }
    tally.judge(&format!("{script:?}"));
}

#[test]
fn any_cut_under_tryboot_leaves_a_device_that_works_and_tells_the_truth() {
    every_cut(Script::Tryboot);
}

#[test]
fn any_cut_under_u_boots_counters_leaves_a_device_that_works_and_tells_the_truth() {
    every_cut(Script::Uboot);
}

#[test]
fn any_cut_under_grubs_marks_leaves_a_device_that_works_and_tells_the_truth() {
    every_cut(Script::Grub);
}

#[test]
fn any_two_cuts_of_an_update_leave_a_device_that_works_and_tells_the_truth() {
    let mut tally = Tally::default();
    let all: [[Kind; 2]; 4] = [
        [Cut::Power, Cut::Power],
        [Cut::Power, Cut::Kill],
        [Cut::Kill, Cut::Power],
        [Cut::Kill, Cut::Kill],
    ];
    for kinds in all {
        tally.cut_all_pairs((Script::Uboot, Fault::None, UPDATE), kinds, 1);
    }
    tally.cut_all_pairs((Script::Uboot, Fault::SickSlot, UPDATE), [Cut::Power, Cut::Power], 1);
    tally.judge("all pairs");
}
