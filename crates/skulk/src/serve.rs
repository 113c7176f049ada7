//! `skulk serve`: a node comes up, serves until it is told to stop, and goes away in good order.
//!
//! Order: cheap refusals, the listener, the model, the weight servers, the engine, the ready line. Invariant: beyond
//! loopback nobody is served without a key; what is printed and logged holds neither key nor secret.

use std::fs;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use engine::wire::{Identity, Remote, RemoteOptions, Secret};
use engine::{
    Drafts, Engine, EngineOptions, EngineParts, FeedForward, GrammarFactory, Local, Pool, Tokenizer,
};
use terminal::{Failure, Output, Stop, read_secret, tell};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, Semaphore};
use vindex::Vindex;

use crate::api::node::{Node, Template, now_seconds};
use crate::api::{self, LARGE_BODIES_MAX};
use crate::cli;
use crate::context::Context;
use crate::keys::Keys;
use crate::listen::{self, Limits};
use crate::metrics::{Metrics, TIDY_EVERY};
use crate::model::{self, Opened};

/// A file with keys or a template is never this long.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Where the system does not tell how much memory is free.
const FREE_BYTES_UNKNOWN: u64 = 2 << 30;

/// Serves until the first interrupt or request to terminate, and what is under way then until the second.
pub(crate) fn serve(args: &cli::Serve, context: &Context, output: Output) -> Result<(), Failure> {
    let keys = keys(args, context)?;
    if keys.is_empty() && !args.listen.ip().is_loopback() {
        return Err(Failure::new(format!(
            "refusing to serve on {} without an API key",
            args.listen
        ))
        .hint(
            "name a file with keys by --api-key-file or set SKULK_API_KEY, or listen on 127.0.0.1",
        ));
    }
    let secret = secret(args.secret_file.as_deref(), context)?;
    let template = args.chat_template.as_deref().map(read).transpose()?;
    let listener = context
        .wait(TcpListener::bind(args.listen))
        .map_err(|error| {
            Failure::new(format!("cannot listen on {}", args.listen))
                .cause(error)
                .hint("another address or port is named by --listen")
        })?;
    let address = listener
        .local_addr()
        .map_err(Failure::of(format!("cannot listen on {}", args.listen)))?;

    let cache = args.cache.clone().unwrap_or_else(|| context.cache());
    let opened = model::open(&args.model, args.ffn.is_empty(), &cache, context)?;
    let node = Arc::new(node(args, opened, keys, secret, template, context)?);
    let stop = context.stop()?;
    let url = format!("http://{address}");
    let peers: Vec<String> = args.ffn.iter().map(ToString::to_string).collect();
    output.value(&serde_json::json!({
        "url": url, "model": node.name, "vindex": node.fingerprint, "context": node.context, "ffn": peers,
    }))?;
    let weights = match peers.as_slice() {
        [] => "all weights here".to_owned(),
        peers => format!("feed-forward weights at {}", peers.join(", ")),
    };
    output.text(format_args!("serving {} at {url}/v1, {weights}", node.name))?;

    context.wait(async {
        let tidy = tokio::spawn(tidy(node.metrics.clone()));
        let (stop, cut) = signals(stop, node.clone(), args.drain);
        let (router, limits) = (api::router(node.clone()), Limits::of_process());
        listen::serve(listener, router, limits, stop, cut).await;
        tidy.abort();
    });
    // What was not finished within the grace fails; the engine's thread ends.
    node.engine.stop(false);
    Ok(())
}

/// The first request to stop, and the second or the end of the grace, whichever comes first.
fn signals(
    stop: Stop,
    node: Arc<Node>,
    drain: std::time::Duration,
) -> (impl Future<Output = ()>, impl Future<Output = ()>) {
    // One after the other, so that neither takes what the other is to hear.
    let first = Arc::new(Mutex::new(stop));
    let second = first.clone();
    let stop = async move {
        first.lock().await.told().await;
        node.stopping.store(true, Ordering::Relaxed);
        tell(format_args!(
            "stopping: answers under way have {}; a second request to stop ends them",
            humantime::format_duration(drain)
        ));
    };
    let cut = async move {
        tokio::select! {
            () = async { second.lock().await.told().await } => {}
            () = tokio::time::sleep(drain) => {}
        }
    };
    (stop, cut)
}

async fn tidy(metrics: Arc<Metrics>) {
    loop {
        tokio::time::sleep(TIDY_EVERY).await;
        metrics.tidy();
    }
}

