//! The target that `MCSMOE_FUZZ_TARGET` names.
#![no_main]

use std::sync::LazyLock;

static TARGET: LazyLock<String> =
    LazyLock::new(|| std::env::var("MCSMOE_FUZZ_TARGET").expect("MCSMOE_FUZZ_TARGET"));

libfuzzer_sys::fuzz_target!(|input: &[u8]| mcsmoe_fuzz::fuzz(&TARGET, input));
