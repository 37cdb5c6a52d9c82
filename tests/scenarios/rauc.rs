//! The real RAUC service installs, in a machine that is set up as `docs/porting.md` recommends: it
//! leaves the choice of the boot to us. Needs root: RAUC mounts bundles.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::world::images::File;
use crate::world::machine::LIMIT;
use crate::world::{DEVICE, World, image, phase, release};

#[path = "../support/rauc.rs"]
mod service;

use service::{Backend, Bundle, Plan, RaucService};

const SECRET: &str = "hunter2";

/// A device with RAUC.
struct Board {
    // First: it ends before the slots do.
    rauc: RaucService,
    world: World,
}

impl Board {
    /// One that runs release 1.0.0 from slot A, switched off, where RAUC leaves the boot to us.
    async fn new() -> Self {
        Board::with(Backend::Noop).await
    }

    /// The same with a boot loader that RAUC knows.
    async fn with(backend: Backend) -> Self {
        let mut world = World::new().await;
        let folder = world.folder().join("rauc");
        std::fs::create_dir(&folder).unwrap();
        let devices = ['A', 'B'].map(|slot| world.machine.slot(slot).device.clone());
        let rauc = RaucService::start(
            &Plan {
                folder: &folder,
                devices: [&devices[0], &devices[1]],
                backend,
                activates: true,
                kind: "raw",
            },
            'A',
        );
        let settings = rauc.settings();
        world.machine.set("install.kind", "rauc");
        world.machine.set("rauc.bus", settings.bus.display().to_string());
        world.machine.set("rauc.bundle_file", settings.bundle_file.display().to_string());
        Board { rauc, world }
    }

    /// Puts a bundle with a release on the server, under this name.
    fn offer(&self, name: &str, bundle: Bundle<'_>) {
        let file = self.rauc.bundle(&image(bundle.version), bundle);
        let content = std::fs::read(file).unwrap();
        let digest = format!("{}  {name}\n", release::digest_of(&content));
        self.world.images.put(&format!("/{name}"), File::new(content));
        self.world.images.put(&format!("/{name}.sha256"), File::new(digest));
    }

    /// The file that a bundle is kept in.
    fn kept(&self) -> PathBuf {
        self.rauc.settings().bundle_file
    }

    /// Waits until the daemon orders a restart, and restarts the machine: RAUC, too.
    async fn restarts_into(&mut self, slot: char) {
        self.world.machine.restart_order(LIMIT).await.unwrap();
        self.rauc.kill_service();
        self.rauc.start_service(slot);
        let boot = self.world.machine.restart().await.unwrap();
        assert_eq!(boot.slot, slot);
    }

    /// The power goes and comes back.
    fn power_cut(&mut self, slot: char) {
        self.world.machine.kill9();
        self.rauc.kill_service();
        self.rauc.start_service(slot);
        self.world.machine.power_cut().unwrap();
    }

    /// Waits until the bundle is removed, which is after the twin has told the end.
    async fn nothing_is_kept(&self) {
        self.world.eventually("the bundle is removed", |_| !self.kept().exists()).await;
    }
}

