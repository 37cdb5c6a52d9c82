//! The query language over twins: what is found, what is refused and how that is told.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use hubsim::query::{Condition, Query, Source};
use proptest::prelude::*;
use serde_json::{Value, json};

fn twins() -> [Value; 3] {
    [
        json!({
            "deviceId": "pi-1", "status": "enabled", "connectionState": "Connected",
            "etag": "AAAAAAAAAAE=", "statusReason": null,
            "tags": { "site": "north", "floor": 2, "my key": "x", "café": true },
            "configurations": { "fw-285": { "status": "Applied" } },
            "properties": {
                "desired": { "limit": 30, "$version": 4 },
                "reported": {
                    "limit": 30, "ratio": 0.5, "list": [1, 2],
                    "firmware": { "fwUpdateStatus": "current", "fwVersion": "2.8.5" }
                }
            }
        }),
        json!({
            "deviceId": "pi-2", "status": "disabled", "connectionState": "Disconnected",
            "tags": { "site": "south's", "floor": 10, "path": "a\\b\"c" },
            "properties": { "desired": { "limit": 60 }, "reported": { "limit": 30 } }
        }),
        json!({ "deviceId": "pi-3", "properties": { "desired": {}, "reported": {} } }),
    ]
}

/// The numbers of the twins for which the condition holds.
fn found(condition: &str) -> String {
    let condition = Condition::parse(condition).unwrap_or_else(|e| panic!("{condition}: {e}"));
    let twins = twins();
    let found = twins.iter().filter(|twin| condition.matches(twin));
    found.map(|twin| twin["deviceId"].as_str().unwrap().replace("pi-", "")).collect()
}

#[test]
fn conditions_select_twins() {
    let cases = [
        ("deviceId = 'pi-1'", "1"),
        ("deviceId = \"pi-1\"", "1"),
        ("deviceId='PI-1'", ""),
        ("DeviceId = 'pi-1'", ""),
        ("status != 'enabled'", "2"),
        ("status <> 'enabled'", "2"),
        ("connectionState = 'Connected' AND status = 'enabled'", "1"),
        ("etag = 'AAAAAAAAAAE='", "1"),
        ("tags.site = 'north' OR tags.site = 'south\\'s'", "12"),
        ("tags.path = 'a\\\\b\\\"c'", "2"),
        ("tags.site = '\\u006eorth'", "1"),
        ("tags.[[my key]] = 'x'", "1"),
        ("tags.café", "1"),
        ("tags.site", ""),
        ("[[deviceId]] = 'pi-1'", "1"),
        ("devices.deviceId = 'pi-1'", "1"),
        ("tags.floor >= 2 and tags.floor < 10", "1"),
        ("tags.floor > 2", "2"),
        ("tags.floor <= 0xA", "12"),
        ("tags.floor = 2.0", "1"),
        ("tags.floor < '3'", ""),
        ("tags.floor != '2'", ""),
        ("properties.reported.ratio = 5e-1", "1"),
        ("properties.reported.ratio > -1", "1"),
        ("properties.desired.limit = properties.reported.limit", "1"),
        ("properties.desired.$version = 4", "1"),
        ("properties.reported.firmware = 'current'", ""),
        ("properties.reported.firmware != 'current'", ""),
        ("properties.reported.list = properties.reported.list", ""),
        ("properties.reported.firmware.fwUpdateStatus IN ['current', 'error']", "1"),
        ("tags.site IN ('north')", "1"),
        ("tags.site NIN ['north']", "2"),
        ("deviceId nin ['pi-1', 'pi-2']", "3"),
        ("IS_DEFINED(tags.site)", "12"),
        ("is_defined ( statusReason )", "1"),
        ("NOT is_defined(tags)", "3"),
        ("statusReason = null", "1"),
        ("NOT tags.site = 'north'", "23"),
        ("NOT NOT tags.site = 'north'", "1"),
        ("tags.site != 'north'", "2"),
        ("true", "123"),
        ("false OR null OR 'true' OR 1", ""),
        ("configurations.[[fw-285]].status = 'Applied'", "1"),
        // AND binds more tightly than OR, NOT most tightly.
        ("deviceId = 'pi-3' OR deviceId = 'pi-1' AND status = 'disabled'", "3"),
        ("(deviceId = 'pi-3' OR deviceId = 'pi-2') AND status = 'disabled'", "2"),
        ("NOT deviceId = 'pi-3' AND NOT deviceId = 'pi-1'", "2"),
        ("  \n( ( deviceId\t= 'pi-1' ) )\r\n", "1"),
    ];
    for (condition, expected) in cases {
        assert_eq!(found(condition), expected, "{condition}");
    }
}

