//! What a trial tells apart: a bad image from a missing network, a clean restart from a crash, a
//! slot that was tried from one that was not.

use std::time::Duration;

use serde_json::{Value, json};

use crate::world::World;
use crate::world::machine::LIMIT;

/// The trial limit of the images here; shorter than most of these stories.
const SHORT_S: u64 = 5;

/// The guard's exit code while the trial still has time.
const NOT_YET: i32 = 75;

impl World {
    /// A device that was asked for release 2.0.0 and is about to be restarted into it.
    async fn about_to_try(&mut self) -> String {
        self.start().await;
        let id = self.update("2.0.0.img").await;
        self.machine.restart_order(LIMIT).await.unwrap();
        id
    }

    /// Something of the trial as it is saved.
    fn trial(&self, member: &str) -> Value {
        let pointer = format!("/saved/state/trial/{member}");
        self.machine.saved().pointer(&pointer).cloned().unwrap_or_default()
    }

    /// Waits until the trial has waited for the network much longer than an image without this
    /// excuse could have.
    async fn outlives_the_short_limit(&self) {
        let outlived = |world: &World| {
            let seconds = |member: &str| world.trial(member).as_u64().unwrap_or_default();
            let (began_s, seen_s) = (seconds("began_s"), seconds("outage/seen_s"));
            began_s > 0 && seen_s >= began_s + 2 * SHORT_S
        };
        self.eventually("the short limit is over", outlived).await;
    }

    fn status_says(&self, words: &str) -> bool {
        let output = self.twinboot(&["status"]);
        String::from_utf8_lossy(&output.stdout).contains(words)
    }

    fn guard_says(&self) -> Option<i32> {
        self.machine.guard().unwrap().code()
    }

    /// The hub comes back, and the device tells how its update ended.
    async fn last_of(&mut self, id: &str) -> Value {
        self.over(id).await["twinboot"]["lastUpdate"].clone()
    }
}

#[track_caller]
fn assert_ended(last: &Value, result: &str, code: Option<&str>) {
    assert_eq!((&last["result"], &last["code"]), (&json!(result), &json!(code)), "{last}");
}

