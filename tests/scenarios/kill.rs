//! The daemon is killed, or the power cut, at random moments of an update, again and again.
//!
//! The moments come from a seed that is printed. `TWINBOOT_SEED=N` repeats a run,
//! `TWINBOOT_BLOWS=N` makes it longer.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use crate::world::images::Fault;
use crate::world::machine::Happening;
use crate::world::{World, is_over};

/// Blows that must hit each of [`STATES`].
const BLOWS: usize = 3;

/// Updates after which it is given up to hit them all.
const LIVES: usize = 20;

/// Where the blows go: states, and about how long an update stays in each, at first sight.
const STATES: [(&str, Duration); 4] = [
    ("fetching", Duration::from_millis(500)),
    ("verifying", Duration::from_millis(12)),
    ("switching", Duration::from_millis(25)),
    ("trial", Duration::from_millis(150)),
];

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// How often each state was hit.
type Hits = BTreeMap<String, usize>;

/// Lives through updates in which the daemon is killed, or with `cuts` the power goes, and checks
/// after each blow that what may boot is whole, and at the end that the twin tells the truth.
async fn live(cuts: bool) {
    let seed = number("TWINBOOT_SEED").unwrap_or_else(|| fastrand::u64(..));
    eprintln!("TWINBOOT_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let blows = number("TWINBOOT_BLOWS").map_or(BLOWS, |blows| usize::try_from(blows).unwrap());
    let mut world = World::new().await;
    world.machine.set("update.max_attempts", 50);
    world.machine.set("update.max_trial_starts", 50);
    world.start().await;
    let mut hits = Hits::new();
    let mut states = STATES;
    let missing = |hits: &Hits, state: &str| hits.get(state).copied().unwrap_or(0) < blows;
    for life in 0.. {
        let targets: Vec<_> =
            states.iter_mut().filter(|(state, _)| missing(&hits, state)).collect();
        if targets.is_empty() {
            break;
        }
        assert!(life < LIVES * blows / BLOWS, "only {hits:?} after {life} updates");
        let from = world.machine.running().unwrap().clone();
        let version = if from.version == "2.0.0" { "3.0.0" } else { "2.0.0" };
        let file = format!("{version}.img");
        world.fault(&file, vec![Fault::Slow(150_000); 50]);
        world.online().await;
        let id = world.update(&file).await;
        let mut went = Vec::new();
        for (state, span) in targets {
            while missing(&hits, state) {
                let pause = span.mul_f64(random.f64());
                if !reaches(&mut world, &id, state, pause).await {
                    break;
                }
                world.machine.kill9();
                let hit = world.machine.saved_state();
                went.push(format!("{hit} after {pause:?}"));
                if hit != *state {
                    // This machine is quicker than thought.
                    *span = pause;
                }
                *hits.entry(hit).or_default() += 1;
                world.assert_bootable();
                if cuts {
                    world.machine.power_cut().unwrap();
                } else {
                    world.machine.start_daemon().unwrap();
                }
            }
        }
        eprintln!("update {life}: {}", went.join(", "));
        let twin = world.over(&id).await;
        truth(&world, &twin, from.slot, &from.version, version);
        world.images.edit(&format!("/{file}"), |file| file.faults.clear());
    }
}

/// Plays the machine until the update is in `state` and then for some time; false if it is over or
/// went past before.
async fn reaches(world: &mut World, id: &str, state: &str, pause: Duration) -> bool {
    let place = |state: &str| STATES.iter().position(|(known, _)| *known == state);
    let mut end = None;
    loop {
        let now = world.machine.saved_state();
        if is_over(&world.reported(), id) || place(&now).is_none() || place(&now) > place(state) {
            return false;
        }
        if now == state && end.is_none() {
            end = Some(tokio::time::Instant::now() + pause);
        }
        let look = tokio::time::Instant::now() + Duration::from_millis(1);
        match tokio::time::timeout_at(end.unwrap_or(look), world.machine.next()).await {
            Err(_) if end.is_some() => return true,
            Err(_) => {}
            Ok(Ok(Happening::RestartOrdered)) => {
                world.machine.restart().await.unwrap();
                end = None;
            }
            Ok(other) => panic!("the daemon ended by itself: {other:?}"),
        }
    }
}

/// The twin, the bootloader and the medium agree.
#[track_caller]
fn truth(world: &World, twin: &Value, from: char, old: &str, new: &str) {
    world.assert_bootable();
    let running = world.machine.running().unwrap();
    let last = &twin["twinboot"]["lastUpdate"];
    let to = if from == 'A' { 'B' } else { 'A' };
    let (slot, version) = match last["result"].as_str().unwrap() {
        "succeeded" => (to, new),
        "rolledBack" => (from, old),
        other => panic!("an update that nobody hindered ended as {other}: {last}"),
    };
    assert_eq!((running.slot, running.version.as_str()), (slot, version), "{last}");
    assert_eq!(world.machine.variables().unwrap().0, slot.to_string());
    assert_eq!(twin["twinboot"]["bootedSlot"], json!(slot.to_string()));
    assert_eq!(twin["firmware"]["currentFwVersion"], version);
    let complete = twin["iothubDM"]["firmwareUpdate"]["status"] == "applyComplete";
    assert_eq!(complete, slot == to, "{twin}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_killed_at_random_moments_always_ends_its_update() {
    live(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_cuts_at_random_moments_leave_a_whole_system_and_the_truth() {
    live(true).await;
}
