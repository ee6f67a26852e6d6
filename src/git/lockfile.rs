//! Two versions of a `flake.lock`: what changed, and whether it was allowed to.
//!
//! The format is Nix' lock file version 7: a graph of `nodes`, in which an input is either the name
//! of a node or, where it follows another input, the path to that from the root.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use serde_json::{Map, Value};

use crate::error::{Context, Error, Result};
use crate::gather::gather;
use crate::json;

/// What is wrong if other inputs than those that are updated change.
pub const NO_FIT: &str = "flake.lock does not fit flake.nix, run nix flake lock and commit it";

/// A parsed lock file.
pub struct LockFile {
    nodes: Map<String, Value>,
    root: String,
}

/// A lock file, and what it is to become.
pub struct Update {
    /// Where it is in the repository.
    pub path: String,
    /// What it is, if it is there.
    pub old: Option<Vec<u8>>,
    /// What Nix has made of it.
    pub new: Option<Vec<u8>>,
    /// The inputs that were to be updated; all if there are none.
    pub asked: Vec<String>,
}

impl Update {
    /// The inputs that differ, with their old and new revisions. Fails if that is one that was not asked for.
    pub fn changes(&self) -> Result<Vec<(String, String, String)>> {
        let (old, new) = (LockFile::parse(self.old.as_deref())?, LockFile::parse(self.new.as_deref())?);
        let inputs = old.meant_by(&self.asked);
        // nix only warns of an input that is none
        for input in &self.asked {
            let now = new.resolve(input)?;
            if !inputs.contains(&now) {
                return Err(Error::new(format!("Failed to update {input}: it follows {now} now; {NO_FIT}")));
            }
        }
        old.check_only_changed(&new, &inputs)?;
        Ok(old.changes(&new))
    }
}

impl LockFile {
    /// What is to be updated for these inputs: one that follows another is updated by updating that.
    pub fn meant_by(&self, inputs: &[String]) -> Vec<String> {
        inputs.iter().map(|input| self.resolve(input).unwrap_or_else(|_| input.clone())).collect()
    }

    /// Parses the bytes of a lock file; `None` at all stand for a flake without inputs.
    pub fn parse(bytes: Option<&[u8]>) -> Result<Self> {
        let doing = || "read flake.lock".into();
        let Some(bytes) = bytes else { return Ok(Self { nodes: Map::new(), root: String::new() }) };
        let value: Value = json::parse(bytes).context(doing)?;
        match (value.get("nodes"), value.get("root")) {
            (Some(Value::Object(nodes)), Some(Value::String(root))) => Ok(Self { nodes: nodes.clone(), root: root.clone() }),
            _ => Err("expected nodes and root").context(doing),
        }
    }

    /// The input that another is: of one that follows another, that one. Fails, and says which there are, if
    /// there is none of this name; an input's input is named `a/b`.
    pub fn resolve(&self, input: &str) -> Result<String> {
        let doing = || format!("update {input}");
        let mut path: Vec<&str> = input.split('/').collect();
        for _ in 0..=self.nodes.len() {
            let (mut node, mut followed) = (self.root.as_str(), None);
            for (depth, name) in path.iter().enumerate() {
                match self.inputs(node).get(*name) {
                    Some(Value::String(next)) => node = next,
                    Some(Value::Array(other)) => {
                        followed = Some(other.iter().filter_map(Value::as_str).chain(path[depth + 1..].iter().copied()).collect());
                        break;
                    }
                    _ => {
                        let whose = if depth == 0 { "the flake".into() } else { format!("input {}", path[..depth].join("/")) };
                        let names = self.inputs(node).keys().map(String::as_str).collect::<Vec<_>>().join(", ");
                        let there = if names.is_empty() { "it has none".into() } else { format!("expected one of {names}") };
                        return Err(format!("{whose} has no input {name:?}; {there}")).context(doing);
                    }
                }
            }
            match followed {
                None if path.is_empty() => return Err("it follows nothing, so there is nothing to update").context(doing),
                None => return Ok(path.join("/")),
                Some(other) => path = other,
            }
        }
        Err("it follows itself").context(doing)
    }

