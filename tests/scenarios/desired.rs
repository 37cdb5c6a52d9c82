//! Contract C: the desired properties ask for a version.

use hubsim::EventKind;
use serde_json::{Value, json};

use crate::world::images::{Fault, File};
use crate::world::{DEVICE, HALF, World, phase, side_by_side};

fn status(twin: &Value) -> &Value {
    &twin["firmware"]["fwUpdateStatus"]
}

/// Whether nothing is under way and this version runs.
fn settled(twin: &Value, version: &str) -> bool {
    twin["twinboot"]["update"]["phase"] == "idle"
        && twin["firmware"]["currentFwVersion"] == version
        && twin["twinboot"]["confirmed"] == true
}

/// 2.0.0 is desired, and half of it is there.
async fn half_of_2_0_0(world: &mut World) {
    world.fault("2.0.0.img", [Fault::Hold(HALF)]);
    world.desire("2.0.0", "2.0.0.img");
    world.until("2.0.0 downloads", |twin| phase(twin) == "downloading").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_desired_before_the_first_connection_is_done() {
    let mut world = World::new().await;
    world.desire("2.0.0", "2.0.0.img.zst");
    world.machine.boot().unwrap();
    let twin = world.until("2.0.0 runs", |twin| settled(twin, "2.0.0")).await;
    assert_eq!(status(&twin), "current");
    assert_eq!(twin["iothubDM"]["firmwareUpdate"]["status"], "applyComplete");
    assert_eq!(twin["firmwareStatus"], "completed");
    assert_eq!(twin["twinboot"]["lastUpdate"]["origin"], "desired");
    // All that time the hub could tell what was on its way.
    let pending = world.history("/firmware/pendingFwVersion");
    assert_eq!(pending, [json!(""), json!("2.0.0"), json!("")]);
    world.assert_runs('B', "2.0.0");
    // And not done again after the boot, although the hub still holds the same document.
    world.machine.restart().await.unwrap();
    world.online().await;
    assert_eq!(world.images.seen("/2.0.0.img.zst").len(), 1);
    assert_eq!(status(&world.reported()), "current");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newer_of_two_desired_versions_wins_in_mid_download() {
    let mut world = World::started().await;
    half_of_2_0_0(&mut world).await;
    world.desire("3.0.0", "3.0.0.img");
    let twin = world.until("3.0.0 runs", |twin| settled(twin, "3.0.0")).await;
    assert_eq!(status(&twin), "current");
    world.assert_runs('B', "3.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_twin_replaced_as_a_whole_counts_like_a_patch() {
    let mut world = World::started().await;
    half_of_2_0_0(&mut world).await;
    let firmware = json!({ "fwVersion": "3.0.0", "fwPackageURI": world.url("3.0.0.img") });
    let twin = json!({ "properties": { "desired": { "firmware": firmware, "other": 1 } } });
    world.hub().replace_twin(DEVICE, twin).unwrap();
    world.until("3.0.0 runs", |twin| settled(twin, "3.0.0")).await;
    world.assert_runs('B', "3.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_member_deep_inside_may_change() {
    let mut world = World::started().await;
    // The version is told, but the place is wrong.
    world.desire("2.0.0", "no-such.img");
    world.until("it failed", |twin| status(twin) == "error").await;
    let place = json!({ "firmware": { "fwPackageURI": world.url("2.0.0.img") } });
    world.hub().patch_desired(DEVICE, place).unwrap();
    world.until("2.0.0 runs", |twin| settled(twin, "2.0.0")).await;
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_longer_desired_is_not_done() {
    side_by_side([json!({ "firmware": null }), Value::Null].map(|withdrawal| async move {
        let mut world = World::started().await;
        half_of_2_0_0(&mut world).await;
        world.hub().patch_desired(DEVICE, withdrawal).unwrap();
        let twin = world
            .until("it is over", |twin| twin["twinboot"]["lastUpdate"]["result"] == "cancelled")
            .await;
        assert_eq!(twin["twinboot"]["lastUpdate"]["code"], "withdrawn");
        assert!(settled(&twin, "1.0.0"));
        world.assert_at_home();
    }))
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_withdrawn_before_its_turn_is_not_done() {
    let mut world = World::started().await;
    let id = world.half_an_update("2.0.0.img").await;
    world.desire("3.0.0", "3.0.0.img");
    world.hub().patch_desired(DEVICE, json!({ "firmware": null })).unwrap();
    // Calls and documents come in the order in which they were sent.
    world.online().await;
    world.images.release();
    world.over(&id).await;
    world.online().await;
    world.assert_runs('B', "2.0.0");
    assert_eq!(world.images.seen("/3.0.0.img").len(), 0);
    assert_eq!(phase(&world.reported()), "idle");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_is_not_the_desired_version_does_not_make_a_loop() {
    let mut world = World::started().await;
    world.desire("2.0.0", "3.0.0.img");
    let twin = world.until("what came runs", |twin| settled(twin, "3.0.0")).await;
    assert_eq!(status(&twin), "current");
    let mut events = world.events();
    world.machine.power_cut().unwrap();
    world.event(&mut events, |kind| matches!(kind, EventKind::TwinGet { .. })).await;
    world.online().await;
    assert_eq!(phase(&world.reported()), "idle");
    assert_eq!(world.images.seen("/3.0.0.img").len(), 1);
    world.assert_runs('B', "3.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_desired_section_that_makes_no_sense_is_told_and_can_be_put_right() {
    let mut world = World::started().await;
    let url = world.url("2.0.0.img");
    for (firmware, key) in [
        (json!({ "fwVersion": 7, "fwPackageURI": url }), "fwVersion"),
        (json!({ "fwVersion": "2.0.0", "fwPackageURI": [] }), "fwPackageURI"),
        (json!({ "fwVersion": "2.0.0", "fwPackageURI": url, "fwSize": "big" }), "fwSize"),
    ] {
        world.hub().patch_desired(DEVICE, json!({ "firmware": null })).unwrap();
        world.hub().patch_desired(DEVICE, json!({ "firmware": firmware })).unwrap();
        world
            .until("it is told", |twin| {
                let words = twin["firmware"]["fwUpdateSubstatus"].as_str().unwrap_or_default();
                status(twin) == "error" && words.contains(key)
            })
            .await;
    }
    assert_eq!(world.images.seen("/2.0.0.img").len(), 0);
    world.hub().patch_desired(DEVICE, json!({ "firmware": null })).unwrap();
    world.desire("2.0.0", "2.0.0.img");
    world.until("2.0.0 runs", |twin| settled(twin, "2.0.0")).await;
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_version_is_not_tried_again_until_somebody_writes_it_again() {
    let mut world = World::started().await;
    let path = "/2.0.0.img";
    let wrong = "ab".repeat(32);
    let firmware = json!({
        "fwVersion": "2.0.0",
        "fwPackageURI": world.url("2.0.0.img"),
        "fwPackageCheckValue": wrong,
    });
    world.hub().patch_desired(DEVICE, json!({ "firmware": firmware })).unwrap();
    let twin = world.until("it failed", |twin| status(twin) == "error").await;
    assert_eq!(twin["twinboot"]["lastUpdate"]["code"], "digestMismatch");
    let tried = world.images.seen(path).len();

    // Neither a new connection nor a restart nor a write of something else brings it back.
    let mut events = world.events();
    world.hub().faults(DEVICE).drop_now().unwrap();
    world.event(&mut events, |kind| matches!(kind, EventKind::TwinGet { .. })).await;
    world.machine.power_cut().unwrap();
    world.event(&mut events, |kind| matches!(kind, EventKind::TwinGet { .. })).await;
    world.online().await;
    world.hub().patch_desired(DEVICE, json!({ "interval": 5 })).unwrap();
    let (code, body) = world.call("getFirmwareStatus", Value::Null).await.unwrap();
    assert_eq!((code, &body["update"]["phase"]), (200, &json!("idle")));
    assert_eq!(world.images.seen(path).len(), tried);
    assert_eq!(status(&world.reported()), "error", "the truth stays in the twin");

    // The same, written again: somebody means it.
    world.hub().patch_desired(DEVICE, json!({ "firmware": firmware })).unwrap();
    let limit = crate::world::machine::LIMIT;
    let again = async {
        while world.images.seen(path).len() == tried {
            tokio::time::sleep(crate::world::machine::LOOK).await;
        }
    };
    tokio::time::timeout(limit, again).await.expect("it is tried again");
    world.until("it failed again", |twin| status(twin) == "error").await;

    // And an operator's method may ask for just that, with the right digest.
    let id = world.update("2.0.0.img").await;
    world.over(&id).await;
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_was_rolled_back_is_not_tried_again() {
    let mut world = World::new().await;
    world.machine.set("update.trial_limit_s", 5);
    world.only_well_as("1.0.0", "not well");
    world.start().await;
    world.desire("2.0.0", "2.0.0.img.zst");
    world.until("it is rolled back", |twin| status(twin) == "rolledback").await;
    world.machine.power_cut().unwrap();
    let mut events = world.events();
    world.event(&mut events, |kind| matches!(kind, EventKind::TwinGet { .. })).await;
    world.online().await;
    let (_, body) = world.call("getFirmwareStatus", Value::Null).await.unwrap();
    assert_eq!(body["update"]["phase"], "idle");
    assert_eq!(world.images.seen("/2.0.0.img.zst").len(), 1);
    let twin = world.reported();
    assert_eq!(
        (status(&twin), &twin["firmware"]["pendingFwVersion"]),
        (&json!("rolledback"), &json!(""))
    );
    // Another one is.
    world.get_well();
    world.desire("3.0.0", "3.0.0.img");
    world.until("3.0.0 runs", |twin| settled(twin, "3.0.0")).await;
    world.assert_runs('B', "3.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_version_that_runs_is_up_to_date() {
    let mut world = World::started().await;
    world.desire("1.0.0", "2.0.0.img");
    let twin = world
        .until("it is told", |twin| {
            twin["firmware"]["fwUpdateSubstatus"] == "Firmware already up to date"
        })
        .await;
    assert_eq!(status(&twin), "current");
    assert_eq!(world.images.seen("/2.0.0.img").len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unprotected_url_is_an_error_in_the_tutorials_words() {
    let mut world = World::started().await;
    for url in ["http://localhost/2.0.0.img", "httpsfoo:bar"] {
        let firmware = json!({ "fwVersion": "2.0.0", "fwPackageURI": url });
        world.hub().patch_desired(DEVICE, json!({ "firmware": firmware })).unwrap();
        let twin = world.until("it is refused", |twin| status(twin) == "error").await;
        let substatus = twin["firmware"]["fwUpdateSubstatus"].as_str().unwrap();
        assert!(substatus.contains("Insecure package URI"), "{url}: {substatus}");
        world.hub().patch_desired(DEVICE, json!({ "firmware": null })).unwrap();
        world.desire("1.0.0", "2.0.0.img");
        world.until("it is current", |twin| status(twin) == "current").await;
        world.hub().patch_desired(DEVICE, json!({ "firmware": null })).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_desired_during_a_run_by_method_comes_after_it() {
    let mut world = World::started().await;
    world.half_an_update("2.0.0.img").await;
    world.desire("3.0.0", "3.0.0.img");
    world.images.release();
    let twin = world.until("3.0.0 runs", |twin| settled(twin, "3.0.0")).await;
    assert_eq!(twin["twinboot"]["slots"]["B"]["version"], "2.0.0");
    world.assert_runs('A', "3.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_whose_digest_nobody_knows_is_refused() {
    let mut world = World::started().await;
    world.images.put("/plain.img", File::new(vec![0; 4096]).with([Fault::Status(500, vec![])]));
    world.desire("2.0.0", "plain.img");
    let twin = world.until("it failed", |twin| status(twin) == "error").await;
    assert_eq!(twin["twinboot"]["lastUpdate"]["code"], "digestMissing", "{twin}");
    assert_eq!(world.images.seen("/plain.img").len(), 0, "not a byte is fetched");
}
