//! Plain text: one document, in UTF-8.

use std::io::BufRead;

use super::decompress::failed;
use super::malformed;
use crate::calibrate::text::pieces::Pieces;
use crate::error::Result;

/// Reads a document. Ends of lines in the style of DOS (`\r\n`) become `\n`.
///
/// # Errors
/// [`Format`](crate::ErrorKind::Format) with the offset of the first byte that is not UTF-8.
pub(super) fn read(text: &mut dyn BufRead, pieces: &mut Pieces) -> Result<()> {
    let (mut rest, mut offset) = (Vec::new(), 0);
    while !pieces.is_full() {
        let block = text.fill_buf().map_err(failed)?;
        let (taken, last) = (block.len(), block.is_empty());
        rest.extend_from_slice(block);
        text.consume(taken);
        let valid = match std::str::from_utf8(&rest) {
            Ok(text) => text,
            // A character that goes on in the next block.
            Err(e) if e.error_len().is_none() && !last => {
                std::str::from_utf8(&rest[..e.valid_up_to()]).unwrap_or_default()
            }
            Err(e) => {
                let at = offset + e.valid_up_to();
                let reason = format!("invalid byte at offset {at}; `iconv` converts to UTF-8");
                return Err(malformed("UTF-8 text", reason));
            }
        };
        // The end of a line may go on in the next block too.
        let valid = if last { valid } else { valid.strip_suffix('\r').unwrap_or(valid) };
        add(valid, pieces);
        let used = valid.len();
        offset += used;
        rest.drain(..used);
        if last {
            break;
        }
    }
    pieces.end_document();
    Ok(())
}

fn add(text: &str, pieces: &mut Pieces) {
    if text.contains("\r\n") {
        pieces.text(&text.replace("\r\n", "\n"));
    } else {
        pieces.text(text);
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::*;
    use crate::calibrate::text::pieces::{Body, Limit};

    fn text(bytes: &[u8], block: usize) -> Result<String> {
        let mut pieces = Pieces::new(Limit::None, 0);
        pieces.file();
        read(&mut BufReader::with_capacity(block, bytes), &mut pieces)?;
        let text = pieces.finish().0.into_iter().map(|piece| match piece.body {
            Body::Text(text) => text,
            other => panic!("{other:?}"),
        });
        Ok(text.collect())
    }

    #[test]
    fn characters_and_line_ends_survive_any_block() {
        for block in 1..8 {
            assert_eq!(text("añ€😀\r\nb\r\n".as_bytes(), block).unwrap(), "añ€😀\nb\n");
            assert_eq!(text(b"a\rb\r", block).unwrap(), "a\rb\r");
            let error = text(b"ab\xff\xff", block).unwrap_err().to_string();
            assert!(error.contains("invalid byte at offset 2"), "{error}");
            assert!(text("añ".as_bytes().split_last().unwrap().1, block).is_err());
        }
        assert_eq!(text(b"", 8).unwrap(), "");
    }
}
