//! Numpy arrays as tensors, and tensors as numpy arrays; neither way copies the elements.
//!
//! numpy has no bfloat16 of its own. Arrays of `uint16` are taken as its bits, and so are arrays of `ml_dtypes.bfloat16`; what comes back
//! is of the latter where that package is installed.

use gearbox_core::{Chunk, DType, Shape};
use numpy::{
    PyArray1, PyArray3, PyArrayDescrMethods, PyArrayMethods, PyReadonlyArray3, PyReadwriteArray1, PyUntypedArray,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::error::raise;

/// A tensor that Python holds.
pub(crate) struct Tensor<'py> {
    pub(crate) dtype: DType,
    pub(crate) shape: Shape,
    /// The same memory, as bytes.
    bytes: PyReadonlyArray3<'py, u8>,
}

impl<'py> Tensor<'py> {
    /// Checks that an argument is an array of shape `(seq, heads, dim)` without gaps.
    pub(crate) fn of(name: &str, argument: &Bound<'py, PyAny>) -> PyResult<Self> {
        let axes = ["seq", "heads", "dim"];
        let array = array(name, axes, argument)?;
        let dtype = element(name, array)?;
        let [seq, heads, dim] = extents(name, axes, array)?;
        let bytes = argument.call_method1("view", ("uint8",))?.cast_into::<PyArray3<u8>>()?.try_readonly()?;
        Ok(Self { dtype, shape: Shape::new(seq, heads, dim), bytes })
    }

    /// Checks what is known of the array beforehand.
    pub(crate) fn expect(&self, name: &str, dtype: DType, heads: usize, dim: usize) -> PyResult<()> {
        if self.dtype != dtype {
            let message = format!("{name}: expected dtype {}, got {}", name_of(dtype), name_of(self.dtype));
            return Err(PyTypeError::new_err(message));
        }
        if (self.shape.heads, self.shape.dim) != (heads, dim) {
            let message = format!("{name}: expected shape (seq, {heads}, {dim}), got {}", self.shape);
            return Err(PyValueError::new_err(message));
        }
        Ok(())
    }

    /// The elements as they lie in memory.
    pub(crate) fn chunk(&self) -> PyResult<Chunk<'_>> {
        Chunk::new(self.shape, self.dtype, self.bytes.as_slice()?).map_err(raise)
    }
}

/// Numbers that Python holds: a C-contiguous array of float32 with three axes.
pub(crate) struct Floats<'py>(PyReadonlyArray3<'py, f32>);

impl<'py> Floats<'py> {
    /// Checks that an argument is such an array.
    pub(crate) fn of(name: &str, axes: [&str; 3], argument: &Bound<'py, PyAny>) -> PyResult<Self> {
        let array = array(name, axes, argument)?;
        extents(name, axes, array)?;
        let Ok(floats) = array.cast::<PyArray3<f32>>() else {
            let got = array.dtype().getattr("name")?;
            return Err(PyTypeError::new_err(format!("{name}: expected dtype float32, got {got}")));
        };
        Ok(Self(floats.try_readonly()?))
    }

    /// Its extents.
    pub(crate) fn shape(&self) -> [usize; 3] {
        let &[first, second, third] = self.0.shape() else { unreachable!("the array has three axes") };
        [first, second, third]
    }

    /// The numbers as they lie in memory.
    pub(crate) fn numbers(&self) -> PyResult<&[f32]> {
        Ok(self.0.as_slice()?)
    }
}

/// Checks that an argument is an array.
fn array<'a, 'py>(
    name: &str,
    axes: [&str; 3],
    argument: &'a Bound<'py, PyAny>,
) -> PyResult<&'a Bound<'py, PyUntypedArray>> {
    if let Ok(array) = argument.cast::<PyUntypedArray>() {
        return Ok(array);
    }
    let (axes, got) = (axes.join(", "), argument.get_type().name()?);
    Err(PyTypeError::new_err(format!("{name}: expected a numpy array of shape ({axes}), got {got}")))
}

/// Checks that an array has three axes and no gaps.
fn extents(name: &str, axes: [&str; 3], array: &Bound<'_, PyUntypedArray>) -> PyResult<[usize; 3]> {
    let Ok(extents) = <[usize; 3]>::try_from(array.shape()) else {
        let got = array.getattr("shape")?;
        return Err(PyValueError::new_err(format!("{name}: expected shape ({}), got {got}", axes.join(", "))));
    };
    if !array.is_c_contiguous() {
        let strides = array.getattr("strides")?;
        return Err(PyValueError::new_err(format!(
            "{name}: expected a C-contiguous array, got strides {strides}; numpy.ascontiguousarray copies it"
        )));
    }
    Ok(extents)
}