#[test]
fn whole_twins_projections_and_counts() {
    let run =
        |text: &str| Query::parse(text).unwrap_or_else(|e| panic!("{text}: {e}")).run(&twins());
    let cases = [
        ("SELECT * FROM devices", json!(twins())),
        ("select top 1 * from devices where status = 'disabled'", json!([twins()[1]])),
        ("SELECT TOP 0 * FROM devices", json!([])),
        (
            "SELECT deviceId, tags.site AS place FROM devices",
            json!([
                { "deviceId": "pi-1", "place": "north" },
                { "deviceId": "pi-2", "place": "south's" },
                { "deviceId": "pi-3" }
            ]),
        ),
        ("SELECT tags.floor FROM devices WHERE deviceId = 'pi-2'", json!([{ "floor": 10 }])),
        ("SELECT COUNT() AS number FROM devices WHERE is_defined(tags)", json!([{ "number": 2 }])),
        ("SELECT count ( ) AS number FROM devices WHERE false", json!([{ "number": 0 }])),
    ];
    for (text, expected) in cases {
        assert_eq!(json!(run(text)), expected, "{text}");
    }
    let job = json!({ "deviceId": "pi-1", "jobId": "j" });
    let query = Query::parse("SELECT * FROM devices.jobs WHERE devices.jobs.jobId = 'j'").unwrap();
    assert_eq!((query.source(), query.item_type()), (Source::Jobs, "DeviceJob"));
    assert!(query.matches(&job));
    for (text, source, kind) in [
        ("SELECT * FROM Devices", Source::Devices, "Twin"),
        ("SELECT * FROM devices.modules", Source::Modules, "Twin"),
        ("SELECT deviceId FROM devices", Source::Devices, "Raw"),
        ("SELECT COUNT() FROM devices", Source::Devices, "Raw"),
    ] {
        let query = Query::parse(text).unwrap();
        assert_eq!((query.source(), query.item_type()), (source, kind), "{text}");
    }
}

