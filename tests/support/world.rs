//! A device, a hub and an image server for one scenario.
#![allow(dead_code, reason = "each test uses a part")]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use hubsim::{Event, EventKind, Events, Hub, HubError, Options, Stopped};
use serde_json::{Value, json};
use tempfile::TempDir;

#[path = "images.rs"]
pub mod images;
#[path = "journal.rs"]
pub mod journal;
#[path = "machine.rs"]
pub mod machine;
#[path = "mounted.rs"]
pub mod mounted;
#[path = "network.rs"]
pub mod network;
#[path = "release.rs"]
pub mod release;
#[path = "systemd.rs"]
pub mod systemd;

use images::{Authority, Fault, File, ImageServer};
use machine::{Happening, LIMIT, LOOK, Machine, Plan};
use release::Form;

/// The device's name in the hub.
pub const DEVICE: &str = "pi-1";

/// Small enough that 12 MiB take some seconds: bytes each 10 ms.
pub const SLOW: usize = 20_000;

/// Half of every image, where transfers are held.
pub const HALF: usize = (release::IMAGE_BYTES / 2) as usize;

/// Everything of one scenario. Dropped, it ends and vanishes; after a failure it first tells what
/// it knows.
pub struct World {
    /// The device.
    pub machine: Machine,
    /// The image server; every release is there as `/VERSION.img` and compressed.
    pub images: ImageServer,
    hub: Option<Hub>,
    events: Events,
    folder: TempDir,
}

/// The images and certificates that all scenarios of a test program share.
struct Shared {
    folder: PathBuf,
    authority: Authority,
}

fn shared() -> &'static Shared {
    static SHARED: OnceLock<Shared> = OnceLock::new();
    SHARED.get_or_init(|| {
        // A copy of the program in a network of its own has a folder of its own.
        let inside = network::inside().unwrap_or_default();
        let program = std::env::current_exe().unwrap();
        let name = format!("scenarios-{}-{}", program.display(), inside.display());
        let name = name.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        for version in ["1.0.0", "2.0.0", "3.0.0"] {
            let image = release::make(&folder, version);
            if version == "2.0.0" {
                for form in Form::ALL {
                    release::pack(&image, form);
                }
            }
        }
        let authority = Authority::new(&folder);
        Shared { folder, authority }
    })
}

/// The file of a release.
pub fn image(version: &str) -> PathBuf {
    shared().folder.join(format!("{version}.img"))
}

impl World {
    /// A device that runs release 1.0.0 from slot A, switched off.
    pub async fn new() -> Self {
        Self::with(Options::default(), true).await
    }

    /// The same with a hub of these options, and loop devices or not.
    pub async fn with(options: Options, loop_devices: bool) -> Self {
        let shared = tokio::task::spawn_blocking(shared).await.unwrap();
        let folder = TempDir::with_prefix("twinboot-test-").unwrap();
        let images = ImageServer::start(&shared.authority, false).await;
        for entry in std::fs::read_dir(&shared.folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if name.contains(".img") {
                let content = std::fs::read(&path).unwrap();
                let digest = format!("{}  {name}\n", release::digest_of(&content));
                images.put(&format!("/{name}"), File::new(content));
                images.put(&format!("/{name}.sha256"), File::new(digest));
            }
        }
        let hub = Hub::start(options).await.unwrap();
        let credential = hub.add_device(DEVICE).unwrap();
        let mut machine = Machine::build(&Plan {
            folder: folder.path(),
            twinbootd: Path::new(env!("CARGO_BIN_EXE_twinbootd")),
            slot_bytes: release::IMAGE_BYTES,
            image: &image("1.0.0"),
            loop_devices,
            credential: &credential,
        })
        .unwrap();
        let ca = folder.path().join("hub-ca.pem");
        std::fs::write(&ca, hub.ca_pem()).unwrap();
        machine.set("hub.host", "localhost");
        machine.set("hub.port", i64::from(hub.mqtt_addr().port()));
        machine.set("hub.ca_file", ca.display().to_string());
        machine.set("fetch.ca_file", shared.authority.ca_file.display().to_string());
        machine.set("log.level", "debug");
        let events = hub.events_from_start();
        World { machine, images, hub: Some(hub), events, folder }
    }

