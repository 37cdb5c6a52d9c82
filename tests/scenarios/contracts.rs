//! What operators' programs read of an update, in every contract, when it goes well and when not.

use std::time::Duration;

use serde_json::{Value, json};

use crate::world::images::Fault;
use crate::world::release::Form;
use crate::world::{DEVICE, HALF, World, is_over, phase};

/// The values of a place in the twin, as texts, without those that are absent.
fn texts(world: &World, pointer: &str) -> Vec<String> {
    let values = world.history(pointer);
    let mut texts: Vec<String> =
        values.iter().filter_map(Value::as_str).map(str::to_owned).collect();
    texts.dedup();
    texts
}

/// Whether `found` has its members in the order of `whole`, with the same first and last one.
#[track_caller]
fn assert_course(found: &[String], whole: &[&str], what: &str) {
    let mut rest = whole.iter();
    let in_order = found.iter().all(|value| rest.any(|step| step == value));
    let ends = (found.first().map(String::as_str), found.last().map(String::as_str));
    let wanted = (whole.first().copied(), whole.last().copied());
    assert!(in_order && ends == wanted, "{what}: {found:?}, but should go as {whole:?}");
}

fn is_iso(value: &Value) -> bool {
    let text = value.as_str().unwrap_or_default().as_bytes();
    text.len() == 24 && text[10] == b'T' && text[19] == b'.' && text[23] == b'Z'
}

