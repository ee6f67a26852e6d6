//! The fleet's repository: which hosts are in it, and the archives of their configurations.

pub mod evaluation;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::error::{Context, Error, Result};
use crate::fleet::Provenance;
use crate::fleet::archive::pack;
use crate::fleet::archive::unpack::unpack;
use crate::fleet::hub::jobs;
use crate::fleet::hub::settings::Settings;
use crate::fleet::temporary::{Temporary, home};
use crate::gather::sorted;
use crate::names::{HostName, ObjectId, Sha256};
use crate::{files, git, text};

/// A directory with configurations, packed.
pub struct Packed {
    /// Where it is in the repository.
    pub place: String,
    /// Where that is.
    pub directory: PathBuf,
    /// Where its archive is, once it has been asked for: see [`FleetRepository::provide`].
    pub archive: PathBuf,
    /// The archive's hash.
    pub sha256: Sha256,
    /// Its size in bytes.
    pub size: u64,
    is_flake: bool,
}

impl Packed {
    /// The lock file of a flake: one that several share is a link.
    pub fn lock_file(&self) -> PathBuf {
        let path = self.directory.join("flake.lock");
        path.canonicalize().unwrap_or(path)
    }
}

/// A host.
pub struct Host {
    /// Its name.
    pub name: HostName,
    /// The attribute of its flake's `nixosConfigurations`; `None` for a plain `configuration.nix`.
    pub attr: Option<HostName>,
    /// Where its configuration is.
    pub source: Arc<Packed>,
}

/// What kept hosts from being found, and in which places.
pub type Failed = Vec<(String, Error)>;

/// The repository, with a place for what is remembered and one for what is not.
pub struct FleetRepository {
    directory: PathBuf,
    origin: pack::Origin,
    flags: Vec<String>,
    /// For how long what is evaluated or built of one host may take.
    pub limit: Option<Duration>,
    state: PathBuf,
    scratch: Temporary,
    turn: Mutex<()>,
}

impl FleetRepository {
    /// Opens the one in this directory.
    pub fn open(directory: &Path, settings: &Settings) -> Result<Self> {
        let state = home("XDG_STATE_HOME", ".local/state")?;
        for name in ["logs", "evaluated", "packed", "systems"] {
            fs::create_dir_all(state.join(name)).doing("create", &state.join(name))?;
        }
        let origin = pack::Origin::new(directory, settings.signing_key.as_deref())?;
        let (directory, flags, scratch) = (directory.to_owned(), settings.flags.clone(), Temporary::new()?);
        Ok(Self { directory, origin, flags, limit: None, state, scratch, turn: Mutex::default() })
    }

    /// Where a configuration may be: the repository itself, and the directories of `hosts`. True is a
    /// flake, false a plain configuration.
    fn places(&self) -> Result<Vec<(String, bool)>> {
        let hosts = self.directory.join("hosts");
        let mut names = Vec::new();
        for entry in fs::read_dir(&hosts).doing("read", &hosts)? {
            let entry = entry.doing("read", &hosts)?;
            let name = entry.file_name().into_string().map_err(|name| format!("its name {name:?} is not UTF-8"));
            names.push(format!("hosts/{}", name.context(|| format!("read {:?}", entry.path()))?));
        }
        let mut places = Vec::new();
        for place in sorted(names).into_iter().chain([".".to_owned()]) {
            let has = |file| self.directory.join(&place).join(file).exists();
            if has("flake.nix") {
                places.push((place, true));
            } else if place != "." && has("configuration.nix") {
                places.push((place, false));
            } else if place != "." && self.directory.join(&place).is_dir() {
                log::warn!("{place} has neither flake.nix nor configuration.nix.");
            }
        }
        Ok(places)
    }

    fn pack(&self, place: &str, is_flake: bool) -> Result<Packed> {
        let directory = if place == "." { self.directory.clone() } else { self.directory.join(place) };
        let files = self.files(place, &directory)?;
        let archive = self.scratch.path().join(format!("{}.tar.gz", label(place)));
        let (known, stamp) = (self.known(place), || pack::stamp(&directory, &files, &self.origin));
        let now = stamp();
        let before =
            files::read_json::<(Option<String>, Sha256, u64)>(&known).ok().flatten().filter(|(then, ..)| then.is_some() && *then == now);
        let (sha256, size) = if let Some((_, sha256, size)) = before {
            (sha256, size)
        } else {
            let (sha256, size, is_plain) = pack::pack(&directory, &files, &self.origin, &archive)?;
            // what there is something to say of is said each time
            if is_plain && now.is_some() && stamp() == now {
                // a part of it is as good as none
                let text = serde_json::to_vec_pretty(&(now, &sha256, size)).unwrap_or_default();
                fs::write(&known, text).doing("write", &known)?;
            }
            (sha256, size)
        };
        Ok(Packed { place: place.to_owned(), directory, archive, sha256, size, is_flake })
    }

