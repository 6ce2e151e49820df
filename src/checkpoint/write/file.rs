//! One file of the target, hashed while it is written, in whatever order its parts arrive.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::Xxh3;

use crate::digest::hexadecimal;
use crate::error::{Error, Locate, Result};

/// Bytes copied or read back at a time.
pub(super) const CHUNK: usize = 8 << 20;
/// Bytes after which a flush is begun in the background.
const DIRTY: u64 = 64 << 20;

/// A file of known size that is being written.
pub(super) struct Output {
    path: PathBuf,
    file: File,
    size: u64,
    written: u64,
    hash: Sha256,
    hashed: u64,
    /// Start and length of the parts behind the hashed ones.
    waiting: BTreeMap<u64, u64>,
    /// Bytes written since the last flush was begun.
    dirty: u64,
    /// A flush in the background.
    flush: Option<Flush>,
}

impl Output {
    /// Creates the file, or opens what an interrupted run left of it.
    pub(super) fn create(path: &Path, size: u64) -> Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let sized = file.and_then(|file| file.set_len(size).map(|()| file));
        let file = sized.map_err(|e| Error::io("create", e)).in_file(path)?;
        Ok(Self::of(path.to_owned(), file, size))
    }

    fn of(path: PathBuf, file: File, size: u64) -> Self {
        let (hash, waiting) = (Sha256::new(), BTreeMap::new());
        Self { path, file, size, written: 0, hash, hashed: 0, waiting, dirty: 0, flush: None }
    }

    /// Writes a part at its place; no byte may be written twice.
    pub(super) fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let written = self.file.seek(SeekFrom::Start(at)).and_then(|_| self.file.write_all(bytes));
        written.map_err(|e| Error::io("write", e)).in_file(&self.path)?;
        self.written += bytes.len() as u64;
        self.dirty += bytes.len() as u64;
        if self.dirty >= DIRTY {
            self.flush_behind()?;
        }
        if at == self.hashed {
            self.hash.update(bytes);
            self.hashed += bytes.len() as u64;
            self.catch_up()?;
        } else {
            self.waiting.insert(at, bytes.len() as u64);
        }
        Ok(())
    }

    /// Takes a part that lies there already.
    pub(super) fn adopt(&mut self, at: u64, length: u64) -> Result<()> {
        if length > 0 {
            self.written += length;
            self.waiting.insert(at, length);
        }
        self.catch_up()
    }

    /// Sends what was written on its way to the disk while the next parts are computed, so that
    /// [`Output::sync`] finds little left to wait for.
    fn flush_behind(&mut self) -> Result<()> {
        if self.flush.as_ref().is_some_and(|flush| !flush.thread.is_finished()) {
            return Ok(());
        }
        self.flush.take().map_or(Ok(()), Flush::wait)?;
        let file = self.file.try_clone().map_err(|e| Error::io("flush", e)).in_file(&self.path)?;
        let thread = std::thread::spawn(move || file.sync_data());
        self.flush = Some(Flush { path: self.path.clone(), thread });
        self.dirty = 0;
        Ok(())
    }

    /// Makes what was written outlast a power cut.
    pub(super) fn sync(&mut self) -> Result<()> {
        self.flush.take().map_or(Ok(()), Flush::wait)?;
        self.dirty = 0;
        self.file.sync_data().map_err(|e| Error::io("flush", e)).in_file(&self.path)
    }

    /// Hashes parts that came early, once those before them are there.
    fn catch_up(&mut self) -> Result<()> {
        while let Some(length) = self.waiting.remove(&self.hashed) {
            let read = |e| Error::io("read back", e);
            self.file.seek(SeekFrom::Start(self.hashed)).map_err(read).in_file(&self.path)?;
            let mut left = length;
            let mut buffer = vec![0; CHUNK.min(usize::try_from(length).unwrap_or(CHUNK))];
            while left > 0 {
                let take = buffer.len().min(usize::try_from(left).unwrap_or(buffer.len()));
                let part = &mut buffer[..take];
                self.file.read_exact(part).map_err(read).in_file(&self.path)?;
                self.hash.update(&*part);
                left -= take as u64;
            }
            self.hashed += length;
        }
        Ok(())
    }

    /// Whether every byte is there.
    pub(super) fn is_complete(&self) -> bool {
        self.written == self.size && self.hashed == self.size
    }

    /// Its SHA-256 in hexadecimal digits; it goes to the disk in the background, so that the next
    /// layer need not wait for it.
    pub(super) fn close(self) -> (String, Flush) {
        let Self { file, path, hash, .. } = self;
        (hexadecimal(hash), Flush { path, thread: std::thread::spawn(move || file.sync_all()) })
    }
}

