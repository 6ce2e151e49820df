//! How alike are the experts of a layer? One metric a file.
