//! Direct methods: which there are, and the encodings that their callers use.

use serde_json::{Map, Value, json};

use super::Rules;
use super::job::{Dialect, error, job, kind};
use crate::request::{Answer, Command};
use crate::update::{JobError, Origin};

const UPDATE: &str = "firmwareUpdate";
const CANCEL: &str = "cancelFirmwareUpdate";
/// The method that asks and changes nothing.
pub const STATUS: &str = "getFirmwareStatus";
const CONFIRM: &str = "confirmFirmware";
const ROLL_BACK: &str = "rollbackFirmware";
const REBOOT: &str = "reboot";
/// Every direct method there is.
pub const METHODS: [&str; 6] = [UPDATE, CANCEL, STATUS, CONFIRM, ROLL_BACK, REBOOT];

/// A payload that is not strict JSON may nest this deep; the lenient parser knows no limit.
const MAX_LENIENT_DEPTH: usize = 16;

const DIALECT: Dialect =
    Dialect { prefix: "", uri: ["fwPackageUri", "fwPackageURI"], insecure: None };

/// Reads a call of `method`.
///
/// # Errors
/// The answer that the caller gets instead: 404 for a method that does not exist, 400 with key,
/// value and rule for a payload that cannot be carried out.
pub fn command(method: &str, payload: &[u8], rules: Rules) -> Result<Command, Answer> {
    match method {
        UPDATE => members(payload)
            .and_then(|members| job(&members, &DIALECT, rules))
            .map(|job| Command::Install(job, Origin::Method))
            .map_err(|error| refusal(&error)),
        CANCEL => Ok(Command::Cancel),
        STATUS => Ok(Command::Status),
        CONFIRM => Ok(Command::Confirm),
        ROLL_BACK => Ok(Command::RollBack(Origin::Method)),
        REBOOT => Ok(Command::Reboot),
        unknown => Err(unknown_method(unknown)),
    }
}

fn unknown_method(name: &str) -> Answer {
    let shown: String = name.chars().take(128).collect();
    Answer {
        status: 404,
        body: json!({
            "error": "unknownMethod",
            "message": format!("there is no method {shown}: call one of {}", METHODS.join(", ")),
            "methods": METHODS,
        }),
    }
}

fn refusal(error: &JobError) -> Answer {
    Answer {
        status: 400,
        body: json!({
            "error": "invalidPayload",
            "message": error.to_string(),
            "key": error.key,
            "value": error.problem.value,
            "rule": error.problem.rule,
        }),
    }
}

/// The members of a method's payload, in all the encodings that callers were seen to use: an
/// object, a string that holds an object, a string that is the URL, and (the .NET tutorial) an
/// object with unquoted keys and single quotes, by itself or in a string.
fn members(payload: &[u8]) -> Result<Map<String, Value>, JobError> {
    match serde_json::from_slice(payload) {
        Ok(Value::Object(members)) => Ok(members),
        Ok(Value::String(text)) if text.trim_start().starts_with('{') => {
            match serde_json::from_str(&text) {
                Ok(members) => Ok(members),
                Err(_) => lenient(&text),
            }
        }
        Ok(Value::String(text)) => {
            let [key, _] = DIALECT.uri;
            Ok(Map::from_iter([(key.to_owned(), Value::String(text))]))
        }
        Ok(other) => Err(not_an_object(kind(&other))),
        Err(_) if payload.trim_ascii().is_empty() => Err(not_an_object("nothing")),
        Err(_) => match std::str::from_utf8(payload) {
            Ok(text) => lenient(text),
            Err(_) => Err(not_an_object("bytes that are no UTF-8")),
        },
    }
}

/// Reads JSON5 (<https://spec.json5.org>), of which the .NET tutorial's payload is an example.
fn lenient(text: &str) -> Result<Map<String, Value>, JobError> {
    let brackets = text.bytes().filter(|byte| matches!(byte, b'{' | b'[')).count();
    if brackets > MAX_LENIENT_DEPTH || !text.trim_start().starts_with('{') {
        return Err(not_an_object("a text that is no JSON"));
    }
    json5::from_str(text).map_err(|_| not_an_object("a text that is no JSON"))
}

