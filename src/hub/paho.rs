//! [`Transport`] by Eclipse Paho.
//!
//! Paho's own automatic reconnect stays off: it would come back with the old password, which is
//! an expired token, and without subscriptions. Every connection is a new client with new
//! options. Nothing is kept on disk: what must survive is the agent's saved state.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use paho_mqtt as mqtt;
use secrecy::ExposeSecret;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::credential::Login;
use super::diagnose::{Cause, Target, diagnose};
use super::transport::{ConnectError, ConnectionError, Message, Transport};
use crate::config;

/// Path of the WebSocket (Microsoft, "Communicate with an IoT hub using the MQTT protocol").
const WEBSOCKET_PATH: &str = "/$iothub/websocket";
/// Time for the last messages and DISCONNECT to leave.
const GOODBYE_LIMIT: Duration = Duration::from_secs(1);
/// What a SUBACK says of a filter that was not granted (MQTT 3.1.1 section 3.9.3).
const NOT_GRANTED: i32 = 0x80;
/// Failures of one kind in a row for which one diagnosis does: it costs the hub as much as a
/// connection, and a hub in trouble has many devices to bear.
const ONE_DIAGNOSIS: u32 = 10;

/// MQTT by Paho, over TLS or over a WebSocket.
///
/// The client of a connection that is over stays until the next one is there: when the last
/// client goes, Paho ends its threads, which takes it up to a second.
#[derive(Debug)]
pub struct Paho {
    hub: config::Hub,
    live: Option<Live>,
    trouble: Option<Trouble>,
}

/// Why connections fail, as far as it was asked.
#[derive(Debug)]
struct Trouble {
    /// The host, and whether it was silent. What Paho says beside is by chance.
    of: (String, bool),
    /// What was found then; nothing if the trouble lies behind TLS.
    cause: Option<Arc<Cause>>,
    /// Failures in a row that this explains.
    failures: u32,
}

/// One connection, or what is left of it.
struct Live {
    client: mqtt::AsyncClient,
    /// Unbounded, because a bounded one would drop messages or block Paho's thread, on which the
    /// session itself may wait. The session empties it at once.
    incoming: mpsc::UnboundedReceiver<mqtt::Message>,
    last_sent: Option<mqtt::DeliveryToken>,
    /// While the connection is under way. Holds the client, too.
    connecting: Option<mqtt::ConnectToken>,
    /// Cancelled when the connection is over: Paho holds nothing but memory then.
    over: CancellationToken,
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let over = self.over.is_cancelled();
        f.debug_struct("Live").field("over", &over).finish_non_exhaustive()
    }
}

impl Live {
    /// What Paho answers. It leaves that open when the connection ends first.
    async fn answer(
        &self,
        token: impl Future<Output = Result<mqtt::ServerResponse, mqtt::Error>>,
    ) -> Result<mqtt::ServerResponse, ConnectionError> {
        let answer = self.over.run_until_cancelled(token).await;
        answer.and_then(Result::ok).ok_or(ConnectionError::Lost)
    }
}

impl Paho {
    /// Connects by these settings.
    #[must_use]
    pub fn new(hub: &config::Hub) -> Self {
        Paho { hub: hub.clone(), live: None, trouble: None }
    }

    fn target(&self, login: &Login) -> Target {
        let default_port = match self.hub.transport {
            config::Transport::Tcp => 8883,
            config::Transport::Websocket => 443,
        };
        let proxy = self.hub.proxy.as_ref().map(config::ProxyUrl::url);
        Target {
            host: self.hub.host.as_ref().unwrap_or(&login.host).clone(),
            port: self.hub.port.map_or(default_port, std::num::NonZeroU16::get),
            ca_file: self.hub.ca_file.clone(),
            proxy: proxy
                .and_then(|url| Some((url.host_str()?.to_owned(), url.port_or_known_default()?))),
            limit: self.hub.connect_limit_s.duration(),
        }
    }

