//! `catalog add`: an entry for a model, from what the Hub tells, at the end of the operator's manifest.
//!
//! Route: `detect` asks the Hub, `slug` makes names, the entry is held against the catalog, shown, and put into the
//! manifest by `insert`. Invariant: a manifest changes as a whole or not at all, and only to one with which the whole
//! catalog is valid; nothing but the manifest is written. Without `--yes` somebody says yes first.

mod detect;
mod insert;
mod slug;

use std::fs;
use std::io::{self, BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use terminal::{Failure, Output, tell};

use crate::catalog::{Catalog, View};
use crate::cli::Add;
use crate::entry::{Entry, Sidecar, Slice, Source, SourceKind, Tier};
use crate::environment::Environment;
use crate::name;
use detect::Detected;

/// Where entries go when the operator has no manifest.
const MANIFEST: &str = "models.yaml";
/// How long a Hub that does not answer is asked again.
const PATIENCE: Duration = Duration::from_secs(8);

/// The manifest that gets the entry.
struct Target {
    path: PathBuf,
    namespace: Option<String>,
    owner: String,
    /// `None` where the source's own collection holds for its entries, or there is none.
    collection: Option<String>,
}

/// Adds an entry for `args.model`.
pub(crate) fn add(
    args: &Add,
    view: &View,
    catalog: &Catalog,
    environment: &Environment,
    output: Output,
) -> Result<(), Failure> {
    let model = name::model_id(&args.model)
        .map_err(|message| Failure::new(message).hint("such as google/gemma-3-4b-it"))?;
    if !name::is_source_model(&model) {
        return Err(Failure::new(format!(
            "expected owner/repo or a huggingface.co URL, got '{}'",
            args.model
        )));
    }
    let target = target(args, view, catalog)?;
    let mut settings = environment.hub_settings()?;
    settings.give_up_after = settings.give_up_after.min(PATIENCE);
    let hub = hub::Hub::new(settings).map_err(Failure::of("cannot use the Hub"))?;
    let detected = environment.block_on(detect::detect(&model, &hub))??;
    if detected.quant != "q4k" {
        return Err(Failure::new(format!(
            "detected quant '{}' is not supported (allowed: q4k)",
            detected.quant
        ))
        .hint("add the model that it was packed from"));
    }
    let builtin = Catalog::load(&View::Builtin, &environment.working_dir, None)?;
    let known: Vec<&Entry> = catalog.entries.iter().chain(&builtin.entries).collect();
    let entry = entry(&detected, &target, &known);
    refuse_known(&entry, &known)?;
    let text = block(&entry);

    output.text(format_args!("--- entry preview ---\n{}", text.trim_end()))?;
    for note in notes(&detected) {
        output.text(note)?;
    }
    let mut told = serde_json::json!({"entry": entry.fields(), "detected": detected, "manifest": target.path, "added": false});
    if args.dry_run {
        output.value(&told)?;
        return output.text("dry run: nothing written");
    }
    if !args.yes && !agreed(&target.path, output)? {
        output.value(&told)?;
        return output.text("aborted: nothing written");
    }
    write(&target, &text, &entry, view, environment)?;
    told["added"] = true.into();
    output.value(&told)?;
    output.text(format_args!(
        "added {} to {}",
        effective_key(&target, &entry.key),
        target.path.display()
    ))?;
    if matches!(view, View::Default)
        && catalog
            .sources
            .iter()
            .all(|source| source.kind == SourceKind::Builtin)
    {
        tell(format_args!(
            "note: read it with --manifest {}, or list it in a config (skulk-weights catalog init)",
            target.path.display()
        ));
    }
    Ok(())
}

/// The manifest of the options: `--manifest`, else the one operator source of the config (or the one that `--source`
/// names), else `models.yaml` here.
fn target(args: &Add, view: &View, catalog: &Catalog) -> Result<Target, Failure> {
    let foxlight = Catalog::foxlight();
    let (owner, collection) = (
        foxlight.hf_owner.unwrap_or_default(),
        foxlight.hf_collection,
    );
    let of_path = |path: &Path, entries: &[Entry]| {
        // A manifest without a source of its own is of whoever its entries are of.
        let mut owners: Vec<&str> = entries
            .iter()
            .map(|entry| name::owner(&entry.hf_repo))
            .collect();
        owners.dedup();
        let owner = match (&args.owner, owners.as_slice()) {
            (Some(owner), _) => owner.clone(),
            (None, [one]) => (*one).to_owned(),
            _ => owner.clone(),
        };
        let collection = collection.clone().filter(|slug| name::owner(slug) == owner);
        Target {
            path: path.to_owned(),
            namespace: None,
            owner,
            collection,
        }
    };
    if let View::Manifest(path) = view {
        return Ok(of_path(path, &catalog.entries));
    }
    let is_named = |source: &&Source| {
        args.source.as_ref().is_none_or(|name| {
            source.namespace.as_ref() == Some(name)
                || source.name == *name
                || source.origin == *name
        })
    };
    let sources: Vec<&Source> = catalog
        .sources
        .iter()
        .filter(|source| source.kind == SourceKind::Path)
        .filter(is_named)
        .collect();
    match (sources.as_slice(), &args.source) {
        ([source], _) => Ok(Target {
            path: PathBuf::from(&source.origin),
            namespace: source.namespace.clone(),
            owner: source.hf_owner.clone().unwrap_or(owner),
            collection: None,
        }),
        ([], None) => Ok(of_path(Path::new(MANIFEST), &[])),
        ([], Some(name)) => Err(Failure::new(format!("no operator source is called {name}"))
            .hint("`skulk-weights catalog sources` lists them")),
        (sources, _) => {
            let names: Vec<&str> = sources
                .iter()
                .filter_map(|source| source.namespace.as_deref())
                .collect();
            Err(Failure::new("several operator sources could get the entry")
                .hint(format!("name one with --source: {}", names.join(", "))))
        }
    }
}

/// The entry, without its namespace.
fn entry(detected: &Detected, target: &Target, known: &[&Entry]) -> Entry {
    let owner = &target.owner;
    let stem = slug::artifact(&detected.model);
    let repo = |source: &str, kind: &str| {
        let short = format!("{owner}/{}-{kind}", slug::base(source));
        // Another owner's model of the same name has that repository already.
        let is_taken = |sidecar: &&Sidecar| {
            sidecar.sidecar_repo.eq_ignore_ascii_case(&short) && sidecar.source_repo != source
        };
        let taken = known
            .iter()
            .flat_map(|entry| entry.mtp.iter().chain(&entry.vision))
            .any(|sidecar| is_taken(&sidecar));
        match taken {
            true => format!(
                "{owner}/{}-{}-{kind}",
                slug::base(name::owner(source)),
                slug::base(source)
            ),
            false => short,
        }
    };
    let sidecar = |source: &str, kind: &str| Sidecar {
        source_repo: source.to_owned(),
        sidecar_repo: repo(source, kind),
    };
    Entry {
        key: slug::key(&detected.model),
        source_model: detected.model.clone(),
        quant: detected.quant.to_owned(),
        tier: if detected.is_moe {
            Tier::Moe
        } else {
            Tier::Smoke
        },
        slices: vec![Slice::Full],
        output_name: format!("{stem}.vindex"),
        hf_repo: format!("{owner}/{stem}-vindex"),
        hf_collection: target.collection.clone(),
        mtp: detected
            .heads
            .as_ref()
            .map(|heads| sidecar(&heads.repo, "mtp")),
        assistant_model_repo: detected.assistant.clone(),
        vision: detected
            .vision
            .as_ref()
            .map(|source| sidecar(source, "vision")),
    }
}

/// Refuses names that another entry has: of the view, and of the built-in catalog, beside which it will stand.
fn refuse_known(entry: &Entry, known: &[&Entry]) -> Result<(), Failure> {
    for other in known {
        let key = other.key.rsplit('/').next().unwrap_or(&other.key);
        let same = [
            ("key", entry.key.as_str(), key),
            ("hf_repo", &entry.hf_repo, &other.hf_repo),
            ("output_name", &entry.output_name, &other.output_name),
        ];
        for (field, mine, theirs) in same {
            if mine.eq_ignore_ascii_case(theirs) {
                return Err(Failure::new(format!(
                    "{field} '{mine}' already exists in the catalog ({})",
                    other.key
                ))
                .hint(format!(
                    "that entry publishes {}; change its names, or write this entry by hand",
                    other.source_model
                )));
            }
        }
    }
    Ok(())
}

/// The entry as a manifest has it.
fn block(entry: &Entry) -> String {
    let mut lines = vec![
        format!("- key: {}", entry.key),
        format!("  source_model: {}", entry.source_model),
        format!("  quant: {}", entry.quant),
        format!("  tier: {}", entry.tier.name()),
        "  slices:".to_owned(),
        "  - full".to_owned(),
        format!("  output_name: {}", entry.output_name),
        format!("  hf_repo: {}", entry.hf_repo),
    ];
    let mut line = |name: &str, value: Option<&String>| {
        if let Some(value) = value {
            lines.push(format!("  {name}: {value}"));
        }
    };
    line("hf_collection", entry.hf_collection.as_ref());
    line(
        "mtp_source_repo",
        entry.mtp.as_ref().map(|mtp| &mtp.source_repo),
    );
    line(
        "mtp_sidecar_repo",
        entry.mtp.as_ref().map(|mtp| &mtp.sidecar_repo),
    );
    line("assistant_model_repo", entry.assistant_model_repo.as_ref());
    line(
        "vision_source_repo",
        entry.vision.as_ref().map(|vision| &vision.source_repo),
    );
    line(
        "vision_sidecar_repo",
        entry.vision.as_ref().map(|vision| &vision.sidecar_repo),
    );
    lines.join("\n") + "\n"
}

/// What was found, for people.
fn notes(detected: &Detected) -> Vec<String> {
    let mut notes = vec![match (&detected.heads, &detected.assistant) {
        (Some(heads), _) => format!("detected {} MTP tensors in {}", heads.n_tensors, heads.repo),
        (None, Some(assistant)) => format!(
            "no MTP heads in {}; {assistant} is its companion assistant",
            detected.root
        ),
        (None, None) => format!(
            "no MTP heads detected in {}, and no companion assistant",
            detected.root
        ),
    }];
    if let Some(vision) = &detected.vision {
        notes.push(format!(
            "{} leaves out the vision weights of {vision}",
            detected.model
        ));
    }
    notes.extend(detected.notes.iter().cloned());
    notes
}

fn agreed(path: &Path, output: Output) -> Result<bool, Failure> {
    let question = format!("Append to {}? [y/N] ", path.display());
    if output.json {
        let _ = write!(io::stderr(), "{question}");
    } else {
        terminal::write(&question)?;
    }
    let mut answer = String::new();
    io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(|error| Failure::new("cannot read the answer").cause(error))?;
    if !output.json {
        terminal::write("\n")?;
    }
    Ok(answer.trim().eq_ignore_ascii_case("y"))
}

fn effective_key(target: &Target, key: &str) -> String {
    match &target.namespace {
        Some(namespace) => format!("{namespace}/{key}"),
        None => key.to_owned(),
    }
}

/// Puts the entry into the manifest, and takes it out again when the catalog is not valid with it.
fn write(
    target: &Target,
    text: &str,
    entry: &Entry,
    view: &View,
    environment: &Environment,
) -> Result<(), Failure> {
    let path = &environment.working_dir.join(&target.path);
    let unusable = |what: &'static str| move |error| Failure::io(what, &target.path, error);
    let old = match fs::read_to_string(path) {
        Ok(old) => Some(old),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(unusable("cannot read")(error)),
    };
    let by_hand = || format!("add it by hand:\n{text}");
    let Some(new) = insert::insert(old.as_deref().unwrap_or(""), text) else {
        return Err(Failure::new(format!(
            "cannot add to the list of models in {} as text",
            target.path.display()
        ))
        .hint(by_hand()));
    };
    replace(path, &new, old.as_deref()).map_err(unusable("cannot write"))?;
    // A manifest that the view does not read is read alone.
    let reads_it = !matches!(view, View::Default) || target.namespace.is_some();
    let check = if reads_it {
        view.clone()
    } else {
        View::Manifest(target.path.clone())
    };
    let key = effective_key(target, &entry.key);
    let checked = Catalog::load(
        &check,
        &environment.working_dir,
        environment.home.as_deref(),
    );
    let failure = match checked {
        Ok(catalog)
            if catalog
                .get(&key)
                .is_some_and(|found| found.source_model == entry.source_model) =>
        {
            return Ok(());
        }
        Ok(_) => Failure::new(format!(
            "{} does not show the new entry {key}",
            target.path.display()
        ))
        .hint(by_hand()),
        Err(invalid) => invalid.into(),
    };
    let restored = match old {
        Some(old) => replace(path, &old, Some(&new)),
        None => fs::remove_file(path),
    };
    restored.map_err(unusable("cannot restore"))?;
    Err(failure)
}

/// Replaces the file whole, if it still holds `old` (`None`: if it still is not there), keeping its permissions.
fn replace(path: &Path, new: &str, old: Option<&str>) -> io::Result<()> {
    // A link stays a link: the file that it names is replaced.
    let path = &path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .prefix(".skulk-weights-")
        .tempfile_in(dir)?;
    file.write_all(new.as_bytes())?;
    file.as_file().sync_all()?;
    match (fs::read_to_string(path), old) {
        (Ok(now), Some(old)) if now == old => {
            fs::set_permissions(file.path(), fs::metadata(path)?.permissions())?;
            file.persist(path)?;
            Ok(())
        }
        (Err(error), None) if error.kind() == io::ErrorKind::NotFound => {
            #[cfg(unix)]
            {
                use std::os::unix::fs::PermissionsExt;
                fs::set_permissions(file.path(), fs::Permissions::from_mode(0o644))?;
            }
            file.persist_noclobber(path)?;
            Ok(())
        }
        _ => Err(io::Error::other(
            "somebody else changed it meanwhile; run it again",
        )),
    }
}
