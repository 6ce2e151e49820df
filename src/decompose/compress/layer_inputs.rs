//! What goes into the matrices of a merged layer's experts, as far as samples tell.

use ndarray::{Array2, ArrayView2, Axis};

use crate::error::Result;
use crate::model::{Expert, ExpertView, MergedLayer, Role};
use crate::stage::{Compression, Context, Moments};

/// The samples of a layer and the merged experts that they visit; nothing without samples.
pub(super) struct LayerInputs<'a> {
    samples: Option<Samples<'a>>,
}

struct Samples<'a> {
    inputs: ArrayView2<'a, f32>,
    /// For each merged expert its tokens and their router weights.
    visits: Vec<Vec<(usize, f32)>>,
}

impl<'a> LayerInputs<'a> {
    pub(super) fn of(layer: &MergedLayer, task: &Compression<'a>, cx: &Context) -> Result<Self> {
        let samples = match task.inputs.filter(|x| x.nrows() > 0) {
            None => None,
            Some(inputs) => {
                let visits = layer.visits(task.narrowed, inputs, cx.compute())?;
                Some(Samples { inputs, visits })
            }
        };
        Ok(Self { samples })
    }

    /// Second moments of what goes into a matrix of expert `e`: the inputs of the tokens that visit
    /// it for gate and up, its hidden activations for down; of all tokens where none visits it.
    pub(super) fn moments(
        &self,
        e: usize,
        expert: &Expert,
        role: Role,
        cx: &Context,
    ) -> Result<Option<Moments>> {
        let Some(samples) = &self.samples else { return Ok(None) };
        moments(expert, role, samples.inputs, &samples.visits[e], cx).map(Some)
    }
}

/// Every matrix of some experts, expert by expert.
pub(super) fn matrices(experts: &[Expert]) -> Vec<(usize, Role)> {
    let roles = |(e, expert): (usize, &Expert)| {
        expert.view().linears().map(|(role, _)| (e, role)).collect::<Vec<_>>()
    };
    experts.iter().enumerate().flat_map(roles).collect()
}

/// One matrix of an expert that has it.
pub(super) fn matrix<'a>(view: ExpertView<'a>, role: Role) -> ArrayView2<'a, f32> {
    view.linear(role).unwrap_or(view.up).weight
}

/// The inputs of the tokens that visit an expert; of all where none does.
pub(super) fn visiting(inputs: ArrayView2<'_, f32>, visits: &[(usize, f32)]) -> Array2<f32> {
    if visits.is_empty() {
        return inputs.to_owned();
    }
    let tokens: Vec<usize> = visits.iter().map(|(token, _)| *token).collect();
    inputs.select(Axis(0), &tokens)
}

/// Second moments of what goes into a matrix of an expert with these visits.
pub(super) fn moments(
    expert: &Expert,
    role: Role,
    inputs: ArrayView2<'_, f32>,
    visits: &[(usize, f32)],
    cx: &Context,
) -> Result<Moments> {
    let x = visiting(inputs, visits);
    match role {
        Role::Gate | Role::Up => Moments::of(x.view(), cx.compute()),
        Role::Down => {
            let hidden = expert.view().hidden(x.view(), cx.compute())?;
            Moments::of(hidden.view(), cx.compute())
        }
    }
}

/// As many values for each expert as it has matrices, from a list over all of them.
pub(super) fn by_expert<T>(all: Vec<T>, experts: usize) -> Vec<Vec<T>> {
    let each = all.len() / experts.max(1);
    let mut all = all.into_iter();
    (0..experts).map(|_| all.by_ref().take(each).collect()).collect()
}
