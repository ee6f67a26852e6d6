//! What hosts have sent: judged, moved to where no host can write, and acknowledged.
//!
//! A host may put into its directory what it likes. Nothing is taken from there but regular files of
//! bounded size, with names and contents that they should have, and nothing of it decides where
//! anything is written. What is not taken is removed.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ::nix::fcntl::FlockArg;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Context, Error, OrLog, Result};
use crate::fleet::hub::plan::Plan;
use crate::fleet::hub::served::{ServedDirectory, hosts_in};
use crate::fleet::hub::{history, rollout, snapshot, standing};
use crate::fleet::{FORMAT, HEARTBEAT, Heartbeat, LARGE, RECEIVED, Received, Report, SMALL, reports_in};
use crate::gather::{gather, sorted};
use crate::names::{HostName, RunId};
use crate::{files, json};

/// How many reports of one host are kept, and how many bytes of logs.
const KEPT: usize = 100;
const KEPT_BYTES: u64 = 4 * LARGE;
/// How many are remembered as arrived: a host that has more waiting must not send them again and again.
const REMEMBERED: usize = 1000;
/// How many files are looked at in one go.
const AT_ONCE: usize = 10_000;
/// What a heartbeat is called when it is taken.
const TAKEN: &str = "heartbeat.json.taken";
/// What comes after a run's identifier in the names of its report and its log.
const REPORT: &str = ".json";
const LOG: &str = ".log.gz";
/// How long a file may be on its way.
const ON_ITS_WAY: Duration = Duration::from_secs(3600);

/// Collects from all hosts; trouble with one does not keep the others waiting. Nobody does so but the
/// hub's user, whose all has to be that is collected. `goes_on` is to begin waves whose time has come.
pub fn collect(hub: &ServedDirectory, goes_on: bool) -> Result<()> {
    hub.check_ours()?;
    let incomplete = |error: &Error| Error::new(format!("Failed to collect all that hosts have sent: {error}"));
    // or it would never be known, and who was silent meanwhile would have failed
    snapshot::note_return(&hub.collected()).map_err(|error| incomplete(&error))?;
    let (hosts, plan) = (hub.hosts()?, Plan::read(hub));
    // one may have been removed meanwhile
    let is_served = |host| hub.hosts().is_ok_and(|hosts| hosts.contains(host));
    let mut failed: Vec<_> =
        hosts.iter().filter_map(|host| collect_host(hub, host, plan.as_ref()).err().filter(|_| is_served(host))).collect();
    failed.extend(clean_up(hub, &hosts).err());
    failed.extend(goes_on.then(|| rollout::advance(hub)).and_then(Result::err));
    failed.extend(standing::keep(hub).err());
    let all = hosts.into_iter().map(|host| (host.clone(), hub.release(&host), hub.received(&host)));
    failed.extend(snapshot::keep(&hub.collected(), all).err());
    for error in &failed {
        log::error!("{error}.");
    }
    failed.first().map_or(Ok(()), |error| Err(incomplete(error)))
}

/// Takes in what the named hosts have sent, or all; or what a hub elsewhere knows of them, with one more of its files:
/// `exactly`, or as it has collected it last, where it says so of all hosts at once. Returns why what there is to show then
/// is not what hosts have said last.
pub fn take_in(hub: &ServedDirectory, wanted: &[&str], also: Option<&str>, exactly: bool) -> Result<Option<String>> {
    let failed = match hub.elsewhere() {
        Some(elsewhere) => elsewhere.fetch(wanted, also, exactly).map(|()| None)?,
        // a user who may only read sees what was collected before
        None => hub.check_ours().is_ok().then(|| collect(hub, false)).and_then(Result::err),
    };
    Ok(failed.map(|error| error.to_string()).or_else(|| snapshot::stands_still(&hub.collected())))
}

