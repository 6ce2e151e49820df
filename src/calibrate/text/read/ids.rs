//! Token ids in a safetensors file, a block at a time.

use std::fs::File;
use std::path::Path;

use super::malformed;
use crate::calibrate::text::pieces::{Body, Pieces};
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::tensor_file::{Dtype, Header, TensorEntry, read_at};

const FORMAT: &str = "file of token ids (safetensors)";
/// Tensors that data collators write beside the ids, of which only the mask counts.
const MASK: &str = "attention_mask";
const BESIDE: [&str; 4] = ["labels", "position_ids", "special_tokens_mask", "token_type_ids"];
/// Ids that are read at once.
const BLOCK: usize = 1 << 14;

/// Reads `[n]` ids as one sequence and `[windows, length]` ids as windows. Positions whose
/// `attention_mask` is 0 are padding and left out.
///
/// # Errors
/// [`ErrorKind::Format`] when it is no safetensors file, holds no ids or several tensors that may
/// be; [`ErrorKind::Unsupported`] for a type that is no integer; [`ErrorKind::Shape`] for another
/// number of axes or a mask of another shape; [`ErrorKind::OutOfRange`] for a negative id and for a
/// mask with padding inside a window; with the tensor.
pub(super) fn read(path: &Path, pieces: &mut Pieces) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::io("read", e))?;
    let header = Header::read(&file).map_err(|e| malformed(FORMAT, reason(&e)))?;
    let name = ids_of(&header)?;
    let ids = Tensor::of(&file, &header, &name)?;
    let mask = match header.get(MASK) {
        None => None,
        Some(_) => Some(Tensor::of(&file, &header, MASK)?),
    };
    if let Some(mask) = mask.as_ref().filter(|mask| mask.shape != ids.shape) {
        return Err(Error::shape("attention mask", ids.shape, mask.shape)).in_tensor(MASK);
    }
    match *ids.shape {
        [n] => sequence(&ids, mask.as_ref(), n, pieces),
        [rows, length] => windows(&ids, mask.as_ref(), (rows, length), pieces),
        _ => Err(Error::shape("token ids", "[n] or [windows, length]", ids.shape)).in_tensor(&name),
    }
}

/// What is wrong, without the words around it.
fn reason(error: &Error) -> String {
    match error.kind() {
        ErrorKind::Format { reason, .. } => reason.clone(),
        _ => error.to_string(),
    }
}

/// The name of the only tensor that may hold ids.
fn ids_of(header: &Header) -> Result<String> {
    let mut names: Vec<&str> = header.tensors.iter().map(|entry| &*entry.name).collect();
    names.retain(|name| *name != MASK && !BESIDE.contains(name));
    match &names[..] {
        [name] => Ok((*name).to_owned()),
        _ => {
            let found = if names.is_empty() { "none".into() } else { names.join(", ") };
            let reason = format!(
                "one tensor of ids expected, with {MASK} if there is padding; \
                                  found: {found}"
            );
            Err(malformed(FORMAT, reason))
        }
    }
}

fn sequence(
    ids: &Tensor<'_>,
    mask: Option<&Tensor<'_>>,
    n: usize,
    pieces: &mut Pieces,
) -> Result<()> {
    for start in (0..n).step_by(BLOCK) {
        if pieces.is_full() {
            break;
        }
        let range = start..n.min(start + BLOCK);
        let mut block = ids.tokens(range.clone())?;
        if let Some(mask) = mask {
            let kept = mask.values(range)?;
            let mut kept = kept.iter();
            block.retain(|_| kept.next().is_some_and(|&m| m != 0));
        }
        let padding = (n.min(start + BLOCK) - start - block.len()) as u64;
        pieces.count(|counts| counts.padding += padding);
        pieces.push(Body::Ids(block), start == 0);
    }
    pieces.count(|counts| counts.documents += 1);
    Ok(())
}

fn windows(
    ids: &Tensor<'_>,
    mask: Option<&Tensor<'_>>,
    (rows, length): (usize, usize),
    pieces: &mut Pieces,
) -> Result<()> {
    for row in 0..rows {
        if pieces.is_full() {
            break;
        }
        let range = row * length..(row + 1) * length;
        let mut window = ids.tokens(range.clone())?;
        if let Some(mask) = mask {
            let mask = mask.values(range)?;
            let start = mask.iter().take_while(|&&m| m == 0).count();
            let end = length - mask.iter().rev().take_while(|&&m| m == 0).count();
            if mask.get(start..end).is_some_and(|inside| inside.contains(&0)) {
                let expected = "padding before or behind the tokens only";
                let found = "padding between them";
                let what = format!("attention mask of window {row}");
                return Err(Error::range(what, expected, found)).in_tensor(MASK);
            }
            window.truncate(end);
            window.drain(..start.min(window.len()));
        }
        let padding = (length - window.len()) as u64;
        let empty = u64::from(window.is_empty());
        pieces.count(|counts| {
            counts.documents += 1;
            counts.padding += padding;
            counts.empty += empty;
        });
        if !window.is_empty() {
            pieces.push(Body::Window(window), true);
        }
    }
    Ok(())
}

/// A tensor of integers on the disk.
struct Tensor<'a> {
    file: &'a File,
    name: &'a str,
    dtype: Dtype,
    shape: &'a [usize],
    start: u64,
}

