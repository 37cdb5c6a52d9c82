//! Topics of the IoT Hub MQTT dialect, as values. No I/O: text in, values out, and back.

use std::collections::BTreeMap;

use percent_encoding::percent_decode_str;

use crate::identity::Identity;

/// What a device published, by its topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Published {
    /// Telemetry with its properties.
    Telemetry(Properties),
    /// A request for the whole twin.
    TwinGet { rid: String },
    /// A patch of the reported section. Without a request id it is applied and not answered.
    ReportedPatch { rid: Option<String> },
    /// An answer to a method call.
    MethodAnswer { status: i64, rid: String },
}

/// Names and values of a message; a name alone has no value.
pub(crate) type Properties = BTreeMap<String, Option<String>>;

/// What a device may subscribe to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Filter {
    TwinResponses,
    DesiredPatches,
    Methods,
    /// Cloud-to-device messages and Edge inputs.
    Messages,
}

/// A topic outside the grammar, or of another device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("topic {topic:?}: {rule}")]
pub(crate) struct TopicError {
    topic: String,
    rule: &'static str,
}

impl Published {
    /// Reads the topic of a PUBLISH from this identity.
    pub(crate) fn parse(topic: &str, identity: &Identity) -> Result<Self, TopicError> {
        let error = |rule| TopicError { topic: topic.to_owned(), rule };
        if let Some(rest) = topic.strip_prefix("$iothub/twin/GET/?") {
            let rid = parameter(rest, "rid").ok_or(error("no $rid"))?;
            Ok(Self::TwinGet { rid })
        } else if let Some(rest) = topic.strip_prefix("$iothub/twin/PATCH/properties/reported/") {
            let query = rest.strip_prefix('?');
            if query.is_none() && !rest.is_empty() {
                return Err(error("expected `?` after `reported/`"));
            }
            Ok(Self::ReportedPatch { rid: query.and_then(|query| parameter(query, "rid")) })
        } else if let Some(rest) = topic.strip_prefix("$iothub/methods/res/") {
            let (status, query) =
                rest.split_once("/?").ok_or(error("expected `{status}/?$rid=`"))?;
            let status = status.parse().map_err(|_| error("the status is no integer"))?;
            let rid = parameter(query, "rid").ok_or(error("no $rid"))?;
            Ok(Self::MethodAnswer { status, rid })
        } else if let Some(bag) = topic.strip_prefix(&events_topic(identity)) {
            Ok(Self::Telemetry(properties(bag)))
        } else {
            Err(error("not a topic of this hub, or not of this device"))
        }
    }
}

impl Filter {
    /// Reads a topic filter of a SUBSCRIBE; `None` if the hub has no such filter.
    pub(crate) fn parse(filter: &str, identity: &Identity) -> Option<Self> {
        let own = messages_prefix(identity);
        match filter {
            "$iothub/twin/res/#" => Some(Self::TwinResponses),
            "$iothub/twin/PATCH/properties/desired/#" => Some(Self::DesiredPatches),
            "$iothub/methods/POST/#" => Some(Self::Methods),
            _ => {
                let rest = filter.strip_prefix(&own)?.strip_suffix('#')?;
                let known = rest == "messages/devicebound/"
                    || (identity.module_id().is_some()
                        && (rest.is_empty() || rest.starts_with("inputs/")));
                known.then_some(Self::Messages)
            }
        }
    }
}

fn messages_prefix(identity: &Identity) -> String {
    match identity.module_id() {
        None => format!("devices/{}/", identity.device_id()),
        Some(module) => format!("devices/{}/modules/{module}/", identity.device_id()),
    }
}

/// Where this identity sends telemetry: the part before the properties.
pub(crate) fn events_topic(identity: &Identity) -> String {
    format!("{}messages/events/", messages_prefix(identity))
}

/// A parameter by its name without `$`; in a topic it is written `$name` or `%24name`. Its value
/// comes back as it stands.
fn parameter(query: &str, wanted: &str) -> Option<String> {
    query.split('&').filter_map(|pair| pair.split_once('=')).find_map(|(name, value)| {
        let name = name.strip_prefix('$').or_else(|| name.strip_prefix("%24"))?;
        (name == wanted && !value.is_empty()).then(|| value.to_owned())
    })
}

/// The property bag at the end of a telemetry topic; a closing `/` is let pass.
fn properties(bag: &str) -> Properties {
    let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let bag = bag.strip_suffix('/').unwrap_or(bag);
    bag.trim_start_matches('?')
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| match pair.split_once('=') {
            Some((name, value)) => (decoded(name), Some(decoded(value))),
            None => (decoded(pair), None),
        })
        .collect()
}

/// How parameters are written in topics to the device. The default is what every SDK can read:
/// `$rid` first, with a literal `$`.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Style {
    pub(crate) swapped: bool,
    pub(crate) encoded_dollar: bool,
}

impl Style {
    fn query(self, parameters: &[(&str, String)]) -> String {
        let dollar = if self.encoded_dollar { "%24" } else { "$" };
        let mut written: Vec<_> =
            parameters.iter().map(|(name, value)| format!("{dollar}{name}={value}")).collect();
        if self.swapped {
            written.reverse();
        }
        written.join("&")
    }

    pub(crate) fn twin_response(self, status: u16, rid: &str, version: Option<u64>) -> String {
        let mut parameters = vec![("rid", rid.to_owned())];
        parameters.extend(version.map(|version| ("version", version.to_string())));
        format!("$iothub/twin/res/{status}/?{}", self.query(&parameters))
    }

    pub(crate) fn desired_patch(self, version: u64) -> String {
        let query = self.query(&[("version", version.to_string())]);
        format!("$iothub/twin/PATCH/properties/desired/?{query}")
    }

    pub(crate) fn method_call(self, method: &str, rid: &str) -> String {
        format!("$iothub/methods/POST/{method}/?{}", self.query(&[("rid", rid.to_owned())]))
    }
}
