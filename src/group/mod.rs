//! Which experts become one? One method a file.
