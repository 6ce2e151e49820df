//! Keys and values of tokens that were already seen.

use ndarray::{Array2, ArrayView2, Axis, concatenate};

use crate::error::{Error, Result};

/// Keys and values of the tokens of one window that were already seen, in one layer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cache {
    keys_values: Option<[Array2<f32>; 2]>,
}

impl Cache {
    /// Number of tokens held.
    pub(crate) fn len(&self) -> usize {
        self.keys_values.as_ref().map_or(0, |[k, _]| k.nrows())
    }

    /// Appends new rows and returns all of them.
    pub(crate) fn extend(&mut self, [k, v]: [Array2<f32>; 2]) -> Result<[ArrayView2<'_, f32>; 2]> {
        let joined = match self.keys_values.take() {
            None => [k, v],
            Some([past_k, past_v]) => [join(&past_k, &k)?, join(&past_v, &v)?],
        };
        let [k, v] = self.keys_values.insert(joined);
        Ok([k.view(), v.view()])
    }
}

fn join(a: &Array2<f32>, b: &Array2<f32>) -> Result<Array2<f32>> {
    concatenate(Axis(0), &[a.view(), b.view()])
        .map_err(|_| Error::shape("key-value cache", a.ncols(), b.ncols()))
}
