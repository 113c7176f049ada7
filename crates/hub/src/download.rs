//! A file from a snapshot to this disk, whole or in part.
//!
//! Ranges of [`crate::Settings::chunk_bytes`] are fetched in parallel into the partial file of `partial.rs`, so that a
//! killed download goes on where it was. Of a file, pieces can be fetched that have hashes of their own.
//! Invariant: `target` appears only after its bytes were flushed and match the hash of the listing, or each piece its
//! own.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;

use crate::content::{git_oid_of, sha256_of, sha256_of_range};
use crate::partial::{Part, blocking, forget_record};
use crate::{Error, Snapshot};

/// Bytes gathered before they are written.
const WRITE_BYTES: usize = 1 << 20;

/// How a download goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Download {
    /// It starts; `kept_bytes` are here from an earlier try.
    Started {
        /// Length of the file.
        size_bytes: u64,
        /// Bytes that need not be fetched.
        kept_bytes: u64,
    },
    /// So many more bytes are on disk.
    Bytes(u64),
    /// All bytes are here and are being hashed.
    Verifying,
}

/// What a download did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Downloaded {
    /// Bytes were fetched.
    Fetched {
        /// How many.
        bytes: u64,
    },
    /// The target had this content already.
    AlreadyThere,
}

impl Snapshot {
    /// Fetches `path` into `target`, whose directory must exist; resumes an earlier try.
    ///
    /// # Errors
    /// [`Error::Hash`] when the bytes are not those of the listing (they are discarded); [`Error::Busy`] when
    /// another process is at it; [`Error::Io`]; otherwise as [`Snapshot::read_range`].
    pub async fn download(
        &self,
        path: &str,
        target: &Path,
        progress: &(dyn Fn(Download) + Send + Sync),
    ) -> Result<Downloaded, Error> {
        let file = self.file(path)?.clone();
        let content = Content::of(&file);
        let size_bytes = file.size_bytes;
        if fs::metadata(target).is_ok_and(|m| m.is_file() && m.len() == size_bytes)
            && let Ok(there) = File::open(target)
            && content.matches(target, there).await?.is_ok()
        {
            forget_record(target)?;
            return Ok(Downloaded::AlreadyThere);
        }
        let part = Part::open(target, &content.key(), size_bytes)?;
        let missing = part.missing(
            std::slice::from_ref(&(0..size_bytes)),
            self.wire().settings().chunk_bytes.max(1),
        );
        let kept_bytes = size_bytes - n_bytes(&missing);
        progress(Download::Started {
            size_bytes,
            kept_bytes,
        });
        self.fetch_ranges(path, &part, missing, progress).await?;
        progress(Download::Verifying);
        match content.matches(&part.path, part.sync()?).await? {
            Ok(()) => part.finish(target)?,
            Err(got) => {
                part.discard()?;
                let expected = content.hex().to_owned();
                return Err(Error::Hash {
                    repo: self.repo().clone(),
                    path: path.to_owned(),
                    expected,
                    got,
                });
            }
        }
        Ok(Downloaded::Fetched {
            bytes: size_bytes - kept_bytes,
        })
    }

    /// Fetches of `path` only `pieces`, ascending and inside the file, into `target`, which gets the file's full length,
    /// `head` at its start and holes elsewhere; resumes an earlier try, of these pieces or of others.
    ///
    /// # Errors
    /// [`Error::Hash`] when a piece is not what was promised (it is fetched again the next time, the others are kept);
    /// otherwise as [`Snapshot::download`].
    pub(crate) async fn download_pieces(
        &self,
        path: &str,
        target: &Path,
        head: Vec<u8>,
        pieces: Vec<Piece>,
        progress: &(dyn Fn(Download) + Send + Sync),
    ) -> Result<Downloaded, Error> {
        let file = self.file(path)?.clone();
        let size_bytes = file.size_bytes;
        let (head, pieces) = (Arc::new(head), Arc::new(pieces));
        if fs::metadata(target).is_ok_and(|m| m.is_file() && m.len() == size_bytes)
            && let Ok(there) = File::open(target)
            && begins_with(target, &there, &head).await?
            && wrong_piece(target, there, &pieces).await?.is_none()
        {
            forget_record(target)?;
            return Ok(Downloaded::AlreadyThere);
        }
        let part = Part::open(target, &Content::of(&file).key(), size_bytes)?;
        part.write(0, head.to_vec()).await?;
        let ranges: Vec<Range<u64>> = pieces.iter().map(|piece| piece.range.clone()).collect();
        let missing = part.missing(&ranges, self.wire().settings().chunk_bytes.max(1));
        let fetched_bytes = n_bytes(&missing);
        progress(Download::Started {
            size_bytes,
            kept_bytes: n_bytes(&ranges) - fetched_bytes,
        });
        self.fetch_ranges(path, &part, missing, progress).await?;
        progress(Download::Verifying);
        if let Some((piece, got)) = wrong_piece(&part.path, part.sync()?, &pieces).await? {
            part.forget(piece.range.clone())?;
            return Err(Error::Hash {
                repo: self.repo().clone(),
                path: format!("{path}, {}", piece.what),
                expected: piece.sha256,
                got,
            });
        }
        part.finish(target)?;
        Ok(Downloaded::Fetched {
            bytes: fetched_bytes,
        })
    }