// Outage -------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cable_that_is_pulled_out_in_the_trial_costs_time_and_not_the_image() {
    let mut world = World::new().await;
    world.machine.set("update.trial_limit_s", SHORT_S as i64);
    let id = world.about_to_try().await;
    let stopped = world.stop_hub().await;
    world.machine.cable(false).unwrap();
    assert_eq!(world.machine.restart().await.unwrap().slot, 'B');
    let says = |world: &World| world.status_says("waits for the network: eth0 is up and has no");
    world.eventually("the status says what it waits for", says).await;
    world.outlives_the_short_limit().await;
    assert_eq!(world.guard_says(), Some(NOT_YET), "the daemon lives and waits");
    // The daemon's own restart changes nothing.
    world.machine.kill9();
    world.machine.start_daemon().unwrap();
    world.eventually("the trial goes on", |world| world.trial("starts") == 2).await;
    world.machine.cable(true).unwrap();
    world.start_hub(stopped).await;
    let last = world.last_of(&id).await;
    assert_ended(&last, "succeeded", None);
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_network_excuses_nothing_else() {
    let mut world = World::new().await;
    world.machine.set("update.trial_limit_s", SHORT_S as i64);
    world.only_well_as("1.0.0", "the application is dead");
    let id = world.about_to_try().await;
    let stopped = world.stop_hub().await;
    world.machine.cable(false).unwrap();
    world.machine.restart().await.unwrap();
    // Long before the limit for an outage.
    world.machine.restart_order(LIMIT).await.expect("it is left");
    assert_eq!(world.machine.restart().await.unwrap().slot, 'A');
    world.machine.cable(true).unwrap();
    world.start_hub(stopped).await;
    let last = world.last_of(&id).await;
    assert_ended(&last, "rolledBack", Some("unhealthy"));
    assert!(last["reason"].to_string().contains("the application is dead"), "{last}");
    world.assert_at_home();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_without_a_network_device_is_a_bad_image() {
    let mut world = World::new().await;
    world.machine.set("update.trial_limit_s", SHORT_S as i64);
    let id = world.about_to_try().await;
    let stopped = world.stop_hub().await;
    world.machine.no_network_device().unwrap();
    world.machine.restart().await.unwrap();
    world.machine.restart_order(LIMIT).await.expect("it is left");
    assert_eq!(world.trial("outage"), Value::Null);
    assert_eq!(world.machine.restart().await.unwrap().slot, 'A');
    world.machine.cable(true).unwrap();
    world.start_hub(stopped).await;
    let last = world.last_of(&id).await;
    assert_ended(&last, "rolledBack", Some("unhealthy"));
    assert!(last["reason"].to_string().contains("no hub session"), "{last}");
    world.assert_at_home();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_has_an_end_too_and_is_the_reason_then() {
    let mut world = World::new().await;
    world.machine.set("update.trial_limit_s", SHORT_S as i64);
    world.machine.set("update.trial_outage_limit_s", 2 * SHORT_S as i64);
    let id = world.about_to_try().await;
    let stopped = world.stop_hub().await;
    world.machine.cable(false).unwrap();
    world.machine.restart().await.unwrap();
    world.machine.restart_order(LIMIT).await.expect("it is left");
    world.machine.restart().await.unwrap();
    world.machine.cable(true).unwrap();
    world.start_hub(stopped).await;
    let last = world.last_of(&id).await;
    assert_ended(&last, "rolledBack", Some("unhealthy"));
    assert!(last["reason"].to_string().contains("eth0 is up and has no carrier"), "{last}");
    world.assert_at_home();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_the_old_slot_missed_as_well_is_waited_for() {
    let mut world = World::new().await;
    world.machine.set("update.trial_limit_s", SHORT_S as i64);
    let stopped = world.stop_hub().await;
    world.machine.boot().unwrap();
    let home = |world: &World| world.machine.saved().pointer("/saved/home") == Some(&json!("A"));
    world.eventually("slot A is home", home).await;
    let url = world.url("2.0.0.img");
    let install = world.twinboot(&["install", "--detach", "--json", &url]);
    let answer: Value = serde_json::from_slice(&install.stdout).unwrap();
    world.machine.restart_order(LIMIT).await.unwrap();
    assert_eq!(world.machine.restart().await.unwrap().slot, 'B');
    let says = |world: &World| world.status_says("the old slot could not reach the hub either");
    world.eventually("the status says what it waits for", says).await;
    world.outlives_the_short_limit().await;
    world.start_hub(stopped).await;
    let last = world.last_of(answer["id"].as_str().unwrap()).await;
    assert_ended(&last, "succeeded", None);
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_guard_ends_a_waiting_trial_whose_daemon_is_dead() {
    let mut world = World::new().await;
    world.machine.set("update.trial_limit_s", SHORT_S as i64);
    let id = world.about_to_try().await;
    let stopped = world.stop_hub().await;
    world.machine.cable(false).unwrap();
    world.machine.restart().await.unwrap();
    world.outlives_the_short_limit().await;
    world.machine.kill9();
    world.machine.forget_orders();
    assert_eq!(world.guard_says(), Some(NOT_YET), "it may just be started again");
    let ends = |world: &World| world.guard_says() == Some(0);
    world.eventually("the guard has enough", ends).await;
    world.machine.restart_order(LIMIT).await.expect("the guard orders a restart");
    assert_eq!(world.machine.restart().await.unwrap().slot, 'A');
    world.machine.cable(true).unwrap();
    world.start_hub(stopped).await;
    let last = world.last_of(&id).await;
    assert_ended(&last, "rolledBack", Some("fellBack"));
}

// Clean restarts -----------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clean_restart_in_the_trial_is_nobodys_failure() {
    let mut world = World::new().await;
    world.only_well_as("1.0.0", "not yet");
    let id = world.about_to_try().await;
    world.machine.restart().await.unwrap();
    for stops in 1..=2 {
        world.saved_state("trial").await;
        let boot = if stops % 2 == 0 {
            world.machine.off_and_on().await.unwrap()
        } else {
            world.machine.systemctl_reboot().await.unwrap()
        };
        assert_eq!(boot.slot, 'B', "it goes on where it was");
        let resumed = |world: &World| {
            world.trial("run/passage/clean_stops") == stops && world.trial("stopped") == false
        };
        world.eventually("the trial goes on", resumed).await;
        assert_eq!(world.trial("starts"), 1);
    }
    world.get_well();
    let last = world.last_of(&id).await;
    assert_ended(&last, "succeeded", None);
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_and_a_new_start_of_the_daemon_are_not_clean_restarts() {
    let mut world = World::new().await;
    world.only_well_as("1.0.0", "not yet");
    let id = world.about_to_try().await;
    world.machine.restart().await.unwrap();
    world.saved_state("trial").await;
    world.machine.sigterm(Duration::from_secs(10)).await.unwrap();
    assert_eq!(world.trial("stopped"), false);
    assert_eq!(world.machine.variables().unwrap().1, "", "nothing is to be tried again");
    world.machine.start_daemon().unwrap();
    world.eventually("the start counts", |world| world.trial("starts") == 2).await;
    assert_eq!(world.machine.power_cut().unwrap().slot, 'A');
    let last = world.last_of(&id).await;
    assert_ended(&last, "rolledBack", Some("fellBack"));
    world.assert_at_home();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_may_restart_the_device_in_its_trial() {
    for tryboot in [false, true] {
        let mut world = World::new().await;
        if tryboot {
            world.machine.use_tryboot().unwrap();
        }
        world.only_well_as("1.0.0", "not yet");
        let id = world.about_to_try().await;
        world.machine.restart().await.unwrap();
        world.saved_state("trial").await;
        world.online().await;
        let (status, answer) = world.call("reboot", json!(null)).await.unwrap();
        assert_eq!((status, &answer["result"]), (200, &json!("restarting")), "{answer}");
        world.machine.restart_order(LIMIT).await.unwrap();
        // What would tell the bootloader something else has to wait now.
        let (status, answer) = world.call("confirmFirmware", json!(null)).await.unwrap();
        assert_eq!((status, &answer["error"]), (409, &json!("tooLate")), "{answer}");
        assert_eq!(world.machine.restart().await.unwrap().slot, 'B');
        world.get_well();
        let last = world.last_of(&id).await;
        assert_ended(&last, "succeeded", None);
        assert_eq!(world.machine.running().unwrap().slot, 'B');
        assert!(world.reported()["iothubDM"]["reboot"]["lastReboot"].is_string());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_that_does_not_come_leaves_the_trial_as_it_was() {
    let mut world = World::new().await;
    world.machine.set("restart.limit_s", 1);
    world.only_well_as("1.0.0", "not yet");
    let id = world.about_to_try().await;
    world.machine.restart().await.unwrap();
    world.saved_state("trial").await;
    world.online().await;
    let (status, _) = world.call("reboot", json!(null)).await.unwrap();
    assert_eq!(status, 200);
    let told = |twin: &Value| twin["twinboot"]["notices"].to_string().contains("did not");
    // The machine does not obey.
    let mut events = world.events();
    while !told(&world.reported()) {
        tokio::time::timeout(LIMIT, events.next()).await.expect("it is told");
    }
    world.machine.forget_orders();
    let watched = |world: &World| world.trial("stopped") == false;
    world.eventually("the trial goes on", watched).await;
    let forgotten = |world: &World| world.machine.variables().unwrap().1.is_empty();
    world.eventually("slot B is not to be tried once more", forgotten).await;
    world.get_well();
    let last = world.last_of(&id).await;
    assert_ended(&last, "succeeded", None);
    world.assert_runs('B', "2.0.0");
}

// Slots that were not tried ------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tryboot_flag_that_the_power_took_along_is_set_again() {
    let mut world = World::new().await;
    world.machine.use_tryboot().unwrap();
    let id = world.about_to_try().await;
    assert_eq!(world.machine.power_cut().unwrap().slot, 'A');
    let last = world.last_of(&id).await;
    assert_ended(&last, "succeeded", None);
    assert_eq!(last["armedAgain"], 1, "it is told");
    assert!(world.log().contains("armed again, 2 of 3"), "{}", world.log());
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_by_somebody_else_carries_the_flag() {
    let mut world = World::new().await;
    world.machine.use_tryboot().unwrap();
    world.only_well_as("1.0.0", "not yet");
    let id = world.about_to_try().await;
    assert_eq!(world.machine.systemctl_reboot().await.unwrap().slot, 'B');
    world.saved_state("trial").await;
    assert_eq!(world.machine.systemctl_reboot().await.unwrap().slot, 'B');
    world.eventually("the trial goes on", |world| world.trial("stopped") == false).await;
    // Switched off, nothing can carry it: it is set again.
    assert_eq!(world.machine.off_and_on().await.unwrap().slot, 'A');
    world.machine.restart_order(LIMIT).await.unwrap();
    assert_eq!(world.machine.restart().await.unwrap().slot, 'B');
    world.get_well();
    let last = world.last_of(&id).await;
    assert_ended(&last, "succeeded", None);
    assert_eq!(last["armedAgain"], 1);
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_was_tried_with_the_flag_is_not_tried_again() {
    for systemd in [true, false] {
        let mut world = World::new().await;
        world.machine.use_tryboot().unwrap();
        if !systemd {
            world.machine.set("health.systemctl", "/no/such/program");
        }
        let id = world.about_to_try().await;
        world.machine.sigterm_in_shutdown().await.unwrap();
        // The firmware tried slot B, and its kernel gave up.
        assert_eq!(world.machine.power_cut().unwrap().slot, 'A');
        let last = world.last_of(&id).await;
        assert_ended(&last, "rolledBack", Some("fellBack"));
        assert_eq!(last["armedAgain"], Value::Null);
        world.assert_at_home();
    }
}

// The bootloader -----------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bootloader_that_cannot_be_asked_keeps_no_device_off_the_hub() {
    let mut world = World::started().await;
    world.machine.bootloader_refuses(&["next"]).unwrap();
    world.machine.power_cut().unwrap();
    let notices = |twin: &Value| twin["twinboot"]["notices"].to_string();
    let told = |twin: &Value| notices(twin).contains("the bootloader cannot be asked");
    world.until("it is told", told).await;
    world.online().await;
    let id = world.update("2.0.0.img").await;
    let last = world.last_of(&id).await;
    assert_ended(&last, "failed", Some("bootloader"));
    world.assert_at_home();
    world.machine.bootloader_refuses(&[]).unwrap();
    world.machine.power_cut().unwrap();
    world.until("it is over", |twin| notices(twin) == "null").await;
    world.online().await;
    let id = world.update("2.0.0.img").await;
    let last = world.last_of(&id).await;
    assert_ended(&last, "succeeded", None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_that_would_lead_into_the_old_slot_is_refused() {
    let mut world = World::new().await;
    world.only_well_as("1.0.0", "not yet");
    let id = world.about_to_try().await;
    world.machine.restart().await.unwrap();
    world.saved_state("trial").await;
    world.online().await;
    world.machine.bootloader_refuses(&["try"]).unwrap();
    let (status, answer) = world.call("reboot", json!(null)).await.unwrap();
    assert_eq!((status, &answer["error"]), (500, &json!("bootloader")), "{answer}");
    let told = |twin: &Value| {
        twin["twinboot"]["notices"].to_string().contains("would lead into the old slot")
    };
    world.until("it is told", told).await;
    world.eventually("the trial goes on", |world| world.trial("stopped") == false).await;
    world.machine.bootloader_refuses(&[]).unwrap();
    world.get_well();
    let last = world.last_of(&id).await;
    assert_ended(&last, "succeeded", None);
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_confirmation_that_has_to_wait_for_a_switch_comes_after_it() {
    let mut world = World::started().await;
    let id = world.update("2.0.0.img").await;
    world.over(&id).await;
    // Less than the pause between two tries to confirm, and in all orders more.
    world.machine.set("restart.limit_s", 5);
    world.machine.bootloader_refuses(&["confirm"]).unwrap();
    world.machine.power_cut().unwrap();
    let notices = |twin: &Value| twin["twinboot"]["notices"].to_string();
    world.until("it is told", |twin| notices(twin).contains("mark the running slot good")).await;
    world.online().await;
    let (status, answer) = world.call("rollbackFirmware", json!(null)).await.unwrap();
    assert_eq!(status, 200, "{answer}");
    // The machine does not obey, until that is given up.
    let given_up = |world: &World| {
        let twin = world.reported();
        twin["twinboot"]["update"]["phase"] == "idle"
            && twin["twinboot"]["lastUpdate"]["code"] == "restartFailed"
    };
    world.eventually("the switch is given up", given_up).await;
    world.machine.forget_orders();
    world.machine.bootloader_refuses(&[]).unwrap();
    let confirmed = |twin: &Value| !notices(twin).contains("mark the running slot good");
    world.until("it is confirmed after all", confirmed).await;
    world.assert_runs('B', "2.0.0");
}
