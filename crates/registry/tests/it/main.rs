//! The registry over real HTTP: bytes in, bytes and texts out.

mod concurrent;
mod hostile;
mod kit;
mod routes;
mod uploads;
