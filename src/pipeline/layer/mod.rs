//! One layer, from the original experts to the merged ones.

pub(super) mod by_group;
pub(super) mod candidates;
pub(super) mod grouping;
pub(super) mod process;
pub(super) mod spectra;
