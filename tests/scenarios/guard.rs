//! A new image in which the daemon does not live: the trial guard takes the device back.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::ExitStatus;

use serde_json::{Value, json};
use twinboot::store::FileStore;

use crate::world::World;
use crate::world::machine::{Happening, LIMIT};

/// The guard's exit code while the trial still has time.
const NOT_YET: i32 = 75;

impl World {
    /// A device that was asked for release 2.0.0 and has just been started with it.
    async fn on_trial(mut self) -> (Self, String) {
        // Shorter than any machine takes to get here.
        self.machine.set("update.trial_limit_s", 5);
        self.start().await;
        let id = self.update("2.0.0.img").await;
        self.machine.restart_order(LIMIT).await.unwrap();
        let boot = self.machine.restart().await.unwrap();
        assert_eq!((boot.slot, boot.version.as_str()), ('B', "2.0.0"));
        (self, id)
    }

    /// The daemon of the running image gives up.
    async fn daemon_dies(&mut self) -> ExitStatus {
        match tokio::time::timeout(LIMIT, self.machine.next()).await.unwrap().unwrap() {
            Happening::Ended(status) => status,
            other => panic!("{other:?}"),
        }
    }

    fn guard(&self) -> Option<i32> {
        self.machine.guard().unwrap().code()
    }

    /// The guard has the machine restart, and slot A comes up and tells what happened.
    async fn comes_back(mut self, id: &str) {
        assert_eq!(self.guard(), Some(0));
        self.machine.restart_order(LIMIT).await.expect("the guard orders a restart");
        assert_eq!(self.machine.restart().await.unwrap().slot, 'A');
        let twin = self.over(id).await;
        let last = &twin["twinboot"]["lastUpdate"];
        assert_eq!((&last["result"], &last["code"]), (&json!("rolledBack"), &json!("fellBack")));
        self.assert_runs('A', "1.0.0");
        assert_eq!(self.guard(), Some(0));
        self.assert_no_restart().await;
    }

