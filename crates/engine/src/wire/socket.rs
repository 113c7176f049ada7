//! A connected socket and a listening one, TCP or Unix, with the three ways to move bytes: at once, waiting a bounded
//! time, and waiting for several at once.
//!
//! Invariant: no call waits longer than the limit it was given. What the bytes mean is left to others.

use std::fs;
use std::io::{self, ErrorKind, Read};
use std::net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
#[cfg(target_os = "linux")]
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{RecvFlags, SendFlags, sockopt};

use super::address::Address;

/// A connection.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    /// Connects, trying every address of a host name, before `until`.
    pub(super) fn connect(address: &Address, until: Instant) -> io::Result<Socket> {
        match address {
            Address::Unix(path) => Socket::unix(connect_unix(path, until)?),
            Address::Tcp { host, port } => {
                let mut error = io::Error::new(ErrorKind::NotFound, "the host name has no address");
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(ErrorKind::TimedOut.into());
                    }
                    match TcpStream::connect_timeout(&address, left) {
                        Ok(stream) => return Socket::tcp(stream),
                        Err(failed) => error = failed,
                    }
                }
                Err(error)
            }
        }
    }

    /// Small frames leave at once; a peer that vanished without a word is noticed by the kernel's own probes.
    fn tcp(stream: TcpStream) -> io::Result<Socket> {
        stream.set_nodelay(true)?;
        sockopt::set_socket_keepalive(&stream, true)?;
        #[cfg(target_os = "linux")]
        {
            sockopt::set_tcp_keepidle(&stream, Duration::from_secs(20))?;
            sockopt::set_tcp_keepintvl(&stream, Duration::from_secs(5))?;
            sockopt::set_tcp_keepcnt(&stream, 3)?;
        }
        Ok(Socket::Tcp(stream))
    }

    /// A batch of 16 rows leaves at once where the system allows it; TCP finds its own size.
    fn unix(stream: UnixStream) -> io::Result<Socket> {
        sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER)?;
        Ok(Socket::Unix(stream))
    }

    /// How long [`Socket::recv`] waits.
    pub(super) fn set_recv_limit(&self, limit: Duration) -> io::Result<()> {
        match self {
            Socket::Tcp(stream) => stream.set_read_timeout(Some(limit)),
            Socket::Unix(stream) => stream.set_read_timeout(Some(limit)),
        }
    }

    /// Waits for bytes, at most the limit set: then [`ErrorKind::WouldBlock`]. 0: the other end closed.
    pub(super) fn recv(&self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            let got = match self {
                Socket::Tcp(stream) => (&mut &*stream).read(bytes),
                Socket::Unix(stream) => (&mut &*stream).read(bytes),
            };
            match got {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::TimedOut => {
                    return Err(ErrorKind::WouldBlock.into());
                }
                got => return got,
            }
        }
    }

    /// Takes the bytes that are there, or fails with [`ErrorKind::WouldBlock`]. 0: the other end closed.
    pub(super) fn recv_now(&self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::net::recv(self, &mut *bytes, RecvFlags::DONTWAIT) {
                Err(rustix::io::Errno::INTR) => {}
                got => return Ok(got?.0),
            }
        }
    }

    /// Hands over as many bytes as the kernel takes at once, or fails with [`ErrorKind::WouldBlock`].
    pub(super) fn send_now(&self, bytes: &[u8]) -> io::Result<usize> {
        #[cfg(target_vendor = "apple")]
        let flags = SendFlags::DONTWAIT;
        #[cfg(not(target_vendor = "apple"))]
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            match rustix::net::send(self, bytes, flags) {
                Err(rustix::io::Errno::INTR) => {}
                sent => return Ok(sent?),
            }
        }
    }

    /// Hands over all bytes before `until`, or fails with [`ErrorKind::TimedOut`].
    pub(super) fn send_all(&self, mut bytes: &[u8], until: Instant) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.send_now(bytes) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(ErrorKind::TimedOut.into());
                    }
                    wait(&mut [(self.as_fd(), Wanted::SEND)], left)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Ends both directions; whoever waits in `recv` or `send` of this socket wakes up.
    pub(super) fn shutdown(&self) {
        // It fails only when the connection is gone already.
        let _ = match self {
            Socket::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Socket::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Tcp(stream) => stream.as_fd(),
            Socket::Unix(stream) => stream.as_fd(),
        }
    }
}

