//! A local Azure IoT Hub: device side over MQTT, service side over HTTPS, faithful enough for
//! Microsoft's own SDKs, with handles for tests.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let hub = hubsim::Hub::start(hubsim::Options::default()).await?;
//! let device = hub.add_device("pi-1")?;
//! println!("{device} at {}, trust {}", hub.mqtt_addr(), hub.ca_path().display());
//! # Ok(())
//! # }
//! ```
//!
//! What it imitates, and the sources, stand at each module. Where witnesses of the real hub
//! disagree, [`Options`] has a switch.

mod accept;
mod access;
mod admin;
mod clock;
mod core;
mod device;
mod error;
mod events;
mod faults;
mod https;
mod hub;
mod identity;
mod mqtt;
mod options;
mod persist;
pub mod query;
mod registry;
mod rest;
pub mod sas;
mod service;
mod tls;
mod twin;
mod validate;
mod websocket;

pub use crate::core::ReportedChange;
pub use crate::error::{HubError, StartError};
pub use crate::events::{Event, EventKind, Events, NoSuchEvent, Reason, Transport};
pub use crate::faults::Fault;
pub use crate::hub::{Faults, Hub, Stopped};
pub use crate::identity::{Identity, InvalidId};
pub use crate::options::{Options, UnknownFilter, UnknownTopic};
pub use crate::validate::TwinError;