/// The element type of an array.
fn element(name: &str, array: &Bound<'_, PyUntypedArray>) -> PyResult<DType> {
    let dtype = array.dtype();
    let found: String = dtype.getattr("name")?.extract()?;
    let element = match found.as_str() {
        "float16" => DType::F16,
        "bfloat16" | "uint16" => DType::Bf16,
        "float32" => DType::F32,
        _ => {
            return Err(PyTypeError::new_err(format!(
                "{name}: expected dtype float16, float32, bfloat16 or uint16 (the bits of bfloat16), got {found}"
            )));
        }
    };
    // `=` is the order of the machine.
    let little = dtype.byteorder() == b'<' || dtype.byteorder() != b'>' && cfg!(target_endian = "little");
    if !little {
        let got = dtype.getattr("str")?;
        return Err(PyValueError::new_err(format!("{name}: expected little-endian elements, got {got}")));
    }
    Ok(element)
}

/// The name that numpy has for an element type.
pub(crate) fn name_of(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "float16",
        DType::Bf16 => "bfloat16",
        _ => "float32",
    }
}

/// The element type that an argument names: as a string, a numpy dtype or a torch dtype.
pub(crate) fn dtype_of(argument: &Bound<'_, PyAny>) -> PyResult<DType> {
    let name = match argument.extract::<String>() {
        Ok(name) => name,
        Err(_) => match argument.py().import("numpy")?.call_method1("dtype", (argument,)) {
            Ok(dtype) => dtype.getattr("name")?.extract()?,
            Err(_) => argument.str()?.to_string(),
        },
    };
    match name.trim_start_matches("torch.") {
        "float16" | "f16" => Ok(DType::F16),
        "bfloat16" | "bf16" => Ok(DType::Bf16),
        "float32" | "f32" => Ok(DType::F32),
        other => Err(PyValueError::new_err(format!("dtype: expected float16, bfloat16 or float32, got {other}"))),
    }
}

/// What numpy takes as the dtype of arrays that are handed out.
pub(crate) fn numpy_dtype(py: Python<'_>, dtype: DType) -> PyResult<Bound<'_, PyAny>> {
    match dtype {
        DType::Bf16 => match py.import("ml_dtypes") {
            Ok(module) => module.getattr("bfloat16"),
            Err(_) => Ok("uint16".into_pyobject(py)?.into_any()),
        },
        _ => Ok(name_of(dtype).into_pyobject(py)?.into_any()),
    }
}

/// An array that is filled before Python sees it.
pub(crate) struct NewArray<'py> {
    dtype: DType,
    shape: Shape,
    bytes: PyReadwriteArray1<'py, u8>,
}

impl<'py> NewArray<'py> {
    /// Zeros.
    pub(crate) fn new(py: Python<'py>, dtype: DType, shape: Shape) -> PyResult<Self> {
        let len = shape.elements().saturating_mul(dtype.size());
        // Through Python, which raises where memory is short.
        let bytes = py.import("numpy")?.call_method1("zeros", (len, "uint8"))?;
        Ok(Self { dtype, shape, bytes: bytes.cast_into::<PyArray1<u8>>()?.try_readwrite()? })
    }

    /// Its memory.
    pub(crate) fn bytes(&mut self) -> PyResult<&mut [u8]> {
        Ok(self.bytes.as_slice_mut()?)
    }

    /// The array of its dtype and shape.
    pub(crate) fn finish(self) -> PyResult<Bound<'py, PyAny>> {
        let Self { dtype, shape, bytes } = self;
        shaped(bytes.as_any(), dtype, shape)
    }
}

/// The same memory with another dtype and shape.
pub(crate) fn shaped<'py>(bytes: &Bound<'py, PyAny>, dtype: DType, shape: Shape) -> PyResult<Bound<'py, PyAny>> {
    let array = bytes.call_method1("view", (numpy_dtype(bytes.py(), dtype)?,))?;
    array.call_method1("reshape", ((shape.seq, shape.heads, shape.dim),))
}
