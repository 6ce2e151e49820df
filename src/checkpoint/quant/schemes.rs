//! Quantised tensors: which there are, where their scales are, and what they mean.
//!
//! A weight and its scales are two tensors on disk and one in meaning. Everything that reads a
//! weight goes through [`decode`], so that nothing else needs to know.

use std::collections::HashMap;

use serde_json::Value;

use super::fp8::{Blocks, e8m0, scale_shape};
use super::mxfp4;
use crate::checkpoint::config::{Config, mismatch};
use crate::checkpoint::read::Store;
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::non_finite;

/// The key of `config.json` that says how a model is quantised.
pub(crate) const KEY: &str = "quantization_config";
/// The methods that are read.
const METHODS: [&str; 2] = ["fp8", "mxfp4"];
/// Rows and columns of a block where the config does not say.
const BLOCK: (usize, usize) = (128, 128);

/// How a weight is quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// F8_E4M3 matrices `(…, r, c)`: `X` with `X_scale_inv`, one scale per block of rows × columns.
    Fp8 { scales: usize, block: (usize, usize) },
    /// 4-bit floats `(…, r, c/32, 16)`: `X_blocks` with `X_scales`, one exponent per 32 columns.
    Mxfp4 { scales: usize },
}

impl Scheme {
    /// The tensor of its scales.
    pub(crate) fn scales(self) -> usize {
        match self {
            Self::Fp8 { scales, .. } | Self::Mxfp4 { scales } => scales,
        }
    }
}

/// The quantised weights of a checkpoint, by their positions in the store.
#[derive(Debug, Default)]
pub(crate) struct Quantised {
    schemes: HashMap<usize, Scheme>,
    /// The weight of each tensor of scales.
    weights: HashMap<usize, usize>,
}

impl Quantised {
    /// Finds the quantised weights and checks that their scales are there and fit.
    pub(crate) fn find(store: &Store, config: &Config, path: &std::path::Path) -> Result<Self> {
        let block = block(config).in_file(path)?;
        let mut found = Self::default();
        for tensor in 0..store.tensors().len() {
            let scheme = scheme(store, tensor, block)
                .in_tensor(&store.entry(tensor).name)
                .in_file(store.path(tensor))?;
            let Some(scheme) = scheme else { continue };
            found.schemes.insert(tensor, scheme);
            found.weights.insert(scheme.scales(), tensor);
        }
        Ok(found)
    }

    /// How a tensor is quantised, if it is.
    pub(crate) fn scheme(&self, tensor: usize) -> Option<Scheme> {
        self.schemes.get(&tensor).copied()
    }

    /// The weight that a tensor of scales belongs to; `None` for any other tensor.
    pub(crate) fn scaled(&self, tensor: usize) -> Option<usize> {
        self.weights.get(&tensor).copied()
    }
}

/// Refuses what the config calls quantised in a way that this crate cannot undo.
///
/// # Errors
/// [`ErrorKind::Unsupported`], or [`ErrorKind::Config`] when the method is not a string.
pub(crate) fn check_method(config: &Config) -> Result<()> {
    let Some(quantised) = config.get(KEY) else { return Ok(()) };
    let method = quantised.get("quant_method").unwrap_or(&Value::Null);
    if METHODS.iter().any(|known| method == known) {
        return Ok(());
    }
    let (found, supported) = (method.to_string(), METHODS.join(", "));
    Err(ErrorKind::Unsupported { what: "quantisation method", found, supported }.into())
}

/// Rows and columns of an FP8 block.
fn block(config: &Config) -> Result<(usize, usize)> {
    const SIZE: &str = "weight_block_size";
    let size = config.get(KEY).and_then(|q| q.get(SIZE)).filter(|size| !size.is_null());
    let Some(size) = size else { return Ok(BLOCK) };
    let side =
        |side: &Value| side.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
    let sides: Option<Vec<usize>> =
        size.as_array().and_then(|sides| sides.iter().map(side).collect());
    match sides.as_deref() {
        Some(&[rows, cols]) => Ok((rows, cols)),
        _ => Err(mismatch(&format!("{KEY}.{SIZE}"), "two positive numbers", size)),
    }
}

