//! Text through a model, a layer at a time: token ids, hidden states, statistics, and the inputs
//! and outputs of each layer.

pub(super) mod calibration;
pub(super) mod collect;
pub(super) mod forward_pass;
pub(super) mod hidden_states;
pub(super) mod model;
pub(super) mod own_text;
pub(super) mod samples;
pub(super) mod streams;
pub(super) mod tokens;
