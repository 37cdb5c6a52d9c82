//! No secret leaves the daemon, whatever happens to an update.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::world::images::{Fault, File};
use crate::world::machine::LIMIT;
use crate::world::release::digest_of;
use crate::world::systemd::Systemd;
use crate::world::{DEVICE, World, image};

/// Part of every secret of the tests but the hub's key.
const SECRET: &str = "hunter2";

/// What operators and other users of the device can see, by where it was seen.
#[derive(Default)]
struct Seen(BTreeMap<String, String>);

impl Seen {
    fn add(&mut self, place: impl Into<String>, text: &str) {
        let all = self.0.entry(place.into()).or_default();
        all.push_str(text);
        all.push('\n');
    }

    /// What runs: the daemon, its children and their arguments and environments.
    fn processes(&mut self, world: &World) {
        let daemon = world.machine.pid().expect("the daemon runs");
        for id in with_children(daemon) {
            for name in ["cmdline", "environ"] {
                let text = std::fs::read(format!("/proc/{id}/{name}")).unwrap_or_default();
                self.add(name, &String::from_utf8_lossy(&text));
            }
        }
    }

    /// What the daemon wrote and said so far.
    fn everything(&mut self, world: &World, systemd: &Systemd) {
        self.add("the log", &world.log());
        for change in world.hub().reported_history(DEVICE) {
            self.add("the twin", &change.patch.to_string());
        }
        for arguments in [&["status"][..], &["status", "--json"], &["slots"]] {
            let output = world.twinboot(arguments);
            assert!(output.status.success(), "{output:?}");
            self.add("the command", &String::from_utf8_lossy(&output.stdout));
        }
        self.add("systemd", &systemd.told().join("\n"));
        for path in files(&world.folder().join("state")) {
            let mode = std::fs::metadata(&path).unwrap().permissions().mode();
            if mode & 0o077 != 0 {
                let text = std::fs::read(&path).unwrap();
                self.add("files that others may read", &String::from_utf8_lossy(&text));
            }
            if path.ends_with("state.json") {
                assert_eq!(mode & 0o777, 0o600, "{}", path.display());
            }
        }
    }

    #[track_caller]
    fn assert_without(&self, secrets: &[&str]) {
        for place in ["the log", "the twin", "the command", "systemd", "cmdline", "environ"] {
            assert!(self.0.get(place).is_some_and(|text| text.len() > 20), "nothing in {place}");
        }
        for (place, text) in &self.0 {
            for secret in secrets {
                let line = text.lines().find(|line| line.contains(secret));
                assert_eq!(line, None, "a secret in {place}");
            }
        }
    }
}

fn with_children(id: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten();
    let children = tasks.flatten().flat_map(|task| {
        let text = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        text.split_whitespace().filter_map(|child| child.parse().ok()).collect::<Vec<u32>>()
    });
    let mut all = vec![id];
    all.extend(children.flat_map(with_children));
    all
}

