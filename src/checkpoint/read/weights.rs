//! From bytes to experts and routers in `f32`.

use ndarray::{Array1, Array2};

use super::store::Store;
use crate::checkpoint::layout::{LayerTensors, Order, Piece, Projection};
use crate::checkpoint::quant::schemes;
use crate::error::{Error, ErrorKind, Locate, Result};
use crate::model::{
    Activation, Expert, FactoredExpert, FactoredLinear, Linear, Role, Router, RoutingRule, Weight,
    non_finite,
};

/// The values of a part of a tensor, dequantised, all finite. The part is contiguous.
///
/// # Errors
/// [`ErrorKind::NotFinite`] with file, tensor and the index in the whole tensor;
/// [`ErrorKind::Changed`].
pub(crate) fn values(store: &Store, piece: Piece) -> Result<Vec<f32>> {
    let entry = store.entry(piece.tensor);
    let read = || {
        let count = piece.rows * piece.cols;
        let decode = || schemes::decode(store, piece.tensor, piece.start, count);
        let values = store.unchanged(piece.tensor, decode)?;
        match non_finite(&values) {
            None => Ok(values),
            Some((index, value)) => {
                let (what, index) =
                    ("tensor".into(), store.values(piece.tensor, piece.start) + index);
                Err(ErrorKind::NotFinite { what, value: f64::from(value), index }.into())
            }
        }
    };
    read().in_tensor(&entry.name).in_file(store.path(piece.tensor))
}

pub(crate) fn matrix((rows, cols): (usize, usize), values: Vec<f32>) -> Result<Array2<f32>> {
    let found = values.len();
    Array2::from_shape_vec((rows, cols), values)
        .map_err(|_| Error::shape("matrix", (rows, cols), found))
}

/// Reads pieces of slabs; keeps the last slab, which the next piece may share.
struct Slabs<'a> {
    store: &'a Store,
    last: Option<(Piece, Vec<f32>)>,
}

impl Slabs<'_> {
    /// The values of a `(rows, cols)` piece.
    fn piece(&mut self, piece: Piece, shape: (usize, usize), order: Order) -> Result<Vec<f32>> {
        if order == Order::PLAIN {
            return values(self.store, piece);
        }
        let slab = order.slab(piece);
        let read = match self.last.take().filter(|(last, _)| *last == slab) {
            Some((_, read)) => read,
            None => values(self.store, slab)?,
        };
        let mut out = vec![0.0; shape.0 * shape.1];
        order.walk(shape, |at, from| out[at] = read[from]);
        self.last = Some((slab, read));
        Ok(out)
    }
}

/// Expert `i` of a layer. Names file, tensor and expert in errors.
pub(crate) fn expert(
    store: &Store,
    layer: &LayerTensors,
    i: usize,
    activation: Activation,
) -> Result<Expert> {
    let [gate, up, down] =
        projections(store, layer, i, |projection, slabs| match projection.factors {
            Some(factors) => factors.dense(store),
            None => whole(projection, slabs),
        })?;
    let linear = |(weight, bias): (Array2<f32>, Option<Array1<f32>>)| Linear { weight, bias };
    let (up, down) = (required(up)?, required(down)?);
    Expert::new(gate.map(linear), linear(up), linear(down), activation).in_expert(i)
}

/// Expert `i` of a layer with the factors that its projections lie in.
pub(crate) fn expert_in_factors(
    store: &Store,
    layer: &LayerTensors,
    i: usize,
    activation: Activation,
) -> Result<FactoredExpert> {
    let [gate, up, down] =
        projections(store, layer, i, |projection, slabs| match projection.factors {
            Some(factors) => factors.read(store).map(Weight::Factored),
            None => whole(projection, slabs).map(Weight::Dense),
        })?;
    let linear = |(weight, bias): (Weight, Option<Array1<f32>>)| FactoredLinear { weight, bias };
    let (up, down) = (required(up)?, required(down)?);
    FactoredExpert::new(gate.map(linear), linear(up), linear(down), activation).in_expert(i)
}

/// Gate, up and down, each with its bias, where they are there.
type Projections<W> = [Option<(W, Option<Array1<f32>>)>; 3];

/// Reads the projections of expert `i`, the weights by `read`.
fn projections<W>(
    store: &Store,
    layer: &LayerTensors,
    i: usize,
    read: impl Fn(&Projection, &mut Slabs<'_>) -> Result<W>,
) -> Result<Projections<W>> {
    let Some(projections) = layer.experts.get(i) else {
        return Err(Error::range("expert", format!("below {}", layer.experts.len()), i));
    };
    let [mut weights, mut biases] = [(); 2].map(|()| Slabs { store, last: None });
    let mut found = [None, None, None];
    for projection in projections {
        let order = projection.order.upright();
        let bias = projection.bias.map(|b| biases.piece(b, (b.cols, 1), order));
        let bias = bias.transpose().in_expert(i)?.map(Array1::from);
        let at = match projection.role {
            Role::Gate => 0,
            Role::Up => 1,
            Role::Down => 2,
        };
        found[at] = Some((read(projection, &mut weights).in_expert(i)?, bias));
    }
    Ok(found)
}

/// A weight that does not lie in factors.
fn whole(projection: &Projection, slabs: &mut Slabs<'_>) -> Result<Array2<f32>> {
    let shape = (projection.weight.rows, projection.weight.cols);
    slabs.piece(projection.weight, shape, projection.order).and_then(|w| matrix(shape, w))
}

fn required<T>(projection: Option<T>) -> Result<T> {
    projection.ok_or_else(|| Error::range("expert", "an up and a down projection", "none"))
}

/// The router of a layer.
pub(crate) fn router(store: &Store, layer: &LayerTensors, rule: RoutingRule) -> Result<Router> {
    let entry = store.entry(layer.router);
    let (rows, cols) = match entry.shape[..] {
        [rows, cols] => (rows, cols),
        _ => return Err(Error::shape("router weight", "[N, d]", &entry.shape)),
    };
    let weight = values(store, Piece { tensor: layer.router, start: 0, rows, cols })?;
    let weight = matrix((rows, cols), weight)?;
    let vector = |tensor: Option<usize>| {
        let read = |tensor| values(store, Piece { tensor, start: 0, rows: 1, cols: rows });
        tensor.map(read).transpose().map(|v| v.map(Array1::from))
    };
    Router::new(weight, vector(layer.router_bias)?, vector(layer.correction)?, rule)
        .in_tensor(&entry.name)
        .in_file(store.path(layer.router))
}