/// Removes what was collected of hosts that the hub neither knows nor serves any more.
fn clean_up(hub: &ServedDirectory, served: &[HostName]) -> Result<()> {
    let Some(known) = hub.known() else { return Ok(()) };
    for host in hosts_in(&hub.collected())?.iter().filter(|host| !known.contains(host) && !served.contains(host)) {
        files::clear(&hub.received(host)).doing("remove", &hub.received(host))?;
    }
    Ok(())
}

fn collect_host(hub: &ServedDirectory, host: &HostName, plan: Option<&Plan>) -> Result<()> {
    let (reports, received) = (hub.reports(host), hub.received(host));
    let doing = || format!("collect from {}", reports.display());
    fs::create_dir_all(&received).doing("create", &received)?;
    let _turn = files::lock(&received, FlockArg::LockExclusive)?;
    // what is taken and removed below is in this very directory, whatever becomes of the path
    let opened = hub.open_reports(host).context(doing)?;
    let directory = PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()));
    let now = SystemTime::now();
    let (mut logs, mut others) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(&directory).context(doing)?.take(AT_ONCE) {
        let entry = entry.context(doing)?;
        let time = entry.metadata().and_then(|metadata| metadata.modified()).unwrap_or(now);
        // a log is nothing without its report
        let found = if entry.path().extension().is_some_and(|end| end == "gz") { &mut logs } else { &mut others };
        found.push((time, entry.file_name()));
    }
    let take_all = |found: Vec<(SystemTime, OsString)>, index: &Received| {
        sorted(found).into_iter().try_for_each(|(time, name)| take_one(&received, host, &directory, &name, time, index))
    };
    let mut index = hub.index(host);
    take_all(others, &index)?;
    let new = update(&received, &mut index)?;
    take_all(logs, &index)?;
    prune(&received, &index, 0)?;
    if new {
        files::write_json(&hub.index_file(host), &index, 0o644)?;
    }
    if !index.reports.is_empty() {
        // for the host; publishers may write there, too: it is put right each time
        files::put_json(&hub.release(host).join(RECEIVED), &index, 0o644)?;
    }
    // what is published is not the host's doing
    history::note(hub, host, plan, true).or_warn();
    Ok(())
}

/// Why a file was not taken.
enum Left {
    /// It may be on its way still, or what belongs to it.
    NotYet,
    Odd(String),
    /// Nor can it be removed.
    ForEver(String),
    Failed(Error),
}

/// Takes the file of this name, or removes it, or leaves it for another time.
fn take_one(received: &Path, host: &HostName, directory: &Path, name: &OsStr, time: SystemTime, index: &Received) -> Result<()> {
    let mut path = directory.join(name);
    let name = name.to_str().unwrap_or_default();
    let aside = directory.join(TAKEN);
    // it could be taken from there, and not kept here
    let name = if name == TAKEN { HEARTBEAT } else { name };
    // or one that arrives just now would be removed in the place of the one that was read
    if name == HEARTBEAT && fs::rename(&path, &aside).is_ok() {
        path = aside;
    }
    let is_young = time.elapsed().unwrap_or_else(|error| error.duration()) < ON_ITS_WAY;
    match take(received, host, name, &path, time.min(SystemTime::now()), index) {
        Ok(()) => {}
        Err(Left::NotYet) if is_young => return Ok(()),
        Err(Left::NotYet) => log::warn!("Dropped {name:?} of {host}: its report is missing."),
        Err(Left::Odd(why)) => log::warn!("Dropped {name:?} of {host}: {why}."),
        Err(Left::ForEver(why)) => {
            log::warn!("Skipped {name:?} of {host}: {why}.");
            return Ok(());
        }
        Err(Left::Failed(error)) => return Err(error),
    }
    let removed = files::if_there(fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path)));
    removed.context(|| format!("remove {name:?} of {host}")).or_warn();
    Ok(())
}

