//! Weights: one or several safetensors files of a model folder, as F32 tensors.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use gearbox_core::{DType, Error, Result, ResultExt};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::element::widen;
use crate::from_candle;

/// The weights of a model that were not yet taken.
pub(crate) struct Weights {
    folder: PathBuf,
    tensors: BTreeMap<String, Tensor>,
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
pub(crate) struct Index {
    /// Tensor to file.
    pub weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Its name in a model folder.
    pub const FILE: &str = "model.safetensors.index.json";

    /// Reads it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if it is none; [`ErrorKind::Io`](gearbox_core::ErrorKind::Io).
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, &error))?;
        let index: Self = serde_json::from_str(&text).map_err(|error| Self::wrong(path, error))?;
        match index
            .weight_map
            .values()
            .find(|file| Path::new(file).file_name().is_none_or(|name| name != file.as_str()))
        {
            Some(file) => {
                Err(Self::wrong(path, format!("expected the name of a file in the same folder, got `{file}`")))
            }
            None => Ok(index),
        }
    }

    fn wrong(path: &Path, what: impl std::fmt::Display) -> Error {
        Error::invalid_input(format!("`{}`: {what}", path.display()))
    }
}

impl Weights {
    /// Reads `model.safetensors`, or the files that `model.safetensors.index.json` names, one at a time.
    ///
    /// They are read, not mapped: their elements are converted to F32 anyway, and mapping a file that may change is unsafe.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) for a damaged file or index, a file outside the folder, or an
    /// element type other than F16, BF16 and F32; [`ErrorKind::Io`](gearbox_core::ErrorKind::Io).
    pub(crate) fn load(folder: &Path, device: &Device) -> Result<Self> {
        let path = folder.join(Index::FILE);
        let mut weights = Self { folder: folder.to_owned(), tensors: BTreeMap::new() };
        if !path.is_file() {
            weights.read("model.safetensors", device)?;
            return Ok(weights);
        }
        let Index { weight_map } = Index::read(&path)?;
        for file in weight_map.values().collect::<BTreeSet<_>>() {
            weights.read(file, device)?;
        }
        match weight_map.iter().find(|(name, _)| !weights.tensors.contains_key(*name)) {
            Some((name, file)) => Err(Index::wrong(&path, format!("tensor `{name}` is not in `{file}`"))),
            None => Ok(weights),
        }
    }

    fn read(&mut self, file: &str, device: &Device) -> Result<()> {
        let path = self.folder.join(file);
        let bytes = std::fs::read(&path).map_err(|error| Error::io(&path, &error))?;
        self.take_in(&bytes, device).context(|| format!("`{}`", path.display()))
    }

    fn take_in(&mut self, bytes: &[u8], device: &Device) -> Result<()> {
        let file = SafeTensors::deserialize(bytes).map_err(|error| Error::invalid_input(error.to_string()))?;
        for (name, view) in file.iter() {
            let dtype = match view.dtype() {
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::Bf16,
                Dtype::F32 => DType::F32,
                other => {
                    return Err(Error::invalid_input(format!(
                        "tensor `{name}`: expected F16, BF16 or F32, got {other}"
                    )));
                }
            };
            let mut values = vec![0.0; view.data().len() / dtype.size()];
            widen(dtype, view.data(), &mut values);
            let tensor = Tensor::from_vec(values, view.shape(), device).map_err(from_candle)?;
            if self.tensors.insert(name.to_owned(), tensor).is_some() {
                return Err(Error::invalid_input(format!("tensor `{name}` is in another file too")));
            }
        }
        Ok(())
    }

    fn wrong(&self, what: std::fmt::Arguments<'_>) -> Error {
        Error::invalid_input(format!("weights in `{}`: {what}", self.folder.display()))
    }

    /// Takes a tensor of a shape.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if it is missing or has another shape.
    pub(crate) fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let found = self.tensors.remove(name);
        let tensor =
            found.ok_or_else(|| self.wrong(format_args!("expected tensor `{name}` of shape {shape:?}, got none")))?;
        if tensor.dims() == shape {
            Ok(tensor)
        } else {
            Err(self.wrong(format_args!("tensor `{name}`: expected shape {shape:?}, got {:?}", tensor.dims())))
        }
    }

    /// Refuses tensors that the model as configured does not use, such as biases it would ignore.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](gearbox_core::ErrorKind::Unsupported) with the name of the first one.
    pub(crate) fn finish(self, tied_head: bool) -> Result<()> {
        let known = |name: &str| name.ends_with("rotary_emb.inv_freq") || tied_head && name == "lm_head.weight";
        match self.tensors.keys().find(|name| !known(name)) {
            Some(name) => Err(Error::unsupported(format!(
                "weights in `{}`: tensor `{name}` is not part of the model that `config.json` describes",
                self.folder.display()
            ))),
            None => Ok(()),
        }
    }
}
