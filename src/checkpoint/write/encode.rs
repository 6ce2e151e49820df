//! Experts and routers in the data types of the target, as bytes with their places. Converting
//! needs no file, so it runs on the threads that made the experts.

use std::collections::BTreeMap;
use std::sync::Arc;

use ndarray::Array1;
use xxhash_rust::xxh3::xxh3_128;

use super::layout_plan::Plan;
use super::request::Export;
use crate::checkpoint::layout::{Factors, LayerTensors, Order, Piece, Projection};
use crate::error::{Error, Locate, Result};
use crate::model::{Expert, Factored, Grouping, LayerId, Router};

/// XXH3 of the bytes of one part: it finds torn writes, at the speed of memory.
pub(super) type Sum = [u8; 16];

/// Converts merged experts to the target's data types; see [`Writer::encoder`].
///
/// [`Writer::encoder`]: crate::checkpoint::Writer::encoder
#[derive(Clone)]
pub struct Encoder {
    pub(super) plan: Arc<Plan>,
    pub(super) groupings: Arc<BTreeMap<LayerId, Grouping>>,
    pub(super) export: Export,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").field("export", &self.export).finish_non_exhaustive()
    }
}

/// A merged expert as bytes, for every slot of the target that holds it.
pub struct Encoded {
    pub(super) layer: LayerId,
    pub(super) slots: Vec<(usize, Vec<Part>)>,
}

impl std::fmt::Debug for Encoded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let slots: Vec<usize> = self.slots.iter().map(|(slot, _)| *slot).collect();
        f.debug_struct("Encoded").field("layer", &self.layer).field("slots", &slots).finish()
    }
}

/// Bytes and their place in a tensor of the target.
pub(super) struct Part {
    pub(super) tensor: usize,
    pub(super) start: usize,
    pub(super) bytes: Vec<u8>,
    pub(super) sum: Sum,
}