    /// A device that is up: connected, every contract reported, slot A known good.
    pub async fn started() -> Self {
        let mut world = World::new().await;
        world.start().await;
        world
    }

    /// Switches the device on and waits until it is up.
    pub async fn start(&mut self) {
        self.machine.boot().unwrap();
        self.up().await;
    }

    /// Waits until the device is connected and tells that the slot it runs from is known good.
    pub async fn up(&mut self) {
        let running = self.machine.running().expect("the machine is on").clone();
        let told = move |twin: &Value| {
            twin["twinboot"]["confirmed"] == true
                && twin["twinboot"]["bootedSlot"] == running.slot.to_string()
        };
        self.until("the device is up", told).await;
        self.online().await;
    }

    /// Waits until methods reach the device.
    pub async fn online(&mut self) {
        let asked = tokio::time::timeout(LIMIT, async {
            while let Err(HubError::NotOnline { .. }) =
                self.call("getFirmwareStatus", json!(null)).await
            {
                self.events.next().await;
            }
        });
        asked.await.expect("the device comes online");
    }

    /// The hub.
    pub fn hub(&self) -> &Hub {
        self.hub.as_ref().expect("the hub runs")
    }

    /// Takes the hub away; devices find nobody there.
    pub async fn stop_hub(&mut self) -> Stopped {
        self.hub.take().expect("the hub runs").stop().await
    }

    /// Brings it back.
    pub async fn start_hub(&mut self, stopped: Stopped) {
        self.hub = Some(stopped.start().await.unwrap());
    }

    /// A reader of what happens at the hub from now on.
    pub fn events(&self) -> Events {
        self.hub().events()
    }

    /// The URL of a release in a form.
    pub fn url(&self, file: &str) -> String {
        format!("https://localhost:{}/{file}", self.images.port)
    }

    /// Makes the next transfers of a file as slow as [`SLOW`].
    pub fn slow(&self, file: &str, times: usize) {
        self.fault(file, std::iter::repeat_n(Fault::Slow(SLOW), times));
    }

    /// Asks for an update whose transfer stops half way, until [`ImageServer::release`]. Returns the
    /// run's id once the twin shows that it downloads.
    pub async fn half_an_update(&mut self, file: &str) -> String {
        self.fault(file, [Fault::Hold(HALF)]);
        let id = self.update(file).await;
        self.until("it downloads", |twin| phase(twin) == "downloading").await;
        id
    }

    /// Waits until half of the image that is held has been proven to be in the slot.
    pub async fn half_is_proven(&mut self) {
        let proven = "/saved/state/fetching/checkpoint/written_bytes";
        let enough = HALF as u64 - (2 << 20);
        self.saved_until("half is proven", |saved| {
            saved.pointer(proven).and_then(Value::as_u64).is_some_and(|bytes| bytes >= enough)
        })
        .await;
    }

    /// What happens to the next requests for a file.
    pub fn fault(&self, file: &str, faults: impl IntoIterator<Item = Fault>) {
        self.images.edit(&format!("/{file}"), |file| file.faults.extend(faults));
    }

    /// Calls a direct method.
    pub async fn call(&self, method: &str, payload: Value) -> Result<(i64, Value), HubError> {
        self.hub().invoke(DEVICE, method, payload, Duration::from_secs(30)).await
    }

    /// Asks for an update by method; it must be accepted. Returns the run's id.
    pub async fn update(&self, file: &str) -> String {
        let payload = json!({ "fwPackageUri": self.url(file) });
        let (status, answer) = self.call("firmwareUpdate", payload).await.unwrap();
        assert_eq!(status, 200, "{answer}");
        answer["id"].as_str().unwrap_or_else(|| panic!("no id in {answer}")).to_owned()
    }

