//! SHA-256 that can be put aside in the middle and taken up again after a restart.

use sha2::digest::common::hazmat::{SerializableState, SerializedState};
use sha2::{Digest as _, Sha256};

use crate::update::{Digest, HashState};

/// A SHA-256 calculation.
#[derive(Clone, Debug, Default)]
pub(super) struct Hash(Sha256);

impl Hash {
    /// Takes up a calculation; `None` if the text is not one.
    pub(super) fn resume(state: &HashState) -> Option<Self> {
        let digits = state.0.as_bytes();
        let mut bytes = SerializedState::<Sha256>::default();
        if digits.len() != bytes.len() * 2 {
            return None;
        }
        let digit = |digit: u8| char::from(digit).to_digit(16).and_then(|v| u8::try_from(v).ok());
        let (pairs, _) = digits.as_chunks::<2>();
        for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
            *byte = digit(*high)? << 4 | digit(*low)?;
        }
        Sha256::deserialize(&bytes).ok().map(Hash)
    }

    /// Puts the calculation aside.
    pub(super) fn state(&self) -> HashState {
        HashState(self.0.serialize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The next bytes.
    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of everything so far.
    pub(super) fn digest(&self) -> Digest {
        Digest::new(self.0.clone().finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn refuses_states_that_are_none() {
        let good = Hash::default().state().0;
        for text in ["", "00", &good[1..], &good.replace('0', "g"), &format!("{good}00")] {
            assert!(Hash::resume(&HashState(text.to_owned())).is_none(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn goes_on_where_it_was_put_aside(bytes: Vec<u8>, cut: prop::sample::Index) {
            let (before, after) = bytes.split_at(cut.index(bytes.len() + 1));
            let mut hash = Hash::default();
            hash.update(before);
            let mut resumed = Hash::resume(&hash.state()).unwrap();
            resumed.update(after);
            let whole: [u8; 32] = Sha256::digest(&bytes).into();
            prop_assert_eq!(resumed.digest(), Digest::new(whole));
        }
    }
}
