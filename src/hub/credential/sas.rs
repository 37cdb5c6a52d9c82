//! SAS tokens: made with a key, or ready-made.
//!
//! Rules: Microsoft, "Control access to IoT Hub by using shared access signatures".

use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use hmac::{Hmac, KeyInit, Mac};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use sha2::Sha256;

use super::CredentialError;
use crate::update::WallTime;

/// Everything but the unreserved characters of RFC 3986 section 2.3.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A ready-made SAS token.
#[derive(Debug)]
pub(super) struct Token {
    pub(super) text: SecretString,
    pub(super) expires: WallTime,
}

impl FromStr for Token {
    type Err = CredentialError;

    fn from_str(text: &str) -> Result<Self, CredentialError> {
        let invalid = |rule| CredentialError::invalid("SharedAccessSignature", rule);
        let text = text.trim();
        let fields = text
            .strip_prefix("SharedAccessSignature ")
            .ok_or_else(|| invalid("must begin with \"SharedAccessSignature \""))?;
        if !fields.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(invalid("must be visible ASCII characters"));
        }
        let field = |name: &str| {
            fields.split('&').filter_map(|field| field.split_once('=')).find_map(|(key, value)| {
                key.eq_ignore_ascii_case(name).then(|| percent_decode_str(value))
            })
        };
        if field("sr").is_none() || field("sig").is_none() {
            return Err(invalid("must have the fields sr, sig and se"));
        }
        let expires_s: i64 =
            field("se")
                .and_then(|value| value.decode_utf8().ok()?.parse().ok())
                .ok_or_else(|| invalid("must have a field se with seconds since 1970"))?;
        let expires = WallTime::from_unix_ms(expires_s.saturating_mul(1000));
        Ok(Token { text: SecretString::from(text), expires })
    }
}

/// A token for `resource` that ends at `expires_s` seconds since 1970.
pub(super) fn sign(key: &SecretSlice<u8>, resource: &str, expires_s: i64) -> SecretString {
    let resource = escaped(resource);
    // HMAC takes keys of any length (RFC 2104 section 2); without one the token is refused.
    let signature = Hmac::<Sha256>::new_from_slice(key.expose_secret())
        .map(|mac| mac.chain_update(format!("{resource}\n{expires_s}")).finalize().into_bytes())
        .unwrap_or_default();
    let signature = encoded(&signature);
    SecretString::from(format!(
        "SharedAccessSignature sr={resource}&sig={}&se={expires_s}",
        escaped(&signature)
    ))
}

pub(super) fn encoded(bytes: &[u8]) -> String {
    BASE64.encode(bytes)
}

pub(super) fn escaped(text: &str) -> String {
    utf8_percent_encode(text, ESCAPED).to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Key and signatures of this test were calculated independently.
    const KEY: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";

    fn token(key: &[u8], resource: &str, expires_s: i64) -> String {
        sign(&SecretSlice::from(key.to_vec()), resource, expires_s).expose_secret().to_owned()
    }

    #[test]
    fn signs_as_the_hub_verifies() {
        let key = BASE64.decode(KEY).unwrap();
        let device = token(&key, "contoso.azure-devices.net/devices/pump-01", 1_900_000_000);
        assert_eq!(
            device,
            "SharedAccessSignature sr=contoso.azure-devices.net%2Fdevices%2Fpump-01\
             &sig=VvpxCjNknWB%2FTKyBRuukZyCE16ntj2TS%2FpEGdd4Za9Y%3D&se=1900000000"
        );
        let service = token(&key, "contoso.azure-devices.net", 1_900_000_000);
        assert!(service.contains("sig=0vkyNxg3EC8XGB9SxmWAK%2BHPXI8RFwRgWBjM5FhIF58%3D"));
        let registration = token(&key, "0ne00000000/registrations/pump-01", 1_900_000_000);
        assert!(registration.contains("sig=OLYOWhFykoC63JT2nY3rL2PZXeK13fzsNhbNvpNZPr0%3D"));
    }

    proptest! {
        #[test]
        fn tokens_decode_to_what_was_signed(
            key in prop::collection::vec(any::<u8>(), 1..80),
            device in "[A-Za-z0-9:.+%_#*?!(),=@$'-]{1,128}",
            expires_s in 0_i64..10_000_000_000,
        ) {
            let wanted = format!("h.example/devices/{device}");
            let token = token(&key, &wanted, expires_s);
            let token = token.strip_prefix("SharedAccessSignature ").unwrap();
            let fields: Vec<&str> = token.split('&').collect();
            let [resource, signature, expiry] = fields[..] else { panic!("{token}") };
            let resource = resource.strip_prefix("sr=").unwrap();
            let decoded = percent_decode_str(resource).decode_utf8().unwrap().into_owned();
            prop_assert_eq!(decoded, wanted);
            prop_assert_eq!(expiry, format!("se={expires_s}"));
            let mac = Hmac::<Sha256>::new_from_slice(&key)
                .unwrap()
                .chain_update(format!("{resource}\n{expires_s}"));
            let signature = percent_decode_str(signature.strip_prefix("sig=").unwrap())
                .decode_utf8()
                .unwrap()
                .into_owned();
            prop_assert!(mac.verify_slice(&BASE64.decode(signature).unwrap()).is_ok());
        }

        #[test]
        fn what_is_signed_can_be_read(key in prop::collection::vec(any::<u8>(), 1..80), at_s in 0_i64..10_000_000_000) {
            let token: Token = token(&key, "h.example/devices/d", at_s).parse().unwrap();
            prop_assert_eq!(token.expires.unix_s(), at_s);
        }
    }
}
