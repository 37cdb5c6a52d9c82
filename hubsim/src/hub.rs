//! The hub as a library: started, asked, disturbed and stopped by tests.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use openssl::x509::X509;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::access::Policies;
use crate::core::{Book, Core, ReportedChange};
use crate::error::{HubError, StartError};
use crate::events::{Event, Events, NoSuchEvent, Reason};
use crate::faults::Fault;
use crate::identity::Identity;
use crate::options::Options;
use crate::registry::{Authentication, Record, Status, checked_thumbprint};
use crate::service::MethodCall;
use crate::tls::Credential;
use crate::twin::Write;
use crate::{admin, https, mqtt, persist, rest, tls};

/// A running hub. Dropping it stops it; [`Hub::stop`] also waits and allows a new start.
#[derive(Debug)]
pub struct Hub {
    core: Arc<Core>,
    certificates: Arc<Certificates>,
    addresses: Addresses,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

/// A hub that is down but remembers everything. [`Stopped::start`] brings it back.
#[derive(Debug)]
pub struct Stopped {
    core: Arc<Core>,
    certificates: Arc<Certificates>,
    addresses: Addresses,
}

#[derive(Debug, Clone, Copy)]
struct Addresses {
    mqtt: SocketAddr,
    https: SocketAddr,
    admin: Option<SocketAddr>,
}

#[derive(Debug)]
struct Certificates {
    authority: Credential,
    server: Credential,
    folder: PathBuf,
    /// Removes the folder with the hub, where no state folder was asked for.
    _temporary: Option<TempDir>,
}

impl Hub {
    /// Starts a hub; it listens when this returns.
    ///
    /// # Errors
    /// An address or the state folder cannot be used; nothing listens then.
    pub async fn start(options: Options) -> Result<Self, StartError> {
        let addresses =
            Addresses { mqtt: options.mqtt, https: options.https, admin: options.admin };
        if let Some(admin) = options.admin.filter(|admin| !admin.ip().is_loopback()) {
            return Err(StartError::AdminNotLoopback(admin));
        }
        let certificates = Certificates::new(&options)?;
        let saved = match &options.state {
            Some(folder) => persist::load(folder)?,
            None => None,
        };
        let (policies, book) = saved.unwrap_or_else(|| (Policies::fresh(), Book::default()));
        let core = Arc::new(Core::new(options, policies, book));
        Self::listen(core, Arc::new(certificates), addresses).await
    }

    async fn listen(
        core: Arc<Core>,
        certificates: Arc<Certificates>,
        wanted: Addresses,
    ) -> Result<Self, StartError> {
        let acceptor = tls::acceptor(&certificates.server, &certificates.authority.certificate)
            .map_err(StartError::Certificate)?;
        let (mqtt_listener, mqtt_addr) = bind(wanted.mqtt).await?;
        let (https_listener, https_addr) = bind(wanted.https).await?;
        let admin = match wanted.admin {
            Some(address) => Some(bind(address).await?),
            None => None,
        };
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let addresses = Addresses {
            mqtt: mqtt_addr,
            https: https_addr,
            admin: admin.as_ref().map(|(_, address)| *address),
        };
        tasks.spawn(mqtt::listen(
            Arc::clone(&core),
            mqtt_listener,
            acceptor.clone(),
            stop.child_token(),
        ));
        let router = rest::router(Arc::clone(&core));
        tasks.spawn(https::listen(
            Arc::clone(&core),
            https_listener,
            acceptor,
            router,
            stop.child_token(),
        ));
        if let Some((listener, _)) = admin {
            let router = admin::router(Arc::clone(&core));
            tasks.spawn(https::listen_plain(listener, router, stop.child_token()));
        }
        if let Some(folder) = core.options.state.clone() {
            tasks.spawn(persist::keep_saving(Arc::clone(&core), folder, stop.child_token()));
        }
        Ok(Self { core, certificates, addresses, stop, tasks })
    }

    /// Cuts every connection, stops listening and saves. Events and fault settings are kept.
    pub async fn stop(mut self) -> Stopped {
        self.core.cut_all(&Reason::HubStopped);
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
        self.core.cut_all(&Reason::HubStopped);
        Stopped {
            core: Arc::clone(&self.core),
            certificates: Arc::clone(&self.certificates),
            addresses: self.addresses,
        }
    }

    /// The certificate authority that clients must trust, in PEM.
    pub fn ca_pem(&self) -> String {
        let pem = self.certificates.authority.certificate.to_pem().unwrap_or_default();
        String::from_utf8_lossy(&pem).into_owned()
    }

    /// The same as a file.
    pub fn ca_path(&self) -> PathBuf {
        self.certificates.folder.join("ca.pem")
    }