/// Takes the file `path`, which was sent by this name.
fn take(received: &Path, host: &HostName, name: &str, path: &Path, time: SystemTime, index: &Received) -> Result<(), Left> {
    let target = received.join(name);
    let run = |end| name.strip_suffix(end).and_then(|run| RunId::try_from(run).ok());
    let (log, report) = (run(LOG), run(REPORT));
    if name != HEARTBEAT && report.is_none() && log.is_none() {
        return Err(if path.extension().is_some_and(|end| end == "new") { Left::NotYet } else { Left::Odd("unexpected file name".into()) });
    }
    let bytes = files::read_foreign(path, if log.is_some() { LARGE } else { SMALL }).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Left::NotYet,
        // the host's doing or the hub's: nothing is lost by leaving it there
        ErrorKind::PermissionDenied => Left::ForEver(error.to_string()),
        _ => Left::Odd(error.to_string()),
    })?;
    let judged = if let Some(run) = log {
        if !received.join(format!("{run}{REPORT}")).exists() {
            return Err(Left::NotYet);
        }
        prune(received, index, bytes.len() as u64).map_err(Left::Failed)?;
        Ok(bytes)
    } else if let Some(run) = report {
        let is_right = |report: &Report| (report.format, &report.host, report.run.id.as_str()) == (FORMAT, host, &run);
        judge(&bytes, is_right, &format!("a report of format {FORMAT} by {host} on {run}"))
    } else {
        let is_right = |heartbeat: &Heartbeat| (heartbeat.format, &heartbeat.host) == (FORMAT, host);
        judge(&bytes, is_right, &format!("a heartbeat of format {FORMAT} by {host}"))
    };
    let written = files::write(&target, &judged.map_err(Left::Odd)?, 0o644);
    // when it arrived
    let written = written.and_then(|()| File::options().append(true).open(&target)?.set_modified(time));
    written.doing("write", &target).map_err(Left::Failed)
}

fn judge<T: DeserializeOwned + Serialize>(bytes: &[u8], is_right: impl Fn(&T) -> bool, expected: &str) -> Result<Vec<u8>, String> {
    let said: T = json::parse_foreign(bytes).map_err(|error| error.to_string())?;
    if !is_right(&said) {
        return Err(format!("expected {expected}"));
    }
    serde_json::to_vec_pretty(&said).map_err(|error| error.to_string())
}

/// Adds the reports that are new to the index. Returns whether there are any.
fn update(received: &Path, index: &mut Received) -> Result<bool> {
    let mut new = reports_in(received)?;
    let known: BTreeSet<_> = gather(&index.reports);
    new.retain(|run| !known.contains(run));
    let is_new = !new.is_empty();
    index.reports.extend(new);
    index.reports.drain(..index.reports.len().saturating_sub(REMEMBERED));
    Ok(is_new)
}

