//! Sources that change while they are mapped.

use std::fs;
use std::sync::Mutex;

use mcsmoe::ErrorKind;
use mcsmoe::model::LayerId;
use mcsmoe::pipeline::{Observer, Phase, Silent};

use super::place::{KINDS, Place, run, undisturbed};
use crate::support::files::contents;

/// Does something to a file when layer `at` begins a phase.
struct Meddler<'a>(Phase, usize, Mutex<Option<Box<dyn FnOnce() + Send + 'a>>>);

impl<'a> Meddler<'a> {
    fn new(phase: Phase, at: usize, deed: impl FnOnce() + Send + 'a) -> Self {
        Self(phase, at, Mutex::new(Some(Box::new(deed))))
    }
}

impl Observer for Meddler<'_> {
    fn layer_started(&self, _: LayerId, phase: Phase, at: usize, _: usize) {
        if (phase, at) == (self.0, self.1)
            && let Some(deed) = self.2.lock().unwrap().take()
        {
            deed();
        }
    }
}

#[test]
fn a_source_that_changes_between_two_layers_is_told() {
    let place = Place::new();
    let shard = place.path("source/model.safetensors");
    let (bytes, time) = (fs::read(&shard).unwrap(), fs::metadata(&shard).unwrap().modified());
    let open = || fs::File::options().write(true).open(&shard).unwrap();
    let later = *time.as_ref().unwrap() + std::time::Duration::from_secs(5);
    let cut = || open().set_len(bytes.len() as u64 / 2).unwrap();
    let rewrite = || {
        let file = open();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0; 999], 9999).unwrap();
        file.set_modified(later).unwrap();
    };
    for kind in 0..KINDS {
        let expected = undisturbed(&place, kind);
        // Another thread copies while layers are merged, and a file that is cut then ends the
        // process; a run in one pass merges the first layer before it measures the second.
        let quiet = if kind == 2 { (Phase::Calibrate, 0) } else { (Phase::Measure, 1) };
        let deeds = [(quiet, true), ((Phase::Measure, 1), false), ((Phase::Merge, 1), false)];
        for ((phase, at), cuts) in deeds {
            let target = place.path("target");
            let deed = || if cuts { cut() } else { rewrite() };
            let observer = Meddler::new(phase, at, deed);
            let error = run(place.0.path(), kind, &target, &observer).unwrap_err();
            assert!(observer.2.lock().unwrap().is_none(), "nothing was done to the file");
            let ErrorKind::Changed { expected: was, found } = error.kind() else {
                panic!("{error}")
            };
            assert!(was.starts_with(&format!("{} bytes, written ", bytes.len())), "{error}");
            assert!(cuts == found.starts_with(&format!("{} bytes", bytes.len() / 2)), "{error}");
            assert_eq!(error.place().file.as_deref(), Some(&*shard), "{error}");
            assert!(!target.exists());
            // With the file as it was the run goes on.
            fs::write(&shard, &bytes).unwrap();
            open().set_modified(*time.as_ref().unwrap()).unwrap();
            run(place.0.path(), kind, &target, &Silent).unwrap();
            assert!(contents(&target) == expected, "kind {kind}, {phase}");
            fs::remove_dir_all(&target).unwrap();
        }
        // A file that is replaced stays mapped as it was.
        let target = place.path("target");
        let other = place.path("other");
        fs::write(&other, "another file").unwrap();
        let observer = Meddler::new(Phase::Measure, 1, || fs::rename(&other, &shard).unwrap());
        run(place.0.path(), kind, &target, &observer).unwrap();
        assert!(contents(&target) == expected, "kind {kind}, replaced");
        fs::remove_dir_all(&target).unwrap();
        fs::write(&shard, &bytes).unwrap();
        open().set_modified(*time.as_ref().unwrap()).unwrap();
    }
}