    fn files(&self, place: &str, directory: &Path) -> Result<Vec<PathBuf>> {
        if place == "." { pack::tracked_files(directory) } else { pack::files(directory, &self.origin) }
    }

    /// Where it is remembered what the files of a place were packed to.
    fn known(&self, place: &str) -> PathBuf {
        self.state.join("packed").join(format!("{}.json", label(place)))
    }

    /// Makes an archive of which the contents were known so far.
    pub fn provide(&self, source: &Packed) -> Result<()> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if source.archive.exists() {
            return Ok(());
        }
        let files = self.files(&source.place, &source.directory)?;
        let new = source.archive.with_extension("new");
        let (sha256, size, _) = pack::pack(&source.directory, &files, &self.origin, &new)?;
        let doing = || format!("pack {}", source.place);
        if (&sha256, size) != (&source.sha256, source.size) {
            files::remove(&self.known(&source.place)).context(doing)?;
            return Err("it has been changed meanwhile, or tar or gzip have been; try again").context(doing);
        }
        fs::rename(new, &source.archive).context(doing)
    }

    /// The names of all hosts, as they were when they were looked at last; those of what was not are found now.
    pub fn names(&self) -> Result<BTreeSet<HostName>> {
        let mut names = BTreeSet::new();
        for (place, is_flake) in self.places()? {
            match self.names_known(&place).filter(|_| is_flake) {
                Some(known) => names.extend(known),
                None if is_flake => names.extend(self.hosts_in(self.pack(&place, true)?)?.into_iter().map(|host| host.name)),
                None => names.extend(HostName::try_from(place.trim_start_matches("hosts/"))),
            }
        }
        Ok(names)
    }

    /// What git says of what is published; nothing, where nothing is committed.
    pub fn commit(&self) -> Provenance {
        let git = |arguments: &[&str]| {
            let doing = || format!("read the last commit of {}", self.directory.display());
            git::git(&self.directory).args(arguments).said(doing).ok()
        };
        let said = git(&["log", "-1", "--format=%H%n%an <%ae>%n%s"]).unwrap_or_default();
        let mut lines = said.lines().map(text::line);
        let commit = lines.next().and_then(|commit| ObjectId::try_from(commit).ok());
        let dirty = commit.is_some() && git(&["status", "--porcelain"]).is_none_or(|said| !said.is_empty());
        Provenance { commit, author: lines.next(), summary: lines.next(), dirty }
    }

    /// Which of these commits are not part of the last one. A clone that is shallow knows of none.
    pub fn lacks(&self, commits: BTreeSet<ObjectId>) -> BTreeSet<ObjectId> {
        let git = |arguments: &[&str]| {
            let git = git::git(&self.directory).env("GIT_NO_LAZY_FETCH", "1").args(arguments);
            git.said(|| format!("compare commits of {}", self.directory.display()))
        };
        let all: Vec<&str> = commits.iter().map(|commit| &**commit).collect();
        let has_all = || git(&[&["rev-list", "--max-count=1"], &all[..], &["--not", "HEAD"]].concat()).is_ok_and(|said| said.is_empty());
        if all.is_empty() || has_all() || git(&["rev-parse", "--is-shallow-repository"]).is_ok_and(|said| said.trim() == "true") {
            return BTreeSet::new();
        }
        commits.into_iter().filter(|commit| git(&["merge-base", "--is-ancestor", commit, "HEAD"]).is_err()).collect()
    }

    /// Packs all directories with a flake.
    pub fn flakes(&self) -> Result<Vec<Packed>> {
        self.places()?.iter().filter(|(_, is_flake)| *is_flake).map(|(place, _)| self.pack(place, true)).collect()
    }

    /// Finds all hosts, and what kept others from being found, and where.
    pub fn hosts(&self, jobs: usize) -> Result<(Vec<Host>, Failed)> {
        let look = |(place, is_flake): &(String, bool)| self.pack(place, *is_flake).and_then(|source| self.hosts_in(source));
        let (mut hosts, mut failed) = (Vec::new(), Vec::new());
        let places = self.places()?;
        for ((place, _), found) in places.iter().zip(jobs::parallel(&places, jobs, look)) {
            match found {
                Ok(found) => hosts.extend(found),
                Err(error) => failed.push((place.clone(), error)),
            }
        }
        Ok((tell_apart(hosts)?, failed))
    }

    fn hosts_in(&self, source: Packed) -> Result<Vec<Host>> {
        let source = Arc::new(source);
        if !source.is_flake {
            let name = source.place.trim_start_matches("hosts/").try_into().context(|| format!("find the hosts of {}", source.place))?;
            return Ok(vec![Host { name, attr: None, source }]);
        }
        let names = self.names_in(&source)?;
        let host = |name: HostName| Host { attr: Some(name.clone()), name, source: Arc::clone(&source) };
        Ok(names.into_iter().map(host).collect())
    }

    /// Where what nix says of a host is kept.
    pub fn log(&self, name: &str) -> PathBuf {
        self.state.join("logs").join(format!("{name}.log"))
    }

    /// Where what nix fetches for updates is kept.
    pub fn cache(&self) -> PathBuf {
        self.state.join("fetched")
    }

    /// Unpacks a source, as the host does, and calls `then` with where it is.
    fn with_unpacked<T>(&self, source: &Packed, name: &str, then: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        let place = self.scratch.path().join(name);
        let directory = place.join("configuration");
        self.provide(source)?;
        let done = unpack(&source.archive, &directory).and_then(|()| then(&directory));
        let _ = fs::remove_dir_all(place);
        done
    }
}