/// How a tensor is quantised, by its data type and name.
fn scheme(store: &Store, tensor: usize, block: (usize, usize)) -> Result<Option<Scheme>> {
    let entry = store.entry(tensor);
    let sibling = |name: String| {
        let missing =
            || Error::malformed("quantised tensor", format!("its scales `{name}` are missing"));
        store.get(&name).ok_or_else(missing)
    };
    if entry.dtype.name() == "F8_E4M3" {
        let scales = sibling(format!("{}_scale_inv", entry.name))?;
        let Some(expected) = scale_shape(&entry.shape, block) else {
            return Err(Error::shape("FP8 tensor", "rows and columns", &entry.shape));
        };
        fits(store, scales, &expected, &["F32", "F16", "BF16", "U8", "F8_E8M0"])?;
        return Ok(Some(Scheme::Fp8 { scales, block }));
    }
    match entry.name.strip_suffix("_blocks") {
        Some(name) if entry.dtype.name() == "U8" && name.contains("experts.") => {
            let scales = sibling(format!("{name}_scales"))?;
            let [groups @ .., mxfp4::BYTES] = &entry.shape[..] else {
                return Err(Error::shape("MXFP4 tensor", "groups of 16 bytes", &entry.shape));
            };
            fits(store, scales, groups, &["U8", "F8_E8M0"])?;
            Ok(Some(Scheme::Mxfp4 { scales }))
        }
        _ => Ok(None),
    }
}

/// Checks shape and data type of scales.
fn fits(store: &Store, scales: usize, shape: &[usize], types: &[&str]) -> Result<()> {
    let entry = store.entry(scales);
    let check = || {
        if entry.shape != shape {
            return Err(Error::shape("scales", shape, &entry.shape));
        }
        if !types.contains(&entry.dtype.name()) {
            let (found, supported) = (entry.dtype.name().into(), types.join(", "));
            let what = "data type of scales";
            return Err(ErrorKind::Unsupported { what, found, supported }.into());
        }
        Ok(())
    };
    check().in_tensor(&entry.name).in_file(store.path(scales))
}

/// `count` values of a tensor from byte `start` on, dequantised; a quantised tensor's NaN codes
/// are NaN.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a data type that holds no weights, [`ErrorKind::NotFinite`] for a
/// scale, with its place; [`ErrorKind::Shape`] for a run that the tensor does not have.
pub(crate) fn decode(store: &Store, tensor: usize, start: usize, count: usize) -> Result<Vec<f32>> {
    let (entry, bytes) = (store.entry(tensor), store.bytes(tensor));
    let scheme = store.quantised().scheme(tensor);
    let length = match scheme {
        None => count * entry.dtype.alignment(),
        Some(Scheme::Fp8 { .. }) => count,
        Some(Scheme::Mxfp4 { .. }) => count / 2,
    };
    let Some(part) = bytes.get(start..start + length) else {
        return Err(Error::shape("part of a tensor", bytes.len(), start + length));
    };
    let mut out = Vec::with_capacity(count);
    match scheme {
        None => return entry.dtype.decode(part),
        Some(Scheme::Fp8 { scales, block }) => {
            let &[.., rows, cols] = &entry.shape[..] else {
                return Err(Error::shape("FP8 tensor", "rows and columns", &entry.shape));
            };
            let scales = scale_values(store, scales, 0..store.bytes(scales).len())?;
            Blocks { matrix: (rows, cols), block, scales: &scales }.decode(part, start, &mut out);
        }
        Some(Scheme::Mxfp4 { scales }) => {
            if !start.is_multiple_of(mxfp4::BYTES) || !count.is_multiple_of(mxfp4::VALUES) {
                return Err(Error::shape("part of an MXFP4 tensor", "whole groups", count));
            }
            let first = start / mxfp4::BYTES;
            let scales = scale_values(store, scales, first..first + count / mxfp4::VALUES)?;
            mxfp4::decode(part, scales.into_iter(), &mut out);
        }
    }
    Ok(out)
}

