//! Statistics as JSON: for counts that come from elsewhere, such as a serving log, and for reading.
//!
//! ```json
//! { "model_type": "mixtral",
//!   "layers": { "layers.0": { "tokens": 3, "counts": [3, 3], "router_mass": [2.2, 0.8],
//!                             "logit_gram": [[5.0, 1.0], [1.0, 2.0]] } } }
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use super::stats_file::StatsFile;
use super::writer::{TemporaryFile, check_readable, write_stats};
use crate::error::{Error, Locate, Result};
use crate::model::{LayerId, RoutingStats};
use crate::stage::Needs;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model_type: Option<String>,
    layers: BTreeMap<LayerId, Layer>,
}

/// A layer; the names are those of the tensors in a statistics file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Layer {
    tokens: u64,
    counts: Vec<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    logit_gram: Option<Vec<Vec<f64>>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    router_mass: Option<Vec<f64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expert_out_norm: Option<Vec<f64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reap_saliency: Option<Vec<f64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expert_mean_output: Option<Vec<Vec<f32>>>,
}

const FORMAT: &str = "statistics as JSON";

/// Turns statistics written as JSON into a statistics file. Of a layer only `tokens` and `counts`
/// are required; the others are named as the tensors of the file (`logit_gram` as a list of rows).
///
/// # Errors
/// [`Format`](crate::ErrorKind::Format) for JSON of another form or rows of unequal length,
/// [`Statistics`](crate::ErrorKind::Statistics) with the layer when its parts contradict each
/// other, [`Io`](crate::ErrorKind::Io).
pub fn statistics_from_json(from: &Path, to: &Path) -> Result<()> {
    let text = fs::read_to_string(from).map_err(|e| Error::io("read", e)).in_file(from)?;
    let document: Document =
        serde_json::from_str(&text).map_err(|e| Error::malformed(FORMAT, e)).in_file(from)?;
    if document.layers.is_empty() {
        return Err(Error::malformed(FORMAT, "no layers")).in_file(from);
    }
    let mut layers = BTreeMap::new();
    for (id, layer) in document.layers {
        layers.insert(id, layer.read().in_layer(id).in_file(from)?);
    }
    let metadata = document.model_type.map(|family| ("model_type".to_owned(), family));
    write_stats(to, &layers, &metadata.into_iter().collect())
}

/// Writes a statistics file as JSON, without what is stored per token and per weight. It is written
/// aside and renamed.
///
/// # Errors
/// Those of reading; [`Io`](crate::ErrorKind::Io).
pub fn statistics_to_json(from: &Path, to: &Path) -> Result<()> {
    let file = StatsFile::open(from)?;
    let beyond = Needs::SAMPLES | Needs::GRADIENTS | Needs::FISHER;
    let mut layers = BTreeMap::new();
    for id in file.layers() {
        let stats = file.layer(id, file.available(id).without(beyond))?;
        layers.insert(*id, Layer::of(&stats));
    }
    let document = Document { model_type: file.model_type().map(str::to_owned), layers };
    let text = serde_json::to_string_pretty(&document).map_err(|e| Error::malformed(FORMAT, e))?;
    let aside = TemporaryFile::of(to);
    let written = fs::write(&aside.whole, text).and_then(|()| fs::rename(&aside.whole, to));
    written.map_err(|e| Error::io("write", e)).in_file(to)
}

impl Layer {
    fn read(self) -> Result<RoutingStats> {
        let mean_output = self.expert_mean_output.map(|rows| matrix(&rows)).transpose()?;
        let stats = RoutingStats {
            tokens: self.tokens,
            counts: self.counts,
            logit_gram: self.logit_gram.map(|rows| matrix(&rows)).transpose()?,
            router_mass: self.router_mass,
            output_norm: self.expert_out_norm,
            reap: self.reap_saliency,
            mean_output,
            ..RoutingStats::default()
        };
        let width = stats.mean_output.as_ref().map_or(1, |mean| mean.ncols());
        stats.validate(stats.experts(), width)?;
        check_readable(&stats)?;
        Ok(stats)
    }

    fn of(stats: &RoutingStats) -> Self {
        Self {
            tokens: stats.tokens,
            counts: stats.counts.clone(),
            logit_gram: stats.logit_gram.as_ref().map(|gram| rows(gram.view())),
            router_mass: stats.router_mass.clone(),
            expert_out_norm: stats.output_norm.clone(),
            reap_saliency: stats.reap.clone(),
            expert_mean_output: stats.mean_output.as_ref().map(|mean| rows(mean.view())),
        }
    }
}

fn rows<T: Copy>(matrix: ArrayView2<'_, T>) -> Vec<Vec<T>> {
    matrix.rows().into_iter().map(|row| row.to_vec()).collect()
}

fn matrix<T: Copy>(rows: &[Vec<T>]) -> Result<Array2<T>> {
    let width = rows.first().map_or(0, Vec::len);
    if let Some(other) = rows.iter().find(|row| row.len() != width) {
        return Err(Error::malformed(
            FORMAT,
            format!("rows of {width} and of {} numbers", other.len()),
        ));
    }
    Array2::from_shape_vec((rows.len(), width), rows.concat())
        .map_err(|e| Error::malformed(FORMAT, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_survive_the_way_through_json() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one.safetensors"), dir.path().join("two.safetensors"));
        let json = dir.path().join("stats.json");
        let stats = RoutingStats {
            logit_gram: Some(ndarray::arr2(&[[5.0, 1.0], [1.0, 2.0]])),
            router_mass: Some(vec![2.2, 0.8]),
            mean_output: Some(ndarray::arr2(&[[0.5, 1.0, 0.1], [0.0, 1.5, -2.0]])),
            ..RoutingStats::from_counts(vec![4, 2], 4)
        };
        let metadata = [("model_type".to_owned(), "mixtral".to_owned())].into_iter().collect();
        let layers = [(LayerId::causal(1), stats)].into_iter().collect();
        write_stats(&one, &layers, &metadata).unwrap();
        statistics_to_json(&one, &json).unwrap();
        statistics_from_json(&json, &two).unwrap();
        assert_eq!(fs::read(&one).unwrap(), fs::read(&two).unwrap());
    }

    #[test]
    fn contradictions_are_told_with_file_and_layer() {
        let dir = tempfile::tempdir().unwrap();
        let json = dir.path().join("stats.json");
        let fails = |layer: &str, expected: &str| {
            fs::write(&json, format!(r#"{{"layers":{{"layers.3":{layer}}}}}"#)).unwrap();
            let error = statistics_from_json(&json, &dir.path().join("none")).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert!(!dir.path().join("none").exists());
        };
        fails(r#"{"tokens":3,"counts":[3,2],"router_mass":[1]}"#, "layers.3");
        fails(r#"{"tokens":3,"counts":[3,2],"logit_gram":[[1,2],[3]]}"#, "rows of 2 and of 1");
        fails(r#"{"tokens":3,"counts":[3,2],"usage":[1]}"#, "usage");
        fails(r#"{"tokens":3,"counts":[3,-2]}"#, "stats.json");
        // What would be written and could not be read.
        fails(r#"{"tokens":3,"counts":[4,2]}"#, "count: expected 0..=3, found 4");
        fails(r#"{"tokens":3,"counts":[]}"#, "1 to 8192, found 0");
        fails(r#"{"tokens":3,"counts":[1],"expert_mean_output":[[]]}"#, "width of the model");
        fails(r#"{"tokens":3,"counts":[1],"reap_saliency":[1e39]}"#, "REAP saliency: expected");
    }
}
