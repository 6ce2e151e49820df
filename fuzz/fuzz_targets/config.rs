#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| mcsmoe_fuzz::fuzz("config", input));
