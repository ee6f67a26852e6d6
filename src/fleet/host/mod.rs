//! The host's side of a fleet: it fetches its release and its secrets, and reports.

pub mod delivery;
pub mod heartbeat;
pub mod outbox;
mod peers;
pub mod poll;
pub mod release;
pub mod secrets;
pub mod seen;
