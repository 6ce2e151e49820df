//! From bytes to experts and routers in `f32`.

use ndarray::{Array1, Array2};

use super::scan_layer::{LayerTensors, Piece};
use super::store::Store;
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{Activation, Expert, Linear, Role, Router, RoutingRule, non_finite};

/// The values of a part of a tensor, all finite.
///
/// # Errors
/// [`ErrorKind::NotFinite`] with file, tensor and the index in the whole tensor.
pub(super) fn values(store: &Store, piece: Piece) -> Result<Vec<f32>> {
    let entry = store.entry(piece.tensor);
    let size = entry.dtype.alignment();
    let bytes = piece.rows * piece.cols * size;
    let read = || {
        let part = &store.bytes(piece.tensor)[piece.start..piece.start + bytes];
        let values = entry.dtype.decode(part)?;
        match non_finite(&values) {
            None => Ok(values),
            Some((index, value)) => {
                let (what, index) = ("tensor".into(), piece.start / size + index);
                Err(ErrorKind::NotFinite { what, value: f64::from(value), index }.into())
            }
        }
    };
    read().in_tensor(&entry.name).in_file(store.path(piece.tensor))
}

fn matrix(store: &Store, piece: Piece) -> Result<Array2<f32>> {
    let values = values(store, piece)?;
    let found = values.len();
    Array2::from_shape_vec((piece.rows, piece.cols), values)
        .map_err(|_| Error::shape("matrix", (piece.rows, piece.cols), found))
}

/// Expert `i` of a layer. Names file, tensor and expert in errors.
pub(super) fn expert(
    store: &Store,
    layer: &LayerTensors,
    i: usize,
    activation: Activation,
) -> Result<Expert> {
    let Some(projections) = layer.experts.get(i) else {
        return Err(Error::range("expert", format!("below {}", layer.experts.len()), i));
    };
    let (mut gate, mut up, mut down) = (None, None, None);
    for projection in projections {
        let weight = matrix(store, projection.weight).in_expert(i)?;
        let bias = projection.bias.map(|b| values(store, b)).transpose().in_expert(i)?;
        let linear = Some(Linear { weight, bias: bias.map(Array1::from) });
        match projection.role {
            Role::Gate => gate = linear,
            Role::Up => up = linear,
            Role::Down => down = linear,
        }
    }
    let missing = || Error::range("expert", "an up and a down projection", "none");
    let (up, down) = (up.ok_or_else(missing)?, down.ok_or_else(missing)?);
    Expert::new(gate, up, down, activation).in_expert(i)
}

/// The router of a layer.
pub(super) fn router(store: &Store, layer: &LayerTensors, rule: RoutingRule) -> Result<Router> {
    let entry = store.entry(layer.router);
    let (rows, cols) = match entry.shape[..] {
        [rows, cols] => (rows, cols),
        _ => return Err(Error::shape("router weight", "[N, d]", &entry.shape)),
    };
    let weight = matrix(store, Piece { tensor: layer.router, start: 0, rows, cols })?;
    let vector = |tensor: Option<usize>| {
        let read = |tensor| values(store, Piece { tensor, start: 0, rows: 1, cols: rows });
        tensor.map(read).transpose().map(|v| v.map(Array1::from))
    };
    Router::new(weight, vector(layer.router_bias)?, vector(layer.correction)?, rule)
        .in_tensor(&entry.name)
        .in_file(store.path(layer.router))
}
