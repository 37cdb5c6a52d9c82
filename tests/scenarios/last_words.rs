//! After a rollback: what the failed boot wrote last, in the twin and on the device.

use std::fs;

use hubsim::EventKind;
use serde_json::{Value, json};

use crate::hub::{ballast, fill_twin};
use crate::world::World;
use crate::world::journal::{self, entry};
use crate::world::machine::{Happening, LIMIT};

const SECRET: &str = "hunter2";

impl World {
    /// The shared secret of the device.
    fn key(&self) -> String {
        let credential = fs::read_to_string(self.folder().join("hub-credential")).unwrap();
        credential.split_once("SharedAccessKey=").unwrap().1.trim().to_owned()
    }

    /// What both slots wrote into their journal: the boot in which the update was asked for, and the
    /// present one, in which these errors happened.
    fn write_journal(&self, before: &str, errors: &[&str]) {
        let mut said = vec![entry(1000, 6, "app", "starting"), entry(2000, 5, "twinbootd", "here")];
        let errors = errors.iter().enumerate();
        said.extend(errors.map(|(at, text)| entry(3000 + at as u64 * 100, 3, "app", text)));
        let folder = self.folder().join("journal");
        journal::Machine::new(&folder, 0xa)
            .boot(before, &[entry(1000, 3, "app", "of the boot before")])
            .boot(&self.machine.boot_id().unwrap(), &said)
            .write();
    }

    /// Waits until the twin shows what came of the failed boot's journal.
    async fn last_update(&mut self) -> Value {
        let told = |twin: &Value| {
            let last = &twin["twinboot"]["lastUpdate"];
            last.get("journal").is_some() || last.get("journalNote").is_some()
        };
        self.until("the journal is told", told).await["twinboot"]["lastUpdate"].clone()
    }

