//! Compressed files, by their first bytes.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use super::malformed;
use crate::error::{Error, Result};

const BUFFER: usize = 1 << 16;
const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// A byte order mark, which is no text.
const UTF8: &[u8] = &[0xef, 0xbb, 0xbf];
const UTF16: [&[u8]; 2] = [&[0xff, 0xfe], &[0xfe, 0xff]];

/// Opens a text file, decompressed, behind its byte order mark.
///
/// # Errors
/// [`ErrorKind::Io`](crate::ErrorKind::Io); [`ErrorKind::Format`](crate::ErrorKind::Format) for
/// UTF-16, with what to do.
pub(super) fn open(path: &Path) -> Result<Box<dyn BufRead>> {
    let io = |e| Error::io("read", e);
    let mut file = BufReader::with_capacity(BUFFER, File::open(path).map_err(io)?);
    let first = file.fill_buf().map_err(io)?;
    let mut text: Box<dyn BufRead> = if first.starts_with(GZIP) {
        Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(file)))
    } else if first.starts_with(ZSTD) {
        Box::new(BufReader::with_capacity(BUFFER, Frames { source: file, frame: None }))
    } else {
        Box::new(file)
    };
    let first = text.fill_buf().map_err(failed)?;
    if UTF16.iter().any(|mark| first.starts_with(mark)) {
        let reason = "it is UTF-16; `iconv -f UTF-16 -t UTF-8` converts it";
        return Err(malformed("UTF-8 text", reason));
    }
    if first.starts_with(UTF8) {
        text.consume(UTF8.len());
    }
    Ok(text)
}

/// Zstandard frames one behind the other.
struct Frames<R: BufRead> {
    source: R,
    frame: Option<FrameDecoder>,
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let Some(frame) = &mut self.frame else {
                if self.source.fill_buf()?.is_empty() {
                    return Ok(0);
                }
                self.frame = begin(&mut self.source)?;
                continue;
            };
            while frame.can_collect() == 0 && !frame.is_finished() {
                let one = BlockDecodingStrategy::UptoBlocks(1);
                frame.decode_blocks(&mut self.source, one).map_err(damaged)?;
            }
            if frame.can_collect() > 0 {
                return frame.read(buffer);
            }
            let (stored, found) = (frame.get_checksum_from_data(), frame.get_calculated_checksum());
            if stored.is_some() && stored != found {
                return Err(damaged("checksum of a frame differs"));
            }
            self.frame = None;
        }
    }
}

/// Begins a frame, or skips one that holds no data.
fn begin(source: &mut impl BufRead) -> io::Result<Option<FrameDecoder>> {
    let mut decoder = FrameDecoder::new();
    match decoder.init(&mut *source) {
        Ok(()) => Ok(Some(decoder)),
        Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
            length,
            ..
        })) => {
            io::copy(&mut source.take(u64::from(length)), &mut io::sink())?;
            Ok(None)
        }
        Err(e) => Err(damaged(e)),
    }
}

fn damaged(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// What an error of a reader of [`open`] means.
pub(super) fn failed(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::UnexpectedEof => {
            malformed("compressed text", error.to_string())
        }
        _ => Error::io("read", error),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// "text\n" as `zstd` writes it, and a frame to be skipped.
    const FRAME: &[u8] = &[
        0x28, 0xb5, 0x2f, 0xfd, 0x04, 0x58, 0x29, 0x00, 0x00, 0x74, 0x65, 0x78, 0x74, 0x0a, 0x2c,
        0x51, 0xa1, 0xbf,
    ];
    const SKIPPED: &[u8] = &[0x50, 0x2a, 0x4d, 0x18, 0x02, 0x00, 0x00, 0x00, 0xff, 0xff];

    fn opened(bytes: &[u8]) -> Result<String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let mut text = String::new();
        open(file.path())?.read_to_string(&mut text).map_err(failed)?;
        Ok(text)
    }

    #[test]
    fn marks_and_members_are_read_and_damage_is_refused() {
        assert_eq!(opened(b"text").unwrap(), "text");
        assert_eq!(opened(b"").unwrap(), "");
        assert_eq!(opened(b"\xef\xbb\xbftext").unwrap(), "text");
        let error = opened(b"\xff\xfet\0").unwrap_err().to_string();
        assert!(error.contains("UTF-16") && error.contains("iconv"), "{error}");
        let mut member = flate2::write::GzEncoder::new(Vec::new(), Default::default());
        member.write_all(b"some text\n").unwrap();
        let member = member.finish().unwrap();
        assert_eq!(opened(&[&*member, &member].concat()).unwrap(), "some text\nsome text\n");
        assert!(opened(&member[..member.len() - 4]).is_err());

        assert_eq!(opened(&[FRAME, SKIPPED, FRAME].concat()).unwrap(), "text\ntext\n");
        let mut damaged = FRAME.to_vec();
        damaged[FRAME.len() - 6] ^= 1;
        let error = opened(&damaged).unwrap_err().to_string();
        assert!(error.contains("checksum"), "{error}");
    }
}
