//! The twin of one device or module: tags, desired and reported, with versions and metadata.
//! No I/O, no clock: the time comes in as text.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::validate::{MAX_SECTION, MAX_TAGS, TwinError, check, check_size};

/// Desired or reported: content, metadata of the same shape, and a version that every accepted
/// write raises by one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Section {
    content: Map<String, Value>,
    metadata: Map<String, Value>,
    version: u64,
}

/// A twin as the service keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Twin {
    pub(crate) tags: Map<String, Value>,
    pub(crate) desired: Section,
    pub(crate) reported: Section,
    /// Counts every change.
    pub(crate) version: u64,
    /// Counts the service's writes: what the ETag is made of. Reported changes leave it alone.
    pub(crate) writes: u64,
}

/// How a service write treats what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Write {
    Merge,
    Replace,
}

/// What a device is told: the change, `$version` included.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DesiredChange {
    pub(crate) version: u64,
    pub(crate) patch: Map<String, Value>,
}

/// The parts of a service write. `Some(None)` is a written `null`: the part is emptied.
#[derive(Debug, Default)]
struct Parts {
    tags: Option<Option<Map<String, Value>>>,
    desired: Option<Option<Map<String, Value>>>,
}

impl Section {
    fn new(now: &str) -> Self {
        let metadata = Map::from_iter([("$lastUpdated".to_owned(), json!(now))]);
        Self { content: Map::new(), metadata, version: 1 }
    }

    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// As the device reads it: content and `$version`.
    pub(crate) fn flat(&self) -> Value {
        let mut flat = self.content.clone();
        flat.insert("$version".to_owned(), json!(self.version));
        Value::Object(flat)
    }

    /// As the service reads it: content, `$metadata` and `$version`.
    fn full(&self) -> Value {
        let mut full = self.content.clone();
        full.insert("$metadata".to_owned(), Value::Object(self.metadata.clone()));
        full.insert("$version".to_owned(), json!(self.version));
        Value::Object(full)
    }

    /// Merges; returns whether there was anything to do.
    fn merge(&mut self, patch: &Map<String, Value>, stamp: &Map<String, Value>) -> bool {
        let changed = merge(&mut self.content, &mut self.metadata, patch, stamp);
        restamp(&mut self.metadata, stamp);
        changed
    }
}

impl Twin {
    pub(crate) fn new(now: &str) -> Self {
        let section = Section::new(now);
        Self {
            tags: Map::new(),
            desired: section.clone(),
            reported: section,
            version: 2,
            writes: 1,
        }
    }

    /// The `properties` member of the service's view.
    pub(crate) fn properties(&self) -> Value {
        json!({ "desired": self.desired.full(), "reported": self.reported.full() })
    }

    /// What a device gets for its GET.
    pub(crate) fn device_view(&self) -> Value {
        json!({ "desired": self.desired.flat(), "reported": self.reported.flat() })
    }

    /// Applies a patch from the device; returns the new version of the reported section.
    pub(crate) fn report(&mut self, patch: &[u8], now: &str) -> Result<u64, TwinError> {
        let patch: Value = serde_json::from_slice(patch).map_err(|_| TwinError::NotJson)?;
        let Value::Object(patch) = patch else {
            return Err(TwinError::NotObject("the patch".to_owned()));
        };
        check(&patch)?;
        let mut reported = self.reported.clone();
        reported.merge(&patch, &stamp(now, None));
        check_size("reported", &reported.content, MAX_SECTION)?;
        reported.version = reported.version.saturating_add(1);
        self.reported = reported;
        self.version = self.version.saturating_add(1);
        Ok(self.reported.version)
    }

    /// Applies a write of the service; returns what the device must be told, if anything.
    pub(crate) fn write(
        &mut self,
        body: &Value,
        mode: Write,
        now: &str,
    ) -> Result<Option<DesiredChange>, TwinError> {
        let parts = Parts::parse(body)?;
        let mut twin = self.clone();
        if let Some(tags) = parts.tags {
            twin.write_tags(tags, mode);
            check_size("tags", &twin.tags, MAX_TAGS)?;
        }
        let change = parts.desired.and_then(|desired| twin.write_desired(desired, mode, now));
        check_size("desired", &twin.desired.content, MAX_SECTION)?;
        twin.version = twin.version.saturating_add(1);
        twin.writes = twin.writes.saturating_add(1);
        *self = twin;
        Ok(change)
    }

    fn write_tags(&mut self, tags: Option<Map<String, Value>>, mode: Write) {
        let Some(tags) = tags else {
            self.tags.clear();
            return;
        };
        if mode == Write::Replace {
            self.tags.clear();
        }
        merge(&mut self.tags, &mut Map::new(), &tags, &Map::new());
    }

