//! Places between two steps at which a test can hold a run, to kill it there or to cut the power.
//! Only builds with the feature `fault-points` have them.

/// All places, in the order in which a run that succeeds, then one that goes back, and then one that has waited for a
/// boot meets them.
#[cfg(feature = "fault-points")]
pub const POINTS: [&str; 31] = [
    "begin: journal opened",
    "begin: request taken",
    "prepare: begun",
    "prepare: inputs updated",
    "prepare: committed",
    "prepare: noted",
    "build: begun",
    "build: built",
    "build: noted",
    "activate: begun",
    "candidate: opened",
    "activate: candidate checked",
    "activate: switching",
    "activate: switched",
    "activate: healthy",
    "activate: persisting",
    "activate: profile set",
    "activate: boot loader set",
    "activate: persisted",
    "accept: saved",
    "accept: branch locked",
    "accept: tree updated",
    "accept: branch moved",
    "conclude: accepted",
    "conclude: reported",
    "back: begun",
    "back: profile restored",
    "back: system restored",
    "boot: begun",
    "boot: well",
    "boot: boot loader set",
];

/// Holds this process if `/run/ekiben-fault` names this place, until that file also says "go on: <place>".
#[cfg(feature = "fault-points")]
pub fn point(name: &str) {
    assert!(POINTS.contains(&name), "{name} is no fault point");
    // the second is where the tests' machines show it to the sandbox of the user's stages
    let files = ["/run/ekiben-fault", "/var/lib/ekiben/root/ekiben-fault"];
    let said = || files.iter().find_map(|file| std::fs::read_to_string(file).ok()).unwrap_or_default();
    let says = |what: &str| said().lines().any(|line| line == what);
    let go_on = format!("go on: {name}");
    if says(name) && !says(&go_on) {
        log::warn!("Held at {name}.");
        while !says(&go_on) {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

#[cfg(not(feature = "fault-points"))]
pub fn point(_name: &str) {}
