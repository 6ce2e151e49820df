//! Families whose layers all have grouped-query attention.

mod dots;
mod ernie;
mod glm;
mod minimax;
mod mixtral;
mod olmo;
mod qwen;

use super::Family;

pub(super) const ALL: &[&[Family]] = &[
    mixtral::FAMILIES,
    qwen::FAMILIES,
    olmo::FAMILIES,
    glm::FAMILIES,
    dots::FAMILIES,
    ernie::FAMILIES,
    minimax::FAMILIES,
];
