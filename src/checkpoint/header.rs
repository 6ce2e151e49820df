//! The safetensors header, parsed strictly: every byte of the data belongs to exactly one tensor.

use std::collections::HashSet;
use std::ops::Range;

use serde::Deserialize;

use super::dtype::Dtype;
use super::json::{Members, malformed};
use crate::error::{Error, ErrorKind, Locate, Result};

const FORMAT: &str = "safetensors file";
/// The limit of the reference implementation.
const MAX_HEADER: u64 = 100_000_000;

/// A tensor of one file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Entry {
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

/// The tensors of a file in the order of their data.
pub(crate) fn parse(bytes: &[u8]) -> Result<Vec<Entry>> {
    let (text, data) = split(bytes)?;
    let members: Members<&serde_json::value::RawValue> =
        serde_json::from_str(text).map_err(|e| malformed(FORMAT, format!("header: {e}")))?;
    let mut names = HashSet::new();
    let mut entries = Vec::with_capacity(members.0.len());
    for (name, raw) in members.0 {
        if name == "__metadata__" {
            continue;
        }
        if !names.insert(name.clone()) {
            return Err(malformed(FORMAT, "the header declares it twice")).in_tensor(&name);
        }
        let declared: Result<Declared> =
            serde_json::from_str(raw.get()).map_err(|e| malformed(FORMAT, e));
        let entry = declared.and_then(|d| entry(&name, &d, &data)).in_tensor(&name)?;
        entries.push(entry);
    }
    entries.sort_by_key(|e| (e.range.start, e.range.end));
    check_cover(&entries, &data)?;
    Ok(entries)
}

/// The header's text and the range of the data.
fn split(bytes: &[u8]) -> Result<(&str, Range<usize>)> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        let reason = format!("{} bytes are too few for a header length", bytes.len());
        return Err(malformed(FORMAT, reason));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER || length > rest.len() as u64 {
        let room = rest.len();
        let reason = format!("header length {length}, but {room} bytes follow (at most 10^8 read)");
        return Err(malformed(FORMAT, reason));
    }
    let (header, _) = rest.split_at(length as usize);
    let text = std::str::from_utf8(header)
        .map_err(|e| malformed(FORMAT, format!("header is not UTF-8: {e}")))?;
    Ok((text, 8 + header.len()..bytes.len()))
}

fn entry(name: &str, declared: &Declared, data: &Range<usize>) -> Result<Entry> {
    let Some(dtype) = Dtype::named(&declared.dtype) else {
        let (found, supported) = (declared.dtype.clone(), Dtype::names());
        return Err(ErrorKind::Unsupported { what: "data type", found, supported }.into());
    };
    let shape: Option<Vec<usize>> =
        declared.shape.iter().map(|&n| usize::try_from(n).ok()).collect();
    let bytes = shape.as_deref().and_then(|shape| dtype.bytes(shape));
    let (Some(shape), Some(bytes)) = (shape, bytes) else {
        let reason = format!("shape {:?} of {} has no size", declared.shape, declared.dtype);
        return Err(malformed(FORMAT, reason));
    };
    let (start, end) = declared.data_offsets;
    if start > end || end > data.len() as u64 {
        let reason = format!("offsets {start}..{end} lie outside 0..{}", data.len());
        return Err(malformed(FORMAT, reason));
    }
    if end - start != bytes as u64 {
        let reason = format!(
            "offsets {start}..{end} hold {} bytes; {} of shape {shape:?} needs {bytes}",
            end - start,
            declared.dtype
        );
        return Err(malformed(FORMAT, reason));
    }
    let range = data.start + start as usize..data.start + end as usize;
    Ok(Entry { name: name.to_owned(), dtype, shape, range })
}

fn check_cover(entries: &[Entry], data: &Range<usize>) -> Result<()> {
    let mut at = data.start;
    for entry in entries {
        if entry.range.start != at {
            let how =
                if entry.range.start < at { "overlaps the one before" } else { "leaves a gap" };
            let reason = format!("data offset {}: it {how}", entry.range.start - data.start);
            return Err::<(), Error>(malformed(FORMAT, reason)).in_tensor(&entry.name);
        }
        at = entry.range.end;
    }
    if at != data.end {
        let reason = format!("{} bytes behind the last tensor belong to none", data.end - at);
        return Err(malformed(FORMAT, reason));
    }
    Ok(())
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
        let error = parse(&file(header, data)).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Format { .. }), "{error:?}");
        error.to_string()
    }

    const A: &str = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;

    #[test]
    fn tensors_come_in_the_order_of_their_data() {
        let b = r#""b":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]}"#;
        let text = format!(r#"{{"__metadata__":{{"format":"pt"}},{b},{A}}}"#);
        let entries = parse(&file(&text, 12)).unwrap();
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
            if let Ok(entries) = parse(&bytes) {
                proptest::prop_assert!(entries.iter().all(|e| e.range.end <= bytes.len()));
            }
        }
    }

    #[test]
    fn header_lengths_are_checked_before_use() {
        let huge = parse(&[0xff; 16]).unwrap_err();
        assert!(huge.to_string().contains("header length 18446744073709551615"));
        assert!(parse(&[1, 0, 0]).unwrap_err().to_string().contains("too few"));
    }
}
