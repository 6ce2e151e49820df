//! What a run works on, in a form that can be compared with that of an interrupted one.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::checkpoint::Checkpoint;
use crate::digest::hexadecimal;
use crate::error::{Error, Locate, Result};
use crate::pipeline::activations::calibration::CalibrationData;
use crate::pipeline::activations::tokens::Tokens;
use crate::pipeline::builder::Pipeline;
use crate::pipeline::run::output::Output;

/// SHA-256 of everything that decides the bytes of the target, by kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fingerprint {
    version: String,
    /// The config, names, types and shapes of all tensors, and size and time of every file
    /// of weights; what else lies in the folder may change.
    source: String,
    /// The statistics file or the token ids.
    calibration: String,
    /// Stages with their options, budget, constraints, seed; export and file size.
    recipe: String,
}

impl Fingerprint {
    pub(crate) fn of(
        pipeline: &Pipeline,
        source: &Checkpoint,
        given: CalibrationData<'_>,
        output: &Output,
    ) -> Result<Self> {
        let what = format!("{pipeline:?} {:?} {}", output.export, output.shard_bytes);
        Ok(Self {
            version: env!("CARGO_PKG_VERSION").into(),
            source: of_source(source)?,
            calibration: match given {
                CalibrationData::Statistics(file) => of_file(file.path())?,
                CalibrationData::Tokens(tokens) => of_tokens(tokens),
            },
            recipe: hexadecimal(Sha256::new().chain_update(what)),
        })
    }

    /// What differs, in words.
    pub(crate) fn difference(&self, other: &Self) -> String {
        let parts = [
            ("version of this crate", &self.version, &other.version),
            ("source", &self.source, &other.source),
            ("statistics file or text", &self.calibration, &other.calibration),
            ("recipe or export", &self.recipe, &other.recipe),
        ];
        let differs = parts.iter().filter(|(_, a, b)| a != b).map(|(name, ..)| *name);
        differs.collect::<Vec<_>>().join(", ")
    }
}

fn of_source(source: &Checkpoint) -> Result<String> {
    let mut hash = Sha256::new().chain_update(source.config().text());
    for (name, dtype, shape) in source.tensors() {
        hash.update(format!("{name} {dtype} {shape:?}\n"));
    }
    for path in source.weight_files() {
        // Follows links, which is how hub caches store files.
        let data = fs::metadata(path).map_err(|e| Error::io("read", e)).in_file(path)?;
        let (name, size, time) = (path.file_name(), data.len(), data.modified().ok());
        hash.update(format!("{name:?} {size} {time:?}\n"));
    }
    Ok(hexadecimal(hash))
}

/// SHA-256 of a file, in hexadecimal digits.
pub(crate) fn of_file(path: &Path) -> Result<String> {
    let read = |e| Error::io("read", e);
    let mut file = File::open(path).map_err(read).in_file(path)?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).map_err(read).in_file(path)? {
            0 => return Ok(hexadecimal(hash)),
            n => hash.update(&buffer[..n]),
        }
    }
}

fn of_tokens(tokens: &Tokens) -> String {
    let mut hash = Sha256::new();
    let mut window = |ids: &[u32]| {
        hash.update((ids.len() as u64).to_le_bytes());
        ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
    };
    match tokens {
        Tokens::Windows(all) => all.iter().for_each(|ids| window(ids)),
        Tokens::Pairs(all) => all.iter().for_each(|(input, targets)| {
            window(input);
            window(targets);
        }),
    }
    hexadecimal(hash)
}