#[test]
fn refusals_name_the_place_and_what_was_expected() {
    let deep = format!("SELECT * FROM devices WHERE {}true{}", "(".repeat(5000), ")".repeat(5000));
    let negated = format!("SELECT * FROM devices WHERE {} true", "NOT ".repeat(5000));
    let cases = [
        ("", "column 1: expected `SELECT`, found the end"),
        ("DELETE FROM devices", "column 1: expected `SELECT`, found `DELETE`"),
        ("SELECT", "column 7: expected `*`, `COUNT()` or property paths, found the end"),
        (
            "SELECT FROM devices",
            "column 8: expected `*`, `COUNT()` or property paths, found `FROM`",
        ),
        (
            "SELECT deviceId, FROM devices",
            "column 18: expected `*`, `COUNT()` or property paths, found `FROM`",
        ),
        ("SELECT TOP many * FROM devices", "column 12: expected a number of rows, found `many`"),
        ("SELECT * devices", "column 10: expected `,` or `FROM`, found `devices`"),
        (
            "SELECT * FROM twins",
            "column 15: expected `devices`, `devices.modules` or `devices.jobs`, found `twins`",
        ),
        (
            "SELECT * FROM devicesx",
            "column 15: expected `devices`, `devices.modules` or `devices.jobs`, found `devicesx`",
        ),
        (
            "SELECT * FROM devices WHEN x = 1",
            "column 23: expected `WHERE` or the end of the query, found `WHEN`",
        ),
        ("SELECT * FROM devices WHERE", "column 28: expected a condition, found the end"),
        ("SELECT * FROM devices WHERE AND", "column 29: expected a condition, found `AND`"),
        (
            "SELECT * FROM devices WHERE é = = 1",
            "column 33: expected a value or a property path, found `=`",
        ),
        (
            "SELECT * FROM devices WHERE a = 1 b = 2",
            "column 35: expected `AND`, `OR` or the end of the query, found `b`",
        ),
        (
            "SELECT * FROM devices WHERE a == 1",
            "column 32: expected a value or a property path, found `=`",
        ),
        ("SELECT * FROM devices WHERE a = 1 AND", "column 38: expected a condition, found the end"),
        (
            "SELECT * FROM devices WHERE (a = 1",
            "column 35: expected `AND`, `OR` or `)`, found the end",
        ),
        (
            "SELECT * FROM devices WHERE a = 'x",
            "column 35: expected the closing quote, found the end",
        ),
        (
            "SELECT * FROM devices WHERE a = '\\n'",
            "column 35: expected one of \\' \\\" \\\\ \\uXXXX, found `n'`",
        ),
        (
            "SELECT * FROM devices WHERE a = '\\ud800'",
            "column 35: expected one of \\' \\\" \\\\ \\uXXXX, found `ud800'`",
        ),
        ("SELECT * FROM devices WHERE a = 12x", "column 33: expected a number, found `12x`"),
        ("SELECT * FROM devices WHERE a = 1e999", "column 33: expected a number, found `1e999`"),
        (
            "SELECT * FROM devices WHERE a IN 'x'",
            "column 34: expected a list of values such as ['a', 'b'], found `'x'`",
        ),
        ("SELECT * FROM devices WHERE a IN []", "column 35: expected a value, found `]`"),
        ("SELECT * FROM devices WHERE a IN [1 2]", "column 37: expected `,` or `]`, found `2]`"),
        ("SELECT * FROM devices WHERE a.[[b = 1", "column 33: expected a name and `]]`, found `b`"),
        (
            "SELECT * FROM devices WHERE a. = 1",
            "column 30: expected a property name after `.`, found `.`",
        ),
        (
            "SELECT * FROM devices WHERE is_defined('a')",
            "column 40: expected a property path, found `'a')`",
        ),
        (
            &deep,
            "column 93: expected at most 64 parentheses and NOTs inside one another, \
             found `((((((((((((((((((((((((((((((((((((((((`",
        ),
        (
            &negated,
            "column 285: expected at most 64 parentheses and NOTs inside one another, found `NOT`",
        ),
    ];
    for (text, expected) in cases {
        let error = Query::parse(text).expect_err(text);
        assert_eq!(error.to_string(), expected, "{text}");
    }
}

/// Texts that are queries or nearly so.
fn near_queries() -> impl Strategy<Value = String> {
    let word = prop::sample::select(vec![
        "SELECT",
        "TOP",
        "*",
        "FROM",
        "devices",
        "WHERE",
        "AND",
        "OR",
        "NOT",
        "IN",
        "NIN",
        "(",
        ")",
        "[",
        "]",
        "[[",
        "]]",
        ".",
        ",",
        "=",
        "<>",
        "<=",
        "'",
        "\"",
        "\\",
        "\\u00e9",
        "tags",
        "a.b",
        "is_defined",
        "COUNT()",
        "AS",
        "0x1f",
        "-1.5e3",
        "null",
        "true",
        "'text'",
        "é",
        "\u{1F600}",
    ]);
    prop::collection::vec(word, 0..24).prop_map(|words| words.join(" "))
}

const KEYWORDS: [&str; 15] = [
    "select", "top", "from", "where", "group", "by", "as", "and", "or", "not", "in", "nin", "null",
    "true", "false",
];

fn names(first: bool) -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z_$][a-zA-Z0-9_$]{0,6}".prop_filter("names start like names", move |name| {
            !first || !KEYWORDS.contains(&name.to_lowercase().as_str())
        }),
        "[^\\]\\[]{1,8}".prop_map(|name| format!("[[{name}]]")),
    ]
}

fn paths() -> impl Strategy<Value = String> {
    (names(true), prop::collection::vec(names(false), 0..3))
        .prop_map(|(first, rest)| [vec![first], rest].concat().join("."))
}