/// The scales in those bytes of their tensor, all finite.
fn scale_values(store: &Store, scales: usize, part: std::ops::Range<usize>) -> Result<Vec<f32>> {
    let entry = store.entry(scales);
    let bytes = &store.bytes(scales)[part.clone()];
    let values = match entry.dtype.name() {
        "U8" | "F8_E8M0" => bytes.iter().map(|&code| e8m0(code)).collect(),
        _ => entry.dtype.decode(bytes)?,
    };
    let Some((index, value)) = non_finite(&values) else { return Ok(values) };
    let (what, index) = ("scale".into(), part.start / entry.dtype.alignment() + index);
    Err(ErrorKind::NotFinite { what, value: f64::from(value), index }.into())
        .in_tensor(&entry.name)
        .in_file(store.path(scales))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};

    fn fixture() -> Store {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/quant");
        let mut store = Store::open(dir.as_ref()).unwrap();
        let config = Config::parse("{}".into()).unwrap();
        store.find_quantised(&config, dir.as_ref()).unwrap();
        store
    }

    fn read(store: &Store, name: &str) -> Vec<f32> {
        let tensor = store.get(name).unwrap();
        decode(store, tensor, 0, store.parameters(tensor)).unwrap()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    #[test]
    fn fp8_agrees_with_torch_to_the_bit() {
        let store = fixture();
        for name in ["codes", "powers"] {
            let found = read(&store, &format!("{name}.weight"));
            assert_eq!(bits(&found), bits(&read(&store, &format!("{name}.values"))), "{name}");
        }
        let ragged = read(&store, "ragged.weight");
        assert_eq!(ragged.len(), 130 * 300);
        let bytes: Vec<u8> = ragged.iter().flat_map(|v| v.to_le_bytes()).collect();
        let expected = store.bytes(store.get("ragged.sha256").unwrap());
        assert_eq!(Sha256::digest(&bytes)[..], *expected);
    }

    #[test]
    fn mxfp4_agrees_with_transformers_to_the_bit() {
        let store = fixture();
        let found = read(&store, "layers.0.mlp.experts.down_proj_blocks");
        let expected = read(&store, "down_proj.values");
        let (n, rows, cols) = (3, 5, 64);
        assert_eq!(found.len(), n * rows * cols);
        for (at, value) in found.iter().enumerate() {
            let (i, row, col) = (at / (rows * cols), at / cols % rows, at % cols);
            let turned = expected[(i * cols + col) * rows + row];
            assert_eq!(value.to_bits(), turned.to_bits(), "{i} {row} {col}");
        }
        let tensor = store.get("layers.0.mlp.experts.down_proj_blocks").unwrap();
        assert_eq!(bits(&decode(&store, tensor, 32, 96).unwrap()), bits(&found[64..160]));
        assert!(decode(&store, tensor, 8, 32).is_err() && decode(&store, tensor, 480, 32).is_err());
    }

    #[test]
    fn block_sizes_come_from_the_config() {
        let of = |size: &str| {
            let text = format!(r#"{{"{KEY}": {{"weight_block_size": {size}}}}}"#);
            block(&Config::parse(text).unwrap())
        };
        assert_eq!(of("null").unwrap(), (128, 128));
        assert_eq!(of("[64, 32]").unwrap(), (64, 32));
        for bad in ["[0, 1]", "[1]", "128", "[1, -1]", "[\"1\", 1]"] {
            assert!(matches!(of(bad).unwrap_err().kind(), ErrorKind::Config { .. }), "{bad}");
        }
    }
}
