//! Shared access signatures: made, taken apart and checked. No I/O, no clock.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use openssl::hash::MessageDigest;
use openssl::pkey::PKey;
use openssl::sign::Signer;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

const PREFIX: &str = "SharedAccessSignature ";
/// What `encodeURIComponent` leaves alone, as Microsoft's SDKs do.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'!')
    .remove(b'~')
    .remove(b'*')
    .remove(b'\'')
    .remove(b'(')
    .remove(b')');

/// Why a token is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SasError {
    /// The text does not start with the scheme's name and one space.
    #[error("token does not start with `SharedAccessSignature `")]
    Scheme,
    /// A field is absent.
    #[error("token has no field `{0}`")]
    Missing(&'static str),
    /// A field cannot be read.
    #[error("token field `{0}` cannot be read")]
    Malformed(&'static str),
    /// A key is not base64.
    #[error("shared access key is not base64")]
    Key,
}

/// A token taken apart. Nothing is verified yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// `sr` exactly as written: this text is what is signed.
    raw_resource: String,
    resource: String,
    signature: Vec<u8>,
    /// `se` exactly as written.
    raw_expiry: String,
    expiry: i128,
    policy: Option<String>,
}

impl Token {
    /// Takes a token apart. Fields may come in any order, their names in any case.
    ///
    /// # Errors
    /// The text is not a token.
    pub fn parse(text: &str) -> Result<Self, SasError> {
        let fields = text.strip_prefix(PREFIX).ok_or(SasError::Scheme)?;
        let field = |wanted: &str| {
            fields
                .split('&')
                .filter_map(|field| field.split_once('='))
                .find(|(name, _)| name.trim().eq_ignore_ascii_case(wanted))
                .map(|(_, value)| value)
        };
        let raw_resource = field("sr").ok_or(SasError::Missing("sr"))?;
        let signature = decoded(field("sig").ok_or(SasError::Missing("sig"))?, "sig")?;
        let raw_expiry = field("se").ok_or(SasError::Missing("se"))?;
        // Node's job client writes milliseconds here: far more than 32 bits.
        let expiry = raw_expiry.parse().map_err(|_| SasError::Malformed("se"))?;
        let policy = field("skn").map(|name| decoded(name, "skn")).transpose()?;
        Ok(Self {
            raw_resource: raw_resource.to_owned(),
            resource: decoded(raw_resource, "sr")?,
            signature: STANDARD.decode(signature).map_err(|_| SasError::Malformed("sig"))?,
            raw_expiry: raw_expiry.to_owned(),
            expiry,
            policy: policy.filter(|name| !name.is_empty()),
        })
    }

    /// Last second of validity, since 1970.
    pub fn expiry(&self) -> i64 {
        i64::try_from(self.expiry).unwrap_or(i64::MAX)
    }

    /// The policy that signs; `None` for an identity's own key.
    pub fn policy(&self) -> Option<&str> {
        self.policy.as_deref()
    }

    /// Whether this key (base64) made the signature. Constant time in the signature.
    pub fn signed_by(&self, key: &str) -> bool {
        sign(key, &self.raw_resource, &self.raw_expiry).is_ok_and(|expected| {
            expected.len() == self.signature.len()
                && openssl::memcmp::eq(&expected, &self.signature)
        })
    }

    /// Whether the token's scope is `resource` or a parent of it at a path boundary. The host part
    /// is compared without regard to case.
    pub fn covers(&self, resource: &str) -> bool {
        let scope = trimmed(&self.resource);
        let mut wanted = resource.split('/');
        let mut parts = scope.split('/');
        let same_host = match (parts.next(), wanted.next()) {
            (Some(scope_host), Some(host)) => scope_host.eq_ignore_ascii_case(host),
            _ => false,
        };
        same_host && parts.all(|part| wanted.next() == Some(part))
    }
}

/// Old SDKs append the api-version to the resource.
fn trimmed(resource: &str) -> &str {
    let cut = resource.find("/api-version=").or_else(|| resource.find("/?api-version="));
    cut.and_then(|at| resource.get(..at)).unwrap_or(resource).trim_end_matches('/')
}

fn decoded(text: &str, field: &'static str) -> Result<String, SasError> {
    let text = percent_decode_str(text).decode_utf8().map_err(|_| SasError::Malformed(field))?;
    Ok(text.into_owned())
}

/// HMAC-SHA256 over the resource as written, a line feed and the expiry as written.
fn sign(key: &str, raw_resource: &str, raw_expiry: &str) -> Result<Vec<u8>, SasError> {
    let key = STANDARD.decode(key).map_err(|_| SasError::Key)?;
    let key = PKey::hmac(&key).map_err(|_| SasError::Key)?;
    let mut signer = Signer::new(MessageDigest::sha256(), &key).map_err(|_| SasError::Key)?;
    signer
        .sign_oneshot_to_vec(format!("{raw_resource}\n{raw_expiry}").as_bytes())
        .map_err(|_| SasError::Key)
}

/// Makes a token for a resource (not yet encoded), valid to `expiry` (seconds since 1970), signed
/// with a base64 key, of a policy if one is named.
///
/// # Errors
/// The key is not base64.
pub fn token(
    resource: &str,
    key: &str,
    expiry: i64,
    policy: Option<&str>,
) -> Result<String, SasError> {
    let resource = utf8_percent_encode(resource, ENCODED).to_string();
    let signature = STANDARD.encode(sign(key, &resource, &expiry.to_string())?);
    let signature = utf8_percent_encode(&signature, ENCODED);
    let policy = policy.map(|name| format!("&skn={name}")).unwrap_or_default();
    Ok(format!("{PREFIX}sr={resource}&sig={signature}&se={expiry}{policy}"))
}