/// Linux lets a blocking `connect` wait for as long as the listener's queue is full, which is for ever when its process
/// is stopped.
#[cfg(target_os = "linux")]
fn connect_unix(path: &Path, until: Instant) -> io::Result<UnixStream> {
    use rustix::net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
    };
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    while let Err(error) = connect(&socket, &address) {
        if error != rustix::io::Errno::AGAIN {
            return Err(error.into());
        }
        if Instant::now() >= until {
            return Err(ErrorKind::TimedOut.into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

#[cfg(not(target_os = "linux"))]
fn connect_unix(path: &Path, _until: Instant) -> io::Result<UnixStream> {
    UnixStream::connect(path)
}

/// What to wait for on a socket, and then what came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) recv: bool,
    pub(super) send: bool,
}

impl Wanted {
    pub(super) const RECV: Wanted = Wanted {
        recv: true,
        send: false,
    };
    pub(super) const SEND: Wanted = Wanted {
        recv: false,
        send: true,
    };
}

/// Waits until one of the sockets is ready, or `limit` is over (nothing is ready then). A socket that failed is ready
/// for whatever was wanted.
pub(super) fn wait(sockets: &mut [(BorrowedFd<'_>, Wanted)], limit: Duration) -> io::Result<()> {
    wait_for(sockets, Some(limit))
}

fn wait_for(sockets: &mut [(BorrowedFd<'_>, Wanted)], limit: Option<Duration>) -> io::Result<()> {
    let mut fds: Vec<PollFd<'_>> = sockets
        .iter()
        .map(|(fd, wanted)| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, wanted.recv);
            flags.set(PollFlags::OUT, wanted.send);
            PollFd::from_borrowed_fd(*fd, flags)
        })
        .collect();
    let limit = limit.map(|limit| Timespec {
        tv_sec: limit.as_secs().min(86_400) as _,
        tv_nsec: limit.subsec_nanos() as _,
    });
    match rustix::event::poll(&mut fds, limit.as_ref()) {
        // An interruption reads as "nothing is ready"; callers look at their clocks and come again.
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let failed = PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL;
    for ((_, wanted), fd) in sockets.iter_mut().zip(&fds) {
        let came = fd.revents();
        wanted.recv &= came.intersects(PollFlags::IN | failed);
        wanted.send &= came.intersects(PollFlags::OUT | failed);
    }
    Ok(())
}

/// Bytes that a Unix socket takes before its reader has read; the system cuts it to what it allows.
const SEND_BUFFER: usize = 1 << 20;

/// Connections that the kernel keeps until they are accepted. With the standard library's 128, a burst makes clients
/// repeat their first packet, a second later.
const BACKLOG: i32 = 4096;

/// A listening socket. A Unix socket's file goes with it.
#[derive(Debug)]
pub struct Listener {
    inner: Inner,
    address: Address,
}

#[derive(Debug)]
enum Inner {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Listens at `address`. The file of a Unix socket that nobody listens on any longer is replaced.
    ///
    /// # Errors
    /// Those of the system: the address is taken, or not ours.
    pub fn bind(address: &Address) -> io::Result<Listener> {
        let inner = match address {
            Address::Tcp { host, port } => Inner::Tcp(TcpListener::bind((host.as_str(), *port))?),
            Address::Unix(path) => {
                let listener = match UnixListener::bind(path) {
                    Err(error) if error.kind() == ErrorKind::AddrInUse => {
                        match UnixStream::connect(path) {
                            Err(dead) if dead.kind() == ErrorKind::ConnectionRefused => {
                                fs::remove_file(path)?
                            }
                            _ => return Err(error),
                        }
                        UnixListener::bind(path)?
                    }
                    bound => bound?,
                };
                Inner::Unix(listener, path.clone())
            }
        };
        let address = match (&inner, address) {
            (Inner::Tcp(listener), Address::Tcp { host, .. }) => Address::Tcp {
                host: host.clone(),
                port: listener.local_addr()?.port(),
            },
            _ => address.clone(),
        };
        match &inner {
            Inner::Tcp(listener) => {
                listener.set_nonblocking(true)?;
                rustix::net::listen(listener, BACKLOG)?;
            }
            Inner::Unix(listener, _) => {
                listener.set_nonblocking(true)?;
                rustix::net::listen(listener, BACKLOG)?;
            }
        }
        Ok(Listener { inner, address })
    }

    /// Where it listens, with the port that the system chose.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Waits for a connection, or until a byte arrives on `stop`: then `None`.
    pub(super) fn accept(&self, stop: &UnixStream) -> io::Result<Option<Socket>> {
        loop {
            let accepted = match &self.inner {
                Inner::Tcp(listener) => listener.accept().map(|(stream, _)| {
                    // Some systems let the accepted socket inherit it.
                    stream.set_nonblocking(false)?;
                    Socket::tcp(stream)
                }),
                Inner::Unix(listener, _) => listener.accept().map(|(stream, _)| {
                    stream.set_nonblocking(false)?;
                    Socket::unix(stream)
                }),
            };
            match accepted {
                Ok(Ok(socket)) => return Ok(Some(socket)),
                // That one connection is gone already; others are not.
                Ok(Err(_)) => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => match error.kind() {
                    ErrorKind::ConnectionAborted | ErrorKind::Interrupted => continue,
                    _ => return Err(error),
                },
            }
            let listener = match &self.inner {
                Inner::Tcp(listener) => listener.as_fd(),
                Inner::Unix(listener, _) => listener.as_fd(),
            };
            let mut sockets = [(listener, Wanted::RECV), (stop.as_fd(), Wanted::RECV)];
            wait_for(&mut sockets, None)?;
            if sockets[1].1.recv {
                return Ok(None);
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Inner::Unix(_, path) = &self.inner {
            // Somebody may have removed it before.
            let _ = fs::remove_file(path);
        }
    }
}
