//! A real browser, driven over loopback with the `WebDriver` protocol that its driver speaks.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// What the browser must not do by itself, so that the tests see the page alone.
const FLAGS: [&str; 9] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1440,1000",
];

/// A browser with one window; it ends with this value.
pub struct Browser {
    driver: Child,
    port: u16,
    session: String,
    _profile: tempfile::TempDir,
}

fn program(names: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let folders: Vec<_> = std::env::split_paths(&path).collect();
    names.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name))).find(|path| path.is_file())
}

impl Browser {
    /// Starts one; none, with a message, where it is not installed.
    pub fn start() -> Option<Self> {
        let found = (program(&["chromedriver"]), program(&["chromium", "chromium-browser", "google-chrome"]));
        let (Some(driver), Some(browser)) = found else {
            eprintln!("skipped: no chromium with its chromedriver in PATH");
            return None;
        };
        let mut driver =
            Command::new(driver).arg("--port=0").stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let port = lines.map_while(Result::ok).find_map(|line| {
            let (_, rest) = line.split_once("started successfully on port ")?;
            rest.trim_end_matches('.').parse().ok()
        });
        let profile = tempfile::tempdir().unwrap();
        let mut browser_flags: Vec<_> = FLAGS.iter().map(|flag| (*flag).to_owned()).collect();
        browser_flags.push(format!("--user-data-dir={}", profile.path().display()));
        let mut started =
            Self { driver, port: port.expect("the driver names its port"), session: String::new(), _profile: profile };
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome",
            "goog:chromeOptions": { "binary": browser, "args": browser_flags },
            "goog:loggingPrefs": { "browser": "ALL", "performance": "ALL" },
        } } });
        let session = started.request("POST", "/session", &wanted);
        session["sessionId"].as_str().unwrap().clone_into(&mut started.session);
        Some(started)
    }

    fn request(&self, method: &str, path: &str, body: &Value) -> Value {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
        let body = if method == "POST" { body.to_string() } else { String::new() };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            self.port,
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).unwrap();
        let mut stream = BufReader::new(stream);
        let mut length = 0;
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).unwrap();
            if line.trim().is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().unwrap();
            }
        }
        let mut answer = vec![0; length];
        stream.read_exact(&mut answer).unwrap();
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        assert!(answer["value"]["error"].is_null(), "{method} {path}: {}", answer["value"]);
        answer["value"].clone()
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        self.request("POST", &format!("/session/{}{path}", self.session), body)
    }

    /// Opens a file and waits until its script says that it is ready.
    pub fn open(&self, path: &Path) {
        self.post("/url", &json!({ "url": format!("file://{}", path.display()) }));
        self.wait("document.documentElement.dataset.ready !== undefined");
    }

    /// What a script returns.
    pub fn script(&self, script: &str) -> Value {
        self.post("/execute/sync", &json!({ "script": script, "args": [] }))
    }

    /// The text that an expression stands for.
    pub fn text(&self, expression: &str) -> String {
        let value = self.script(&format!("return String({expression})"));
        value.as_str().unwrap().to_owned()
    }

    /// Waits until an expression holds.
    pub fn wait(&self, expression: &str) {
        let start = Instant::now();
        while self.script(&format!("return Boolean({expression})")) != true {
            assert!(start.elapsed() < Duration::from_secs(20), "waited in vain for `{expression}`");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Milliseconds that a script takes until what it changed has been painted.
    pub fn time(&self, script: &str) -> f64 {
        let script = format!(
            "const done = arguments[arguments.length - 1], start = performance.now(); {script};
             requestAnimationFrame(() => setTimeout(() => done(performance.now() - start), 0));"
        );
        self.post("/execute/async", &json!({ "script": script, "args": [] })).as_f64().unwrap()
    }

    /// Moves the pointer of the mouse to a place in the window, and clicks if asked to.
    pub fn point(&self, x: f64, y: f64, click: bool) {
        let mut steps = vec![json!({ "type": "pointerMove", "x": x.round(), "y": y.round(), "duration": 0 })];
        if click {
            steps.extend(["pointerDown", "pointerUp"].map(|kind| json!({ "type": kind, "button": 0 })));
        }
        self.post("/actions", &json!({ "actions": [{ "type": "pointer", "id": "mouse", "actions": steps }] }));
    }

    /// Clicks into the middle of the first element of a selector, after scrolling to it.
    pub fn click(&self, selector: &str) {
        let [x, y] = self.place(selector);
        self.point(x, y, true);
    }

    /// The middle of the first element of a selector, after scrolling to it.
    pub fn place(&self, selector: &str) -> [f64; 2] {
        // Scrolling is told one frame later, and hides what the pointer shows.
        let script = format!(
            "const done = arguments[arguments.length - 1], element = document.querySelector({});
             element.scrollIntoView({{ block: 'center', behavior: 'instant' }});
             requestAnimationFrame(() => requestAnimationFrame(() => {{
                 const box = element.getBoundingClientRect();
                 done([box.x + box.width / 2, box.y + box.height / 2]);
             }}));",
            json!(selector)
        );
        let place = self.post("/execute/async", &json!({ "script": script, "args": [] }));
        [0, 1].map(|idx| place[idx].as_f64().unwrap())
    }

    /// Presses keys one after the other; special ones are those of the protocol.
    pub fn keys(&self, keys: &str) {
        let keys = keys.chars().flat_map(|key| ["keyDown", "keyUp"].map(|kind| json!({ "type": kind, "value": key })));
        let keys: Vec<_> = keys.collect();
        self.post("/actions", &json!({ "actions": [{ "type": "key", "id": "keyboard", "actions": keys }] }));
    }

    /// A command of the browser's own protocol.
    pub fn devtools(&self, command: &str, settings: &Value) {
        self.post("/goog/cdp/execute", &json!({ "cmd": command, "params": settings }));
    }

    /// A picture of the window as PNG in Base64.
    pub fn screenshot(&self) -> String {
        let value = self.request("GET", &format!("/session/{}/screenshot", self.session), &Value::Null);
        value.as_str().unwrap().to_owned()
    }

    /// What the console of the page holds.
    pub fn console(&self) -> Vec<Value> {
        self.post("/se/log", &json!({ "type": "browser" })).as_array().unwrap().clone()
    }

    /// Addresses that the opened file asked for, its own included; what the browser opens for itself before is no part of it.
    pub fn requests(&self) -> Vec<String> {
        let log = self.post("/se/log", &json!({ "type": "performance" }));
        let events =
            log.as_array().unwrap().iter().map(|entry| {
                serde_json::from_str::<Value>(entry["message"].as_str().unwrap()).unwrap()["message"].clone()
            });
        let of_file =
            |event: &Value| event["params"]["documentURL"].as_str().is_some_and(|url| url.starts_with("file:"));
        let sent = events.filter(|event| event["method"] == "Network.requestWillBeSent" && of_file(event));
        sent.map(|event| event["params"]["request"]["url"].as_str().unwrap().to_owned()).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() && !std::thread::panicking() {
            self.request("DELETE", &format!("/session/{}", self.session), &Value::Null);
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}
