//! Collections: named lists of repositories.
//!
//! Invariant: a collection is one file, replaced by rename under the lock of its owner; its 24 hex digits never change,
//! whatever its title. An item whose repository is gone is not shown.

use serde::{Deserialize, Serialize};

use crate::disk::{self, Disk};
use crate::names::{Kind, RepoId, check_name, is_hex, random_hex};
use crate::{Error, clock, repos};

const MAX_TITLE: usize = 60;
const MAX_DESCRIPTION: usize = 150;
const MAX_NOTE: usize = 500;
const MAX_ITEMS: usize = 10_000;

/// A list of repositories, as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Collection {
    pub(crate) id: String,
    pub(crate) owner: String,
    pub(crate) title: String,
    pub(crate) description: String,
    pub(crate) private: bool,
    pub(crate) theme: String,
    pub(crate) position: u64,
    pub(crate) last_updated: String,
    pub(crate) items: Vec<Item>,
}

/// One repository (or paper) in a collection.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Item {
    pub(crate) id: String,
    /// `model`, `dataset`, `space` or `paper`.
    pub(crate) kind: String,
    /// `owner/name`, or the id of the paper.
    pub(crate) target: String,
    pub(crate) note: Option<String>,
}

impl Item {
    /// The repository, where the item is one.
    pub(crate) fn repo(&self) -> Option<RepoId> {
        RepoId::parse(Kind::from_singular(&self.kind).ok()?, &self.target).ok()
    }
}

impl Collection {
    /// `owner/title-in-small-letters-<24 hex>`.
    pub(crate) fn slug(&self) -> String {
        let mut words = String::new();
        for c in self.title.chars().flat_map(char::to_lowercase) {
            if c.is_ascii_alphanumeric() {
                words.push(c);
            } else if !words.is_empty() && !words.ends_with('-') {
                words.push('-');
            }
        }
        let words = words.trim_end_matches('-');
        let joint = if words.is_empty() { "" } else { "-" };
        format!("{}/{words}{joint}{}", self.owner, self.id)
    }
}

/// What `create` and `update` can set; `None` leaves a field alone.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Fields {
    pub(crate) title: Option<String>,
    pub(crate) description: Option<String>,
    pub(crate) private: Option<bool>,
    pub(crate) theme: Option<String>,
    pub(crate) position: Option<u64>,
}

/// Makes a collection. Fails with `Exists`, which carries the slug, if the owner has one of that title.
pub(crate) fn create(disk: &Disk, owner: &str, fields: Fields) -> Result<Collection, Error> {
    check_name("namespace", owner)?;
    let _lock = lock(disk, owner)?;
    let title = fields
        .title
        .clone()
        .ok_or_else(|| Error::invalid("title", "is missing"))?;
    let others = list(disk, owner)?;
    if let Some(other) = others.iter().find(|other| other.title == title) {
        return Err(Error::Exists {
            what: format!("collection {}", other.slug()),
            slug: Some(other.slug()),
        });
    }
    let mut collection = Collection {
        id: random_hex::<12>(),
        owner: owner.to_owned(),
        title: String::new(),
        description: String::new(),
        private: false,
        theme: "orange".to_owned(),
        position: others.len() as u64,
        last_updated: String::new(),
        items: Vec::new(),
    };
    set(&mut collection, fields)?;
    save(disk, collection)
}

/// The collections of an owner, in the order they were made.
pub(crate) fn list(disk: &Disk, owner: &str) -> Result<Vec<Collection>, Error> {
    let mut found = Vec::new();
    for file in disk.names(&disk.path(&["collections", owner]))? {
        if let Some(id) = file.strip_suffix(".json") {
            found.push(load(disk, owner, id)?);
        }
    }
    found.sort_by(|a, b| (a.position, &a.id).cmp(&(b.position, &b.id)));
    Ok(found)
}

/// Everyone who has, or once had, a collection.
pub(crate) fn owners(disk: &Disk) -> Result<Vec<String>, Error> {
    disk.names(&disk.path(&["collections"]))
}

/// A collection by its owner and the last part of its slug (only the 24 hex digits at its end count).
pub(crate) fn get(disk: &Disk, owner: &str, slug: &str) -> Result<Collection, Error> {
    load(disk, owner, id_of(owner, slug)?)
}

/// Changes title, description and the like.
pub(crate) fn update(
    disk: &Disk,
    owner: &str,
    slug: &str,
    fields: Fields,
) -> Result<Collection, Error> {
    change(disk, owner, slug, |collection| set(collection, fields))
}

/// Takes a collection away; the repositories in it stay.
pub(crate) fn delete(disk: &Disk, owner: &str, slug: &str) -> Result<(), Error> {
    let id = id_of(owner, slug)?;
    let _lock = lock(disk, owner)?;
    if disk.remove(&path(disk, owner, id))? {
        Ok(())
    } else {
        Err(missing(owner, slug))
    }
}

/// Adds an item at the end. Fails with `NoRepo` and `Exists`.
pub(crate) fn add_item(
    disk: &Disk,
    owner: &str,
    slug: &str,
    kind: &str,
    target: &str,
    note: Option<String>,
) -> Result<Collection, Error> {
    let item = Item {
        id: random_hex::<12>(),
        kind: kind.to_owned(),
        target: target.to_owned(),
        note,
    };
    check_note(item.note.as_deref())?;
    if kind == "paper" {
        check_name("paper", target)?;
    } else {
        repos::find(disk, &RepoId::parse(Kind::from_singular(kind)?, target)?)?;
    }
    change(disk, owner, slug, |collection| {
        if collection
            .items
            .iter()
            .any(|other| other.kind == item.kind && other.target == item.target)
        {
            return Err(Error::Exists {
                what: format!("{kind} {target} in the collection"),
                slug: None,
            });
        }
        if collection.items.len() >= MAX_ITEMS {
            return Err(Error::invalid(
                "collection",
                format!("holds at most {MAX_ITEMS} items"),
            ));
        }
        collection.items.push(item);
        Ok(())
    })
}

