//! Reads the frozen outputs of the paper's own code under `tests/fixtures/golden`.

use std::path::Path;

use ndarray::{Array2, Array3};
use safetensors::{Dtype, SafeTensors};

pub(crate) struct Golden(Vec<u8>);

impl Golden {
    pub(crate) fn open(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden");
        Self(std::fs::read(folder.join(format!("{name}.safetensors"))).unwrap())
    }

    fn values(&self, name: &str, dtype: Dtype) -> (Vec<usize>, Vec<u8>) {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), dtype, "{name}");
        (tensor.shape().to_vec(), tensor.data().to_vec())
    }

    fn floats(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let (shape, bytes) = self.values(name, Dtype::F32);
        let value = |b: &[u8]| f32::from_le_bytes(b.try_into().unwrap());
        (shape, bytes.chunks(4).map(value).collect())
    }

    pub(crate) fn matrix(&self, name: &str) -> Array2<f32> {
        let (shape, values) = self.floats(name);
        Array2::from_shape_vec((shape[0], shape[1]), values).unwrap()
    }

    pub(crate) fn doubles(&self, name: &str) -> Array2<f64> {
        let (shape, bytes) = self.values(name, Dtype::F64);
        let value = |b: &[u8]| f64::from_le_bytes(b.try_into().unwrap());
        let values = bytes.chunks(8).map(value).collect();
        Array2::from_shape_vec((shape[0], shape[1]), values).unwrap()
    }

    pub(crate) fn vector(&self, name: &str) -> Vec<f32> {
        self.floats(name).1
    }

    pub(crate) fn cube(&self, name: &str) -> Array3<f32> {
        let (shape, values) = self.floats(name);
        Array3::from_shape_vec((shape[0], shape[1], shape[2]), values).unwrap()
    }

    pub(crate) fn indices(&self, name: &str) -> Vec<u32> {
        let (_, bytes) = self.values(name, Dtype::I64);
        let value = |b: &[u8]| u32::try_from(i64::from_le_bytes(b.try_into().unwrap())).unwrap();
        bytes.chunks(8).map(value).collect()
    }
}
