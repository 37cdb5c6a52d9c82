//! The state file, its folder, and the service around it: starts, stops and what systemd hears.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};

use crate::world::World;
use crate::world::images::Fault;
use crate::world::machine::LIMIT;
use crate::world::mounted::Mounted;
use crate::world::systemd::Systemd;

/// Time in which a daemon must be gone after SIGTERM, whatever it is doing.
const STOP_LIMIT: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_file_of_no_use_is_set_aside_and_told_each_time() {
    let mut world = World::started().await;
    let state = world.folder().join("state/state.json");
    let good = std::fs::read(&state).unwrap();
    let text = String::from_utf8(good.clone()).unwrap();
    let other_layout = text.replacen("{\"schema\":", "{\"schema\":9", 1);
    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    let not_json = "it is not a saved state";
    for (number, content, problem) in [
        (1, Vec::new(), not_json),
        (2, good[..good.len() / 2].to_vec(), not_json),
        (3, b"\0\0\0\0".to_vec(), not_json),
        (4, flipped, "state"),
        (5, other_layout.into_bytes(), "layout"),
    ] {
        world.machine.sigterm(STOP_LIMIT).await.unwrap();
        std::fs::write(&state, &content).unwrap();
        world.start_daemon_again().await;
        let aside = format!("state.json.bad-{number}");
        let told = |twin: &Value| twin["twinboot"]["notices"].to_string().contains(&aside);
        let twin = world.until("it is told", told).await;
        let notices = twin["twinboot"]["notices"].to_string();
        for part in ["could not be understood", problem, "began anew"] {
            assert!(notices.contains(part), "{number}: {part:?} is missing: {notices}");
        }
        assert_eq!(std::fs::read(world.folder().join("state").join(aside)).unwrap(), content);
    }
    // The newest are kept, and the rest does not fill the partition.
    let kept = std::fs::read_dir(world.folder().join("state")).unwrap();
    let kept =
        kept.filter(|entry| entry.as_ref().unwrap().path().display().to_string().contains("bad-"));
    assert_eq!(kept.count(), 3);
    let id = world.update("2.0.0.img").await;
    world.over(&id).await;
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_folder_that_cannot_be_written_is_told_until_it_can() {
    let mut world = World::new().await;
    let state = world.folder().join("state");
    let mounted = Mounted::new(Path::new("tmpfs"), "tmpfs", &state, MsFlags::MS_RDONLY, "");
    world.machine.boot().unwrap();
    let notices = |twin: &Value| twin["twinboot"]["notices"].to_string();
    world.until("it is told", |twin| notices(twin).contains("Read-only")).await;
    let payload = json!({ "fwPackageUri": world.url("2.0.0.img") });
    let (status, answer) = world.call("firmwareUpdate", payload).await.unwrap();
    assert_eq!((status, &answer["error"]), (500, &json!("stateNotSaved")), "{answer}");

    mount(None::<&str>, &mounted.0, None::<&str>, MsFlags::MS_REMOUNT, None::<&str>).unwrap();
    world.up().await;
    world.until("it is over", |twin| notices(twin) == "null").await;
    world.machine.kill9();
}

/// As a medium is at its end. A restart may mend that, so it is served.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_state_on_a_read_only_medium_is_told_and_the_device_can_be_restarted() {
    let mut world = World::started().await;
    world.machine.sigterm(STOP_LIMIT).await.unwrap();
    let state = world.folder().join("state");
    let read_only = Mounted::new(&state, "none", &state, MsFlags::MS_BIND, "");
    std::fs::write(state.join("state.json"), "{ half a file").unwrap();
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(None::<&str>, &read_only.0, None::<&str>, flags, None::<&str>).unwrap();
    // It cannot save that the slot is good, so it is not "up".
    world.machine.start_daemon().unwrap();
    let told = |twin: &Value| twin["twinboot"]["notices"].to_string().contains("it stays where");
    world.until("it is told", told).await;
    let (status, answer) = world.call("reboot", json!(null)).await.unwrap();
    assert_eq!((status, &answer["result"]), (200, &json!("restarting")), "{answer}");
    world.machine.restart_order(LIMIT).await.unwrap();
    world.machine.kill9();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_credential_that_systemd_hands_over_goes_before_the_file() {
    let mut world = World::new().await;
    let file = world.folder().join("hub-credential");
    let credential = std::fs::read(&file).unwrap();
    write_secret(&file, b"HostName=nowhere.invalid;DeviceId=x;SharedAccessKey=bm8=");
    let folder = world.folder().join("credentials");
    std::fs::create_dir(&folder).unwrap();
    write_secret(&folder.join("hub-credential"), &credential);
    world.machine.environment("CREDENTIALS_DIRECTORY", &folder);
    world.machine.boot().unwrap();
    world.up().await;
}

fn write_secret(path: &Path, content: &[u8]) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, content).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_setting_of_the_downloads_is_told_and_the_device_stays_on_the_hub() {
    let mut world = World::new().await;
    world.machine.set("fetch.ca_file", "/nowhere/ca.pem");
    world.machine.boot().unwrap();
    world.up().await;
    let told = |twin: &Value| twin["twinboot"]["notices"].to_string().contains("/nowhere/ca.pem");
    world.until("it is told", told).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_folder_that_goes_away_refuses_updates_until_it_is_back() {
    let mut world = World::started().await;
    let (state, away) = (world.folder().join("state"), world.folder().join("away"));
    std::fs::rename(&state, &away).unwrap();
    let payload = json!({ "fwPackageUri": world.url("2.0.0.img") });
    let (status, answer) = world.call("firmwareUpdate", payload).await.unwrap();
    assert_eq!((status, &answer["error"]), (500, &json!("stateNotSaved")), "{answer}");
    let output = world.twinboot(&["install", &world.url("2.0.0.img")]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("state.json") && text.contains("stateNotSaved"), "{text}");
    assert_eq!(world.images.seen("/2.0.0.img").len(), 0);
    let notices = |twin: &Value| twin["twinboot"]["notices"].to_string();
    world.until("it is told", |twin| notices(twin).contains("cannot save the state")).await;
    std::fs::rename(&away, &state).unwrap();
    world.until("it is over by itself", |twin| notices(twin) == "null").await;
    let id = world.update("2.0.0.img").await;
    world.over(&id).await;
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_on_a_slot_is_taken_only_if_the_setting_says_so() {
    let mut world = World::new().await;
    let systemd = Systemd::listen(&mut world.machine);
    let device = world.machine.slot('A').device.clone();
    assert!(world.machine.slot('A').is_block_device(), "this test needs loop devices");
    let at = world.folder().join("mounted");
    let _mounted = Mounted::new(&device, "ext4", &at, MsFlags::empty(), "");
    world.machine.set("state.directory", at.join("lib").display().to_string());
    world.machine.boot().unwrap();
    assert!(!world.ended().await.success());
    let log = world.log();
    for part in
        ["lies on slot A", "an update would lose it", "state.directory", "state.allow_on_slot"]
    {
        assert!(log.contains(part), "{part:?} is missing: {log}");
    }
    assert_eq!(systemd.told(), Vec::<String>::new());
    assert!(!at.join("lib").exists(), "nothing is written there");

    world.machine.set("state.allow_on_slot", true);
    world.machine.start_daemon().unwrap();
    world.up().await;
    assert!(world.log().contains("WARN the state folder"), "{}", world.log());
    world.machine.sigterm(STOP_LIMIT).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_is_clean_when_nothing_happens_or_nobody_answers() {
    let mut world = World::started().await;
    let stopped = async |world: &mut World, what: &str| {
        let status = world.machine.sigterm(STOP_LIMIT).await.unwrap();
        assert!(status.success(), "{what}: {status}");
        assert!(!world.machine.socket().exists(), "{what}: the socket is taken away");
        world.machine.start_daemon().unwrap();
        world.up().await;
    };
    stopped(&mut world, "idle").await;

    // A server that says nothing, and one that stops in the middle.
    for (what, fault) in [("no answer", Fault::Silence), ("a stall", Fault::Stall(3 << 20))] {
        let asked = world.images.seen("/2.0.0.img").len();
        world.fault("2.0.0.img", [fault]);
        let id = world.update("2.0.0.img").await;
        let came = async {
            while world.images.seen("/2.0.0.img").len() == asked {
                world.play(crate::world::machine::LOOK).await;
            }
        };
        tokio::time::timeout(LIMIT, came).await.expect("the image is asked for");
        stopped(&mut world, what).await;
        let twin = world.over(&id).await;
        assert_eq!(twin["twinboot"]["lastUpdate"]["result"], "succeeded", "{what}");
    }

    // No hub.
    let hub = world.stop_hub().await;
    let status = world.machine.sigterm(STOP_LIMIT).await.unwrap();
    assert!(status.success(), "offline: {status}");
    world.machine.start_daemon().unwrap();
    world.start_hub(hub).await;
    world.up().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn systemd_hears_when_the_service_is_ready_alive_and_stopping() {
    let mut world = World::new().await;
    let systemd = Systemd::listen(&mut world.machine);
    world.start().await;
    systemd.hears("READY=1").await;
    systemd.hears("STATUS=idle; connected to ").await;
    world.fault("2.0.0.img", [Fault::Stall(3 << 20)]);
    world.update("2.0.0.img").await;
    systemd.hears("STATUS=fetching an update into slot B, ").await;
    // Alive in mid work, and again.
    let before = systemd.times("WATCHDOG=1");
    let alive = async {
        while systemd.times("WATCHDOG=1") < before + 2 {
            world.play(crate::world::machine::LOOK).await;
        }
    };
    tokio::time::timeout(LIMIT, alive).await.expect("it feeds the watchdog");
    assert_eq!((systemd.times("READY=1"), systemd.times("STOPPING=1")), (1, 0));
    world.call("cancelFirmwareUpdate", Value::Null).await.unwrap();
    let id = world.update("2.0.0.img").await;
    world.over(&id).await;
    systemd.hears("STATUS=restarting into slot B").await;
    systemd.hears("STATUS=idle; the last update is confirmed").await;
    world.machine.sigterm(STOP_LIMIT).await.unwrap();
    let told = systemd.told();
    assert_eq!(told.last().map(String::as_str), Some("STOPPING=1"), "{told:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn systemd_hears_nothing_of_a_service_that_must_not_run() {
    let mut world = World::new().await;
    let systemd = Systemd::listen(&mut world.machine);
    world.machine.set("update.max_attempts", 0);
    world.machine.boot().unwrap();
    assert!(!world.ended().await.success());
    let log = world.log();
    assert!(log.contains("`update.max_attempts`") && log.contains("from 1 to 100"), "{log}");

    // The configuration is good and the bootloader does not answer.
    world.machine.set("update.max_attempts", 5);
    world.machine.bootloader_refuses(&["running"]).unwrap();
    world.machine.start_daemon().unwrap();
    assert!(!world.ended().await.success());
    assert!(world.log().contains("which slot runs"), "{}", world.log());
    assert_eq!(systemd.times("READY=1"), 0, "{:#?}", systemd.told());

    world.machine.bootloader_refuses(&[]).unwrap();
    world.machine.start_daemon().unwrap();
    systemd.hears("READY=1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_systemd_that_does_not_listen_stops_nothing() {
    let mut world = World::new().await;
    let path = world.folder().join("deaf");
    let _deaf = UnixDatagram::bind(&path).unwrap();
    let filler = UnixDatagram::unbound().unwrap();
    filler.set_nonblocking(true).unwrap();
    while filler.send_to(b"X=1", &path).is_ok() {}
    world.machine.environment("NOTIFY_SOCKET", &path);
    world.start().await;
    let id = world.update("2.0.0.img").await;
    let twin = world.over(&id).await;
    assert_eq!(twin["twinboot"]["lastUpdate"]["result"], "succeeded");
    let status = world.machine.sigterm(STOP_LIMIT).await.unwrap();
    assert!(status.success(), "{status}");
}
