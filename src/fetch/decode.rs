//! Compressed bytes to image bytes, piece by piece. The format is told by its content.
//!
//! A file may be several compressed parts behind each other (zstd frames, RFC 8878; gzip members,
//! RFC 1952; xz streams), and between two of them a decoder can start afresh. Inside a part it
//! cannot: zstd carries entropy tables and repeat offsets from block to block, xz its whole model
//! (and its library starts at streams, not at the blocks in them), gzip needs to know a bit
//! position, and no decoder library gives these states away.

use std::fmt;

use flate2::{Decompress, FlushDecompress};
use liblzma::stream::{Action, Stream};
use zstd::zstd_safe::{self, DCtx, DParameter, InBuffer, OutBuffer};

use crate::update::{Failure, FailureKind};

/// Bytes at the beginning of a file that tell its format and, where it has one, its length.
const ZSTD_MAGIC: u32 = 0xFD2F_B528;
/// Frames that hold no data: the last hexadecimal digit is free. `pzstd` begins with one.
const ZSTD_SKIPPABLE: u32 = 0x184D_2A50;
const XZ_MAGIC: [u8; 6] = [0xFD, b'7', b'z', b'X', b'Z', 0];
const GZIP_MAGIC: [u8; 3] = [0x1F, 0x8B, 8];
/// zlib's code for a gzip header and trailer around a 32 KiB window: 16 + 15.
const GZIP_WINDOW_BITS: u8 = 15;
/// `ZSTD_error_frameParameter_windowTooLarge` of `zstd_errors.h`.
const ZSTD_WINDOW_TOO_LARGE: usize = 16;

/// How a file holds an image.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Format {
    /// As it is.
    Raw,
    /// RFC 1952.
    Gzip,
    /// The .xz format.
    Xz,
    /// RFC 8878.
    Zstd,
}

impl Format {
    /// The format of a file that begins with `head`.
    pub(super) fn of(head: &[u8]) -> Self {
        let word = head.first_chunk::<4>().map(|bytes| u32::from_le_bytes(*bytes));
        if head.starts_with(&GZIP_MAGIC) {
            Format::Gzip
        } else if head.starts_with(&XZ_MAGIC) {
            Format::Xz
        } else if word.is_some_and(|word| word == ZSTD_MAGIC || word & !0xF == ZSTD_SKIPPABLE) {
            Format::Zstd
        } else {
            Format::Raw
        }
    }

    /// The least length of the image in a file of `file_bytes` that begins with `head`, if that
    /// can be told.
    pub(super) fn image_bytes(self, head: &[u8], file_bytes: Option<u64>) -> Option<u64> {
        match self {
            Format::Raw => file_bytes,
            Format::Zstd => zstd_safe::get_frame_content_size(head).ok().flatten(),
            Format::Gzip | Format::Xz => None,
        }
    }
}

/// Why the image cannot be had from the file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum DecodeError {
    /// The bytes are not what the format asks for.
    Corrupt(String),
    /// They ask for more memory than the setting allows.
    Memory,
}

impl DecodeError {
    /// What it means for the update.
    pub(super) fn failure(self, at_byte: u64) -> Failure {
        match self {
            DecodeError::Corrupt(problem) => Failure::new(
                FailureKind::CorruptImage,
                format!(
                    "the compressed image is damaged near byte {at_byte}: {problem}; build and \
                     upload it again"
                ),
            ),
            DecodeError::Memory => Failure::new(
                FailureKind::DecoderMemory,
                "decompressing the image needs more memory than fetch.decoder_memory_mib allows; \
                 compress it with a smaller window (xz -8, zstd without --long) or raise the setting",
            ),
        }
    }
}

/// What one call did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Step {
    /// Bytes of the input that are no longer needed.
    pub(super) consumed: usize,
}

/// Decompresses one file.
pub(super) struct Decoder {
    codec: Codec,
    memory_bytes: u64,
    /// No byte of the next part was read yet.
    between_parts: bool,
    /// Zero bytes since the last part. xz allows them in groups of four (The .xz File Format,
    /// section 2.2), gzip(1) ignores any number of them.
    padding_bytes: u64,
}

enum Codec {
    Gzip(Decompress),
    Xz(Stream),
    Zstd(DCtx<'static>),
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder")
            .field("between_parts", &self.between_parts)
            .finish_non_exhaustive()
    }
}

impl Decoder {
    /// A decoder for `format` that takes about `memory_bytes` at most; `None` for raw images.
    ///
    /// # Errors
    /// There is not even the memory to begin.
    pub(super) fn new(format: Format, memory_bytes: u64) -> Result<Option<Self>, DecodeError> {
        let codec = match format {
            Format::Raw => return Ok(None),
            Format::Gzip => Codec::Gzip(Decompress::new_gzip(GZIP_WINDOW_BITS)),
            Format::Xz => Codec::Xz(xz(memory_bytes)?),
            Format::Zstd => Codec::Zstd(zstd(memory_bytes)?),
        };
        Ok(Some(Decoder { codec, memory_bytes, between_parts: true, padding_bytes: 0 }))
    }

