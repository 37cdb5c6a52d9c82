//! Who may do what: shared access policies and devices' credentials.

use openssl::hash::MessageDigest;
use openssl::stack::Stack;
use openssl::x509::store::X509StoreBuilder;
use openssl::x509::verify::X509VerifyParam;
use openssl::x509::{X509, X509StoreContext};
use serde::{Deserialize, Serialize};

use crate::core::{Book, Core};
use crate::error::HubError;
use crate::identity::Identity;
use crate::registry::{Authentication, Record, Status, fresh_key};
use crate::sas::Token;

/// Allowance for skewed clocks when a token is shown, in seconds. Source: edgeHub.
const SKEW_S: i64 = 300;

/// What a shared access policy allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Right {
    RegistryRead,
    RegistryWrite,
    ServiceConnect,
    DeviceConnect,
}

/// The hub's shared access policies.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Policies(Vec<Policy>);

#[derive(Clone, Serialize, Deserialize)]
struct Policy {
    name: String,
    primary: String,
    secondary: String,
}

// Keys never reach a log.
impl std::fmt::Debug for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

/// What a client showed in the TLS handshake, if anything: its certificate and those sent with it.
#[derive(Debug, Clone)]
pub(crate) struct ClientCertificate {
    pub(crate) leaf: X509,
    pub(crate) chain: Vec<X509>,
}

/// A device that may connect, and until when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Admission {
    /// Last second of the token, for SAS.
    pub(crate) expires: Option<i64>,
}

impl Policies {
    /// The five policies of a new hub, with fresh keys.
    pub(crate) fn fresh() -> Self {
        let names = ["iothubowner", "service", "device", "registryRead", "registryReadWrite"];
        Self(
            names
                .map(|name| Policy {
                    name: name.to_owned(),
                    primary: fresh_key(),
                    secondary: fresh_key(),
                })
                .into(),
        )
    }

    /// The primary key of a policy.
    pub(crate) fn key(&self, name: &str) -> Option<&str> {
        self.find(name).map(|policy| policy.primary.as_str())
    }

    fn find(&self, name: &str) -> Option<&Policy> {
        self.0.iter().find(|policy| policy.name == name)
    }
}

impl Policy {
    fn allows(&self, right: Right) -> bool {
        match self.name.as_str() {
            "iothubowner" => true,
            "service" => right == Right::ServiceConnect,
            "device" => right == Right::DeviceConnect,
            "registryRead" => right == Right::RegistryRead,
            "registryReadWrite" => matches!(right, Right::RegistryRead | Right::RegistryWrite),
            _ => false,
        }
    }

    fn signed(&self, token: &Token) -> bool {
        token.signed_by(&self.primary) || token.signed_by(&self.secondary)
    }
}

impl Core {
    /// Checks the token of a service call.
    pub(crate) fn authorize(&self, header: Option<&str>, right: Right) -> Result<(), HubError> {
        let refuse = |why: &str| HubError::Unauthorized(why.to_owned());
        let header = header.ok_or_else(|| refuse("no Authorization header"))?;
        let token = Token::parse(header).map_err(|error| refuse(&error.to_string()))?;
        let policy = token.policy().ok_or_else(|| refuse("service tokens name a policy (skn)"))?;
        let policy = self.policies.find(policy).ok_or_else(|| refuse("unknown policy"))?;
        if !policy.signed(&token) {
            return Err(refuse("wrong signature"));
        }
        if !self.in_scope(&token, |name| name.to_owned()) {
            return Err(refuse("token is for another resource"));
        }
        if !policy.allows(right) {
            return Err(refuse("the policy does not allow this"));
        }
        self.in_time(&token).map_err(refuse)
    }

    /// Checks what a device shows at CONNECT.
    pub(crate) fn admit(
        &self,
        book: &Book,
        identity: &Identity,
        password: &str,
        certificate: Option<&ClientCertificate>,
    ) -> Result<Admission, String> {
        let record = book.records.get(identity).ok_or("unknown device")?;
        if record.status == Status::Disabled {
            return Err("the device is disabled".to_owned());
        }
        match (&record.authentication, certificate) {
            (Authentication::SelfSigned { primary, secondary }, Some(shown)) => {
                let known = [primary, secondary];
                let matches =
                    known.into_iter().flatten().any(|print| has_print(&shown.leaf, print));
                if matches {
                    Ok(Admission { expires: None })
                } else {
                    Err("wrong thumbprint".to_owned())
                }
            }
            (Authentication::CertificateAuthority, Some(shown)) => {
                self.check_chain(book, identity, shown)?;
                Ok(Admission { expires: None })
            }
            (Authentication::SelfSigned { .. } | Authentication::CertificateAuthority, None)
                if password.is_empty() =>
            {
                Err("no client certificate".to_owned())
            }
            _ if password.is_empty() => Err("no token".to_owned()),
            _ => self.admit_token(record, identity, password),
        }
    }

