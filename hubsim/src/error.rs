//! What the service answers when it does not do what was asked.

use std::time::Duration;

use crate::identity::{Identity, InvalidId};
use crate::query::QueryError;
use crate::validate::TwinError;

/// A refusal of the service side. Nothing was changed.
///
/// [`HubError::code`] and [`HubError::name`] are those of "Understand and resolve Azure IoT Hub
/// error codes".
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum HubError {
    /// No such device, or no such module of a device.
    #[error("identity {0} is not registered")]
    NotFound(Identity),
    /// A device or module id that cannot exist.
    #[error("request names an id that cannot exist")]
    InvalidId(#[source] InvalidId),
    /// The device is offline, or online without a subscription to methods.
    #[error("Timed out waiting for device to connect.")]
    NotOnline {
        /// How long was waited.
        waited: Duration,
    },
    /// The device did not answer in time.
    #[error("Timed out waiting for the response from device.")]
    NoAnswer {
        /// How long was waited.
        waited: Duration,
    },
    /// The device answered a method with something that is not JSON.
    #[error("device answered with {status} and a body that is not JSON: {body:?}")]
    InvalidAnswer {
        /// The status the device gave.
        status: i64,
        /// The start of the body.
        body: String,
    },
    /// Something in the request is wrong.
    #[error("{0}")]
    ArgumentInvalid(String),
    /// A twin document breaks a rule.
    #[error("{0}")]
    Twin(#[source] TwinError),
    /// A query cannot be read.
    #[error("{0}")]
    Query(#[source] QueryError),
    /// The given ETag is not the present one.
    #[error("the ETag does not match")]
    PreconditionFailed,
    /// An identity of this name is registered.
    #[error("identity {0} is registered already")]
    AlreadyExists(Identity),
    /// The payload is over the limit.
    #[error("payload has {size} bytes, at most {limit} are allowed")]
    TooLarge {
        /// Bytes of the payload.
        size: usize,
        /// The largest number of bytes.
        limit: usize,
    },
    /// The caller has no valid token.
    #[error("{0}")]
    Unauthorized(String),
    /// An error that a test asked for.
    #[error("injected error {0}")]
    Injected(u16),
}

impl HubError {
    /// Six-digit error code; the first three digits are mostly the HTTP status.
    pub fn code(&self) -> u32 {
        match self {
            Self::NotFound(identity) if identity.module_id().is_some() => 404_010,
            Self::NotFound(_) => 404_001,
            Self::NotOnline { .. } => 404_103,
            Self::NoAnswer { .. } => 504_101,
            Self::InvalidId(_)
            | Self::InvalidAnswer { .. }
            | Self::ArgumentInvalid(_)
            | Self::Twin(_)
            | Self::Query(_) => 400_004,
            Self::PreconditionFailed => 412_001,
            Self::AlreadyExists(_) => 409_001,
            Self::TooLarge { .. } => 413_001,
            Self::Unauthorized(_) => 401_002,
            Self::Injected(429) => 429_001,
            Self::Injected(status) => u32::from(*status).saturating_mul(1000).saturating_add(1),
        }
    }

    /// Name of the error, as in the header `iothub-errorcode`.
    pub fn name(&self) -> &'static str {
        match self.code() {
            404_010 => "ModuleNotFound",
            404_001 => "DeviceNotFound",
            404_103 => "DeviceNotOnline",
            504_101 => "GatewayTimeout",
            400_004 => "ArgumentInvalid",
            412_001 => "PreconditionFailed",
            409_001 => "DeviceAlreadyExists",
            413_001 => "MessageTooLarge",
            401_002 => "IotHubUnauthorizedAccess",
            429_001 => "ThrottlingException",
            _ => "ServerError",
        }
    }

    /// The HTTP status of the answer.
    pub fn http_status(&self) -> u16 {
        u16::try_from(self.code() / 1000).unwrap_or(500)
    }
}

impl From<TwinError> for HubError {
    fn from(error: TwinError) -> Self {
        Self::Twin(error)
    }
}

impl From<InvalidId> for HubError {
    fn from(error: InvalidId) -> Self {
        Self::InvalidId(error)
    }
}

impl From<QueryError> for HubError {
    fn from(error: QueryError) -> Self {
        Self::Query(error)
    }
}

/// Why a hub could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address}; is another hub running, or is the port below 1024?")]
    Listen {
        /// The address asked for.
        address: std::net::SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The admin endpoint must not be reachable from outside.
    #[error("admin address {0} is not a loopback address")]
    AdminNotLoopback(std::net::SocketAddr),
    /// A file of the state folder cannot be read or written.
    #[error("cannot use {}", path.display())]
    File {
        /// The file or folder.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The saved state is not one of this program.
    #[error("{} holds no hub state; move it away to start afresh", path.display())]
    State {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The file of a device authority holds something else.
    #[error("{} is not a certificate in PEM", path.display())]
    DeviceAuthority {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        source: openssl::error::ErrorStack,
    },
    /// Keys or certificates could not be made or read.
    #[error("cannot make the hub's certificates")]
    Certificate(#[source] openssl::error::ErrorStack),
}