    /// Where MQTT over TLS is.
    pub fn mqtt_addr(&self) -> SocketAddr {
        self.addresses.mqtt
    }

    /// Where HTTPS and WebSockets are.
    pub fn https_addr(&self) -> SocketAddr {
        self.addresses.https
    }

    /// Where the admin endpoint is, if there is one.
    pub fn admin_addr(&self) -> Option<SocketAddr> {
        self.addresses.admin
    }

    /// The hub's name, as in connection strings.
    pub fn hub_name(&self) -> &str {
        &self.core.options.hub_name
    }

    /// Registers a device or module (`device/module`) with fresh keys, if it is not there yet, and
    /// returns its connection string.
    ///
    /// # Errors
    /// The id cannot exist, or a module's device does not.
    pub fn add_device(&self, id: &str) -> Result<String, HubError> {
        let identity: Identity = id.parse()?;
        if self.core.book().record(&identity).is_err() {
            self.add(&identity, Authentication::fresh())?;
        }
        self.device_connection_string(id)
    }

    /// Registers a device that shows a self-signed certificate with this thumbprint (SHA-1 or
    /// SHA-256, in hexadecimal digits).
    ///
    /// # Errors
    /// The id cannot exist or exists, or the thumbprint is none.
    pub fn add_x509_device(&self, id: &str, thumbprint: &str) -> Result<(), HubError> {
        let primary = Some(checked_thumbprint(thumbprint.to_owned())?);
        self.add(&id.parse()?, Authentication::SelfSigned { primary, secondary: None })
    }

    /// Registers a device that shows a certificate of a registered authority with its id as name.
    ///
    /// # Errors
    /// The id cannot exist or exists.
    pub fn add_ca_signed_device(&self, id: &str) -> Result<(), HubError> {
        self.add(&id.parse()?, Authentication::CertificateAuthority)
    }

    /// Registers an authority for devices' certificates.
    ///
    /// # Errors
    /// The text is not one certificate in PEM.
    pub fn add_device_authority(&self, pem: &str) -> Result<(), HubError> {
        let authority = X509::from_pem(pem.as_bytes())
            .map_err(|_| HubError::ArgumentInvalid("not a certificate in PEM".to_owned()))?;
        self.core.book().authorities.push(authority);
        self.core.dirty.notify_one();
        Ok(())
    }

    fn add(&self, identity: &Identity, authentication: Authentication) -> Result<(), HubError> {
        let mut book = self.core.book();
        if book.records.contains_key(identity) {
            return Err(HubError::AlreadyExists(identity.clone()));
        }
        if identity.module_id().is_some() {
            book.record(&Identity::device(identity.device_id())?)?;
        }
        let record = Record::new(authentication, &self.core.clock.stamp());
        book.records.insert(identity.clone(), record);
        self.core.dirty.notify_one();
        Ok(())
    }

    /// Deletes a device with its modules and twins; their connections are cut.
    ///
    /// # Errors
    /// There is none of this id.
    pub fn remove_device(&self, id: &str) -> Result<(), HubError> {
        self.core.delete_device(&id.parse()?, None)
    }

    /// Enables or disables an identity; disabling cuts its connection.
    ///
    /// # Errors
    /// There is none of this id.
    pub fn set_enabled(&self, id: &str, enabled: bool) -> Result<(), HubError> {
        let identity = id.parse()?;
        let mut book = self.core.book();
        let record = book.record_mut(&identity)?;
        record.status = if enabled { Status::Enabled } else { Status::Disabled };
        if !enabled {
            self.core.cut_in(&mut book, &identity, Reason::IdentityRemoved);
        }
        self.core.dirty.notify_one();
        Ok(())
    }

    /// The connection string of a device or module with keys.
    ///
    /// # Errors
    /// There is none of this id, or it has no keys.
    pub fn device_connection_string(&self, id: &str) -> Result<String, HubError> {
        let identity: Identity = id.parse()?;
        let book = self.core.book();
        let Authentication::Sas { primary, .. } = &book.record(&identity)?.authentication else {
            return Err(HubError::ArgumentInvalid(format!("{identity} has no keys")));
        };
        let module = identity.module_id().map(|module| format!(";ModuleId={module}"));
        Ok(format!(
            "HostName={};DeviceId={}{};SharedAccessKey={primary}",
            self.hub_name(),
            identity.device_id(),
            module.unwrap_or_default(),
        ))
    }

    /// The connection string of the policy `iothubowner`, which may do everything.
    pub fn service_connection_string(&self) -> String {
        self.policy_connection_string("iothubowner").unwrap_or_default()
    }