    /// A new client in the place of the one before.
    async fn client(
        &mut self,
        login: &Login,
        target: &Target,
    ) -> Result<mqtt::AsyncClient, mqtt::Error> {
        let Target { host, port, .. } = target;
        let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
        let uri = match self.hub.transport {
            config::Transport::Tcp => format!("ssl://{host}:{port}"),
            config::Transport::Websocket => format!("wss://{host}:{port}{WEBSOCKET_PATH}"),
        };
        let new = mqtt::CreateOptionsBuilder::new()
            .server_uri(uri)
            .client_id(&login.client_id)
            .persistence(mqtt::PersistenceType::None)
            .mqtt_version(mqtt::MQTT_VERSION_3_1_1);
        let before = self.live.take();
        // Not here, but on a thread that may block: Paho holds its lock while it resolves a name.
        let created = spawn_blocking(move || {
            let client = new.create_client();
            drop(before);
            client
        });
        match timeout(target.limit, created).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) | Err(_) => Err(mqtt::Error::Timeout),
        }
    }

    fn options(&self, login: &Login, target: &Target) -> Result<mqtt::ConnectOptions, mqtt::Error> {
        let mut tls = mqtt::SslOptionsBuilder::new();
        // From a folder OpenSSL reads the one certificate that it needs, not some hundreds.
        if self.hub.ca_file.is_dir() {
            tls.ca_path(&self.hub.ca_file)?;
        } else {
            tls.trust_store(&self.hub.ca_file)?;
        }
        tls.disable_default_trust_store(true).enable_server_cert_auth(true).verify(true);
        if let Some(files) = &login.certificate {
            tls.key_store(&files.chain)?.private_key(&files.key)?;
        }
        // The version must be said: left to itself Paho tries 3.1 after a refusal, which the hub
        // does not speak and which hides the true reason.
        let mut options = mqtt::ConnectOptionsBuilder::with_mqtt_version(mqtt::MQTT_VERSION_3_1_1);
        options
            .clean_session(false)
            .keep_alive_interval(self.hub.keep_alive_s.duration())
            .connect_timeout(self.hub.connect_limit_s.duration())
            .user_name(&login.user_name)
            .ssl_options(tls.finalize());
        if let Some(password) = &login.password {
            options.password(password.expose_secret());
        }
        if let Some((host, port)) = &target.proxy {
            options.https_proxy(format!("http://{host}:{port}"));
        }
        Ok(options.finalize())
    }

    /// Why a connection did not come about.
    async fn explain(&mut self, error: mqtt::Error, target: &Target) -> ConnectError {
        let before = self.trouble.take();
        if let mqtt::Error::ConnectReturn(code) = error {
            // `repr(u8)` with the numbers of MQTT 3.1.1.
            return ConnectError::Refused { code: return_code(code) };
        }
        let is_silent = matches!(error, mqtt::Error::Timeout);
        let of = (target.host.clone(), is_silent);
        let known = before.filter(|known| {
            // That the hub closed without a word counts as a refusal; it must be true each time.
            let may_stand = known.cause.is_some() || is_silent;
            known.of == of && known.failures < ONE_DIAGNOSIS && may_stand
        });
        let (cause, earlier) = match known {
            Some(known) => (known.cause, known.failures),
            None => (diagnose(target).await.err().map(Arc::new), 0),
        };
        self.trouble = Some(Trouble { of, cause: cause.clone(), failures: earlier + 1 });
        match cause {
            Some(cause) => ConnectError::Unreachable(cause),
            None if is_silent => ConnectError::Silent,
            None => ConnectError::Closed,
        }
    }

    /// Frees the client of a connection that may still be under way, so that it does not come up
    /// after all. On a thread that may block, as in [`Paho::client`].
    async fn give_up(&mut self) {
        let Some(mut live) = self.live.take() else { return };
        // Not tokio's: this may take as long as the connection, and the end of the process does
        // not wait for it.
        let (tell, freed) = oneshot::channel();
        std::thread::spawn(move || {
            // Paho ends a connect with its lock held and lets go of the client there. If it were
            // the last to do so, it would free the client, wait for its own lock, and stop for good.
            if let Some(connecting) = live.connecting.take() {
                let _ = connecting.wait();
                // Takes the lock, so what held it is over.
                let _ = live.client.is_connected();
            }
            drop(live);
            let _ = tell.send(());
        });
        if !matches!(timeout(GOODBYE_LIMIT, freed).await, Ok(Ok(()))) {
            debug!("a connection is still being freed");
        }
    }
}

impl Drop for Paho {
    /// The last client stays to the end of the process, if its connection is over: nobody has to
    /// wait for the end of Paho's threads.
    fn drop(&mut self) {
        if let Some(live) = self.live.take().filter(|live| live.over.is_cancelled()) {
            std::mem::forget(live);
        }
    }
}

