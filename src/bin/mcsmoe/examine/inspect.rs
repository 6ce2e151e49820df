//! `inspect`: what is in a checkpoint, from its headers.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::builder::{PathBufValueParser, TypedValueParser};
use mcsmoe::checkpoint::Checkpoint;
use serde::Serialize;

use crate::exit::Outcome;
use crate::locate::model_folder;
use crate::show::{Show, bytes, count};

/// Family, layers, experts, data types, and bytes by part; reads headers only.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder of a checkpoint, or its hub name if it is in the local cache.
    #[arg(value_parser = PathBufValueParser::new().map(model_folder))]
    model: PathBuf,
    /// List every tensor too.
    #[arg(long)]
    tensors: bool,
}

#[derive(Serialize)]
struct Inspection {
    model: PathBuf,
    family: String,
    layout: &'static str,
    native: bool,
    parameters: u64,
    bytes: u64,
    /// Experts, routers and what else there is.
    parts: BTreeMap<&'static str, u64>,
    /// Bytes by data type.
    dtypes: BTreeMap<&'static str, u64>,
    layers: Vec<Layer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tensors: Option<Vec<Tensor>>,
}

#[derive(Serialize)]
struct Layer {
    layer: String,
    experts: usize,
    router_rows: usize,
    top_k: usize,
    d_model: usize,
    d_ff: usize,
    dtype: String,
    parameters: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct Tensor {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: u64,
}

pub(crate) fn run(args: &Args, show: &Show) -> Outcome {
    let checkpoint = Checkpoint::open(&args.model)?;
    let found = inspect(args, &checkpoint)?;
    show.result(&found, |out| {
        let model = found.model.display();
        writeln!(out, "{model}: {} (layout {})", found.family, found.layout)?;
        writeln!(out, "{} parameters, {}", count(found.parameters), bytes(found.bytes))?;
        for (part, size) in &found.parts {
            let share = 100.0 * *size as f64 / found.bytes.max(1) as f64;
            writeln!(out, "  {part:<11} {:>10} {share:5.1}%", bytes(*size))?;
        }
        let dtypes: Vec<String> =
            found.dtypes.iter().map(|(name, n)| format!("{name} {}", bytes(*n))).collect();
        writeln!(out, "data types: {}", dtypes.join(", "))?;
        writeln!(
            out,
            "{:<18} {:>7} {:>5} {:>7} {:>6} {:>9} {:>15} {:>10}",
            "layer", "experts", "top-k", "d_model", "d_ff", "type", "parameters", "bytes"
        )?;
        for l in &found.layers {
            let experts = match l.router_rows == l.experts {
                true => l.experts.to_string(),
                false => format!("{}/{}", l.experts, l.router_rows),
            };
            writeln!(
                out,
                "{:<18} {:>7} {:>5} {:>7} {:>6} {:>9} {:>15} {:>10}",
                l.layer,
                experts,
                l.top_k,
                l.d_model,
                l.d_ff,
                l.dtype,
                count(l.parameters),
                bytes(l.bytes)
            )?;
        }
        for t in found.tensors.iter().flatten() {
            writeln!(out, "{} {} {:?} {}", t.name, t.dtype, t.shape, bytes(t.bytes))?;
        }
        Ok(())
    })
}

fn inspect(args: &Args, checkpoint: &Checkpoint) -> Outcome<Inspection> {
    let mut dtypes = BTreeMap::new();
    let mut tensors = Vec::new();
    for (name, dtype, shape) in checkpoint.tensors() {
        let bytes = checkpoint.tensor_bytes(name)?.len() as u64;
        *dtypes.entry(dtype).or_insert(0) += bytes;
        if args.tensors {
            tensors.push(Tensor { name: name.into(), dtype, shape: shape.to_vec(), bytes });
        }
    }
    let bytes = checkpoint.total_bytes();
    let experts: u64 = checkpoint.layers().iter().map(|l| l.expert_bytes).sum();
    let mut mtp = 0;
    for name in checkpoint.mtp_tensors() {
        mtp += checkpoint.tensor_bytes(name)?.len() as u64;
    }
    let mut parts = BTreeMap::from([("experts", experts), ("other", bytes - experts - mtp)]);
    if mtp > 0 {
        parts.insert("prediction", mtp);
    }
    let layer = |l: &mcsmoe::checkpoint::LayerInfo| Layer {
        layer: l.id.to_string(),
        experts: l.experts,
        router_rows: l.merged.as_ref().map_or(l.experts, mcsmoe::model::Grouping::experts),
        top_k: l.rule.top_k,
        d_model: l.d_model,
        d_ff: l.d_ff,
        dtype: l.dtype.clone(),
        parameters: l.expert_parameters,
        bytes: l.expert_bytes,
    };
    Ok(Inspection {
        model: args.model.clone(),
        family: checkpoint.family().into(),
        layout: checkpoint.layout(),
        native: checkpoint.is_native(),
        parameters: checkpoint.total_parameters(),
        bytes,
        parts,
        dtypes,
        layers: checkpoint.layers().iter().map(layer).collect(),
        tensors: args.tensors.then_some(tensors),
    })
}