fn is_python(value: &Value) -> bool {
    let text = value.as_str().unwrap_or_default().as_bytes();
    text.len() == 26 && text[10] == b' ' && text[19] == b'.'
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fresh_agent_reports_every_contract_before_anything_is_asked() {
    let world = World::started().await;
    let first = &world.hub().reported_history(DEVICE)[0].reported;
    assert_eq!(first["iothubDM"]["firmwareUpdate"], json!({ "status": "waiting" }));
    assert_eq!(first["iothubDM"]["firmwareVersion"], "1.0.0");
    assert_eq!(first["firmwareStatus"], "standBy");
    assert!(is_python(&first["logTime"]), "{first}");
    assert_eq!(
        first["firmware"],
        json!({
            "currentFwVersion": "1.0.0",
            "pendingFwVersion": "",
            "fwUpdateStatus": "current",
            "fwUpdateSubstatus": "",
            "lastFwUpdateStartTime": "",
            "lastFwUpdateEndTime": "",
        })
    );
    assert_eq!(first["twinboot"]["bootedSlot"], "A");
    assert_eq!(first["twinboot"]["agentVersion"], env!("CARGO_PKG_VERSION"));
    let now = world.reported();
    assert_eq!(now["twinboot"]["slots"]["A"], json!({ "state": "good", "version": "1.0.0" }));
    assert_eq!(now["twinboot"]["slots"]["B"]["state"], "unknown");
    world.assert_bootable();
}

/// One whole update by method; the payload is sent as these bytes.
async fn by_method(form: Form, encode: impl Fn(&str) -> String) {
    let mut world = World::started().await;
    let url = world.url(form.of("2.0.0").as_str());
    let payload = encode(&url);
    let limit = Duration::from_secs(30);
    let (status, answer) = world
        .hub()
        .invoke_raw(DEVICE, "firmwareUpdate", payload.into_bytes(), limit)
        .await
        .unwrap();
    assert_eq!(status, 200, "{answer}");
    let twin = world.over(answer["id"].as_str().unwrap()).await;
    world.assert_runs('B', "2.0.0");

    assert_course(
        &texts(&world, "/iothubDM/firmwareUpdate/status"),
        &["waiting", "downloading", "downloadComplete", "applying", "applyComplete"],
        "contracts A and D",
    );
    let update = &twin["iothubDM"]["firmwareUpdate"];
    for key in
        ["startedWaitingTime", "downloadCompleteTime", "startedApplyingImage", "lastFirmwareUpdate"]
    {
        assert!(is_iso(&update[key]), "{key} in {update}");
    }
    assert_eq!(update["fwPackageUri"], url);
    assert_eq!(update.get("error"), None);
    assert_eq!(twin["iothubDM"]["firmwareVersion"], "2.0.0");

    assert_course(
        &texts(&world, "/firmwareStatus"),
        &["standBy", "downloading", "applying", "completed"],
        "contract B",
    );
    for key in ["logTime", "downloadComplete", "startedApplyingImage", "lastFirmwareUpdate"] {
        assert!(is_python(&twin[key]), "{key} in {twin}");
    }

    assert_course(
        &texts(&world, "/firmware/fwUpdateStatus"),
        &["current", "downloading", "verifying", "applying", "rebooting", "current"],
        "contract C",
    );
    let firmware = &twin["firmware"];
    assert_eq!(
        (&firmware["currentFwVersion"], &firmware["pendingFwVersion"]),
        (&json!("2.0.0"), &json!(""))
    );
    assert!(is_iso(&firmware["lastFwUpdateStartTime"]) && is_iso(&firmware["lastFwUpdateEndTime"]));

    let own = &twin["twinboot"];
    assert_eq!((&own["bootedSlot"], &own["confirmed"]), (&json!("B"), &json!(true)));
    assert_eq!(own["lastUpdate"]["result"], "succeeded");
    assert_eq!(
        (&own["slots"]["A"]["state"], &own["slots"]["B"]["state"]),
        (&json!("good"), &json!("good"))
    );

    // The end of the update is told only where the new system reports it.
    for change in world.hub().reported_history(DEVICE) {
        let done = change.reported["iothubDM"]["firmwareUpdate"]["status"] == "applyComplete"
            || change.reported["iothubDM"]["firmwareUpdate"].get("lastFirmwareUpdate").is_some()
            || change.reported["firmwareStatus"] == "completed";
        assert!(!done || change.reported["twinboot"]["bootedSlot"] == "B", "{}", change.reported);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn updates_from_an_object_to_a_raw_image() {
    by_method(Form::Raw, |url| json!({ "fwPackageUri": url }).to_string()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn updates_from_json_in_a_string_to_a_zstd_image() {
    by_method(Form::Zst, |url| json!(json!({ "fwPackageUri": url }).to_string()).to_string()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn updates_from_a_bare_url_to_a_gzip_image() {
    by_method(Form::Gz, |url| json!(url).to_string()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn updates_from_the_dotnet_tutorials_text_to_an_xz_image() {
    by_method(Form::Xz, |url| format!("{{ fwPackageUri : '{url}' }}")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_run_is_in_the_twin_when_the_answer_comes_right_after_an_old_end() {
    let mut world = World::started().await;
    let first = world.update("2.0.0.img").await;
    let old = world.over(&first).await;
    assert_eq!(old["firmwareStatus"], "completed");

    world.fault("3.0.0.img", [Fault::Hold(HALF)]);
    let second = world.update("3.0.0.img").await;
    // What the tutorials' programs look at, at the moment of the answer.
    let twin = world.reported();
    assert_ne!(twin["iothubDM"]["firmwareUpdate"]["status"], "applyComplete");
    assert_eq!(twin["firmwareStatus"], "downloading");
    assert_eq!(twin["firmware"]["fwUpdateStatus"], "downloading");
    assert_eq!(twin["twinboot"]["update"]["id"], second);
    for gone in ["lastFirmwareUpdate", "downloadCompleteTime", "startedApplyingImage", "error"] {
        assert_eq!(twin["iothubDM"]["firmwareUpdate"].get(gone), None, "{gone} of the old run");
    }
    assert_eq!(twin.get("lastFirmwareUpdate"), None);
    world.until("it downloads", |twin| phase(twin) == "downloading").await;
    world.images.release();
    world.over(&second).await;
    world.assert_runs('A', "3.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn progress_is_seen_in_the_twin() {
    let mut world = World::started().await;
    world.fault("2.0.0.img", [Fault::Slow(40_000)]);
    let id = world.update("2.0.0.img").await;
    world.over(&id).await;
    let percents: Vec<u64> =
        world.history("/twinboot/update/percent").iter().filter_map(Value::as_u64).collect();
    assert!(percents.iter().any(|percent| (1..100).contains(percent)), "{percents:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mere_progress_is_not_told_more_often_than_it_should() {
    let mut world = World::new().await;
    world.machine.set("report.progress_interval_s", 3600);
    world.start().await;
    // Twelve checkpoints, and hundreds of steps.
    let id = world.update("2.0.0.img").await;
    world.over(&id).await;
    let history = world.hub().reported_history(DEVICE);
    let told = history.iter().filter(|change| phase(&change.reported) == "downloading").count();
    assert_eq!(told, 1, "once when it began");
}

/// What the contracts show of a failed update.
struct Failure {
    status: &'static str,
    code: &'static str,
    substatus: &'static str,
}

async fn assert_failed(world: &mut World, id: &str, expected: &Failure) {
    let twin = world.over(id).await;
    let update = &twin["iothubDM"]["firmwareUpdate"];
    assert_eq!(update["status"], expected.status, "{update}");
    assert_eq!(update["error"]["code"], expected.code, "{update}");
    let message = update["error"]["message"].as_str().unwrap();
    assert!(message.contains(expected.substatus), "{message}");
    assert_eq!(update.get("lastFirmwareUpdate"), None);
    // Contract B knows no failure: the device stands by again.
    assert_eq!(twin["firmwareStatus"], "standBy");
    let firmware = &twin["firmware"];
    assert_eq!(firmware["currentFwVersion"], "1.0.0");
    assert_eq!(firmware["pendingFwVersion"], "");
    assert_eq!(firmware["fwUpdateStatus"], "error");
    assert!(firmware["fwUpdateSubstatus"].as_str().unwrap().contains(expected.substatus));
    assert!(is_iso(&firmware["lastFwUpdateEndTime"]), "{firmware}");
    let last = &twin["twinboot"]["lastUpdate"];
    assert_eq!((&last["result"], &last["code"]), (&json!("failed"), &json!(expected.code)));
    let running = world.machine.running().unwrap().clone();
    assert_eq!((running.slot, running.version.as_str()), ('A', "1.0.0"));
    assert_eq!(world.machine.variables().unwrap(), ("A".to_owned(), String::new()));
    world.assert_bootable();

    // The next run is a clean one.
    let id = world.update("2.0.0.img").await;
    let twin = world.reported();
    assert_eq!(twin["iothubDM"]["firmwareUpdate"].get("error"), None, "the old error is cleared");
    world.until("it is confirmed", |twin| is_over(twin, &id)).await;
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_image_is_told_and_ends_it_at_once() {
    let mut world = World::started().await;
    let url = world.url("no-such.img");
    let digest = "ab".repeat(32);
    let payload = json!({ "fwPackageUri": url, "fwPackageCheckValue": digest });
    let (status, answer) = world.call("firmwareUpdate", payload).await.unwrap();
    assert_eq!(status, 200, "{answer}");
    let expected = Failure { status: "downloadfailed", code: "notFound", substatus: "404" };
    assert_failed(&mut world, answer["id"].as_str().unwrap(), &expected).await;
    assert_eq!(world.images.seen("/no-such.img").len(), 1, "404 is not tried again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_digest_is_told_and_the_slot_is_never_tried() {
    let mut world = World::started().await;
    let digest = "ab".repeat(32);
    let payload = json!({ "fwPackageUri": world.url("3.0.0.img"), "fwPackageCheckValue": digest });
    let (status, answer) = world.call("firmwareUpdate", payload).await.unwrap();
    assert_eq!(status, 200, "{answer}");
    let expected =
        Failure { status: "downloadfailed", code: "digestMismatch", substatus: "abababab" };
    assert_failed(&mut world, answer["id"].as_str().unwrap(), &expected).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bootloader_that_refuses_is_an_apply_failure() {
    let mut world = World::started().await;
    world.machine.bootloader_refuses(&["try"]).unwrap();
    let id = world.update("3.0.0.img").await;
    let refused = world.over(&id).await;
    assert_eq!(refused["iothubDM"]["firmwareUpdate"]["status"], "applyFailed");
    world.machine.bootloader_refuses(&[]).unwrap();
    // Asked again, the same update goes through.
    let again = world.update("3.0.0.img").await;
    world.over(&again).await;
    world.assert_runs('B', "3.0.0");
    assert!(refused["twinboot"]["lastUpdate"]["reason"].as_str().unwrap().contains("read-only"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_image_that_is_not_well_is_rolled_back_and_says_why() {
    let mut world = World::new().await;
    world.machine.set("update.trial_limit_s", 5);
    world.only_well_as("1.0.0", "the pump is dead");
    world.start().await;
    let id = world.update("2.0.0.img.zst").await;
    let twin = world.over(&id).await;
    world.assert_bootable();
    let running = world.machine.running().unwrap();
    assert_eq!((running.slot, running.version.as_str()), ('A', "1.0.0"));
    assert_eq!(world.machine.variables().unwrap(), ("A".to_owned(), String::new()));

    let update = &twin["iothubDM"]["firmwareUpdate"];
    assert_eq!(
        (&update["status"], &update["error"]["code"]),
        (&json!("applyFailed"), &json!("unhealthy"))
    );
    assert_eq!(twin["firmwareStatus"], "standBy");
    assert_eq!(twin["firmware"]["fwUpdateStatus"], "rolledback");
    let substatus = twin["firmware"]["fwUpdateSubstatus"].as_str().unwrap();
    assert!(substatus.starts_with("Rolled back to: 1.0.0"), "{substatus}");
    let last = &twin["twinboot"]["lastUpdate"];
    assert_eq!(last["result"], "rolledBack");
    assert!(last["reason"].as_str().unwrap().contains("the pump is dead"), "{last}");
    assert_eq!(twin["twinboot"]["slots"]["B"]["state"], "bad");
    assert_course(
        &texts(&world, "/firmware/fwUpdateStatus"),
        &["current", "downloading", "verifying", "applying", "rebooting", "error", "rolledback"],
        "contract C",
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_does_not_boot_is_left_by_the_bootloader_and_told() {
    let mut world = World::started().await;
    // Whole by its digest, but no file system.
    let rubbish = vec![7_u8; 1 << 20];
    let digest = crate::world::release::digest_of(&rubbish);
    world.images.put("/rubbish.img", crate::world::images::File::new(rubbish));
    let payload =
        json!({ "fwPackageUri": world.url("rubbish.img"), "fwPackageCheckValue": digest });
    let (status, answer) = world.call("firmwareUpdate", payload).await.unwrap();
    assert_eq!(status, 200, "{answer}");
    let twin = world.over(answer["id"].as_str().unwrap()).await;
    let running = world.machine.running().unwrap();
    assert_eq!((running.slot, running.fell_back), ('A', true));
    let last = &twin["twinboot"]["lastUpdate"];
    assert_eq!((&last["result"], &last["code"]), (&json!("rolledBack"), &json!("fellBack")));
    world.assert_bootable();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_contract_can_be_switched_off() {
    let mut world = World::new().await;
    world.machine.set("report.iothub_dm", false);
    world.machine.set("report.firmware_status", false);
    world.machine.set("report.firmware", false);
    world.start().await;
    let id = world.update("2.0.0.img").await;
    let twin = world.over(&id).await;
    let names: Vec<&str> = twin
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .filter(|key| !key.starts_with('$'))
        .collect();
    assert_eq!(names, ["twinboot"]);
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_in_plain_files_are_updated_too() {
    let mut world = World::with(hubsim::Options::default(), false).await;
    assert!(!world.machine.slot('B').is_block_device());
    world.start().await;
    world.fault("2.0.0.img.zst", [Fault::Cut(100_000)]);
    let id = world.update("2.0.0.img.zst").await;
    world.over(&id).await;
    world.assert_runs('B', "2.0.0");
}
