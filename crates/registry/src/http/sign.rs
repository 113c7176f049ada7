//! Addresses that carry their own right to be used: LFS clients send no token to them.
//!
//! Invariant: a signature covers everything an upload may do (object, size, upload, part, deadline), under a key that
//! only this process has and that dies with it.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::clock;
use crate::names::random;

pub(crate) struct Signer {
    /// As long as a block of SHA-256, in bytes: it is used as it is.
    key: [u8; 64],
}

impl Signer {
    pub(crate) fn new() -> Signer {
        Signer { key: random() }
    }

    /// The signature of `what`, in hex.
    pub(crate) fn sign(&self, what: &str) -> String {
        hex::encode(self.mac(what).finalize().into_bytes())
    }

    /// Whether `signature` is that of `what` and the deadline, in seconds since 1970, has not passed.
    pub(crate) fn allows(&self, what: &str, signature: &str, until: u64) -> bool {
        clock::seconds() <= until && self.same(&self.sign(what), signature)
    }

    /// Compares two secrets in a time that does not tell where they differ.
    pub(crate) fn same(&self, expected: &str, got: &str) -> bool {
        let got = self.mac(got).finalize().into_bytes();
        self.mac(expected).verify_slice(&got).is_ok()
    }

    fn mac(&self, what: &str) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new(&self.key.into());
        mac.update(what.as_bytes());
        mac
    }
}