fn not_an_object(found: &str) -> JobError {
    error(
        "payload",
        found,
        "must be an object with fwPackageUri, such as {\"fwPackageUri\":\"https://host/image\"}, \
         or that URL as a string",
    )
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::update::Job;

    const STRICT: Rules = Rules { allow_http: false };
    const LAX: Rules = Rules { allow_http: true };

    pub(in super::super) fn install(payload: &str, rules: Rules) -> Result<Job, Answer> {
        command("firmwareUpdate", payload.as_bytes(), rules).map(|command| match command {
            Command::Install(job, Origin::Method) => job,
            other => panic!("{other:?}"),
        })
    }

    fn hex() -> String {
        "ab".repeat(32)
    }

    #[test]
    fn takes_every_encoding_that_callers_use() {
        for payload in [
            r#"{"fwPackageUri":"https://h/fw.img?sig=1"}"#,
            r#"{"fwPackageURI":"https://h/fw.img?sig=1"}"#,
            r#"{"fwPackageUri":" https://h/fw.img?sig=1 ","timeoutInSeconds":30,"x":{"y":[1]}}"#,
            r#""{\"fwPackageUri\":\"https://h/fw.img?sig=1\"}""#,
            r#""https://h/fw.img?sig=1""#,
            r"{ fwPackageUri : 'https://h/fw.img?sig=1' }",
            r#""{ fwPackageUri : 'https://h/fw.img?sig=1' }""#,
            "\n { fwPackageUri: 'https://h/fw.img?sig=1', }\n",
        ] {
            let job =
                install(payload, STRICT).unwrap_or_else(|error| panic!("{payload}: {error:?}"));
            assert_eq!(job.url.with_secrets().as_str(), "https://h/fw.img?sig=1", "{payload}");
            assert_eq!((job.version, job.digest, job.size_bytes), (None, None, None), "{payload}");
        }
    }

    #[test]
    fn takes_version_digest_and_size() {
        for check_value in [hex(), format!("sha256:{}", hex()), hex().to_uppercase()] {
            let payload = json!({
                "fwPackageUri": "https://h/fw", "fwVersion": "2.8.5",
                "fwPackageCheckValue": check_value, "fwSize": 123,
            });
            let job = install(&payload.to_string(), STRICT).unwrap();
            assert_eq!(job.version.unwrap().to_string(), "2.8.5");
            assert_eq!(job.digest.unwrap().to_string(), format!("sha256:{}", hex()));
            assert_eq!(job.size_bytes, Some(123));
        }
    }

    #[test]
    fn refuses_what_it_cannot_carry_out_and_says_why() {
        let uri = r#""fwPackageUri":"https://h/fw""#;
        for (payload, key, value, rule) in [
            ("", "payload", "nothing", "must be an object with fwPackageUri"),
            ("  ", "payload", "nothing", "must be an object with fwPackageUri"),
            ("null", "payload", "null", "must be an object"),
            ("17", "payload", "a number", "must be an object"),
            ("[]", "payload", "an array", "must be an object"),
            ("{", "payload", "a text that is no JSON", "must be an object"),
            ("https://h/fw", "payload", "a text that is no JSON", "must be an object"),
            ("{}", "fwPackageUri", "nothing", "must be an https URL"),
            (r#"{"fwPackageUri":7}"#, "fwPackageUri", "a number", "must be a string"),
            (r#"{"fwPackageUri":["https://u:secret@h/"]}"#, "fwPackageUri", "an array", "string"),
            (r#"{"fwPackageUri":null}"#, "fwPackageUri", "null", "must be a string"),
            (r#"{"fwPackageUri":""}"#, "fwPackageUri", "a text of 0 bytes", "absolute https URL"),
            (r#""fw.img""#, "fwPackageUri", "a text of 6 bytes", "absolute https URL"),
            (r#""http://u:secret@h/fw?secret""#, "fwPackageUri", "http://h/fw", "must be https"),
            (r#""file:///etc/passwd""#, "fwPackageUri", "file:///etc/passwd", "must be https"),
            (r#""httpsfoo:x""#, "fwPackageUri", "httpsfoo:x", "https URL with a host"),
            (&format!(r#"{{{uri},"fwVersion":2}}"#), "fwVersion", "a number", "must be a string"),
            (&format!(r#"{{{uri},"fwVersion":"a b"}}"#), "fwVersion", "\"a b\"", "visible ASCII"),
            (
                &format!(r#"{{{uri},"fwPackageCheckValue":"123456abcde"}}"#),
                "fwPackageCheckValue",
                "\"123456abcde\"",
                "SHA-256",
            ),
            (&format!(r#"{{{uri},"fwSize":0}}"#), "fwSize", "0", "1 or more"),
            (&format!(r#"{{{uri},"fwSize":-1.5}}"#), "fwSize", "-1.5", "1 or more"),
            (&format!(r#"{{{uri},"fwSize":"9"}}"#), "fwSize", "a string", "1 or more"),
        ] {
            let answer = install(payload, STRICT).expect_err(payload);
            assert_eq!(answer.status, 400, "{payload}");
            assert_eq!(answer.body["error"], "invalidPayload");
            assert_eq!(answer.body["key"], key, "{payload}");
            assert_eq!(answer.body["value"], value, "{payload}");
            assert!(answer.body["rule"].as_str().unwrap().contains(rule), "{payload}: {answer:?}");
            assert!(!answer.body.to_string().contains("secret"), "{payload}: {answer:?}");
        }
    }

    #[test]
    fn nesting_cannot_exhaust_the_stack() {
        for payload in ["[".repeat(100_000), "{a:".repeat(100_000), r#"{"a":"#.repeat(100_000)] {
            assert_eq!(install(&payload, STRICT).unwrap_err().status, 400);
        }
    }

    #[test]
    fn knows_the_other_methods_whatever_their_payload() {
        for (method, expected) in [
            ("cancelFirmwareUpdate", Command::Cancel),
            ("getFirmwareStatus", Command::Status),
            ("confirmFirmware", Command::Confirm),
            ("rollbackFirmware", Command::RollBack(Origin::Method)),
            ("reboot", Command::Reboot),
        ] {
            for payload in ["", "null", "{}", "{", "\"x\""] {
                assert_eq!(command(method, payload.as_bytes(), STRICT), Ok(expected.clone()));
            }
        }
    }

    #[test]
    fn an_unknown_method_gets_a_list_of_the_known_ones() {
        for name in ["factoryReset", "FirmwareUpdate", ""] {
            let answer = command(name, b"{}", STRICT).unwrap_err();
            assert_eq!(answer.status, 404);
            assert_eq!(answer.body["error"], "unknownMethod");
            assert_eq!(answer.body["methods"], json!(METHODS));
        }
    }

    proptest! {
        #[test]
        fn never_panics(payload in any::<Vec<u8>>(), text in "[{}\\[\\]a-z:',\"/ \\\\]{0,60}") {
            let _ = command("firmwareUpdate", &payload, STRICT);
            let _ = install(&text, LAX);
        }
    }
}
