//! Arithmetic of twin documents: merge, difference, and the hub's limits. Pure.

use serde_json::{Map, Value};

/// Longest string value, in bytes of UTF-8 (Microsoft, "Understand and use device twins").
pub const MAX_STRING_BYTES: usize = 4096;
/// Deepest nesting below the section's root; arrays count as a level.
pub const MAX_DEPTH: usize = 10;
/// Longest key, in bytes of UTF-8.
pub const MAX_KEY_BYTES: usize = 1024;
/// Largest reported section. The hub counts keys and values only; this counts the JSON text,
/// as IoT Edge does, which is never less.
pub const MAX_SECTION_BYTES: usize = 32 * 1024;
/// Whole numbers lie from minus this to one less than this.
const INTEGER_LIMIT: i64 = 1 << 52;
/// String lengths that are tried, one after the other, until a document fits.
const SHORTER_STRINGS_BYTES: [usize; 4] = [MAX_STRING_BYTES, 1024, 256, 64];

/// Merges `patch` into `target`: null deletes, objects merge, all else replaces; arrays are
/// replaced whole. `$version`, `$metadata` and other `$` keys are left out.
pub fn merge(target: &mut Map<String, Value>, patch: &Map<String, Value>) {
    for (key, value) in patch.iter().filter(|(key, _)| !key.starts_with('$')) {
        match value {
            Value::Null => {
                target.remove(key);
            }
            Value::Object(inner) => {
                let entry = target.entry(key.clone()).or_insert(Value::Null);
                if !entry.is_object() {
                    *entry = Value::Object(Map::new());
                }
                if let Value::Object(entry) = entry {
                    merge(entry, inner);
                }
            }
            other => {
                target.insert(key.clone(), other.clone());
            }
        }
    }
}

/// The patch that turns `current` into `target`, as far as the top-level members named in
/// `target` go; all others are foreign and left alone. A null in `target` means absent.
#[must_use]
pub fn difference(target: &Map<String, Value>, current: &Map<String, Value>) -> Map<String, Value> {
    let mut patch = Map::new();
    for (key, wanted) in target.iter().filter(|(key, _)| !key.starts_with('$')) {
        if let Some(change) = change(wanted, current.get(key)) {
            patch.insert(key.clone(), change);
        }
    }
    patch
}

/// What must be sent for one member, if anything.
fn change(wanted: &Value, found: Option<&Value>) -> Option<Value> {
    match (wanted, found) {
        (Value::Null, None) => None,
        (Value::Null, Some(_)) => Some(Value::Null),
        (Value::Object(wanted), Some(Value::Object(found))) => {
            let mut patch = difference(wanted, found);
            for key in found.keys().filter(|key| !key.starts_with('$')) {
                if !wanted.contains_key(key) {
                    patch.insert(key.clone(), Value::Null);
                }
            }
            (!patch.is_empty()).then_some(Value::Object(patch))
        }
        (Value::Object(wanted), _) => Some(Value::Object(difference(wanted, &Map::new()))),
        (wanted, Some(found)) if wanted == found => None,
        (wanted, _) => Some(wanted.clone()),
    }
}

/// `document` within the hub's limits, so that one bad value cannot have the whole report
/// refused: long strings are cut at a character and end in "…", members with keys or depths that
/// the hub forbids are left out, nulls in arrays too, and whole numbers out of range become
/// floating point. If the document is larger than a section may be, its strings are cut shorter.
#[must_use]
pub fn fit(document: &Map<String, Value>) -> Map<String, Value> {
    let mut fitted = Map::new();
    for longest in SHORTER_STRINGS_BYTES {
        fitted = fit_object(document, 1, longest);
        if section_bytes(&fitted) <= MAX_SECTION_BYTES {
            break;
        }
    }
    fitted
}

/// Length of the JSON text.
fn section_bytes(document: &Map<String, Value>) -> usize {
    serde_json::to_vec(document).map_or(usize::MAX, |text| text.len())
}

/// The members of an object whose members stand at `depth`.
fn fit_object(object: &Map<String, Value>, depth: usize, longest: usize) -> Map<String, Value> {
    object
        .iter()
        .filter(|(key, _)| is_key(key))
        .filter_map(|(key, value)| Some((key.clone(), fit_value(value, depth, longest)?)))
        .collect()
}