impl Encoder {
    /// The merged expert of `group`, converted.
    ///
    /// # Errors
    /// [`Shape`](crate::ErrorKind::Shape) when it is not of the planned shape;
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) for a layer that is not planned, or a weight
    /// that its data type cannot hold.
    pub fn expert(&self, layer: LayerId, group: usize, expert: &Expert) -> Result<Encoded> {
        self.expert_in(layer, group, expert, None)
    }

    /// [`Encoder::expert`] with the factors of its projections, for layers that are
    /// [planned](crate::checkpoint::WritePlan::factored) in factors.
    pub(super) fn expert_in(
        &self,
        layer: LayerId,
        group: usize,
        expert: &Expert,
        factors: Option<&[Option<Factored>]>,
    ) -> Result<Encoded> {
        let (Some(out), Some(grouping)) =
            (self.plan.layers.get(&layer), self.groupings.get(&layer))
        else {
            return Err(Error::range("layer", "a planned layer", layer));
        };
        let holds = |slot: &usize| match self.export {
            Export::Stock | Export::Native => *slot == group,
            Export::Expanded => grouping.labels()[*slot] == Some(group),
        };
        let encode = |slot: usize| {
            let parts = self.projections(&out.experts[slot], expert, factors).in_expert(slot)?;
            Ok((slot, parts))
        };
        let slots = (0..out.experts.len()).filter(holds).map(encode).collect::<Result<_>>()?;
        Ok(Encoded { layer, slots })
    }

    /// The router and its biases, converted.
    pub(super) fn router(&self, out: &LayerTensors, router: &Router) -> Result<Vec<Part>> {
        let rows = router.weight();
        let whole = |tensor, cols| Piece { tensor, start: 0, rows: 1, cols };
        let weight = rows.as_standard_layout();
        let values = weight.as_slice().unwrap_or_default();
        let mut parts = vec![self.part(whole(out.router, values.len()), values)?];
        let biases = [(out.router_bias, router.bias()), (out.correction, router.correction())];
        for (tensor, values) in biases {
            let place = tensor.map(|t| whole(t, rows.nrows()));
            parts.extend(self.vector(place, values)?);
        }
        Ok(parts)
    }

    fn vector(&self, place: Option<Piece>, values: Option<&Array1<f32>>) -> Result<Option<Part>> {
        match (place, values) {
            (None, None) => Ok(None),
            (Some(place), Some(values)) if values.len() == place.cols => {
                self.part(place, &values.to_vec()).map(Some)
            }
            (place, values) => {
                let (expected, found) = (place.map(|p| p.cols), values.map(|v| v.len()));
                Err(Error::shape("bias", expected, found))
            }
        }
    }

    fn projections(
        &self,
        to: &[Projection],
        expert: &Expert,
        factored: Option<&[Option<Factored>]>,
    ) -> Result<Vec<Part>> {
        let mut slabs = BTreeMap::new();
        let mut parts = Vec::new();
        for (at, projection) in to.iter().copied().enumerate() {
            let Projection { role, weight, bias, order, factors } = projection;
            let Some(linear) = expert.view().linear(role) else {
                return Err(Error::shape("expert", format!("a {role} projection"), "none"));
            };
            let expected = (weight.rows, weight.cols);
            if linear.weight.dim() != expected {
                return Err(Error::shape("expert projection", expected, linear.weight.dim()));
            }
            let widths = (bias.map(|b| b.cols), linear.bias.map(|b| b.len()));
            if widths.0 != widths.1 {
                return Err(Error::shape("bias", widths.0, widths.1));
            }
            if let Some(factors) = factors {
                let missing = || Error::shape("expert", "factors of every projection", "none");
                let factored =
                    factored.and_then(|all| all.get(at)?.as_ref()).ok_or_else(missing)?;
                parts.extend(self.factors(&factors, factored)?);
            } else {
                let values = linear.weight.as_standard_layout();
                let values = values.as_slice().unwrap_or_default();
                parts.extend(self.ordered(weight, expected, order, values, &mut slabs)?);
            }
            if let (Some(piece), Some(values)) = (bias, linear.bias) {
                let (shape, order) = ((piece.cols, 1), order.upright());
                parts.extend(self.ordered(piece, shape, order, &values.to_vec(), &mut slabs)?);
            }
        }
        for ((tensor, start), values) in slabs {
            let piece = Piece { tensor, start, rows: 1, cols: values.len() };
            parts.push(self.part(piece, &values)?);
        }
        Ok(parts)
    }

    fn factors(&self, to: &Factors, factored: &Factored) -> Result<Vec<Part>> {
        let values = to.values(factored)?;
        let floats = to.pieces().into_iter().zip(values);
        let mut parts = floats.map(|(p, v)| self.part(p, &v)).collect::<Result<Vec<_>>>()?;
        let bytes: Vec<u8> = factored.indices().iter().flat_map(|i| i.to_le_bytes()).collect();
        let sum = xxh3_128(&bytes).to_le_bytes();
        parts.push(Part { tensor: to.index.tensor, start: 0, bytes, sum });
        Ok(parts)
    }

    /// A piece of its own, or `None` after putting it into the slab that it shares with others.
    fn ordered(
        &self,
        piece: Piece,
        shape: (usize, usize),
        order: Order,
        values: &[f32],
        slabs: &mut BTreeMap<(usize, usize), Vec<f32>>,
    ) -> Result<Option<Part>> {
        if order == Order::PLAIN {
            return self.part(piece, values).map(Some);
        }
        let slab = slabs.entry((piece.tensor, piece.start));
        let slab = slab.or_insert_with(|| vec![0.0; order.slab(piece).cols]);
        order.walk(shape, |from, to| slab[to] = values[from]);
        Ok(None)
    }

    fn part(&self, piece: Piece, values: &[f32]) -> Result<Part> {
        let out = &self.plan.outs[piece.tensor];
        let (dtype, expected) = (out.dtype, piece.rows * piece.cols);
        if values.len() != expected {
            return Err(Error::shape("tensor to write", expected, values.len()))
                .in_tensor(&out.name);
        }
        let mut bytes = Vec::with_capacity(expected * dtype.alignment());
        dtype.encode(values, &mut bytes).in_tensor(&out.name)?;
        let sum = xxh3_128(&bytes).to_le_bytes();
        Ok(Part { tensor: piece.tensor, start: piece.start, bytes, sum })
    }
}

/// Place and length in bytes of every part of an expert, in the order in which it is encoded.
pub(super) fn places(plan: &Plan, projections: &[Projection]) -> Vec<(usize, usize, usize)> {
    let (mut places, mut slabs) = (Vec::new(), BTreeMap::new());
    for Projection { weight, bias, order, factors, .. } in projections.iter().copied() {
        let tensors = factors.iter().flat_map(|f| f.pieces().map(|p| p.tensor));
        places.extend(tensors.map(|tensor| (tensor, 0, plan.outs[tensor].bytes)));
        let weight = factors.is_none().then_some((weight, order));
        let bias = bias.map(|b| (b, order.upright()));
        for (piece, order) in [weight, bias].into_iter().flatten() {
            let count = order.slab(piece).cols;
            let length = count * plan.outs[piece.tensor].dtype.alignment();
            if order == Order::PLAIN {
                places.push((piece.tensor, piece.start, length));
            } else {
                slabs.insert((piece.tensor, piece.start), length);
            }
        }
    }
    places.extend(slabs.into_iter().map(|((tensor, start), length)| (tensor, start, length)));
    places
}
