//! A job, as both contracts write it: where the image is, which version and digest it has.

use serde_json::{Map, Value};

use super::Rules;
use crate::update::{Digest, ImageUrl, Job, JobError, ParseError, Version};

pub(super) const VERSION: &str = "fwVersion";
const CHECK_VALUE: &str = "fwPackageCheckValue";
const SIZE: &str = "fwSize";

/// How one contract writes a job.
pub(super) struct Dialect {
    /// Stands before the keys in errors.
    pub(super) prefix: &'static str,
    /// Its spelling of the URL's key, then the other one.
    pub(super) uri: [&'static str; 2],
    /// What it says of a URL that is not protected, if that is fixed.
    pub(super) insecure: Option<&'static str>,
}

/// Reads a job. Members that are not known are ignored: callers send more than they need.
pub(super) fn job(
    members: &Map<String, Value>,
    dialect: &Dialect,
    rules: Rules,
) -> Result<Job, JobError> {
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
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

pub(super) fn error(key: impl Into<String>, value: impl Into<String>, rule: &str) -> JobError {
    let problem = ParseError { value: value.into(), rule: rule.to_owned() };
    JobError { key: key.into(), problem }
}
