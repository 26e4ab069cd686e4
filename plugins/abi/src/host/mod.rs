//! The host's side: functions of the ABI behind core's traits.
//!
//! Nothing that a library returns is believed: lengths are compared with what was asked for, lists are checked, and a few bytes behind each
//! buffer show whether it was overrun.

mod codec;
mod eviction;
mod transform;

use std::any::Any;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use gearbox_core::{
    AnyEntry, Capabilities, Context, Entry, Error, ErrorKind, Kind, NameLibrary, Needs, Result, ResultExt,
};
use serde_json::Value;

use crate::convert;
use crate::raw;
use crate::status::{OK, OTHER, checked};

/// Bytes of resolved settings that are taken.
const MAX_JSON: usize = 16 << 20;

/// Bytes behind a buffer that must not change.
const GUARD: [u8; 16] =
    [0xC5, 0x3A, 0x96, 0x69, 0x0F, 0xF1, 0xA7, 0x58, 0x1D, 0xE2, 0x4B, 0xB4, 0x78, 0x87, 0x2E, 0xD3];

/// One plugin of a loaded library.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) table: raw::Plugin,
    pub(crate) functions: Functions,
    pub(crate) id: String,
    /// Path of the library.
    pub(crate) origin: String,
    /// Whether decoders get a buffer of their own, with a guard behind it.
    pub(crate) guarded: bool,
}

/// The table of a plugin's kind.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Functions {
    Codec(raw::CodecTable),
    Transform(raw::TransformTable),
    Eviction(raw::EvictionTable),
}

// SAFETY: the tables are copies of constants of a library that is never unloaded; the ABI lets every thread call its functions.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Loaded {
    /// The registry's entry; `described` holds all but the way to build it.
    pub(crate) fn entry(self, described: Described) -> AnyEntry {
        let (functions, loaded) = (self.functions, Arc::new(self));
        match functions {
            Functions::Codec(table) => AnyEntry::Codec(described.entry(Arc::new(move |settings| {
                Ok(Arc::new(codec::LoadedCodec::new(Object::build(&loaded, settings)?, table)?))
            }))),
            Functions::Transform(table) => AnyEntry::Transform(described.entry(Arc::new(move |settings| {
                Ok(Arc::new(transform::LoadedTransform::new(Object::build(&loaded, settings)?, table)?))
            }))),
            Functions::Eviction(table) => AnyEntry::Eviction(described.entry(Arc::new(move |settings| {
                Ok(Arc::new(eviction::LoadedPolicy::new(Object::build(&loaded, settings)?, table)?))
            }))),
        }
    }

    /// An error that is the library's fault.
    fn fault(&self, kind: ErrorKind, what: &str) -> Error {
        Error::new(kind, format!("plugin `{}` of `{}`: {what}", self.id, self.origin))
    }
}

/// What a library says about a plugin, checked.
pub(crate) struct Described {
    pub(crate) aliases: Vec<String>,
    pub(crate) summary: String,
    pub(crate) source: String,
    pub(crate) schema: Value,
    pub(crate) id: String,
    pub(crate) origin: String,
    pub(crate) library: NameLibrary,
    pub(crate) format_version: u32,
}

/// Builds an object of one kind, as an [`Entry`] has it.
type Build<T> = Arc<dyn Fn(&Value) -> Result<Arc<T>> + Send + Sync>;

impl Described {
    fn entry<T: ?Sized>(self, build: Build<T>) -> Entry<T> {
        let Self { aliases, summary, source, schema, id, origin, library, format_version } = self;
        Entry { id, aliases, summary, source, format_version, schema, origin, library: Some(library), build }
    }
}

/// A function that a table must have; its absence was refused when the library was loaded.
fn required<F>(function: Option<F>, name: &str) -> Result<F> {
    function.ok_or_else(|| Error::unsupported(format!("the plugin has no function `{name}`")))
}

/// An object that a plugin built, with what it declares. Freed with its last owner.
#[derive(Debug)]
struct Object {
    place: *mut c_void,
    plugin: Arc<Loaded>,
    config: Value,
    declared: Capabilities,
}

