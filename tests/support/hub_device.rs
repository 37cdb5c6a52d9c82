//! The real hub session over the real wire to hubsim, with a plain agent behind it.

use std::fs::Permissions;
use std::num::NonZeroU16;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hubsim::{Event, EventKind, Hub};
use openssl::asn1::Asn1Time;
use openssl::hash::MessageDigest;
use openssl::pkey::PKey;
use openssl::rsa::Rsa;
use openssl::x509::{X509Builder, X509NameBuilder};
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use twinboot::clock::SystemClock;
use twinboot::config;
use twinboot::hub::credential::Source;
use twinboot::hub::paho::Paho;
use twinboot::hub::payload::Rules;
use twinboot::hub::session::{Session, Timing};
use twinboot::hub::{Desired, HubLink, Report, SessionStatus};
use twinboot::os::Sysroot;
use twinboot::request::{Answer, Command, Request};

/// Longer than anything takes; what ends by it has failed.
pub const LIMIT: Duration = Duration::from_secs(30);
pub const DEVICE: &str = "pump-01";

/// Short delays, so that tests need not wait; what they mean is tested in virtual time.
pub const TIMING: Timing = Timing {
    token_lifetime: Duration::from_secs(3600),
    retry_min: Duration::from_millis(50),
    retry_max: Duration::from_millis(200),
    refused_retry: Duration::from_millis(500),
    reply_limit: Duration::from_secs(2),
};

/// A session that runs, and the agent's ends.
pub struct Device {
    pub desired: mpsc::Receiver<Desired>,
    pub status: watch::Receiver<SessionStatus>,
    pub seen: Arc<Mutex<Vec<Command>>>,
    report: watch::Sender<Arc<Report>>,
    cancel: CancellationToken,
    session: Option<JoinHandle<()>>,
    agent: JoinHandle<()>,
    _folder: TempDir,
}

/// How a device is set up; the default is TCP with the hub's key.
pub struct Setup {
    pub hub: config::Hub,
    pub timing: Timing,
    pub folder: TempDir,
}

impl Setup {
    /// `id` at `hub`, which is reached at `localhost`.
    pub fn new(hub: &Hub, id: &str) -> Self {
        let string = hub.add_device(id).unwrap();
        let mut setup = Self::with_credential(hub, &string);
        setup.hub.host = Some("localhost".to_owned());
        setup
    }

    pub fn with_credential(hub: &Hub, connection_string: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let credential_file = folder.path().join("hub-credential");
        write_secret(&credential_file, connection_string);
        let hub = config::Hub {
            credential_file,
            ca_file: hub.ca_path(),
            port: NonZeroU16::new(hub.mqtt_addr().port()),
            ..config::Hub::default()
        };
        Setup { hub, timing: TIMING, folder }
    }

    /// Over a WebSocket.
    pub fn websocket(mut self, hub: &Hub) -> Self {
        self.hub.transport = config::Transport::Websocket;
        self.hub.port = NonZeroU16::new(hub.https_addr().port());
        self
    }

