//! Names of devices and modules.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A device, or a module of one. Text form: `device` or `device/module`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Identity {
    device: String,
    module: Option<String>,
}

/// A device or module id that Azure would not accept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("id {id:?}: 1 to 128 ASCII letters, digits or characters of -:.+%_#*?!(),=@;$'")]
pub struct InvalidId {
    id: String,
}

/// Longest device or module id.
const MAX_ID: usize = 128;

impl Identity {
    /// A device.
    ///
    /// # Errors
    /// The id breaks the rules of the identity registry.
    pub fn device(id: &str) -> Result<Self, InvalidId> {
        Ok(Self { device: checked(id)?, module: None })
    }

    /// A module of a device.
    ///
    /// # Errors
    /// One of the ids breaks the rules of the identity registry.
    pub fn module(device: &str, module: &str) -> Result<Self, InvalidId> {
        Ok(Self { device: checked(device)?, module: Some(checked(module)?) })
    }

    /// The device's id.
    pub fn device_id(&self) -> &str {
        &self.device
    }

    /// The module's id, for a module.
    pub fn module_id(&self) -> Option<&str> {
        self.module.as_deref()
    }

    /// The resource a token of this identity is for, on a hub of this name.
    pub fn resource(&self, hub: &str) -> String {
        match &self.module {
            None => format!("{hub}/devices/{}", self.device),
            Some(module) => format!("{hub}/devices/{}/modules/{module}", self.device),
        }
    }
}

fn checked(id: &str) -> Result<String, InvalidId> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-:.+%_#*?!(),=@;$'".contains(c);
    if (1..=MAX_ID).contains(&id.len()) && id.chars().all(allowed) {
        Ok(id.to_owned())
    } else {
        Err(InvalidId { id: id.to_owned() })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.module {
            None => f.write_str(&self.device),
            Some(module) => write!(f, "{}/{module}", self.device),
        }
    }
}

impl FromStr for Identity {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        match text.split_once('/') {
            None => Self::device(text),
            Some((device, module)) => Self::module(device, module),
        }
    }
}

impl TryFrom<String> for Identity {
    type Error = InvalidId;

    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<Identity> for String {
    fn from(identity: Identity) -> Self {
        identity.to_string()
    }
}