    /// Asks for an update by the desired properties.
    pub fn desire(&self, version: &str, file: &str) {
        let firmware = json!({ "fwVersion": version, "fwPackageURI": self.url(file) });
        self.hub().patch_desired(DEVICE, json!({ "firmware": firmware })).unwrap();
    }

    /// The reported properties.
    pub fn reported(&self) -> Value {
        self.hub().twin(DEVICE).unwrap()["properties"]["reported"].clone()
    }

    /// Plays the machine until this is true of the reported properties, and returns them.
    pub async fn until(&mut self, what: &str, done: impl Fn(&Value) -> bool) -> Value {
        self.until_within(LIMIT, what, done).await
    }

    /// The same with a limit of its own.
    pub async fn until_within(
        &mut self,
        limit: Duration,
        what: &str,
        done: impl Fn(&Value) -> bool,
    ) -> Value {
        let mut events = self.events();
        let found = tokio::time::timeout(limit, async {
            loop {
                let reported = self.reported();
                if done(&reported) {
                    return reported;
                }
                // Cancel-safe: both take nothing that they do not return.
                tokio::select! {
                    _ = events.next() => {}
                    happening = self.machine.next() => self.obey(happening.unwrap()).await,
                }
            }
        });
        match found.await {
            Ok(reported) => reported,
            Err(_) => panic!("not within {limit:?}: {what}"),
        }
    }

    /// Plays the machine for some time.
    pub async fn play(&mut self, time: Duration) {
        if let Ok(happening) = tokio::time::timeout(time, self.machine.next()).await {
            self.obey(happening.unwrap()).await;
        }
    }

    /// Waits until the daemon has ended by itself.
    pub async fn ended(&mut self) -> std::process::ExitStatus {
        match tokio::time::timeout(LIMIT, self.machine.next()).await {
            Ok(Ok(Happening::Ended(status))) => status,
            other => panic!("the daemon did not end: {other:?}"),
        }
    }

    /// Starts the daemon in the present boot and waits until it is up.
    pub async fn start_daemon_again(&mut self) {
        let mut events = self.events();
        self.machine.start_daemon().unwrap();
        let connected = |event: &EventKind| matches!(event, EventKind::Connected { .. });
        self.event(&mut events, connected).await;
        self.up().await;
    }

    async fn obey(&mut self, happening: Happening) {
        match happening {
            Happening::RestartOrdered => drop(self.machine.restart().await.unwrap()),
            Happening::Ended(status) => panic!("the daemon ended by itself: {status}"),
        }
    }

    /// Plays the machine until the run is over, and returns the reported properties.
    pub async fn over(&mut self, id: &str) -> Value {
        let what = format!("run {id} is over");
        self.until(&what, |twin| is_over(twin, id)).await
    }

    /// Waits until the saved state is this one.
    pub async fn saved_state(&mut self, state: &str) {
        self.saved_until(state, |saved| {
            let found = &saved["saved"]["state"];
            found == state || found.get(state).is_some()
        })
        .await;
    }

