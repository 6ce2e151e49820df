//! Recoverers that follow the gradient of a loss.

mod adam;
mod distill;
#[cfg(test)]
mod gradient_check;
mod kernels;
mod knowledge_distillation;
mod trainable_expert;
mod trainable_layer;
mod trainable_router;
mod training_loop;

pub use distill::Distill;
pub use knowledge_distillation::{HiddenLoss, KnowledgeDistillation};
