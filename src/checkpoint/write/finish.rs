//! The end of a target: index, tokenizer, manifest, and the folder's name.

use serde_json::{Value, json};

use super::companion_files::companion_files;
use super::file::{Flush, copy_whole};
use super::request::{Export, MANIFEST, Written};
use super::target_config;
use super::target_config::MODELING;
use super::writer::Writer;
use crate::checkpoint::read::shards::INDEX;
use crate::error::{Error, Locate, Result};

impl Writer<'_> {
    /// Writes index, tokenizer and manifest, and gives the folder its name. `extra_json`, an
    /// object, becomes the [manifest](MANIFEST), with the plan as `plan` and size and SHA-256 of
    /// every other file as `files`.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) when a planned layer was not written;
    /// [`Io`](crate::ErrorKind::Io).
    pub fn finish(mut self, extra_json: &Value) -> Result<Written> {
        let written = self.seal(extra_json)?;
        self.commit()?;
        Ok(written)
    }

    /// The first half of [`Writer::finish`]: everything but the folder's name.
    ///
    /// # Errors
    /// As [`Writer::finish`].
    pub fn seal(&mut self, extra_json: &Value) -> Result<Written> {
        if let Some(id) = self.plan.layers.keys().find(|id| !self.done.contains(id)) {
            return Err(Error::range("planned layer", "written before the end", "nothing"))
                .in_layer(id);
        }
        self.advance()?;
        if let Some(file) = self.plan.files.iter().find(|f| !self.digests.contains_key(&f.name)) {
            // Only after a failed write that the caller went on from.
            return Err(Error::range("file of the target", "complete", "a part of it"))
                .in_file(&self.target.path().join(&file.name));
        }
        if self.plan.files.len() > 1 {
            let index = self.index().to_string();
            self.small(INDEX, index.as_bytes())?;
        }
        if self.request.only.is_none() {
            let config = target_config::config(self.source, &self.request, self.plan.experts)?;
            self.small("config.json", config.as_bytes())?;
            self.companions()?;
        }
        let files = self.digests.iter().map(|(name, (bytes, sha256))| {
            (name.clone(), json!({ "bytes": bytes, "sha256": sha256 }))
        });
        let files: serde_json::Map<String, Value> = files.collect();
        let mut manifest = match extra_json {
            Value::Object(members) => members.clone(),
            Value::Null => serde_json::Map::new(),
            other => [("report".to_owned(), other.clone())].into_iter().collect(),
        };
        manifest.insert("plan".into(), self.recorded()?);
        manifest.insert("files".into(), Value::Object(files));
        let text = format!("{:#}\n", Value::Object(manifest));
        self.small(MANIFEST, text.as_bytes())?;
        // Only what has reached the disk may get the target's name.
        self.flushing.drain(..).try_for_each(Flush::wait)?;
        Ok(self.written())
    }

    /// The second half of [`Writer::finish`]: gives a folder that was [sealed](Writer::seal) its
    /// name.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) when it was not sealed;
    /// [`Io`](crate::ErrorKind::Io).
    pub fn commit(self) -> Result<()> {
        if !self.digests.contains_key(MANIFEST) {
            return Err(Error::range("target folder", "complete", "a part of it"))
                .in_file(self.target.path());
        }
        self.target.commit().map(drop)
    }

    fn index(&self) -> Value {
        let total = self.plan.bytes();
        let file = |i: usize| (self.plan.outs[i].name.clone(), self.file_name(i).into());
        let map: serde_json::Map<String, Value> = (0..self.plan.outs.len()).map(file).collect();
        json!({ "metadata": { "total_size": total }, "weight_map": map })
    }

    /// Copies every file that is not a weight.
    fn companions(&mut self) -> Result<()> {
        let dir = self.source.dir();
        for name in companion_files(dir)? {
            let to = self.target.path().join(&name);
            if let Some(folder) = to.parent() {
                let made = std::fs::create_dir_all(folder);
                made.map_err(|e| Error::io("create folder", e)).in_file(folder)?;
            }
            let copied = copy_whole(&dir.join(&name), &to)?;
            self.digests.insert(name, copied);
        }
        if self.request.export == Export::Native {
            let (name, text) = MODELING;
            self.small(name, text.as_bytes())?;
        }
        Ok(())
    }

    /// The plan, as the manifest holds it.
    fn recorded(&self) -> Result<Value> {
        serde_json::to_value(&self.request).map_err(|e| Error::malformed("write plan", e))
    }

    /// What is written once everything is, known from the plan; `files` grows until then.
    pub fn written(&self) -> Written {
        Written {
            files: self.digests.keys().cloned().collect(),
            bytes: self.plan.bytes(),
            parameters: self.plan.parameters(),
            expert_bytes: self.plan.expert_bytes(self.source),
            dropped: self.plan.dropped.clone(),
        }
    }
}