    fn write_desired(
        &mut self,
        desired: Option<Map<String, Value>>,
        mode: Write,
        now: &str,
    ) -> Option<DesiredChange> {
        let (patch, replaced) = match (desired, mode) {
            // Clears the section, and the device hears of every key as null.
            (None, _) => (differences(&self.desired.content, &Map::new()), true),
            (Some(desired), Write::Replace) => (differences(&self.desired.content, &desired), true),
            (Some(desired), Write::Merge) => (desired, false),
        };
        let version = self.desired.version.saturating_add(1);
        // A patch that deletes only what is not there changes nothing and is not told.
        let changed = self.desired.merge(&patch, &stamp(now, Some(version)));
        if !changed && !replaced {
            return None;
        }
        self.desired.version = version;
        let mut patch = patch;
        patch.insert("$version".to_owned(), json!(version));
        Some(DesiredChange { version, patch })
    }
}

impl Parts {
    /// Takes `tags` and `properties.desired`; everything else in the body is let pass, since callers
    /// send back whole twins.
    fn parse(body: &Value) -> Result<Self, TwinError> {
        let Value::Object(body) = body else {
            return Err(TwinError::NotObject("the body".to_owned()));
        };
        let mut parts = Self { tags: part(body.get("tags"), "tags")?, desired: None };
        match body.get("properties") {
            None | Some(Value::Null) => {}
            Some(Value::Object(properties)) => {
                parts.desired = part(properties.get("desired"), "properties.desired")?;
            }
            Some(_) => return Err(TwinError::NotObject("properties".to_owned())),
        }
        Ok(parts)
    }
}

#[expect(clippy::option_option, reason = "absent, null and an object are three different things")]
fn part(
    value: Option<&Value>,
    name: &'static str,
) -> Result<Option<Option<Map<String, Value>>>, TwinError> {
    match value {
        None => Ok(None),
        Some(Value::Null) => Ok(Some(None)),
        Some(Value::Object(object)) => {
            let mut object = object.clone();
            object.remove("$version");
            object.remove("$metadata");
            check(&object)?;
            Ok(Some(Some(object)))
        }
        Some(_) => Err(TwinError::NotObject(name.to_owned())),
    }
}

fn stamp(now: &str, version: Option<u64>) -> Map<String, Value> {
    let mut stamp = Map::from_iter([("$lastUpdated".to_owned(), json!(now))]);
    if let Some(version) = version {
        stamp.insert("$lastUpdatedVersion".to_owned(), json!(version));
    }
    stamp
}

fn restamp(metadata: &mut Map<String, Value>, stamp: &Map<String, Value>) {
    metadata.extend(stamp.iter().map(|(key, value)| (key.clone(), value.clone())));
}

/// The merge of twins: null deletes, objects merge, everything else replaces. Keeps the metadata in
/// step. Returns whether anything was written or deleted; the same value again counts as written.
fn merge(
    content: &mut Map<String, Value>,
    metadata: &mut Map<String, Value>,
    patch: &Map<String, Value>,
    stamp: &Map<String, Value>,
) -> bool {
    let mut changed = false;
    for (key, value) in patch {
        match value {
            Value::Null => {
                changed |= content.remove(key).is_some();
                metadata.remove(key);
            }
            Value::Object(inner) => {
                let (mut below, new) = match content.remove(key) {
                    Some(Value::Object(below)) => (below, false),
                    _ => (Map::new(), true),
                };
                let mut below_metadata = match metadata.remove(key) {
                    Some(Value::Object(below_metadata)) if !new => below_metadata,
                    _ => Map::new(),
                };
                restamp(&mut below_metadata, stamp);
                changed |= merge(&mut below, &mut below_metadata, inner, stamp) | new;
                content.insert(key.clone(), Value::Object(below));
                metadata.insert(key.clone(), Value::Object(below_metadata));
            }
            _ => {
                content.insert(key.clone(), value.clone());
                metadata.insert(key.clone(), Value::Object(stamp.clone()));
                changed = true;
            }
        }
    }
    changed
}

/// The patch that makes `wanted` out of `present`: `wanted` itself, and null for what vanished.
fn differences(present: &Map<String, Value>, wanted: &Map<String, Value>) -> Map<String, Value> {
    let mut patch = Map::new();
    for (key, value) in present {
        match (value, wanted.get(key)) {
            (_, None) => {
                patch.insert(key.clone(), Value::Null);
            }
            (Value::Object(below), Some(Value::Object(wanted_below))) => {
                patch.insert(key.clone(), Value::Object(differences(below, wanted_below)));
            }
            _ => {}
        }
    }
    for (key, value) in wanted {
        if !patch.contains_key(key) {
            patch.insert(key.clone(), value.clone());
        }
    }
    patch
}
