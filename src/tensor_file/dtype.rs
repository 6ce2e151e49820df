//! Element types on disk, and their conversion from and to `f32` at memory speed.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::error::{ErrorKind, Result};

/// An element type, by its safetensors name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dtype {
    name: &'static str,
    bits: usize,
}

const KNOWN: &[(&str, usize)] = &[
    ("F32", 32),
    ("F16", 16),
    ("BF16", 16),
    ("F64", 64),
    ("I64", 64),
    ("U64", 64),
    ("C64", 64),
    ("I32", 32),
    ("U32", 32),
    ("I16", 16),
    ("U16", 16),
    ("I8", 8),
    ("U8", 8),
    ("BOOL", 8),
    ("F8_E4M3", 8),
    ("F8_E5M2", 8),
    ("F8_E8M0", 8),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("F4", 4),
];

/// What expert and router tensors may be stored as.
pub(crate) const FLOATS: &str = "F32, F16, BF16";

impl Dtype {
    /// What quantised weights are written as.
    pub(crate) const BF16: Self = Self { name: "BF16", bits: 16 };
    pub(crate) const F32: Self = Self { name: "F32", bits: 32 };
    pub(crate) const F64: Self = Self { name: "F64", bits: 64 };
    pub(crate) const I64: Self = Self { name: "I64", bits: 64 };
    /// What row numbers are written as.
    pub(crate) const I32: Self = Self { name: "I32", bits: 32 };

    /// The type of that name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        let (name, bits) = KNOWN.iter().find(|(known, _)| *known == name)?;
        Some(Self { name, bits: *bits })
    }

    /// All names.
    pub(crate) fn names() -> String {
        KNOWN.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
    }

    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        self.name
    }

    /// Bytes of a tensor of that shape; `None` on overflow or when they are not whole.
    pub(crate) fn bytes(self, shape: &[usize]) -> Option<usize> {
        let bits = shape.iter().try_fold(self.bits, |product, &side| product.checked_mul(side))?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// What its tensors should be aligned to.
    pub(crate) fn alignment(self) -> usize {
        (self.bits / 8).max(1)
    }

    /// Whether this crate computes with it.
    pub(crate) fn is_float(self) -> bool {
        matches!(self.name, "F32" | "F16" | "BF16")
    }

    /// Whether it holds whole numbers, or true and false.
    pub(crate) fn is_integer(self) -> bool {
        self.name == "BOOL" || self.name.starts_with(['I', 'U'])
    }

    /// The values of `bytes`, little-endian, at any alignment.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] unless [`Dtype::is_float`].
    pub(crate) fn decode(self, bytes: &[u8]) -> Result<Vec<f32>> {
        match self.name {
            "F32" => {
                let (chunks, _) = bytes.as_chunks::<4>();
                Ok(chunks.iter().map(|&b| f32::from_le_bytes(b)).collect())
            }
            "BF16" => {
                let (chunks, _) = bytes.as_chunks::<2>();
                let widen = |&b: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16);
                Ok(chunks.iter().map(widen).collect())
            }
            "F16" => Ok(decode_f16(bytes)),
            _ => Err(self.unsupported()),
        }
    }

    /// The values of `bytes` in double precision, exact for F64 and what [`Dtype::decode`] reads.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for any other type.
    pub(crate) fn decode_f64(self, bytes: &[u8]) -> Result<Vec<f64>> {
        if self != Self::F64 {
            return Ok(self.decode(bytes)?.into_iter().map(f64::from).collect());
        }
        Ok(bytes.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect())
    }

    /// The whole numbers of `bytes`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] unless the type is I32 or I64.
    pub(crate) fn decode_integers(self, bytes: &[u8]) -> Result<Vec<i64>> {
        match self {
            Self::I32 => {
                let widen = |&b: &[u8; 4]| i64::from(i32::from_le_bytes(b));
                Ok(bytes.as_chunks().0.iter().map(widen).collect())
            }
            Self::I64 => Ok(bytes.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b)).collect()),
            _ => {
                let (found, supported) = (self.name.into(), "I32, I64".into());
                Err(ErrorKind::Unsupported { what: "type of whole numbers", found, supported }
                    .into())
            }
        }
    }

    /// Appends `values` to `out`, rounded to the nearest, ties to even.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] unless [`Dtype::is_float`]; [`ErrorKind::OutOfRange`] when a
    /// finite value rounds to infinity.
    pub(crate) fn encode(self, values: &[f32], out: &mut Vec<u8>) -> Result<()> {
        let start = out.len();
        match self.name {
            "F32" => {
                out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
                return Ok(());
            }
            "BF16" => {
                out.resize(start + values.len() * 2, 0);
                let (chunks, _) = out[start..].as_chunks_mut::<2>();
                chunks.iter_mut().zip(values).for_each(|(b, v)| *b = bf16(*v).to_le_bytes());
            }
            "F16" => encode_f16(values, out),
            _ => return Err(self.unsupported()),
        }
        let exponent: u16 = if self.name == "F16" { 0x7c00 } else { 0x7f80 };
        let (chunks, _) = out[start..].as_chunks::<2>();
        let infinite = |b: &[u8; 2]| u16::from_le_bytes(*b) & exponent == exponent;
        if !chunks.iter().fold(false, |bad, b| bad | infinite(b)) {
            return Ok(());
        }
        let at = chunks.iter().position(infinite).unwrap_or_default();
        let expected = format!("a value that {} can hold", self.name);
        Err(crate::error::Error::range("weight", expected, values[at]))
    }

    fn unsupported(self) -> crate::error::Error {
        let found = self.name.into();
        ErrorKind::Unsupported { what: "weight data type", found, supported: FLOATS.into() }.into()
    }
}