    /// Whether a new decoder could take over here.
    pub(super) fn is_between_parts(&self) -> bool {
        self.between_parts && self.is_padding_whole()
    }

    fn is_padding_whole(&self) -> bool {
        match self.codec {
            Codec::Gzip(_) => true,
            Codec::Xz(_) | Codec::Zstd(_) => self.padding_bytes.is_multiple_of(4),
        }
    }

    /// Decompresses some of `input` into the spare capacity of `output`. Call again with the rest
    /// of the input, even an empty one, while `output` comes back full.
    ///
    /// # Errors
    /// The file is of no use; the decoder must not be called again.
    pub(super) fn decode(
        &mut self,
        input: &[u8],
        output: &mut Vec<u8>,
    ) -> Result<Step, DecodeError> {
        if self.between_parts {
            if matches!(self.codec, Codec::Gzip(_) | Codec::Xz(_)) {
                let zeros = input.iter().take_while(|byte| **byte == 0).count();
                if zeros > 0 {
                    self.padding_bytes += u64::try_from(zeros).unwrap_or(u64::MAX);
                    return Ok(Step { consumed: zeros });
                }
            }
            if input.is_empty() {
                return Ok(Step { consumed: 0 });
            }
            if !self.is_padding_whole() {
                return Err(corrupt("bytes that belong to nothing"));
            }
            self.padding_bytes = 0;
            self.between_parts = false;
        }
        let before = output.len();
        let (consumed, ended) = match &mut self.codec {
            Codec::Gzip(inflate) => {
                let total = inflate.total_in();
                let status = inflate
                    .decompress_vec(input, output, FlushDecompress::None)
                    .map_err(|error| DecodeError::Corrupt(error.to_string()))?;
                (inflate.total_in() - total, status == flate2::Status::StreamEnd)
            }
            Codec::Xz(stream) => {
                let total = stream.total_in();
                let status = stream.process_vec(input, output, Action::Run);
                let status = status.map_err(xz_error)?;
                (stream.total_in() - total, status == liblzma::stream::Status::StreamEnd)
            }
            Codec::Zstd(context) => {
                let mut from = InBuffer::around(input);
                let mut to = OutBuffer::around_pos(output, before);
                let hint = context.decompress_stream(&mut to, &mut from).map_err(zstd_error)?;
                (u64::try_from(from.pos).unwrap_or(u64::MAX), hint == 0)
            }
        };
        let consumed = usize::try_from(consumed).unwrap_or(usize::MAX);
        if ended {
            self.between_parts = true;
            match &mut self.codec {
                Codec::Gzip(inflate) => *inflate = Decompress::new_gzip(GZIP_WINDOW_BITS),
                Codec::Xz(stream) => *stream = xz(self.memory_bytes)?,
                // It goes on to the next frame by itself.
                Codec::Zstd(_) => {}
            }
        } else if consumed == 0 && output.len() == before && !input.is_empty() {
            return Err(corrupt("it makes no sense"));
        }
        Ok(Step { consumed })
    }
}

fn corrupt(problem: &str) -> DecodeError {
    DecodeError::Corrupt(problem.to_owned())
}

fn xz(memory_bytes: u64) -> Result<Stream, DecodeError> {
    Stream::new_stream_decoder(memory_bytes, 0).map_err(xz_error)
}

fn xz_error(error: liblzma::stream::Error) -> DecodeError {
    match error {
        liblzma::stream::Error::MemLimit | liblzma::stream::Error::Mem => DecodeError::Memory,
        error => DecodeError::Corrupt(error.to_string()),
    }
}

fn zstd(memory_bytes: u64) -> Result<DCtx<'static>, DecodeError> {
    let mut context = DCtx::try_create().ok_or(DecodeError::Memory)?;
    // The window is nearly all that a decoder needs, and its size is a power of two.
    let window_log = memory_bytes.max(1 << 20).ilog2();
    context.set_parameter(DParameter::WindowLogMax(window_log)).map_err(zstd_error)?;
    Ok(context)
}

