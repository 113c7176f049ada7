//! Files a published repository into a collection, made where it is not there.
//!
//! Invariant: a repository is in a collection once; nothing is removed from one. A failure says that only the filing is
//! missing.

use hub::{Hub, RepoId};
use terminal::Failure;

/// Files `repo` into the collection `slug`; its address, for people.
pub(super) async fn file(hub: &Hub, slug: &str, repo: &RepoId) -> Result<String, Failure> {
    match hub.add_to_collection(slug, repo, None).await {
        Ok(_) => Ok(format!("{}/collections/{slug}", hub.endpoint())),
        Err(error) => Err(failed(repo, slug, error)),
    }
}

/// Files `repo` into its owner's collection of this title, which is made when there is none.
pub(super) async fn file_by_title(
    hub: &Hub,
    title: &str,
    repo: &RepoId,
) -> Result<String, Failure> {
    let owner = repo.owner();
    let unknown = |error| failed(repo, &format!("{owner}/{title}"), error);
    let collections = hub.collections(owner).await.map_err(unknown)?;
    let found = collections
        .into_iter()
        .find(|collection| collection.title == title && collection.owner == owner);
    let slug = match found {
        Some(collection) => collection.slug,
        None => {
            let made = hub.create_collection(owner, title, None, false).await;
            made.map_err(unknown)?.slug
        }
    };
    file(hub, &slug, repo).await
}

fn failed(repo: &RepoId, collection: &str, error: hub::Error) -> Failure {
    Failure::new(format!(
        "{repo} is published, but it cannot be filed into the collection {collection}"
    ))
    .cause(error)
    .hint("only the filing remains: the same command does it, once the collection can be written")
}