    /// The connection string of a shared access policy: `iothubowner`, `service`, `device`,
    /// `registryRead` or `registryReadWrite`.
    pub fn policy_connection_string(&self, policy: &str) -> Option<String> {
        let key = self.core.policies.key(policy)?;
        let name = self.hub_name();
        Some(format!("HostName={name};SharedAccessKeyName={policy};SharedAccessKey={key}"))
    }

    /// A service token of `iothubowner`, valid for an hour on the hub's clock.
    pub fn service_token(&self) -> String {
        let key = self.core.policies.key("iothubowner").unwrap_or_default();
        let expiry = self.core.clock.unix().saturating_add(3600);
        crate::sas::token(self.hub_name(), key, expiry, Some("iothubowner")).unwrap_or_default()
    }

    /// The twin as the service sees it.
    ///
    /// # Errors
    /// There is none of this id.
    pub fn twin(&self, id: &str) -> Result<Value, HubError> {
        self.core.twin(&id.parse()?)
    }

    /// Merges into the desired section and tells the device. `Value::Null` empties the section.
    ///
    /// # Errors
    /// There is none of this id, or the patch breaks a rule of twins; nothing is written then.
    pub fn patch_desired(&self, id: &str, desired: Value) -> Result<Value, HubError> {
        self.patch_twin(id, json!({ "properties": { "desired": desired } }))
    }

    /// Merges tags and desired, as `PATCH /twins/{id}`.
    ///
    /// # Errors
    /// There is none of this id, or the patch breaks a rule of twins; nothing is written then.
    pub fn patch_twin(&self, id: &str, patch: Value) -> Result<Value, HubError> {
        self.core.write_twin(&id.parse()?, &patch, Write::Merge, None)
    }

    /// Replaces tags and desired, as `PUT /twins/{id}`.
    ///
    /// # Errors
    /// There is none of this id, or the content breaks a rule of twins; nothing is written then.
    pub fn replace_twin(&self, id: &str, twin: Value) -> Result<Value, HubError> {
        self.core.write_twin(&id.parse()?, &twin, Write::Replace, None)
    }

    /// Calls a direct method and waits up to `limit` for the answer. The device must be connected
    /// and subscribed.
    ///
    /// # Errors
    /// Unknown device, not online, no answer in time, or an answer that is not JSON.
    pub async fn invoke(
        &self,
        id: &str,
        method: &str,
        payload: Value,
        limit: Duration,
    ) -> Result<(i64, Value), HubError> {
        self.invoke_raw(id, method, payload.to_string().into_bytes(), limit).await
    }

    /// The same with any bytes as payload, also such as no service would let pass.
    ///
    /// # Errors
    /// As [`Hub::invoke`].
    pub async fn invoke_raw(
        &self,
        id: &str,
        method: &str,
        payload: Vec<u8>,
        limit: Duration,
    ) -> Result<(i64, Value), HubError> {
        let call = MethodCall {
            name: method.to_owned(),
            payload: Bytes::from(payload),
            connect_timeout: Duration::ZERO,
            response_timeout: limit,
        };
        let (status, body) = self.core.call(&id.parse()?, call).await?;
        let payload = serde_json::from_slice(&body).map_err(|_| HubError::InvalidAnswer {
            status,
            body: String::from_utf8_lossy(&body).chars().take(200).collect(),
        })?;
        Ok((status, payload))
    }

    /// Runs a query over the twins.
    ///
    /// # Errors
    /// The text is not a query.
    pub fn query(&self, text: &str) -> Result<Vec<Value>, HubError> {
        self.core.query(text).map(|(items, _)| items)
    }

    /// Every accepted reported patch of an identity, in order, with what it led to.
    pub fn reported_history(&self, id: &str) -> Vec<ReportedChange> {
        let Ok(identity) = id.parse::<Identity>() else { return Vec::new() };
        let book = self.core.book();
        let session = book.sessions.get(&identity);
        session.map(|session| session.history.iter().cloned().collect()).unwrap_or_default()
    }

    /// Whether an identity is connected now.
    pub fn connected(&self, id: &str) -> bool {
        id.parse().is_ok_and(|identity| self.core.book().connected(&identity))
    }

    /// A reader of the events from now on.
    pub fn events(&self) -> Events {
        self.core.events_from_now()
    }

    /// A reader of all events since the hub was made.
    pub fn events_from_start(&self) -> Events {
        self.core.events_from_start()
    }

    /// The first event since the hub was made that meets the condition, waited for. For what comes
    /// after a certain moment take [`Hub::events`] then, and wait on that.
    ///
    /// # Errors
    /// None came in time.
    pub async fn wait_for(
        &self,
        condition: impl Fn(&Event) -> bool,
        limit: Duration,
    ) -> Result<Event, NoSuchEvent> {
        self.core.wait_for(condition, limit).await
    }

