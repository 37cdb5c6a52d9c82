//! Firmware updates for embedded Linux devices on Azure IoT Hub.

pub mod agent;
pub mod app;
pub mod backoff;
pub mod boot;
pub mod clock;
pub mod config;
pub mod control;
pub mod fetch;
pub mod guard;
pub mod health;
pub mod hub;
pub mod install;
pub mod journal;
pub mod logging;
pub mod os;
pub mod rauc;
pub mod redact;
pub mod request;
pub mod store;
pub mod supervisor;
pub mod update;