    fn admit_token(
        &self,
        record: &Record,
        identity: &Identity,
        password: &str,
    ) -> Result<Admission, String> {
        let token = Token::parse(password).map_err(|error| error.to_string())?;
        let signed = match (token.policy(), &record.authentication) {
            (None, Authentication::Sas { primary, secondary }) => {
                token.signed_by(primary) || token.signed_by(secondary)
            }
            (None, _) => return Err("the identity has no keys".to_owned()),
            (Some(name), _) => {
                let policy = self.policies.find(name).ok_or("unknown policy")?;
                policy.allows(Right::DeviceConnect) && policy.signed(&token)
            }
        };
        if !signed {
            return Err("wrong signature".to_owned());
        }
        if !self.in_scope(&token, |name| identity.resource(name)) {
            return Err("token is for another resource".to_owned());
        }
        self.in_time(&token)?;
        Ok(Admission { expires: Some(token.expiry()) })
    }

    /// Whether the token covers this resource under one of the hub's names.
    fn in_scope(&self, token: &Token, resource: impl Fn(&str) -> String) -> bool {
        let names = self.options.extra_names.iter().map(String::as_str);
        std::iter::once(self.options.hub_name.as_str())
            .chain(["localhost", "127.0.0.1", "::1"])
            .chain(names)
            .any(|name| token.covers(&resource(name)))
    }

    fn in_time(&self, token: &Token) -> Result<(), &'static str> {
        let grace = i64::try_from(self.options.sas_grace.as_secs()).unwrap_or(SKEW_S);
        let allowed = token.expiry().saturating_add(SKEW_S.min(grace));
        if self.clock.unix() > allowed { Err("the token has expired") } else { Ok(()) }
    }

    /// When the hub cuts a connection whose token ends then.
    pub(crate) fn cut_time(&self, expires: i64) -> i64 {
        let grace = i64::try_from(self.options.sas_grace.as_secs()).unwrap_or(i64::MAX);
        expires.saturating_add(grace).saturating_add(1)
    }

    fn check_chain(
        &self,
        book: &Book,
        identity: &Identity,
        shown: &ClientCertificate,
    ) -> Result<(), String> {
        let names = shown.leaf.subject_name();
        let name = names.entries_by_nid(openssl::nid::Nid::COMMONNAME).next();
        let name = name.and_then(|entry| entry.data().to_string().ok());
        if name.as_deref() != Some(identity.device_id()) {
            return Err(format!("the certificate's name is {name:?}, not the device's id"));
        }
        match self.chain_is_good(book, shown) {
            Ok(true) => Ok(()),
            Ok(false) => {
                Err("no registered authority signed the certificate, or it ran out".into())
            }
            Err(error) => Err(format!("the certificate cannot be checked: {error}")),
        }
    }

    fn chain_is_good(
        &self,
        book: &Book,
        shown: &ClientCertificate,
    ) -> Result<bool, openssl::error::ErrorStack> {
        let mut store = X509StoreBuilder::new()?;
        for authority in &book.authorities {
            store.add_cert(authority.clone())?;
        }
        let mut param = X509VerifyParam::new()?;
        param.set_time(self.clock.unix());
        store.set_param(&param)?;
        let mut chain = Stack::new()?;
        for certificate in &shown.chain {
            chain.push(certificate.clone())?;
        }
        let mut context = X509StoreContext::new()?;
        context.init(&store.build(), &shown.leaf, &chain, |context| context.verify_cert())
    }
}

/// Compares in SHA-1 or SHA-256, by the length of the registered thumbprint.
fn has_print(certificate: &X509, registered: &str) -> bool {
    let digest =
        if registered.len() == 40 { MessageDigest::sha1() } else { MessageDigest::sha256() };
    certificate.digest(digest).is_ok_and(|shown| {
        let shown: String = shown.iter().map(|byte| format!("{byte:02X}")).collect();
        shown.eq_ignore_ascii_case(registered)
    })
}