    async fn fetch_ranges(
        &self,
        path: &str,
        part: &Part,
        missing: Vec<Range<u64>>,
        progress: &(dyn Fn(Download) + Send + Sync),
    ) -> Result<(), Error> {
        let mut waiting = missing.into_iter();
        let mut running = FuturesUnordered::new();
        let n_parallel = self.wire().settings().n_parallel.max(1);
        loop {
            while running.len() < n_parallel
                && let Some(range) = waiting.next()
            {
                running.push(self.fetch_range(path, part, range, progress));
            }
            match running.next().await {
                Some(result) => result?,
                None => return Ok(()),
            }
        }
    }

    async fn fetch_range(
        &self,
        path: &str,
        part: &Part,
        range: Range<u64>,
        progress: &(dyn Fn(Download) + Send + Sync),
    ) -> Result<(), Error> {
        let mut reader = self.reader(path, range.clone())?;
        let mut at = range.start;
        let mut block = Vec::with_capacity(WRITE_BYTES);
        loop {
            let chunk = reader.next().await;
            if let Ok(Some(bytes)) = &chunk {
                block.extend_from_slice(bytes);
            }
            // On an error as well: what is here is kept for the next try.
            if !block.is_empty() && (block.len() >= WRITE_BYTES || !matches!(chunk, Ok(Some(_)))) {
                let n = block.len() as u64;
                block = part.write(at, block).await?;
                at += n;
                progress(Download::Bytes(n));
            }
            if chunk?.is_none() {
                return Ok(());
            }
        }
    }
}

/// Bytes of a file that can be checked by themselves.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    /// What they are, for people.
    pub(crate) what: String,
    pub(crate) range: Range<u64>,
    /// Hex.
    pub(crate) sha256: String,
}

/// The first piece that is not what was promised, and the hash that it has instead.
async fn wrong_piece(
    path: &Path,
    file: File,
    pieces: &Arc<Vec<Piece>>,
) -> Result<Option<(Piece, String)>, Error> {
    let pieces = Arc::clone(pieces);
    blocking("read", path, move |_| {
        for piece in pieces.iter() {
            let got = sha256_of_range(&file, piece.range.clone())?;
            if got != piece.sha256 {
                return Ok(Some((piece.clone(), got)));
            }
        }
        Ok(None)
    })
    .await
}

async fn begins_with(path: &Path, file: &File, head: &Arc<Vec<u8>>) -> Result<bool, Error> {
    let head = Arc::clone(head);
    let mut file = file.try_clone().map_err(Error::io("read", path))?;
    blocking("read", path, move |_| {
        let mut got = vec![0; head.len()];
        file.seek(SeekFrom::Start(0))?;
        file.read_exact(&mut got)?;
        Ok(got == *head)
    })
    .await
}

fn n_bytes(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// The content that a listing promises.
enum Content {
    Sha256(String),
    GitOid(String),
}

impl Content {
    fn of(file: &crate::File) -> Content {
        match &file.sha256 {
            Some(sha256) => Content::Sha256(sha256.clone()),
            None => Content::GitOid(file.git_oid.clone()),
        }
    }

    fn hex(&self) -> &str {
        match self {
            Content::Sha256(hex) | Content::GitOid(hex) => hex,
        }
    }

    fn key(&self) -> String {
        match self {
            Content::Sha256(hex) => format!("sha256:{hex}"),
            Content::GitOid(hex) => format!("git:{hex}"),
        }
    }

    /// Hashes a file; `Err` holds the hash that it has instead.
    async fn matches(&self, path: &Path, file: File) -> Result<Result<(), String>, Error> {
        let hash = match self {
            Content::Sha256(_) => sha256_of,
            Content::GitOid(_) => git_oid_of,
        };
        let got = blocking("read", path, move |_| hash(file)).await?;
        Ok(if got == self.hex() { Ok(()) } else { Err(got) })
    }
}