    /// With a certificate that the hub knows by its thumbprint.
    pub fn certificate(hub: &Hub, id: &str) -> Self {
        let string = format!("HostName={};DeviceId={id};x509=true", hub.hub_name());
        let mut setup = Self::with_credential(hub, &string);
        setup.hub.host = Some("localhost".to_owned());
        let (chain, key) = (setup.path("device.pem"), setup.path("device.key"));
        hub.add_x509_device(id, &write_certificate(id, &chain, &key)).unwrap();
        (setup.hub.certificate_file, setup.hub.private_key_file) = (Some(chain), Some(key));
        setup
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn start(self) -> Device {
        let (requests_sender, requests) = mpsc::channel(16);
        let (desired_sender, desired) = mpsc::channel(64);
        let (report, report_receiver) = watch::channel(Arc::default());
        let (status_sender, status) = watch::channel(SessionStatus::default());
        let cancel = CancellationToken::new();
        let session = Session {
            transport: Paho::new(&self.hub),
            source: Source::new(&self.hub, None),
            link: HubLink {
                requests: requests_sender,
                desired: desired_sender,
                report: report_receiver,
                status: status_sender,
            },
            clock: Arc::new(SystemClock::new(Sysroot::default())),
            rules: Rules::default(),
            timing: self.timing,
        };
        let seen = Arc::new(Mutex::new(Vec::new()));
        Device {
            desired,
            status,
            agent: tokio::spawn(agree(requests, Arc::clone(&seen))),
            seen,
            report,
            session: Some(tokio::spawn(session.run(cancel.clone()))),
            cancel,
            _folder: self.folder,
        }
    }
}

/// An agent that says yes, and what it was asked.
async fn agree(mut requests: mpsc::Receiver<Request>, seen: Arc<Mutex<Vec<Command>>>) {
    while let Some(request) = requests.recv().await {
        seen.lock().unwrap().push(request.command);
        let _ = request.reply.send(Answer::ok(object(json!({ "accepted": true }))));
    }
}

impl Device {
    /// A new report with this content.
    pub fn report(&self, document: Value) -> u64 {
        let generation = self.report.borrow().generation + 1;
        self.report.send_replace(Arc::new(Report { generation, document: object(document) }));
        generation
    }

    pub async fn online(&mut self) {
        self.until("online", |status| status.online).await;
    }

    pub async fn acknowledged(&mut self, generation: u64) {
        self.until("acknowledged", |status| status.acknowledged >= generation).await;
    }

    pub async fn status_with(&mut self, part: &str) -> SessionStatus {
        self.until(part, |status| status.text.contains(part)).await
    }

    async fn until(
        &mut self,
        what: &str,
        condition: impl FnMut(&SessionStatus) -> bool,
    ) -> SessionStatus {
        if let Ok(status) = timeout(LIMIT, self.status.wait_for(condition)).await {
            return status.expect("the session ended").clone();
        }
        panic!("not {what}: {:?}", self.status.borrow());
    }

    pub async fn desired(&mut self) -> Desired {
        timeout(LIMIT, self.desired.recv()).await.expect("nothing desired").unwrap()
    }

    /// Ends the session as the daemon does.
    pub async fn stop(mut self) {
        self.cancel.cancel();
        let session = self.session.take().unwrap();
        timeout(Duration::from_secs(4), session).await.expect("it stops in time").unwrap();
        self.agent.abort();
    }
}

pub fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        other => panic!("{other} is no object"),
    }
}

pub fn write_secret(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
}

/// Writes a self-signed certificate and its key; returns the SHA-256 thumbprint.
pub fn write_certificate(name: &str, chain: &Path, key_file: &Path) -> String {
    let key = PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap();
    let mut subject = X509NameBuilder::new().unwrap();
    subject.append_entry_by_text("CN", name).unwrap();
    let subject = subject.build();
    let mut builder = X509Builder::new().unwrap();
    builder.set_version(2).unwrap();
    builder.set_subject_name(&subject).unwrap();
    builder.set_issuer_name(&subject).unwrap();
    builder.set_pubkey(&key).unwrap();
    builder.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
    builder.set_not_after(&Asn1Time::days_from_now(2).unwrap()).unwrap();
    builder.sign(&key, MessageDigest::sha256()).unwrap();
    let certificate = builder.build();
    std::fs::write(chain, certificate.to_pem().unwrap()).unwrap();
    write_secret(key_file, &String::from_utf8(key.private_key_to_pem_pkcs8().unwrap()).unwrap());
    let digest = certificate.digest(MessageDigest::sha256()).unwrap();
    digest.iter().map(|byte| format!("{byte:02X}")).collect()
}

/// The reported section of a device, as the service sees it, without what the hub adds.
pub fn reported(hub: &Hub, id: &str) -> Value {
    let mut reported = hub.twin(id).unwrap()["properties"]["reported"].take();
    reported.as_object_mut().unwrap().retain(|key, _| !key.starts_with('$'));
    reported
}

/// Whether an event is the end of a connection.
pub fn is_end(event: &Event) -> bool {
    matches!(event.kind, EventKind::Disconnected { .. })
}
