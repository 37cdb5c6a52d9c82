//! Topics of the IoT Hub MQTT dialect, as values. No I/O: text in, values out, and back.
//!
//! Rules: Microsoft, "Communicate with an IoT hub using the MQTT protocol".

use std::borrow::Cow;

use percent_encoding::percent_decode_str;

/// Filter of the answers to twin requests.
pub const TWIN_ANSWERS: &str = "$iothub/twin/res/#";
/// Filter of the notifications about desired properties.
pub const DESIRED: &str = "$iothub/twin/PATCH/properties/desired/#";
/// Filter of the direct methods.
pub const METHODS: &str = "$iothub/methods/POST/#";
/// Every filter of a session.
pub const FILTERS: [&str; 3] = [TWIN_ANSWERS, DESIRED, METHODS];

/// What a message from the hub is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Incoming {
    /// The answer to a twin request.
    TwinAnswer {
        /// Status in the manner of HTTP.
        status: u16,
        /// The request it answers, unchanged.
        request_id: String,
    },
    /// A change of the desired properties.
    Desired {
        /// The `$version` it leads to; `None` if only the body tells it.
        version: Option<u64>,
    },
    /// A direct method.
    Method {
        /// Its name.
        name: String,
        /// Goes back with the answer, unchanged.
        request_id: String,
    },
}

/// A topic that is none of the hub's.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("topic \"{}\" {problem}", topic.escape_debug())]
pub struct TopicError {
    /// The topic, cut at 256 characters.
    pub topic: String,
    /// What is wrong with it.
    pub problem: &'static str,
}

impl Incoming {
    /// Reads a topic on which the hub sent something. Parameters may come in any order, unknown
    /// ones are ignored, and `$` may be written `%24`.
    ///
    /// # Errors
    /// The topic belongs to none of [`FILTERS`], or lacks a parameter.
    pub fn parse(topic: &str) -> Result<Self, TopicError> {
        let wrong = |problem| TopicError { topic: topic.chars().take(256).collect(), problem };
        let (path, query) = topic.split_once('?').unwrap_or((topic, ""));
        let path = path.strip_suffix('/').unwrap_or(path);
        let request_id =
            || parameter(query, "$rid").map(str::to_owned).ok_or_else(|| wrong("has no $rid"));
        if let Some(status) = path.strip_prefix("$iothub/twin/res/") {
            let status = status.parse().map_err(|_| wrong("has a status that is no number"))?;
            Ok(Incoming::TwinAnswer { status, request_id: request_id()? })
        } else if path == "$iothub/twin/PATCH/properties/desired" {
            let version = parameter(query, "$version").and_then(|version| version.parse().ok());
            Ok(Incoming::Desired { version })
        } else if let Some(name) = path.strip_prefix("$iothub/methods/POST/") {
            if name.is_empty() || name.contains('/') {
                return Err(wrong("has no method name"));
            }
            Ok(Incoming::Method { name: name.to_owned(), request_id: request_id()? })
        } else {
            Err(wrong("is not known"))
        }
    }
}

/// Topic that asks for the whole twin.
#[must_use]
pub fn read_twin(request_id: &str) -> String {
    format!("$iothub/twin/GET/?$rid={request_id}")
}

/// Topic that changes the reported properties.
#[must_use]
pub fn patch_reported(request_id: &str) -> String {
    format!("$iothub/twin/PATCH/properties/reported/?$rid={request_id}")
}

/// Topic that answers a direct method.
#[must_use]
pub fn method_answer(status: u16, request_id: &str) -> String {
    format!("$iothub/methods/res/{status}/?$rid={request_id}")
}

