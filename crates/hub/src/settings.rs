//! What a client of the Hub can be told from outside.
//!
//! Invariant: nothing here reads the process environment; the binary hands over a getter. The only file
//! read is the token file. Truth values are those of the Python client: 1, ON, YES, TRUE.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Error, Token};

/// Where the Hub is, who we are, and how patient we are.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Address without a trailing slash, `https://huggingface.co` by default.
    pub endpoint: String,
    /// Credentials, sent to the endpoint's own origin only.
    pub token: Option<Token>,
    /// Refuse every request.
    pub offline: bool,
    /// Upload by Xet where the Hub offers it.
    pub xet: bool,
    /// `$HF_HOME`; the Xet client keeps its chunk index below it.
    pub home: PathBuf,
    /// Longest wait for the head of an answer to a small request.
    pub metadata_timeout: Duration,
    /// Longest silence in the middle of a body.
    pub download_timeout: Duration,
    /// Longest wait for the Hub to digest a commit or an uploaded object.
    pub write_timeout: Duration,
    /// A request that keeps failing is given up after this long; progress starts the clock anew.
    pub give_up_after: Duration,
    /// First wait between two attempts; doubles each time, up to 8 s.
    pub backoff_base: Duration,
    /// Ranges of one file, and files of one commit, in flight at a time.
    pub n_parallel: usize,
    /// Size of the ranges that a download is cut into.
    pub chunk_bytes: u64,
}

impl Default for Settings {
    /// The public Hub without a token.
    fn default() -> Settings {
        Settings {
            endpoint: "https://huggingface.co".to_owned(),
            token: None,
            offline: false,
            xet: true,
            home: PathBuf::from(".cache/huggingface"),
            metadata_timeout: Duration::from_secs(10),
            download_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(120),
            give_up_after: Duration::from_secs(30),
            backoff_base: Duration::from_millis(500),
            n_parallel: 4,
            chunk_bytes: 8 << 20,
        }
    }
}

impl Settings {
    /// The settings in the variables of the Hub's clients, read through `get`
    /// (`|name| std::env::var(name).ok()` in a binary). An empty variable counts as unset.
    ///
    /// Token: `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN`, the file `HF_TOKEN_PATH`, `$HF_HOME/token`; none of
    /// them when `HF_HUB_DISABLE_IMPLICIT_TOKEN` is set.
    ///
    /// # Errors
    /// [`Error::Setting`] for a timeout that is no number of seconds; [`Error::Io`] for a token file that
    /// exists but cannot be read.
    pub fn from_vars(get: impl Fn(&str) -> Option<String>) -> Result<Settings, Error> {
        let get = |name: &str| get(name).filter(|value| !value.trim().is_empty());
        let is_set = |name: &str| get(name).is_some_and(|value| is_true(&value));
        let base = Settings::default();
        let home = get("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let cache = get("XDG_CACHE_HOME").map(PathBuf::from).unwrap_or_else(|| {
                let user = get("HOME")
                    .or_else(|| get("USERPROFILE"))
                    .unwrap_or_default();
                PathBuf::from(user).join(".cache")
            });
            cache.join("huggingface")
        });
        let token = if is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            None
        } else {
            match get("HF_TOKEN").or_else(|| get("HUGGING_FACE_HUB_TOKEN")) {
                Some(text) => Token::new(&text),
                None => read_token(
                    &get("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from),
                )?,
            }
        };
        Ok(Settings {
            endpoint: get("HF_ENDPOINT")
                .map_or(base.endpoint, |e| e.trim().trim_end_matches('/').to_owned()),
            token,
            offline: is_set("HF_HUB_OFFLINE") || is_set("TRANSFORMERS_OFFLINE"),
            xet: !is_set("HF_HUB_DISABLE_XET"),
            home,
            metadata_timeout: seconds("HF_HUB_ETAG_TIMEOUT", &get)?
                .unwrap_or(base.metadata_timeout),
            download_timeout: seconds("HF_HUB_DOWNLOAD_TIMEOUT", &get)?
                .unwrap_or(base.download_timeout),
            ..base
        })
    }
}

fn is_true(value: &str) -> bool {
    matches!(
        value.trim().to_ascii_uppercase().as_str(),
        "1" | "ON" | "YES" | "TRUE"
    )
}

fn seconds(
    name: &'static str,
    get: &impl Fn(&str) -> Option<String>,
) -> Result<Option<Duration>, Error> {
    let Some(text) = get(name) else {
        return Ok(None);
    };
    match text.trim().parse::<f64>() {
        Ok(n) if n > 0.0 && n <= 86_400.0 => Ok(Some(Duration::from_secs_f64(n))),
        _ => Err(Error::Setting {
            name,
            text,
            reason: "a number of seconds, more than 0 and at most 86400",
        }),
    }
}

fn read_token(path: &Path) -> Result<Option<Token>, Error> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Token::new(&text)),
        Err(e)
            if matches!(
                e.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(source) => Err(Error::Io {
            doing: "read the token file",
            path: path.to_owned(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(vars: &[(&str, &str)]) -> Settings {
        Settings::from_vars(|name| {
            vars.iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| (*v).to_owned())
        })
        .unwrap()
    }

    #[test]
    fn the_endpoint_loses_its_slash_and_empty_means_unset() {
        assert_eq!(
            from(&[("HF_ENDPOINT", "http://hub.test/x/")]).endpoint,
            "http://hub.test/x"
        );
        assert_eq!(
            from(&[("HF_ENDPOINT", "")]).endpoint,
            "https://huggingface.co"
        );
    }

    #[test]
    fn the_token_comes_from_the_first_place_that_has_one() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        std::fs::write(dir.path().join("token"), "from-home\n").unwrap();
        let other = dir.path().join("other");
        std::fs::write(&other, "from-path").unwrap();
        let other = other.to_str().unwrap();
        let token = |vars: &[(&str, &str)]| from(vars).token;
        assert_eq!(token(&[("HF_HOME", home)]), Token::new("from-home"));
        assert_eq!(
            token(&[("HF_HOME", home), ("HF_TOKEN_PATH", other)]),
            Token::new("from-path")
        );
        assert_eq!(
            token(&[
                ("HF_TOKEN", ""),
                ("HUGGING_FACE_HUB_TOKEN", "old"),
                ("HF_HOME", home)
            ]),
            Token::new("old")
        );
        assert_eq!(
            token(&[("HF_TOKEN", "new"), ("HUGGING_FACE_HUB_TOKEN", "old")]),
            Token::new("new")
        );
        assert_eq!(
            token(&[("HF_TOKEN", "new"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]),
            None
        );
        assert_eq!(token(&[("HF_HOME", &format!("{home}/absent"))]), None);
    }

    #[test]
    fn switches_and_timeouts() {
        let s = from(&[
            ("TRANSFORMERS_OFFLINE", "yes"),
            ("HF_HUB_DISABLE_XET", "1"),
            ("HF_HUB_ETAG_TIMEOUT", "2.5"),
        ]);
        assert!(s.offline && !s.xet);
        assert_eq!(s.metadata_timeout, Duration::from_millis(2500));
        assert!(!from(&[("HF_HUB_OFFLINE", "0")]).offline);
        assert_eq!(
            from(&[("XDG_CACHE_HOME", "/c")]).home,
            Path::new("/c/huggingface")
        );
        let bad = Settings::from_vars(|n| (n == "HF_HUB_ETAG_TIMEOUT").then(|| "soon".to_owned()));
        assert!(matches!(
            bad,
            Err(Error::Setting {
                name: "HF_HUB_ETAG_TIMEOUT",
                ..
            })
        ));
    }
}
