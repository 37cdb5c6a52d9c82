//! The MQTT user name, in which a device says who it is. No I/O.

use percent_encoding::percent_decode_str;

use crate::identity::Identity;

/// A user name taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UserName {
    /// The hub's name as the device wrote it.
    pub(crate) hub: String,
    pub(crate) identity: Identity,
    /// Absent in the very old form `{hub}/{device}`.
    pub(crate) api_version: Option<String>,
    pub(crate) model_id: Option<String>,
}

/// A user name that no IoT Hub client sends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("user name {text:?} is not {{hub}}/{{device}}[/{{module}}]/?api-version={{version}}")]
pub(crate) struct UserNameError {
    text: String,
}

impl UserName {
    /// Follows edgeHub's rule: two or three segments, and a last one that starts with `?` or holds
    /// `api-version=`. The version's value is not checked; the first of equal keys counts.
    pub(crate) fn parse(text: &str) -> Result<Self, UserNameError> {
        let error = || UserNameError { text: text.to_owned() };
        let mut segments: Vec<&str> = text.split('/').collect();
        let is_query = |last: &&str| last.starts_with('?') || last.contains("api-version=");
        let query = segments.pop_if(|last| is_query(&&**last));
        let (hub, identity) = match segments.as_slice() {
            [hub, device] => (hub, Identity::device(device)),
            [hub, device, module] => (hub, Identity::module(device, module)),
            _ => return Err(error()),
        };
        if hub.is_empty() {
            return Err(error());
        }
        let value = |wanted: &str| {
            let pairs = query.unwrap_or_default().trim_start_matches('?').split('&');
            pairs.filter_map(|pair| pair.split_once('=')).find_map(|(name, value)| {
                (name == wanted).then(|| percent_decode_str(value).decode_utf8_lossy().into_owned())
            })
        };
        Ok(Self {
            hub: (*hub).to_owned(),
            identity: identity.map_err(|_| error())?,
            api_version: value("api-version"),
            model_id: value("model-id"),
        })
    }
}
