//! `demo`: a whole publication on this machine, against a real registry over real HTTP.
//!
//! It starts a registry on a free port of loopback, puts a small model there as a repository, writes an operator's
//! config and manifest, and runs this program's own `publish` on them. Invariant: nothing is special to the demo but the
//! address of the Hub; whatever it shows was read back from the registry.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use hub::{Addition, CommitRequest, Content, Hub, RepoId, Settings, Token};
use serde::Serialize;
use terminal::{Failure, Output, size};
use vindex::{INDEX_FILE, VindexId};

use crate::cli::Demo;
use crate::environment::Environment;
use crate::larql;

const OWNER: &str = "foxlight-demo";
const KEY: &str = "demo/kjv-full-q4-k";
const TARGET: &str = "foxlight-demo/kjv-full-q4-k-vindex";
/// The registry is gone when the demo ends, and is reached from this machine only.
const TOKEN: &str = "demo";
/// Lines of the card that are shown.
const CARD_LINES: usize = 24;
const FILE_BYTES_MAX: u64 = 64 << 20;

/// What the registry holds at the end.
#[derive(Debug, Serialize)]
struct Published {
    repo: String,
    commit: String,
    vindex: String,
    files: Vec<(String, u64)>,
    card: String,
    collection: String,
    collection_items: Vec<String>,
}

/// Runs the demo in the directory that is to be kept, or in one that goes away.
pub(crate) fn demo(args: &Demo, environment: &Environment, output: Output) -> Result<(), Failure> {
    let larql = larql::find(environment).map_err(|failure| {
        failure.hint("`cargo xtask demo` builds larql and runs the demo with it")
    })?;
    let temporary = match &args.keep {
        Some(_) => None,
        None => Some(
            tempfile::tempdir()
                .map_err(|error| Failure::new("cannot make a temporary directory").cause(error))?,
        ),
    };
    let root = match (&args.keep, &temporary) {
        (Some(root), _) => root.clone(),
        (None, Some(temporary)) => temporary.path().to_owned(),
        (None, None) => PathBuf::new(),
    };
    let registry_root = root.join("registry");
    fs::create_dir_all(&root).map_err(|error| Failure::io("cannot make", &root, error))?;
    let options = registry::Options {
        token: Some(TOKEN.to_owned()),
        ..registry::Options::default()
    };
    let running = registry::spawn(&registry_root, options).map_err(|error| {
        Failure::new(format!(
            "cannot serve a registry in {}",
            registry_root.display()
        ))
        .cause(error)
    })?;
    output.text(format_args!(
        "A registry serves {} at {}.",
        registry_root.display(),
        running.url()
    ))?;

    let settings = Settings {
        endpoint: running.url().to_owned(),
        token: Token::new(TOKEN),
        ..Settings::default()
    };
    let hub = Hub::new(settings).map_err(failed)?;
    let collection = environment.block_on(prepare(&hub, &args.model_dir, output))??;
    write_catalog(&root, &collection)?;
    output.text(format_args!(
        "\n$ HF_ENDPOINT={} skulk-weights --config {} publish --model {KEY} --artifact vindex\n",
        running.url(),
        root.join("skulk-weights.yaml").display()
    ))?;
    publish(&root, running.url(), environment, output)?;
    let published = environment.block_on(read_back(&hub, &collection))??;
    output.text(format_args!("\n{}", show(&published)))?;
    output.value(&published)?;
    running.stop();
    let programs = larql
        .parent()
        .filter(|dir| !environment.path().iter().any(|on_path| on_path == dir));
    output.text(next(args.keep.as_deref(), programs))
}

fn failed(error: hub::Error) -> Failure {
    Failure::new("the demo's registry did not do what it was asked").cause(error)
}

/// Puts the model into the registry, and makes a collection; its slug.
async fn prepare(hub: &Hub, model_dir: &Path, output: Output) -> Result<String, Failure> {
    let repo: RepoId = format!("{OWNER}/kjv").parse().map_err(failed)?;
    let unreadable = |error| {
        Failure::io("cannot read the model in", model_dir, error)
            .hint("run in the repository's checkout, or name a checkpoint with --model-dir")
    };
    let mut additions = Vec::new();
    for entry in fs::read_dir(model_dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let metadata = fs::metadata(&path).map_err(unreadable)?;
        let Some(name) = path
            .file_name()
            .and_then(|name| name.to_str())
            .filter(|_| metadata.is_file())
        else {
            continue;
        };
        additions.push(Addition {
            path: name.to_owned(),
            size_bytes: metadata.len(),
            sha256: None,
            content: Content::File(path),
        });
    }
    additions.sort_by(|a, b| a.path.cmp(&b.path));
    let size_bytes = additions.iter().map(|file| file.size_bytes).sum();
    let request = CommitRequest {
        summary: "Add the checkpoint".to_owned(),
        additions,
        deletions: Vec::new(),
    };
    hub.create_repo(&repo, false).await.map_err(failed)?;
    hub.commit(&repo, &request, &|_| {}).await.map_err(failed)?;
    output.text(format_args!(
        "It holds the checkpoint hf://{repo}: {} files, {}.",
        request.additions.len(),
        size(size_bytes)
    ))?;
    for collection in hub.collections(OWNER).await.map_err(failed)? {
        if collection.title == "Vindexes" {
            return Ok(collection.slug);
        }
    }
    Ok(hub
        .create_collection(OWNER, "Vindexes", None, false)
        .await
        .map_err(failed)?
        .slug)
}