fn files(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// The device's key, as it stands in its connection string.
fn hub_key(world: &World) -> String {
    let text = std::fs::read_to_string(world.folder().join("hub-credential")).unwrap();
    let key = text.split("SharedAccessKey=").nth(1).expect("a connection string with a key");
    key.trim().trim_end_matches('=').to_owned()
}

/// A world whose systemd is heard by the test.
async fn world() -> (World, Systemd) {
    let mut world = World::new().await;
    let systemd = Systemd::listen(&mut world.machine);
    // An outside installer is a child that could be given too much; it is slow enough to be met.
    let installer = world.folder().join("installer.sh");
    let met = world.folder().join("installer.env");
    let text = format!(
        "#!/bin/sh\n{{ echo \"$@\"; env; }} >>'{}'\nsleep 0.2\ncat >\"$TWINBOOT_DEVICE\"\n",
        met.display()
    );
    std::fs::write(&installer, text).unwrap();
    std::fs::set_permissions(&installer, std::fs::Permissions::from_mode(0o755)).unwrap();
    world.machine.set("install.kind", "command");
    world.machine.set("install.command", vec![installer.display().to_string()]);
    (world, systemd)
}

impl World {
    /// The URL of a file, with every kind of secret in it.
    fn secret_url(&self, file: &str) -> String {
        format!(
            "https://{SECRET}user:{SECRET}pass@localhost:{}/{file}?sv=1&sig={SECRET}sig",
            self.images.port
        )
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_of_a_url_or_of_the_hub_is_seen_anywhere() {
    let (mut world, systemd) = world().await;
    let key = hub_key(&world);
    world.machine.set("fetch.retry_budget_s", 1);
    world.start().await;
    let mut seen = Seen::default();
    let elsewhere =
        format!("https://localhost:{}/gone.img?sig={SECRET}redirect", world.images.port);
    let nobody = format!("https://{SECRET}:{SECRET}@localhost:1/x.img?sig={SECRET}nobody");
    let redirect = |to: &str| Fault::Status(302, vec![("Location".to_owned(), to.to_owned())]);
    let wrong = digest_of(b"something else");
    let good = digest_of(&std::fs::read(image("2.0.0")).unwrap());

    // Each way to fail, and what is told.
    for (file, faults, digest, code) in [
        ("missing.img", vec![], Some(&good), "notFound"),
        ("2.0.0.img", vec![Fault::Status(403, vec![])], Some(&good), "accessDenied"),
        ("2.0.0.img", vec![], Some(&wrong), "digestMismatch"),
        ("2.0.0.img", vec![redirect(&elsewhere)], Some(&good), "notFound"),
        ("2.0.0.img", vec![redirect("http://localhost:1/?sig=hunter2")], Some(&good), ""),
        (
            "2.0.0.img",
            // More often than it is tried.
            std::iter::repeat_with(|| redirect(&nobody)).take(50).collect(),
            Some(&good),
            "network",
        ),
        ("no-digest.img", vec![], None, ""),
    ] {
        if !faults.is_empty() {
            world.fault(file, faults);
        }
        let mut payload = json!({ "fwPackageUri": world.secret_url(file), "fwVersion": "2.0.0" });
        if let Some(digest) = digest {
            payload["fwPackageCheckValue"] = json!(digest);
        }
        let (status, answer) = world.call("firmwareUpdate", payload).await.unwrap();
        assert_eq!(status, 200, "{answer}");
        seen.add("answers", &answer.to_string());
        seen.processes(&world);
        let (_, answer) = world.call("getFirmwareStatus", Value::Null).await.unwrap();
        seen.add("answers", &answer.to_string());
        let id = answer_id(&seen);
        let twin = world.over(&id).await;
        let last = &twin["twinboot"]["lastUpdate"];
        assert_eq!(last["result"], "failed", "{file}: {last}");
        if !code.is_empty() {
            assert_eq!(last["code"], code, "{file}: {last}");
        }
        world.images.edit("/2.0.0.img", |file| file.faults.clear());
    }

    // Refusals show what they refuse.
    for url in [
        format!("ftp://{SECRET}:{SECRET}@host/x?sig={SECRET}"),
        format!("https://{SECRET}:{SECRET}@[bad/x?sig={SECRET}"),
        format!("http://{SECRET}:{SECRET}@host/x?sig={SECRET}"),
        format!("https://{SECRET}@host/x?sig={SECRET}#part"),
    ] {
        let (status, answer) =
            world.call("firmwareUpdate", json!({ "fwPackageUri": url })).await.unwrap();
        assert_eq!(status, 400, "{answer}");
        seen.add("answers", &answer.to_string());
        let output = world.twinboot(&["install", &url]);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        seen.add("answers", &String::from_utf8_lossy(&output.stderr));
    }

    // And the way to the confirmed boot, after a cut and a new start of the daemon.
    world.images.put("/ok.img", File::new(std::fs::read(image("2.0.0")).unwrap()));
    world.slow("ok.img", 1);
    let payload =
        json!({ "fwPackageUri": world.secret_url("ok.img"), "fwPackageCheckValue": good });
    let (_, answer) = world.call("firmwareUpdate", payload).await.unwrap();
    seen.add("answers", &answer.to_string());
    let some = |twin: &Value| twin["twinboot"]["update"]["percent"].as_u64() > Some(10);
    world.until("some has come", some).await;
    seen.processes(&world);
    world.machine.kill9();
    world.machine.start_daemon().unwrap();
    let id = answer["id"].as_str().unwrap();
    let twin = world.over(id).await;
    assert_eq!(twin["twinboot"]["lastUpdate"]["result"], "succeeded");
    world.assert_runs('B', "2.0.0");

    let children = std::fs::read_to_string(world.folder().join("installer.env")).unwrap();
    assert!(children.contains("TWINBOOT_"), "{children}");
    seen.add("installers", &children);
    seen.processes(&world);
    seen.everything(&world, &systemd);
    let sent = world.images.seen("/ok.img");
    assert!(sent[0].headers.contains_key("authorization"), "the server is told user and password");
    seen.assert_without(&[SECRET, &key]);
}

/// What an outside program says when it fails is told, apart from the secrets in it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_that_an_installer_prints_leaves_the_device() {
    let (mut world, systemd) = world().await;
    let key = hub_key(&world);
    let installer = world.folder().join("installer.sh");
    let text = format!(
        "#!/bin/sh\ncat >/dev/null\necho 'curl: (22) https://h/x?sig={SECRET}' >&2\n\
         echo 'my key ran {key} away' >&2\nexit 7\n"
    );
    std::fs::write(&installer, text).unwrap();
    world.start().await;
    let id = world.update("2.0.0.img").await;
    let twin = world.over(&id).await;
    let last = &twin["twinboot"]["lastUpdate"];
    assert_eq!(last["code"], "installer", "{last}");
    let words = "curl: (22) https://h/x?[redacted] / my key ran [redacted] away";
    assert!(last.to_string().contains(words), "{last}");
    let mut seen = Seen::default();
    seen.everything(&world, &systemd);
    for (place, text) in &seen.0 {
        assert!(!text.contains(SECRET) && !text.contains(&key), "{place}: {text}");
    }
}

/// The run that was accepted last.
fn answer_id(seen: &Seen) -> String {
    let answers = &seen.0["answers"];
    let answers = answers.lines().rev().filter_map(|line| serde_json::from_str(line).ok());
    let mut ids = answers.filter_map(|answer: Value| Some(answer["id"].as_str()?.to_owned()));
    ids.next().expect("an id")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_of_the_configuration_or_the_credential_is_printed() {
    let (mut world, systemd) = world().await;
    world.machine.set("hub.proxy", format!("http://user:{SECRET}@localhost:1"));
    world.machine.boot().unwrap();
    assert!(!world.ended().await.success());
    let config = world.machine.config_file();
    let check = Command::new(env!("CARGO_BIN_EXE_twinboot"))
        .args(["config", "check"])
        .arg(&config)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(check.status.code(), Some(1));
    let text = format!("{}{}", world.log(), String::from_utf8_lossy(&check.stderr));
    assert!(text.matches("hub.proxy").count() >= 2, "{text}");
    assert!(!text.contains(SECRET), "{text}");

    // Credentials that make no sense are told of and not shown; the daemon waits for a better one.
    world.machine.unset("hub", "proxy");
    for credential in [
        format!("HostName=h;DeviceId=d;SharedAccessKey={SECRET}!"),
        format!("HostName=h;SharedAccessKey={SECRET}"),
        SECRET.to_owned(),
        // The bare key, with its padding.
        format!("{}=", SECRET.repeat(6)),
        format!("HostName=h;DeviceId=d;SharedAccessKey=c2VjcmV0;{}=1", SECRET.repeat(6)),
    ] {
        std::fs::write(world.folder().join("hub-credential"), &credential).unwrap();
        let begin = world.log().len();
        world.machine.start_daemon().unwrap();
        let told_of = async {
            while !world.log()[begin..].contains("no hub session") {
                world.play(crate::world::machine::LOOK).await;
            }
        };
        tokio::time::timeout(LIMIT, told_of).await.expect("it is told");
        let status = world.twinboot(&["status"]);
        let status = String::from_utf8_lossy(&status.stdout).into_owned();
        assert!(status.contains("hub        "), "{status}");
        assert!(!format!("{status}{}", world.log()).contains(SECRET), "{status}{}", world.log());
        world.machine.sigterm(LIMIT).await.unwrap();
    }
    assert!(!systemd.told().join("\n").contains(SECRET));
}