    /// The top-level inputs that differ in any way, with their old and new revisions.
    fn changes(&self, new: &Self) -> Vec<(String, String, String)> {
        let names = self.names(new).into_iter().filter(|name| self.difference(new, name, &|_| false).is_some());
        names.map(|name| (name.clone(), self.revision(name), new.revision(name))).collect()
    }

    /// The top-level inputs that there were, or are.
    fn names<'a>(&'a self, new: &'a Self) -> BTreeSet<&'a String> {
        gather(self.inputs(&self.root).keys().chain(new.inputs(&new.root).keys()))
    }

    /// Fails if an input changed that neither is one of `allowed` nor hangs on one; an input's
    /// input is named `a/b`. All are allowed if none are named.
    fn check_only_changed(&self, new: &Self, allowed: &[String]) -> Result<()> {
        if allowed.is_empty() {
            return Ok(());
        }
        let is_allowed = |path: &str| allowed.iter().any(|input| input == path);
        match self.names(new).into_iter().find_map(|name| self.difference(new, name, &is_allowed)) {
            Some(path) => Err(Error::new(format!("Failed to update {}: input {path} would change, too; {NO_FIT}", allowed.join(", ")))),
            None => Ok(()),
        }
    }

    /// Fails if an input of an input is to be a file of this machine that was no input before: whoever writes the former
    /// would have all see what only this user can read.
    pub fn check_no_new_file(&self, new: &Self) -> Result<()> {
        let own = new.inputs(&new.root).values().filter_map(|edge| new.nodes.get(edge.as_str()?));
        let known: BTreeSet<_> = gather(self.nodes.values().chain(own).flat_map(files));
        let (mut todo, mut seen) = (vec![(String::new(), new.root.as_str())], BTreeSet::new());
        while let Some((path, node)) = todo.pop() {
            if !seen.insert(node) {
                continue;
            }
            if let Some(file) = new.nodes.get(node).and_then(|node| files(node).find(|file| !known.contains(file))) {
                let why = "of this machine, and in its Nix store now; if that is meant, run nix flake update, and commit flake.lock";
                return Err(Error::new(format!("Failed to update inputs: {path} would be {file} {why}")));
            }
            let slash = if path.is_empty() { "" } else { "/" };
            todo.extend(new.inputs(node).iter().filter_map(|(name, edge)| Some((format!("{path}{slash}{name}"), edge.as_str()?))));
        }
        Ok(())
    }

    /// The path of the first input that differs, from the top-level input `name` on downwards;
    /// whatever hangs on an input for which `skip` is true does not count.
    fn difference(&self, new: &Self, name: &str, skip: &dyn Fn(&str) -> bool) -> Option<String> {
        let mut seen = BTreeSet::new();
        let mut todo = vec![(name.to_owned(), self.inputs(&self.root).get(name), new.inputs(&new.root).get(name))];
        while let Some((path, old_edge, new_edge)) = todo.pop() {
            if skip(&path) {
                continue;
            }
            let (old_name, new_name) = match (old_edge, new_edge) {
                (Some(Value::String(old_name)), Some(Value::String(new_name))) => (old_name, new_name),
                (old_edge, new_edge) if old_edge == new_edge => continue,
                _ => return Some(path),
            };
            if !seen.insert((old_name, new_name)) {
                continue;
            }
            let (old_inputs, new_inputs) = (self.inputs(old_name), new.inputs(new_name));
            let same_names = old_inputs.keys().eq(new_inputs.keys());
            if !same_names || !self.contents(old_name).eq(new.contents(new_name)) {
                return Some(path);
            }
            todo.extend(old_inputs.iter().map(|(below, edge)| (format!("{path}/{below}"), Some(edge), new_inputs.get(below))));
        }
        None
    }

