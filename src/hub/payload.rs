//! What the cloud says, as values: payloads of direct methods and the desired section `firmware`.
//! No I/O, and nothing gets past this file that could not be carried out.

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::request::{Answer, Command};
use crate::update::{
    Digest, Failure, FailureKind, ImageUrl, Job, JobError, Origin, ParseError, Version, Wanted,
};

/// The rule that a desired URL broke, in the words of the firmware update tutorial.
pub const INSECURE_URI: &str = "Insecure package URI";

const UPDATE: &str = "firmwareUpdate";
const CANCEL: &str = "cancelFirmwareUpdate";
const STATUS: &str = "getFirmwareStatus";
const CONFIRM: &str = "confirmFirmware";
const ROLL_BACK: &str = "rollbackFirmware";
const REBOOT: &str = "reboot";
/// Every direct method there is.
pub const METHODS: [&str; 6] = [UPDATE, CANCEL, STATUS, CONFIRM, ROLL_BACK, REBOOT];

/// The desired section of the update.
const SECTION: &str = "firmware";
const VERSION: &str = "fwVersion";
const CHECK_VALUE: &str = "fwPackageCheckValue";
const SIZE: &str = "fwSize";
/// A payload that is not strict JSON may nest this deep; the lenient parser knows no limit.
const MAX_LENIENT_DEPTH: usize = 16;

/// Which images may be asked for from the cloud.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Rules {
    /// Take `http` URLs too, if the same request carries a digest.
    pub allow_http: bool,
}

