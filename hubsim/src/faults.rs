//! Faults that tests put in, one set per identity.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A fault. As JSON (admin endpoint): `{"fault":"dropAfterPackets","packets":3}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "fault", rename_all = "camelCase", rename_all_fields = "camelCase")]
#[serde(deny_unknown_fields)]
pub enum Fault {
    /// Cuts the connection at once, without a word, as a broken line does.
    DropNow,
    /// Cuts the connection when the device's n-th packet from now has been handled, before any
    /// answer to it is sent.
    DropAfterPackets {
        /// 1 is the next packet.
        packets: u64,
    },
    /// Cuts the connection when the device's n-th packet from now arrives; it is not handled.
    DropBeforePacket {
        /// 1 is the next packet.
        packets: u64,
    },
    /// Sends the next twin response late.
    DelayNextResponse {
        /// By how many milliseconds.
        millis: u64,
    },
    /// Handles the next twin request but does not send the response.
    LoseNextResponse,
    /// Does not acknowledge the device's next QoS 1 message, which is handled.
    LoseNextPuback,
    /// Answers the next twin requests with an error; they are not applied.
    FailTwin {
        /// The status in the topic, 429 or 500 for example.
        status: u16,
        /// How many requests.
        times: u32,
    },
    /// The connection's token has just run out, without any grace.
    ExpireTokenNow,
    /// Delivers the next method call twice, with one request id.
    DeliverNextMethodTwice,
    /// Puts the parameters in topics to the device in the other order, `$rid` last.
    SwapParameterOrder {
        /// On or off.
        on: bool,
    },
    /// Sends topics to the device with `%24rid` in place of `$rid`.
    EncodeDollar {
        /// On or off.
        on: bool,
    },
    /// Refuses connections with this CONNACK code (1 to 5); `null` ends it.
    RefuseConnections {
        /// The code.
        code: Option<u8>,
    },
    /// Closes connections of this identity in place of a CONNACK.
    CloseInsteadOfConnack {
        /// On or off.
        on: bool,
    },
    /// Accepts connections but reads nothing more from them: the line is there, the hub is not.
    Stall {
        /// On or off.
        on: bool,
    },
}

/// What is in force for one identity.
#[derive(Debug, Clone, Default)]
pub(crate) struct Active {
    drop_after: Option<u64>,
    drop_before: Option<u64>,
    delay_response: Option<Duration>,
    lose_response: bool,
    lose_puback: bool,
    fail_twin: Option<(u16, u32)>,
    method_twice: bool,
    pub(crate) swap_parameters: bool,
    pub(crate) encode_dollar: bool,
    pub(crate) refuse: Option<u8>,
    pub(crate) no_connack: bool,
    pub(crate) stall: bool,
}

/// What is to happen with a packet that came from the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PacketFate {
    Handle,
    HandleThenDrop,
    Drop,
}

/// What is to happen with a twin response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ResponseFate {
    Send,
    Delay(Duration),
    Lose,
}

impl Active {
    /// Arms a fault. [`Fault::DropNow`] and [`Fault::ExpireTokenNow`] are not states and are done
    /// by the caller.
    pub(crate) fn arm(&mut self, fault: &Fault) {
        match *fault {
            Fault::DropNow | Fault::ExpireTokenNow => {}
            Fault::DropAfterPackets { packets } => self.drop_after = Some(packets),
            Fault::DropBeforePacket { packets } => self.drop_before = Some(packets),
            Fault::DelayNextResponse { millis } => {
                self.delay_response = Some(Duration::from_millis(millis));
            }
            Fault::LoseNextResponse => self.lose_response = true,
            Fault::LoseNextPuback => self.lose_puback = true,
            Fault::FailTwin { status, times } => {
                self.fail_twin = (times > 0).then_some((status, times));
            }
            Fault::DeliverNextMethodTwice => self.method_twice = true,
            Fault::SwapParameterOrder { on } => self.swap_parameters = on,
            Fault::EncodeDollar { on } => self.encode_dollar = on,
            Fault::RefuseConnections { code } => self.refuse = code,
            Fault::CloseInsteadOfConnack { on } => self.no_connack = on,
            Fault::Stall { on } => self.stall = on,
        }
    }

    pub(crate) fn packet(&mut self) -> PacketFate {
        if countdown(&mut self.drop_before) {
            PacketFate::Drop
        } else if countdown(&mut self.drop_after) {
            PacketFate::HandleThenDrop
        } else {
            PacketFate::Handle
        }
    }

    pub(crate) fn response(&mut self) -> ResponseFate {
        if std::mem::take(&mut self.lose_response) {
            ResponseFate::Lose
        } else if let Some(delay) = self.delay_response.take() {
            ResponseFate::Delay(delay)
        } else {
            ResponseFate::Send
        }
    }

    /// Whether the next PUBACK is withheld; asked once per PUBACK.
    pub(crate) fn takes_puback(&mut self) -> bool {
        std::mem::take(&mut self.lose_puback)
    }

    /// Whether this method call goes out twice; asked once per call.
    pub(crate) fn doubles_method(&mut self) -> bool {
        std::mem::take(&mut self.method_twice)
    }

    /// The error for this twin request, if it is to fail.
    pub(crate) fn twin_failure(&mut self) -> Option<u16> {
        let (status, times) = self.fail_twin?;
        self.fail_twin = (times > 1).then(|| (status, times.saturating_sub(1)));
        Some(status)
    }
}

/// Counts down to the packet it is about; true there, once.
fn countdown(left: &mut Option<u64>) -> bool {
    match left {
        None => false,
        Some(0 | 1) => {
            *left = None;
            true
        }
        Some(n) => {
            *n = n.saturating_sub(1);
            false
        }
    }
}
