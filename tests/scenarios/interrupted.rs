//! The daemon or the machine is stopped in a known state, and goes on from there.

use std::time::Duration;

use serde_json::{Value, json};

use crate::world::images::Fault;
use crate::world::machine::LIMIT;
use crate::world::mounted::Mounted;
use crate::world::{World, is_over, side_by_side};

/// Time in which a daemon must be gone after SIGTERM, whatever it is doing.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// The states in which an update can be met, by the name in the state file.
const STATES: [&str; 4] = ["fetching", "verifying", "switching", "trial"];

/// What happens to the daemon or the machine.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Blow {
    /// The line to the hub is cut.
    LineCut,
    /// systemd stops and starts the daemon.
    Restart,
    /// The daemon dies and is started again.
    Kill,
    /// The power goes and comes back.
    PowerCut,
}

/// Has `blow` come in each of the states; the update must end well each time.
async fn strike_in_every_state(blow: Blow) {
    let until_met = |state| async move {
        // Some states last for milliseconds, and may be over before they are seen.
        let mut tries = 0;
        while !strike(blow, state).await {
            tries += 1;
            assert!(tries < 10, "no update was met in {state}");
        }
    };
    side_by_side(STATES.map(until_met)).await;
}

/// False if an update went through `state` too fast to be met in it.
async fn strike(blow: Blow, state: &str) -> bool {
    let mut world = World::new().await;
    world.only_well_as("1.0.0", "not yet");
    world.start().await;
    let id = world.half_an_update("2.0.0.img").await;
    if !meet(&mut world, state).await {
        return false;
    }
    match blow {
        Blow::LineCut => {
            // Gone already, in the middle of a restart, is as good as cut.
            let _ = world.hub().faults(crate::world::DEVICE).drop_now();
            world.machine.thaw().unwrap();
        }
        Blow::Restart => {
            let status = world.machine.sigterm(STOP_LIMIT).await.unwrap();
            assert!(status.success(), "{state}: {status}");
            world.assert_bootable();
            world.machine.start_daemon().unwrap();
        }
        Blow::Kill => {
            world.machine.kill9();
            world.assert_bootable();
            world.machine.start_daemon().unwrap();
        }
        Blow::PowerCut => {
            world.machine.kill9();
            world.assert_bootable();
            world.machine.power_cut().unwrap();
        }
    }
    world.get_well();
    world.images.release();
    let twin = world.over(&id).await;
    world.assert_bootable();
    let last = &twin["twinboot"]["lastUpdate"];
    // A one-shot try is over with the power: then the old slot is home, and says so.
    if state == "trial" && blow == Blow::PowerCut {
        assert_eq!((&last["result"], &last["code"]), (&json!("rolledBack"), &json!("fellBack")));
        world.assert_at_home();
        return true;
    }
    assert_eq!(last["result"], "succeeded", "{blow:?} in {state}: {last}");
    assert_eq!(twin["iothubDM"]["firmwareUpdate"]["status"], "applyComplete");
    assert_eq!(twin["firmwareStatus"], "completed");
    assert_eq!(twin["firmware"]["fwUpdateStatus"], "current");
    assert_eq!(twin["firmware"]["currentFwVersion"], "2.0.0");
    world.assert_runs('B', "2.0.0");
    let transfers = if state == "fetching" && blow != Blow::LineCut { 2 } else { 1 };
    assert_eq!(world.images.seen("/2.0.0.img").len(), transfers);
    true
}

