//! The start of an MQTT connection: who is it, and may it come in.

use mqttbytes::v4::{Connect, ConnectReturnCode, LastWill};
use mqttbytes::{Protocol, QoS};

use super::topic::events_topic;
use super::username::UserName;
use crate::access::ClientCertificate;
use crate::core::{Core, Opened};
use crate::events::{EventKind, Transport};
use crate::identity::Identity;

/// A connection that was let in.
#[derive(Debug)]
pub(super) struct Accepted {
    pub(super) identity: Identity,
    pub(super) opened: Opened,
    /// Last second of the token, for SAS.
    pub(super) expires: Option<i64>,
    pub(super) keep_alive_s: u16,
    pub(super) will: Option<LastWill>,
}

/// A connection that was not let in.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) identity: Option<Identity>,
    /// None: the connection is closed without a word.
    pub(super) code: Option<ConnectReturnCode>,
    pub(super) reason: String,
}

impl Refused {
    fn new(identity: &Identity, code: ConnectReturnCode, reason: impl Into<String>) -> Self {
        Self { identity: Some(identity.clone()), code: Some(code), reason: reason.into() }
    }
}

/// Decides on a CONNECT and, if it is good, opens the session.
pub(super) fn decide(
    core: &Core,
    connect: Connect,
    certificate: Option<&ClientCertificate>,
    transport: Transport,
) -> Result<Accepted, Refused> {
    if connect.protocol != Protocol::V4 {
        return Err(Refused {
            identity: None,
            code: Some(ConnectReturnCode::RefusedProtocolVersion),
            reason: "not MQTT 3.1.1".to_owned(),
        });
    }
    let (user, password) =
        connect.login.map(|login| (login.username, login.password)).unwrap_or_default();
    let user = UserName::parse(&user).map_err(|error| Refused {
        identity: None,
        code: Some(ConnectReturnCode::BadUserNamePassword),
        reason: error.to_string(),
    })?;
    let identity = user.identity;
    let refuse = |reason: &str| Refused::new(&identity, ConnectReturnCode::NotAuthorized, reason);
    if connect.client_id != identity.to_string() {
        return Err(refuse("the client id is not the user name's identity"));
    }
    if !core.options.accepts_name(&user.hub) {
        return Err(refuse("the user name is for another hub"));
    }
    if let Some(will) = &connect.last_will {
        check_will(will, &identity)?;
    }
    let admission = {
        let mut book = core.book();
        injected(&book, &identity)?;
        let admission = core
            .admit(&book, &identity, &password, certificate)
            .map_err(|reason| refuse(&reason))?;
        if let (Some(model), Ok(record)) = (user.model_id, book.record_mut(&identity)) {
            record.model_id = model;
        }
        admission
    };
    if user.api_version.is_none() {
        let message = "user name has no api-version: a real hub treats this as its first API, in \
                       which reported patches fail";
        core.tell(Some(&identity), EventKind::Warning { message: message.to_owned() });
    }
    let (clean, keep_alive_s) = (connect.clean_session, connect.keep_alive);
    let opened = core.open(&identity, clean, |session_present| EventKind::Connected {
        clean,
        session_present,
        keep_alive_s,
        transport,
    });
    Ok(Accepted {
        identity,
        opened,
        expires: admission.expires,
        keep_alive_s,
        will: connect.last_will,
    })
}

/// IoT Hub takes only telemetry as a will, and no QoS 2.
fn check_will(will: &LastWill, identity: &Identity) -> Result<(), Refused> {
    let own = events_topic(identity);
    if will.topic.starts_with(&own) && will.qos != QoS::ExactlyOnce {
        return Ok(());
    }
    Err(Refused {
        identity: Some(identity.clone()),
        code: None,
        reason: format!("the will's topic must start with {own} and its QoS must be 0 or 1"),
    })
}

fn injected(book: &crate::core::Book, identity: &Identity) -> Result<(), Refused> {
    let Some(session) = book.sessions.get(identity) else { return Ok(()) };
    if session.faults.no_connack {
        return Err(Refused {
            identity: Some(identity.clone()),
            code: None,
            reason: "injected: closed without CONNACK".to_owned(),
        });
    }
    let code = match session.faults.refuse {
        None => return Ok(()),
        Some(1) => ConnectReturnCode::RefusedProtocolVersion,
        Some(2) => ConnectReturnCode::BadClientId,
        Some(3) => ConnectReturnCode::ServiceUnavailable,
        Some(4) => ConnectReturnCode::BadUserNamePassword,
        Some(_) => ConnectReturnCode::NotAuthorized,
    };
    Err(Refused::new(identity, code, "injected refusal"))
}
