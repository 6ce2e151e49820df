//! Checkpoints on disk: safetensors shards in and out, streamed layer by layer; tensor names per
//! family as data; element types other than `f32` exist only here.