/// The first value of `name`, as it stands there.
fn parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').filter_map(|pair| pair.split_once('=')).find_map(|(key, value)| {
        let key: Cow<'_, str> = percent_decode_str(key).decode_utf8_lossy();
        (key == name).then_some(value)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn answer(status: u16, request_id: &str) -> Incoming {
        Incoming::TwinAnswer { status, request_id: request_id.to_owned() }
    }

    fn method(name: &str, request_id: &str) -> Incoming {
        Incoming::Method { name: name.to_owned(), request_id: request_id.to_owned() }
    }

    #[test]
    fn reads_every_topic_of_the_hub() {
        for (topic, value) in [
            ("$iothub/twin/res/200/?$rid=1", answer(200, "1")),
            ("$iothub/twin/res/204/?$rid=1f-a&$version=7", answer(204, "1f-a")),
            ("$iothub/twin/res/204/?$version=7&$rid=1f-a", answer(204, "1f-a")),
            ("$iothub/twin/res/429/?%24rid=3&retry-after=5", answer(429, "3")),
            (
                "$iothub/twin/PATCH/properties/desired/?$version=5",
                Incoming::Desired { version: Some(5) },
            ),
            ("$iothub/twin/PATCH/properties/desired/", Incoming::Desired { version: None }),
            ("$iothub/methods/POST/firmwareUpdate/?$rid=0a=b", method("firmwareUpdate", "0a=b")),
            ("$iothub/methods/POST/reboot/?x=1&$rid=2&$rid=3", method("reboot", "2")),
        ] {
            assert_eq!(Incoming::parse(topic), Ok(value), "{topic}");
        }
    }

    #[test]
    fn refuses_what_is_no_topic_of_the_hub() {
        for (topic, problem) in [
            ("", "is not known"),
            ("devices/a/messages/devicebound/", "is not known"),
            ("$iothub/twin/res/abc/?$rid=1", "no number"),
            ("$iothub/twin/res/70000/?$rid=1", "no number"),
            ("$iothub/twin/res/200/", "no $rid"),
            ("$iothub/methods/POST/reboot/?rid=1", "no $rid"),
            ("$iothub/methods/POST/?$rid=1", "is not known"),
            ("$iothub/methods/POST//?$rid=1", "no method name"),
            ("$iothub/methods/POST/a/b/?$rid=1", "no method name"),
        ] {
            let error = Incoming::parse(topic).unwrap_err();
            assert!(error.problem.contains(problem), "{error}");
        }
    }

    #[test]
    fn writes_every_topic_of_a_device() {
        assert_eq!(read_twin("7"), "$iothub/twin/GET/?$rid=7");
        assert_eq!(patch_reported("7"), "$iothub/twin/PATCH/properties/reported/?$rid=7");
        assert_eq!(method_answer(404, "7"), "$iothub/methods/res/404/?$rid=7");
    }

    proptest! {
        #[test]
        fn never_panics(topic in any::<String>()) {
            let _ = Incoming::parse(&topic);
        }

        #[test]
        fn finds_parameters_in_any_order(
            status in 100_u16..600,
            id in "[0-9A-Za-z-]{1,36}",
            name in "[A-Za-z0-9_.-]{1,40}",
            version in any::<u64>(),
            junk in proptest::collection::vec("[a-z-]{1,8}=[a-z0-9]{0,8}", 0..3),
            turn in any::<prop::sample::Index>(),
            escaped in any::<bool>(),
        ) {
            let dollar = if escaped { "%24" } else { "$" };
            let mut parameters = junk;
            parameters.push(format!("{dollar}rid={id}"));
            parameters.push(format!("{dollar}version={version}"));
            let by = turn.index(parameters.len());
            parameters.rotate_left(by);
            let query = parameters.join("&");
            prop_assert_eq!(
                Incoming::parse(&format!("$iothub/twin/res/{status}/?{query}")),
                Ok(answer(status, &id))
            );
            prop_assert_eq!(
                Incoming::parse(&format!("$iothub/methods/POST/{name}/?{query}")),
                Ok(method(&name, &id))
            );
            prop_assert_eq!(
                Incoming::parse(&format!("$iothub/twin/PATCH/properties/desired/?{query}")),
                Ok(Incoming::Desired { version: Some(version) })
            );
        }
    }
}
