//! The hub's side of a fleet: publishing from a repository of hosts, what is served, and what the hosts report.

pub mod candidate;
pub mod command;
pub mod offer;

mod collect;
mod guide;
mod headway;
mod health;
mod history;
mod holds;
mod host_state;
mod jobs;
mod lost;
mod memory;
mod metrics;
mod numbers;
mod page;
mod plan;
mod publication;
mod publish;
mod push;
mod releases;
mod remote;
mod repository;
mod rollout;
pub mod served;
pub mod settings;
mod signing;
mod snapshot;
mod standing;
mod status;
mod terminal;
