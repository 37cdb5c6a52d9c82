//! What a twin document may hold. No I/O: the same rules for devices and for the service.
//!
//! Sources: "Understand and use device twins in IoT Hub", and the validator in Azure IoT Edge's
//! edgeHub (`ReportedPropertiesValidator.cs`), whose numbers are marked as taken over from IoT Hub.

use serde_json::{Map, Value};

/// Largest desired and largest reported section, counted by [`size`].
pub(crate) const MAX_SECTION: usize = 32 * 1024;
/// Largest tags, counted by [`size`].
pub(crate) const MAX_TAGS: usize = 8 * 1024;
const MAX_KEY: usize = 1024;
const MAX_STRING: usize = 4096;
/// Objects and arrays nest this deep below the section's root.
const MAX_DEPTH: usize = 10;
const MIN_INTEGER: i64 = -(1 << 52);
const MAX_INTEGER: i64 = (1 << 52) - 1;

/// A twin document, or a part of one, that the hub does not take. Nothing of it is applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TwinError {
    /// The body is not JSON.
    #[error("body is not JSON")]
    NotJson,
    /// Something that must be an object is none.
    #[error("{0} is not a JSON object")]
    NotObject(String),
    /// A key holds a character that keys may not hold.
    #[error("property name {0:?} holds a control character, white space, '.', '$' or '#'")]
    KeyCharacter(String),
    /// A key is too long, or empty.
    #[error("property name starting with {0:?}: 1 to {MAX_KEY} bytes are allowed")]
    KeyLength(String),
    /// A string is too long.
    #[error("property {0:?}: a string has at most {MAX_STRING} bytes")]
    StringLength(String),
    /// An integer is out of range.
    #[error("property {0:?}: integers lie between {MIN_INTEGER} and {MAX_INTEGER}")]
    IntegerRange(String),
    /// Objects and arrays nest too deep.
    #[error("property {0:?}: at most {MAX_DEPTH} levels are allowed")]
    Depth(String),
    /// A null stands in an array, or in an object in an array.
    #[error("property {0:?}: arrays hold no null")]
    NullInArray(String),
    /// The section would become too large.
    #[error("{section} would have {size} bytes, at most {limit} are allowed")]
    Size {
        /// Which part of the twin.
        section: &'static str,
        /// Its size with the change.
        size: usize,
        /// The largest size.
        limit: usize,
    },
}

/// Checks a patch or a whole section, without its size.
pub(crate) fn check(section: &Map<String, Value>) -> Result<(), TwinError> {
    check_object(section, 0, Nulls::Delete)
}

#[derive(Clone, Copy, PartialEq)]
enum Nulls {
    Delete,
    Forbidden,
}

fn check_object(object: &Map<String, Value>, depth: usize, nulls: Nulls) -> Result<(), TwinError> {
    object.iter().try_for_each(|(key, value)| {
        check_key(key)?;
        check_value(key, value, depth, nulls)
    })
}

/// `depth` is that of the container in which the value stands; the root's is 0.
fn check_value(key: &str, value: &Value, depth: usize, nulls: Nulls) -> Result<(), TwinError> {
    let inner = depth.saturating_add(1);
    if (value.is_object() || value.is_array()) && inner > MAX_DEPTH {
        return Err(TwinError::Depth(key.to_owned()));
    }
    match value {
        Value::Null if nulls == Nulls::Forbidden => Err(TwinError::NullInArray(key.to_owned())),
        Value::Null | Value::Bool(_) => Ok(()),
        Value::Number(number) if number.is_f64() => Ok(()),
        Value::Number(number) => match number.as_i64() {
            Some(MIN_INTEGER..=MAX_INTEGER) => Ok(()),
            _ => Err(TwinError::IntegerRange(key.to_owned())),
        },
        Value::String(text) if text.len() > MAX_STRING => {
            Err(TwinError::StringLength(key.to_owned()))
        }
        Value::String(_) => Ok(()),
        Value::Array(items) => {
            items.iter().try_for_each(|item| check_value(key, item, inner, Nulls::Forbidden))
        }
        Value::Object(object) => check_object(object, inner, nulls),
    }
}

fn check_key(key: &str) -> Result<(), TwinError> {
    if key.is_empty() || key.len() > MAX_KEY {
        return Err(TwinError::KeyLength(key.chars().take(32).collect()));
    }
    let forbidden = |c: char| c.is_control() || c.is_whitespace() || matches!(c, '.' | '$' | '#');
    if key.chars().any(forbidden) {
        return Err(TwinError::KeyCharacter(key.to_owned()));
    }
    Ok(())
}

/// Checks that a section with a change in it still fits.
pub(crate) fn check_size(
    section: &'static str,
    content: &Map<String, Value>,
    limit: usize,
) -> Result<(), TwinError> {
    let size = object_size(content);
    if size <= limit { Ok(()) } else { Err(TwinError::Size { section, size, limit }) }
}

/// The size that counts: keys and strings in UTF-8 without control characters, 8 bytes per number,
/// 4 per boolean; an array is the sum of its items.
fn size(value: &Value) -> usize {
    match value {
        Value::Null => 0,
        Value::Bool(_) => 4,
        Value::Number(_) => 8,
        Value::String(text) => text_size(text),
        Value::Array(items) => items.iter().map(size).sum(),
        Value::Object(object) => object_size(object),
    }
}

fn object_size(object: &Map<String, Value>) -> usize {
    object.iter().map(|(key, value)| text_size(key).saturating_add(size(value))).sum()
}

fn text_size(text: &str) -> usize {
    text.chars().filter(|c| !c.is_control()).map(char::len_utf8).sum()
}
