//! The stages of a run, in their order: each is one line of the instance's unit; then what follows them.

pub mod begin;

pub mod prepare;

pub mod build;

pub mod activate;

pub mod conclude;

pub mod trial;

pub mod boot;

pub mod branch;
pub mod reboot;
