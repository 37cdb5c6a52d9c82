//! A hub that says exactly what a test tells it to, one level below the session, and the session
//! on top of it. For paused time.

use std::collections::VecDeque;
use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use secrecy::ExposeSecret;
use serde_json::{Map, Value, json};
use tempfile::NamedTempFile;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use twinboot::clock::Clock;
use twinboot::config;
use twinboot::hub::credential::{Login, Source};
use twinboot::hub::payload::Rules;
use twinboot::hub::session::{Session, Timing};
use twinboot::hub::topic::FILTERS;
use twinboot::hub::transport::{ConnectError, ConnectionError, Message, Transport};
use twinboot::hub::{Desired, HubLink, Report, SessionStatus};
use twinboot::request::{Answer, Request};
use twinboot::update::WallTime;

pub const MINUTE: Duration = Duration::from_secs(60);
pub const HOUR: Duration = Duration::from_secs(3600);
/// In virtual time: longer than anything the session waits for.
const PATIENCE: Duration = Duration::from_secs(4 * 3600);

pub const TIMING: Timing = Timing {
    token_lifetime: HOUR,
    retry_min: Duration::from_secs(1),
    retry_max: Duration::from_secs(300),
    refused_retry: Duration::from_secs(600),
    reply_limit: Duration::from_secs(30),
};

/// What the session did on the wire.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen {
    Connect { user_name: String, password: String },
    Subscribe(Vec<String>),
    Unsubscribe(String),
    Publish { topic: String, body: String },
    Disconnect,
}

/// How the next CONNECT goes.
#[derive(Debug)]
pub enum Plan {
    Accept,
    Refuse(u8),
    Close,
}

#[derive(Default)]
struct Wire {
    plans: VecDeque<Plan>,
    fallback: Option<fn() -> Plan>,
    to_device: Option<mpsc::UnboundedSender<Message>>,
    before_unsuback: Vec<Message>,
}

pub struct Script {
    wire: Arc<Mutex<Wire>>,
    seen: mpsc::UnboundedSender<Seen>,
    incoming: Option<mpsc::UnboundedReceiver<Message>>,
}

impl Script {
    fn is_live(&self) -> Result<(), ConnectionError> {
        let live = self.incoming.is_some() && self.wire.lock().unwrap().to_device.is_some();
        if live { Ok(()) } else { Err(ConnectionError::Lost) }
    }
}

impl Transport for Script {
    async fn connect(&mut self, login: &Login) -> Result<(), ConnectError> {
        let password = login.password.as_ref().map(ExposeSecret::expose_secret);
        let connect = Seen::Connect {
            user_name: login.user_name.clone(),
            password: password.unwrap_or_default().to_owned(),
        };
        self.seen.send(connect).unwrap();
        let mut wire = self.wire.lock().unwrap();
        let fallback = wire.fallback;
        let plan = wire.plans.pop_front().or_else(|| fallback.map(|plan| plan()));
        match plan.unwrap_or(Plan::Accept) {
            Plan::Accept => {
                let (sender, receiver) = mpsc::unbounded_channel();
                wire.to_device = Some(sender);
                self.incoming = Some(receiver);
                Ok(())
            }
            Plan::Refuse(code) => Err(ConnectError::Refused { code }),
            Plan::Close => Err(ConnectError::Closed),
        }
    }

    async fn subscribe(&mut self, filters: &[&str]) -> Result<(), ConnectionError> {
        let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
        self.seen.send(Seen::Subscribe(filters)).unwrap();
        self.is_live()
    }

    async fn unsubscribe(&mut self, filter: &str) -> Result<(), ConnectionError> {
        self.seen.send(Seen::Unsubscribe(filter.to_owned())).unwrap();
        self.is_live()?;
        let mut wire = self.wire.lock().unwrap();
        let late = std::mem::take(&mut wire.before_unsuback);
        let to_device = wire.to_device.as_ref().unwrap();
        late.into_iter().for_each(|message| to_device.send(message).unwrap());
        Ok(())
    }

    fn publish(&mut self, topic: &str, payload: Vec<u8>) -> Result<(), ConnectionError> {
        self.is_live()?;
        let body = String::from_utf8(payload).unwrap();
        let publish = Seen::Publish { topic: topic.to_owned(), body };
        self.seen.send(publish).map_err(|_| ConnectionError::Lost)
    }

    async fn receive(&mut self) -> Option<Message> {
        self.incoming.as_mut()?.recv().await
    }

    async fn disconnect(&mut self) {
        self.incoming = None;
        self.wire.lock().unwrap().to_device = None;
        let _ = self.seen.send(Seen::Disconnect);
    }
}

/// A clock that a test sets; time since boot is tokio's.
pub struct TestClock {
    booted: Instant,
    boot_unix_ms: Mutex<Option<i64>>,
}

