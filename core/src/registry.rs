//! The registry: every plugin that can be named, built in or loaded.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Codec, Error, ErrorKind, EvictionPolicy, LossyTransform, Plugin, Result, config};

/// What a plugin does; every id belongs to exactly one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// [`Codec`].
    Codec,
    /// [`LossyTransform`].
    Transform,
    /// [`EvictionPolicy`].
    Eviction,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Codec => "codec",
            Self::Transform => "transform",
            Self::Eviction => "eviction",
        })
    }
}

/// A plugin that a pipeline uses. Keys that a later minor version of the format adds are passed over.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PluginUse {
    /// Id, never an alias.
    pub id: String,
    /// Version of the bytes it writes.
    pub format_version: u32,
    /// The library that it was loaded from; none for a built-in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub library: Option<LibraryUse>,
}

/// A library that plugins were loaded from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LibraryUse {
    /// Its file name, without folders: what to look for.
    pub file: String,
    /// SHA-256 of the file, 64 hexadecimal digits in lower case.
    pub sha256: String,
}

impl fmt::Display for LibraryUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the library `{}` (SHA-256 {})", self.file, self.sha256)
    }
}

/// Names a library. Its digest takes longer than loading it, so that is done when somebody asks.
pub type NameLibrary = Arc<dyn Fn() -> Result<LibraryUse> + Send + Sync>;

/// Builds a plugin from checked settings.
type Build<T> = Arc<dyn Fn(&Value) -> Result<Arc<T>> + Send + Sync>;

/// What a built-in submits at link time; made by [`register_codec!`](crate::register_codec) and its siblings.
pub struct Registration<T: ?Sized> {
    /// Makes the registry entry; a function, because schemas cannot be built in a constant.
    pub entry: fn() -> Entry<T>,
}

inventory::collect!(Registration<dyn Codec>);
inventory::collect!(Registration<dyn LossyTransform>);
inventory::collect!(Registration<dyn EvictionPolicy>);

/// One plugin as the registry knows it.
pub struct Entry<T: ?Sized> {
    /// Kebab-case id.
    pub id: String,
    /// Other spellings that are accepted.
    pub aliases: Vec<String>,
    /// One line for tables.
    pub summary: String,
    /// Paper or repository that the method comes from.
    pub source: String,
    /// Version of the bytes it writes.
    pub format_version: u32,
    /// JSON Schema of its settings.
    pub schema: Value,
    /// Where it comes from: the crate of a built-in, the path of a loaded library.
    pub origin: String,
    /// Names the library that it was loaded from; none for a built-in.
    pub library: Option<NameLibrary>,
    /// Builds it from settings that passed the schema.
    pub build: Build<T>,
}

impl<T: ?Sized> Clone for Entry<T> {
    fn clone(&self) -> Self {
        Self {
            id: self.id.clone(),
            aliases: self.aliases.clone(),
            summary: self.summary.clone(),
            source: self.source.clone(),
            format_version: self.format_version,
            schema: self.schema.clone(),
            origin: self.origin.clone(),
            library: self.library.clone(),
            build: Arc::clone(&self.build),
        }
    }
}

impl<T: ?Sized> fmt::Debug for Entry<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Entry({} v{} from {})", self.id, self.format_version, self.origin)
    }
}

impl<T: ?Sized> Entry<T> {
    /// The entry of a plugin written in Rust; `erase` turns it into a trait object.
    pub fn of<P: Plugin + 'static>(origin: &str, erase: fn(P) -> Arc<T>) -> Self
    where
        T: 'static,
    {
        Self {
            id: P::ID.to_owned(),
            aliases: P::ALIASES.iter().map(ToString::to_string).collect(),
            summary: P::SUMMARY.to_owned(),
            source: P::SOURCE.to_owned(),
            format_version: P::FORMAT_VERSION,
            schema: config::schema_of::<P::Config>(),
            origin: origin.to_owned(),
            library: None,
            build: Arc::new(move |value| {
                let config = serde_json::from_value(value.clone()).map_err(|e| Error::invalid_config(e.to_string()))?;
                Ok(erase(P::new(config)?))
            }),
        }
    }

    /// What a container says of it.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if its library cannot be read any more.
    pub fn as_use(&self) -> Result<PluginUse> {
        let library = self.library.as_ref().map(|name| name()).transpose()?;
        Ok(PluginUse { id: self.id.clone(), format_version: self.format_version, library })
    }