/// An operator's config and manifest, as `catalog init` would have them begin.
fn write_catalog(root: &Path, collection: &str) -> Result<(), Failure> {
    let config = format!(
        "catalogs:\n- path: models.yaml\n  namespace: demo\n  hf_owner: {OWNER}\n  hf_collection: {collection}\n"
    );
    let manifest = format!(
        "models:\n- key: kjv-full-q4-k\n  source_model: {OWNER}/kjv\n  quant: q4k\n  tier: smoke\n  slices: [full]\n  \
         output_name: kjv-full-q4-k.vindex\n  hf_repo: {TARGET}\n"
    );
    for (name, text) in [("skulk-weights.yaml", config), ("models.yaml", manifest)] {
        let path = root.join(name);
        fs::write(&path, text).map_err(|error| Failure::io("cannot write", &path, error))?;
    }
    Ok(())
}

/// Runs this program's `publish`, as an operator does.
fn publish(
    root: &Path,
    endpoint: &str,
    environment: &Environment,
    output: Output,
) -> Result<(), Failure> {
    let mut command = environment.this_program()?;
    command.arg("--config").arg(root.join("skulk-weights.yaml"));
    command
        .args([
            "publish",
            "--model",
            KEY,
            "--artifact",
            "vindex",
            "--scratch",
        ])
        .arg(root.join("scratch"));
    command
        .env("HF_ENDPOINT", endpoint)
        .env("HF_TOKEN", TOKEN)
        .env("HF_HOME", root.join("hf"));
    for name in [
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN",
        "SKULK_WEIGHTS_COLLECTION",
    ] {
        command.env_remove(name);
    }
    if output.json {
        command.stdout(std::io::stderr());
    }
    let status = command
        .status()
        .map_err(|error| Failure::new("cannot run skulk-weights publish").cause(error))?;
    if status.success() {
        Ok(())
    } else {
        Err(Failure::new(format!("skulk-weights publish failed ({status})")).hint("see above"))
    }
}

async fn read_back(hub: &Hub, collection: &str) -> Result<Published, Failure> {
    let repo: RepoId = TARGET.parse().map_err(failed)?;
    let snapshot = hub.snapshot(&repo, None).await.map_err(failed)?;
    let index = snapshot
        .read_file(INDEX_FILE, FILE_BYTES_MAX)
        .await
        .map_err(failed)?;
    let card = snapshot
        .read_file("README.md", FILE_BYTES_MAX)
        .await
        .map_err(failed)?;
    let items = hub.collection(collection).await.map_err(failed)?.items;
    Ok(Published {
        repo: repo.to_string(),
        commit: snapshot.commit().to_string(),
        vindex: VindexId::of(&index).to_string(),
        files: snapshot
            .files()
            .iter()
            .map(|file| (file.path.clone(), file.size_bytes))
            .collect(),
        card: String::from_utf8_lossy(&card).into_owned(),
        collection: collection.to_owned(),
        collection_items: items,
    })
}

/// Writing to a `String` does not fail; the results are dropped for that reason.
fn show(published: &Published) -> String {
    let mut text = format!(
        "hf://{} at commit {} now holds:\n\n",
        published.repo, published.commit
    );
    for (path, size_bytes) in &published.files {
        let _ = writeln!(text, "  {path:<36}{:>12}", size(*size_bytes).to_string());
    }
    let _ = writeln!(text, "\nVindexId    {}", published.vindex);
    let _ = writeln!(
        text,
        "collection  {} holds {}",
        published.collection,
        published.collection_items.join(", ")
    );
    text.push_str("card        README.md begins:\n\n");
    for line in published.card.lines().take(CARD_LINES) {
        let _ = writeln!(text, "  | {line}");
    }
    text
}

/// The commands to try next; `programs` is where they are, when that is not on `PATH`.
fn next(kept: Option<&Path>, programs: Option<&Path>) -> String {
    let path = programs.map_or_else(String::new, |dir| {
        format!("  export PATH={}:$PATH\n", dir.display())
    });
    let (first, dir) = match kept {
        Some(root) => ("Try next:".to_owned(), root.display().to_string()),
        None => (
            "Try next: run the demo again with --keep DIR, which keeps the registry, and then"
                .to_owned(),
            "DIR".to_owned(),
        ),
    };
    format!(
        "{first}\n\n{path}  skulk-weights registry serve --root {dir}/registry &\n  export HF_ENDPOINT=http://127.0.0.1:7843\n  \
         larql pull {TARGET} -o kjv.vindex\n  larql verify kjv.vindex\n  larql dump kjv.vindex\n  \
         larql pull {TARGET} -o experts.vindex --slice expert-server"
    )
}
