//! Reading at an offset.

use std::fs::File;

use crate::error::{Error, Result};

/// Fills `buffer` from `offset` without moving a shared cursor, so that threads may share the file.
///
/// # Errors
/// [`ErrorKind::Io`](crate::ErrorKind::Io), also when the file ends early.
pub(crate) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> Result<()> {
    #[cfg(unix)]
    let read = std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset);
    #[cfg(windows)]
    let read = {
        use std::io::{Error, ErrorKind};
        let mut done = 0;
        loop {
            if done == buffer.len() {
                break Ok(());
            }
            let part = &mut buffer[done..];
            match std::os::windows::fs::FileExt::seek_read(file, part, offset + done as u64) {
                Ok(0) => break Err(Error::from(ErrorKind::UnexpectedEof)),
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => break Err(e),
            }
        }
    };
    read.map_err(|e| Error::io("read", e))
}
