//! FP8 weights with a scale per block: `W[a,b] = q[a,b] · s[a / rows, b / cols]`, the last block of
//! each side short where the block does not divide it.

/// What every code of F8_E4M3 (without infinities) means.
const VALUES: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        values[code] = e4m3(code as u32);
        code += 1;
    }
    values
};

/// Sign, four bits of exponent, three of mantissa; all seven ones are NaN.
const fn e4m3(code: u32) -> f32 {
    let (sign, exponent, mantissa) = ((code >> 7) << 31, (code >> 3) & 15, code & 7);
    let magnitude = if code & 0x7f == 0x7f {
        f32::NAN
    } else if exponent == 0 {
        mantissa as f32 / 512.0
    } else {
        f32::from_bits(((exponent + 120) << 23) | (mantissa << 20))
    };
    f32::from_bits(magnitude.to_bits() | sign)
}

/// `2^(code − 127)`; 255 is NaN.
pub(crate) fn e8m0(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        code => f32::from_bits(u32::from(code) << 23),
    }
}

/// A matrix, or a stack of them, in blocks with a scale each.
#[derive(Debug)]
pub(crate) struct Blocks<'a> {
    /// Rows and columns of a matrix.
    pub(crate) matrix: (usize, usize),
    /// Rows and columns of a block.
    pub(crate) block: (usize, usize),
    /// The scales, row-major.
    pub(crate) scales: &'a [f32],
}

/// The shape of the scales of a stack of matrices in blocks.
pub(crate) fn scale_shape(shape: &[usize], block: (usize, usize)) -> Option<Vec<usize>> {
    let (stack, &[rows, cols]) = shape.split_last_chunk::<2>()?;
    Some([stack, &[rows.div_ceil(block.0), cols.div_ceil(block.1)]].concat())
}

impl Blocks<'_> {
    /// Appends the values of `codes`, which begin at element `start` of the stack.
    ///
    /// NaN codes become NaN; so does what lies outside the scales.
    pub(crate) fn decode(&self, codes: &[u8], start: usize, out: &mut Vec<f32>) {
        let ((rows, cols), (block_rows, block_cols)) = (self.matrix, self.block);
        let (down, across) = (rows.div_ceil(block_rows), cols.div_ceil(block_cols));
        let (mut at, mut rest) = (start, codes);
        while !rest.is_empty() {
            let (row, col) = (at / cols, at % cols);
            let (row, matrix) = (row % rows, row / rows);
            let block = col / block_cols;
            let end = cols.min((block + 1) * block_cols);
            let (now, later) = rest.split_at(rest.len().min(end - col));
            let scale = (matrix * down + row / block_rows) * across + block;
            let scale = self.scales.get(scale).copied().unwrap_or(f32::NAN);
            out.extend(now.iter().map(|&code| VALUES[usize::from(code)] * scale));
            (at, rest) = (at + now.len(), later);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_mean_what_the_format_says() {
        assert_eq!(VALUES[0x7e], 448.0);
        assert_eq!(VALUES[0xfe], -448.0);
        assert_eq!(VALUES[0x01], 2f32.powi(-9));
        assert_eq!(VALUES[0x38], 1.0);
        assert!(VALUES[0x80] == 0.0 && VALUES[0x80].is_sign_negative());
        let nan: Vec<usize> = (0..256).filter(|&c| VALUES[c].is_nan()).collect();
        assert_eq!(nan, [0x7f, 0xff]);
    }

    #[test]
    fn powers_of_two_reach_both_ends() {
        assert_eq!(e8m0(127), 1.0);
        assert_eq!(e8m0(0), 2f32.powi(-126) / 2.0);
        assert_eq!(e8m0(1), 2f32.powi(-126));
        assert_eq!(e8m0(254), 2f32.powi(127));
        assert!(e8m0(255).is_nan());
    }

    #[test]
    fn any_run_of_a_ragged_stack_is_that_run_of_the_whole() {
        // Two matrices of 5 × 7 in blocks of 2 × 3: 3 × 3 scales each.
        let scales: Vec<f32> = (1..=18).map(|s| s as f32).collect();
        assert_eq!(scale_shape(&[2, 5, 7], (2, 3)), Some(vec![2, 3, 3]));
        let blocks = Blocks { matrix: (5, 7), block: (2, 3), scales: &scales };
        let codes = [0x38; 70];
        let mut all = Vec::new();
        blocks.decode(&codes, 0, &mut all);
        let scale = |m: usize, a: usize, b: usize| scales[m * 9 + a / 2 * 3 + b / 3];
        for (at, value) in all.iter().enumerate() {
            assert_eq!(*value, scale(at / 35, at / 7 % 5, at % 7), "{at}");
        }
        for (start, end) in [(0, 1), (4, 5), (6, 40), (34, 70), (69, 70), (9, 9)] {
            let mut part = Vec::new();
            blocks.decode(&codes[start..end], start, &mut part);
            assert_eq!(part, all[start..end]);
        }
    }
}
