//! hubsim against software that we did not write: Microsoft's SDKs for devices and services.
//!
//! The SDKs fix the ports 8883 and 443, so every test runs in a network of its own, in which the
//! hub's name means the loopback address. The programs are in `tests/sdk/`; `packaging/setup/sdks.sh`
//! installs what they need.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use openssl::asn1::Asn1Time;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::x509::{X509, X509Name};
use serde_json::Value;
use tempfile::TempDir;

#[path = "../../tests/support/network.rs"]
mod network;

const HUB: &str = "sdk-test.azure-devices.net";
const DEVICE: &str = "sdk-1";

macro_rules! checks {
    ($($name:ident: $check:expr;)*) => { $(
        #[test]
        fn $name() {
            network::in_own_network(stringify!($name), HUB, || $check);
        }
    )* };
}

checks! {
    python_device_with_token_over_mqtt: device(Sdk::Python, "mqtt", Credential::Token);
    python_device_with_token_over_websocket: device(Sdk::Python, "websocket", Credential::Token);
    python_device_with_certificate_over_mqtt: device(Sdk::Python, "mqtt", Credential::Certificate);
    python_device_with_certificate_over_websocket:
        device(Sdk::Python, "websocket", Credential::Certificate);
    python_device_renews_its_token: device(Sdk::Python, "mqtt", Credential::ShortToken);
    node_device_with_token_over_mqtt: device(Sdk::Node, "mqtt", Credential::Token);
    node_device_with_token_over_websocket: device(Sdk::Node, "websocket", Credential::Token);
    node_device_with_certificate_over_mqtt: device(Sdk::Node, "mqtt", Credential::Certificate);
    node_device_with_certificate_over_websocket:
        device(Sdk::Node, "websocket", Credential::Certificate);
    node_device_renews_its_token: device(Sdk::Node, "mqtt", Credential::ShortToken);
    node_device_renews_its_token_over_websocket:
        device(Sdk::Node, "websocket", Credential::ShortToken);
    node_service: service();
    operators_of_the_tutorials: operators();
}

#[derive(Clone, Copy)]
enum Sdk {
    Python,
    Node,
}

#[derive(Clone, Copy)]
enum Credential {
    Token,
    ShortToken,
    Certificate,
}

fn device(sdk: Sdk, transport: &str, credential: Credential) {
    let hub = Hub::start();
    let mut check = hub.check("check_device.js", transport, credential);
    hub.run(match sdk {
        Sdk::Python => check.arg(python()).arg(program("device.py")),
        Sdk::Node => check.arg("node").arg(program("device.js")),
    });
}

fn service() {
    let hub = Hub::start();
    let mut check = hub.check("check_service.js", "mqtt", Credential::Token);
    hub.run(check.arg("node").arg(program("device.js")));
}

fn operators() {
    let hub = Hub::start();
    let mut check = hub.check("check_operators.js", "mqtt", Credential::Token);
    hub.run(check.arg(python()).arg(root().join("tests/operators")));
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn program(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk").join(name)
}

/// A part of the installation; its absence fails the test.
fn installed(path: &str) -> PathBuf {
    let path = root().join("build/sdks").join(path);
    assert!(path.exists(), "{} is missing: run packaging/setup/sdks.sh", path.display());
    path
}

fn python() -> PathBuf {
    installed("python/bin/python")
}

/// The hub's program, running.
struct Hub {
    child: Child,
    folder: TempDir,
    /// The first line of its log: addresses, the CA's path and the service's connection string.
    started: Value,
}

impl Hub {
    fn start() -> Self {
        let folder = TempDir::new().unwrap();
        let log = folder.path().join("hub.log");
        let mut child = Command::new(env!("CARGO_BIN_EXE_hubsim"))
            .args(["--log", "json", "--name", HUB, "--admin-port", "0"])
            .stdout(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let told = fs::read_to_string(&log).unwrap();
            if let Some((line, _)) = told.split_once('\n') {
                let started = serde_json::from_str(line).expect(line);
                return Self { child, folder, started };
            }
            assert!(child.try_wait().unwrap().is_none(), "hubsim ended: {told}");
            assert!(Instant::now() < end, "hubsim does not become ready: {told}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn told(&self, name: &str) -> &str {
        self.started.get(name).and_then(Value::as_str).expect(name)
    }

    /// A check's command, with the environment that `hub.js` describes.
    fn check(&self, name: &str, transport: &str, credential: Credential) -> Command {
        let mut command = Command::new("node");
        command
            .arg(program(name))
            .env("NODE_PATH", installed("node/node_modules"))
            .env("NODE_EXTRA_CA_CERTS", self.told("ca"))
            .env("HUB_CA", self.told("ca"))
            .env("HUB_HOST", HUB)
            .env("HUB_SERVICE", self.told("service"))
            .env("HUB_ADMIN", format!("http://{}", self.told("admin")))
            .env("DEVICE_ID", DEVICE)
            .env("DEVICE_TRANSPORT", transport);
        for proxy in
            ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"]
        {
            command.env_remove(proxy);
        }
        match credential {
            Credential::Token => command.env("DEVICE_CREDENTIAL", "token"),
            Credential::ShortToken => command.env("DEVICE_CREDENTIAL", "shortToken"),
            Credential::Certificate => {
                let (certificate, key) =
                    (self.folder.path().join("device.pem"), self.folder.path().join("device.key"));
                let thumbprint = write_certificate(&certificate, &key);
                command
                    .env("DEVICE_CREDENTIAL", "certificate")
                    .env("DEVICE_CERT", certificate)
                    .env("DEVICE_KEY", key)
                    .env("DEVICE_THUMBPRINT", thumbprint)
            }
        };
        command
    }

    /// Runs a check to its end.
    fn run(&self, check: &mut Command) {
        let status = check.stdin(Stdio::null()).status().expect("node runs");
        if !status.success() {
            let log = fs::read_to_string(self.folder.path().join("hub.log")).unwrap();
            let lines = log.lines().collect::<Vec<_>>();
            let last = lines.iter().skip(lines.len().saturating_sub(40));
            let log = last.map(|line| format!("{line:.300}\n")).collect::<String>();
            let program = check.get_program();
            let arguments = check.get_args().collect::<Vec<_>>();
            panic!("{program:?} {arguments:?}: {status}\n--- the hub, last events\n{log}");
        }
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        // It may have ended by itself; the check has told why then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A self-signed certificate and its key as PEM files; gives its SHA-256 in hexadecimal digits.
fn write_certificate(certificate: &Path, key: &Path) -> String {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
    let pair = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
    let mut name = X509Name::builder().unwrap();
    name.append_entry_by_nid(Nid::COMMONNAME, DEVICE).unwrap();
    let name = name.build();
    let mut builder = X509::builder().unwrap();
    builder.set_version(2).unwrap();
    builder.set_subject_name(&name).unwrap();
    builder.set_issuer_name(&name).unwrap();
    builder.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
    builder.set_not_after(&Asn1Time::days_from_now(1).unwrap()).unwrap();
    builder.set_pubkey(&pair).unwrap();
    builder.sign(&pair, MessageDigest::sha256()).unwrap();
    let made = builder.build();
    fs::write(certificate, made.to_pem().unwrap()).unwrap();
    fs::write(key, pair.private_key_to_pem_pkcs8().unwrap()).unwrap();
    let digest = made.digest(MessageDigest::sha256()).unwrap();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