    /// Builds the plugin from settings, after checking them against its schema.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] with the JSON pointer, the value and the legal range.
    pub fn build(&self, settings: &Value) -> Result<Arc<T>> {
        config::check(&self.schema, settings)
            .and_then(|()| (self.build)(settings))
            .map_err(|error| error.context(format!("plugin `{}`", self.id)))
    }
}

/// Registers a type as a built-in codec; it must implement [`Plugin`] and [`Codec`].
#[macro_export]
macro_rules! register_codec {
    ($plugin:ty) => {
        $crate::register!($plugin, dyn $crate::Codec);
    };
}

/// Registers a type as a built-in transform; it must implement [`Plugin`] and [`LossyTransform`].
#[macro_export]
macro_rules! register_transform {
    ($plugin:ty) => {
        $crate::register!($plugin, dyn $crate::LossyTransform);
    };
}

/// Registers a type as a built-in eviction policy; it must implement [`Plugin`] and [`EvictionPolicy`].
#[macro_export]
macro_rules! register_eviction {
    ($plugin:ty) => {
        $crate::register!($plugin, dyn $crate::EvictionPolicy);
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! register {
    ($plugin:ty, $kind:ty) => {
        $crate::inventory::submit! {
            $crate::Registration::<$kind> {
                entry: || $crate::Entry::of::<$plugin>(
                    concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION")),
                    |plugin| ::std::sync::Arc::new(plugin),
                ),
            }
        }
    };
}

/// An entry of any kind.
#[derive(Clone, Debug)]
pub enum AnyEntry {
    /// A codec.
    Codec(Entry<dyn Codec>),
    /// A transform.
    Transform(Entry<dyn LossyTransform>),
    /// An eviction policy.
    Eviction(Entry<dyn EvictionPolicy>),
}

/// Runs the same expression on whichever entry it is.
macro_rules! each {
    ($any:expr, $entry:ident => $body:expr) => {
        match $any {
            AnyEntry::Codec($entry) => $body,
            AnyEntry::Transform($entry) => $body,
            AnyEntry::Eviction($entry) => $body,
        }
    };
}

impl AnyEntry {
    /// What it does.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Codec(_) => Kind::Codec,
            Self::Transform(_) => Kind::Transform,
            Self::Eviction(_) => Kind::Eviction,
        }
    }

    /// Kebab-case id.
    pub fn id(&self) -> &str {
        each!(self, entry => &entry.id)
    }

    /// Other spellings that are accepted.
    pub fn aliases(&self) -> &[String] {
        each!(self, entry => &entry.aliases)
    }

    /// One line for tables.
    pub fn summary(&self) -> &str {
        each!(self, entry => &entry.summary)
    }

    /// Paper or repository that the method comes from.
    pub fn source(&self) -> &str {
        each!(self, entry => &entry.source)
    }

    /// Version of the bytes it writes.
    pub fn format_version(&self) -> u32 {
        each!(self, entry => entry.format_version)
    }

    /// JSON Schema of its settings.
    pub fn schema(&self) -> &Value {
        each!(self, entry => &entry.schema)
    }

    /// Where it comes from.
    pub fn origin(&self) -> &str {
        each!(self, entry => &entry.origin)
    }

    /// Whether it was loaded from a library.
    pub fn is_loaded(&self) -> bool {
        each!(self, entry => entry.library.is_some())
    }

    /// What a container says of it.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if its library cannot be read any more.
    pub fn as_use(&self) -> Result<PluginUse> {
        each!(self, entry => entry.as_use())
    }

    /// The settings that building from `{}` resolves to.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if the defaults do not pass the plugin's own checks.
    pub fn default_config(&self) -> Result<Value> {
        let empty = Value::Object(serde_json::Map::new());
        Ok(match self {
            Self::Codec(entry) => entry.build(&empty)?.config(),
            Self::Transform(entry) => entry.build(&empty)?.config(),
            Self::Eviction(entry) => entry.build(&empty)?.config(),
        })
    }
}

/// Every plugin that can be named: a value, not a global.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    entries: BTreeMap<String, AnyEntry>,
    /// Alias to id.
    aliases: BTreeMap<String, String>,
}

impl Registry {
    /// A registry without plugins.
    pub fn empty() -> Self {
        Self::default()
    }

