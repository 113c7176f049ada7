//! Collections: a named list of repositories, kept by an owner.
//!
//! Invariant: a repository that is in a collection already stays there once; nothing is ever removed.

use serde::Deserialize;
use serde_json::json;

use crate::wire::{About, Again, next_page, parse};
use crate::{Error, Hub, RepoId};

const ANSWER_BYTES_MAX: usize = 16 << 20;
const N_PAGES_MAX: usize = 1000;
const DESCRIPTION_CHARS_MAX: usize = 150;
const NOTE_CHARS_MAX: usize = 500;

/// A collection; a listed one shows at most four of its items.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collection {
    /// `owner/title-as-words-<24 hex>`: its name in addresses.
    pub slug: String,
    /// Its title, for people.
    pub title: String,
    /// User or organisation.
    pub owner: String,
    /// Names of the repositories (and other things) in it.
    pub items: Vec<String>,
}

/// What [`Hub::add_to_collection`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filed {
    /// It was added.
    Added,
    /// It was there already.
    AlreadyThere,
}

#[derive(Deserialize)]
struct Wire {
    slug: String,
    title: String,
    owner: Owner,
    #[serde(default)]
    items: Vec<Item>,
}

#[derive(Deserialize)]
struct Owner {
    name: String,
}

#[derive(Deserialize)]
struct Item {
    id: String,
}

impl From<Wire> for Collection {
    fn from(wire: Wire) -> Collection {
        Collection {
            slug: wire.slug,
            title: wire.title,
            owner: wire.owner.name,
            items: wire.items.into_iter().map(|item| item.id).collect(),
        }
    }
}

impl Hub {
    /// All collections of `owner`.
    ///
    /// # Errors
    /// As every request.
    pub async fn collections(&self, owner: &str) -> Result<Vec<Collection>, Error> {
        let mut url = self.wire.url(&["api", "collections"]);
        url.query_pairs_mut()
            .append_pair("owner", owner)
            .append_pair("limit", "100");
        let what = format!("list the collections of {owner}");
        let mut all = Vec::new();
        for _ in 0..N_PAGES_MAX {
            let ask = self.wire.get(&what, url.clone(), About::default());
            let (headers, body) = self.wire.fetch(&ask, ANSWER_BYTES_MAX).await?;
            let page: Vec<Wire> = parse(&what, &body)?;
            all.extend(page.into_iter().map(Collection::from));
            match next_page(&url, &headers) {
                Some(next) => url = next,
                None => return Ok(all),
            }
        }
        Err(Error::Protocol {
            what,
            detail: format!("more than {N_PAGES_MAX} pages"),
        })
    }

    /// One collection with all its items.
    ///
    /// # Errors
    /// [`Error::Id`] for a slug that is not `owner/name`; [`Error::Refused`] (404) when there is none.
    pub async fn collection(&self, slug: &str) -> Result<Collection, Error> {
        let url = self.collection_url(slug, &[])?;
        let ask = self.wire.get(
            format!("look up the collection {slug}"),
            url,
            About::default(),
        );
        Ok(self.wire.json::<Wire>(&ask, ANSWER_BYTES_MAX).await?.into())
    }

    /// Makes a collection. Sent once: a lost answer is an error, because asking again could make a second one.
    ///
    /// # Errors
    /// [`Error::Conflict`] when the owner has one of this title (on Hubs that mind); otherwise as every request.
    pub async fn create_collection(
        &self,
        owner: &str,
        title: &str,
        description: Option<&str>,
        private: bool,
    ) -> Result<Collection, Error> {
        bound(description, "collection description", DESCRIPTION_CHARS_MAX)?;
        let mut body = json!({"title": title, "namespace": owner, "private": private});
        if let Some(description) = description {
            body["description"] = description.into();
        }
        let url = self.wire.url(&["api", "collections"]);
        let mut ask = self.wire.post_json(
            format!("create the collection {owner}/{title}"),
            url,
            About::default(),
            &body,
        );
        ask.again = Again::IfRefused;
        Ok(self.wire.json::<Wire>(&ask, ANSWER_BYTES_MAX).await?.into())
    }

    /// Puts a model repository into a collection.
    ///
    /// # Errors
    /// As [`Hub::collection`]; [`Error::Forbidden`] without the right to change it.
    pub async fn add_to_collection(
        &self,
        slug: &str,
        repo: &RepoId,
        note: Option<&str>,
    ) -> Result<Filed, Error> {
        bound(note, "collection note", NOTE_CHARS_MAX)?;
        let mut body = json!({"item": {"id": repo.to_string(), "type": "model"}});
        if let Some(note) = note {
            body["note"] = note.into();
        }
        let url = self.collection_url(slug, &["items"])?;
        let ask = self.wire.post_json(
            format!("file {repo} into the collection {slug}"),
            url,
            About::default(),
            &body,
        );
        match self.wire.fetch(&ask, ANSWER_BYTES_MAX).await {
            Ok(_) => Ok(Filed::Added),
            Err(Error::Conflict { .. }) => Ok(Filed::AlreadyThere),
            Err(error) => Err(error),
        }
    }

    fn collection_url(&self, slug: &str, rest: &[&str]) -> Result<reqwest::Url, Error> {
        match slug.split_once('/') {
            Some((owner, name)) if !owner.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(self
                    .wire
                    .url(&[&["api", "collections", owner, name], rest].concat()))
            }
            _ => Err(Error::Id {
                text: slug.to_owned(),
                reason: "a collection is written owner/title-<24 hex>",
            }),
        }
    }
}

fn bound(text: Option<&str>, name: &str, chars_max: usize) -> Result<(), Error> {
    match text.map(|t| t.chars().count()) {
        Some(n) if n > chars_max => Err(Error::TooLarge {
            path: name.to_owned(),
            size_bytes: n as u64,
            size_bytes_max: chars_max as u64,
        }),
        _ => Ok(()),
    }
}
