//! The desired section `firmware`: what it asks for, and whether anybody changed it.

use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use super::Rules;
use super::job::{Dialect, VERSION, error, job, kind};
use crate::update::{Digest, Failure, FailureKind, Job, JobError, Wanted};

/// The rule that a desired URL broke, in the words of the firmware update tutorial.
const INSECURE_URI: &str = "Insecure package URI";

/// The desired section of the update.
const SECTION: &str = "firmware";

const DIALECT: Dialect = Dialect {
    prefix: "firmware.",
    uri: ["fwPackageURI", "fwPackageUri"],
    insecure: Some(INSECURE_URI),
};

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
fn wanted(document: &Map<String, Value>, rules: Rules) -> Option<Result<Job, JobError>> {
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
    (asks(VERSION) || DIALECT.uri.into_iter().any(asks)).then(|| job(&members, &DIALECT, rules))
}

/// SHA-256 over the desired section `firmware`, whatever the order of its members; `None` if
/// there is no such section. Equal digests mean that nobody changed what is wanted.
#[must_use]
pub fn fingerprint(document: &Map<String, Value>) -> Option<Digest> {
    let section = document.get(SECTION).filter(|section| !section.is_null())?;
    // Without spaces and with sorted keys: `serde_json` keeps maps sorted, unless somebody turns
    // its feature `preserve_order` on.
    Some(Digest::new(Sha256::digest(section.to_string()).into()))
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    const STRICT: Rules = Rules { allow_http: false };

    fn hex() -> String {
        "ab".repeat(32)
    }

    pub(in super::super) fn section(section: Value, rules: Rules) -> Option<Result<Job, JobError>> {
        wanted(&Map::from_iter([("firmware".to_owned(), section)]), rules)
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
}
