//! The plugin's side: core's traits behind the functions of the ABI.
//!
//! [`export_plugins!`](crate::export_plugins) writes all of it. Every function runs inside a panic guard: the text of the panic, with its
//! place, becomes the text of the error.

mod codec;
mod eviction;
mod transform;

use std::any::Any;
use std::cell::RefCell;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use abi_stable::library::{RootModule, RootModuleResult};
use abi_stable::prefix_type::PrefixTypeTrait;
use gearbox_core::{Capabilities, Error, ErrorKind, Kind, Plugin, Result};
use serde_json::Value;

pub use codec::codec;
pub use eviction::eviction;
pub use transform::transform;

use crate::convert;
use crate::raw;
use crate::root::{Root, RootRef};
use crate::status::{OK, report};

/// A plugin that is ready to be listed; it is kept until the process ends.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Exported(*const raw::Plugin);

/// What the host holds of a plugin of one kind.
trait Held: Sized {
    const KIND: Kind;

    fn config(&self) -> Value;
    fn capabilities(&self) -> Capabilities;
}

/// What the host holds of this plugin.
trait Holds<P>: Held {
    fn new(plugin: P) -> Self;
}

/// Lists a plugin, without the table of its kind. What it points to is leaked: libraries are never unloaded.
fn describe<P: Plugin, O: Holds<P>>() -> raw::Plugin {
    let schema = gearbox_core::config::schema_of::<P::Config>().to_string().leak();
    let aliases: Vec<raw::Str> = P::ALIASES.iter().map(|alias| convert::text(alias)).collect();
    let aliases = aliases.leak();
    raw::Plugin {
        size: raw::size_of::<raw::Plugin>(),
        kind: convert::kind_code(O::KIND),
        format_version: P::FORMAT_VERSION,
        id: convert::text(P::ID),
        summary: convert::text(P::SUMMARY),
        source: convert::text(P::SOURCE),
        schema: convert::text(schema),
        aliases: aliases.as_ptr(),
        alias_count: aliases.len(),
        build: Some(build::<P, O>),
        drop: Some(drop_object::<O>),
        config: Some(config::<O>),
        capabilities: Some(capabilities::<O>),
        codec: std::ptr::null(),
        transform: std::ptr::null(),
        eviction: std::ptr::null(),
    }
}

fn export(plugin: raw::Plugin) -> Exported {
    Exported(Box::leak(Box::new(plugin)))
}

/// What the host offers; set when the library is loaded.
static HOST: OnceLock<HostHandle> = OnceLock::new();

#[derive(Clone, Copy)]
struct HostHandle(raw::Host);

// SAFETY: the ABI lets every thread call the host's functions, with the state that belongs to them.
unsafe impl Send for HostHandle {}
// SAFETY: as above.
unsafe impl Sync for HostHandle {}

/// How much a line of a log matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Something failed.
    Error = 1,
    /// Something is not as it should be, and the result stands.
    Warn = 2,
    /// What a user may want to know.
    Info = 3,
    /// What an author may want to know.
    Debug = 4,
}

/// Sends a line to the log of the host that loaded this plugin; nothing happens before that.
///
/// A library has its own copy of every static, so `log` and `tracing` inside it do not reach the host.
pub fn log(level: Level, line: &str) {
    if let Some(HostHandle(host)) = HOST.get()
        && let Some(log) = host.log
    {
        // SAFETY: the host promises that both stay valid, for every thread; the text lives until the call returns.
        unsafe { log(host.state, level as u32, convert::text(line)) };
    }
}

/// Threads that one call of a plugin may use, its own included; 1 before a host has loaded it.
pub fn threads() -> usize {
    HOST.get().map_or(1, |HostHandle(host)| usize::try_from(host.threads).unwrap_or(1).max(1))
}

