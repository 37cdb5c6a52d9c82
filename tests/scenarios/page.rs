//! What a person reads on hubsim's page while a device is updated.

use std::path::Path;

use tokio::process::Command;

use crate::world::World;

/// The text of the page, one element a line.
async fn page(world: &World) -> String {
    let output = Command::new("node")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios/page.js"))
        .arg(format!("https://localhost:{}", world.hub().https_addr().port()))
        .env("LC_ALL", "en_US.UTF-8")
        .env("NODE_EXTRA_CA_CERTS", world.hub().ca_path())
        .output()
        .await
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn assert_shows(page: &str, texts: &[&str]) {
    for text in texts {
        assert!(format!("\n{page}").contains(&format!("\n{text}\n")), "no {text:?} in\n{page}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_shows_an_update_from_the_download_to_its_end() {
    let mut world = World::started().await;
    world.slow("2.0.0.img", 1);
    let id = world.update("2.0.0.img").await;
    world
        .until("it is half way", |twin| {
            twin["twinboot"]["update"]["percent"].as_u64().is_some_and(|percent| percent >= 40)
        })
        .await;
    let text = page(&world).await;
    assert_shows(&text, &["live, 1 of 1 devices connected", "pi-1", "connected", "downloading"]);
    assert_shows(&text, &["running version\n1.0.0", "A\n running\n1.0.0\ngood"]);
    assert_shows(&text, &["bytesTotal\n12.6 MB", "origin\nmethod", "slot\nB"]);
    let percent = text.lines().find_map(|line| line.strip_suffix(" %")).expect("a percentage");
    assert!(percent.parse::<u64>().unwrap() >= 40, "{percent}");

    world.over(&id).await;
    let text = page(&world).await;
    assert_shows(&text, &["idle, last update succeeded", "running version\n2.0.0"]);
    assert_shows(&text, &["B\n running\n2.0.0\ngood", "last slot\nB"]);
    assert_shows(&text, &["method contract\napplyComplete", "text contract\ncompleted"]);

    let id = world.update("missing.img").await;
    world.over(&id).await;
    let text = page(&world).await;
    assert_shows(&text, &["idle, last update failed", "last code\ndigestMissing"]);
}