fn literals() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<i64>().prop_map(|n| n.to_string()),
        (-1e300..1e300_f64).prop_map(|n| format!("{n:e}")),
        any::<bool>().prop_map(|b| b.to_string()),
        Just("null".to_owned()),
        any::<String>().prop_map(|s| format!("'{}'", s.replace('\\', "\\\\").replace('\'', "\\'"))),
    ]
}

fn conditions() -> impl Strategy<Value = String> {
    let operator = prop::sample::select(vec!["=", "!=", "<>", "<", "<=", ">", ">="]);
    let leaf = prop_oneof![
        (paths(), operator, prop_oneof![literals(), paths()])
            .prop_map(|(path, operator, value)| format!("{path} {operator} {value}")),
        (paths(), any::<bool>(), prop::collection::vec(literals(), 1..4)).prop_map(
            |(path, listed, values)| {
                format!("{path} {} [{}]", if listed { "IN" } else { "NIN" }, values.join(","))
            }
        ),
        paths().prop_map(|path| format!("IS_DEFINED({path})")),
        paths(),
    ];
    leaf.prop_recursive(5, 32, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 1..4).prop_map(|all| all.join(" AND ")),
            prop::collection::vec(inner.clone(), 1..4).prop_map(|any| any.join(" OR ")),
            inner.clone().prop_map(|test| format!("NOT {test}")),
            inner.prop_map(|test| format!("({test})")),
        ]
    })
}

fn documents() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-9.0..9.0_f64).prop_map(Value::from),
        "[a-c]{0,2}".prop_map(Value::from),
    ];
    let tree = leaf.prop_recursive(3, 16, 4, |inner| {
        prop::collection::hash_map("[a-c]", inner, 0..4).prop_map(|map| json!(map))
    });
    prop::collection::hash_map("[a-c]", tree, 0..4).prop_map(|map| json!(map))
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in prop_oneof![any::<String>(), near_queries()]) {
        if let Err(error) = Query::parse(&text) {
            prop_assert!((1..=text.chars().count() + 1).contains(&error.column), "{error}");
        }
        if let Err(error) = Condition::parse(&text) {
            prop_assert!((1..=text.chars().count() + 1).contains(&error.column), "{error}");
        }
    }

    #[test]
    fn the_printed_query_is_the_same_query(
        top in prop::option::of(any::<u32>()),
        columns in prop::collection::vec((paths(), prop::option::of(names(false))), 0..3),
        condition in prop::option::of(conditions()),
    ) {
        let column = |(path, alias): &(String, Option<String>)| match alias {
            Some(alias) => format!("{path} AS {alias}"),
            None => path.clone(),
        };
        let columns = columns.iter().map(column).collect::<Vec<_>>().join(", ");
        let text = format!(
            "SELECT {}{} FROM devices{}",
            top.map(|n| format!("TOP {n} ")).unwrap_or_default(),
            if columns.is_empty() { "*".to_owned() } else { columns },
            condition.map(|c| format!(" WHERE {c}")).unwrap_or_default(),
        );
        let query = Query::parse(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
        let printed = query.to_string();
        prop_assert_eq!(Query::parse(&printed).map_err(|e| format!("{printed}: {e}")), Ok(query));
    }

    /// Laws that hold for every document, however its properties are missing or of other kinds.
    #[test]
    fn conditions_obey_their_laws(
        document in documents(),
        left in "[a-c](\\.[a-c])?",
        right in prop_oneof!["[a-c](\\.[a-c])?", "[0-9]", "'[a-c]'", Just("null".to_owned())],
    ) {
        let holds = |text: &str| Condition::parse(text).unwrap().matches(&document);
        let is = |operator: &str| holds(&format!("{left} {operator} {right}"));
        prop_assert_eq!(is("<="), is("<") || is("="));
        prop_assert_eq!(is(">="), is(">") || is("="));
        prop_assert_eq!(is("!="), is("<>"));
        prop_assert!(!(is("=") && is("!=")));
        prop_assert!(!(is("<") && is(">")));
        let defined = holds(&format!("IS_DEFINED({left})"));
        prop_assert!(defined || !is("="));
        prop_assert_eq!(holds(&format!("NOT {left} = {right}")), !is("="));
    }
}