    #[track_caller]
    fn assert_nowhere(&self, secret: &str) {
        for change in self.hub().reported_history(crate::world::DEVICE) {
            assert!(!change.patch.to_string().contains(secret), "{}", change.patch);
        }
        for arguments in [&["status"][..], &["status", "--json"]] {
            let output = self.twinboot(arguments);
            assert!(!String::from_utf8_lossy(&output.stdout).contains(secret), "{output:?}");
        }
        let state = fs::read_to_string(self.folder().join("state/state.json")).unwrap();
        assert!(!state.contains(secret), "{state}");
        assert!(!self.log().contains(secret), "{}", self.log());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sick_image_leaves_its_last_words_and_no_secret() {
    let mut world = World::new().await;
    world.only_well_as("1.0.0", "the app does not answer");
    world.machine.set_in("2.0.0", "update.trial_limit_s", 5);
    world.start().await;
    let before = world.machine.boot_id().unwrap();
    let id = world.update("2.0.0.img").await;
    world.machine.restart_order(LIMIT).await.unwrap();
    world.machine.restart().await.unwrap();
    let key = world.key();
    let refused = format!("the broker refused {key}");
    let login = format!("password={SECRET} for https://me:{SECRET}@h/x?sig={SECRET}");
    world.write_journal(&before, &["cannot open /dev/ttyS7", &refused, &login]);

    let twin = world.over(&id).await;
    assert_eq!(twin["twinboot"]["lastUpdate"]["code"], "unhealthy");
    let last = world.last_update().await;
    assert_eq!(
        last["journal"],
        json!([
            "1.0s app: starting",
            "2.0s twinbootd: here",
            "3.0s err app: cannot open /dev/ttyS7",
            "3.1s err app: the broker refused [redacted]",
            "3.2s err app: password=[redacted]",
        ])
    );
    assert_eq!((&last["result"], last.get("journalNote")), (&json!("rolledBack"), None));
    let told = String::from_utf8(world.twinboot(&["status"]).stdout).unwrap();
    assert!(told.contains("journal    1.0s app: starting\n           2.0s twinbootd"), "{told}");
    for secret in [SECRET, &key] {
        world.assert_nowhere(secret);
    }

    // It was read once; what comes later is not of the failed boot.
    fs::remove_dir_all(world.folder().join("journal")).unwrap();
    world.machine.kill9();
    world.start_daemon_again().await;
    assert_eq!(world.last_update().await, last);
    // The next update has an outcome of its own.
    world.get_well();
    let id = world.update("2.0.0.img").await;
    let twin = world.over(&id).await;
    assert_eq!(twin["twinboot"]["lastUpdate"].get("journal"), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_in_which_the_agent_never_ran_is_found_in_the_journal() {
    let mut world = World::new().await;
    world.machine.set_in("2.0.0", "hub.no_such_key", 1);
    world.start().await;
    let before = world.machine.boot_id().unwrap();
    let id = world.update("2.0.0.img").await;
    world.machine.restart_order(LIMIT).await.unwrap();
    world.machine.restart().await.unwrap();
    let ended = tokio::time::timeout(LIMIT, world.machine.next()).await.unwrap().unwrap();
    assert!(matches!(ended, Happening::Ended(_)), "{ended:?}");
    world.write_journal(&before, &["out of memory"]);
    // The reading is slower than the report, and the power goes meanwhile.
    let slow = world.folder().join("bin/journalctl");
    fs::write(&slow, "#!/bin/sh\nexec sleep 60\n").unwrap();
    fs::set_permissions(&slow, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path =
        format!("{}:{}", world.folder().join("bin").display(), std::env::var("PATH").unwrap());
    world.machine.environment("PATH", path.as_ref());
    world.machine.power_cut().unwrap();
    let twin = world.over(&id).await;
    let last = &twin["twinboot"]["lastUpdate"];
    assert_eq!((&last["code"], last.get("journal")), (&json!("fellBack"), None));
    fs::remove_file(slow).unwrap();
    world.machine.power_cut().unwrap();
    let lines =
        json!(["1.0s app: starting", "2.0s twinbootd: here", "3.0s err app: out of memory"]);
    assert_eq!(world.last_update().await["journal"], lines);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_left_nothing_in_the_journal_is_told_as_that() {
    for (setting, says) in [
        (None, Some("the failed boot left nothing in the journal")),
        (Some(("report.journal_directory", "/no/such/journal")), Some("/no/such/journal")),
        (Some(("report.journal_lines", "")), None),
    ] {
        let mut world = World::new().await;
        match setting {
            Some((key, "")) => world.machine.set(key, 0),
            Some((key, value)) => world.machine.set(key, value),
            None => {}
        }
        world.machine.set_in("2.0.0", "hub.no_such_key", 1);
        world.start().await;
        let id = world.update("2.0.0.img").await;
        world.machine.restart_order(LIMIT).await.unwrap();
        world.machine.power_cut().unwrap();
        world.machine.power_cut().unwrap();
        let twin = world.over(&id).await;
        let Some(says) = says else {
            // An update from beginning to end, and still not a word of it.
            let id = world.update("none.img").await;
            world.over(&id).await;
            assert!(world.history("/twinboot/lastUpdate/journalNote").iter().all(Value::is_null));
            continue;
        };
        assert_eq!(twin["twinboot"]["lastUpdate"]["result"], "rolledBack");
        let note = world.last_update().await["journalNote"].to_string();
        assert!(note.contains(says), "{note}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_full_twin_the_journal_is_the_first_to_go() {
    let mut world = World::new().await;
    world.machine.set("report.journal_lines", 50);
    world.machine.set_in("2.0.0", "hub.no_such_key", 1);
    fill_twin(world.hub(), ballast(28, 1000)).await;
    world.start().await;
    let before = world.machine.boot_id().unwrap();
    let id = world.update("2.0.0.img").await;
    world.machine.restart_order(LIMIT).await.unwrap();
    world.machine.restart().await.unwrap();
    let errors: Vec<String> =
        (0..50).map(|at| format!("{at} {}", "went wrong ".repeat(20))).collect();
    world.write_journal(&before, &errors.iter().map(String::as_str).collect::<Vec<_>>());
    let mut events = world.events();
    world.machine.power_cut().unwrap();
    let twin = world.over(&id).await;
    assert_eq!(twin["twinboot"]["lastUpdate"]["code"], "fellBack");
    let refused = |kind: &EventKind| matches!(kind, EventKind::Reported { status: 400..=499, .. });
    world.event(&mut events, refused).await;
    // Here all lines are; there not one, and nothing else is missing.
    let lines = |status: &Value| status["lastUpdate"]["journal"].as_array().map_or(0, Vec::len);
    let limit = tokio::time::Instant::now() + LIMIT;
    let status = loop {
        let (_, status) = world.call("getFirmwareStatus", Value::Null).await.unwrap();
        if lines(&status) > 0 {
            break status;
        }
        assert!(tokio::time::Instant::now() < limit, "{status}");
        tokio::time::sleep(crate::world::machine::LOOK).await;
    };
    assert!(lines(&status) >= 15, "{status}");
    // The next report comes after that.
    world.desire("4.0.0", "none.img");
    let failed = |twin: &Value| twin["twinboot"]["lastUpdate"]["code"] == "digestMissing";
    let twin = world.until("the next outcome is told", failed).await;
    assert_eq!(twin["other"], ballast(28, 1000));
    assert_eq!(twin["firmware"]["fwUpdateStatus"], "error");
    assert_eq!(twin["iothubDM"]["firmwareUpdate"]["status"], "downloadfailed");
    assert_eq!(world.history("/twinboot/lastUpdate/journal").len(), 1);
}