/// A file on its way to the disk.
pub(super) struct Flush {
    path: PathBuf,
    thread: JoinHandle<std::io::Result<()>>,
}

impl Flush {
    /// Returns once it is there.
    pub(super) fn wait(self) -> Result<()> {
        let lost = |_| Err(std::io::Error::other("the flushing thread was lost"));
        let flushed = self.thread.join().unwrap_or_else(lost);
        flushed.map_err(|e| Error::io("flush", e)).in_file(&self.path)
    }
}

/// Writes a whole file; its SHA-256.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<String> {
    let mut output = Output::create(path, bytes.len() as u64)?;
    output.write(0, bytes)?;
    let (digest, flush) = output.close();
    flush.wait()?;
    Ok(digest)
}

/// XXH3 of a part of a file.
pub(super) fn hash_part(path: &Path, at: u64, length: u64) -> Result<[u8; 16]> {
    let read = |e| Error::io("read back", e);
    let mut hash = Xxh3::new();
    let mut file = File::open(path).map_err(read).in_file(path)?;
    file.seek(SeekFrom::Start(at)).map_err(read).in_file(path)?;
    let mut left = length;
    let mut buffer = vec![0; CHUNK.min(usize::try_from(length).unwrap_or(CHUNK))];
    while left > 0 {
        let take = buffer.len().min(usize::try_from(left).unwrap_or(buffer.len()));
        file.read_exact(&mut buffer[..take]).map_err(read).in_file(path)?;
        hash.update(&buffer[..take]);
        left -= take as u64;
    }
    Ok(hash.digest128().to_le_bytes())
}

/// Copies a file; its size and SHA-256.
pub(super) fn copy_whole(from: &Path, to: &Path) -> Result<(u64, String)> {
    let read = |e| Error::io("read", e);
    let mut source = File::open(from).map_err(read).in_file(from)?;
    let mut output = Output::create(to, 0)?;
    let mut buffer = vec![0; CHUNK];
    loop {
        match source.read(&mut buffer).map_err(read).in_file(from)? {
            0 => break,
            n => output.write(output.written, &buffer[..n])?,
        }
    }
    let size = output.written;
    let (digest, flush) = output.close();
    flush.wait()?;
    Ok((size, digest))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's own full disk: every write fails with "no space left on device".
    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_is_an_error_that_names_the_file() {
        let path = Path::new("/dev/full").to_owned();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let mut output = Output::of(path, file, 8);
        let error = output.write(0, b"12345678").unwrap_err();
        assert!(error.to_string().starts_with("/dev/full: write: "), "{error}");
        let crate::ErrorKind::Io { source, .. } = error.kind() else { panic!("{error}") };
        assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
        assert!(!output.is_complete());
    }

    #[test]
    fn the_hash_does_not_depend_on_the_order_of_parts() {
        let dir = tempfile::tempdir().unwrap();
        let digest = |name: &str, order: &[usize]| {
            let mut output = Output::create(&dir.path().join(name), 12).unwrap();
            let parts = [(0, b"abcd"), (4, b"efgh"), (8, b"ijkl")];
            for &i in order {
                output.write(parts[i].0, parts[i].1).unwrap();
            }
            assert!(output.is_complete());
            let (digest, flush) = output.close();
            flush.wait().unwrap();
            digest
        };
        let expected = digest("a", &[0, 1, 2]);
        assert!(expected.starts_with("d682ed4ca4d989c1"), "{expected}");
        assert_eq!(digest("b", &[2, 1, 0]), expected);
        assert_eq!(digest("c", &[1, 0, 2]), expected);
        assert_eq!(std::fs::read(dir.path().join("b")).unwrap(), b"abcdefghijkl");
    }
}
