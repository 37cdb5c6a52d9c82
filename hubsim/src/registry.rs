//! The identity registry: devices and modules, their credentials and twins. No I/O.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::clock::NEVER;
use crate::error::HubError;
use crate::identity::Identity;
use crate::twin::Twin;

/// Everything the hub keeps about one device or module.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    generation: u64,
    /// Counts changes of the registry entry; what its ETag is made of.
    changes: u64,
    pub(crate) status: Status,
    status_reason: Option<String>,
    status_updated: String,
    pub(crate) connection_updated: String,
    pub(crate) last_activity: String,
    pub(crate) authentication: Authentication,
    iot_edge: bool,
    scope: Option<String>,
    pub(crate) model_id: String,
    pub(crate) telemetry_count: u64,
    pub(crate) twin: Twin,
}

/// Whether an identity may connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Status {
    Enabled,
    Disabled,
}

/// How an identity proves itself.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Authentication {
    Sas { primary: String, secondary: String },
    SelfSigned { primary: Option<String>, secondary: Option<String> },
    CertificateAuthority,
    None,
}

/// The body of a registry write. Unknown members are let pass: callers send back what they read.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Entry {
    pub(crate) device_id: Option<String>,
    status: Option<Status>,
    status_reason: Option<String>,
    authentication: Option<RawAuthentication>,
    capabilities: Option<RawCapabilities>,
    device_scope: Option<String>,
    pub(crate) import_mode: Option<String>,
    pub(crate) etag: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawAuthentication {
    r#type: Option<String>,
    symmetric_key: Option<RawKeys>,
    x509_thumbprint: Option<RawThumbprints>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawKeys {
    primary_key: Option<String>,
    secondary_key: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawThumbprints {
    primary_thumbprint: Option<String>,
    secondary_thumbprint: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawCapabilities {
    iot_edge: bool,
}

// Keys never reach a log, also not by way of a debug print.
impl std::fmt::Debug for Authentication {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.kind())
    }
}

impl Authentication {
    /// Two fresh keys of 32 random bytes.
    pub(crate) fn fresh() -> Self {
        Self::Sas { primary: fresh_key(), secondary: fresh_key() }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Sas { .. } => "sas",
            Self::SelfSigned { .. } => "selfSigned",
            Self::CertificateAuthority => "certificateAuthority",
            Self::None => "none",
        }
    }

    fn parse(raw: RawAuthentication, present: Option<&Self>) -> Result<Self, HubError> {
        let keys = raw.symmetric_key.unwrap_or_default();
        let prints = raw.x509_thumbprint.unwrap_or_default();
        let has_print =
            prints.primary_thumbprint.is_some() || prints.secondary_thumbprint.is_some();
        let kind = raw.r#type.as_deref().unwrap_or(if has_print { "selfSigned" } else { "sas" });
        match kind {
            "sas" => {
                let (old_primary, old_secondary) = match present {
                    Some(Self::Sas { primary, secondary }) => {
                        (Some(primary.clone()), Some(secondary.clone()))
                    }
                    _ => (None, None),
                };
                let key = |given: Option<String>, old: Option<String>| match given {
                    Some(key) if !key.is_empty() => checked_key(key),
                    _ => Ok(old.unwrap_or_else(fresh_key)),
                };
                Ok(Self::Sas {
                    primary: key(keys.primary_key, old_primary)?,
                    secondary: key(keys.secondary_key, old_secondary)?,
                })
            }
            "selfSigned" => Ok(Self::SelfSigned {
                primary: prints.primary_thumbprint.map(checked_thumbprint).transpose()?,
                secondary: prints.secondary_thumbprint.map(checked_thumbprint).transpose()?,
            }),
            "certificateAuthority" => Ok(Self::CertificateAuthority),
            "none" => Ok(Self::None),
            other => Err(HubError::ArgumentInvalid(format!(
                "authentication.type = {other:?}: must be sas, selfSigned, certificateAuthority or none"
            ))),
        }
    }

    fn json(&self) -> Value {
        let (primary_key, secondary_key) = match self {
            Self::Sas { primary, secondary } => (Some(primary), Some(secondary)),
            _ => (None, None),
        };
        json!({
            "symmetricKey": { "primaryKey": primary_key, "secondaryKey": secondary_key },
            "x509Thumbprint": self.thumbprints_json(),
            "type": self.kind(),
        })
    }

    fn thumbprints_json(&self) -> Value {
        let (primary, secondary) = match self {
            Self::SelfSigned { primary, secondary } => (primary.as_ref(), secondary.as_ref()),
            _ => (None, None),
        };
        json!({ "primaryThumbprint": primary, "secondaryThumbprint": secondary })
    }
}

