//! The catalog's tool: which models we publish, checked, planned, carded and filed.
//!
//! Route of a publication: `cli` names the arguments; `catalog` reads the sources (`config`, `manifest`, `yaml`) and
//! checks them against each other (`unique`); `plan` turns one entry into a value without asking anybody; `inspect` adds
//! what only the network knows; `run` carries the plan out with larql and the Hub. `--dry-run` stops after the value.
//!
//! Invariant: only `environment` reads variables. Left out: extraction and upload themselves, which are larql's.

mod add;
mod card;
mod catalog;
mod cli;
mod config;
mod diagnostic;
mod doctor;
mod entry;
mod environment;
mod estimate;
mod inspect;
mod journal;
mod larql;
mod log;
mod manifest;
mod mtp;
mod name;
mod plan;
mod publish;
mod run;
mod scratch;
mod serve;
mod space;
mod unique;
mod verify;
mod vision;
mod yaml;

use std::io;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use terminal::{Failure, Output};

use catalog::{Catalog, View};
use cli::{Cli, Command};
use environment::Environment;
use scratch::Cleaned;

fn main() -> ExitCode {
    let cli = Cli::parse();
    terminal::start_logging();
    let output = Output {
        json: cli.global.json,
    };
    terminal::finish(run(&cli, output), output)
}

fn run(cli: &Cli, output: Output) -> Result<(), Failure> {
    let environment = Environment::of_process()?;
    let view = cli.global.view();
    let load = || Catalog::load(&view, &environment.working_dir, environment.home.as_deref());
    let load_and_warn = || {
        let catalog = load()?;
        catalog.warnings.iter().for_each(terminal::tell);
        Ok::<_, Failure>(catalog)
    };
    match &cli.command {
        Command::Catalog(command) => {
            catalog_command(command, &view, load_and_warn, &environment, output)
        }
        Command::Publish(args) => publish::publish(args, &load_and_warn()?, &environment, output),
        Command::Verify(args) => {
            let catalog = load_and_warn()?;
            let entry = publish::entry(&catalog, &args.model)?;
            let hub = hub::Hub::new(environment.hub_settings()?)
                .map_err(Failure::of("cannot use the Hub"))?;
            environment.block_on(verify::verify(entry, args.artifact, &hub, output))?
        }
        Command::Scratch(cli::Scratch::Clean { scratch, yes }) => clean(
            &environment.scratch(scratch.path.as_deref()),
            *yes,
            &environment,
            output,
        ),
        Command::Doctor(args) => {
            let catalog = load();
            catalog
                .iter()
                .flat_map(|catalog| &catalog.warnings)
                .for_each(terminal::tell);
            doctor::doctor(args, &view, catalog.as_ref(), &environment, output)
        }
        Command::Registry(cli::Registry::Serve {
            root,
            listen,
            token_file,
            public_url,
        }) => serve::serve(
            root,
            *listen,
            token_file.as_deref(),
            public_url.as_deref(),
            &environment,
            output,
        ),
        Command::Completions { shell } => terminal::completions::<Cli>(*shell, "skulk-weights"),
    }
}

fn catalog_command(
    command: &cli::Catalog,
    view: &View,
    load: impl Fn() -> Result<Catalog, Failure>,
    environment: &Environment,
    output: Output,
) -> Result<(), Failure> {
    match command {
        cli::Catalog::Validate => {
            let catalog = load()?;
            let (n_entries, n_sources) = (catalog.entries.len(), catalog.sources.len());
            output.value(&serde_json::json!({"valid": true, "entries": n_entries, "sources": n_sources, "warnings": catalog.warnings}))?;
            output.text(format_args!(
                "catalog valid: {n_entries} entries from {n_sources} sources"
            ))
        }
        cli::Catalog::Sources => {
            let catalog = load()?;
            output.value(&catalog.sources)?;
            catalog
                .sources
                .iter()
                .try_for_each(|source| output.text(source))
        }
        cli::Catalog::List { tier } => {
            let catalog = load()?;
            let keys = catalog.keys(tier.tier());
            output.value(&keys)?;
            keys.iter().try_for_each(|key| output.text(key))
        }
        cli::Catalog::Show { key } => output.json_line(&publish::entry(&load()?, key)?.fields()),
        cli::Catalog::Find { model } => {
            let id = name::model_id(model)
                .map_err(|message| Failure::new(message).hint("such as google/gemma-3-4b-it"))?;
            let catalog = load()?;
            let found: Vec<_> = catalog
                .entries
                .iter()
                .filter(|entry| entry.source_model == id)
                .collect();
            if found.is_empty() {
                let known = catalog
                    .entries
                    .iter()
                    .map(|entry| entry.source_model.as_str());
                let hint = match diagnostic::did_you_mean(&id, known) {
                    Some(known) => format!("did you mean {known}?"),
                    None => "`skulk-weights catalog list` prints what there is".to_owned(),
                };
                return Err(Failure::new(format!(
                    "no catalog entry found for source_model '{id}'"
                ))
                .hint(hint));
            }
            found
                .iter()
                .try_for_each(|entry| output.json_line(&entry.fields()))
        }
        cli::Catalog::Add(args) => add::add(args, view, &load()?, environment, output),
        cli::Catalog::Init {
            output: path,
            force,
        } => init(path, *force, output),
    }
}

fn init(path: &Path, force: bool, output: Output) -> Result<(), Failure> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true);
    if force {
        options.create(true).truncate(true)
    } else {
        options.create_new(true)
    };
    let written = options
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, config::TEMPLATE.as_bytes()));
    match written {
        Ok(()) => {
            output.value(&serde_json::json!({"wrote": path}))?;
            output.text(format_args!("wrote {}", path.display()))
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(Failure::new(format!(
            "{} already exists; rerun with --force to replace it",
            path.display()
        ))),
        Err(error) => Err(Failure::io("cannot write", path, error)
            .hint("check that its directory exists and can be written")),
    }
}

fn clean(
    scratch: &Path,
    yes: bool,
    environment: &Environment,
    output: Output,
) -> Result<(), Failure> {
    let (working_dir, home) = (&environment.working_dir, environment.home.as_deref());
    let mut ask: Box<dyn io::Write> = if output.json {
        Box::new(io::stderr())
    } else {
        Box::new(io::stdout())
    };
    let cleaned = scratch::clean(
        scratch,
        working_dir,
        home,
        yes,
        &mut io::stdin().lock(),
        &mut ask,
    )?;
    let (word, text) = match cleaned {
        Cleaned::Deleted => ("deleted", format!("deleted {}", scratch.display())),
        Cleaned::Declined => ("declined", "aborted".to_owned()),
        Cleaned::Absent => (
            "absent",
            format!("scratch directory does not exist: {}", scratch.display()),
        ),
    };
    output.value(&serde_json::json!({"scratch": scratch, "result": word}))?;
    output.text(text)
}
