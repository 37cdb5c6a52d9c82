//! How a hub is set up.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Set-up of a hub. The default listens on free loopback ports and keeps nothing on disk.
#[derive(Debug, Clone)]
pub struct Options {
    /// The hub's host name, as in connection strings and user names. Devices may also call the hub
    /// `localhost` or one of [`Options::extra_names`].
    pub hub_name: String,
    /// Where MQTT over TLS is listened for. IoT Hub's port is 8883.
    pub mqtt: SocketAddr,
    /// Where HTTPS and WebSockets are listened for. IoT Hub's port is 443.
    pub https: SocketAddr,
    /// Where the admin endpoint is served, over plain HTTP; loopback only. None: not at all.
    pub admin: Option<SocketAddr>,
    /// Folder for certificates, identities and twins. None: certificates go to a folder that
    /// vanishes with the hub, the rest stays in memory.
    pub state: Option<PathBuf>,
    /// How long a connection outlives its token. Azure: about 10 minutes. With less than 5
    /// minutes, new connections get no more allowance for skewed clocks than this either.
    pub sas_grace: Duration,
    /// Files of certificates, PEM, whose holders may sign the certificates of devices.
    pub device_authorities: Vec<PathBuf>,
    /// Further names and addresses for the certificate, accepted as the hub's name.
    pub extra_names: Vec<String>,
    /// What a PUBLISH outside the known topics does.
    pub unknown_topic: UnknownTopic,
    /// What a SUBSCRIBE outside the known filters gets.
    pub unknown_filter: UnknownFilter,
    /// Highest QoS at which the hub sends twin and method messages: 0 (as documented) or 1.
    pub push_qos: u8,
    /// Whether a method call that waits for its answer is lost with the connection it went out on.
    pub calls_end_with_connection: bool,
    /// Accepted reported patches that are kept per identity for tests to look at.
    pub history: usize,
}

/// What a PUBLISH outside the known topics does. Witnesses of the real hub disagree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownTopic {
    /// The connection is closed.
    Close,
    /// It counts as telemetry with the property `$PG.Unmatched`.
    Telemetry,
}

/// What a SUBSCRIBE outside the known filters gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownFilter {
    /// The failure code 0x80 in the SUBACK.
    Fail,
    /// A SUBACK as if it were good; nothing ever comes.
    Ignore,
}

/// A hub's default name; it does not exist in Azure's DNS for us, and nothing looks it up.
const DEFAULT_NAME: &str = "twinboot.azure-devices.net";

impl Default for Options {
    fn default() -> Self {
        let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Self {
            hub_name: DEFAULT_NAME.to_owned(),
            mqtt: any_port,
            https: any_port,
            admin: None,
            state: None,
            sas_grace: Duration::from_secs(600),
            device_authorities: Vec::new(),
            extra_names: Vec::new(),
            unknown_topic: UnknownTopic::Close,
            unknown_filter: UnknownFilter::Fail,
            push_qos: 0,
            calls_end_with_connection: false,
            history: 10_000,
        }
    }
}

impl Options {
    /// Whether a client may call the hub by this name.
    pub(crate) fn accepts_name(&self, name: &str) -> bool {
        std::iter::once(self.hub_name.as_str())
            .chain(["localhost", "127.0.0.1", "::1"])
            .chain(self.extra_names.iter().map(String::as_str))
            .any(|known| known.eq_ignore_ascii_case(name))
    }
}