/// Stops the daemon in `state`, half way where that can be; false if it was not met in it.
async fn meet(world: &mut World, state: &str) -> bool {
    match state {
        "fetching" => world.half_is_proven().await,
        "trial" => {
            world.images.release();
            world.machine.restart_order(LIMIT).await.unwrap();
            world.machine.restart().await.unwrap();
            world.saved_state("trial").await;
            world.online().await;
        }
        _ => world.images.release(),
    }
    tokio::task::block_in_place(|| world.machine.freeze_in(state)).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_cut_in_every_state_loses_nothing() {
    strike_in_every_state(Blow::LineCut).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_daemon_ends_in_time_and_goes_on_in_every_state() {
    strike_in_every_state(Blow::Restart).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_daemon_goes_on_in_every_state() {
    strike_in_every_state(Blow::Kill).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_is_outlived_in_every_state() {
    strike_in_every_state(Blow::PowerCut).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_on_the_way_back_ends_in_the_old_slot() {
    let mut world = World::new().await;
    world.machine.set("update.trial_limit_s", 5);
    world.only_well_as("1.0.0", "not well");
    world.start().await;
    let id = world.update("2.0.0.img.zst").await;
    world.machine.restart_order(LIMIT).await.unwrap();
    world.machine.restart().await.unwrap();
    world.saved_state("rollingBack").await;
    world.machine.power_cut().unwrap();
    let twin = world.over(&id).await;
    let last = &twin["twinboot"]["lastUpdate"];
    assert_eq!((&last["result"], &last["code"]), (&json!("rolledBack"), &json!("unhealthy")));
    world.assert_at_home();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_download_goes_on_from_what_is_proven() {
    side_by_side(["2.0.0.img", "2.0.0.img.zst", "2.0.0.img.gz"].map(|file| async move {
        let mut world = World::started().await;
        let path = crate::world::image("2.0.0").with_file_name(file);
        let whole = std::fs::metadata(path).unwrap().len() as usize;
        world.fault(file, [Fault::Hold(whole * 2 / 3)]);
        let id = world.update(file).await;
        let held = |world: &World| world.images.sent_since(&format!("/{file}"), 0) > whole / 2;
        world.eventually("more than half is sent", held).await;
        if file.ends_with(".img") {
            world.half_is_proven().await;
        }
        world.machine.power_cut().unwrap();
        world.until("it is confirmed", |twin| is_over(twin, &id)).await;
        world.assert_runs('B', "2.0.0");
        let seen = world.images.seen(&format!("/{file}"));
        assert_eq!(seen.len(), 2, "{file}");
        if file.ends_with(".img") {
            // A raw image goes on at the checkpoint, a compressed one where its format allows it.
            assert!(seen[1].from.is_some_and(|from| from >= whole / 3), "{:?}", seen[1]);
        }
    }))
    .await;
}

/// The run ended like this, and the device is back where it was.
#[track_caller]
fn assert_lost(world: &World, twin: &Value, result: &str, code: &str) {
    let last = &twin["twinboot"]["lastUpdate"];
    assert_eq!((&last["result"], &last["code"]), (&json!(result), &json!(code)), "{last}");
    world.assert_bootable();
    world.assert_at_home();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_that_never_gets_on_is_given_up_after_some_starts() {
    let mut world = World::new().await;
    world.machine.set("update.max_attempts", 3);
    world.start().await;
    // Not as much as a checkpoint comes of it.
    world.fault("2.0.0.img", vec![Fault::Hold(1000); 9]);
    let id = world.update("2.0.0.img").await;
    for attempt in 1..=3 {
        let asked = |world: &World| world.images.seen("/2.0.0.img").len() == attempt;
        world.eventually("it is tried", asked).await;
        world.machine.kill9();
        world.machine.start_daemon().unwrap();
    }
    let twin = world.over(&id).await;
    assert_lost(&world, &twin, "failed", "tooManyStarts");
    assert_eq!(world.images.seen("/2.0.0.img").len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_keeps_dying_in_the_trial_loses_it() {
    let mut world = World::new().await;
    world.machine.set("update.max_trial_starts", 2);
    let id = in_trial(&mut world).await;
    for starts in [2, 3] {
        world.machine.kill9();
        world.machine.start_daemon().unwrap();
        let state = if starts == 2 { "trial" } else { "rollingBack" };
        let there = |world: &World| {
            let saved = world.machine.saved();
            let started = saved.pointer("/saved/state/trial/starts") == Some(&json!(starts));
            started || world.machine.saved_state() == state && starts == 3
        };
        world.eventually("the start is counted", there).await;
    }
    let twin = world.over(&id).await;
    assert_lost(&world, &twin, "rolledBack", "tooManyStarts");
}

/// Switches the device on and brings it into the trial of 2.0.0, which is not well.
async fn in_trial(world: &mut World) -> String {
    world.only_well_as("1.0.0", "not well");
    world.start().await;
    let id = world.update("2.0.0.img.zst").await;
    world.machine.restart_order(LIMIT).await.unwrap();
    world.machine.restart().await.unwrap();
    world.saved_state("trial").await;
    id
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_whose_clock_is_not_set_says_so_and_goes_on_when_it_is() {
    use twinboot::store::{FileStore, StateStore};
    use twinboot::update::WallTime;

    let mut world = World::started().await;
    world.machine.sigterm(STOP_LIMIT).await.unwrap();
    // As if it had been tomorrow already: what the clock shows now cannot be right.
    let mut store = FileStore::open(&world.folder().join("state")).unwrap();
    let mut saved = store.load().unwrap().saved.unwrap();
    let newest = saved.newest_time.unwrap().unix_ms();
    saved.newest_time = Some(WallTime::from_unix_ms(newest + 86_400_000));
    store.save(&saved).unwrap();
    drop(store);
    world.machine.synchronise_clock(false).unwrap();
    let mut events = world.events();
    world.machine.boot().unwrap();
    let told = |world: &World| {
        let output = world.twinboot(&["status"]);
        String::from_utf8(output.stdout).unwrap().contains("waiting for the clock")
    };
    world.eventually("the status says so", told).await;
    while let Some(event) = events.try_next() {
        assert!(!matches!(event.kind, hubsim::EventKind::Connected { .. }), "{event}");
    }
    world.machine.synchronise_clock(true).unwrap();
    world.online().await;
    let id = world.update("2.0.0.img").await;
    world.over(&id).await;
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_daemon_says_goodbye_while_the_hub_is_dumb() {
    let mut world = World::started().await;
    world.hub().faults(crate::world::DEVICE).stall(true).unwrap();
    let status = world.machine.sigterm(STOP_LIMIT).await.unwrap();
    assert!(status.success(), "{status}");
    assert!(!world.machine.socket().exists(), "the socket is taken away");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_that_does_not_come_is_ordered_again_and_given_up() {
    let mut world = World::new().await;
    world.machine.set("restart.limit_s", 1);
    world.start().await;
    let id = world.update("2.0.0.img").await;
    // A machine that does not obey.
    let mut orders = 0;
    let ended = async {
        while !is_over(&world.reported(), &id) {
            let order = world.machine.restart_order(Duration::from_millis(200)).await;
            orders += usize::from(order.is_ok());
        }
    };
    tokio::time::timeout(LIMIT, ended).await.expect("it is given up");
    assert_eq!(orders, 3);
    let twin = world.reported();
    let last = &twin["twinboot"]["lastUpdate"];
    assert_eq!((&last["result"], &last["code"]), (&json!("failed"), &json!("restartFailed")));
    // Saved and told first, done after it.
    let forgotten = |world: &World| world.machine.variables().unwrap().1.is_empty();
    world.eventually("the new slot is not to be tried any more", forgotten).await;
    world.assert_at_home();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_state_partition_is_told_and_outlived() {
    let mut world = World::new().await;
    let state = world.folder().join("state");
    let (tmpfs, flags) = (std::path::Path::new("tmpfs"), nix::mount::MsFlags::empty());
    let _mounted = Mounted::new(tmpfs, "tmpfs", &state, flags, "size=64k");
    world.start().await;
    let filler = state.join("filler");
    fill(&filler);
    let payload = json!({ "fwPackageUri": world.url("2.0.0.img") });
    let (status, answer) = world.call("firmwareUpdate", payload.clone()).await.unwrap();
    assert_eq!((status, &answer["error"]), (500, &json!("stateNotSaved")), "{answer}");
    assert_eq!(world.images.seen("/2.0.0.img").len(), 0);
    world.assert_bootable();

    // Full in the middle of an update: what cannot be saved waits, and nothing is lost.
    std::fs::remove_file(&filler).unwrap();
    let id = world.half_an_update("2.0.0.img").await;
    world.half_is_proven().await;
    fill(&filler);
    world.images.release();
    let notices = |twin: &Value| twin["twinboot"]["notices"].to_string();
    let twin = world.until("it is told", |twin| notices(twin).contains("make room")).await;
    assert!(notices(&twin).contains("cannot save the state"), "{twin}");
    let (status, answer) = world.call("getFirmwareStatus", json!(null)).await.unwrap();
    assert!(status == 200 && answer["notices"].to_string().contains("make room"), "{answer}");
    let (status, answer) = world.call("cancelFirmwareUpdate", json!(null)).await.unwrap();
    assert_eq!((status, &answer["error"]), (500, &json!("stateNotSaved")), "{answer}");
    world.assert_bootable();
    std::fs::remove_file(&filler).unwrap();
    let twin = world.over(&id).await;
    assert_eq!(twin["twinboot"]["lastUpdate"]["result"], "succeeded");
    assert_eq!(notices(&twin), "null", "it is over");
    world.assert_runs('B', "2.0.0");
    // Before the mount goes.
    world.machine.kill9();
}

/// Writes until nothing more fits.
fn fill(path: &std::path::Path) {
    use std::io::Write;
    let mut file = std::fs::File::create(path).unwrap();
    for size in [4096, 512, 1] {
        while file.write(&vec![0_u8; size]).is_ok_and(|written| written > 0) {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trial_whose_state_file_is_lost_is_not_confirmed_blindly() {
    let mut world = World::started().await;
    world.update("2.0.0.img").await;
    world.machine.restart_order(LIMIT).await.unwrap();
    world.machine.kill9();
    std::fs::remove_file(world.folder().join("state/state.json")).unwrap();
    let stopped = world.stop_hub().await;
    assert_eq!(world.machine.power_cut().unwrap().slot, 'B');
    // Without the hub the checks do not pass, and the slot is not home.
    let there = |world: &World| world.twinboot(&["status"]).status.success();
    world.eventually("the daemon runs", there).await;
    assert_eq!(world.machine.variables().unwrap().0, "A");
    world.start_hub(stopped).await;
    world.up().await;
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_daemon_keeps_its_hands_off() {
    let world = World::started().await;
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_twinbootd"))
        .arg("--config")
        .arg(world.machine.config_file())
        .arg("--sysroot")
        .arg(world.folder().join("sysroot"))
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("another twinbootd"), "{text}");
    let (status, _) = world.call("getFirmwareStatus", Value::Null).await.unwrap();
    assert_eq!(status, 200, "the first one lives");
}
