//! The header of a safetensors file, read without the data behind it.

use std::fs::File;

use safetensors::tensor::Metadata;

use super::tensor::read_at;
use crate::error::{Error, ErrorKind, Result};

/// The limit of the safetensors format.
const MAX_HEADER: u64 = 100_000_000;

/// Tensors with their byte ranges, the file's own metadata, and where the data begins.
#[derive(Debug)]
pub(in crate::calibrate) struct Header {
    pub(in crate::calibrate) tensors: Metadata,
    pub(in crate::calibrate) data: u64,
}

/// Reads and checks the header: its length, its JSON, and that the byte ranges of the tensors are
/// contiguous, of the size that type and shape ask for, and fill the file exactly.
pub(in crate::calibrate) fn read(file: &File) -> Result<Header> {
    let size = file.metadata().map_err(|e| Error::io("file size", e))?.len();
    if size < 8 {
        return Err(malformed(format!("{size} bytes are too few for a header")));
    }
    let mut length = [0; 8];
    read_at(file, &mut length, 0)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER || length > size - 8 {
        let most = MAX_HEADER.min(size - 8);
        return Err(malformed(format!("header of {length} bytes; at most {most} are possible")));
    }
    let mut json = vec![0; length as usize];
    read_at(file, &mut json, 8)?;
    let tensors: Metadata =
        serde_json::from_slice(&json).map_err(|e| malformed(format!("header: {e}")))?;
    let (expected, found) = (tensors.data_len() as u64, size - 8 - length);
    if expected != found {
        return Err(malformed(format!("{expected} bytes of tensors declared, {found} found")));
    }
    Ok(Header { tensors, data: 8 + length })
}

pub(in crate::calibrate) fn malformed(reason: String) -> Error {
    ErrorKind::Format { format: "statistics file (safetensors)", reason }.into()
}
