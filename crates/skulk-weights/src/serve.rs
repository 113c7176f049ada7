//! `registry serve`: a Hub of one's own over a directory, until the process is told to stop.
//!
//! Invariant: without a token nobody beyond this machine can reach it.

use std::net::SocketAddr;
use std::path::Path;

use terminal::{Failure, Output, Stop};
use tokio::net::TcpListener;

use crate::environment::Environment;

/// Serves `root` on `listen`. Clients must show the token in `token_file`; without one, `listen` must be loopback.
/// Answers name the server as `public_url` says, where a proxy stands before it.
pub(crate) fn serve(
    root: &Path,
    listen: SocketAddr,
    token_file: Option<&Path>,
    public_url: Option<&str>,
    environment: &Environment,
    output: Output,
) -> Result<(), Failure> {
    let token = token_file.map(read_token).transpose()?;
    if token.is_none() && !listen.ip().is_loopback() {
        return Err(
            Failure::new(format!("refusing to serve on {listen} without a token"))
                .hint("name a file with a token by --token-file, or listen on 127.0.0.1"),
        );
    }
    if let Some(url) = public_url.filter(|url| !is_address(url)) {
        return Err(
            Failure::new(format!("--public-url {url} is no address of a server"))
                .hint("write it as https://hub.example.org"),
        );
    }
    let registry = registry::Registry::open(root).map_err(|error| {
        Failure::new(format!("cannot open the registry in {}", root.display())).cause(error)
    })?;
    environment.block_on(async {
        let mut stop = Stop::new().map_err(Failure::of("cannot listen for signals"))?;
        let listener = TcpListener::bind(listen).await;
        let listener = listener.map_err(|error| {
            Failure::new(format!("cannot listen on {listen}"))
                .cause(error)
                .hint("another address or port is named by --listen")
        })?;
        let address = listener
            .local_addr()
            .map_err(|error| Failure::new(format!("cannot listen on {listen}")).cause(error))?;
        let options = registry::Options {
            token,
            public_url: public_url.map(str::to_owned),
            ..registry::Options::default()
        };
        let url = format!("http://{address}");
        let public_url = public_url.unwrap_or(&url);
        output.value(&serde_json::json!({"url": url, "public_url": public_url, "root": root}))?;
        output.text(format_args!(
            "serving {} at {url} (clients: HF_ENDPOINT={public_url})",
            root.display()
        ))?;
        registry::serve(
            registry,
            listener,
            options,
            async move { stop.told().await },
        )
        .await
        .map_err(|error| Failure::new(format!("the registry at {url} stopped")).cause(error))
    })?
}

/// Whether text is `http://` or `https://`, a host, and nothing that would break an address made from it.
fn is_address(text: &str) -> bool {
    let rest = text
        .strip_prefix("https://")
        .or_else(|| text.strip_prefix("http://"));
    rest.is_some_and(|rest| {
        !rest.is_empty()
            && !rest.starts_with('/')
            && rest.chars().all(|c| {
                c.is_ascii_alphanumeric()
                    || matches!(c, '.' | '-' | '_' | ':' | '[' | ']' | '/' | '~')
            })
    })
}

fn read_token(path: &Path) -> Result<String, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::io("cannot read the token file", path, error))?;
    match text.trim() {
        "" => Err(
            Failure::new(format!("the token file {} is empty", path.display()))
                .hint("write the token into it, on one line"),
        ),
        token => Ok(token.to_owned()),
    }
}