    /// Nobody orders a restart. The guard has ended, and it orders before its end.
    async fn assert_no_restart(&mut self) {
        let happening = tokio::time::timeout(std::time::Duration::ZERO, self.machine.next()).await;
        assert!(happening.is_err(), "{happening:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_configuration_in_the_image_does_not_keep_the_device() {
    let mut world = World::new().await;
    world.machine.set_in("2.0.0", "hub.no_such_key", 1);
    let (mut world, id) = world.on_trial().await;
    assert!(!world.daemon_dies().await.success());
    world.comes_back(&id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configuration_that_is_no_toml_does_not_keep_the_device() {
    let mut world = World::new().await;
    world.machine.config_in("2.0.0", "what is this?");
    // All that the guard has left is U-Boot with its usual tools.
    let printenv = world.folder().join("bin/fw_printenv");
    let says = "#!/bin/sh\nprintf 'BOOT_ORDER=A B\\nBOOT_A_LEFT=3\\nBOOT_B_LEFT=0\\n'\n";
    fs::write(&printenv, says).unwrap();
    fs::set_permissions(&printenv, fs::Permissions::from_mode(0o755)).unwrap();
    let (mut world, id) = world.on_trial().await;
    assert!(!world.daemon_dies().await.success());
    world.comes_back(&id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_without_the_data_partition_does_not_keep_the_device() {
    let mut world = World::new().await;
    world.machine.no_data_partition_in("2.0.0");
    let (mut world, id) = world.on_trial().await;
    assert!(!world.daemon_dies().await.success());
    assert!(world.log().contains("lies on slot B"), "{}", world.log());
    // No state names slot B as tried: it might be the only good one, so it is not taken out.
    let calls = || std::fs::read_to_string(world.folder().join("bootloader.log")).unwrap();
    let before = calls().matches("cancel").count();
    assert_eq!(world.guard(), Some(0));
    assert_eq!(calls().matches("cancel").count(), before);
    world.comes_back(&id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lies_below_a_mount_that_is_not_there_yet_is_not_believed() {
    // An image may carry a state along: this one is of a trial of the slot that is good now.
    let mut world = World::new().await;
    world.machine.set_in("2.0.0", "update.trial_limit_s", 86_400);
    world.only_well_as("1.0.0", "not yet");
    let (mut world, id) = world.on_trial().await;
    world.saved_state("trial").await;
    let old = fs::read(world.folder().join("state/state.json")).unwrap();
    world.get_well();
    world.over(&id).await;
    world.assert_runs('B', "2.0.0");
    world.machine.no_data_partition_in("2.0.0");
    world.machine.set_in("2.0.0", "update.trial_limit_s", 5);
    let below = world.folder().join("on-the-slot-of-2.0.0/state");
    fs::create_dir_all(&below).unwrap();
    fs::write(below.join("state.json"), old).unwrap();
    world.machine.restart().await.unwrap();
    assert!(!world.daemon_dies().await.success());
    assert_eq!(world.guard(), Some(0));
    world.assert_no_restart().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_without_the_bootloaders_tools_does_not_keep_the_device() {
    let mut world = World::new().await;
    let tool = vec![toml::Value::from("/no/such/tool")];
    world.machine.set_in("2.0.0", "boot.custom.command", tool);
    let (mut world, id) = world.on_trial().await;
    // Whether it dies of it or not, it cannot end the trial.
    world.machine.kill9();
    world.machine.forget_orders();
    world.comes_back(&id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_without_the_credential_goes_back_and_says_why() {
    let mut world = World::new().await;
    let lost = world.folder().join("etc/hub-credential").display().to_string();
    world.machine.set_in("2.0.0", "hub.credential_file", lost);
    let (mut world, id) = world.on_trial().await;
    let twin = world.over(&id).await;
    let last = &twin["twinboot"]["lastUpdate"];
    assert_eq!((&last["result"], &last["code"]), (&json!("rolledBack"), &json!("unhealthy")));
    assert!(last["reason"].as_str().is_some_and(|text| text.contains("credential")), "{last}");
    world.assert_runs('A', "1.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_credential_on_a_slot_is_told_of_before_the_first_update() {
    let mut world = World::new().await;
    // Everything lies on the slot then, the credential too.
    world.machine.no_data_partition_in("1.0.0");
    world.machine.set("state.allow_on_slot", true);
    world.start().await;
    let notices = world.reported()["twinboot"]["notices"].to_string();
    for part in ["hub-credential lies on slot A and will be missing", "the state folder"] {
        assert!(notices.contains(part), "{part}: {notices}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_boot_partition_that_is_not_mounted_is_told_of() {
    let mut world = World::new().await;
    world.machine.no_data_partition_in("1.0.0");
    world.machine.set("state.allow_on_slot", true);
    // What an image may have below the mount point, and GRUB never reads.
    let file = world.folder().join("grubenv");
    fs::write(&file, format!("{:#<1024}", "# GRUB Environment Block\n")).unwrap();
    world.machine.set("boot.kind", "grub");
    world.machine.set("boot.grub.environment", file.display().to_string());
    world.start().await;
    let notices = world.reported()["twinboot"]["notices"].to_string();
    assert!(notices.contains("grubenv lies on slot A, where the bootloader"), "{notices}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_time_that_nobody_vouches_for_is_not_kept() {
    let mut world = World::new().await;
    let kept = |world: &World| world.machine.saved()["saved"]["newest_time"].clone();
    world.machine.synchronise_clock(false).unwrap();
    world.start().await;
    assert_eq!(kept(&world), Value::Null, "it may be years ahead");
    world.machine.synchronise_clock(true).unwrap();
    let id = world.update("2.0.0.img").await;
    world.over(&id).await;
    assert!(kept(&world).is_number(), "{}", kept(&world));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_only_seems_to_live_does_not_keep_the_device() {
    let mut world = World::new().await;
    world.machine.set_in("2.0.0", "hub.no_such_key", 1);
    let (mut world, id) = world.on_trial().await;
    world.daemon_dies().await;
    let lock = FileStore::open(&world.folder().join("state")).unwrap();
    assert_eq!(world.guard(), Some(0));
    world.machine.restart_order(LIMIT).await.expect("the lock does not stop the guard for ever");
    drop(lock);
    world.comes_back(&id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trial_that_still_has_time_is_left_alone() {
    let mut world = World::new().await;
    let release = world.folder().join("sysroot/etc/os-release");
    let program = format!("#!/bin/sh\ngrep -q 1.0.0 '{}'\n", release.display());
    world.machine.health_program("old-only", Some(&program)).unwrap();
    world.machine.set_in("2.0.0", "update.trial_limit_s", 86_400);
    let (mut world, _) = world.on_trial().await;
    world.saved_state("trial").await;
    assert_eq!(world.guard(), Some(NOT_YET), "the daemon lives");
    world.machine.kill9();
    assert_eq!(world.guard(), Some(NOT_YET), "the daemon is dead");
    world.assert_no_restart().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_way_back_that_stopped_half_way_is_gone_to_the_end() {
    let world = World::new().await;
    let release = world.folder().join("sysroot/etc/os-release");
    let program = format!("#!/bin/sh\ngrep -q 1.0.0 '{}'\n", release.display());
    world.machine.health_program("old-only", Some(&program)).unwrap();
    let (mut world, id) = world.on_trial().await;
    world.saved_state("rollingBack").await;
    world.machine.kill9();
    world.machine.forget_orders();
    assert_eq!(world.guard(), Some(0));
    world.machine.restart_order(LIMIT).await.expect("the guard orders a restart");
    world.machine.restart().await.unwrap();
    let twin = world.over(&id).await;
    assert_eq!(twin["twinboot"]["lastUpdate"]["code"], "unhealthy");
    world.assert_runs('A', "1.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bootloader_that_does_not_obey_is_not_asked_for_ever() {
    let mut world = World::new().await;
    world.machine.set_in("2.0.0", "hub.no_such_key", 1);
    let (mut world, _) = world.on_trial().await;
    for _ in 0..3 {
        world.daemon_dies().await;
        // A machine that takes its time is told again, which does not count.
        for _ in 0..4 {
            assert_eq!(world.guard(), Some(0));
            world.machine.restart_order(LIMIT).await.expect("the guard orders a restart");
        }
        world.machine.boot_default('B').unwrap();
    }
    world.daemon_dies().await;
    assert_eq!(world.guard(), Some(0));
    world.assert_no_restart().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_without_an_update_is_left_alone() {
    let mut world = World::new().await;
    world.machine.set("update.trial_limit_s", 5);
    world.start().await;
    let idle = |world: &World| world.machine.saved().pointer("/saved/state").cloned();
    assert_eq!(world.guard(), Some(0), "the daemon lives");
    world.machine.kill9();
    assert_eq!(world.guard(), Some(0), "the daemon is dead");
    assert_eq!(idle(&world), Some(Value::from("idle")));
    fs::remove_dir_all(world.folder().join("state")).unwrap();
    assert_eq!(world.guard(), Some(0), "its memory is gone, but it runs from the default slot");
    world.assert_no_restart().await;
    assert!(!world.folder().join("state").exists(), "the guard makes nothing");
}
