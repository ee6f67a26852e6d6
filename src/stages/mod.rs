//! The stages of a run, in their order: each is one line of the instance's unit. Then what they share, and what is done
//! around them: at a boot, for a rollback by hand, and before a poll.

pub mod begin;

pub mod prepare;

pub mod build;

pub mod activate;
pub mod publish;

pub mod conclude;

pub mod branch;
pub mod cut_off;
pub mod look;
pub mod release;
pub mod rollback;
pub mod settle;
pub mod switch;
pub mod wording;

pub mod boot;
pub mod reboot;
pub mod trial;
pub mod undo;
pub mod watch;
