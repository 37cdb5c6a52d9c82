//! The image server misbehaves, or the image is not what it should be.

use std::collections::VecDeque;

use serde_json::{Value, json};

use crate::world::images::{Fault, File};
use crate::world::release::{IMAGE_BYTES, digest_of};
use crate::world::{World, image};

/// Asks for an update with these members beside the URL, and waits for its end.
async fn run(world: &mut World, file: &str, more: Value) -> Value {
    let mut payload = json!({ "fwPackageUri": world.url(file) });
    payload.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let (status, answer) = world.call("firmwareUpdate", payload).await.unwrap();
    assert_eq!(status, 200, "{answer}");
    world.over(answer["id"].as_str().unwrap()).await
}

/// The run failed with this code before the new slot was tried, and the device is as it was.
#[track_caller]
fn assert_failed(world: &World, twin: &Value, code: &str) -> String {
    let last = &twin["twinboot"]["lastUpdate"];
    assert_eq!((&last["result"], &last["code"]), (&json!("failed"), &json!(code)), "{last}");
    let running = world.machine.running().unwrap();
    assert_eq!((running.slot, running.version.as_str()), ('A', "1.0.0"));
    assert_eq!(world.machine.variables().unwrap(), ("A".to_owned(), String::new()));
    world.assert_bootable();
    last["reason"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cuts_stalls_and_errors_of_the_server_are_outlived() {
    let mut world = World::new().await;
    world.machine.set("fetch.stall_limit_s", 1);
    world.start().await;
    world.fault(
        "2.0.0.img",
        [
            Fault::Status(503, vec![]),
            Fault::Cut(3_000_000),
            Fault::Stall(2_000_000),
            Fault::Status(500, vec![]),
            Fault::Cut(1_500_000),
        ],
    );
    let id = world.update("2.0.0.img").await;
    let twin = world.over(&id).await;
    assert_eq!(twin["twinboot"]["lastUpdate"]["result"], "succeeded");
    world.assert_runs('B', "2.0.0");
    // Ranges: what had come was not fetched again.
    let sent = world.images.sent_since("/2.0.0.img", 0) as u64;
    assert!(sent < IMAGE_BYTES + 1_000_000, "{sent} bytes for {IMAGE_BYTES}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_never_gets_better_is_given_up() {
    let mut world = World::new().await;
    world.machine.set("fetch.retry_budget_s", 3);
    world.start().await;
    world.fault("2.0.0.img", std::iter::repeat_n(Fault::Status(503, vec![]), 50));
    let twin = run(&mut world, "2.0.0.img", json!({})).await;
    let reason = assert_failed(&world, &twin, "network");
    assert!(reason.contains("503"), "{reason}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_not_let_in_is_told_at_once() {
    let mut world = World::started().await;
    world.fault("2.0.0.img", [Fault::Status(403, vec![])]);
    let twin = run(&mut world, "2.0.0.img", json!({})).await;
    assert_failed(&world, &twin, "accessDenied");
    assert_eq!(world.images.seen("/2.0.0.img").len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lies_about_lengths_and_ranges_do_no_harm() {
    let mut world = World::new().await;
    world.machine.set("fetch.retry_budget_s", 3);
    world.start().await;
    for lie in ["bytes 0-99/100", "bytes 5000000-6000000/7000000", "nonsense"] {
        world.fault("2.0.0.img", [Fault::Cut(3_000_000), Fault::Lie(lie.to_owned())]);
        let twin = run(&mut world, "2.0.0.img", json!({})).await;
        let result = twin["twinboot"]["lastUpdate"]["result"].as_str().unwrap();
        match result {
            // Tried again until the server told the truth.
            "succeeded" => {
                let slot = world.machine.running().unwrap().slot;
                world.assert_runs(slot, "2.0.0");
            }
            _ => assert!(result == "failed", "{twin}"),
        }
        world.assert_bootable();
        world.images.edit("/2.0.0.img", |file| file.faults = VecDeque::new());
        world.online().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_length_that_is_not_the_announced_one_is_refused() {
    let mut world = World::started().await;
    let twin = run(&mut world, "2.0.0.img", json!({ "fwSize": 1000 })).await;
    assert_failed(&world, &twin, "digestMismatch");
    let twin = run(&mut world, "2.0.0.img", json!({ "fwSize": IMAGE_BYTES })).await;
    assert_eq!(twin["twinboot"]["lastUpdate"]["result"], "succeeded");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_changes_on_the_server_is_noticed() {
    let mut world = World::started().await;
    let other = std::fs::read(image("3.0.0")).unwrap();
    let digest = digest_of(&other);
    let validator = Some("\"v2\"".to_owned());
    world.fault("2.0.0.img", [Fault::Change(4_000_000, other, validator)]);
    // By the digest that was read first, no mixture can pass; what is there now is another image.
    let twin = run(&mut world, "2.0.0.img", json!({})).await;
    let last = &twin["twinboot"]["lastUpdate"];
    assert_eq!(last["result"], "failed", "{last}");
    assert!(["imageChanged", "digestMismatch"].contains(&last["code"].as_str().unwrap()), "{last}");
    world.assert_bootable();
    // Asked for as what it is now, it is installed.
    let twin = run(&mut world, "2.0.0.img", json!({ "fwPackageCheckValue": digest })).await;
    assert_eq!(twin["twinboot"]["lastUpdate"]["result"], "succeeded");
    world.assert_runs('B', "3.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_redirect_leads_out_of_https() {
    let mut world = World::started().await;
    let plain = format!("http://localhost:{}/2.0.0.img", world.images.http_port);
    let redirect = Fault::Status(302, vec![("Location".to_owned(), plain)]);
    world.images.put("/moved.img", File::new(vec![]).with(vec![redirect; 8]));
    let digest = digest_of(&std::fs::read(image("2.0.0")).unwrap());
    let twin = run(&mut world, "moved.img", json!({ "fwPackageCheckValue": digest })).await;
    let last = &twin["twinboot"]["lastUpdate"];
    assert_eq!(last["result"], "failed", "{last}");
    assert_eq!(world.images.seen("/2.0.0.img").len(), 0, "nothing is fetched in the clear");
    world.assert_bootable();

    // One that stays in https is followed.
    let there = world.url("2.0.0.img");
    let redirect = Fault::Status(307, vec![("Location".to_owned(), there)]);
    world.images.put("/moved2.img", File::new(vec![]).with(vec![redirect; 8]));
    let twin = run(&mut world, "moved2.img", json!({ "fwPackageCheckValue": digest })).await;
    assert_eq!(twin["twinboot"]["lastUpdate"]["result"], "succeeded", "{twin}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_takes_a_setting_and_a_digest() {
    let mut world = World::new().await;
    world.machine.set("fetch.allow_http", true);
    world.start().await;
    let url = format!("http://localhost:{}/2.0.0.img.zst", world.images.http_port);
    let (status, answer) =
        world.call("firmwareUpdate", json!({ "fwPackageUri": url })).await.unwrap();
    assert_eq!((status, &answer["key"]), (400, &json!("fwPackageUri")), "{answer}");
    let packed = std::fs::read(image("2.0.0").with_extension("img.zst")).unwrap();
    let payload = json!({ "fwPackageUri": url, "fwPackageCheckValue": digest_of(&packed) });
    let (status, answer) = world.call("firmwareUpdate", payload).await.unwrap();
    assert_eq!(status, 200, "{answer}");
    world.over(answer["id"].as_str().unwrap()).await;
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_larger_than_the_slot_is_refused_before_a_byte_is_written() {
    let mut world = World::started().await;
    let large = vec![0_u8; IMAGE_BYTES as usize + 4096];
    let digest = digest_of(&large);
    let before = std::fs::read(&world.machine.slot('B').device).unwrap();
    for has_length in [true, false] {
        world.images.put("/large.img", File { has_length, ..File::new(large.clone()) });
        let twin = run(&mut world, "large.img", json!({ "fwPackageCheckValue": digest })).await;
        assert_failed(&world, &twin, "tooLarge");
        let now = std::fs::read(&world.machine.slot('B').device).unwrap();
        assert!(!has_length || now == before, "the slot was written");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decompression_bomb_stops_at_the_end_of_the_slot() {
    let mut world = World::started().await;
    let zeros = vec![0_u8; 4 * IMAGE_BYTES as usize];
    let bomb = zstd::stream::encode_all(zeros.as_slice(), 1).unwrap();
    let digest = digest_of(&bomb);
    world.images.put("/bomb.zst", File::new(bomb));
    let twin = run(&mut world, "bomb.zst", json!({ "fwPackageCheckValue": digest })).await;
    assert_failed(&world, &twin, "tooLarge");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_compressed_data_is_refused() {
    let mut world = World::started().await;
    let mut packed = std::fs::read(image("2.0.0").with_extension("img.gz")).unwrap();
    let middle = packed.len() / 2;
    packed[middle..middle + 16].fill(0xff);
    let digest = digest_of(&packed);
    world.images.put("/damaged.gz", File::new(packed));
    let twin = run(&mut world, "damaged.gz", json!({ "fwPackageCheckValue": digest })).await;
    let code = twin["twinboot"]["lastUpdate"]["code"].as_str().unwrap();
    assert_eq!(code, "corruptImage");
    world.assert_bootable();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_nobody_vouches_for_is_not_trusted() {
    let mut world = World::new().await;
    // The hub's authority did not sign the image server's certificate.
    let hub_ca = world.folder().join("hub-ca.pem").display().to_string();
    world.machine.set("fetch.ca_file", hub_ca);
    world.machine.set("fetch.retry_budget_s", 2);
    world.start().await;
    let twin = run(&mut world, "2.0.0.img", json!({})).await;
    let last = &twin["twinboot"]["lastUpdate"];
    assert_eq!(last["result"], "failed");
    assert!(last["reason"].as_str().unwrap().contains("certificate"), "{last}");
    assert_eq!(world.images.seen("/2.0.0.img").len(), 0);
}
