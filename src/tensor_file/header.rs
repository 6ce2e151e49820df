//! The safetensors header: read strictly, and written.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::ops::Range;

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::dtype::Dtype;
use super::explain::not_tensors;
use super::json::Members;
use super::read_at::read_at;
use crate::error::{Error, ErrorKind, Locate, Result};

const FORMAT: &str = "safetensors file";
/// The limit of the reference implementation.
const MAX_HEADER: u64 = 100_000_000;
/// Bytes that tell what a file is when it has no header.
const BEGINNING: usize = 64;
/// The key of what a file says of itself.
const METADATA: &str = "__metadata__";

/// What the header of a file declares.
#[derive(Debug)]
pub(crate) struct Header {
    /// In the order of their data.
    pub(crate) tensors: Vec<TensorEntry>,
    /// What the file says of itself.
    pub(crate) metadata: BTreeMap<String, String>,
}

/// A tensor of one file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TensorEntry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Its bytes, counted from the start of the file.
    pub(crate) range: Range<usize>,
}

#[derive(Deserialize)]
struct Declared {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl Header {
    /// The tensor of that name.
    pub(crate) fn get(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.iter().find(|entry| entry.name == name)
    }

    /// Reads the header of a file whose bytes are in memory, or mapped.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] and [`ErrorKind::Unsupported`], with the tensor.
    pub(crate) fn parse(file: &[u8]) -> Result<Self> {
        let beginning = &file[..file.len().min(BEGINNING)];
        let Some((length, rest)) = file.split_first_chunk::<8>() else {
            return Err(no_header(beginning, too_short(file.len() as u64)));
        };
        let length =
            header_length(*length, rest.len()).map_err(|error| no_header(beginning, error))?;
        Self::of(&rest[..length], 8 + length..file.len())
    }

    /// Reads the header of an open file, without the data behind it.
    ///
    /// # Errors
    /// Those of [`Header::parse`]; [`ErrorKind::Io`].
    pub(crate) fn read(file: &File) -> Result<Self> {
        let size = file.metadata().map_err(|e| Error::io("file size", e))?.len();
        let mut beginning = vec![0; BEGINNING.min(usize::try_from(size).unwrap_or(BEGINNING))];
        read_at(file, &mut beginning, 0)?;
        let Some(length) = beginning.first_chunk::<8>() else {
            return Err(no_header(&beginning, too_short(size)));
        };
        let rest = usize::try_from(size - 8)
            .map_err(|_| Error::malformed(FORMAT, format!("{size} bytes cannot be addressed")))?;
        let length = header_length(*length, rest).map_err(|error| no_header(&beginning, error))?;
        let mut header = vec![0; length];
        read_at(file, &mut header, 8)?;
        Self::of(&header, 8 + header.len()..8 + rest)
    }

    /// The header in `bytes`, of a file whose data is at `data`.
    fn of(bytes: &[u8], data: Range<usize>) -> Result<Self> {
        let text = std::str::from_utf8(bytes)
            .map_err(|e| Error::malformed(FORMAT, format!("header is not UTF-8: {e}")))?;
        let members: Members<&RawValue> = serde_json::from_str(text)
            .map_err(|e| Error::malformed(FORMAT, format!("header: {e}")))?;
        let mut names = HashSet::new();
        let mut tensors = Vec::with_capacity(members.0.len());
        let mut metadata = BTreeMap::new();
        for (name, raw) in members.0 {
            if name == METADATA {
                let read: Option<BTreeMap<String, String>> = serde_json::from_str(raw.get())
                    .map_err(|e| Error::malformed(FORMAT, format!("{METADATA}: {e}")))?;
                metadata = read.unwrap_or_default();
                continue;
            }
            if !names.insert(name.clone()) {
                let reason = "the header declares it twice";
                return Err(Error::malformed(FORMAT, reason)).in_tensor(&name);
            }
            let declared: Result<Declared> =
                serde_json::from_str(raw.get()).map_err(|e| Error::malformed(FORMAT, e));
            tensors.push(declared.and_then(|d| entry(&name, &d, &data)).in_tensor(&name)?);
        }
        tensors.sort_by_key(|e| (e.range.start, e.range.end));
        check_cover(&tensors, &data)?;
        Ok(Self { tensors, metadata })
    }
}

/// What the file is instead, where its beginning tells; else the `error` of its header's length.
fn no_header(beginning: &[u8], error: Error) -> Error {
    match not_tensors(beginning) {
        Some(found) => Error::malformed(FORMAT, format!("it is {found}")),
        None => error,
    }
}

fn too_short(size: u64) -> Error {
    Error::malformed(FORMAT, format!("{size} bytes are too few for a header length"))
}

/// The length of the header, checked against the `rest` of the file behind it.
fn header_length(bytes: [u8; 8], rest: usize) -> Result<usize> {
    let length = u64::from_le_bytes(bytes);
    if length > MAX_HEADER || length > rest as u64 {
        let reason = format!("header length {length}, but {rest} bytes follow (at most 10^8 read)");
        return Err(Error::malformed(FORMAT, reason));
    }
    Ok(length as usize)
}

fn entry(name: &str, declared: &Declared, data: &Range<usize>) -> Result<TensorEntry> {
    let Some(dtype) = Dtype::named(&declared.dtype) else {
        let (found, supported) = (declared.dtype.clone(), Dtype::names());
        return Err(ErrorKind::Unsupported { what: "data type", found, supported }.into());
    };
    let shape: Option<Vec<usize>> =
        declared.shape.iter().map(|&n| usize::try_from(n).ok()).collect();
    let bytes = shape.as_deref().and_then(|shape| dtype.bytes(shape));
    let (Some(shape), Some(bytes)) = (shape, bytes) else {
        let reason = format!("shape {:?} of {} has no size", declared.shape, declared.dtype);
        return Err(Error::malformed(FORMAT, reason));
    };
    let (start, end) = declared.data_offsets;
    if start > end || end > data.len() as u64 {
        let reason = format!(
            "offsets {start}..{end} lie outside 0..{}: the file was cut; download it again",
            data.len()
        );
        return Err(Error::malformed(FORMAT, reason));
    }
    if end - start != bytes as u64 {
        let reason = format!(
            "offsets {start}..{end} hold {} bytes; {} of shape {shape:?} needs {bytes}",
            end - start,
            declared.dtype
        );
        return Err(Error::malformed(FORMAT, reason));
    }
    let range = data.start + start as usize..data.start + end as usize;
    Ok(TensorEntry { name: name.to_owned(), dtype, shape, range })
}

fn check_cover(entries: &[TensorEntry], data: &Range<usize>) -> Result<()> {
    let mut at = data.start;
    for entry in entries {
        if entry.range.start != at {
            let how =
                if entry.range.start < at { "overlaps the one before" } else { "leaves a gap" };
            let reason = format!("data offset {}: it {how}", entry.range.start - data.start);
            return Err(Error::malformed(FORMAT, reason)).in_tensor(&entry.name);
        }
        at = entry.range.end;
    }
    if at != data.end {
        let reason = format!("{} bytes behind the last tensor belong to none", data.end - at);
        return Err(Error::malformed(FORMAT, reason));
    }
    Ok(())
}

/// A tensor of a file to be written.
pub(crate) struct NewTensor<'a> {
    pub(crate) name: &'a str,
    pub(crate) dtype: &'static str,
    pub(crate) shape: &'a [usize],
    pub(crate) bytes: u64,
}

