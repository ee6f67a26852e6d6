//! The instances' own services, in systemd's hands: whether one is at work, and which of its starts are to be; and starts of
//! other units of ours.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Context, OrLog, Result};
use crate::names::RunId;
use crate::program::Program;
use crate::system::properties::Properties;
use crate::system::units::files;
use crate::system::{PAUSE, RUNTIME, again, has_unit, make_runtime_directory, microseconds, systemctl, unless_soon};

/// So many looks at which a run is at work mean that it is not at its very end.
const LOOKS: u32 = 3;

/// The unit of an instance's runs.
pub fn unit(instance: &str) -> String {
    format!("ekiben-{instance}.service")
}

/// Has the instance's service start, without waiting for it; for root only.
pub fn start(instance: &str) -> Result<()> {
    enqueue("start", &unit(instance))
}

/// Asks systemd for a job, `how` systemctl calls that, without waiting for it.
fn enqueue(how: &str, service: &str) -> Result<()> {
    again(|| Program::as_root("systemctl").args([how, "--no-block", "--", service]).output(|| format!("{how} {service}"), None)).map(drop)
}

/// Has units start, and waits for that, until a limit in seconds; for root only.
pub fn start_all(units: &[String], limit: u64) -> Result<()> {
    if units.is_empty() {
        return Ok(());
    }
    let start = Program::as_root("systemctl").args(["start", "--"]).args(units);
    start.run(Duration::from_secs(limit), || format!("start {}", units.join(", ")))?.success()
}

/// Has a unit run, or run again, without waiting for it, where there is one; for root only.
pub fn start_if_there(unit: &str) {
    if files(unit).iter().any(|file| has_unit(file)) {
        let start = Program::as_root("systemctl").args(["restart", "--no-block", "--", unit]);
        start.output(|| format!("start {unit}"), None).or_warn();
    }
}

/// Waits until systemd has started all that it is to, but for what waits for units of ours; or until a limit, in seconds.
pub fn wait_for_jobs(limit: u64) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(limit);
    let is_busy = |job: &Job| job.state == "running" && !job.unit.starts_with("ekiben");
    while jobs(&[])?.iter().any(is_busy) && Instant::now() < until {
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// Whether the instance's service is at work on this run.
pub fn is_at_work(instance: &str, run: &RunId) -> Result<bool> {
    let shown = systemctl(&["show", "--property=InvocationID,ActiveState", "--", &unit(instance)])?;
    let shown = Properties::one(&shown);
    Ok(shown.of("InvocationID") == &**run && !["inactive", "failed"].contains(&shown.of("ActiveState")))
}

/// The same for who may not ask systemd: whether it has had processes for a while.
pub fn has_been_at_work(instance: &str) -> bool {
    let group = Path::new("/sys/fs/cgroup/system.slice").join(unit(instance));
    (0..LOOKS).all(|look| {
        if look > 0 {
            thread::sleep(PAUSE);
        }
        group.exists()
    })
}

/// Cancels a start of the instance's service that waits for the end of the present run; has another run follow
/// if a timer has elapsed meanwhile and `may_follow`.
///
/// A run that is put back after its unit has failed reloads systemd. Its path unit then looks again, and may ask for
/// a start that nobody needs. The start that a timer asks for, on the other hand, is lost: for systemd, it is the one
/// that is under way.
pub fn sort_out_starts(instance: &str, may_follow: bool) -> Result<()> {
    let service = unit(instance);
    let look = format!("ekiben-look@{instance}.service");
    if may_follow && timer_has_elapsed(&service, &look)? {
        return start_as_due(instance, "restart");
    }
    cancel_jobs(instance, |job| job.kind == "start" && job.state == "waiting")
}

/// Has the instance's service start since a timer has elapsed, `how` systemctl calls that.
pub fn start_as_due(instance: &str, how: &str) -> Result<()> {
    let service = unit(instance);
    if !has_unit(&service) {
        // a switch has taken the instance away
        return Ok(());
    }
    enqueue(how, &service)?;
    let mark = |job| make_runtime_directory().and_then(|()| fs::write(due(instance), job)).doing("write", &due(instance));
    job(&service).and_then(mark).or_warn();
    Ok(())
}

/// Whether the service has been started by [`start_as_due`], and not by somebody after that start was cancelled.
pub fn is_due(instance: &str) -> bool {
    let Ok(marked) = fs::read_to_string(due(instance)) else { return false };
    let is_due = job(&unit(instance)).is_ok_and(|job| job == marked);
    if !is_due {
        forget_due(instance);
    }
    is_due
}

/// The next start is another one.
pub fn forget_due(instance: &str) {
    let _ = fs::remove_file(due(instance));
}

/// Whether what could not begin is to be started again as due.
pub fn was_due(instance: &str) -> bool {
    due(instance).exists()
}

fn due(instance: &str) -> PathBuf {
    Path::new(RUNTIME).join(format!("{instance}.due"))
}

/// What tells the job that starts a unit from all others of this boot.
fn job(unit: &str) -> Result<String> {
    // far less work for systemd than to show the unit
    Ok(jobs(&[unit])?.into_iter().next().map(|job| job.id).unwrap_or_default())
}

fn cancel_jobs(instance: &str, which: impl Fn(&Job) -> bool) -> Result<()> {
    for Job { id, .. } in jobs(&[&unit(instance)])?.into_iter().filter(which) {
        Program::as_root("systemctl").args(["cancel", &id]).output(|| format!("cancel job {id}"), None)?;
    }
    Ok(())
}

/// One of systemd's jobs.
struct Job {
    id: String,
    unit: String,
    kind: String,
    state: String,
}

/// The jobs of these units, or all.
fn jobs(units: &[&str]) -> Result<Vec<Job>> {
    let list = systemctl(&[&["list-jobs", "--no-legend", "--full", "--no-pager", "--"], units].concat())?;
    let job = |line: &str| {
        let mut words = line.split_whitespace().map(String::from);
        Some(Job { id: words.next()?, unit: words.next()?, kind: words.next()?, state: words.next()? })
    };
    Ok(list.lines().filter_map(job).collect())
}

/// Whether a timer of a service, or of the look before it, has elapsed since that was started.
fn timer_has_elapsed(service: &str, look: &str) -> Result<bool> {
    // since the machine booted: no clock is set in between
    let ask = |what: &str, units: &str| systemctl(&["show", what, "--", units]);
    // of a timer, there is little for systemd to show
    let timers = ask("--property=Unit,LastTriggerUSecMonotonic", "*.timer")?;
    let ours: Vec<_> = Properties::all(&timers).filter(|timer| [service, look].contains(&timer.of("Unit"))).collect();
    if ours.is_empty() {
        return Ok(false);
    }
    let started = ask("--property=InactiveExitTimestampMonotonic", service)?;
    let started = Properties::one(&started).of("InactiveExitTimestampMonotonic");
    let started: u64 = started.parse().context(|| format!("find out when {service} was started"))?;
    Ok(ours.iter().any(|timer| microseconds(timer.of("LastTriggerUSecMonotonic")).is_some_and(|elapsed| elapsed > started)))
}

/// Has a system activated by the instance's own service, which must not be waited for by that: by a start of it, or
/// by one of its timer or path unit while a stop of it is under way. The service goes on without its jobs.
pub fn letting_go_of_jobs<T>(instance: &str, activate: impl FnOnce() -> T) -> T {
    unless_soon(activate, || {
        cancel_jobs(instance, |_| true).or_warn();
    })
}
