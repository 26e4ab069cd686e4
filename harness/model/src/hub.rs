//! Models of the Hugging Face hub.

use std::path::PathBuf;

use gearbox_core::{Error, Result};

/// Fetches a model into the usual cache of the Hugging Face libraries, and gives its folder: `config.json`, `tokenizer.json` and the weights.
///
/// What the cache holds is not fetched again. `HF_HOME` says where the cache is, `HF_ENDPOINT` and the token of the Hugging Face libraries
/// what is asked.
///
/// # Errors
/// [`ErrorKind::Unsupported`](gearbox_core::ErrorKind::Unsupported) if the crate was built without the feature `hub`;
/// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if the hub has no such model or file, or does not answer.
#[cfg(feature = "hub")]
pub fn fetch(id: &str) -> Result<PathBuf> {
    online::fetch(id, hf_hub::api::sync::ApiBuilder::from_env())
}

/// Says that models cannot be fetched.
///
/// # Errors
/// [`ErrorKind::Unsupported`](gearbox_core::ErrorKind::Unsupported), with the feature to build with.
#[cfg(not(feature = "hub"))]
pub fn fetch(id: &str) -> Result<PathBuf> {
    let how = "build with `--features hub`, or name a folder with the model's files";
    Err(Error::unsupported(format!("`{id}`: this program was built without the Hugging Face hub; {how}")))
}

#[cfg(feature = "hub")]
mod online {
    use std::collections::BTreeSet;

    use hf_hub::api::sync::{ApiBuilder, ApiError};

    use super::{Error, PathBuf, Result};
    use crate::weights::Index;

    /// Fetches a model from where the builder says.
    pub(super) fn fetch(id: &str, builder: ApiBuilder) -> Result<PathBuf> {
        let failed = |file: &str, error: ApiError| Error::invalid_input(format!("hub, `{id}`, `{file}`: {error}"));
        // Other names would be other paths of the hub, or of the cache.
        let is_part = |part: &str| {
            let is_legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && !part.starts_with('.') && part.chars().all(is_legal)
        };
        if id.split('/').count() > 2 || !id.split('/').all(is_part) {
            return Err(Error::invalid_config(format!("hub: expected a model such as `owner/name`, got `{id}`")));
        }
        let api = builder.with_progress(false).build().map_err(|error| failed("", error))?;
        let repo = api.model(id.to_owned());
        let get = |file: &str| repo.get(file).map_err(|error| failed(file, error));
        let config = get("config.json")?;
        get("tokenizer.json")?;
        match repo.get(Index::FILE) {
            Ok(path) => {
                let Index { weight_map } = Index::read(&path)?;
                weight_map.values().collect::<BTreeSet<_>>().into_iter().try_for_each(|file| get(file).map(drop))?;
            }
            // Most models have one file and no index.
            Err(_) => drop(get("model.safetensors")?),
        }
        config.parent().map(PathBuf::from).ok_or_else(|| Error::invalid_input(format!("hub, `{id}`: no folder")))
    }
}

#[cfg(all(test, feature = "hub"))]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::path::Path;

    use hf_hub::api::sync::ApiBuilder;

    use super::*;

    /// Answers one request as the hub does: ranges, a commit and a tag of the content.
    fn answer(stream: &mut TcpStream, folder: &Path) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines().map_while(std::io::Result::ok);
        let target = lines.next().unwrap_or_default();
        let range = lines.take_while(|line| !line.is_empty()).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            let (start, end) = value.trim().strip_prefix("bytes=")?.split_once('-')?;
            let numbers = (start.parse::<usize>().ok()?, end.parse::<usize>().ok());
            key.eq_ignore_ascii_case("range").then_some(numbers)
        });
        let path = target.split(' ').nth(1).unwrap_or_default();
        let file = path.strip_prefix("/owner/tiny/resolve/main/").map(|name| folder.join(name));
        let Some(bytes) = file.and_then(|file| std::fs::read(file).ok()) else {
            return stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        };
        let (start, end) = range.unwrap_or((0, None));
        let end = end.map_or(bytes.len(), |end| (end + 1).min(bytes.len()));
        let (status, len) = (if range.is_some() { "206 Partial Content" } else { "200 OK" }, end - start);
        write!(
            stream,
            "HTTP/1.1 {status}\r\ncontent-length: {len}\r\ncontent-range: bytes {start}-{}/{}\r\n\
             x-repo-commit: 0123abc\r\netag: \"{len}-{}\"\r\nconnection: close\r\n\r\n",
            end.saturating_sub(1),
            bytes.len(),
            path.len()
        )?;
        stream.write_all(&bytes[start..end])
    }

    #[test]
    fn model_is_fetched_once_and_loads() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let folder = crate::bundled().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // A client that hangs up is no failure of the server.
                let _ = stream.and_then(|mut stream| answer(&mut stream, &folder));
            }
        });
        let cache = tempfile::tempdir().unwrap();
        let builder = |endpoint: &str| {
            let builder = ApiBuilder::new().with_cache_dir(cache.path().to_owned()).with_token(None);
            builder.with_endpoint(endpoint.to_owned())
        };
        let fetched = online::fetch("owner/tiny", builder(&endpoint)).unwrap();
        assert_eq!(crate::Model::load(&fetched).unwrap().config().layers, 6);
        // Now nobody has to answer but for the index that is not there.
        assert_eq!(online::fetch("owner/tiny", builder("http://127.0.0.1:9")).unwrap(), fetched);
        let missing = online::fetch("owner/none", builder(&endpoint)).unwrap_err().to_string();
        assert!(missing.contains("hub, `owner/none`, `config.json`: ") && missing.contains("404"), "{missing}");
        for id in ["", "../x", "a/b/c", "a b"] {
            assert!(
                online::fetch(id, builder(&endpoint)).unwrap_err().to_string().contains("expected a model such as")
            );
        }
    }
}