fn return_code(code: mqtt::ConnectReturnCode) -> u8 {
    match code {
        mqtt::ConnectReturnCode::Accepted => 0,
        mqtt::ConnectReturnCode::UnacceptableProtocolVersion => 1,
        mqtt::ConnectReturnCode::IdentifierRejected => 2,
        mqtt::ConnectReturnCode::ServerUnavailable => 3,
        mqtt::ConnectReturnCode::BadUserNameOrPassword => 4,
        mqtt::ConnectReturnCode::NotAuthorized => 5,
    }
}

impl Transport for Paho {
    async fn connect(&mut self, login: &Login) -> Result<(), ConnectError> {
        let target = self.target(login);
        let setup = |error: mqtt::Error| ConnectError::Setup(error.to_string());
        let options = self.options(login, &target).map_err(setup)?;
        let client = match self.client(login, &target).await {
            Ok(client) => client,
            Err(error @ mqtt::Error::Timeout) => return Err(self.explain(error, &target).await),
            Err(error) => return Err(setup(error)),
        };
        let (sender, incoming) = mpsc::unbounded_channel();
        client.set_message_callback(move |_, message| {
            // Nobody listens any more: so be it.
            let _ = message.map(|message| sender.send(message));
        });
        let over = CancellationToken::new();
        let lost = over.clone();
        client.set_connection_lost_callback(move |_| lost.cancel());
        let connecting = Some(client.connect(options));
        let live = self.live.insert(Live { client, incoming, last_sent: None, connecting, over });
        // Paho keeps the limit itself; this is for what it does not count, name resolution.
        let limit = target.limit.saturating_add(GOODBYE_LIMIT);
        // Polled in its place: it must be there for whoever gives up.
        let connected = std::future::poll_fn(|cx| match &mut live.connecting {
            Some(connecting) => Pin::new(connecting).poll(cx),
            None => Poll::Pending,
        });
        let result = timeout(limit, connected).await;
        if result.is_ok() {
            live.connecting = None;
        }
        let error = match result {
            Ok(Ok(_)) => {
                self.trouble = None;
                return Ok(());
            }
            Ok(Err(error)) => {
                live.over.cancel();
                error
            }
            Err(_) => {
                self.give_up().await;
                mqtt::Error::Timeout
            }
        };
        debug!(%error, "connect failed");
        Err(self.explain(error, &target).await)
    }

    async fn subscribe(&mut self, filters: &[&str]) -> Result<(), ConnectionError> {
        let live = self.live.as_ref().ok_or(ConnectionError::Lost)?;
        let token = live.client.subscribe_many_same_qos(filters, mqtt::QOS_0);
        let granted = live.answer(token).await?.subscribe_many_response().unwrap_or_default();
        let refused = filters.iter().zip(granted).find(|(_, qos)| *qos >= NOT_GRANTED);
        match refused {
            Some((filter, _)) => Err(ConnectionError::NotGranted { filter: (*filter).to_owned() }),
            None => Ok(()),
        }
    }

    async fn unsubscribe(&mut self, filter: &str) -> Result<(), ConnectionError> {
        let live = self.live.as_ref().ok_or(ConnectionError::Lost)?;
        live.answer(live.client.unsubscribe(filter)).await.map(drop)
    }

    fn publish(&mut self, topic: &str, payload: Vec<u8>) -> Result<(), ConnectionError> {
        let live = self.live.as_mut().ok_or(ConnectionError::Lost)?;
        let message = mqtt::Message::new(topic, payload, mqtt::QOS_0);
        let token = live.client.try_publish(message).map_err(|_| ConnectionError::Lost)?;
        live.last_sent = Some(token);
        Ok(())
    }

    async fn receive(&mut self) -> Option<Message> {
        let live = self.live.as_mut()?;
        // Cancel-safe: both. What came before the end comes out before it.
        let message = tokio::select! {
            biased;
            message = live.incoming.recv() => message?,
            () = live.over.cancelled() => return None,
        };
        Some(Message { topic: message.topic().to_owned(), payload: message.payload().to_vec() })
    }

    async fn disconnect(&mut self) {
        let Some(live) = self.live.as_mut().filter(|live| !live.over.is_cancelled()) else {
            return;
        };
        let goodbye = async {
            if let Some(sent) = live.last_sent.take() {
                // DISCONNECT overtakes a message that is only half written.
                let _ = sent.await;
            }
            live.client.disconnect(None).await
        };
        if let Ok(Ok(_)) = timeout(GOODBYE_LIMIT, goodbye).await {
            live.over.cancel();
        } else {
            debug!("the connection did not close in time");
            self.give_up().await;
        }
    }
}