fn last(twin: &Value) -> (&str, &str, &str) {
    let last = &twin["twinboot"]["lastUpdate"];
    let text = |key: &str| last[key].as_str().unwrap_or_default();
    (text("result"), text("code"), text("reason"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bundle_goes_from_the_call_to_the_confirmed_boot_and_the_next_one_back() {
    let mut board = Board::new().await;
    board.world.start().await;
    for (version, slot) in [("2.0.0", 'B'), ("3.0.0", 'A')] {
        let name = format!("{version}.raucb");
        board.offer(&name, Bundle { version, ..Bundle::default() });
        let id = board.world.update(&format!("{name}?sig={SECRET}")).await;
        board.restarts_into(slot).await;
        let twin = board.world.over(&id).await;
        assert_eq!(last(&twin).0, "succeeded", "{twin}");
        board.world.assert_runs(slot, version);
        board.nothing_is_kept().await;
    }
    for log in [board.rauc.log(), board.world.log(), board.world.reported().to_string()] {
        assert!(!log.contains(SECRET), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rauc_cannot_be_cancelled_and_a_power_cut_meanwhile_costs_no_download() {
    let mut board = Board::new().await;
    board.world.start().await;
    board.offer("2.0.0.raucb", Bundle { waits: true, ..Bundle::default() });
    let id = board.world.update("2.0.0.raucb").await;
    let applying =
        |twin: &Value| phase(twin) == "applying" && twin["twinboot"]["update"]["percent"] == 90;
    board.world.until("RAUC's progress is told", applying).await;
    let (status, answer) = board.world.call("cancelFirmwareUpdate", json!(null)).await.unwrap();
    assert_eq!((status, &answer["error"]), (409, &json!("tooLate")), "{answer}");
    assert!(answer.to_string().contains("RAUC installs the bundle"), "{answer}");

    let fetched = board.world.images.seen("/2.0.0.raucb").len();
    board.power_cut('A');
    board.rauc.go();
    board.restarts_into('B').await;
    let twin = board.world.over(&id).await;
    assert_eq!(last(&twin).0, "succeeded", "{twin}");
    board.world.assert_runs('B', "2.0.0");
    board.nothing_is_kept().await;
    assert_eq!(board.world.images.seen("/2.0.0.raucb").len(), fetched, "it was fetched again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_dies_while_rauc_works_waits_for_it_and_has_it_install_again() {
    let mut board = Board::new().await;
    board.world.start().await;
    board.offer("2.0.0.raucb", Bundle { waits: true, ..Bundle::default() });
    let id = board.world.update("2.0.0.raucb").await;
    board.world.until("RAUC works", |twin| phase(twin) == "applying").await;
    board.rauc.says("the hook waits");
    board.world.machine.kill9();
    board.world.start_daemon_again().await;
    board.world.until("it is told again", |twin| phase(twin) == "applying").await;
    board.rauc.go();
    board.restarts_into('B').await;
    let twin = board.world.over(&id).await;
    assert_eq!(last(&twin).0, "succeeded", "{twin}");
    board.world.assert_runs('B', "2.0.0");
    assert_eq!(board.rauc.log().matches("succeeded").count(), 2, "{}", board.rauc.log());
}

/// RAUC's boot loader program for the played machine: its variables, RAUC's verbs.
const BOOTLOADER: &str = r#"#!/bin/sh
set -eu
machine=$(dirname "$0")/.. folder=$(dirname "$0")
. "$machine/bootloader.env"
running=$(sed -n 's/.*twinboot\.slot=\([AB]\).*/\1/p' "$machine/sysroot/proc/cmdline")
store() { printf 'default=%s\ntry=%s\n' "$default" "$try" >"$machine/bootloader.env"; }
case $1 in
    get-primary) echo "${try:-$default}" ;;
    set-primary)
        echo good >"$folder/state-$2"
        if [ "$2" = "$running" ]; then default=$2 try=; else try=$2; fi
        # The running slot of a trial leads back at once.
        [ "$default" != "$2" ] || try=
        store
        ;;
    get-state) cat "$folder/state-$2" ;;
    set-state)
        echo "$3" >"$folder/state-$2"
        if [ "$3" = bad ] && [ "$try" = "$2" ]; then try=; store; fi
        ;;
esac
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rauc_chooses_the_boot_of_a_good_image_and_of_a_bad_one() {
    let mut board = Board::with(Backend::Custom).await;
    std::fs::write(board.world.folder().join("rauc/bootloader"), BOOTLOADER).unwrap();
    board.world.machine.set("boot.kind", "rauc");
    board.world.start().await;
    board.offer("2.0.0.raucb", Bundle::default());
    board.offer("3.0.0.raucb", Bundle { version: "3.0.0", ..Bundle::default() });

    let id = board.world.update("2.0.0.raucb").await;
    board.restarts_into('B').await;
    let twin = board.world.over(&id).await;
    assert_eq!(last(&twin).0, "succeeded", "{twin}");
    board.world.assert_runs('B', "2.0.0");

    board.world.machine.set_in("3.0.0", "update.trial_limit_s", 5);
    board.world.only_well_as("2.0.0", "the application is sick");
    let id = board.world.update("3.0.0.raucb").await;
    board.restarts_into('A').await;
    board.restarts_into('B').await;
    let twin = board.world.over(&id).await;
    let (result, code, reason) = last(&twin);
    assert_eq!((result, code), ("rolledBack", "unhealthy"), "{reason}");
    assert!(reason.contains("the application is sick"), "{reason}");
    board.world.assert_runs('B', "2.0.0");
    assert_eq!(board.rauc.text("state-A"), "bad");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_download_of_a_bundle_goes_on_and_a_cancelled_one_leaves_nothing() {
    let mut board = Board::new().await;
    board.world.start().await;
    board.offer("2.0.0.raucb", Bundle::default());
    board.world.half_an_update("2.0.0.raucb").await;
    board.world.half_is_proven().await;
    let requests = board.world.images.seen("/2.0.0.raucb").len();
    board.power_cut('A');
    board.world.until("it goes on", |twin| phase(twin) != "downloading").await;
    let again = board.world.images.seen("/2.0.0.raucb");
    assert!(again[requests].from.is_some_and(|from| from > 1 << 20), "{again:?}");
    board.restarts_into('B').await;
    board.world.up().await;
    board.world.assert_runs('B', "2.0.0");

    board.offer("3.0.0.raucb", Bundle { version: "3.0.0", ..Bundle::default() });
    let id = board.world.half_an_update("3.0.0.raucb").await;
    board.world.eventually("some of it is kept", |_| board.kept().exists()).await;
    let (status, answer) = board.world.call("cancelFirmwareUpdate", json!(null)).await.unwrap();
    assert_eq!(status, 200, "{answer}");
    let twin = board.world.over(&id).await;
    assert_eq!(last(&twin).0, "cancelled");
    board.nothing_is_kept().await;
    board.world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_rauc_refuses_is_in_the_twin_and_the_next_update_works() {
    let mut board = Board::new().await;
    board.world.start().await;
    let other = Bundle { compatible: "other-board", ..Bundle::default() };
    board.offer("other.raucb", other);
    board.offer("2.0.0.raucb", Bundle::default());
    let id = board.world.update("other.raucb").await;
    let twin = board.world.over(&id).await;
    let (result, code, reason) = last(&twin);
    assert_eq!((result, code), ("failed", "installer"), "{reason}");
    assert!(reason.contains("other-board") && reason.contains("system.conf"), "{reason}");
    board.world.assert_at_home();
    board.nothing_is_kept().await;

    // Without RAUC there is no sense in fetching.
    board.rauc.kill_service();
    let id = board.world.update("2.0.0.raucb").await;
    let twin = board.world.over(&id).await;
    let (result, code, reason) = last(&twin);
    assert_eq!((result, code), ("failed", "installer"), "{reason}");
    assert!(reason.contains("RAUC's service is not there"), "{reason}");
    board.nothing_is_kept().await;

    board.rauc.start_service('A');
    let id = board.world.update("2.0.0.raucb").await;
    board.restarts_into('B').await;
    let twin = board.world.over(&id).await;
    assert_eq!(last(&twin).0, "succeeded", "{twin}");
    board.world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_withdrawn_while_rauc_works_is_over_and_the_next_one_waits_for_rauc() {
    let mut board = Board::new().await;
    board.world.start().await;
    board.offer("2.0.0.raucb", Bundle { waits: true, ..Bundle::default() });
    board.offer("3.0.0.raucb", Bundle { version: "3.0.0", ..Bundle::default() });
    board.world.desire("2.0.0", "2.0.0.raucb");
    board.world.until("RAUC works", |twin| phase(twin) == "applying").await;
    board.rauc.says("the hook waits");
    board.world.hub().patch_desired(DEVICE, json!({ "firmware": null })).unwrap();
    let withdrawn = |twin: &Value| phase(twin) == "idle" && last(twin).0 == "cancelled";
    board.world.until("it is withdrawn", withdrawn).await;
    board.nothing_is_kept().await;

    let id = board.world.update("3.0.0.raucb").await;
    board.rauc.go();
    board.restarts_into('B').await;
    let twin = board.world.over(&id).await;
    assert_eq!(last(&twin).0, "succeeded", "{twin}");
    board.world.assert_runs('B', "3.0.0");
    assert!(board.world.log().contains("the slot is marked bad"), "{}", board.world.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raucs_own_service_that_marks_boots_good_is_a_notice() {
    let mut board = Board::new().await;
    let systemctl = board.world.folder().join("systemctl");
    let text =
        "#!/bin/sh\nprintf 'LoadState=loaded\\nActiveState=active\\nUnitFileState=enabled\\n'\n";
    std::fs::write(&systemctl, text).unwrap();
    std::fs::set_permissions(&systemctl, std::fs::Permissions::from_mode(0o755)).unwrap();
    board.world.machine.set("health.systemctl", systemctl.display().to_string());
    board.world.start().await;
    let words = "rauc-mark-good.service is enabled";
    let noticed = |twin: &Value| twin["twinboot"]["notices"].to_string().contains(words);
    board.world.until("it is told", noticed).await;
    let status = board.world.twinboot(&["status", "--json"]);
    assert!(String::from_utf8_lossy(&status.stdout).contains(words), "{status:?}");
    assert!(board.world.log().contains(words));
}