/// Removes all reports but the newest, so that there is room for another `bytes` of logs.
fn prune(received: &Path, index: &Received, mut bytes: u64) -> Result<()> {
    let mut kept = 0;
    for run in index.reports.iter().rev() {
        let (report, log) = (received.join(format!("{run}{REPORT}")), received.join(format!("{run}{LOG}")));
        kept += usize::from(report.exists());
        bytes += fs::metadata(&log).map_or(0, |metadata| metadata.len());
        if kept > KEPT || bytes > KEPT_BYTES {
            files::remove(&log).and_then(|()| files::remove(&report)).doing("remove", &report)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::hub::holds::Holds;
    use crate::testing::Directory;
    use serde_json::{Value, json};
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    struct Fixture {
        hub: ServedDirectory,
        place: Directory,
        host: HostName,
    }

    impl Fixture {
        fn new() -> Self {
            let place = Directory::new();
            let hub = ServedDirectory::new(place.path()).unwrap();
            let host = HostName::try_from("web").unwrap();
            for directory in [hub.release(&host), hub.reports(&host), place.path().join("received")] {
                fs::create_dir_all(directory).unwrap();
            }
            Self { hub, place, host }
        }

        fn sent(&self, name: &str) -> PathBuf {
            self.hub.reports(&self.host).join(name)
        }

        fn got(&self, name: &str) -> PathBuf {
            self.hub.received(&self.host).join(name)
        }

        fn send(&self, name: &str, value: &Value) {
            fs::write(self.sent(name), value.to_string()).unwrap();
        }

        fn collect(&self) {
            collect(&self.hub, true).unwrap();
        }

        fn index(&self) -> Vec<String> {
            self.hub.index(&self.host).reports.into_iter().map(|run| run.to_string()).collect()
        }

        fn kept(&self) -> usize {
            let names = fs::read_dir(self.hub.received(&self.host)).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
            names.filter(|name| name.strip_suffix(REPORT).is_some_and(|run| RunId::try_from(run).is_ok())).count()
        }

        fn left(&self) -> usize {
            fs::read_dir(self.hub.reports(&self.host)).unwrap().count()
        }
    }

    fn run(number: usize) -> String {
        format!("{number:032x}")
    }

    fn report(host: &str, run: &str) -> Value {
        json!({
            "format": 1, "host": host, "system": "/nix/store/0123456789abcdfghijklmnpqrsvwxyz-x", "id": run, "result": "failed", "trigger": "timer", "started": 0,
            "finished": 0, "commit": null, "summary": null, "stage": "build", "error": "\u{1b}[31mno", "warnings": [], "rebootNeeded": false,
        })
    }

    fn heartbeat(host: &str) -> Value {
        json!({
            "format": 1, "host": host, "version": "\u{7}", "seen": null, "deployed": null, "system": "/nix/store/0123456789abcdfghijklmnpqrsvwxyz-x", "running": null,
            "last": null, "runs": 0, "selfUpdated": false, "rebootNeeded": false, "unheardOf": true,
        })
    }

    #[test]
    fn what_one_publisher_leaves_hides_no_other_host() {
        let fixture = Fixture::new();
        for directory in ["heard", "rollout"] {
            fs::create_dir(fixture.place.path().join(directory)).unwrap();
        }
        let signed = json!({ "manifest": r#"{"format": 99}"#, "signature": null });
        fs::write(fixture.hub.release(&fixture.host).join("manifest.json"), signed.to_string()).unwrap();
        let wave = json!({ "hosts": ["*"], "soak": 0, "mayFail": 0, "waitForSilent": false });
        for waves in [json!([]), json!([wave])] {
            let plan = json!({ "format": 1, "id": "x", "waves": waves, "hosts": [] });
            fs::write(Plan::file(&fixture.hub), plan.to_string()).unwrap();
            fs::write(fixture.place.path().join("received/rollout.json"), r#"{"id": "x", "wave": 9}"#).unwrap();
            fixture.collect();
            fs::remove_file(fixture.place.path().join("received").join(snapshot::FILE)).unwrap();
            fs::remove_file(fixture.hub.heard()).unwrap();
        }
        fs::write(Holds::file(&fixture.hub), "{").unwrap();
        collect(&fixture.hub, true).unwrap_err();
        assert!(fixture.place.path().join("received").join(snapshot::FILE).exists());
    }

    #[test]
    fn what_a_newer_host_says_is_heard_and_a_damaged_index_is_made_anew() {
        let fixture = Fixture::new();
        let mut newer = [heartbeat("web"), report("web", &run(1))];
        newer[0]["last"] = json!({"release": null, "result": "quarantined", "stage": "newer", "error": "x", "finished": 0});
        (newer[1]["result"], newer[1]["stage"], newer[1]["trigger"]) = ("quarantined".into(), "newer".into(), "newer".into());
        fixture.send("heartbeat.json", &newer[0]);
        fixture.send(&format!("{}.json", run(1)), &newer[1]);
        fixture.collect();
        let (heard, _) = fixture.hub.heartbeat(&fixture.host).unwrap().expect("it was dropped");
        assert_eq!(heard.last.unwrap().result.to_string(), "unknown");
        assert_eq!(fixture.index(), [run(1)]);
        for damaged in ["", "{", "\0\0"] {
            fs::write(fixture.hub.index_file(&fixture.host), damaged).unwrap();
            fixture.send(&format!("{}.json", run(2)), &report("web", &run(2)));
            fixture.collect();
            assert_eq!(fixture.index(), [run(1), run(2)], "{damaged}");
        }
    }

    #[test]
    fn a_heartbeat_that_arrives_meanwhile_is_not_lost() {
        let fixture = Fixture::new();
        for number in 0..200 {
            let mut newer = heartbeat("web");
            newer["runs"] = number.into();
            fixture.send("heartbeat.json", &heartbeat("web"));
            fixture.send("heartbeat.json.new", &newer);
            std::thread::scope(|scope| {
                scope.spawn(|| fixture.collect());
                // at another moment each time
                std::thread::sleep(Duration::from_micros(number * 10));
                fs::rename(fixture.sent("heartbeat.json.new"), fixture.sent("heartbeat.json")).unwrap();
            });
            fixture.collect();
            assert_eq!(u64::from(fixture.hub.heartbeat(&fixture.host).unwrap().unwrap().0.runs), number);
        }
    }

    #[test]
    fn what_is_right_is_taken_and_acknowledged() {
        let fixture = Fixture::new();
        fixture.send("heartbeat.json", &heartbeat("web"));
        for number in [3, 1] {
            fixture.send(&format!("{}.json", run(number)), &report("web", &run(number)));
            fs::write(fixture.sent(&format!("{}.log.gz", run(number))), "log").unwrap();
            fixture.collect();
        }
        assert_eq!(fixture.left(), 0);
        assert_eq!(fixture.index(), [run(3), run(1)]);
        assert_eq!(fs::read(fixture.got(&format!("{}.log.gz", run(3)))).unwrap(), b"log");
        // fit for a terminal
        let (heartbeat, arrived) = fixture.hub.heartbeat(&fixture.host).unwrap().unwrap();
        assert_eq!(heartbeat.version, "\u{fffd}");
        assert!(arrived.elapsed().unwrap() < Duration::from_secs(60));
        assert!(!fs::read_to_string(fixture.got(&format!("{}.json", run(1)))).unwrap().contains("\\u001b"));
        // the same again changes nothing
        fixture.send(&format!("{}.json", run(3)), &report("web", &run(3)));
        fixture.collect();
        assert_eq!(fixture.index(), [run(3), run(1)]);
        // what was cut off between taking and keeping it, or found a full disk
        fs::remove_file(fixture.got("heartbeat.json")).unwrap();
        fixture.send(TAKEN, &self::heartbeat("web"));
        fixture.collect();
        assert!(fixture.got("heartbeat.json").exists() && fixture.left() == 0);
    }

    #[test]
    fn what_is_hostile_is_dropped() {
        let fixture = Fixture::new();
        let secret = fixture.place.path().join("secret");
        fs::write(&secret, report("web", &run(1)).to_string()).unwrap();
        symlink(&secret, fixture.sent(&format!("{}.json", run(1)))).unwrap();
        ::nix::unistd::mkfifo(&fixture.sent(&format!("{}.json", run(2))), ::nix::sys::stat::Mode::S_IRWXU).unwrap();
        fixture.send(&format!("{}.json", run(3)), &report("web2", &run(3)));
        fixture.send(&format!("{}.json", run(4)), &report("web", &run(5)));
        let huge = fs::File::create(fixture.sent(&format!("{}.json", run(6)))).unwrap();
        huge.set_len(SMALL + 1).unwrap();
        fs::create_dir_all(fixture.sent(&format!("{}.json", run(7))).join("sub")).unwrap();
        for name in ["a.json", "..json", &format!("{}.JSON", run(8)), &format!("{}.json", run(8).replace('0', "A")), "x\u{1b}[31m"] {
            fixture.send(name, &report("web", name.trim_end_matches(".json")));
        }
        fs::write(fixture.sent(&format!("{}.json", run(9))), "[".repeat(100_000)).unwrap();
        fixture.send(&format!("{}.json", run(10)), &json!({"format": 2, "host": "web", "id": run(10)}));
        fixture.send("heartbeat.json", &heartbeat("web2"));
        symlink(&secret, fixture.sent("heartbeat.json.new")).unwrap();
        fixture.collect();
        assert_eq!(fixture.left(), 1, "what may be on its way is left");
        assert_eq!(fs::read_dir(fixture.hub.received(&fixture.host)).unwrap().count(), 0);
        assert!(secret.exists() && !fixture.hub.release(&fixture.host).join("received.json").exists());
    }

    #[test]
    fn nothing_is_taken_or_removed_through_a_link() {
        for link in ["hosts/web/reports", "hosts/web"] {
            let fixture = Fixture::new();
            let (link, elsewhere) = (fixture.place.path().join(link), fixture.place.path().join("elsewhere"));
            fs::create_dir_all(elsewhere.join("reports")).unwrap();
            fs::write(elsewhere.join("thesis"), "").unwrap();
            fs::write(elsewhere.join("reports/thesis"), "").unwrap();
            fs::remove_dir_all(&link).unwrap();
            symlink(&elsewhere, &link).unwrap();
            assert!(collect(&fixture.hub, true).is_err());
            assert!(elsewhere.join("thesis").exists() && elsewhere.join("reports/thesis").exists());
        }
    }

    #[test]
    fn nobody_collects_for_somebody_else() {
        let fixture = Fixture::new();
        fixture.send("heartbeat.json", &heartbeat("web"));
        let received = fixture.place.path().join("received");
        fs::remove_dir(&received).unwrap();
        assert!(collect(&fixture.hub, true).is_err() && !received.exists());
        symlink("/proc/1", &received).unwrap();
        take_in(&fixture.hub, &[], None, true).unwrap();
        assert_eq!(fixture.left(), 1);
    }

    #[test]
    fn nothing_becomes_more_on_this_disk_than_it_was_on_its_way() {
        let fixture = Fixture::new();
        for number in 1..4 {
            fixture.send(&format!("{}.json", run(number)), &report("web", &run(number)));
            fs::write(fixture.sent(&format!("{}.log.gz", run(number))), "x").unwrap();
        }
        File::options().append(true).open(fixture.sent(&format!("{}.log.gz", run(2)))).unwrap().set_len(LARGE).unwrap();
        fixture.collect();
        assert_eq!(fixture.left(), 0);
        assert!(fixture.got(&format!("{}.log.gz", run(1))).exists() && !fixture.got(&format!("{}.log.gz", run(2))).exists());
        // the oldest make room before the next is written
        File::create(fixture.got(&format!("{}.log.gz", run(1)))).unwrap().set_len(KEPT_BYTES).unwrap();
        prune(&fixture.hub.received(&fixture.host), &fixture.hub.index(&fixture.host), 1).unwrap();
        assert!(!fixture.got(&format!("{}.log.gz", run(1))).exists() && fixture.got(&format!("{}.log.gz", run(3))).exists());
    }

    #[test]
    fn what_others_write_beside_a_release_counts_for_nothing() {
        let fixture = Fixture::new();
        fixture.send(&format!("{}.json", run(1)), &report("web", &run(1)));
        fixture.collect();
        let told = fixture.hub.release(&fixture.host).join(RECEIVED);
        let right = fs::read(&told).unwrap();
        fs::write(fixture.place.path().join("precious.json"), "").unwrap();
        let names: Vec<_> =
            (0..REMEMBERED).map(|number| format!("../../precious{number}")).chain(["../../precious".into(), "x\n!id".into()]).collect();
        let sparse = || File::create(&told).unwrap().set_len(1 << 32).unwrap();
        let ways: [&dyn Fn(); 5] = [
            &|| fs::write(&told, json!({ "reports": names }).to_string()).unwrap(),
            &|| fs::write(&told, json!({ "reports": [run(1), run(2)] }).to_string()).unwrap(),
            &|| fs::write(&told, "{").unwrap(),
            &sparse,
            &|| fs::remove_file(&told).unwrap(),
        ];
        for way in ways {
            way();
            fs::create_dir_all(told.with_extension("json.new")).unwrap();
            fixture.collect();
            assert_eq!(fs::read(&told).unwrap(), right);
            assert_eq!(fixture.index(), [run(1)]);
        }
        assert!(fixture.place.path().join("precious.json").exists() && fixture.got(&format!("{}.json", run(1))).exists());
    }

    #[test]
    fn what_is_on_its_way_has_an_hour() {
        let fixture = Fixture::new();
        let names = ["heartbeat.json.new".to_owned(), format!("{}.log.gz", run(1))];
        for name in &names {
            fixture.send(name, &Value::Null);
        }
        fixture.collect();
        assert_eq!(fixture.left(), 2);
        for (name, time) in names.iter().zip([SystemTime::now() - 2 * ON_ITS_WAY, SystemTime::now() + 2 * ON_ITS_WAY]) {
            File::options().append(true).open(fixture.sent(name)).unwrap().set_modified(time).unwrap();
        }
        fixture.collect();
        assert_eq!(fixture.left(), 0);
    }

    #[test]
    fn no_host_is_heard_of_in_the_future() {
        let fixture = Fixture::new();
        fixture.send("heartbeat.json", &heartbeat("web"));
        let file = File::options().append(true).open(fixture.sent("heartbeat.json")).unwrap();
        file.set_modified(SystemTime::now() + Duration::from_secs(100_000)).unwrap();
        fixture.collect();
        assert!(fixture.hub.heartbeat(&fixture.host).unwrap().unwrap().1 <= SystemTime::now());
    }

    #[test]
    fn the_newest_are_kept() {
        let fixture = Fixture::new();
        for number in (0..KEPT + 20).rev() {
            let name = format!("{}.json", run(number));
            fixture.send(&name, &report("web", &run(number)));
            let file = File::options().append(true).open(fixture.sent(&name)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(number as u64)).unwrap();
            if number % 20 == 0 {
                fixture.collect();
            }
        }
        let index = fixture.index();
        assert_eq!((index.len(), index.last()), (KEPT + 20, Some(&run(0))));
        assert_eq!(fixture.kept(), KEPT);
        assert!(fixture.got(&format!("{}.json", run(0))).exists() && !fixture.got(&format!("{}.json", run(KEPT + 19))).exists());
        // an old one that is sent again is not a new one
        fixture.send(&format!("{}.json", run(KEPT + 19)), &report("web", &run(KEPT + 19)));
        fixture.collect();
        assert_eq!(fixture.index(), index);
        assert_eq!(fixture.kept(), KEPT);
    }

    #[test]
    fn trouble_with_one_host_is_not_the_others() {
        let fixture = Fixture::new();
        let release = fixture.hub.release(&"a".try_into().unwrap());
        fs::create_dir_all(&release).unwrap();
        fixture.send("heartbeat.json", &heartbeat("web"));
        let error = collect(&fixture.hub, true).unwrap_err().to_string();
        let of_a = format!("Failed to collect from {}: ", release.with_file_name("reports").display());
        let expected = format!("Failed to collect all that hosts have sent: {of_a}No such file or directory (os error 2)");
        assert_eq!(error, expected);
        assert!(fixture.got("heartbeat.json").exists());
    }
}
