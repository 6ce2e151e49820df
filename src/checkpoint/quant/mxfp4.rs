//! MXFP4: 16 bytes hold 32 four-bit floats, the low half of a byte first, under one power of two.

/// Bytes of a group.
pub(crate) const BYTES: usize = 16;
/// Values of a group.
pub(crate) const VALUES: usize = 32;

/// What every code of E2M1 means.
const CODES: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Appends the values of whole groups, one scale each.
pub(crate) fn decode(groups: &[u8], scales: impl Iterator<Item = f32>, out: &mut Vec<f32>) {
    let (groups, _) = groups.as_chunks::<BYTES>();
    for (group, scale) in groups.iter().zip(scales) {
        let scaled = CODES.map(|value| value * scale);
        let both = |byte: &u8| [byte & 15, byte >> 4].map(|code| scaled[usize::from(code)]);
        out.extend(group.iter().flat_map(both));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_low_half_comes_first() {
        let mut group = [0; BYTES];
        group[..2].copy_from_slice(&[0x71, 0xf9]);
        let mut out = Vec::new();
        decode(&group, std::iter::once(4.0), &mut out);
        assert_eq!(out.len(), VALUES);
        assert_eq!(out[..5], [2.0, 24.0, -2.0, -24.0, 0.0]);
    }
}
