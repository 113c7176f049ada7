//! `serve`: a weight server. Opens some layers and experts of a vindex, and answers feed-forward requests of nodes until
//! it is told to stop.
//!
//! Order: what can be refused is refused; what a repository holds of the role is pulled into the cache; the vindex is
//! mapped; only then does anything listen, and the ready line says where. Invariant: nobody beyond this machine can reach
//! it without a secret, the secret is never printed, and the first request to stop lets what was taken be answered.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use engine::wire::{Address, Identity, Listener, Secret, Server, ServerLimits, ServerOptions};
use engine::{Local, Pool};
use hub::{Reference, Wanted};
use terminal::{Failure, Meter, Stop, read_secret, size, tell};
use tokio::net::TcpListener;
use vindex::{Share, Slice, Vindex};

use crate::cli::Serve;
use crate::context::Context;
use crate::http::{self, Shown};
use crate::pull;

/// Serves until the process is told to stop.
pub(crate) fn serve(args: &Serve, context: &Context) -> Result<(), Failure> {
    let output = context.output;
    let secret = secret(args.secret_file.as_deref(), context)?;
    refuse_strangers(args, &secret)?;
    let http_token = args.http_token_file.as_deref();
    let http_token = http_token
        .map(|path| read_secret(path, "token"))
        .transpose()?;
    let mut stop = context.stop()?;
    let dir = locate(args, context, &mut stop)?;
    let vindex = Arc::new(open(&dir, args)?);
    let pool = Arc::new(Pool::new(
        args.threads.map_or_else(n_processors, usize::from),
    ));
    let local = Local::new(Arc::clone(&vindex), pool)
        .map_err(Failure::of(format!("cannot serve {}", dir.display())))?
        .resting();
    let (layers, experts) = (local.layers(), local.experts());
    let options = ServerOptions {
        model: Identity::of(&vindex),
        layers: layers.clone(),
        experts: experts.clone(),
        secret,
        limits: limits(args),
    };

    let listener = Listener::bind(&args.listen).map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::AddrInUse => {
                "somebody listens there already; name another address with --listen"
            }
            _ => "name an address of this machine with --listen, as HOST:PORT or unix:/path",
        };
        Failure::new(format!("cannot listen on {}", args.listen))
            .cause(error)
            .hint(hint)
    })?;
    let http_listener = context.wait(TcpListener::bind(args.http));
    let bound = http_listener.and_then(|listener| Ok((listener.local_addr()?, listener)));
    let (http_address, http_listener) = bound.map_err(|error| {
        Failure::new(format!("cannot listen on {} for HTTP", args.http))
            .cause(error)
            .hint("name another address or port with --http")
    })?;
    let server =
        Server::new(Arc::new(local), options).map_err(Failure::of("cannot start threads"))?;
    let shown = Arc::new(Shown::new(server.clone(), &vindex, http_token));
    context.spawn(http::serve(http_listener, Arc::clone(&shown)));
    let address = listener.address().clone();
    let accepting = server.clone();
    thread::Builder::new()
        .name("accept".to_owned())
        .spawn(move || {
            if let Err(error) = accepting.serve(&listener) {
                tell(format_args!(
                    "error: no more connections are taken: {error}"
                ));
            }
        })
        .map_err(Failure::of("cannot start threads"))?;

    let held_bytes = vindex.share().size_bytes(vindex.index());
    output.text(format_args!(
        "ready on {address}: vindex {}, layers {}..{}, experts {}..{}, {} of weights, mapped; http://{http_address}/metrics",
        vindex.id(),
        layers.start,
        layers.end,
        experts.start,
        experts.end,
        size(held_bytes)
    ))?;
    output.value(&serde_json::json!({
        "ready": true, "listen": address.to_string(), "http": http_address.to_string(), "vindex": vindex.id().to_string(),
        "layers": [layers.start, layers.end], "experts": [experts.start, experts.end], "held_bytes": held_bytes, "dir": dir,
    }))?;
    context.wait(stop.told());
    drain(args, context, &server, &shown, &mut stop)
}