    /// The fault handles of an identity.
    pub fn faults(&self, id: &str) -> Faults<'_> {
        Faults { hub: self, id: id.to_owned() }
    }

    /// Moves the hub's clock against the machine's. Tokens expire by it.
    pub fn set_clock_offset(&self, seconds: i64) {
        self.core.clock.set_offset(seconds);
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Stopped {
    /// Listens again on the same ports, with the same certificates, identities and twins.
    ///
    /// # Errors
    /// A port has been taken meanwhile.
    pub async fn start(self) -> Result<Hub, StartError> {
        Hub::listen(self.core, self.certificates, self.addresses).await
    }
}

impl Certificates {
    fn new(options: &Options) -> Result<Self, StartError> {
        let (folder, temporary) = match &options.state {
            Some(folder) => (folder.clone(), None),
            None => {
                let temporary = TempDir::with_prefix("hubsim-")
                    .map_err(|source| StartError::File { path: std::env::temp_dir(), source })?;
                (temporary.path().to_owned(), Some(temporary))
            }
        };
        let authority = persist::authority(&folder)?;
        let mut names = vec![options.hub_name.clone()];
        names.extend(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
        names.extend(options.extra_names.iter().cloned());
        let server = tls::new_server(&authority, &names).map_err(StartError::Certificate)?;
        persist::save_server(Path::new(&folder), &server)?;
        Ok(Self { authority, server, folder, _temporary: temporary })
    }
}

async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let error = |source| StartError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(error)?;
    let bound = listener.local_addr().map_err(error)?;
    Ok((listener, bound))
}

/// Faults for one identity. Each call takes effect at once; an unknown identity is an error.
#[derive(Debug)]
pub struct Faults<'a> {
    hub: &'a Hub,
    id: String,
}

/// Each of these is the [`Fault`] of the same name.
#[expect(missing_docs, clippy::missing_errors_doc, reason = "described at `Fault`")]
impl Faults<'_> {
    pub fn put(&self, fault: &Fault) -> Result<(), HubError> {
        self.hub.core.fault(&self.id.parse()?, fault)
    }

    pub fn drop_now(&self) -> Result<(), HubError> {
        self.put(&Fault::DropNow)
    }

    pub fn drop_after_packets(&self, packets: u64) -> Result<(), HubError> {
        self.put(&Fault::DropAfterPackets { packets })
    }

    pub fn drop_before_packet(&self, packets: u64) -> Result<(), HubError> {
        self.put(&Fault::DropBeforePacket { packets })
    }

    pub fn delay_next_response(&self, delay: Duration) -> Result<(), HubError> {
        let millis = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self.put(&Fault::DelayNextResponse { millis })
    }

    pub fn lose_next_response(&self) -> Result<(), HubError> {
        self.put(&Fault::LoseNextResponse)
    }

    pub fn lose_next_puback(&self) -> Result<(), HubError> {
        self.put(&Fault::LoseNextPuback)
    }

    pub fn fail_twin(&self, status: u16, times: u32) -> Result<(), HubError> {
        self.put(&Fault::FailTwin { status, times })
    }

    pub fn expire_token_now(&self) -> Result<(), HubError> {
        self.put(&Fault::ExpireTokenNow)
    }

    pub fn deliver_next_method_twice(&self) -> Result<(), HubError> {
        self.put(&Fault::DeliverNextMethodTwice)
    }

    pub fn swap_parameter_order(&self, on: bool) -> Result<(), HubError> {
        self.put(&Fault::SwapParameterOrder { on })
    }

    pub fn encode_dollar(&self, on: bool) -> Result<(), HubError> {
        self.put(&Fault::EncodeDollar { on })
    }

    pub fn refuse_connections(&self, code: Option<u8>) -> Result<(), HubError> {
        self.put(&Fault::RefuseConnections { code })
    }

    pub fn close_instead_of_connack(&self, on: bool) -> Result<(), HubError> {
        self.put(&Fault::CloseInsteadOfConnack { on })
    }

    pub fn stall(&self, on: bool) -> Result<(), HubError> {
        self.put(&Fault::Stall { on })
    }

    /// Sends a method call with any bytes as payload; see [`Hub::invoke_raw`].
    pub async fn send_raw_method(
        &self,
        method: &str,
        payload: &[u8],
        limit: Duration,
    ) -> Result<(i64, Value), HubError> {
        self.hub.invoke_raw(&self.id, method, payload.to_vec(), limit).await
    }
}
