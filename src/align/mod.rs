//! In which order do hidden units line up? One method a file.