// SAFETY: the ABI demands that an object can be used, and freed, by any thread.
unsafe impl Send for Object {}
// SAFETY: the ABI demands that several threads can use one object at once.
unsafe impl Sync for Object {}

impl Object {
    fn build(plugin: &Arc<Loaded>, settings: &Value) -> Result<Self> {
        let build = required(plugin.table.build, "build")?;
        let settings = settings.to_string();
        let mut place = std::ptr::null_mut();
        // SAFETY: `build` belongs to a loaded library; all pointers live for the call.
        checked(|error| unsafe { build(convert::text(&settings), &raw mut place, error) })?;
        Self::of(plugin, place)
    }

    /// Takes over what the plugin made.
    fn of(plugin: &Arc<Loaded>, place: *mut c_void) -> Result<Self> {
        if place.is_null() {
            return Err(plugin.fault(ErrorKind::PluginPanicked, "expected an object, got null and no error"));
        }
        let declared = Capabilities::new(gearbox_core::ElemSet::FLOATS);
        let mut object = Self { place, plugin: Arc::clone(plugin), config: Value::Null, declared };
        let config = required(plugin.table.config, "config")?;
        // SAFETY: the object is the plugin's own, the sink lives for the call.
        object.config =
            json(|sink, error| unsafe { config(place, sink, error) }).context(|| "resolved settings".into())?;
        let declare = required(plugin.table.capabilities, "capabilities")?;
        let mut declared =
            raw::Capabilities { size: raw::size_of::<raw::Capabilities>(), elems: 0, needs: 0, wants: 0, flags: 0 };
        // SAFETY: the object is the plugin's own, the struct lives for the call.
        checked(|error| unsafe { declare(place, &raw mut declared, error) })?;
        // A policy looks at no elements, and may declare none.
        if matches!(plugin.functions, Functions::Eviction(_)) && declared.elems == 0 {
            declared.elems = 1;
        }
        object.declared = convert::capabilities_from(&declared)?;
        Ok(object)
    }

    /// Refuses what the plugin did not declare, so that it need not check it.
    fn admit(&self, elem: gearbox_core::Elem, cx: &Context<'_>) -> Result<()> {
        let Capabilities { elems, needs, .. } = self.declared;
        if !elems.contains(elem) {
            return Err(Error::new(ErrorKind::UnsupportedDType, format!("expected {elems}, got {elem}")));
        }
        if needs == Needs::NONE {
            return Ok(());
        }
        let lacks = [
            (needs.tokens && cx.tokens.is_none(), "token ids"),
            (needs.rope && cx.rope.is_none(), "RoPE facts"),
            (needs.peer && cx.peer.is_none(), "the decoded keys"),
            (needs.history && cx.history.is_none(), "decoded earlier tokens"),
        ];
        match lacks.iter().find(|(lacks, _)| *lacks) {
            Some((_, what)) => Err(Error::unsupported(format!("expected {what} in the context, got none"))),
            None => Ok(()),
        }
    }

    /// An error that is the library's fault, and that no other kind names.
    fn fault(&self, what: &str) -> Error {
        self.plugin.fault(ErrorKind::PluginPanicked, what)
    }

    fn wrong_length(&self, what: &str) -> Error {
        self.plugin.fault(ErrorKind::WrongLength, what)
    }

    /// An error if the bytes behind a buffer changed.
    fn check_guard(&self, behind: &[u8], what: &str) -> Result<()> {
        if behind == GUARD {
            return Ok(());
        }
        Err(self.wrong_length(&format!("{what} wrote behind the end of its buffer")))
    }

    /// Has a buffer filled: the caller's own, or one with a guard behind it.
    fn fill(&self, out: &mut [u8], what: &str, call: impl FnOnce(*mut u8) -> Result<()>) -> Result<()> {
        if !self.plugin.guarded {
            return call(out.as_mut_ptr());
        }
        let mut buffer = Vec::with_capacity(out.len() + GUARD.len());
        buffer.extend_from_slice(out);
        buffer.extend_from_slice(&GUARD);
        let called = call(buffer.as_mut_ptr());
        self.check_guard(&buffer[out.len()..], what)?;
        out.copy_from_slice(&buffer[..out.len()]);
        called
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        if let Some(drop) = self.plugin.table.drop {
            // SAFETY: the plugin made the object, nobody else holds it, and it is not used again.
            unsafe { drop(self.place) };
        }
    }
}

