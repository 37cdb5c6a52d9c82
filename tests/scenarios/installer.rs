//! Images that an outside program writes.

use crate::world::World;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_installer_that_hangs_ends_the_update_and_the_next_one_works() {
    let mut world = World::new().await;
    let well = world.folder().join("well");
    let left = world.folder().join("left");
    // It writes the image, leaves a child that holds everything open, and does not end at first.
    let program = format!(
        "setsid sh -c 'echo $$ >{}; exec sleep 1000' <&0 & cat >\"$TWINBOOT_DEVICE\"; sync; \
         [ -e {} ] || exec sleep 1000",
        left.display(),
        well.display()
    );
    world.machine.set("install.kind", "command");
    let command = ["sh", "-c", &program].map(toml::Value::from);
    world.machine.set("install.command", command.to_vec());
    world.machine.set("install.stall_limit_s", 2);
    world.start().await;
    let end_the_child = || {
        let number = std::fs::read_to_string(&left).unwrap().trim().parse().unwrap();
        let child = nix::unistd::Pid::from_raw(number);
        nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).expect("it lives");
    };

    let id = world.update("2.0.0.img").await;
    let twin = world.over(&id).await;
    end_the_child();
    let last = &twin["twinboot"]["lastUpdate"];
    assert_eq!(
        (last["result"].as_str(), last["code"].as_str()),
        (Some("failed"), Some("installer"))
    );
    assert!(
        last["reason"].as_str().is_some_and(|why| why.contains("install.stall_limit_s")),
        "{last}"
    );

    std::fs::write(&well, "").unwrap();
    let id = world.update("2.0.0.img").await;
    let twin = world.over(&id).await;
    end_the_child();
    assert_eq!(twin["twinboot"]["lastUpdate"]["result"], "succeeded");
    world.assert_runs('B', "2.0.0");
}
