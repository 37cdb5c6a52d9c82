//! Fault handles, one method per fault.

use std::time::Duration;

use serde_json::Value;

use super::Hub;
use crate::error::HubError;
use crate::faults::Fault;

impl Hub {
    /// The fault handles of an identity.
    pub fn faults(&self, id: &str) -> Faults<'_> {
        Faults { hub: self, id: id.to_owned() }
    }
}

/// Faults for one identity. Each call takes effect at once; an unknown identity is an error.
#[derive(Debug)]
pub struct Faults<'a> {
    hub: &'a Hub,
    id: String,
}

/// Each of these is the [`Fault`] of the same name.
#[expect(missing_docs, clippy::missing_errors_doc, reason = "described at `Fault`")]
impl Faults<'_> {
    pub fn put(&self, fault: &Fault) -> Result<(), HubError> {
        self.hub.core.fault(&self.id.parse()?, fault)
    }

    pub fn drop_now(&self) -> Result<(), HubError> {
        self.put(&Fault::DropNow)
    }

    pub fn drop_after_packets(&self, packets: u64) -> Result<(), HubError> {
        self.put(&Fault::DropAfterPackets { packets })
    }

    pub fn drop_before_packet(&self, packets: u64) -> Result<(), HubError> {
        self.put(&Fault::DropBeforePacket { packets })
    }

    pub fn delay_next_response(&self, delay: Duration) -> Result<(), HubError> {
        let millis = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self.put(&Fault::DelayNextResponse { millis })
    }

    pub fn lose_next_response(&self) -> Result<(), HubError> {
        self.put(&Fault::LoseNextResponse)
    }

    pub fn lose_next_puback(&self) -> Result<(), HubError> {
        self.put(&Fault::LoseNextPuback)
    }

    pub fn fail_twin(&self, status: u16, times: u32) -> Result<(), HubError> {
        self.put(&Fault::FailTwin { status, times })
    }

    pub fn expire_token_now(&self) -> Result<(), HubError> {
        self.put(&Fault::ExpireTokenNow)
    }

    pub fn deliver_next_method_twice(&self) -> Result<(), HubError> {
        self.put(&Fault::DeliverNextMethodTwice)
    }

    pub fn swap_parameter_order(&self, on: bool) -> Result<(), HubError> {
        self.put(&Fault::SwapParameterOrder { on })
    }

    pub fn encode_dollar(&self, on: bool) -> Result<(), HubError> {
        self.put(&Fault::EncodeDollar { on })
    }

    pub fn refuse_connections(&self, code: Option<u8>) -> Result<(), HubError> {
        self.put(&Fault::RefuseConnections { code })
    }

    pub fn close_instead_of_connack(&self, on: bool) -> Result<(), HubError> {
        self.put(&Fault::CloseInsteadOfConnack { on })
    }

    pub fn stall(&self, on: bool) -> Result<(), HubError> {
        self.put(&Fault::Stall { on })
    }

    /// Sends a method call with any bytes as payload; see [`Hub::invoke_raw`].
    pub async fn send_raw_method(
        &self,
        method: &str,
        payload: &[u8],
        limit: Duration,
    ) -> Result<(i64, Value), HubError> {
        self.hub.invoke_raw(&self.id, method, payload.to_vec(), limit).await
    }
}
