//! What direct methods answer, and what follows.

use std::time::Duration;

use hubsim::{EventKind, HubError};
use serde_json::{Value, json};

use crate::world::images::Fault;
use crate::world::{DEVICE, HALF, World, is_over, phase};

/// A device in the middle of a trial that only an operator can end, and the run's id.
async fn in_trial() -> (World, String) {
    let mut world = World::new().await;
    world.only_well_as("1.0.0", "still warming up");
    world.start().await;
    let id = world.update("2.0.0.img.zst").await;
    world.until("the trial", |twin| phase(twin) == "trial").await;
    world.online().await;
    (world, id)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_update_is_refused_and_the_same_one_is_not_started_twice() {
    let mut world = World::started().await;
    let id = world.half_an_update("2.0.0.img").await;

    let other = json!({ "fwPackageUri": world.url("3.0.0.img") });
    let (status, answer) = world.call("firmwareUpdate", other).await.unwrap();
    assert_eq!((status, &answer["error"], &answer["id"]), (409, &json!("busy"), &json!(id)));

    let same = json!({ "fwPackageUri": world.url("2.0.0.img") });
    let (status, answer) = world.call("firmwareUpdate", same).await.unwrap();
    assert_eq!((status, &answer["id"]), (200, &json!(id)), "{answer}");

    world.images.release();
    world.over(&id).await;
    world.assert_runs('B', "2.0.0");
    assert_eq!(world.images.seen("/2.0.0.img").len(), 1);
    assert_eq!(world.images.seen("/3.0.0.img").len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_timed_out_can_be_repeated() {
    let mut world = World::started().await;
    world.fault("2.0.0.img", [Fault::Hold(HALF)]);
    // The report that the answer waits for is acknowledged late.
    let faults = world.hub().faults(DEVICE);
    faults.delay_next_response(Duration::from_secs(4)).unwrap();
    let payload = json!({ "fwPackageUri": world.url("2.0.0.img") });
    let limit = Duration::from_millis(500);
    let late = world.hub().invoke(DEVICE, "firmwareUpdate", payload.clone(), limit).await;
    let error = late.unwrap_err();
    assert!(matches!(error, HubError::NoAnswer { .. }) && error.code() == 504_101, "{error}");

    let (status, answer) = world.call("firmwareUpdate", payload).await.unwrap();
    assert_eq!((status, &answer["result"]), (200, &json!("alreadyRunning")), "{answer}");
    world.until("it downloads", |twin| phase(twin) == "downloading").await;
    world.images.release();
    world.over(answer["id"].as_str().unwrap()).await;
    world.assert_runs('B', "2.0.0");
    assert_eq!(world.images.seen("/2.0.0.img").len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_is_delivered_twice_starts_one_run() {
    let mut world = World::started().await;
    world.hub().faults(DEVICE).deliver_next_method_twice().unwrap();
    let id = world.update("2.0.0.img").await;
    let twin = world.over(&id).await;
    assert_eq!(twin["twinboot"]["lastUpdate"]["id"], id);
    world.assert_runs('B', "2.0.0");
    assert_eq!(world.images.seen("/2.0.0.img").len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_is_off_is_not_online() {
    let mut world = World::started().await;
    let mut events = world.events();
    world.machine.sigterm(Duration::from_secs(10)).await.unwrap();
    world.event(&mut events, |kind| matches!(kind, EventKind::Disconnected { .. })).await;
    let error = world.call("firmwareUpdate", json!("https://h/x")).await.unwrap_err();
    assert!(matches!(error, HubError::NotOnline { .. }) && error.code() == 404_103, "{error}");
    world.machine.start_daemon().unwrap();
    world.online().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_done_is_refused_with_key_value_and_rule() {
    let world = World::started().await;
    let limit = Duration::from_secs(30);
    for (payload, key, word) in [
        (r#""""#, "fwPackageUri", "https"),
        ("null", "payload", "fwPackageUri"),
        ("[1]", "payload", "fwPackageUri"),
        ("{}", "fwPackageUri", "fwPackageUri"),
        (r#""not a url""#, "fwPackageUri", "https"),
        (r#"{"fwPackageUri":17}"#, "fwPackageUri", "number"),
        (r#"{"fwPackageUri":"http://h/x.img"}"#, "fwPackageUri", "https"),
        (r#"{"fwPackageUri":"file:///etc/passwd"}"#, "fwPackageUri", "https"),
        (
            r#"{"fwPackageUri":"https://h/x","fwPackageCheckValue":"12"}"#,
            "fwPackageCheckValue",
            "64",
        ),
        (r#"{"fwPackageUri":"https://h/x","fwVersion":"a b"}"#, "fwVersion", "ASCII"),
        (r#"{"fwPackageUri":"https://h/x","fwSize":-1}"#, "fwSize", "-1"),
    ] {
        let bytes = payload.as_bytes().to_vec();
        let answer = world.hub().invoke_raw(DEVICE, "firmwareUpdate", bytes, limit).await;
        let (status, body) = answer.unwrap();
        assert_eq!((status, &body["error"]), (400, &json!("invalidPayload")), "{payload}: {body}");
        assert_eq!(body["key"], key, "{payload}: {body}");
        assert!(body.to_string().contains(word), "{payload}: {body}");
    }
    let (status, body) = world.call("selfDestruct", json!(null)).await.unwrap();
    assert_eq!((status, &body["error"]), (404, &json!("unknownMethod")));
    for known in ["firmwareUpdate", "cancelFirmwareUpdate", "getFirmwareStatus", "reboot"] {
        assert!(body["methods"].as_array().unwrap().contains(&json!(known)), "{body}");
    }
    assert_eq!(world.reported()["iothubDM"]["firmwareUpdate"]["status"], "waiting");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_makes_no_sense_now_is_refused() {
    let world = World::started().await;
    for (method, error) in [
        ("cancelFirmwareUpdate", "nothing"),
        ("confirmFirmware", "nothing"),
        ("rollbackFirmware", "noWayBack"),
    ] {
        let (status, body) = world.call(method, json!(null)).await.unwrap();
        assert_eq!((status, &body["error"]), (409, &json!(error)), "{method}: {body}");
        assert!(body["message"].is_string());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_can_be_taken_back_while_it_is_fetched() {
    let mut world = World::started().await;
    let id = world.half_an_update("2.0.0.img").await;
    let (status, answer) = world.call("cancelFirmwareUpdate", json!(null)).await.unwrap();
    assert_eq!((status, &answer["result"], &answer["id"]), (200, &json!("cancelled"), &json!(id)));
    let twin = world.over(&id).await;
    assert_eq!(twin["twinboot"]["lastUpdate"]["result"], "cancelled");
    assert_eq!(twin["twinboot"]["slots"]["B"]["state"], "incomplete");
    assert_eq!(world.machine.variables().unwrap(), ("A".to_owned(), String::new()));
    // Nobody writes the slot any more, so the next one may.
    let next = world.update("3.0.0.img").await;
    world.over(&next).await;
    world.assert_runs('B', "3.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_status_is_told_with_live_figures() {
    let mut world = World::started().await;
    let id = world.half_an_update("2.0.0.img").await;
    let asked = async {
        loop {
            let (status, body) = world.call("getFirmwareStatus", Value::Null).await.unwrap();
            assert_eq!(status, 200);
            if body["update"]["percent"].as_u64().is_some_and(|percent| percent >= 49) {
                return body;
            }
        }
    };
    let body = tokio::time::timeout(crate::world::machine::LIMIT, asked).await.unwrap();
    assert_eq!(body["update"]["id"], id);
    assert_eq!(body["update"]["bytesTotal"], crate::world::release::IMAGE_BYTES);
    assert_eq!(body["hub"]["online"], true);
    assert!(body["text"].as_str().unwrap().contains("into slot B"), "{body}");
    world.images.release();
    world.over(&id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_may_confirm_a_trial() {
    let (mut world, id) = in_trial().await;
    let (status, answer) = world.call("confirmFirmware", json!(null)).await.unwrap();
    assert_eq!(status, 200, "{answer}");
    let twin = world.over(&id).await;
    assert_eq!(twin["twinboot"]["lastUpdate"]["result"], "succeeded");
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_may_end_a_trial_and_nothing_else_disturbs_it() {
    let (mut world, id) = in_trial().await;
    for (method, payload) in [
        ("firmwareUpdate", json!({ "fwPackageUri": world.url("3.0.0.img") })),
        ("cancelFirmwareUpdate", json!(null)),
    ] {
        let (status, answer) = world.call(method, payload).await.unwrap();
        assert_eq!(status, 409, "{method}: {answer}");
    }
    let (status, answer) = world.call("rollbackFirmware", json!(null)).await.unwrap();
    assert_eq!(status, 200, "{answer}");
    let twin = world.over(&id).await;
    let last = &twin["twinboot"]["lastUpdate"];
    assert_eq!(
        (&last["result"], &last["code"]),
        (&json!("rolledBack"), &json!("rolledBackByOperator"))
    );
    let running = world.machine.running().unwrap();
    assert_eq!((running.slot, running.version.as_str()), ('A', "1.0.0"));
    world.assert_bootable();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_may_go_back_after_a_confirmed_update() {
    let mut world = World::started().await;
    let id = world.update("2.0.0.img").await;
    world.over(&id).await;
    world.online().await;
    let (status, answer) = world.call("rollbackFirmware", json!(null)).await.unwrap();
    assert_eq!(status, 200, "{answer}");
    let twin = world
        .until("it runs 1.0.0 again", |twin| {
            twin["twinboot"]["runningVersion"] == "1.0.0"
                && twin["twinboot"]["update"]["phase"] == "idle"
        })
        .await;
    assert_eq!(twin["twinboot"]["lastUpdate"]["result"], "succeeded");
    assert_eq!(twin["firmware"]["currentFwVersion"], "1.0.0");
    world.assert_runs('A', "1.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reboot_is_done_and_told() {
    let mut world = World::started().await;
    let (status, answer) = world.call("reboot", json!(null)).await.unwrap();
    assert_eq!((status, &answer["result"]), (200, &json!("restarting")), "{answer}");
    world.machine.restart_order(crate::world::machine::LIMIT).await.unwrap();
    world.machine.restart().await.unwrap();
    world.online().await;
    let twin = world
        .until("it is told", |twin| twin["iothubDM"]["reboot"]["lastReboot"].is_string())
        .await;
    assert_eq!(twin["twinboot"]["bootedSlot"], "A");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reboot_in_mid_download_goes_on_where_it_was() {
    let mut world = World::started().await;
    let id = world.half_an_update("2.0.0.img").await;
    world.half_is_proven().await;
    let (status, _) = world.call("reboot", json!(null)).await.unwrap();
    assert_eq!(status, 200);
    world.until("it is confirmed", |twin| is_over(twin, &id)).await;
    world.assert_runs('B', "2.0.0");
    let seen = world.images.seen("/2.0.0.img");
    assert!(seen.len() == 2 && seen[1].from.is_some_and(|from| from > 1 << 20), "{seen:?}");
}