fn zstd_error(code: usize) -> DecodeError {
    match code.wrapping_neg() {
        ZSTD_WINDOW_TOO_LARGE => DecodeError::Memory,
        _ => DecodeError::Corrupt(zstd_safe::get_error_name(code).to_lowercase()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    const MEMORY: u64 = 64 << 20;

    fn compress(format: Format, bytes: &[u8]) -> Vec<u8> {
        match format {
            Format::Raw => bytes.to_vec(),
            Format::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Default::default());
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
            Format::Xz => {
                let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 0);
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
            Format::Zstd => zstd::bulk::compress(bytes, 1).unwrap(),
        }
    }

    /// Decodes pieces of `file` with `space` bytes of output at a time. Answers the image, where
    /// in the file a decoder could start afresh, and whether it ended at such a place.
    fn decode(
        file: &[u8],
        piece: usize,
        space: usize,
    ) -> Result<(Vec<u8>, Vec<usize>, bool), DecodeError> {
        let mut decoder = Decoder::new(Format::of(file), MEMORY)?.unwrap();
        let (mut image, mut starts, mut position) = (Vec::new(), Vec::new(), 0);
        for mut bytes in file.chunks(piece) {
            loop {
                if decoder.is_between_parts() && !bytes.is_empty() {
                    starts.push(position);
                }
                let mut output = Vec::new();
                output.reserve_exact(space);
                let capacity = output.capacity();
                let step = decoder.decode(bytes, &mut output)?;
                assert_eq!(output.capacity(), capacity, "no output beyond the bound");
                position += step.consumed;
                bytes = &bytes[step.consumed..];
                let is_full = output.len() == capacity;
                image.append(&mut output);
                if bytes.is_empty() && !is_full {
                    break;
                }
            }
        }
        Ok((image, starts, decoder.is_between_parts()))
    }

    fn formats() -> impl Strategy<Value = Format> {
        prop_oneof![Just(Format::Gzip), Just(Format::Xz), Just(Format::Zstd)]
    }

    fn content() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let run = (any::<u8>(), 0..3000_usize).prop_map(|(byte, count)| vec![byte; count]);
        let noise = prop::collection::vec(any::<u8>(), 1..2000);
        prop::collection::vec(prop_oneof![run, noise], 1..6)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        #[test]
        fn any_split_gives_the_same_image(
            format in formats(), parts in content(), piece in 1..5000_usize, space in 1..5000_usize,
        ) {
            let file: Vec<u8> = parts.iter().flat_map(|part| compress(format, part)).collect();
            let (image, starts, ended) = decode(&file, piece, space).unwrap();
            prop_assert_eq!(&image, &parts.concat());
            prop_assert!(ended);
            // Whatever begins at such a place is a file of its own.
            for start in starts {
                prop_assert_eq!(Format::of(&file[start..]), format);
                let (rest, _, ended) = decode(&file[start..], 4096, 4096).unwrap();
                prop_assert!(ended && image.ends_with(&rest));
            }
        }

        #[test]
        fn never_takes_a_part_for_the_whole(
            format in formats(), parts in content(), cut in any::<prop::sample::Index>(),
        ) {
            let file = compress(format, &parts.concat());
            let cut = 6 + cut.index(file.len() - 6);
            if let Ok((_, _, ended)) = decode(&file[..cut], 1000, 1000) {
                prop_assert!(!ended);
            }
        }

        #[test]
        fn survives_noise(
            format in formats(), noise in prop::collection::vec(any::<u8>(), 0..2000),
        ) {
            let mut file = compress(format, b"image");
            file.truncate(6);
            file.extend(noise);
            let _ = decode(&file, 100, 100);
        }
    }

    #[test]
    fn tells_formats_by_their_first_bytes() {
        for format in [Format::Gzip, Format::Xz, Format::Zstd] {
            assert_eq!(Format::of(&compress(format, b"image")), format);
        }
        assert_eq!(Format::of(&[0x5E, 0x2A, 0x4D, 0x18, 0, 0, 0, 0]), Format::Zstd);
        for raw in [&[][..], &[0; 4096], b"\x1F", b"\x1F\x8B", b"MBR?", b"PK\x03\x04"] {
            assert_eq!(Format::of(raw), Format::Raw);
        }
    }

    #[test]
    fn padding_belongs_to_no_part() {
        let part = |format| compress(format, b"image");
        for (format, zeros, sound) in [
            (Format::Gzip, 1, true),
            (Format::Gzip, 512, true),
            (Format::Xz, 4, true),
            (Format::Xz, 3, false),
        ] {
            let padded = [part(format), vec![0; zeros]].concat();
            let (image, _, ended) = decode(&padded, 3, 64).unwrap();
            assert_eq!((&image[..], ended), (&b"image"[..], sound), "{format:?} {zeros}");
            let more = [padded, part(format)].concat();
            let whole =
                decode(&more, 3, 64).map(|(image, _, ended)| ended && image == b"imageimage");
            assert_eq!(whole.unwrap_or(false), sound, "{format:?} {zeros}");
        }
    }

    #[test]
    fn stays_within_its_memory() {
        let image = vec![1; 1 << 20];
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(27).unwrap();
        encoder.write_all(&image).unwrap();
        let wide = encoder.finish().unwrap();
        let heavy = {
            let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 9);
            encoder.write_all(&image).unwrap();
            encoder.finish().unwrap()
        };
        for file in [wide, heavy] {
            assert_eq!(decode(&file, 4096, 4096).unwrap_err(), DecodeError::Memory);
        }
    }
}
