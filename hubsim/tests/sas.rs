//! Tokens: the vectors of the protocol notes, and what a verifier must and must not accept.
#![allow(clippy::unwrap_used, reason = "tests")]

use hubsim::sas::{SasError, Token, token};
use proptest::prelude::*;

const KEY: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";
const OTHER_KEY: &str = "ZmVkY2JhOTg3NjU0MzIxMGZlZGNiYTk4NzY1NDMyMTA=";

/// A signature as it stands in a token.
fn encoded(signature: &str) -> String {
    signature.replace('+', "%2B").replace('/', "%2F").replace('=', "%3D")
}

#[test]
fn vectors_are_signed_by_their_key_and_by_no_other() {
    for (resource, signature) in [
        (
            "contoso.azure-devices.net%2Fdevices%2Fpump-01",
            "VvpxCjNknWB/TKyBRuukZyCE16ntj2TS/pEGdd4Za9Y=",
        ),
        (
            "contoso.azure-devices.net%2fdevices%2fpump-01",
            "uZQYf8scqlj2lnMuLpOakjOQ1aVXyKYOrTbNBUdh6t4=",
        ),
        ("0ne00000000%2Fregistrations%2Fpump-01", "OLYOWhFykoC63JT2nY3rL2PZXeK13fzsNhbNvpNZPr0="),
        ("0ne00000000/registrations/pump-01", "sBz/3vMELetTC7XCwXbMFr/kzVTLcRdzGfjNpkthgUA="),
        ("contoso.azure-devices.net", "0vkyNxg3EC8XGB9SxmWAK+HPXI8RFwRgWBjM5FhIF58="),
    ] {
        let signature = encoded(signature);
        let text = format!("SharedAccessSignature sr={resource}&sig={signature}&se=1900000000");
        let parsed = Token::parse(&text).unwrap();
        assert!(parsed.signed_by(KEY), "{resource}");
        assert!(!parsed.signed_by(OTHER_KEY), "{resource}");
        let later = text.replace("se=1900000000", "se=1900000001");
        assert!(!Token::parse(&later).unwrap().signed_by(KEY), "{resource}");
    }
}

#[test]
fn makes_the_first_vector() {
    assert_eq!(
        token("contoso.azure-devices.net/devices/pump-01", KEY, 1_900_000_000, None).unwrap(),
        "SharedAccessSignature sr=contoso.azure-devices.net%2Fdevices%2Fpump-01\
         &sig=VvpxCjNknWB%2FTKyBRuukZyCE16ntj2TS%2FpEGdd4Za9Y%3D&se=1900000000"
    );
}

#[test]
fn fields_come_in_any_order_and_any_case() {
    let text = "SharedAccessSignature SE=1900000000&skn=\
                &Sig=VvpxCjNknWB%2FTKyBRuukZyCE16ntj2TS%2FpEGdd4Za9Y%3D\
                &SR=contoso.azure-devices.net%2Fdevices%2Fpump-01";
    let token = Token::parse(text).unwrap();
    assert!(token.signed_by(KEY));
    assert_eq!(token.policy(), None, "an empty policy means the same as none");
}

#[test]
fn an_expiry_in_milliseconds_is_read() {
    let text = token("contoso.azure-devices.net", KEY, 1_900_000_000_000, Some("service")).unwrap();
    let token = Token::parse(&text).unwrap();
    assert_eq!(token.expiry(), 1_900_000_000_000);
    assert_eq!(token.policy(), Some("service"));
    let huge = "SharedAccessSignature sr=h&sig=AAAA&se=99999999999999999999999999";
    assert_eq!(Token::parse(huge).unwrap().expiry(), i64::MAX);
}

#[test]
fn refuses_what_is_no_token() {
    for (text, error) in [
        ("", SasError::Scheme),
        ("sharedaccesssignature sr=h&sig=AAAA&se=1", SasError::Scheme),
        ("SharedAccessSignature sig=AAAA&se=1", SasError::Missing("sr")),
        ("SharedAccessSignature sr=h&se=1", SasError::Missing("sig")),
        ("SharedAccessSignature sr=h&sig=AAAA", SasError::Missing("se")),
        ("SharedAccessSignature sr=h&sig=AAAA&se=soon", SasError::Malformed("se")),
        ("SharedAccessSignature sr=h&sig=*&se=1", SasError::Malformed("sig")),
        ("SharedAccessSignature sr=%ff&sig=AAAA&se=1", SasError::Malformed("sr")),
    ] {
        assert_eq!(Token::parse(text), Err(error), "{text}");
    }
}

#[test]
fn a_scope_covers_what_lies_below_it_at_a_path_boundary() {
    for (scope, resource, covered) in [
        ("h.net", "h.net/devices/a", true),
        ("h.net/devices", "h.net/devices/a", true),
        ("h.net/devices/a", "h.net/devices/a", true),
        ("h.net/devices/a/", "h.net/devices/a", true),
        ("h.net/devices/a", "h.net/devices/a/modules/m", true),
        ("H.NET/devices/a", "h.net/devices/a", true),
        ("h.net/devices/a/api-version=2016-11-14", "h.net/devices/a", true),
        ("h.net/devices/a/?api-version=2016-11-14", "h.net/devices/a", true),
        ("h.net/devices/a", "h.net/devices/ab", false),
        ("h.net/devices/ab", "h.net/devices/a", false),
        ("h.net/devices/A", "h.net/devices/a", false),
        ("h.ne", "h.net/devices/a", false),
        ("h.net/devices/a/modules/m", "h.net/devices/a", false),
        ("other.net", "h.net/devices/a", false),
        ("", "h.net/devices/a", false),
    ] {
        let text = token(scope, KEY, 1_900_000_000, None).unwrap();
        let token = Token::parse(&text).unwrap();
        assert_eq!(token.covers(resource), covered, "{scope} over {resource}");
    }
}

proptest! {
    #[test]
    fn whatever_is_made_is_understood(
        resource in "[ -~]{1,60}", expiry in 0_i64.., policy in proptest::option::of("[a-z]{1,12}"),
    ) {
        let text = token(&resource, KEY, expiry, policy.as_deref()).unwrap();
        let parsed = Token::parse(&text).unwrap();
        prop_assert!(parsed.signed_by(KEY));
        prop_assert!(!parsed.signed_by(OTHER_KEY));
        prop_assert_eq!(parsed.expiry(), expiry);
        prop_assert_eq!(parsed.policy(), policy.as_deref());
    }

    #[test]
    fn no_text_breaks_the_parser(text in ".{0,200}") {
        let _ = Token::parse(&text);
        let _ = Token::parse(&format!("SharedAccessSignature {text}"));
    }
}
