//! What the unit tests share.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::config::Instance;

/// A directory that is gone with its value.
pub struct Directory(PathBuf);

impl Directory {
    /// A new, empty one.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ekiben-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

/// An instance of the repository at `place`.
pub fn instance(place: &Path) -> Instance {
    let instance = format!(
        r#"{{"author": "a <a>", "flags": [], "flakePath": "{0}", "flakeRef": "{0}#x", "healthChecks": {{}}, "inputs": [],
        "networkRetries": 0, "onUnitFailure": "rollback", "operation": "switch", "pull": false, "push": false, "rollback": true,
        "timeouts": {{"activate": 1, "build": 1, "prepare": 1}}, "user": "a"}}"#,
        place.display()
    );
    serde_json::from_str(&instance).unwrap()
}

/// Runs a script of a user of git who has configured nothing; returns what it prints.
pub fn git(directory: &Path, script: &str) -> String {
    let mut shell = Command::new("sh");
    shell.args(["-euc", script]).current_dir(directory).env("GIT_CONFIG_GLOBAL", "/dev/null");
    for name in ["GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"] {
        shell.env_remove(name);
    }
    for who in ["AUTHOR", "COMMITTER"] {
        shell.env(format!("GIT_{who}_NAME"), "a").env(format!("GIT_{who}_EMAIL"), "a");
    }
    let said = shell.output().unwrap();
    assert!(said.status.success(), "{script}: {}", String::from_utf8_lossy(&said.stderr));
    String::from_utf8_lossy(&said.stdout).trim_end().to_owned()
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