impl TestClock {
    /// Sets or unsets the wall time of the boot.
    pub fn set(&self, boot_unix_ms: Option<i64>) {
        *self.boot_unix_ms.lock().unwrap() = boot_unix_ms;
    }
}

impl Clock for TestClock {
    fn wall(&self) -> Option<WallTime> {
        let since_boot = i64::try_from(self.since_boot().as_millis()).unwrap();
        self.boot_unix_ms.lock().unwrap().map(|boot| WallTime::from_unix_ms(boot + since_boot))
    }

    fn since_boot(&self) -> Duration {
        self.booted.elapsed()
    }
}

pub const BOOT_UNIX_MS: i64 = 1_900_000_000_000;

/// The session and both of its surroundings.
pub struct Rig {
    seen: mpsc::UnboundedReceiver<Seen>,
    wire: Arc<Mutex<Wire>>,
    pub credential: NamedTempFile,
    pub clock: Arc<TestClock>,
    pub requests: mpsc::Receiver<Request>,
    pub desired: mpsc::Receiver<Desired>,
    pub report: watch::Sender<Arc<Report>>,
    pub status: watch::Receiver<SessionStatus>,
    pub cancel: CancellationToken,
    pub task: JoinHandle<()>,
}

impl Rig {
    pub fn new() -> Self {
        Self::with(TIMING)
    }

    pub fn with(timing: Timing) -> Self {
        Self::build(timing, None)
    }

    /// With a credential of systemd in this folder.
    pub fn with_credentials_of_systemd(folder: &Path) -> Self {
        Self::build(TIMING, Some(folder))
    }

    fn build(timing: Timing, credentials_directory: Option<&Path>) -> Self {
        let mut credential = NamedTempFile::new().unwrap();
        let key = "HostName=contoso.azure-devices.net;DeviceId=pump-01;SharedAccessKey=a2V5";
        credential.write_all(key.as_bytes()).unwrap();
        credential.as_file().set_permissions(Permissions::from_mode(0o600)).unwrap();
        let clock = Arc::new(TestClock {
            booted: Instant::now(),
            boot_unix_ms: Mutex::new(Some(BOOT_UNIX_MS)),
        });
        let hub =
            config::Hub { credential_file: credential.path().to_owned(), ..config::Hub::default() };
        let wire = Arc::new(Mutex::new(Wire::default()));
        let (seen_sender, seen) = mpsc::unbounded_channel();
        let (requests_sender, requests) = mpsc::channel(4);
        let (desired_sender, desired) = mpsc::channel(1);
        let (report, report_receiver) = watch::channel(Arc::default());
        let (status_sender, status) = watch::channel(SessionStatus::default());
        let cancel = CancellationToken::new();
        let session = Session {
            transport: Script { wire: Arc::clone(&wire), seen: seen_sender, incoming: None },
            source: Source::new(&hub, credentials_directory),
            link: HubLink {
                requests: requests_sender,
                desired: desired_sender,
                report: report_receiver,
                status: status_sender,
            },
            clock: Arc::<TestClock>::clone(&clock),
            rules: Rules::default(),
            timing,
        };
        let task = tokio::spawn(session.run(cancel.clone()));
        Rig { seen, wire, credential, clock, requests, desired, report, status, cancel, task }
    }

    pub fn plan(&self, plans: impl IntoIterator<Item = Plan>) {
        self.wire.lock().unwrap().plans.extend(plans);
    }

    /// How every CONNECT goes that was not planned.
    pub fn always(&self, plan: fn() -> Plan) {
        self.wire.lock().unwrap().fallback = Some(plan);
    }

    /// What the session does next; time passes until it does something.
    pub async fn next(&mut self) -> Seen {
        timeout(PATIENCE, self.seen.recv()).await.expect("the session does nothing").unwrap()
    }

    /// Nothing goes over the wire for `time`.
    pub async fn assert_silence(&mut self, time: Duration) {
        if let Ok(seen) = timeout(time, self.seen.recv()).await {
            panic!("unexpected: {seen:?}");
        }
    }

    /// The token of the next CONNECT.
    pub async fn connect(&mut self) -> String {
        match self.next().await {
            Seen::Connect { password, .. } => password,
            other => panic!("no CONNECT but {other:?}"),
        }
    }

    pub async fn publish(&mut self) -> (String, Value) {
        match self.next().await {
            Seen::Publish { topic, body } if body.is_empty() => (topic, Value::Null),
            Seen::Publish { topic, body } => (topic, serde_json::from_str(&body).unwrap()),
            other => panic!("no PUBLISH but {other:?}"),
        }
    }