/// The one function of the root module: takes in the host, and lists the plugins.
///
/// # Safety
/// `host` is null or points to a [`raw::Host`] that lives as long as the process.
#[doc(hidden)]
pub unsafe fn library(host: *const raw::Host, plugins: fn() -> Vec<Exported>) -> *const raw::Library {
    static LIBRARY: OnceLock<usize> = OnceLock::new();
    // SAFETY: as the caller promises.
    if let Some(host) = unsafe { raw::read(host) } {
        // A second host in one process is the same program: the first one stays.
        let _ = HOST.set(HostHandle(host));
    }
    keep_place_of_panics();
    let made = catch_unwind(|| {
        *LIBRARY.get_or_init(|| {
            let plugins: Vec<*const raw::Plugin> = plugins().into_iter().map(|plugin| plugin.0).collect();
            let plugins = plugins.leak();
            let library = raw::Library {
                size: raw::size_of::<raw::Library>(),
                abi_major: raw::ABI_MAJOR,
                abi_minor: raw::ABI_MINOR,
                plugins: plugins.as_ptr(),
                count: plugins.len(),
            };
            std::ptr::from_ref(Box::leak(Box::new(library))).expose_provenance()
        })
    });
    match made {
        Ok(place) => std::ptr::with_exposed_provenance(place),
        Err(payload) => {
            log(Level::Error, &panic_text(payload.as_ref()));
            std::ptr::null()
        }
    }
}

/// The loader that `abi_stable` calls.
#[doc(hidden)]
pub fn root(library: unsafe extern "C" fn(*const raw::Host) -> *const raw::Library) -> RootModuleResult {
    let root = Root { library }.leak_into_prefix();
    // The module is also kept in a static of this library, as abi_stable's own attribute does.
    let _ = RootRef::load_module_with(|| Ok::<_, std::convert::Infallible>(root));
    // SAFETY: the erased reference is cast back only after the layout of `RootRef` was compared.
    RootModuleResult::ROk(unsafe { abi_stable::prefix_type::PrefixRefTrait::to_prefix_ref(root).cast() })
}

thread_local! {
    /// Where the last panic of this thread began.
    static PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Replaces the hook of this library, whose copy of the standard library has its own: a caught panic is an error text, not a line on stderr.
fn keep_place_of_panics() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(|place| format!(" at {place}")).unwrap_or_default();
        // A panic while the thread ends has no place to keep it.
        let _ = PLACE.try_with(|last| last.replace(place));
    }));
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str).or_else(|| payload.downcast_ref::<&str>().copied());
    let place = PLACE.try_with(RefCell::take).unwrap_or_default();
    format!("panicked{place}: {}", text.unwrap_or("no message"))
}

/// The panic guard around every exported function: returns the status, and writes the text of an error.
///
/// # Safety
/// As [`report`].
unsafe fn guarded(error: *mut raw::ErrorText, work: impl FnOnce() -> Result<()>) -> i32 {
    // Unwind safety: an object whose call panicked may hold broken state of its own, as after a caught panic in any Rust program; the
    // message tells the host, which decides whether to use it again.
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => OK,
        // SAFETY: as the caller promises.
        Ok(Err(failed)) => unsafe { report(error, failed.kind(), &failed.to_string()) },
        Err(payload) => {
            let text = panic_text(payload.as_ref());
            // The payload may panic when it is dropped, outside of any guard.
            std::mem::forget(payload);
            // SAFETY: as the caller promises.
            unsafe { report(error, ErrorKind::PluginPanicked, &text) }
        }
    }
}

/// The guard around functions that return nothing.
fn guarded_drop(work: impl FnOnce()) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(work)) {
        log(Level::Error, &panic_text(payload.as_ref()));
        std::mem::forget(payload);
    }
}

// In the functions of all tables the host upholds what `docs/ABI.md` says: pointers are valid for the call, an object came from `build` of the
// same plugin, output buffers are not shared. That is what their SAFETY comments call the contract of the ABI.

/// Builds an object from settings that passed the schema, and hands it over.
unsafe extern "C" fn build<P: Plugin, O: Holds<P>>(
    settings: raw::Str,
    object: *mut *mut c_void,
    error: *mut raw::ErrorText,
) -> i32 {
    let work = || {
        // SAFETY: the contract of the ABI.
        let settings = unsafe { convert::str(settings) }.map_err(Error::invalid_config)?;
        let config = serde_json::from_str(settings).map_err(|error| Error::invalid_config(error.to_string()))?;
        let made = O::new(P::new(config)?);
        // SAFETY: the contract of the ABI; the object is freed by `drop` of the same table.
        unsafe { give(object, made) }
    };
    // SAFETY: the contract of the ABI.
    unsafe { guarded(error, work) }
}

