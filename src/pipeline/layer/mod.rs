//! One layer, from the original experts to the merged ones. [`process`] holds the order of the
//! steps; every other file is one of them.

pub(super) mod by_group;
pub(super) mod compress;
pub(super) mod grouping;
pub(super) mod measure;
pub(super) mod merge;
pub(super) mod observe;
pub(super) mod process;
pub(super) mod source;
pub(super) mod spectra;
pub(super) mod stages;
