//! Where a weight server listens: `HOST:PORT` over TCP, or `unix:/path` on this machine.
//!
//! Invariant: what [`fmt::Display`] prints parses back to the same address. Looking a host up is left to whoever connects.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// Where a weight server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Address {
    /// A host, by name or number, and a port.
    Tcp {
        /// Name, IPv4 or IPv6 address (without brackets).
        host: String,
        /// Port; 0 when listening lets the system choose.
        port: u16,
    },
    /// A Unix socket in the file system.
    Unix(PathBuf),
}

impl Address {
    /// Whether only this machine can reach it: a Unix socket, `localhost`, or a loopback number. A server that listens
    /// anywhere else needs a secret.
    pub fn is_local(&self) -> bool {
        match self {
            Address::Unix(_) => true,
            Address::Tcp { host, .. } => {
                host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
            }
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// A text that is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address; expected HOST:PORT or unix:/path")]
pub struct NoAddress(pub String);

impl FromStr for Address {
    type Err = NoAddress;

    fn from_str(text: &str) -> Result<Address, NoAddress> {
        let no = || NoAddress(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            // Relative paths would mean another socket in another directory; an empty one is Linux's unnamed socket.
            return if path.starts_with('/') {
                Ok(Address::Unix(path.into()))
            } else {
                Err(no())
            };
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(no)?;
        let port = port.parse().map_err(|_| no())?;
        let host = match host.strip_prefix('[') {
            Some(inside) => inside.strip_suffix(']').ok_or_else(no)?,
            None if host.contains(':') => return Err(no()),
            None => host,
        };
        let is_written = |c: char| c.is_ascii_graphic() && !"[]/@,".contains(c);
        if host.is_empty() || !host.chars().all(is_written) {
            return Err(no());
        }
        Ok(Address::Tcp {
            host: host.to_owned(),
            port,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_read_back() {
        for text in [
            "127.0.0.1:7000",
            "[::1]:7000",
            "weights-3.rack:65535",
            "unix:/run/skulk/a b.sock",
        ] {
            let address: Address = text.parse().expect(text);
            assert_eq!(address.to_string(), text);
        }
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        for text in [
            "",
            "host",
            "host:",
            ":80",
            "host:66000",
            "host:-1",
            "::1:80",
            "[::1:80",
            "[]:80",
            "unix:",
            "unix:a",
            "http://host:80",
            "a,b:80",
            "a b:80",
        ] {
            let got = text.parse::<Address>();
            assert_eq!(got, Err(NoAddress(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn loopback_and_unix_are_local_and_nothing_else_is() {
        let local = |text: &str| text.parse::<Address>().expect(text).is_local();
        assert!(
            local("unix:/tmp/s")
                && local("127.9.9.9:1")
                && local("[::1]:1")
                && local("localhost:1")
        );
        assert!(
            !local("0.0.0.0:1")
                && !local("[::]:1")
                && !local("10.0.0.1:1")
                && !local("localhost.example:1")
        );
    }
}
