//! An MQTT connection, as the session needs it. One level below the session on purpose: renewal,
//! resubscription and resending are decided above, where they can be tested.

use std::future::Future;
use std::sync::Arc;

use super::credential::Login;

/// A message from the hub.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Message {
    /// Its topic.
    pub topic: String,
    /// Its body.
    pub payload: Vec<u8>,
}

/// One MQTT 3.1.1 connection at a time, with a session kept by the hub (clean session 0).
pub trait Transport: Send {
    /// Connects anew. Whatever was there before is given up, with its messages.
    ///
    /// # Errors
    /// There is no connection then.
    fn connect(&mut self, login: &Login) -> impl Future<Output = Result<(), ConnectError>> + Send;

    /// Subscribes to all of `filters` and waits until the hub has granted them.
    ///
    /// # Errors
    /// Some or all of them may be in force.
    fn subscribe(
        &mut self,
        filters: &[&str],
    ) -> impl Future<Output = Result<(), ConnectionError>> + Send;

    /// Takes back `filter` and waits until the hub has confirmed: every message that the hub sent
    /// under it has then arrived.
    ///
    /// # Errors
    /// It may still be in force.
    fn unsubscribe(
        &mut self,
        filter: &str,
    ) -> impl Future<Output = Result<(), ConnectionError>> + Send;

    /// Hands a message over for sending, in order, at QoS 0. Does not wait.
    ///
    /// # Errors
    /// The message will not be sent: there is no connection any more.
    fn publish(&mut self, topic: &str, payload: Vec<u8>) -> Result<(), ConnectionError>;

    /// The next message; none is ever dropped. `None`, again and again, when the connection is
    /// lost. Losing the future loses no message.
    fn receive(&mut self) -> impl Future<Output = Option<Message>> + Send;

    /// Sends what was handed over, then says DISCONNECT and closes.
    fn disconnect(&mut self) -> impl Future<Output = ()> + Send;
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The hub answered with a CONNACK code other than 0 (MQTT 3.1.1 section 3.2.2.3).
    #[error("the hub refused with MQTT code {code} ({})", connack(*code))]
    Refused {
        /// The code.
        code: u8,
    },
    /// The hub was reached over TLS, but ended the connection without a CONNACK.
    #[error("the hub closed the connection without an answer")]
    Closed,
    /// The hub was reached over TLS, but did not answer in time.
    #[error("the hub did not answer in time")]
    Silent,
    /// The hub was not reached.
    #[error("the hub cannot be reached")]
    Unreachable(#[source] Arc<super::diagnose::Cause>),
    /// The connection could not even be tried.
    #[error("cannot set up a connection: {0}")]
    Setup(String),
}

impl ConnectError {
    /// Whether the same credential will be refused again.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, ConnectError::Refused { code } if *code != SERVER_UNAVAILABLE)
    }
}

impl ConnectError {
    /// Whether the hub was not there to judge this device: not reached, or overloaded or down.
    #[must_use]
    pub fn is_out_of_reach(&self) -> bool {
        match self {
            ConnectError::Refused { code } => *code == SERVER_UNAVAILABLE,
            ConnectError::Silent => true,
            ConnectError::Unreachable(cause) => cause.lies_on_the_way(),
            ConnectError::Closed | ConnectError::Setup(_) => false,
        }
    }
}

/// CONNACK code of a hub that is overloaded or down.
const SERVER_UNAVAILABLE: u8 = 3;

fn connack(code: u8) -> &'static str {
    match code {
        1 => "wrong protocol version",
        2 => "client id rejected",
        SERVER_UNAVAILABLE => "unavailable",
        4 => "bad user name or token",
        5 => "not authorized",
        _ => "unknown",
    }
}

/// Why a live connection did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// It is gone.
    #[error("the connection is gone")]
    Lost,
    /// The hub did not grant a subscription.
    #[error("the hub refused the subscription to {filter}")]
    NotGranted {
        /// The filter.
        filter: String,
    },
}