/// The name of a place's files; no host has it.
fn label(place: &str) -> String {
    format!("in-{}", place.replace('/', "."))
}

/// Checks that no two hosts have the same name. A plain directory beside a flake that has a host of
/// that name is a module of the flake's.
fn tell_apart(hosts: Vec<Host>) -> Result<Vec<Host>> {
    let of_repository: Vec<_> = hosts.iter().filter(|host| host.source.place == ".").map(|host| host.name.clone()).collect();
    let mut found: BTreeMap<HostName, Host> = BTreeMap::new();
    for host in hosts {
        if host.attr.is_none() && of_repository.contains(&host.name) {
            continue;
        }
        if let Some(other) = found.get(&host.name) {
            let message =
                format!("Failed to list the hosts: {} is defined in {} and in {}", host.name, other.source.place, host.source.place);
            return Err(Error::new(message));
        }
        found.insert(host.name.clone(), host);
    }
    Ok(found.into_values().collect())
}

/// Those of these names, each matched whole; all if none are given.
pub fn select<T>(all: Vec<T>, name: impl Fn(&T) -> &str, wanted: &[&str]) -> Result<Vec<T>> {
    if let Some(unknown) = wanted.iter().find(|wanted| !all.iter().any(|one| name(one) == **wanted)) {
        let known: Vec<_> = all.iter().map(name).collect();
        let known = if known.is_empty() { "no host".into() } else { known.join(", ") };
        return Err(Error::new(format!("Failed to find host {unknown:?}: there is {known}")));
    }
    Ok(all.into_iter().filter(|one| wanted.is_empty() || wanted.contains(&name(one))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, Directory};

    #[test]
    fn what_is_published_is_named_whatever_the_publisher_likes_git_to_print() {
        let place = Directory::new();
        let script = "git init -q; echo 1 > file; git add .; git commit -qm 'grün'; git log -1 --format=%H";
        let commit = testing::git(place.path(), script);
        let repository = of(place.path(), ".git/cache");
        let found = repository.commit();
        assert_eq!((&*found.commit.unwrap(), &*found.author.unwrap(), &*found.summary.unwrap()), (&*commit, "a <a>", "grün"));
        assert!(!found.dirty);
        assert_eq!(pack::tracked_files(place.path()).unwrap(), [PathBuf::from("file")]);
        fs::write(place.path().join("new"), "").unwrap();
        assert!(repository.commit().dirty);
    }

    fn host(name: &str, place: &str, attr: Option<&str>) -> Host {
        let source = Packed {
            place: place.into(),
            directory: PathBuf::new(),
            archive: PathBuf::new(),
            sha256: "0".repeat(64).try_into().unwrap(),
            size: 0,
            is_flake: attr.is_some(),
        };
        Host { name: name.try_into().unwrap(), attr: attr.map(|attr| attr.try_into().unwrap()), source: Arc::new(source) }
    }

    fn of(directory: &Path, cache: &str) -> FleetRepository {
        FleetRepository {
            directory: directory.into(),
            origin: pack::Origin::new(directory, None).unwrap(),
            flags: Vec::new(),
            limit: None,
            state: PathBuf::new(),
            scratch: Temporary::below(&directory.join(cache)).unwrap(),
            turn: Mutex::default(),
        }
    }

    fn names(hosts: &[Host]) -> Vec<&str> {
        hosts.iter().map(|host| &*host.name).collect()
    }

    #[test]
    fn what_is_in_a_directory_decides_what_it_is() {
        let place = Directory::new();
        for file in ["flake/flake.nix", "flake/configuration.nix", "plain/configuration.nix", "nothing/notes", ".gitkeep/x"] {
            let path = place.path().join("hosts").join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let repository = of(place.path(), "cache");
        let of_hosts = [("hosts/flake".to_owned(), true), ("hosts/plain".into(), false)];
        assert_eq!(repository.places().unwrap(), of_hosts);
        fs::write(place.path().join("configuration.nix"), "").unwrap();
        assert_eq!(repository.places().unwrap(), of_hosts);
        fs::write(place.path().join("flake.nix"), "").unwrap();
        assert_eq!(repository.places().unwrap().last(), Some(&(".".to_owned(), true)));
    }

    #[test]
    fn what_is_unchanged_is_packed_when_that_is_needed_and_to_the_same() {
        let place = Directory::new();
        let web = place.path().join("hosts/web");
        fs::create_dir_all(&web).unwrap();
        fs::create_dir_all(place.path().join("state/packed")).unwrap();
        fs::write(web.join("configuration.nix"), "1").unwrap();
        let repository = || FleetRepository { state: place.path().join("state"), ..of(place.path(), "cache") };
        let pack = |repository: &FleetRepository| repository.pack("hosts/web", false).unwrap();
        assert!(pack(&repository()).archive.exists());
        std::thread::sleep(std::time::Duration::from_secs(3));
        let (first, second, third) = (repository(), repository(), repository());
        let before = pack(&first);
        assert!(before.archive.exists());
        let after = pack(&second);
        assert!(!after.archive.exists() && (&after.sha256, after.size) == (&before.sha256, before.size));
        second.provide(&after).unwrap();
        assert_eq!(fs::read(&after.archive).unwrap(), fs::read(&before.archive).unwrap());
        let unchanged = pack(&third);
        fs::write(web.join("configuration.nix"), "2").unwrap();
        assert!(third.provide(&unchanged).unwrap_err().to_string().ends_with("try again") && !unchanged.archive.exists());
        assert_ne!(pack(&repository()).sha256, before.sha256);
    }

    #[test]
    fn a_name_is_one_host_and_is_matched_whole() {
        let hosts = || vec![host("web2", "hosts/pair", Some("web2")), host("web", "hosts/web", None), host("we", "hosts/we", None)];
        assert_eq!(names(&tell_apart(hosts()).unwrap()), ["we", "web", "web2"]);
        assert_eq!(names(&select(hosts(), |host| &host.name, &["web"]).unwrap()), ["web"]);
        assert_eq!(select(hosts(), |host| &host.name, &[]).unwrap().len(), 3);
        let error = select(hosts(), |host| &host.name, &["web", "web3"]).err().unwrap().to_string();
        assert_eq!(error, "Failed to find host \"web3\": there is web2, web, we");
        assert!(select(hosts(), |host| &host.name, &["w"]).is_err());
        let twice = hosts().into_iter().chain([host("web", ".", Some("web"))]).chain([host("web2", "hosts/web2", Some("web2"))]).collect();
        let error = tell_apart(twice).err().unwrap().to_string();
        assert_eq!(error, "Failed to list the hosts: web2 is defined in hosts/pair and in hosts/web2");
        // a module of the repository's flake
        let both = tell_apart(hosts().into_iter().chain([host("web", ".", Some("web"))]).collect()).unwrap();
        assert_eq!(both.iter().map(|host| host.source.place.as_str()).collect::<Vec<_>>(), ["hosts/we", ".", "hosts/pair"]);
    }
}