/// Rounds to the nearest bf16, ties to even; NaN stays NaN. Branch-free, so that it vectorises.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    let quiet = (bits >> 16) as u16 | 0x40;
    if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded }
}

/// Values converted at a time: a block's copy fits the first-level cache.
const BLOCK: usize = 1024;

fn decode_f16(bytes: &[u8]) -> Vec<f32> {
    let (chunks, _) = bytes.as_chunks::<2>();
    let mut values = vec![0.0; chunks.len()];
    let mut half = [f16::ZERO; BLOCK];
    for (from, to) in chunks.chunks(BLOCK).zip(values.chunks_mut(BLOCK)) {
        let half = &mut half[..from.len()];
        half.iter_mut().zip(from).for_each(|(h, &b)| *h = f16::from_le_bytes(b));
        half.convert_to_f32_slice(to);
    }
    values
}

fn encode_f16(values: &[f32], out: &mut Vec<u8>) {
    let mut half = [f16::ZERO; BLOCK];
    for from in values.chunks(BLOCK) {
        let half = &mut half[..from.len()];
        half.convert_from_f32_slice(from);
        out.extend(half.iter().flat_map(|h| h.to_le_bytes()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str) -> Dtype {
        Dtype::named(name).unwrap()
    }

    fn finite(bits: u16, exponent: u16) -> bool {
        bits & exponent != exponent
    }

    #[test]
    fn every_finite_16_bit_value_survives_a_round_trip() {
        for (name, exponent) in [("BF16", 0x7f80), ("F16", 0x7c00)] {
            let all = (0..=u16::MAX).filter(|&b| finite(b, exponent));
            let bytes: Vec<u8> = all.flat_map(u16::to_le_bytes).collect();
            let mut back = Vec::new();
            of(name).encode(&of(name).decode(&bytes).unwrap(), &mut back).unwrap();
            assert!(back == bytes, "{name}");
        }
    }

    #[test]
    fn rounding_agrees_with_the_reference() {
        let mut x = 0x1234_5678u32;
        for _ in 0..200_000 {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = f32::from_bits(x);
            let expected = half::bf16::from_f32(value);
            assert_eq!(bf16(value), expected.to_bits(), "{value:e}");
        }
        assert_eq!(bf16(f32::NAN) & 0x7fff, 0x7fc0);
        assert_eq!(bf16(f32::INFINITY), 0x7f80);
    }

    #[test]
    fn unaligned_bytes_are_read() {
        for name in ["F32", "F16", "BF16"] {
            let mut bytes = vec![7];
            of(name).encode(&[1.0, -2.5, 0.375], &mut bytes).unwrap();
            assert_eq!(of(name).decode(&bytes[1..]).unwrap(), [1.0, -2.5, 0.375]);
        }
    }

    #[test]
    fn overflow_and_other_types_are_errors() {
        let error = of("F16").encode(&[1.0, 70_000.0], &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("found 70000"));
        assert!(matches!(of("I64").decode(&[0; 8]), Err(e) if e.to_string().contains("I64")));
        assert_eq!(of("F4").bytes(&[3]), None);
        assert_eq!(of("F4").bytes(&[3, 2]), Some(3));
    }
}
