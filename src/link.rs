//! The build script: how the program is linked, for a quarter of a megabyte less.
//!
//! A panic ends the program (see `Cargo.toml`), so what only unwinding reads is left out: a panic's message names its
//! place, but has no backtrace. Relocations are packed, as every dynamic linker of these years reads them.

use std::path::Path;
use std::{env, fs, io};

/// For GNU ld and LLVM's.
const SCRIPT: &str = "SECTIONS { /DISCARD/ : { *(.eh_frame .gcc_except_table*) } } INSERT AFTER .text;\n";

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=src/link.rs");
    let (profile, directory) = (env::var("PROFILE"), env::var_os("OUT_DIR").unwrap_or_default());
    if profile.as_deref() != Ok("release") || env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return Ok(());
    }
    let script = Path::new(&directory).join("link.ld");
    fs::write(&script, SCRIPT)?;
    for argument in ["-Wl,-z,pack-relative-relocs", "-Wl,--no-eh-frame-hdr", &format!("-Wl,-T,{}", script.display())] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    Ok(())
}