/// Reads a call of `method`.
///
/// # Errors
/// The answer that the caller gets instead: 404 for a method that does not exist, 400 with key,
/// value and rule for a payload that cannot be carried out.
pub fn command(method: &str, payload: &[u8], rules: Rules) -> Result<Command, Answer> {
    match method {
        UPDATE => members(payload)
            .and_then(|members| job(&members, &OF_METHOD, rules))
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
            let [key, _] = OF_METHOD.uri;
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

/// What the desired properties ask for, in the agent's terms; `None` if nothing.
#[must_use]
pub fn desired(document: &Map<String, Value>, rules: Rules) -> Option<Wanted> {
    let job = wanted(document, rules)?.map_err(|error| {
        if error.problem.rule == INSECURE_URI {
            Failure::new(FailureKind::InsecureUrl, INSECURE_URI)
        } else {
            Failure::new(FailureKind::InvalidRequest, error.to_string())
        }
    });
    Some(Wanted { fingerprint: fingerprint(document)?, job })
}

/// What the desired properties ask for; `None` if nothing. A section that cannot be carried out
/// is an error whose rule is [`INSECURE_URI`] if the URL is not protected. Empty strings count as
/// absent, as in the tutorial's reports.
#[must_use]
pub fn wanted(document: &Map<String, Value>, rules: Rules) -> Option<Result<Job, JobError>> {
    let members = match document.get(SECTION)? {
        Value::Object(members) => members,
        Value::Null => return None,
        other => return Some(Err(error(SECTION, kind(other), "must be an object"))),
    };
    let members: Map<String, Value> = members
        .iter()
        .filter(|(_, value)| !value.is_null() && value.as_str() != Some(""))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let asks = |key: &str| members.contains_key(key);
    (asks(VERSION) || OF_DESIRED.uri.into_iter().any(asks))
        .then(|| job(&members, &OF_DESIRED, rules))
}

/// SHA-256 over the desired section `firmware`, whatever the order of its members; `None` if
/// there is no such section. Equal digests mean that nobody changed what is wanted.
#[must_use]
pub fn fingerprint(document: &Map<String, Value>) -> Option<Digest> {
    let mut text = String::new();
    write_canonical(document.get(SECTION).filter(|section| !section.is_null())?, &mut text);
    Some(Digest::new(Sha256::digest(text.as_bytes()).into()))
}

/// JSON without spaces and with sorted keys (in the manner of RFC 8785).
fn write_canonical(value: &Value, text: &mut String) {
    match value {
        Value::Object(members) => {
            let mut members: Vec<_> = members.iter().collect();
            members.sort_by_key(|(key, _)| *key);
            text.push('{');
            for (index, (key, value)) in members.into_iter().enumerate() {
                text.push_str(if index == 0 { "" } else { "," });
                text.push_str(&Value::from(key.as_str()).to_string());
                text.push(':');
                write_canonical(value, text);
            }
            text.push('}');
        }
        Value::Array(items) => {
            text.push('[');
            for (index, item) in items.iter().enumerate() {
                text.push_str(if index == 0 { "" } else { "," });
                write_canonical(item, text);
            }
            text.push(']');
        }
        scalar => text.push_str(&scalar.to_string()),
    }
}

/// How one contract writes a job.
struct Dialect {
    /// Stands before the keys in errors.
    prefix: &'static str,
    /// Its spelling of the URL's key, then the other one.
    uri: [&'static str; 2],
    /// What it says of a URL that is not protected, if that is fixed.
    insecure: Option<&'static str>,
}

const OF_METHOD: Dialect =
    Dialect { prefix: "", uri: ["fwPackageUri", "fwPackageURI"], insecure: None };
const OF_DESIRED: Dialect = Dialect {
    prefix: "firmware.",
    uri: ["fwPackageURI", "fwPackageUri"],
    insecure: Some(INSECURE_URI),
};

/// Reads a job. Members that are not known are ignored: callers send more than they need.
fn job(members: &Map<String, Value>, dialect: &Dialect, rules: Rules) -> Result<Job, JobError> {
    let named = |key: &str| format!("{}{key}", dialect.prefix);
    let found = dialect.uri.iter().find_map(|key| Some((*key, members.get(*key)?)));
    let [preferred, _] = dialect.uri;
    let (key, value) =
        found.ok_or_else(|| error(named(preferred), "nothing", "must be an https URL"))?;
    let digest = parsed::<Digest>(members, dialect, CHECK_VALUE)?;
    let url = text(value)
        .and_then(|text| url(text.trim(), digest, dialect, rules))
        .map_err(|problem| JobError { key: named(key), problem })?;
    Ok(Job {
        url,
        version: parsed::<Version>(members, dialect, VERSION)?,
        digest,
        size_bytes: size(members, dialect)?,
    })
}

fn url(
    text: &str,
    digest: Option<Digest>,
    dialect: &Dialect,
    rules: Rules,
) -> Result<ImageUrl, ParseError> {
    let is_https = text.get(..6).is_some_and(|scheme| scheme.eq_ignore_ascii_case("https:"));
    let insecure = |value: String, rule: &str| ParseError {
        value,
        rule: dialect.insecure.unwrap_or(rule).to_owned(),
    };
    let url: ImageUrl = match text.parse::<ImageUrl>() {
        Err(problem) if !is_https => return Err(insecure(problem.value, &problem.rule)),
        parsed => parsed?,
    };
    match (url.with_secrets().scheme(), rules.allow_http, digest) {
        ("https", _, _) | ("http", true, Some(_)) => Ok(url),
        ("http", true, None) => Err(insecure(
            url.to_string(),
            "must be https, or http with fwPackageCheckValue in the same request",
        )),
        _ => Err(insecure(url.to_string(), "must be https")),
    }
}

/// An optional member that is a string of a certain form.
fn parsed<T: std::str::FromStr<Err = ParseError>>(
    members: &Map<String, Value>,
    dialect: &Dialect,
    key: &str,
) -> Result<Option<T>, JobError> {
    let Some(value) = members.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
    text(value)
        .and_then(|text| text.trim().parse())
        .map(Some)
        .map_err(|problem| JobError { key: format!("{}{key}", dialect.prefix), problem })
}

fn size(members: &Map<String, Value>, dialect: &Dialect) -> Result<Option<u64>, JobError> {
    match members.get(SIZE) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64() {
            Some(bytes) if bytes > 0 => Ok(Some(bytes)),
            _ => {
                let shown = match value {
                    Value::Number(number) => number.to_string(),
                    other => kind(other).to_owned(),
                };
                Err(error(
                    format!("{}{SIZE}", dialect.prefix),
                    shown,
                    "must be a whole number of bytes, 1 or more",
                ))
            }
        },
    }
}

fn text(value: &Value) -> Result<&str, ParseError> {
    value.as_str().ok_or_else(|| ParseError {
        value: kind(value).to_owned(),
        rule: "must be a string".to_owned(),
    })
}

/// What kind of value it is. The value itself is not shown: it may hold a secret in a place
/// where nobody looks for one.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn error(key: impl Into<String>, value: impl Into<String>, rule: &str) -> JobError {
    let problem = ParseError { value: value.into(), rule: rule.to_owned() };
    JobError { key: key.into(), problem }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STRICT: Rules = Rules { allow_http: false };
    const LAX: Rules = Rules { allow_http: true };

    fn install(payload: &str, rules: Rules) -> Result<Job, Answer> {
        command("firmwareUpdate", payload.as_bytes(), rules).map(|command| match command {
            Command::Install(job, Origin::Method) => job,
            other => panic!("{other:?}"),
        })
    }

    fn hex() -> String {
        "ab".repeat(32)
    }

    fn section(section: Value, rules: Rules) -> Option<Result<Job, JobError>> {
        wanted(&Map::from_iter([("firmware".to_owned(), section)]), rules)
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
    fn takes_http_only_by_the_rules() {
        let bare = json!({"fwPackageUri": "http://h/fw"});
        let checked = json!({"fwPackageUri": "http://h/fw", "fwPackageCheckValue": hex()});
        for (payload, rules, taken) in [
            (&bare, STRICT, false),
            (&checked, STRICT, false),
            (&bare, LAX, false),
            (&checked, LAX, true),
        ] {
            assert_eq!(install(&payload.to_string(), rules).is_ok(), taken, "{payload} {rules:?}");
            assert_eq!(
                section(payload.clone(), rules).unwrap().is_ok(),
                taken,
                "{payload} {rules:?}"
            );
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

    #[test]
    fn reads_what_is_desired() {
        let full = json!({
            "fwVersion": "2.8.5", "fwPackageURI": "https://h/fw",
            "fwPackageCheckValue": hex(), "fwSize": 9, "type": "IoTDevKit",
        });
        let job = section(full, STRICT).unwrap().unwrap();
        assert_eq!(job.url.to_string(), "https://h/fw");
        assert_eq!(job.version.unwrap().to_string(), "2.8.5");
        assert_eq!(job.size_bytes, Some(9));
        let other_spelling = json!({"fwVersion": "2", "fwPackageUri": "https://h/fw"});
        assert!(section(other_spelling, STRICT).unwrap().is_ok());
    }

    #[test]
    fn nothing_is_desired_without_url_and_version() {
        assert_eq!(wanted(&Map::new(), STRICT), None);
        for empty in [
            json!(null),
            json!({}),
            json!({"fwVersion": "", "fwPackageURI": "", "fwPackageCheckValue": ""}),
            json!({"fwPackageCheckValue": "abc"}),
        ] {
            assert_eq!(section(empty, STRICT), None);
        }
    }

    #[test]
    fn says_what_is_wrong_with_what_is_desired() {
        for (wrong, key, value, rule) in [
            (json!("2.0"), "firmware", "a string", "must be an object"),
            (json!({"fwVersion": "2"}), "firmware.fwPackageURI", "nothing", "must be an https URL"),
            (
                json!({"fwPackageURI": "http://u:p@h/fw?secret"}),
                "firmware.fwPackageURI",
                "http://h/fw",
                INSECURE_URI,
            ),
            (
                json!({"fwPackageURI": "httpsfoo:bar"}),
                "firmware.fwPackageURI",
                "httpsfoo:bar",
                INSECURE_URI,
            ),
            (
                json!({"fwPackageUri": "file:///fw"}),
                "firmware.fwPackageUri",
                "file:///fw",
                INSECURE_URI,
            ),
            (
                json!({"fwPackageURI": "https://h/fw", "fwPackageCheckValue": 5}),
                "firmware.fwPackageCheckValue",
                "a number",
                "must be a string",
            ),
        ] {
            let error = section(wrong.clone(), STRICT).unwrap().unwrap_err();
            assert_eq!(error.key, key, "{wrong}");
            assert_eq!(error.problem.value, value, "{wrong}");
            assert_eq!(error.problem.rule, rule, "{wrong}");
        }
    }

    #[test]
    fn the_agent_is_told_job_or_failure_and_the_fingerprint() {
        for (members, failure) in [
            (json!({"fwPackageURI": "https://h/fw"}), None),
            (
                json!({"fwPackageURI": "http://h/fw"}),
                Some((FailureKind::InsecureUrl, "Insecure package URI")),
            ),
            (
                json!({"fwVersion": "2"}),
                Some((
                    FailureKind::InvalidRequest,
                    "firmware.fwPackageURI = nothing: must be an https URL",
                )),
            ),
        ] {
            let document = Map::from_iter([("firmware".to_owned(), members)]);
            let wanted = desired(&document, STRICT).unwrap();
            assert_eq!(Some(wanted.fingerprint), fingerprint(&document));
            let expected = failure.map(|(kind, detail)| Failure::new(kind, detail));
            assert_eq!(wanted.job.err(), expected);
        }
        assert_eq!(desired(&Map::new(), STRICT), None);
    }

    #[test]
    fn the_fingerprint_is_that_of_the_section_alone() {
        let print = |text: &str| {
            let document: Value = serde_json::from_str(text).unwrap();
            fingerprint(document.as_object().unwrap())
        };
        let first = print(r#"{"firmware":{"a":{"x":1,"y":[1,2]},"b":"2"},"other":1}"#);
        assert_eq!(first, print(r#"{"firmware":{"b":"2","a":{"y":[1,2],"x":1}},"other":2}"#));
        assert_ne!(first, print(r#"{"firmware":{"b":"3","a":{"y":[1,2],"x":1}}}"#));
        assert_ne!(first, print(r#"{"firmware":{}}"#));
        // `printf %s '{"a":1,"b":[true,null,"x"],"c":{}}' | sha256sum`
        assert_eq!(
            print(r#"{"firmware":{"c":{},"b":[true,null,"x"],"a":1}}"#).unwrap().to_string(),
            "sha256:1f75145025434fcdd2f3aa5bd7a5888e01e7b2a87d9136a37b19259f3919d2bc"
        );
        assert_eq!((print("{}"), print(r#"{"firmware":null}"#)), (None, None));
    }

    proptest! {
        #[test]
        fn never_panics(payload in any::<Vec<u8>>(), text in "[{}\\[\\]a-z:',\"/ \\\\]{0,60}") {
            let _ = command("firmwareUpdate", &payload, STRICT);
            let _ = install(&text, LAX);
        }

        #[test]
        fn all_encodings_mean_the_same(
            path in "[a-zA-Z0-9/_.-]{0,40}",
            version in proptest::option::of("[0-9a-z.]{1,20}"),
            size in proptest::option::of(1_u64..1 << 50),
        ) {
            let mut object = json!({"fwPackageUri": format!("https://h/{path}")});
            version.iter().for_each(|version| object["fwVersion"] = json!(version));
            size.iter().for_each(|size| object["fwSize"] = json!(size));
            let plain = object.to_string();
            let in_string = Value::from(plain.as_str()).to_string();
            let members: Vec<String> = object
                .as_object()
                .unwrap()
                .iter()
                .map(|(key, value)| format!("{key} : {}", value.to_string().replace('"', "'")))
                .collect();
            let lenient = format!("{{ {} }}", members.join(", "));
            let job = install(&plain, STRICT).unwrap();
            prop_assert_eq!(&install(&in_string, STRICT).unwrap(), &job);
            prop_assert_eq!(&install(&lenient, STRICT).unwrap(), &job);
            prop_assert_eq!(&section(object, STRICT).unwrap().unwrap(), &job);
        }
    }
}
