//! Checks for NaN and infinity, at memory speed.

use ndarray::{ArrayBase, Data, Dimension};

use crate::error::{ErrorKind, Result};

/// Index and value of the first NaN or infinity.
pub fn non_finite(values: &[f32]) -> Option<(usize, f32)> {
    const EXPONENT: u32 = 0x7f80_0000;
    // An early exit would keep the loop from being vectorised, so blocks are scanned whole.
    let bad = |block: &[f32]| {
        block.iter().fold(false, |bad, x| bad | (x.to_bits() & EXPONENT == EXPONENT))
    };
    let block = values.chunks(4096).position(bad)? * 4096;
    let offset = values[block..].iter().position(|x| !x.is_finite())?;
    Some((block + offset, values[block + offset]))
}

/// Arrays whose values can be checked.
pub trait Finite {
    /// Fails when a value is NaN or infinite.
    ///
    /// # Errors
    /// [`ErrorKind::NotFinite`] with the row-major index of the first such value.
    fn check_finite(&self, what: &str) -> Result<()>;
}

impl<S: Data<Elem = f32>, D: Dimension> Finite for ArrayBase<S, D> {
    fn check_finite(&self, what: &str) -> Result<()> {
        let found = match self.as_slice() {
            Some(values) => non_finite(values),
            None => self.iter().copied().enumerate().find(|(_, x)| !x.is_finite()),
        };
        report(what, found.map(|(index, value)| (index, f64::from(value))))
    }
}

impl Finite for [f64] {
    fn check_finite(&self, what: &str) -> Result<()> {
        check_finite_f64(what, self)
    }
}

/// [`Finite::check_finite`] of `f64` in the order of iteration: that of rows for an array.
pub(super) fn check_finite_f64<'a>(
    what: &str,
    values: impl IntoIterator<Item = &'a f64>,
) -> Result<()> {
    report(what, values.into_iter().copied().enumerate().find(|(_, x)| !x.is_finite()))
}

fn report(what: &str, found: Option<(usize, f64)>) -> Result<()> {
    match found {
        None => Ok(()),
        Some((index, value)) => {
            Err(ErrorKind::NotFinite { what: what.into(), value, index }.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bad_value_is_found_across_blocks() {
        let mut values = vec![1.0f32; 10_000];
        assert_eq!(non_finite(&values), None);
        (values[9_000], values[5_001]) = (f32::NAN, f32::NEG_INFINITY);
        assert_eq!(non_finite(&values), Some((5_001, f32::NEG_INFINITY)));
        assert_eq!(non_finite(&[f32::MAX, f32::MIN_POSITIVE, -0.0, 1e-45]), None);
    }
}
