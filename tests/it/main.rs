//! The integration tests, all in one program: it is compiled and linked once.
//!
//! A new test is a file in the folder of its subject and one line below; a new subject is a folder
//! and a block below. What two files need is in `tests/support/`. Some: `cargo test --test it
//! laws::merge`. A program of its own, `tests/NAME.rs`, is only for a test that no other may share
//! a process with, such as one that counts allocations.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)] // A test fails by panicking.

#[path = "../support/mod.rs"]
mod support;

/// The files that the crate reads and writes.
mod files {
    mod checkpoint;
    mod fixture;
    mod folders;
    mod quantised;
    mod statistics;
    #[cfg(feature = "text")]
    mod text;
}

/// Values computed by the reference implementations, frozen in `tests/fixtures`.
mod golden {
    mod align;
    mod decompose;
    mod group;
    mod linkage;
    mod merge;
    mod similarity;
}

/// Damaged and hostile files, failing disks, and large folders.
mod hardening {
    #[cfg(unix)]
    mod faults;
    mod large;
    mod mutations;
}

/// What holds for every input.
mod laws {
    mod align;
    mod compute;
    mod decompose;
    mod factorise;
    mod group;
    mod layer;
    mod merge;
    mod recover;
    mod removal;
    mod similarity;
}

/// Tokens through whole models.
mod models {
    mod calibrate;
    mod evaluate;
    mod families;
    mod forward;
    mod forward_switch;
    mod sample;
}

/// The repository itself: its structure, its names, its dependencies, its shaders.
mod repository {
    mod architecture;
    mod dependencies;
    mod shaders;
    mod words;
}

/// A checkpoint in, a smaller one out.
mod runs {
    mod budget;
    mod compress;
    mod compressor;
    mod front_door;
    #[cfg(feature = "gpu")]
    mod gpu;
    mod one_pass;
    mod own_text;
    mod pipeline;
    mod plan;
    mod recipe;
    mod recovery;
    mod resume;
    mod resume_matrix;
    mod structure;
    mod verify;
}

/// The command-line tool, the report page, and the documents.
mod tool {
    #[cfg(feature = "cli")]
    mod cli;
    #[cfg(feature = "cli")]
    mod documents;
    #[cfg(feature = "report")]
    mod report;
}
