//! A release's archive: files, each with its contents and whether it can be executed, and nothing else: no links,
//! owners, times or empty directories. The hub packs it, the host unpacks it.

pub mod pack;
pub mod unpack;
