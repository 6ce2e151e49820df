//! Token ids in a safetensors file.

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::source::malformed;
use crate::error::{Error, ErrorKind, Locate, Result};

/// Token ids: a text, or windows of one length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ids {
    Text(Vec<u32>),
    Windows(Vec<Vec<u32>>),
}

const FORMAT: &str = "file of token ids (safetensors)";

/// The ids of the only tensor of a file, `[n]` or `[windows, length]`.
///
/// # Errors
/// [`ErrorKind::Format`] when it is no safetensors file or holds another number of tensors,
/// [`ErrorKind::Unsupported`] for another type, [`ErrorKind::Shape`] for another number of axes,
/// [`ErrorKind::OutOfRange`] for a negative id; with the tensor.
pub(super) fn read(bytes: &[u8]) -> Result<Ids> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| malformed(FORMAT, e.to_string()))?;
    let mut tensors = file.tensors();
    let (Some((name, tensor)), true) = (tensors.pop(), tensors.is_empty()) else {
        let reason = format!("one tensor expected, {} found", file.len());
        return Err(malformed(FORMAT, reason));
    };
    decode(&tensor).in_tensor(&name)
}

fn decode(tensor: &TensorView<'_>) -> Result<Ids> {
    let bytes = tensor.data();
    let values: Vec<i64> = match tensor.dtype() {
        Dtype::I32 => {
            bytes.as_chunks().0.iter().map(|&b| i64::from(i32::from_le_bytes(b))).collect()
        }
        Dtype::I64 => bytes.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b)).collect(),
        other => {
            let (found, supported) = (format!("{other:?}"), "I32, I64".into());
            let what = "type of token ids";
            return Err(ErrorKind::Unsupported { what, found, supported }.into());
        }
    };
    let id = |(i, &value): (usize, &i64)| {
        let wrong = || Error::range(format!("token id at index {i}"), "0 or more", value);
        u32::try_from(value).map_err(|_| wrong())
    };
    let ids = values.iter().enumerate().map(id).collect::<Result<Vec<u32>>>()?;
    match tensor.shape() {
        [_] => Ok(Ids::Text(ids)),
        [_, 0] => Ok(Ids::Windows(Vec::new())),
        [_, length] => Ok(Ids::Windows(ids.chunks(*length).map(<[u32]>::to_vec).collect())),
        other => Err(Error::shape("token ids", "[n] or [windows, length]", other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(dtype: Dtype, shape: Vec<usize>, bytes: &[u8]) -> Vec<u8> {
        let tensor = TensorView::new(dtype, shape, bytes).unwrap();
        safetensors::serialize([("ids", tensor)], None).unwrap()
    }

    fn wide(values: &[i64]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn one_axis_is_text_and_two_are_windows() {
        let bytes = wide(&[1, 2, 3, 4]);
        let text = read(&file(Dtype::I64, vec![4], &bytes)).unwrap();
        assert_eq!(text, Ids::Text(vec![1, 2, 3, 4]));
        let windows = read(&file(Dtype::I32, vec![4, 2], &bytes)).unwrap();
        assert_eq!(windows, Ids::Windows((1..5).map(|i| vec![i, 0]).collect()));
    }

    #[test]
    fn other_files_are_refused() {
        let says = |bytes: &[u8], what: &str| {
            let error = read(bytes).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        };
        says(&file(Dtype::I64, vec![2], &wide(&[1, -7])), "index 1: expected 0 or more, found -7");
        says(&file(Dtype::F32, vec![2], &[0; 8]), "F32");
        says(&file(Dtype::I64, vec![1, 1, 1], &wide(&[1])), "[windows, length]");
        says(b"no", "safetensors");
        says(
            &safetensors::serialize(Vec::<(&str, TensorView<'_>)>::new(), None).unwrap(),
            "0 found",
        );
    }
}