    fn inputs(&self, node: &str) -> &Map<String, Value> {
        static NONE: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);
        self.nodes.get(node).and_then(|node| node.get("inputs")?.as_object()).unwrap_or(&NONE)
    }

    /// What there is to a node but for its inputs.
    fn contents(&self, node: &str) -> impl Iterator<Item = (&String, &Value)> {
        self.nodes.get(node).and_then(Value::as_object).into_iter().flatten().filter(|(key, _)| *key != "inputs")
    }

    /// What identifies the state of a top-level input to a human.
    fn revision(&self, input: &str) -> String {
        let locked = self.inputs(&self.root).get(input).and_then(Value::as_str).and_then(|node| self.nodes.get(node)?.get("locked"));
        let text = |key: &str| locked.and_then(|locked| locked.get(key)?.as_str());
        text("rev").or_else(|| text("narHash")).unwrap_or("none").to_owned()
    }
}

/// Which files of this machine a node is, but for those that everybody can read.
fn files(node: &Value) -> impl Iterator<Item = &str> {
    let of = |key| ["original", "locked"].into_iter().filter_map(move |reference| node.get(reference)?.get(key)?.as_str());
    let is_file = |url: &&str| url.split_once(':').is_none_or(|(scheme, _)| scheme.to_ascii_lowercase().ends_with("file"));
    let is_private = |path: &&str| path.starts_with('/') && (!path.starts_with("/nix/store/") || path.contains("/.."));
    of("url").filter(is_file).chain(of("path").filter(is_private))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Two inputs, of which `app` has a `nixpkgs` of its own and a `lib` that follows `other`.
    fn lock(app: &str, app_nixpkgs: &str, other: &str) -> LockFile {
        let node = |rev: &str, inputs: Value| json!({"locked": {"rev": rev}, "original": {"type": "git"}, "inputs": inputs});
        let lock = json!({"version": 7, "root": "root", "nodes": {
            "root": {"inputs": {"app": "app", "other": "other"}},
            "app": node(app, json!({"nixpkgs": "nixpkgs_2", "lib": ["other"]})),
            "nixpkgs_2": node(app_nixpkgs, json!({})),
            "other": node(other, json!({})),
        }});
        LockFile::parse(Some(lock.to_string().as_bytes())).unwrap()
    }

    #[test]
    fn an_instance_changes_its_own_inputs_and_what_hangs_on_them() {
        let old = lock("1", "1", "1");
        let app = ["app".to_owned()];
        for (new, allowed, right) in [
            (lock("2", "1", "1"), &app[..], true),
            (lock("2", "2", "1"), &app, true),
            (lock("1", "1", "2"), &app, false),
            (lock("2", "1", "2"), &app, false),
            (lock("2", "2", "2"), &[], true),
            (lock("1", "2", "1"), &["app/nixpkgs".to_owned()], true),
            (lock("2", "2", "1"), &["app/nixpkgs".to_owned()], false),
        ] {
            assert_eq!(old.check_only_changed(&new, allowed).is_ok(), right);
        }
        let error = old.check_only_changed(&lock("2", "1", "2"), &app).unwrap_err();
        assert!(error.to_string().contains("input other would change"));
    }

    #[test]
    fn an_input_brings_no_files_of_this_machine() {
        let lock = |root: Value, below: Value| {
            let inputs = json!({"app": "app", "own": "own", "other": ["app", "below"]});
            let app = json!({"locked": {"type": "github"}, "inputs": {"below": "below"}});
            let nodes = json!({"root": {"inputs": inputs}, "app": app, "own": {"original": root}, "below": {"locked": below}});
            LockFile::parse(Some(json!({"version": 7, "root": "root", "nodes": nodes}).to_string().as_bytes())).unwrap()
        };
        let plain = json!({"type": "github", "owner": "o"});
        let none = LockFile::parse(None).unwrap();
        for (kind, at, place, is_accepted) in [
            ("path", "path", "/home/alice/.ssh", false),
            ("path", "path", "/nix/store/../../home/alice", false),
            ("path", "path", "/nix/store/x-source", true),
            ("path", "path", "./lib", true),
            ("file", "url", "file:///home/alice/key", false),
            ("file", "url", "FILE:/home/alice/key", false),
            ("git", "url", "git+file:///home/alice/private", false),
            ("git", "url", "/home/alice/private", false),
            ("git", "url", "https://example.org/file:x", true),
            ("git", "url", "git@example.org:x", true),
        ] {
            let new = lock(plain.clone(), json!({"type": kind, at: place}));
            for old in [&none, &lock(plain.clone(), plain.clone())] {
                let said = old.check_no_new_file(&new).map_err(|error| error.to_string());
                assert!(said.as_ref().map_or_else(|said| said.contains("app/below would be"), |()| is_accepted), "{said:?}");
                assert_eq!(said.is_ok(), is_accepted, "{place}");
            }
            // where it was before, or is an input of the flake's own
            new.check_no_new_file(&new).unwrap();
            none.check_no_new_file(&lock(json!({"type": kind, at: place}), json!({"type": kind, at: place}))).unwrap();
        }
    }

    #[test]
    fn an_input_that_follows_another_is_the_other() {
        let lock = json!({"version": 7, "root": "root", "nodes": {
            "root": {"inputs": {"app": "app", "lib": ["app", "lib"], "alias": ["lib"], "gone": [], "loop": ["loop"]}},
            "app": {"inputs": {"lib": "lib", "other": ["app"], "far": ["alias"]}},
            "lib": {},
        }});
        let lock = LockFile::parse(Some(lock.to_string().as_bytes())).unwrap();
        for (input, found) in [
            ("app", "app"),
            ("lib", "app/lib"),
            ("alias", "app/lib"),
            ("app/lib", "app/lib"),
            ("app/far", "app/lib"),
            ("app/other/lib", "app/lib"),
        ] {
            assert_eq!(lock.resolve(input).unwrap(), found);
        }
        for (input, why) in [
            ("ap", "the flake has no input \"ap\"; expected one of alias, app, gone, lib, loop"),
            ("app/x", "input app has no input \"x\"; expected one of far, lib, other"),
            ("lib/x", "input app/lib has no input \"x\"; it has none"),
            ("", "the flake has no input \"\""),
            ("gone", "it follows nothing"),
            ("loop", "it follows itself"),
        ] {
            let error = lock.resolve(input).unwrap_err().to_string();
            assert!(error.starts_with(&format!("Failed to update {input}: {why}")), "{error}");
        }
        assert!(LockFile::parse(None).unwrap().resolve("app").is_err());
    }

    #[test]
    fn new_and_vanished_inputs_are_changes() {
        let none = LockFile::parse(None).unwrap();
        let some = lock("1", "1", "1");
        assert!(none.check_only_changed(&some, &["app".into()]).is_err());
        assert!(some.check_only_changed(&none, &["app".into()]).is_err());
        assert!(none.changes(&none).is_empty());
        assert_eq!(none.changes(&some)[0], ("app".into(), "none".into(), "1".into()));
    }

    #[test]
    fn changes_are_top_level_inputs_with_their_revisions() {
        let old = lock("1", "1", "1");
        assert!(old.changes(&lock("1", "1", "1")).is_empty());
        assert_eq!(old.changes(&lock("1", "1", "2")), [("other".into(), "1".into(), "2".into())]);
        assert_eq!(old.changes(&lock("1", "2", "1")), [("app".into(), "1".into(), "1".into())]);
    }

    #[test]
    fn what_is_no_lock_file_is_an_error() {
        for text in ["", "{", "[]", "{}", r#"{"nodes": []}"#, r#"{"nodes": {}, "root": 1}"#] {
            assert!(LockFile::parse(Some(text.as_bytes())).is_err(), "{text}");
        }
        let odd = r#"{"root": "r", "nodes": {"r": {"inputs": {"a": "a", "b": 5, "c": ["a"]}}, "a": 7}}"#;
        let odd = LockFile::parse(Some(odd.as_bytes())).unwrap();
        assert!(odd.changes(&odd).is_empty());
    }
}