    /// The request id of the next request to read the twin.
    pub async fn read_request(&mut self) -> String {
        let (topic, _) = self.publish().await;
        let id = topic.strip_prefix("$iothub/twin/GET/?$rid=");
        id.unwrap_or_else(|| panic!("no GET but {topic}")).to_owned()
    }

    /// Request id and body of the next patch.
    pub async fn patch_request(&mut self) -> (String, Value) {
        let (topic, body) = self.publish().await;
        let id = topic.strip_prefix("$iothub/twin/PATCH/properties/reported/?$rid=");
        (id.unwrap_or_else(|| panic!("no PATCH but {topic}")).to_owned(), body)
    }

    /// Status, request id and body of the next answer to a method.
    pub async fn method_answer(&mut self) -> (u16, String, Value) {
        let (topic, body) = self.publish().await;
        let rest = topic.strip_prefix("$iothub/methods/res/");
        let rest = rest.unwrap_or_else(|| panic!("no method answer but {topic}"));
        let (status, id) = rest.split_once("/?$rid=").unwrap();
        (status.parse().unwrap(), id.to_owned(), body)
    }

    pub fn send(&self, topic: impl Into<String>, body: &Value) {
        let payload = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let message = Message { topic: topic.into(), payload };
        let wire = self.wire.lock().unwrap();
        wire.to_device.as_ref().expect("not connected").send(message).unwrap();
    }

    pub fn answer(&self, status: u16, id: &str, body: &Value) {
        self.send(format!("$iothub/twin/res/{status}/?$rid={id}"), body);
    }

    pub fn notify(&self, version: u64, patch: &Value) {
        let mut patch = patch.clone();
        patch["$version"] = json!(version);
        self.send(format!("$iothub/twin/PATCH/properties/desired/?$version={version}"), &patch);
    }

    /// A call that the hub sends just before it confirms the next UNSUBSCRIBE.
    pub fn call_before_unsuback(&self, method: &str, id: &str) {
        let topic = format!("$iothub/methods/POST/{method}/?$rid={id}");
        self.wire.lock().unwrap().before_unsuback.push(Message { topic, payload: Vec::new() });
    }

    pub fn call(&self, method: &str, id: &str, payload: &Value) {
        self.send(format!("$iothub/methods/POST/{method}/?$rid={id}"), payload);
    }

    /// Cuts the connection.
    pub fn cut(&self) {
        self.wire.lock().unwrap().to_device = None;
    }

    /// CONNECT and subscriptions.
    pub async fn connect_and_subscribe(&mut self) -> String {
        let token = self.connect().await;
        assert_eq!(self.next().await, Seen::Subscribe(FILTERS.map(str::to_owned).to_vec()));
        token
    }

    /// A whole connect with this twin.
    pub async fn online(&mut self, desired: Value, reported: Value) -> String {
        let token = self.connect_and_subscribe().await;
        let id = self.read_request().await;
        self.answer(200, &id, &twin(desired, reported));
        self.status.wait_for(|status| status.online).await.unwrap();
        token
    }

    /// Tells of a trial that waits for the hub, with so much time left.
    pub fn trial(&self, left: Duration) {
        let trial_ends = Some(self.clock.since_boot() + left);
        self.report.send_modify(|report| {
            *report = Arc::new(Report { trial_ends, ..Report::clone(report) });
        });
    }

    /// Shows a report.
    pub fn report(&self, generation: u64, document: Value) {
        let document = object(document);
        self.report.send_replace(Arc::new(Report { generation, document, ..Report::default() }));
    }

    /// Waits until the hub has acknowledged a report.
    pub async fn acknowledged(&mut self, generation: u64) {
        let reached = self.status.wait_for(|status| status.acknowledged >= generation);
        timeout(PATIENCE, reached).await.expect("not acknowledged").unwrap();
    }

    /// Waits for a status text.
    pub async fn status_with(&mut self, part: &str) -> SessionStatus {
        let found = self.status.wait_for(|status| status.text.contains(part));
        if let Ok(status) = timeout(PATIENCE, found).await {
            return status.unwrap().clone();
        }
        panic!("no \"{part}\" in {:?}", self.status.borrow().text)
    }

    pub async fn request(&mut self) -> Request {
        timeout(PATIENCE, self.requests.recv()).await.expect("no request").unwrap()
    }

    pub async fn desired(&mut self) -> Desired {
        timeout(PATIENCE, self.desired.recv()).await.expect("nothing desired").unwrap()
    }
}

pub fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        other => panic!("{other} is no object"),
    }
}

/// A twin as the hub hands it out.
pub fn twin(mut desired: Value, mut reported: Value) -> Value {
    for section in [&mut desired, &mut reported] {
        if section.get("$version").is_none() {
            section["$version"] = json!(1);
        }
    }
    json!({ "desired": desired, "reported": reported })
}

pub fn ok() -> Answer {
    Answer::ok(object(json!({ "done": true })))
}