/// The length and the JSON of the header of tensors that lie one behind the other, padded so that
/// the data begins at a multiple of 8 bytes.
pub(crate) fn encode_header<'a>(
    metadata: &BTreeMap<String, String>,
    tensors: impl IntoIterator<Item = NewTensor<'a>>,
) -> Vec<u8> {
    let mut members = Map::new();
    members.insert(METADATA.into(), json!(metadata));
    let mut start = 0u64;
    for NewTensor { name, dtype, shape, bytes } in tensors {
        let end = start + bytes;
        let member = json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] });
        members.insert(name.to_owned(), member);
        start = end;
    }
    let mut text = Value::Object(members).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn refusal(header: &str, data: usize) -> String {
        let error = Header::parse(&file(header, data)).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Format { .. }), "{error:?}");
        error.to_string()
    }

    const A: &str = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;

    #[test]
    fn tensors_come_in_the_order_of_their_data() {
        let b = r#""b":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]}"#;
        let text = format!(r#"{{"__metadata__":{{"format":"pt"}},{b},{A}}}"#);
        let Header { tensors: entries, metadata } = Header::parse(&file(&text, 12)).unwrap();
        assert_eq!(metadata["format"], "pt");
        assert_eq!(entries.iter().map(|e| &*e.name).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(entries[1].range.len(), 4);
    }

    #[test]
    fn lies_are_named() {
        assert!(refusal(&format!("{{{A}}}"), 7).contains("outside 0..7"));
        assert!(refusal(&format!("{{{A}}}"), 9).contains("1 bytes behind the last tensor"));
        assert!(refusal(&format!("{{{A},{A}}}"), 8).contains("tensor `a`"));
        let overlap = r#""b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}"#;
        assert!(refusal(&format!("{{{A},{overlap}}}"), 8).contains("tensor `b`"));
        let wrong = r#"{"c":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#;
        assert!(refusal(wrong, 8).contains("needs 12"));
        let huge = r#"{"c":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}"#;
        assert!(refusal(huge, 8).contains("has no size"));
        assert!(refusal("[1, 2]", 0).contains("header"));
    }

    proptest::proptest! {
        #[test]
        fn damaged_files_are_errors_or_files(at in 0usize..120, to: u8, cut in 0usize..120) {
            let b = r#""b":{"dtype":"F4","shape":[0,2,9],"data_offsets":[8,8]}"#;
            let mut bytes = file(&format!("{{{A},{b}}}"), 8);
            bytes[at] = to;
            bytes.truncate(bytes.len() - cut);
            if let Ok(Header { tensors: entries, .. }) = Header::parse(&bytes) {
                proptest::prop_assert!(entries.iter().all(|e| e.range.end <= bytes.len()));
            }
        }
    }

    #[test]
    fn header_lengths_are_checked_before_use() {
        let huge = Header::parse(&[0xff; 16]).unwrap_err();
        assert!(huge.to_string().contains("header length 18446744073709551615"));
        assert!(Header::parse(&[1, 0, 0]).unwrap_err().to_string().contains("too few"));
    }
}