unsafe extern "C" fn drop_object<O: Held>(object: *mut c_void) {
    // SAFETY: the contract of the ABI.
    unsafe { take::<O>(object) };
}

unsafe extern "C" fn config<O: Held>(this: *const c_void, json: *const raw::Sink, error: *mut raw::ErrorText) -> i32 {
    // SAFETY: the contract of the ABI.
    unsafe { guarded(error, || pour_json(json, &object::<O>(this)?.config())) }
}

unsafe extern "C" fn capabilities<O: Held>(
    this: *const c_void,
    out: *mut raw::Capabilities,
    error: *mut raw::ErrorText,
) -> i32 {
    // SAFETY: the contract of the ABI.
    unsafe { guarded(error, || answer(out, convert::capabilities(&object::<O>(this)?.capabilities()))) }
}

/// # Safety
/// `object` is null or came from `build` of a plugin whose objects have this type.
unsafe fn object<'a, O: Held>(object: *const c_void) -> Result<&'a O> {
    // SAFETY: as the caller promises.
    unsafe { given(object.cast()) }
}

/// Moves a value to the heap and hands it over.
///
/// # Safety
/// `place` is null or writable.
unsafe fn give<O>(place: *mut *mut c_void, value: O) -> Result<()> {
    // SAFETY: as the caller promises.
    let place = unsafe { place.as_mut() }.ok_or_else(|| Error::invalid_input("the place of the object is null"))?;
    *place = Box::into_raw(Box::new(value)).cast();
    Ok(())
}

/// Frees what [`give`] handed over.
///
/// # Safety
/// `object` is null, or came from [`give`] with this type and is not used again.
unsafe fn take<O>(object: *mut c_void) {
    if !object.is_null() {
        // SAFETY: as the caller promises.
        guarded_drop(|| drop(unsafe { Box::from_raw(object.cast::<O>()) }));
    }
}

/// A struct behind a pointer that must not be null.
///
/// # Safety
/// `place` is null, or valid as long as `'a` lasts.
unsafe fn given<'a, T>(place: *const T) -> Result<&'a T> {
    // SAFETY: as the caller promises.
    unsafe { place.as_ref() }.ok_or_else(|| {
        let name = std::any::type_name::<T>().rsplit("::").next().unwrap_or_default();
        Error::invalid_input(format!("the host passed null for a `{name}`"))
    })
}

/// Writes the one result of a call.
///
/// # Safety
/// `place` is null or writable.
unsafe fn answer<T>(place: *mut T, value: T) -> Result<()> {
    // SAFETY: as the caller promises.
    let place = unsafe { place.as_mut() }.ok_or_else(|| Error::invalid_input("the host passed null for the result"))?;
    *place = value;
    Ok(())
}

/// Hands bytes to a sink of the host.
///
/// # Safety
/// `sink` is null or valid, with a function that takes its own state.
unsafe fn pour(sink: *const raw::Sink, bytes: &[u8]) -> Result<()> {
    // SAFETY: as the caller promises.
    let sink = unsafe { given(sink) }?;
    let append = sink.append.ok_or_else(|| Error::invalid_input("the host's sink has no function"))?;
    // SAFETY: as the caller promises; the bytes live until the call returns.
    let code = unsafe { append(sink.state, bytes.as_ptr(), bytes.len()) };
    if code == OK { Ok(()) } else { Err(Error::limit(format!("the host does not take {} bytes", bytes.len()))) }
}

/// # Safety
/// As [`pour`].
unsafe fn pour_json(sink: *const raw::Sink, value: &Value) -> Result<()> {
    // SAFETY: as the caller promises.
    unsafe { pour(sink, value.to_string().as_bytes()) }
}
