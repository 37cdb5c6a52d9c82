//! The program: what it prints, what it keeps, how it ends.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use hubsim::{Hub, Options};
use serde_json::{Value, json};
use support::{DEVICE, Device, LIMIT, connect_options};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

struct Program {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Program {
    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_hubsim"))
            .args(["--mqtt-port", "0", "--https-port", "0"])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    async fn line(&mut self) -> String {
        tokio::time::timeout(LIMIT, self.lines.next_line()).await.unwrap().unwrap().unwrap()
    }

    async fn json(&mut self) -> Value {
        serde_json::from_str(&self.line().await).unwrap()
    }

    /// Sends SIGTERM and waits for the end.
    async fn terminate(mut self) -> (i32, Vec<String>) {
        let id = self.child.id().unwrap().to_string();
        let sent = Command::new("kill").args(["-TERM", &id]).status().await.unwrap();
        assert!(sent.success());
        let mut rest = Vec::new();
        while let Some(line) = self.lines.next_line().await.unwrap() {
            rest.push(line);
        }
        let status = tokio::time::timeout(LIMIT, self.child.wait()).await.unwrap().unwrap();
        (status.code().unwrap(), rest)
    }
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn prints_what_is_needed_to_connect_and_ends_cleanly() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().to_str().unwrap();
    let mut program = Program::start(&[
        "--device", "pi-1", "--device", "pi-2", "--state", state, "--name", "my.hub",
    ]);
    let mut lines = Vec::new();
    while lines.len() < 7 {
        lines.push(program.line().await);
        if lines.last().unwrap().contains("DeviceId=pi-2") {
            break;
        }
    }
    let text = lines.join("\n");
    for expected in [
        "HostName=my.hub;SharedAccessKeyName=iothubowner;SharedAccessKey=",
        "HostName=my.hub;DeviceId=pi-1;SharedAccessKey=",
        "HostName=my.hub;DeviceId=pi-2;SharedAccessKey=",
        &format!("{state}/ca.pem"),
        "https://localhost:",
    ] {
        assert!(text.contains(expected), "{expected} in\n{text}");
    }
    for (file, wanted) in [("ca.pem", 0o644), ("ca-key.pem", 0o600), ("server-key.pem", 0o600)] {
        assert_eq!(mode(&folder.path().join(file)), wanted, "{file}");
    }
    assert_eq!(program.terminate().await.0, 0);
    assert_eq!(mode(&folder.path().join("hub.json")), 0o600);
}

#[tokio::test]
async fn events_are_lines_of_json_without_secrets() {
    let mut program = Program::start(&["--device", "pi-1", "--log", "json", "--admin-port", "0"]);
    let start = program.json().await;
    assert_eq!(start["event"], "started");
    for member in ["mqtt", "https", "admin", "ca", "service"] {
        assert!(start[member].is_string(), "{start}");
    }
    let text = start["devices"]["pi-1"].as_str().unwrap().to_owned();
    let key = support::part(&text, "SharedAccessKey");

    // An error of a client is told too.
    let port: u16 = start["mqtt"].as_str().unwrap().rsplit_once(':').unwrap().1.parse().unwrap();
    let ca = std::fs::read(start["ca"].as_str().unwrap()).unwrap();
    let mut options = rumqttc::MqttOptions::new(DEVICE, "localhost", port);
    options.set_transport(rumqttc::Transport::Tls(rumqttc::TlsConfiguration::SimpleNative {
        ca,
        client_auth: None,
    }));
    let resource = "twinboot.azure-devices.net/devices/pi-1";
    let token = hubsim::sas::token(resource, &key, support::now() + 600, None).unwrap();
    options.set_credentials("twinboot.azure-devices.net/pi-1/?api-version=2021-04-12", &token);
    let mut wrong = options.clone();
    wrong.set_credentials("twinboot.azure-devices.net/pi-1/?api-version=2021-04-12", "x");
    support::refusal(wrong).await;
    assert_eq!(program.json().await["event"], "authFailed");
    let _device = Device::connect(options).await.unwrap();
    let connected = program.json().await;
    assert_eq!(
        (&connected["event"], &connected["identity"]),
        (&json!("connected"), &json!("pi-1"))
    );

    let (code, rest) = program.terminate().await;
    assert_eq!(code, 0);
    let last: Value = serde_json::from_str(rest.last().unwrap()).unwrap();
    assert_eq!((&last["event"], &last["reason"]), (&json!("disconnected"), &json!("hubStopped")));
    for line in rest.iter().chain([&connected.to_string()]) {
        assert!(!line.contains(&key) && !line.contains("sig="), "{line}");
    }
}

#[tokio::test]
async fn a_taken_port_is_told_with_what_to_do() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let program = Command::new(env!("CARGO_BIN_EXE_hubsim"))
        .args(["--mqtt-port", "0", "--https-port", &port])
        .output()
        .await
        .unwrap();
    let text = String::from_utf8(program.stderr).unwrap();
    assert_eq!(program.status.code(), Some(1));
    assert!(text.contains(&format!("cannot listen on 127.0.0.1:{port}")), "{text}");
    assert!(text.contains("is another hub running"), "{text}");
}

#[tokio::test]
async fn a_state_folder_keeps_everything() {
    let folder = tempfile::tempdir().unwrap();
    let options = || Options { state: Some(folder.path().to_owned()), ..Options::default() };
    let hub = Hub::start(options()).await.unwrap();
    let connection_string = hub.add_device(DEVICE).unwrap();
    let service = hub.service_connection_string();
    let ca = hub.ca_pem();
    hub.patch_twin(DEVICE, json!({ "tags": { "t": 1 }, "properties": { "desired": { "d": 2 } } }))
        .unwrap();
    Device::reporter(&hub).await.report(r#"{"r":3}"#).await;
    let twin = hub.twin(DEVICE).unwrap();
    hub.stop().await;

    let hub = Hub::start(options()).await.unwrap();
    assert_eq!(hub.ca_pem(), ca);
    assert_eq!(hub.service_connection_string(), service);
    assert_eq!(hub.add_device(DEVICE).unwrap(), connection_string);
    let mut again = hub.twin(DEVICE).unwrap();
    for changing in ["lastActivityTime", "connectionState"] {
        again[changing] = twin[changing].clone();
    }
    assert_eq!(again, twin);
    // The old authority vouches for the new server certificate.
    Device::connect(connect_options(&hub, DEVICE)).await.unwrap();
    hub.stop().await;

    // It is written while the hub runs, not only at its end.
    let hub = Hub::start(options()).await.unwrap();
    hub.patch_desired(DEVICE, json!({ "d": "on disk" })).unwrap();
    let file = folder.path().join("hub.json");
    let written = async {
        while !std::fs::read_to_string(&file).unwrap().contains("on disk") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, written).await.expect("saved in time");
    drop(hub);

    std::fs::write(&file, "{").unwrap();
    let error = Hub::start(options()).await.unwrap_err();
    assert!(error.to_string().contains("hub.json holds no hub state"), "{error}");
}

#[tokio::test]
async fn the_certificates_folder_vanishes_with_a_hub_without_state() {
    let hub = Hub::start(Options::default()).await.unwrap();
    let ca = hub.ca_path();
    assert_eq!(std::fs::read_to_string(&ca).unwrap(), hub.ca_pem());
    drop(hub.stop().await);
    assert!(!ca.exists());
}