/// A node of the model, ready to be asked.
fn node(
    args: &cli::Serve,
    opened: Opened,
    keys: Keys,
    secret: Secret,
    template: Option<String>,
    context: &Context,
) -> Result<Node, Failure> {
    let Opened { vindex, name } = opened;
    let vindex = Arc::new(vindex);
    let name = args.name.clone().unwrap_or(name);
    let unusable = || format!("cannot serve {}", vindex.dir().display());
    let tokenizer = Arc::new(Tokenizer::of(&vindex).map_err(Failure::of(unusable()))?);
    let template = match template {
        Some(text) => {
            let name = |id: Option<u32>| {
                id.and_then(|id| tokenizer.token_name(id))
                    .unwrap_or_default()
            };
            let (bos, eos) = (
                name(tokenizer.bos()),
                name(tokenizer.eos().first().copied()),
            );
            Template::of_text(text, &bos, &eos).map(Some)
        }
        None => Template::of_model(&tokenizer),
    };
    let template = template.map_err(|error| {
        Failure::new("the chat template cannot be used")
            .cause(error)
            .hint("another one is named by --chat-template")
    })?;
    let n_threads = match args.threads {
        Some(n) => n.get(),
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    let pool = Arc::new(Pool::new(n_threads));
    let model = engine::Model::open(vindex.clone()).map_err(Failure::of(unusable()))?;
    let model = Arc::new(model);
    let (ffn, remote): (Arc<dyn FeedForward>, _) = if args.ffn.is_empty() {
        let local = Local::new(vindex.clone(), pool.clone()).map_err(Failure::of(unusable()))?;
        (Arc::new(local), None)
    } else {
        let remote = Arc::new(connect(args, &vindex, secret)?);
        (remote.clone(), Some(remote))
    };
    let mut options = EngineOptions {
        kv_type: args.kv,
        n_running_max: args.max_running.get(),
        n_waiting_max: args.max_waiting,
        context_max: args.context.map(usize::from),
        drafts: drafts(args, &model, &pool, context)?,
        draft_depth: args.draft_depth.map(usize::from),
        ..EngineOptions::default()
    };
    options.kv_bytes_max = match args.kv_memory {
        Some(size) => size.0,
        None => options.kv_bytes_for(&vindex.index().config, free_bytes()),
    };
    let parts = EngineParts {
        model,
        ffn,
        pool,
        tokenizer: Some(tokenizer.clone()),
    };
    let drafts = !matches!(options.drafts, Drafts::None);
    let engine = Engine::start(parts, options).map_err(Failure::of(unusable()))?;
    let n_places = args.max_running.get().saturating_add(args.max_waiting);
    Ok(Node {
        context: engine.context(),
        grammars: GrammarFactory::new(&tokenizer).map_err(|error| error.to_string()),
        metrics: Arc::new(Metrics::new(&name).map_err(Failure::of("cannot count"))?),
        fingerprint: format!("fp_{}", &vindex.id().to_string()[..16]),
        created: now_seconds(),
        deadline: args.deadline,
        places: Arc::new(Semaphore::new(n_places.min(Semaphore::MAX_PERMITS))),
        large_bodies: Arc::new(Semaphore::new(LARGE_BODIES_MAX)),
        large_work: Arc::new(Semaphore::new(1)),
        stopping: AtomicBool::new(false),
        engine,
        drafts,
        tokenizer,
        template,
        name,
        remote,
        keys,
    })
}

/// Whoever guesses tokens; nobody where that fails and the command line allows it.
fn drafts(
    args: &cli::Serve,
    model: &engine::Model,
    pool: &Arc<Pool>,
    context: &Context,
) -> Result<Drafts, Failure> {
    let cache = args.cache.clone().unwrap_or_else(|| context.cache());
    let opened = model::draft_source(&args.draft, &cache, context).and_then(|choice| {
        Drafts::open(&choice, model, pool).map_err(|error| {
            Failure::new("tokens cannot be guessed as --draft says")
                .cause(error)
                .hint("--draft-optional serves without; --draft ngram needs no weights")
        })
    });
    match opened {
        Err(failure) if args.draft_optional => {
            tell(format_args!("serving without guesses: {failure}"));
            Ok(Drafts::None)
        }
        opened => opened,
    }
}

fn connect(args: &cli::Serve, vindex: &Vindex, secret: Secret) -> Result<Remote, Failure> {
    let mut options = RemoteOptions::new(Identity::of(vindex));
    options.secret = secret;
    options.wire = args.wire;
    options.deadline = args.patience.deadline();
    options.stall = args.patience.stall();
    Remote::connect(&args.ffn, options).map_err(|error| {
        Failure::new("the weight servers cannot be used")
            .hint(error.hint())
            .cause(error)
    })
}

/// The keys of the file, else of the environment, else none.
fn keys(args: &cli::Serve, context: &Context) -> Result<Keys, Failure> {
    let (text, place) = match &args.api_key_file {
        Some(path) => (read(path)?, format!("the key file {}", path.display())),
        None => match context.api_keys() {
            Some(text) => (text.replace(',', "\n"), "SKULK_API_KEY".to_owned()),
            None => return Ok(Keys::default()),
        },
    };
    Keys::parse(&text).map_err(|why| Failure::new(format!("{place}: {why}")))
}

/// The secret of the file, else of the environment, else none.
fn secret(path: Option<&Path>, context: &Context) -> Result<Secret, Failure> {
    let text = match path {
        Some(path) => Some(read_secret(path, "secret")?),
        None => context.secret(),
    };
    Ok(text.map_or_else(Secret::default, |text| Secret::new(text.into_bytes())))
}

fn read(path: &Path) -> Result<String, Failure> {
    let failed = |error| Failure::io("cannot read", path, error);
    let length = fs::metadata(path).map_err(failed)?.len();
    if length > FILE_BYTES_MAX {
        return Err(Failure::new(format!(
            "{} has {length} bytes; at most {FILE_BYTES_MAX} are read",
            path.display()
        )));
    }
    fs::read_to_string(path).map_err(failed)
}

/// Memory that a new process could use, as the kernel estimates it.
fn free_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: Option<u64> =
        line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse().ok());
    kib.map_or(FREE_BYTES_UNKNOWN, |kib| kib * 1024)
}
