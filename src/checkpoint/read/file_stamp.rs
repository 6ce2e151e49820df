//! What is remembered of a mapped file, so that a change of it can be told.

use std::fs::{self, Metadata};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::error::{ErrorKind, Locate, Result};

/// Size and time of the last change of a file, and which file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    size: u64,
    modified: Option<SystemTime>,
    /// Device and number, where the system tells them.
    identity: Option<(u64, u64)>,
}

impl Stamp {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        #[cfg(unix)]
        let identity = {
            use std::os::unix::fs::MetadataExt;
            Some((metadata.dev(), metadata.ino()))
        };
        #[cfg(not(unix))]
        let identity = None;
        Self { size: metadata.len(), modified: metadata.modified().ok(), identity }
    }

    /// Checks that the file was not changed. One that was removed or replaced was not: its bytes
    /// stay mapped.
    ///
    /// # Errors
    /// [`ErrorKind::Changed`] with the file.
    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        let Ok(metadata) = fs::metadata(path) else { return Ok(()) };
        let found = Self::of(&metadata);
        if found == *self || found.identity != self.identity {
            return Ok(());
        }
        let (expected, found) = (self.to_string(), found.to_string());
        Err(ErrorKind::Changed { expected, found }.into()).in_file(path)
    }
}

impl std::fmt::Display for Stamp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.size)?;
        let since = self.modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        match since.as_ref().map(Duration::as_nanos) {
            Some(nanos) => write!(f, ", written {}.{:09} s after 1970", nanos / N, nanos % N),
            None => Ok(()),
        }
    }
}

const N: u128 = 1_000_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_happened_to_the_same_file_is_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "12345678").unwrap();
        let stamp = Stamp::of(&fs::metadata(&path).unwrap());
        stamp.check(&path).unwrap();
        let refused = |stamp: &Stamp| {
            let error = stamp.check(&path).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Changed { .. }), "{error}");
            error.to_string()
        };
        // The same size at another time, and another size at the same time.
        let file = fs::File::options().write(true).open(&path).unwrap();
        let time = stamp.modified.unwrap();
        file.set_modified(time + Duration::from_secs(1)).unwrap();
        assert!(refused(&stamp).contains("expected 8 bytes, written "));
        file.set_len(3).unwrap();
        file.set_modified(time).unwrap();
        assert!(refused(&stamp).contains("found 3 bytes, written "));
        // Another file in its place, and none.
        if stamp.identity.is_some() {
            fs::write(dir.path().join("other"), "other").unwrap();
            fs::rename(dir.path().join("other"), &path).unwrap();
            stamp.check(&path).unwrap();
        }
        fs::remove_file(&path).unwrap();
        stamp.check(&path).unwrap();
    }
}