    /// Waits until this is true of the state file. It tells nobody when it changes.
    async fn saved_until(&mut self, what: &str, done: impl Fn(&Value) -> bool) {
        let wait = async {
            while !done(&self.machine.saved()) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(LIMIT, wait).await.unwrap_or_else(|_| panic!("never saved: {what}"));
    }

    /// Waits for something that tells nobody when it becomes true.
    pub async fn eventually(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let wait = async {
            while !done(self) {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(LIMIT, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    /// Has systems of any other version fail their checks, with these words, until
    /// [`World::get_well`].
    pub fn only_well_as(&self, version: &str, words: &str) {
        let release = self.folder().join("sysroot/etc/os-release");
        let cure = self.folder().join("cure");
        let text = format!(
            "#!/bin/sh\n[ -e '{}' ] || grep -q {version} '{}' && exit 0\necho '{words}' >&2\nexit 3\n",
            cure.display(),
            release.display(),
        );
        self.machine.health_program("well", Some(&text)).unwrap();
    }

    /// From now on every system passes its checks.
    pub fn get_well(&self) {
        std::fs::write(self.folder().join("cure"), "").unwrap();
    }

    /// The values that a place in the reported properties took, one after the other.
    pub fn history(&self, pointer: &str) -> Vec<Value> {
        let changes = self.hub().reported_history(DEVICE);
        let mut values: Vec<Value> = changes
            .iter()
            .map(|change| change.reported.pointer(pointer).cloned().unwrap_or_default())
            .collect();
        values.dedup();
        values
    }

    /// Waits for something at the hub.
    pub async fn event(
        &self,
        events: &mut Events,
        condition: impl Fn(&EventKind) -> bool,
    ) -> Event {
        events.wait_for(|event| condition(&event.kind), LIMIT).await.unwrap()
    }

    /// Whether a slot holds a release, byte for byte.
    pub fn holds(&self, slot: char, version: &str) -> bool {
        let content = std::fs::read(&self.machine.slot(slot).device).unwrap();
        content == std::fs::read(image(version)).unwrap()
    }

    /// Holds for every device at any time: some slot boots, and it is a whole release.
    #[track_caller]
    pub fn assert_bootable(&self) {
        let (default, once) = self.machine.variables().unwrap();
        for slot in [default, once].iter().filter_map(|name| name.chars().next()) {
            let whole = ["1.0.0", "2.0.0", "3.0.0"].iter().any(|version| self.holds(slot, version));
            assert!(whole, "slot {slot} may boot and holds no whole release");
        }
    }

    /// The device is as it was before anything: release 1.0.0 in slot A, and nothing to be tried.
    #[track_caller]
    pub fn assert_at_home(&self) {
        self.assert_runs('A', "1.0.0");
    }

    /// The device ended in this slot with this release, for good.
    #[track_caller]
    pub fn assert_runs(&self, slot: char, version: &str) {
        let running = self.machine.running().unwrap();
        assert_eq!((running.slot, running.version.as_str()), (slot, version));
        assert_eq!(self.machine.variables().unwrap(), (slot.to_string(), String::new()));
        assert!(self.holds(slot, version), "slot {slot} holds something else than {version}");
    }

    /// Everything the daemon logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.machine.log_file()).unwrap_or_default()
    }

    /// The folder of everything.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Runs the device command.
    pub fn twinboot(&self, arguments: &[&str]) -> std::process::Output {
        std::process::Command::new(env!("CARGO_BIN_EXE_twinboot"))
            .arg("--socket")
            .arg(self.machine.socket())
            .args(arguments)
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap()
    }
}

/// Plays stories that have nothing to do with each other at the same time: devices mostly wait.
pub async fn side_by_side(
    stories: impl IntoIterator<Item = impl Future<Output = ()> + Send + 'static>,
) {
    let mut running: tokio::task::JoinSet<()> = stories.into_iter().collect();
    while let Some(ended) = running.join_next().await {
        ended.unwrap();
    }
}

/// The phase of the update in our own section.
pub fn phase(reported: &Value) -> &str {
    reported["twinboot"]["update"]["phase"].as_str().unwrap_or_default()
}

/// Whether the run with this id has ended.
pub fn is_over(reported: &Value, id: &str) -> bool {
    reported["twinboot"]["update"]["phase"] == "idle"
        && reported["twinboot"]["lastUpdate"]["id"] == id
}

impl Drop for World {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let twin = self.hub.as_ref().and_then(|hub| hub.twin(DEVICE).ok()).unwrap_or_default();
        let mut events = String::new();
        while let Some(event) = self.events.try_next() {
            events.push_str(&format!("  {event}\n"));
        }
        let from = events.len().saturating_sub(20_000);
        let from = (from..=events.len()).find(|at| events.is_char_boundary(*at)).unwrap_or(0);
        eprintln!(
            "==== what the world knows\n{}\n--- twin\n{:#}\n--- events at the hub (end)\n{}====",
            self.machine.account(),
            twin["properties"],
            &events[from..],
        );
    }
}
