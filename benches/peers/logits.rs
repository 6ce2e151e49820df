//! Logits of a checkpoint, stock or native, for comparison with another implementation
//! (`tools/check_native.py`).
//!
//! TOKENS holds `input_ids` (W, L), i32; for encoder-decoder models `decoder_input_ids` (W, L')
//! too. OUT gets `logits` (W, L or L', vocabulary), f32.

use std::path::Path;

use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::forward::Model;
use ndarray::Array2;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::{Outcome, USAGE};

pub(crate) fn run(args: &[String]) -> Outcome {
    let [model, tokens, out] = args else { return Err(USAGE.into()) };
    let bytes = std::fs::read(tokens)?;
    let given = SafeTensors::deserialize(&bytes)?;
    let found = logits(model.as_ref(), &rows(&given, "input_ids")?, &given)?;
    save(&found, out.as_ref())
}

/// The logits of every window.
fn logits(model: &Path, inputs: &[Vec<u32>], given: &SafeTensors<'_>) -> Outcome<Vec<Array2<f32>>> {
    let model = Model::open(Checkpoint::open(model)?)?;
    if let Some(causal) = model.causal() {
        return Ok(inputs.iter().map(|w| causal.logits(w)).collect::<Result<_, _>>()?);
    }
    let switch = model.switch().ok_or("neither decoder-only nor Switch")?;
    let outputs = rows(given, "decoder_input_ids")?;
    let each = inputs.iter().zip(&outputs).map(|(input, output)| switch.logits(input, output));
    Ok(each.collect::<Result<_, _>>()?)
}

fn rows(given: &SafeTensors<'_>, name: &str) -> Outcome<Vec<Vec<u32>>> {
    let tensor = given.tensor(name)?;
    let (Dtype::I32, &[_, length]) = (tensor.dtype(), tensor.shape()) else {
        return Err(format!("{name} is not (W, L), i32").into());
    };
    let ids = tensor.data().chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let ids: Vec<u32> = ids.collect();
    Ok(ids.chunks(length.max(1)).map(<[u32]>::to_vec).collect())
}

fn save(logits: &[Array2<f32>], out: &Path) -> Outcome {
    let (rows, cols) = logits.first().ok_or("no windows")?.dim();
    let bytes: Vec<u8> = logits.iter().flatten().flat_map(|z| z.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![logits.len(), rows, cols], &bytes)?;
    Ok(safetensors::serialize_to_file([("logits", view)], None, out)?)
}
