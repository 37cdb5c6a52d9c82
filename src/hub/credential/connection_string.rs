//! Connection strings of devices: text in, identity and proof out.

use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use secrecy::SecretSlice;

use super::sas::Token;
use super::{CertificateFiles, Credential, CredentialError, Identity, Proof};

/// What device and module ids may hold beside letters and digits.
const ID_MARKS: &str = "-:.+%_#*?!(),=@;$'";

/// The parts of a connection string.
pub(super) struct ConnectionString {
    identity: Identity,
    key: Option<SecretSlice<u8>>,
    token: Option<Token>,
    x509: bool,
}

impl FromStr for ConnectionString {
    type Err = CredentialError;

    fn from_str(text: &str) -> Result<Self, CredentialError> {
        let invalid = |key: &str, rule: &str| CredentialError::invalid(key, rule);
        let (mut host, mut gateway, mut device, mut module) = (None, None, None, None);
        let (mut key, mut token, mut x509) = (None, None, None);
        for pair in text.trim().split(';').filter(|pair| !pair.trim().is_empty()) {
            let (name, value) = pair.split_once('=').ok_or_else(|| {
                invalid("connection string", "must be key=value pairs with ; between them")
            })?;
            let place = match name.trim().to_ascii_lowercase().as_str() {
                "hostname" => &mut host,
                "gatewayhostname" => &mut gateway,
                "deviceid" => &mut device,
                "moduleid" => &mut module,
                "sharedaccesskey" => &mut key,
                "sharedaccesssignature" => &mut token,
                "x509" => &mut x509,
                "sharedaccesskeyname" => {
                    return Err(invalid(
                        "SharedAccessKeyName",
                        "belongs to services: use the connection string of the device",
                    ));
                }
                _ => return Err(invalid(&shown_name(name), "is not a key that twinboot knows")),
            };
            if place.replace(value).is_some() {
                return Err(invalid(&shown_name(name), "must not be there twice"));
            }
        }
        let identity = Identity {
            hub: host_name("HostName", host.ok_or_else(|| invalid("HostName", "is missing"))?)?,
            gateway: gateway.map(|host| host_name("GatewayHostName", host)).transpose()?,
            device: id("DeviceId", device.ok_or_else(|| invalid("DeviceId", "is missing"))?)?,
            module: module.map(|module| id("ModuleId", module)).transpose()?,
        };
        Ok(ConnectionString {
            identity,
            key: key.map(shared_key).transpose()?,
            token: token.map(str::parse).transpose()?,
            x509: x509.map(truth).transpose()?.unwrap_or(false),
        })
    }
}

impl ConnectionString {
    /// Exactly one proof, or it is not clear what the operator wants.
    pub(super) fn with_files(
        self,
        files: Option<CertificateFiles>,
    ) -> Result<Credential, CredentialError> {
        let invalid = CredentialError::invalid;
        let proof = match (self.key, self.token, self.x509, files) {
            (Some(key), None, false, None) => Proof::Key(key),
            (None, Some(token), false, None) => Proof::Token(token),
            (None, None, _, Some(files)) => Proof::Certificate(files),
            (None, None, true, None) => {
                return Err(invalid(
                    "x509",
                    "needs hub.certificate_file and hub.private_key_file in the configuration",
                ));
            }
            (None, None, false, None) => {
                return Err(invalid(
                    "SharedAccessKey",
                    "is missing: must be there, or SharedAccessSignature, or x509=true",
                ));
            }
            (Some(_), Some(_), _, _) => {
                return Err(invalid("SharedAccessSignature", "excludes SharedAccessKey"));
            }
            (_, _, true, _) => {
                return Err(invalid("x509", "excludes SharedAccessKey and SharedAccessSignature"));
            }
            (_, _, false, Some(_)) => {
                return Err(invalid(
                    "SharedAccessKey, SharedAccessSignature",
                    "excluded by hub.certificate_file in the configuration",
                ));
            }
        };
        Ok(Credential { identity: self.identity, proof })
    }
}

/// A key's name for an error. A slip may have put a secret where the name should be.
fn shown_name(name: &str) -> String {
    let name = name.trim();
    if name.len() <= 24 && name.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        name.to_owned()
    } else {
        format!("a key of {} bytes", name.len())
    }
}

