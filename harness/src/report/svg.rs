//! A minimal writer of SVG: text stays text, colours follow the reader's light or dark mode.

use std::fmt::{self, Write as _};

/// A picture that is being drawn.
#[derive(Debug)]
pub(super) struct Svg {
    width: f64,
    height: f64,
    body: String,
}

/// Colours are Okabe and Ito's, which stay apart for colour-blind eyes.
const STYLE: &str = "
text { font: 12px 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif; fill: #1b1d21 } .soft { fill: #5c6068 } .end { text-anchor: end }
.mid { text-anchor: middle } .grid { stroke: #dedbd3; fill: none } .axis { stroke: #1b1d21; fill: none } .band { fill: #f3f1eb }
.line { stroke: #1b1d21; stroke-opacity: .5; stroke-dasharray: 5 3; fill: none } .halo { paint-order: stroke; stroke: #fff; stroke-width: 4px }
.exact { color: #0072b2 } .passes { color: #00805f } .below { color: #c04f00 } .mark { stroke: currentColor; stroke-width: 1.5; fill: #fff }
.front { fill: currentColor } .paper { fill: #fff } .light { fill: #fff }
@media (prefers-color-scheme: dark) {
text { fill: #e8e6e1 } .soft { fill: #a5a8af } .grid { stroke: #31353c } .axis, .line { stroke: #e8e6e1 } .band { fill: #20242a } .halo { stroke: #14161a }
.exact { color: #56b4e9 } .passes { color: #2fc39a } .below { color: #f0883e } .mark { fill: #14161a } .front { fill: currentColor } .paper { fill: #14161a }
}";

impl Svg {
    /// An empty picture with a title for those who cannot see it.
    pub fn new(width: f64, height: f64, title: &str) -> Self {
        let body = format!("<title>{}</title>\n", Escaped(title));
        let mut svg = Self { width, height, body };
        svg.rect(0.0, 0.0, width, height, "class=\"paper\"", "");
        svg
    }

    /// A line of text.
    pub fn text(&mut self, x: f64, y: f64, class: &str, text: &str) {
        let _ = writeln!(self.body, "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\">{}</text>", Escaped(text));
    }

    /// A line of text that runs upwards and ends at a point.
    pub fn text_up(&mut self, x: f64, y: f64, text: &str) {
        let place = format!("transform=\"translate({x:.1} {y:.1}) rotate(-90)\"");
        let _ = writeln!(self.body, "<text {place} class=\"end\">{}</text>", Escaped(text));
    }

    /// A path; `attributes` are written as they are.
    pub fn path(&mut self, path: &str, attributes: &str, title: &str) {
        let _ = writeln!(self.body, "<path d=\"{path}\" {attributes}>{}</path>", Title(title));
    }

    /// A rectangle; `attributes` are written as they are.
    pub fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, attributes: &str, title: &str) {
        let size =
            format!("x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\"", width.max(0.0), height.max(0.0));
        let _ = writeln!(self.body, "<rect {size} {attributes}>{}</rect>", Title(title));
    }

    /// The finished file.
    pub fn finish(self) -> String {
        let Self { width, height, body } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
             role=\"img\">\n<style>{STYLE}\n</style>\n{body}</svg>\n"
        )
    }
}

/// What is shown while the pointer rests on a shape; nothing if empty.
struct Title<'a>(&'a str);

impl fmt::Display for Title<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, "<title>{}</title>", Escaped(self.0)) }
    }
}

/// Text as XML takes it; characters that XML has no place for become a replacement character.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '&' => f.write_str("&amp;")?,
                '"' => f.write_str("&quot;")?,
                '\n' | '\t' => f.write_char(' ')?,
                '\u{fffe}' | '\u{ffff}' => f.write_char('\u{fffd}')?,
                _ if character.is_control() => f.write_char('\u{fffd}')?,
                _ => f.write_char(character)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_stays_text() {
        let mut svg = Svg::new(10.0, 10.0, "</title><script>");
        svg.text(0.0, 0.0, "", "a & \"b\" </text>\u{0}");
        svg.path("M0 0", "", "</path>");
        let text = svg.finish();
        assert!(text.contains("<title>&lt;/title&gt;&lt;script&gt;</title>"), "{text}");
        assert!(text.contains("a &amp; &quot;b&quot; &lt;/text&gt;\u{fffd}</text>"), "{text}");
        assert!(text.contains("<title>&lt;/path&gt;</title></path>"), "{text}");
    }
}
