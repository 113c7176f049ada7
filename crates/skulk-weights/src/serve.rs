//! `registry serve`.

use std::net::SocketAddr;
use std::path::Path;

use crate::environment::Environment;
use crate::failure::Failure;
use crate::output::Output;

/// stub
pub(crate) fn serve(_root: &Path, _listen: SocketAddr, _token_file: Option<&Path>, _environment: &Environment, _output: Output) -> Result<(), Failure> {
    Err(Failure::new("not built yet"))
}