/// `None` if the value cannot stand at `depth` at all.
fn fit_value(value: &Value, depth: usize, longest: usize) -> Option<Value> {
    match value {
        Value::String(text) => Some(Value::String(shorten(text, longest))),
        Value::Number(number) => match number.as_i64() {
            Some(whole) if (-INTEGER_LIMIT..INTEGER_LIMIT).contains(&whole) => Some(value.clone()),
            _ => number.as_f64().map(Value::from),
        },
        Value::Object(_) | Value::Array(_) if depth > MAX_DEPTH => None,
        Value::Object(inner) => Some(Value::Object(fit_object(inner, depth + 1, longest))),
        Value::Array(items) => Some(Value::Array(
            items
                .iter()
                .filter(|item| !item.is_null())
                .filter_map(|item| fit_value(&without_nulls(item), depth + 1, longest))
                .collect(),
        )),
        Value::Null | Value::Bool(_) => Some(value.clone()),
    }
}

/// Objects in arrays may not hold nulls: there they delete nothing.
fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(inner) => inner
            .iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(key, value)| (key.clone(), without_nulls(value)))
            .collect(),
        other => other.clone(),
    }
}

/// Whether the hub takes `key`: no control character, white space, `.`, `$` or `#`.
fn is_key(key: &str) -> bool {
    let forbidden = |c: char| c.is_control() || c.is_whitespace() || matches!(c, '.' | '$' | '#');
    (1..=MAX_KEY_BYTES).contains(&key.len()) && !key.contains(forbidden)
}