/// Takes the bytes that a plugin pours out.
struct Poured {
    bytes: Vec<u8>,
    limit: usize,
}

/// Has a plugin write bytes.
fn poured(limit: usize, call: impl FnOnce(*const raw::Sink, *mut raw::ErrorText) -> i32) -> Result<Vec<u8>> {
    let mut poured = Poured { bytes: Vec::new(), limit };
    let sink = raw::Sink { state: (&raw mut poured).cast(), append: Some(append) };
    checked(|error| call(&raw const sink, error))?;
    Ok(poured.bytes)
}

unsafe extern "C" fn append(state: *mut c_void, data: *const u8, len: usize) -> i32 {
    // SAFETY: `poured` made the state, which lives until the plugin's call returns; the plugin uses it from one thread at a time.
    let poured = unsafe { &mut *state.cast::<Poured>() };
    if len > poured.limit - poured.bytes.len() || poured.bytes.try_reserve(len).is_err() {
        return OTHER;
    }
    // SAFETY: the plugin promises that `data` is readable for `len` bytes during this call.
    poured.bytes.extend_from_slice(unsafe { convert::slice(data, len) });
    OK
}

/// Has a plugin write JSON.
fn json(call: impl FnOnce(*const raw::Sink, *mut raw::ErrorText) -> i32) -> Result<Value> {
    let bytes = poured(MAX_JSON, call)?;
    serde_json::from_slice(&bytes).map_err(|error| {
        Error::new(ErrorKind::PluginPanicked, format!("expected JSON, got {} bytes: {error}", bytes.len()))
    })
}

/// Keeps a panic of the host's own code from crossing a library's frames; it goes on when the library has returned.
#[derive(Default)]
struct HeldPanic(Option<Box<dyn Any + Send>>);

impl HeldPanic {
    fn hold<T>(&mut self, work: impl FnOnce() -> T) -> Option<T> {
        catch_unwind(AssertUnwindSafe(work)).map_err(|payload| self.0 = Some(payload)).ok()
    }

    fn release(self) {
        if let Some(payload) = self.0 {
            resume_unwind(payload);
        }
    }
}

/// The functions that a table of a kind must have, by name.
pub(crate) fn missing(plugin: &raw::Plugin, functions: &Functions) -> Option<&'static str> {
    let common = [
        ("build", plugin.build.is_none()),
        ("drop", plugin.drop.is_none()),
        ("config", plugin.config.is_none()),
        ("capabilities", plugin.capabilities.is_none()),
    ];
    let own: &[(&str, bool)] = match functions {
        Functions::Codec(table) => &[
            ("max_encoded_len", table.max_encoded_len.is_none()),
            ("encode", table.encode.is_none()),
            ("decode", table.decode.is_none()),
        ],
        Functions::Transform(table) => &[
            ("bound", table.bound.is_none()),
            ("forward", table.forward.is_none()),
            ("inverse", table.inverse.is_none()),
        ],
        Functions::Eviction(table) => &[
            ("session", table.session.is_none()),
            ("observe", table.observe.is_none()),
            ("plan", table.plan.is_none()),
            ("drop_session", table.drop_session.is_none()),
        ],
    };
    common.iter().chain(own).find(|(_, missing)| *missing).map(|(name, _)| *name)
}

/// Reads the table of a plugin's kind; `None` if it is null or too short.
///
/// # Safety
/// The tables of `plugin` are null or valid.
pub(crate) unsafe fn functions(plugin: &raw::Plugin, kind: Kind) -> Option<Functions> {
    // SAFETY: as the caller promises.
    unsafe {
        match kind {
            Kind::Codec => raw::read(plugin.codec).map(Functions::Codec),
            Kind::Transform => raw::read(plugin.transform).map(Functions::Transform),
            Kind::Eviction => raw::read(plugin.eviction).map(Functions::Eviction),
        }
    }
}
