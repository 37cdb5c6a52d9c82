//! The whole of twinboot against a hub and an image server: the real daemon in a played machine.
//!
//! Every test here starts the daemon as a process, with a hub of hubsim and an HTTPS server on
//! loopback, and looks at what an operator sees: the twin, the answers, the slot that boots.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::print_stderr,
    missing_docs,
    missing_debug_implementations,
    reason = "tests"
)]

mod answers;
mod command;
mod contracts;
mod desired;
mod guard;
mod hub;
mod images;
mod installer;
mod interrupted;
mod kill;
mod last_words;
mod operators;
mod page;
mod rauc;
mod secrets;
mod state;
mod trial;

#[path = "../support/world.rs"]
mod world;