/// At most `longest` bytes of `text`, with a mark at the end if something is missing.
fn shorten(text: &str, longest: usize) -> String {
    const MARK: &str = "…";
    if text.len() <= longest {
        return text.to_owned();
    }
    let room = longest.saturating_sub(MARK.len());
    let mut cut = String::with_capacity(longest);
    cut.extend(text.chars().scan(0, |used, c| {
        *used += c.len_utf8();
        (*used <= room).then_some(c)
    }));
    cut + MARK
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        match value {
            Value::Object(object) => object,
            other => panic!("{other} is no object"),
        }
    }

    #[test]
    fn merges_as_the_hub_does() {
        for (target, patch, merged) in [
            (json!({}), json!({"a": 1}), json!({"a": 1})),
            (json!({"a": 1, "b": 2}), json!({"a": null}), json!({"b": 2})),
            (json!({"a": 1}), json!({"b": null}), json!({"a": 1})),
            (json!({"a": {"b": 1, "c": 2}}), json!({"a": {"b": null}}), json!({"a": {"c": 2}})),
            (json!({}), json!({"a": {"b": null}}), json!({"a": {}})),
            (json!({"a": 1}), json!({"a": {"b": 2}}), json!({"a": {"b": 2}})),
            (json!({"a": {"b": 2}}), json!({"a": 1}), json!({"a": 1})),
            (json!({"a": [1, 2, 3]}), json!({"a": [4]}), json!({"a": [4]})),
            (json!({"a": 1}), json!({"$version": 5, "a": 2}), json!({"a": 2})),
        ] {
            let mut result = object(target);
            merge(&mut result, &object(patch.clone()));
            assert_eq!(Value::Object(result), merged, "{patch}");
        }
    }

    #[test]
    fn sends_only_what_differs() {
        for (target, current, patch) in [
            (json!({"a": 1}), json!({"a": 1, "$version": 3}), json!({})),
            (json!({"a": 2}), json!({"a": 1}), json!({"a": 2})),
            (json!({"a": {"b": 1}}), json!({"a": {"b": 1, "c": 2}}), json!({"a": {"c": null}})),
            (json!({"a": null}), json!({"a": {"b": 1}}), json!({"a": null})),
            (json!({"a": null}), json!({}), json!({})),
            (json!({"a": {"b": null}}), json!({"a": {"b": 1}}), json!({"a": {"b": null}})),
            (json!({"a": {"b": null}}), json!({"a": {}}), json!({})),
            (json!({"a": {"b": null, "c": 1}}), json!({}), json!({"a": {"c": 1}})),
            (json!({"a": [1, 2]}), json!({"a": [1]}), json!({"a": [1, 2]})),
            // Foreign members and the hub's own are never touched.
            (json!({"a": 1}), json!({"theirs": {"x": 1}, "$metadata": {}}), json!({"a": 1})),
            (json!({"$version": 9, "a": {"$x": 1}}), json!({"a": {}}), json!({})),
        ] {
            let found = difference(&object(target.clone()), &object(current.clone()));
            assert_eq!(Value::Object(found), patch, "{target} over {current}");
        }
    }

    #[test]
    fn cuts_long_strings_at_a_character() {
        let fitted = fit(&object(json!({"long": "ä".repeat(5000), "short": "ä"})));
        let long = fitted["long"].as_str().unwrap();
        assert!(long.len() <= MAX_STRING_BYTES && long.len() > MAX_STRING_BYTES - 8);
        assert!(long.starts_with('ä') && long.ends_with('…'));
        assert_eq!(fitted["short"], "ä");
    }

    #[test]
    fn leaves_out_what_the_hub_forbids() {
        let fitted = fit(&object(json!({
            "a b": 1, "a.b": 1, "$a": 1, "": 1, "a#": 1, "a\u{7}": 1, "ok": [1, null, {"x": null}],
            "big": u64::MAX, "edge": (1_i64 << 52) - 1, "null": null,
        })));
        assert_eq!(
            Value::Object(fitted),
            json!({"ok": [1, {}], "big": 18_446_744_073_709_551_615.0_f64,
                   "edge": (1_i64 << 52) - 1, "null": null})
        );
    }

    #[test]
    fn shortens_every_string_of_a_document_that_is_too_large() {
        let many: Map<String, Value> =
            (0..40).map(|n| (format!("k{n}"), json!("x".repeat(3000)))).collect();
        let fitted = fit(&many);
        assert_eq!(fitted.len(), 40);
        assert!(section_bytes(&fitted) <= MAX_SECTION_BYTES);
    }

    fn depth(value: &Value) -> usize {
        match value {
            Value::Object(inner) => 1 + inner.values().map(depth).max().unwrap_or(0),
            Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
            _ => 0,
        }
    }

    #[test]
    fn stops_at_the_deepest_level() {
        let deep = (0..30).fold(json!("end"), |inner, _| json!({ "k": inner }));
        let fitted = fit(&object(deep));
        // The root is not counted as a level by the hub.
        assert_eq!(depth(&Value::Object(fitted)), MAX_DEPTH + 1);
    }

    fn json_values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "[a-c]{0,2}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                documents_of(inner).prop_map(Value::Object),
            ]
        })
    }

    fn documents_of(
        values: impl Strategy<Value = Value>,
    ) -> impl Strategy<Value = Map<String, Value>> {
        prop::collection::btree_map("[a-d]|[$]version", values, 0..4)
            .prop_map(|members| members.into_iter().collect())
    }

    fn documents() -> impl Strategy<Value = Map<String, Value>> {
        documents_of(json_values())
    }

    /// As the hub would store it: without nulls and `$` keys, at every level of objects.
    fn stored(document: &Map<String, Value>) -> Map<String, Value> {
        let mut stored = Map::new();
        merge(&mut stored, document);
        stored
    }

    proptest! {
        #[test]
        fn the_difference_leads_to_the_target(target in documents(), before in documents()) {
            let before = stored(&before);
            let mut after = before.clone();
            merge(&mut after, &difference(&target, &before));
            let ours = |key: &String| target.contains_key(key) && !key.starts_with('$');
            let mine: Map<_, _> = after.clone().into_iter().filter(|(key, _)| ours(key)).collect();
            prop_assert_eq!(mine, stored(&target));
            let foreign = |map: &Map<String, Value>| -> Map<String, Value> {
                map.clone().into_iter().filter(|(key, _)| !target.contains_key(key)).collect()
            };
            prop_assert_eq!(foreign(&after), foreign(&before));
            prop_assert!(difference(&target, &after).is_empty());
        }

        #[test]
        fn merging_twice_changes_nothing_more(target in documents(), patch in documents()) {
            let mut once = stored(&target);
            merge(&mut once, &patch);
            let mut twice = once.clone();
            merge(&mut twice, &patch);
            prop_assert_eq!(once, twice);
        }

        #[test]
        fn what_fits_stays_as_it_is(document in documents()) {
            let fitted = fit(&document);
            prop_assert_eq!(fit(&fitted), fitted.clone());
        }
    }
}
