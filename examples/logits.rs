//! Logits of a checkpoint, stock or native, for comparison with another implementation
//! (`tools/check_native.py`).
//!
//! ```text
//! cargo run --release --example logits                      # the bundled checkpoint
//! cargo run --release --example logits -- MODEL TOKENS.safetensors OUT.safetensors
//! ```
//!
//! TOKENS holds `input_ids` (W, L), i32; for encoder-decoder models `decoder_input_ids` (W, L')
//! too. OUT gets `logits` (W, L or L', vocabulary), f32.

#![allow(clippy::print_stdout)] // It is a command.

use std::path::{Path, PathBuf};

use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::forward::Model;
use ndarray::Array2;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome {
    let args: Vec<PathBuf> = std::env::args().skip(1).map(PathBuf::from).collect();
    match &args[..] {
        [] => bundled(),
        [model, tokens, out] => {
            let bytes = std::fs::read(tokens)?;
            let given = SafeTensors::deserialize(&bytes)?;
            let found = logits(model, &rows(&given, "input_ids")?, &given)?;
            save(&found, out)
        }
        _ => Err("usage: logits [MODEL TOKENS OUT]".into()),
    }
}

fn bundled() -> Outcome {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mixtral-8e");
    let empty = safetensors::serialize(std::iter::empty::<(&str, TensorView<'_>)>(), None)?;
    let found = logits(&model, &[vec![5, 9, 33, 70]], &SafeTensors::deserialize(&empty)?)?;
    println!("{:?}", found[0].dim());
    assert!(found[0].iter().all(|z| z.is_finite()));
    Ok(())
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
