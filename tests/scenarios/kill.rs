//! The daemon is killed, or the power cut, at random moments of an update, again and again.
//!
//! The moments come from a seed that is printed. `TWINBOOT_SEED=N` repeats a run,
//! `TWINBOOT_LIVES=N` makes it longer.

use std::time::Duration;

use serde_json::{Value, json};

use crate::world::machine::Happening;
use crate::world::{World, is_over};

/// Updates in one test.
const LIVES: usize = 4;

/// Blows in one update; then it is left to end.
const BLOWS: usize = 6;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Lives through updates in which the daemon is killed, or with `cuts` the power goes, and checks
/// after each blow that what may boot is whole, and at the end that the twin tells the truth.
async fn live(cuts: bool) {
    let seed = number("TWINBOOT_SEED").unwrap_or_else(|| fastrand::u64(..));
    eprintln!("TWINBOOT_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let lives = number("TWINBOOT_LIVES").map_or(LIVES, |lives| usize::try_from(lives).unwrap());
    let mut world = World::new().await;
    world.machine.set("update.max_attempts", 50);
    world.machine.set("update.max_trial_starts", 50);
    world.start().await;
    for life in 0..lives {
        let from = world.machine.running().unwrap().clone();
        let version = if from.version == "2.0.0" { "3.0.0" } else { "2.0.0" };
        let file = format!("{version}.img");
        world.fault(
            &file,
            std::iter::repeat_n(crate::world::images::Fault::Slow(60_000), BLOWS + 1),
        );
        world.online().await;
        let id = world.update(&file).await;
        let mut went = Vec::new();
        for _ in 0..BLOWS {
            // A download takes about two seconds, the rest some hundredths each.
            let pause = if random.bool() { random.u64(..1500) } else { random.u64(..60) };
            if over_after(&mut world, &id, Duration::from_millis(pause)).await {
                break;
            }
            let saved = world.machine.saved();
            let phase = saved.pointer("/saved/state/phase").and_then(Value::as_str);
            went.push(format!("{} after {pause} ms", phase.unwrap_or("nothing")));
            world.machine.kill9();
            world.assert_bootable();
            if cuts {
                world.machine.power_cut().unwrap();
            } else {
                world.machine.start_daemon().unwrap();
            }
        }
        eprintln!("life {life}: {}", went.join(", "));
        let twin = world.over(&id).await;
        truth(&world, &twin, from.slot, &from.version, version);
        world.images.edit(&format!("/{file}"), |file| file.faults.clear());
    }
}

/// Plays the machine for some time; true if the run is over by then.
async fn over_after(world: &mut World, id: &str, pause: Duration) -> bool {
    let end = tokio::time::Instant::now() + pause;
    loop {
        if is_over(&world.reported(), id) {
            return true;
        }
        match tokio::time::timeout_at(end, world.machine.next()).await {
            Err(_) => return false,
            Ok(Ok(Happening::RestartOrdered)) => drop(world.machine.restart().await.unwrap()),
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