/// Answers what was taken and refuses the rest, within the limit; a second request to stop ends it at once.
fn drain(
    args: &Serve,
    context: &Context,
    server: &Server,
    shown: &Shown,
    stop: &mut Stop,
) -> Result<(), Failure> {
    shown.set_draining();
    tell(format_args!(
        "stopping: what was taken is answered, within {} s",
        args.drain
    ));
    let (server, limit) = (server.clone(), Duration::from_secs(args.drain));
    let is_answered = context.wait(async {
        tokio::select! {
            ended = tokio::task::spawn_blocking(move || server.drain(limit)) => ended.ok(),
            () = stop.told() => None,
        }
    });
    match is_answered {
        Some(true) => {}
        Some(false) => {
            tell("stopped before everything was answered; nodes ask a replica for the rest")
        }
        None => tell("stopped at once"),
    }
    if let Address::Unix(path) = &args.listen {
        // The next server replaces it if it stays.
        let _ = fs::remove_file(path);
    }
    Ok(())
}

fn n_processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

fn limits(args: &Serve) -> ServerLimits {
    let standard = ServerLimits::default();
    ServerLimits {
        connections: args
            .max_connections
            .map_or(standard.connections, usize::from),
        held_bytes: args
            .queue
            .map_or(standard.held_bytes, |mib| u64::from(mib.get()) << 20),
        ..standard
    }
}

/// The directory to open: the one that is named, else one in the cache, pulled if need be.
fn locate(args: &Serve, context: &Context, stop: &mut Stop) -> Result<PathBuf, Failure> {
    let dir = Path::new(&args.from);
    if dir.is_dir() {
        return Ok(dir.to_owned());
    }
    let Ok(reference) = args.from.parse::<Reference>() else {
        return Err(Failure::new(format!(
            "there is no directory {}, and it is no repository of the Hub either",
            args.from
        ))
        .hint("name the directory of a vindex, or owner/name[@revision]"));
    };
    let cache = match &args.cache {
        Some(dir) => dir.clone(),
        None => context.cache()?,
    };
    let wanted = Wanted {
        slice: Some(Slice::ExpertServer),
        layers: args.ranges.layers,
        experts: args.ranges.experts,
    };
    let hub = context.hub()?;
    let meter = Meter::new("pull");
    let progress = |pulling| pull::show(&meter, pulling);
    let cached = context.wait(async {
        tokio::select! {
            cached = hub::cached_vindex(&hub, &reference, wanted, &cache, &progress) => Some(cached),
            () = stop.told() => None,
        }
    });
    drop(meter);
    let cached = cached.ok_or(Failure::Interrupted)?.map_err(pull::failure)?;
    let fetched = match cached.pulled {
        Some(pulled) => format!("fetched {}", size(pulled.bytes_fetched)),
        None => "here already".to_owned(),
    };
    context.output.text(format_args!(
        "source: hf://{} at commit {}, in {} ({fetched})",
        reference.repo,
        cached.commit,
        cached.dir.display()
    ))?;
    Ok(cached.dir)
}

/// Maps the feed-forward parts that are asked for, of those that are there, and no others.
fn open(dir: &Path, args: &Serve) -> Result<Vindex, Failure> {
    let opened = Vindex::open_as(dir, |index, recorded| {
        let layers = args.ranges.layers.or(recorded.layers);
        let experts = args.ranges.experts.or(recorded.experts);
        Share::of_experts(index, layers, experts)
    });
    opened.map_err(|error| {
        let hint = match &error {
            vindex::Error::NotAVindex { .. } => {
                Some("make one with `larql extract`, or fetch one with `larql pull`")
            }
            vindex::Error::ShareNotHere { .. } => Some(
                "`larql pull` fetches the rest; without --layers and --experts all that is here is served",
            ),
            _ => None,
        };
        let failure = Failure::new(format!("cannot serve {}", dir.display())).cause(error);
        match hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    })
}

/// Beyond this machine, only who knows a secret is answered.
fn refuse_strangers(args: &Serve, secret: &Secret) -> Result<(), Failure> {
    if secret.is_empty() && !args.listen.is_local() {
        return Err(Failure::new(format!("refusing to serve on {} without a secret", args.listen)).hint(
            "name a file with one by --secret-file, or set SKULK_SECRET; without one, listen on 127.0.0.1 or unix:/path",
        ));
    }
    if args.http_token_file.is_none() && !args.http.ip().is_loopback() {
        return Err(Failure::new(format!(
            "refusing to show metrics on {} without a token",
            args.http
        ))
        .hint("name a file with one by --http-token-file, or listen on 127.0.0.1"));
    }
    Ok(())
}

/// Of the file that is named, else of the environment, else none.
pub(crate) fn secret(file: Option<&Path>, context: &Context) -> Result<Secret, Failure> {
    let text = match file {
        Some(path) => Some(read_secret(path, "secret")?),
        None => context.secret(),
    };
    Ok(text.map_or_else(Secret::default, |text| Secret::new(text.into_bytes())))
}
