//! The device command.
fn main() {}