impl Record {
    /// A new registry entry with a fresh twin.
    pub(crate) fn new(authentication: Authentication, now: &str) -> Self {
        Self {
            generation: fastrand::u64(100_000_000_000_000_000..1_000_000_000_000_000_000),
            changes: fastrand::u64(100_000_000..1_000_000_000),
            status: Status::Enabled,
            status_reason: None,
            status_updated: NEVER.to_owned(),
            connection_updated: NEVER.to_owned(),
            last_activity: NEVER.to_owned(),
            authentication,
            iot_edge: false,
            scope: None,
            model_id: String::new(),
            telemetry_count: 0,
            twin: Twin::new(now),
        }
    }

    /// A new registry entry as a caller described it.
    pub(crate) fn create(entry: Entry, now: &str) -> Result<Self, HubError> {
        let mut record = Self::new(Authentication::fresh(), now);
        record.update(entry, now)?;
        Ok(record)
    }

    /// Changes the registry entry; the twin stays.
    pub(crate) fn update(&mut self, entry: Entry, now: &str) -> Result<(), HubError> {
        if let Some(raw) = entry.authentication {
            self.authentication = Authentication::parse(raw, Some(&self.authentication))?;
        }
        let status = entry.status.unwrap_or(Status::Enabled);
        if status != self.status {
            self.status_updated = now.to_owned();
        }
        self.status = status;
        self.status_reason = entry.status_reason;
        self.iot_edge = entry.capabilities.is_some_and(|capabilities| capabilities.iot_edge);
        self.scope = entry.device_scope;
        self.changes = self.changes.saturating_add(1);
        Ok(())
    }

    /// ETag of the registry entry, without quotes.
    pub(crate) fn etag(&self) -> String {
        STANDARD.encode(self.changes.to_string())
    }

    /// ETag of the twin, without quotes.
    pub(crate) fn twin_etag(&self) -> String {
        STANDARD.encode(self.twin.writes.to_be_bytes())
    }

    /// The registry's view, keys included.
    pub(crate) fn device_json(&self, identity: &Identity, connected: bool) -> Value {
        let mut device = json!({
            "deviceId": identity.device_id(),
            "generationId": self.generation.to_string(),
            "etag": self.etag(),
            "connectionState": connection_state(connected),
            "status": self.status,
            "statusReason": self.status_reason,
            "connectionStateUpdatedTime": self.connection_updated,
            "statusUpdatedTime": self.status_updated,
            "lastActivityTime": self.last_activity,
            "cloudToDeviceMessageCount": 0,
            "authentication": self.authentication.json(),
            "capabilities": { "iotEdge": self.iot_edge },
            "deviceScope": self.scope,
        });
        if let (Some(module), Value::Object(members)) = (identity.module_id(), &mut device) {
            members.insert("moduleId".to_owned(), json!(module));
            members.insert("managedBy".to_owned(), json!(""));
        }
        device
    }

    /// The twin as the service sees it.
    pub(crate) fn twin_json(&self, identity: &Identity, connected: bool) -> Value {
        let mut twin = json!({
            "deviceId": identity.device_id(),
            "etag": self.twin_etag(),
            "deviceEtag": self.etag(),
            "status": self.status,
            "statusUpdateTime": self.status_updated,
            "connectionState": connection_state(connected),
            "lastActivityTime": self.last_activity,
            "cloudToDeviceMessageCount": 0,
            "authenticationType": self.authentication.kind(),
            "x509Thumbprint": self.authentication.thumbprints_json(),
            "modelId": self.model_id,
            "version": self.twin.version,
            "tags": self.twin.tags,
            "properties": self.twin.properties(),
            "capabilities": { "iotEdge": self.iot_edge },
        });
        if let (Some(module), Value::Object(members)) = (identity.module_id(), &mut twin) {
            members.insert("moduleId".to_owned(), json!(module));
        }
        twin
    }
}

fn connection_state(connected: bool) -> &'static str {
    if connected { "Connected" } else { "Disconnected" }
}

/// A key of 32 random bytes, in base64.
pub(crate) fn fresh_key() -> String {
    let mut key = [0_u8; 32];
    if openssl::rand::rand_bytes(&mut key).is_err() {
        // OpenSSL without entropy: a test hub goes on with what the standard library seeds.
        fastrand::fill(&mut key);
    }
    STANDARD.encode(key)
}

fn checked_key(key: String) -> Result<String, HubError> {
    match STANDARD.decode(&key) {
        Ok(bytes) if (16..=64).contains(&bytes.len()) => Ok(key),
        _ => Err(HubError::ArgumentInvalid("a key is base64 of 16 to 64 bytes".to_owned())),
    }
}

/// SHA-1 or SHA-256 in hexadecimal digits; kept in capitals.
pub(crate) fn checked_thumbprint(text: String) -> Result<String, HubError> {
    let digits: String = text.chars().filter(|c| !matches!(c, ':' | ' ')).collect();
    if matches!(digits.len(), 40 | 64) && digits.chars().all(|c| c.is_ascii_hexdigit()) {
        Ok(digits.to_ascii_uppercase())
    } else {
        Err(HubError::ArgumentInvalid(format!(
            "thumbprint {text:?}: must be 40 or 64 hexadecimal digits"
        )))
    }
}