fn host_name(key: &str, text: &str) -> Result<String, CredentialError> {
    let text = text.trim();
    let fits = (1..=253).contains(&text.len());
    if fits && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte)) {
        Ok(text.to_owned())
    } else {
        Err(CredentialError::invalid(key, "must be a host name without scheme and port"))
    }
}

fn id(key: &str, text: &str) -> Result<String, CredentialError> {
    let text = text.trim();
    let fits = (1..=128).contains(&text.len());
    if fits && text.chars().all(|c| c.is_ascii_alphanumeric() || ID_MARKS.contains(c)) {
        Ok(text.to_owned())
    } else {
        Err(CredentialError::invalid(
            key,
            format!("must be 1 to 128 ASCII letters, digits or {ID_MARKS}"),
        ))
    }
}

fn shared_key(text: &str) -> Result<SecretSlice<u8>, CredentialError> {
    match BASE64.decode(text.trim()) {
        Ok(key) if !key.is_empty() => Ok(SecretSlice::from(key)),
        _ => Err(CredentialError::invalid("SharedAccessKey", "must be base64 and not empty")),
    }
}

fn truth(text: &str) -> Result<bool, CredentialError> {
    text.trim()
        .to_ascii_lowercase()
        .parse()
        .map_err(|_| CredentialError::invalid("x509", "must be true or false"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn credential(text: &str) -> Result<Credential, CredentialError> {
        text.parse::<ConnectionString>()?.with_files(None)
    }

    #[test]
    fn names_the_key_and_never_the_secret() {
        for (text, complaint) in [
            ("", "HostName: is missing"),
            ("HostName=h;SharedAccessKey=c2VjcmV0", "DeviceId: is missing"),
            ("HostName=h;DeviceId=d", "SharedAccessKey: is missing"),
            ("HostName=h;DeviceId=d;SharedAccessKey=", "SharedAccessKey: must be base64"),
            ("HostName=h;DeviceId=d;SharedAccessKey=secret", "SharedAccessKey: must be base64"),
            ("HostName=https://h/;DeviceId=d;SharedAccessKey=c2VjcmV0", "HostName: must be a host"),
            ("HostName=h;DeviceId=a b;SharedAccessKey=c2VjcmV0", "DeviceId: must be 1 to 128"),
            ("HostName=h;DeviceId=d/../e;SharedAccessKey=c2VjcmV0", "DeviceId: must be 1 to 128"),
            ("HostName=h;HostName=h;DeviceId=d", "HostName: must not be there twice"),
            ("HostName=h;DeviceId=d;c2VjcmV0secretsecretsecret=1", "a key of 26 bytes: is not"),
            ("HostName=h;DeviceId=d;SharedAccesKey=c2VjcmV0", "SharedAccesKey: is not a key"),
            (
                "HostName=h;SharedAccessKeyName=service;SharedAccessKey=c2VjcmV0",
                "SharedAccessKeyName: belongs to services",
            ),
            ("c2VjcmV0secret", "connection string: must be key=value"),
            ("HostName=h;DeviceId=d;x509=maybe", "x509: must be true or false"),
            ("HostName=h;DeviceId=d;x509=true", "x509: needs hub.certificate_file"),
            ("HostName=h;DeviceId=d;x509=true;SharedAccessKey=c2VjcmV0", "x509: excludes"),
            (
                "HostName=h;DeviceId=d;SharedAccessSignature=secret",
                "SharedAccessSignature: must begin with",
            ),
            (
                "HostName=h;DeviceId=d;SharedAccessSignature=SharedAccessSignature sr=a&sig=secret",
                "SharedAccessSignature: must have a field se",
            ),
        ] {
            let error = credential(text).unwrap_err();
            assert!(error.to_string().starts_with(complaint), "{text}: {error}");
            for shown in [error.to_string(), format!("{error:?}")] {
                assert!(!shown.contains("c2VjcmV0") && !shown.contains("secret"), "{shown}");
            }
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in any::<String>()) {
            let _ = credential(&text);
        }
    }
}