impl<'a> Tensor<'a> {
    fn of(file: &'a File, header: &'a Header, name: &'a str) -> Result<Self> {
        let missing = || malformed(FORMAT, format!("no tensor {name}"));
        let TensorEntry { dtype, shape, range, .. } = header.get(name).ok_or_else(missing)?;
        Ok(Self { file, name, dtype: *dtype, shape, start: range.start as u64 })
    }

    fn values(&self, range: std::ops::Range<usize>) -> Result<Vec<i64>> {
        self.decode(range).in_tensor(self.name)
    }

    fn decode(&self, range: std::ops::Range<usize>) -> Result<Vec<i64>> {
        if !self.dtype.is_integer() {
            let (found, supported) = (self.dtype.name().into(), "integers, most often I64".into());
            return Err(
                ErrorKind::Unsupported { what: "type of token ids", found, supported }.into()
            );
        }
        let width = self.dtype.alignment();
        let mut bytes = vec![0; range.len() * width];
        read_at(self.file, &mut bytes, self.start + (range.start * width) as u64)?;
        let signed = self.dtype.name().starts_with('I');
        Ok(bytes.chunks_exact(width).map(|bytes| integer(bytes, signed)).collect())
    }

    fn tokens(&self, range: std::ops::Range<usize>) -> Result<Vec<u32>> {
        let start = range.start;
        let id = |(i, value): (usize, i64)| {
            let wrong =
                || Error::range(format!("token id at index {}", start + i), "0 or more", value);
            u32::try_from(value).map_err(|_| wrong())
        };
        let values = self.values(range)?;
        values.into_iter().enumerate().map(id).collect::<Result<_>>().in_tensor(self.name)
    }
}

/// A little-endian integer of 1 to 8 bytes.
fn integer(bytes: &[u8], signed: bool) -> i64 {
    let negative = signed && bytes.last().is_some_and(|b| b & 0x80 != 0);
    let mut wide = [if negative { 0xff } else { 0 }; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    i64::from_le_bytes(wide)
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::{Body, MASK, Pieces, Result, read};
    use crate::calibrate::text::pieces::{Counts, Limit};

    type Named<'a> = (&'a str, Dtype, Vec<usize>, Vec<u8>);

    fn pieces(tensors: &[Named<'_>]) -> Result<(Vec<Body>, Counts)> {
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), safetensors::serialize(views, None).unwrap()).unwrap();
        let mut pieces = Pieces::new(Limit::None, 0);
        pieces.file();
        read(file.path(), &mut pieces)?;
        let (pieces, counts, _) = pieces.finish();
        Ok((pieces.into_iter().map(|piece| piece.body).collect(), counts[0]))
    }

    fn wide(values: &[i64]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn one_axis_is_a_sequence_and_two_are_windows() {
        let bytes = wide(&[1, 2, 3, 4]);
        let (found, _) = pieces(&[("ids", Dtype::I64, vec![4], bytes.clone())]).unwrap();
        assert_eq!(found, [Body::Ids(vec![1, 2, 3, 4])]);
        let (found, _) = pieces(&[("ids", Dtype::I32, vec![4, 2], bytes)]).unwrap();
        assert_eq!(found, (1..5).map(|i| Body::Window(vec![i, 0])).collect::<Vec<_>>());
        let (found, _) = pieces(&[("x", Dtype::U16, vec![2], vec![1, 0, 0xff, 0xff])]).unwrap();
        assert_eq!(found, [Body::Ids(vec![1, 0xffff])]);
    }

    #[test]
    fn padding_is_left_out_on_either_side() {
        let mask = |values: &[i64]| (MASK, Dtype::I64, vec![3, 3], wide(values));
        let ids = ("input_ids", Dtype::I64, vec![3, 3], wide(&[1, 2, 3, 4, 5, 6, 7, 8, 9]));
        let labels = ("labels", Dtype::I64, vec![1], wide(&[-100]));
        let (found, counts) =
            pieces(&[ids.clone(), mask(&[0, 1, 1, 1, 0, 0, 0, 0, 0]), labels]).unwrap();
        assert_eq!(found, [Body::Window(vec![2, 3]), Body::Window(vec![4])]);
        assert_eq!(counts, Counts { documents: 3, empty: 1, padding: 6 });
        let error = pieces(&[ids.clone(), mask(&[1, 0, 1, 1, 1, 1, 1, 1, 1])]).unwrap_err();
        assert!(error.to_string().contains("window 0"), "{error}");
        let error = pieces(&[ids, (MASK, Dtype::I64, vec![9], wide(&[1; 9]))]).unwrap_err();
        assert!(error.to_string().contains("[3, 3]"), "{error}");
    }

    #[test]
    fn other_files_are_refused() {
        let says = |tensors: &[Named<'_>], what: &str| {
            let error = pieces(tensors).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        };
        let negative = ("ids", Dtype::I64, vec![2], wide(&[1, -7]));
        says(std::slice::from_ref(&negative), "index 1: expected 0 or more, found -7");
        says(&[("ids", Dtype::F32, vec![2], vec![0; 8])], "F32");
        says(&[("ids", Dtype::I64, vec![1, 1, 1], wide(&[1]))], "[windows, length]");
        says(&[], "found: none");
        says(&[negative, ("other", Dtype::I64, vec![1], wide(&[1]))], "ids, other");
    }
}
