//! Tensors on their way to a dump.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};

use gearbox_core::{DType, Error, Result};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::dump::{RunSpec, SafetensorsWriter, tensor_name};

/// Temporary files, one per tensor: steps come layer by layer, a dump wants one tensor behind the other.
pub(crate) struct Spool {
    folder: PathBuf,
    dtype: DType,
    /// By layer: keys, values, queries.
    files: Vec<[BufWriter<File>; 3]>,
    bytes: Vec<u8>,
    overflow: u64,
}

impl Spool {
    /// Starts in a folder.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](gearbox_core::ErrorKind::Io).
    pub(crate) fn new(folder: &Path, layers: usize, dtype: DType) -> Result<Self> {
        let file = || tempfile::tempfile_in(folder).map(BufWriter::new).map_err(|error| Error::io(folder, &error));
        let files = (0..layers).map(|_| Ok([file()?, file()?, file()?])).collect::<Result<_>>()?;
        Ok(Self { folder: folder.to_owned(), dtype, files, bytes: Vec::new(), overflow: 0 })
    }

    /// Takes in what one layer appended, rounded to nearest even.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](gearbox_core::ErrorKind::Io).
    pub(crate) fn append(&mut self, step: &gearbox_model::LayerStep<'_>) -> Result<()> {
        let files = &mut self.files[step.layer as usize];
        for (file, numbers) in files.iter_mut().zip([step.key, step.value, step.query]) {
            self.overflow += round(self.dtype, numbers, &mut self.bytes)?;
            file.write_all(&self.bytes).map_err(|error| Error::io(&self.folder, &error))?;
        }
        Ok(())
    }

    /// Finite numbers that became infinite.
    pub(crate) fn overflow(&self) -> u64 {
        self.overflow
    }

    /// Keys, values and queries of a layer since it was last asked for them.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](gearbox_core::ErrorKind::Io).
    pub(crate) fn take(&mut self, layer: usize) -> Result<[Vec<u8>; 3]> {
        let mut parts = <[Vec<u8>; 3]>::default();
        for (file, part) in self.files[layer].iter_mut().zip(&mut parts) {
            let mut read = || {
                file.rewind()?;
                file.get_mut().read_to_end(part)?;
                file.rewind()?;
                file.get_mut().set_len(0)
            };
            read().map_err(|error| Error::io(&self.folder, &error))?;
        }
        Ok(parts)
    }

    /// Writes all tensors to a file.
    ///
    /// # Errors
    /// As [`SafetensorsWriter::append`].
    pub(crate) fn write(self, spec: &RunSpec, writer: &mut SafetensorsWriter) -> Result<()> {
        let mut bytes = self.bytes;
        bytes.resize(1 << 20, 0);
        for (layer, files) in spec.layers.iter().zip(self.files) {
            for ((part, _), file) in layer.parts().zip(files) {
                let name = tensor_name(layer.id, part);
                let io = |error: std::io::Error| Error::io(&self.folder, &error);
                let mut file = file.into_inner().map_err(|error| io(error.into_error()))?;
                file.rewind().map_err(io)?;
                loop {
                    match file.read(&mut bytes).map_err(io)? {
                        0 => break,
                        len => writer.append(&name, &bytes[..len])?,
                    }
                }
            }
        }
        Ok(())
    }
}

/// Rounds to nearest even; counts finite numbers that become infinite.
fn round(dtype: DType, numbers: &[f32], out: &mut Vec<u8>) -> Result<u64> {
    out.clear();
    let overflow = match dtype {
        DType::F16 => {
            let mut rounded = vec![f16::ZERO; numbers.len()];
            rounded.convert_from_f32_slice(numbers);
            out.extend(rounded.iter().flat_map(|number| number.to_le_bytes()));
            numbers.iter().zip(&rounded).filter(|(from, to)| from.is_finite() && !to.is_finite()).count()
        }
        DType::Bf16 => {
            let mut rounded = vec![bf16::ZERO; numbers.len()];
            rounded.convert_from_f32_slice(numbers);
            out.extend(rounded.iter().flat_map(|number| number.to_le_bytes()));
            numbers.iter().zip(&rounded).filter(|(from, to)| from.is_finite() && !to.is_finite()).count()
        }
        DType::F32 => {
            out.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            0
        }
        other => return Err(Error::unsupported(format!("expected f16, bf16 or f32, got {other}"))),
    };
    Ok(overflow as u64)
}
