//! A store of releases: any web server that has the hub's files in the hub's paths, asked by curl.
//!
//! Whoever has the store can withhold releases, and not make them: they are signed. Nothing but HTTPS is
//! spoken, wherever the server sends us, and its certificate is judged as everywhere on this machine.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::config::Hub;
use crate::error::{Context, Result};
use crate::files;
use crate::fleet::place::Place;
use crate::fleet::{MANIFEST, SMALL};
use crate::program::Program;

/// The manifest is the one file that is ever replaced; it is kept with what the server calls it.
const ETAG: &str = "manifest.etag";
/// What curl ends with where the network, the other side or a disk is to blame.
const TRANSIENT: [i32; 14] = [5, 6, 7, 16, 18, 23, 28, 35, 52, 55, 56, 92, 95, 96];
/// What it ends with where the server has answered with an error, and where that has no parts of files.
const REFUSED: i32 = 22;
const NO_PARTS: i32 = 33;
/// How long curl may take to end when its time is up.
const GRACE: Duration = Duration::from_secs(10);

/// A host's files in a store.
pub struct Store {
    releases: String,
    /// Where reports go, if anywhere.
    reports: Option<String>,
    netrc: Option<PathBuf>,
    kept: PathBuf,
    until: Instant,
}

impl Store {
    /// The store of a hub, if it has one: all that is asked of it may take `limit`. `netrc` has the passwords, `kept` is a
    /// directory for what the next one is to know.
    pub fn of(hub: &Hub, netrc: Option<PathBuf>, kept: PathBuf, limit: Duration) -> Option<Self> {
        let place = |url: &String| format!("{}/hosts/{}/", url.trim_end_matches('/'), hub.name);
        let (releases, reports) = (hub.url.as_ref().map(place)?, hub.reports_url.as_ref().map(place));
        Some(Self { releases, reports, netrc, kept, until: Instant::now() + limit })
    }

    /// Has curl ask for something; returns the status of the answer, which is no error's but 404 and 416.
    fn ask(&self, options: &[OsString], url: &str, doing: &dyn Fn() -> String) -> Result<u16> {
        let left = self.until.saturating_duration_since(Instant::now());
        let mut curl = Program::new("curl")
            .args(["--disable", "--silent", "--show-error", "--globoff", "--proto", "=https", "--max-redirs", "5"])
            .args(["--connect-timeout", "20", "--speed-limit", "1", "--speed-time", "60", "--write-out", "status %{http_code}\n"])
            .args(["--max-time", &(left.as_secs() + 1).to_string()])
            .args(options)
            .quietly();
        if let Some(netrc) = &self.netrc {
            curl = curl.arg("--netrc-file").arg(netrc);
        }
        let exited = curl.arg(url).run(left + GRACE, doing)?;
        let after = |words: &str| exited.tail.iter().find_map(|line| line.strip_prefix(words));
        let status = after("status ").and_then(|status| status.parse().ok()).unwrap_or(0);
        match exited.status.code() {
            Some(0) => Ok(status),
            Some(REFUSED) if matches!(status, 404 | 416) => Ok(status),
            Some(NO_PARTS) => Ok(416),
            code => {
                let why = after("curl: (").and_then(|said| said.split_once(") ")).map_or("curl failed", |(_, why)| why).to_owned();
                let error = exited.failed(&why);
                Err(if code.is_none_or(|code| TRANSIENT.contains(&code)) { error.transient() } else { error.of_network() })
            }
        }
    }

    /// Keeps a manifest, and the second time what the server calls it: that may be made of a time in seconds, in
    /// which it can be replaced once more.
    fn keep(&self, manifest: &Path, etag: &Path) -> std::io::Result<()> {
        let (new, kept) = (files::read_foreign(manifest, SMALL)?, self.kept.join(MANIFEST));
        if fs::read(&kept).is_ok_and(|kept| kept == new) {
            return files::write(&self.kept.join(ETAG), &fs::read(etag)?, 0o600);
        }
        files::remove(&self.kept.join(ETAG))?;
        files::write(&kept, &new, 0o600)
    }
}

impl Place for Store {
    fn get(&mut self, remote: &str, local: &Path, limit: u64) -> Result<bool> {
        let url = format!("{}{remote}", self.releases);
        let doing = || format!("fetch {url}");
        let (kept, etag, new) = (self.kept.join(MANIFEST), self.kept.join(ETAG), local.with_extension("etag"));
        let is_manifest = remote.ends_with(MANIFEST);
        let mut options: Vec<OsString> =
            vec!["--fail".into(), "--location".into(), "--max-filesize".into(), limit.to_string().into(), "--output".into(), local.into()];
        if is_manifest {
            options.extend(["--etag-save".into(), OsString::from(&new)]);
            if etag.exists() && kept.exists() {
                options.extend(["--etag-compare".into(), OsString::from(&etag)]);
            }
        } else if local.exists() {
            options.extend(["--continue-at".into(), "-".into()]);
        }
        match self.ask(&options, &url, &doing)? {
            404 => Ok(false),
            304 if is_manifest => fs::copy(kept, local).context(doing).map(|_| true),
            // there is no such rest
            416 if local.exists() => {
                files::clear(local).context(doing)?;
                self.get(remote, local, limit)
            }
            200 | 206 if is_manifest && local.exists() => self.keep(local, &new).context(doing).map(|()| true),
            200 | 206 if local.exists() => Ok(true),
            status => Err(unexpected(status)).context(doing),
        }
    }

    fn put(&mut self, local: &Path, remote: &str) -> Result<()> {
        let Some(reports) = &self.reports else { return Ok(()) };
        let url = format!("{reports}{remote}");
        let doing = || format!("send {url}");
        let options = ["--fail".into(), "--upload-file".into(), local.into(), "--output".into(), "/dev/null".into()];
        match self.ask(&options, &url, &doing)? {
            200..=299 => Ok(()),
            status => Err(unexpected(status)).context(doing),
        }
    }

    fn keeps_reports(&self) -> bool {
        true
    }
}

fn unexpected(status: u16) -> String {
    format!("unexpected HTTP status {status}")
}