    /// All plugins that are linked into this program.
    ///
    /// # Errors
    /// [`ErrorKind::DuplicatePlugin`] if two claim one id.
    pub fn built_in() -> Result<Self> {
        let mut registry = Self::empty();
        for codec in inventory::iter::<Registration<dyn Codec>> {
            registry.insert(AnyEntry::Codec((codec.entry)()))?;
        }
        for transform in inventory::iter::<Registration<dyn LossyTransform>> {
            registry.insert(AnyEntry::Transform((transform.entry)()))?;
        }
        for eviction in inventory::iter::<Registration<dyn EvictionPolicy>> {
            registry.insert(AnyEntry::Eviction((eviction.entry)()))?;
        }
        Ok(registry)
    }

    /// Adds a plugin.
    ///
    /// # Errors
    /// [`ErrorKind::DuplicatePlugin`], naming both origins, if its id or an alias is taken.
    pub fn insert(&mut self, entry: AnyEntry) -> Result<()> {
        for name in std::iter::once(entry.id()).chain(entry.aliases().iter().map(String::as_str)) {
            if let Some(other) = self.lookup(name) {
                return Err(Error::new(
                    ErrorKind::DuplicatePlugin,
                    format!("plugin id `{name}` is claimed by both {} and {}", other.origin(), entry.origin()),
                ));
            }
        }
        for alias in entry.aliases() {
            self.aliases.insert(alias.clone(), entry.id().to_owned());
        }
        self.entries.insert(entry.id().to_owned(), entry);
        Ok(())
    }

    /// All plugins, sorted by id.
    pub fn entries(&self) -> impl Iterator<Item = &AnyEntry> {
        self.entries.values()
    }

    fn lookup(&self, name: &str) -> Option<&AnyEntry> {
        self.entries.get(self.aliases.get(name).map_or(name, String::as_str))
    }

    /// The plugin with this id or alias.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownPlugin`] with up to three near ids.
    pub fn get(&self, name: &str) -> Result<&AnyEntry> {
        self.lookup(name).ok_or_else(|| self.unknown(name, None))
    }

    fn unknown(&self, name: &str, kind: Option<Kind>) -> Error {
        let known = self.entries.values().filter(|entry| kind.is_none_or(|kind| entry.kind() == kind));
        let names: Vec<&str> = known.map(AnyEntry::id).collect();
        let what = kind.map_or("plugin".to_owned(), |kind| kind.to_string());
        let hint = match config::near(name, names.iter().copied()).as_slice() {
            [] if names.is_empty() => format!("no {what} is registered"),
            [] => format!("known are `{}`", names.join("`, `")),
            near => format!("did you mean `{}`?", near.join("` or `")),
        };
        Error::new(ErrorKind::UnknownPlugin, format!("no {what} has the id `{name}`, {hint}"))
    }

    fn wrong_kind(name: &str, got: &AnyEntry, expected: Kind) -> Error {
        Error::invalid_config(format!("`{name}` is not a {expected}: it is registered as {}", got.kind()))
    }

    /// The codec with this id or alias.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownPlugin`] with near ids; [`ErrorKind::InvalidConfig`] if the id belongs to another kind.
    pub fn codec(&self, name: &str) -> Result<&Entry<dyn Codec>> {
        match self.lookup(name) {
            Some(AnyEntry::Codec(entry)) => Ok(entry),
            Some(other) => Err(Self::wrong_kind(name, other, Kind::Codec)),
            None => Err(self.unknown(name, Some(Kind::Codec))),
        }
    }

    /// The transform with this id or alias.
    ///
    /// # Errors
    /// As [`Registry::codec`].
    pub fn transform(&self, name: &str) -> Result<&Entry<dyn LossyTransform>> {
        match self.lookup(name) {
            Some(AnyEntry::Transform(entry)) => Ok(entry),
            Some(other) => Err(Self::wrong_kind(name, other, Kind::Transform)),
            None => Err(self.unknown(name, Some(Kind::Transform))),
        }
    }

    /// The eviction policy with this id or alias.
    ///
    /// # Errors
    /// As [`Registry::codec`].
    pub fn eviction(&self, name: &str) -> Result<&Entry<dyn EvictionPolicy>> {
        match self.lookup(name) {
            Some(AnyEntry::Eviction(entry)) => Ok(entry),
            Some(other) => Err(Self::wrong_kind(name, other, Kind::Eviction)),
            None => Err(self.unknown(name, Some(Kind::Eviction))),
        }
    }
}