/// Changes an item's note or place.
pub(crate) fn update_item(
    disk: &Disk,
    owner: &str,
    slug: &str,
    item: &str,
    note: Option<String>,
    position: Option<u64>,
) -> Result<Collection, Error> {
    check_note(note.as_deref())?;
    change(disk, owner, slug, |collection| {
        let at = index_of(collection, item)?;
        if let Some(note) = note {
            collection.items[at].note = Some(note);
        }
        if let Some(position) = position {
            let item = collection.items.remove(at);
            let target = usize::try_from(position)
                .unwrap_or(usize::MAX)
                .min(collection.items.len());
            collection.items.insert(target, item);
        }
        Ok(())
    })
}

/// Takes an item out of a collection.
pub(crate) fn delete_item(disk: &Disk, owner: &str, slug: &str, item: &str) -> Result<(), Error> {
    change(disk, owner, slug, |collection| {
        let at = index_of(collection, item)?;
        collection.items.remove(at);
        Ok(())
    })
    .map(drop)
}

/// Lets every collection follow a repository that was renamed.
pub(crate) fn follow(disk: &Disk, source: &RepoId, target: &RepoId) -> Result<(), Error> {
    for owner in owners(disk)? {
        let _lock = lock(disk, &owner)?;
        for mut collection in list(disk, &owner)? {
            let moved = collection
                .items
                .iter_mut()
                .filter(|item| item.repo().as_ref() == Some(source));
            let n_moved = moved.map(|item| item.target = target.full_name()).count();
            if n_moved > 0 {
                save(disk, collection)?;
            }
        }
    }
    Ok(())
}

fn change(
    disk: &Disk,
    owner: &str,
    slug: &str,
    change: impl FnOnce(&mut Collection) -> Result<(), Error>,
) -> Result<Collection, Error> {
    let id = id_of(owner, slug)?;
    let _lock = lock(disk, owner)?;
    let mut collection = load(disk, owner, id)?;
    change(&mut collection)?;
    save(disk, collection)
}

fn set(collection: &mut Collection, fields: Fields) -> Result<(), Error> {
    if let Some(title) = fields.title {
        check_len("title", &title, 1, MAX_TITLE)?;
        collection.title = title;
    }
    if let Some(description) = fields.description {
        check_len("description", &description, 0, MAX_DESCRIPTION)?;
        collection.description = description;
    }
    if let Some(theme) = fields.theme {
        let known = ["orange", "blue", "green", "purple", "pink", "indigo"];
        if !known.contains(&theme.as_str()) {
            return Err(Error::invalid(
                "theme",
                format!("must be one of {}", known.join(", ")),
            ));
        }
        collection.theme = theme;
    }
    collection.private = fields.private.unwrap_or(collection.private);
    collection.position = fields.position.unwrap_or(collection.position);
    Ok(())
}

fn load(disk: &Disk, owner: &str, id: &str) -> Result<Collection, Error> {
    let path = path(disk, owner, id);
    let bytes = disk::read(&path)?.ok_or_else(|| missing(owner, id))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::corrupt(&path, e))
}

fn save(disk: &Disk, mut collection: Collection) -> Result<Collection, Error> {
    collection.last_updated = clock::now();
    let path = path(disk, &collection.owner, &collection.id);
    let bytes = serde_json::to_vec(&collection).map_err(|e| Error::corrupt(&path, e))?;
    disk.write(&path, &bytes)?;
    Ok(collection)
}

fn id_of<'a>(owner: &str, slug: &'a str) -> Result<&'a str, Error> {
    check_name("owner", owner)?;
    let id = slug.len().checked_sub(24).and_then(|at| slug.get(at..));
    id.filter(|id| is_hex(id, 24))
        .ok_or_else(|| missing(owner, slug))
}

fn index_of(collection: &Collection, item: &str) -> Result<usize, Error> {
    let found = collection.items.iter().position(|other| other.id == item);
    found.ok_or_else(|| Error::NoCollection {
        slug: format!("{} has no such item", collection.slug()),
    })
}

fn missing(owner: &str, slug: &str) -> Error {
    Error::NoCollection {
        slug: format!("{owner}/{}", slug.chars().take(200).collect::<String>()),
    }
}

fn path(disk: &Disk, owner: &str, id: &str) -> std::path::PathBuf {
    disk.path(&["collections", owner, &format!("{id}.json")])
}

fn lock(disk: &Disk, owner: &str) -> Result<std::fs::File, Error> {
    disk.lock(&format!("collections--{owner}"))
}

fn check_note(note: Option<&str>) -> Result<(), Error> {
    note.map_or(Ok(()), |note| check_len("note", note, 0, MAX_NOTE))
}

fn check_len(what: &str, text: &str, min: usize, max: usize) -> Result<(), Error> {
    let n = text.chars().count();
    if (min..=max).contains(&n) {
        return Ok(());
    }
    Err(Error::invalid(
        what,
        format!("has {n} characters, must have {min} to {max}"),
    ))
}
