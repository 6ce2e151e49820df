//! What an interrupted run leaves, and how another goes on from it.

pub(in crate::pipeline) mod fingerprint;
pub(in crate::pipeline) mod hidden_states;
pub(in crate::pipeline) mod journal;

use std::collections::BTreeMap;
use std::path::Path;

use self::hidden_states::SavedStates;
use crate::checkpoint::Writer;
use crate::error::{Error, Locate, Result};
use crate::model::LayerId;
use crate::pipeline::report::LayerReport;

/// The last layer behind which a run along a text can go on: it lies complete in the folder with
/// all before it, and so do the hidden states behind it, which nothing needs behind the very last.
pub(in crate::pipeline) fn last_resumable_layer(
    writer: &Writer<'_>,
    ids: &[LayerId],
    finished: &BTreeMap<LayerId, (LayerReport, String)>,
) -> Option<LayerId> {
    let complete = |id: &LayerId| {
        finished.get(id).is_some_and(|(_, digest)| writer.digest(*id).ok().as_ref() == Some(digest))
    };
    let count = ids.iter().take_while(|id| complete(id)).count();
    if count == ids.len() {
        return ids.last().copied();
    }
    SavedStates::last_of(writer.folder(), &ids[..count])
}

/// Removes files of a partial folder that do not belong to the target: hidden ones.
pub(in crate::pipeline) fn remove_hidden(folder: &Path) -> Result<()> {
    let io = |e| Error::io("clear partial folder", e);
    for entry in std::fs::read_dir(folder).map_err(io).in_file(folder)? {
        let path = entry.map_err(io).in_file(folder)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') {
            std::fs::remove_file(&path).map_err(io).in_file(&path)?;
        }
    }
    Ok(())
}
