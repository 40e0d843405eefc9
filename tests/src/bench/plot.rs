//! A curve as an SVG: two panels above each other with one logarithmic x-axis, the rate and the processor time a record.
//!
//! Invariant: pure text from numbers; the same numbers give the same text, so that a new measurement is a readable change.

use std::fmt::Write as _;

/// One line of a panel.
#[derive(Clone, Debug)]
pub struct Panel {
    /// What is on the y-axis, with its unit.
    pub title: String,
    /// Lines over the same x: a name, and a value for each x where there is one.
    pub lines: Vec<(String, Vec<Option<f64>>)>,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 90.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 40.0;
const GAP: f64 = 46.0;
const COLOURS: [&str; 4] = ["#1f6fb4", "#c4471f", "#3a8a3a", "#7a4fa3"];

/// The picture. An x of 0 stands left of the least other one, since a logarithm has no place for it.
pub fn svg(title: &str, x_title: &str, xs: &[f64], panels: &[Panel]) -> String {
    let height = TOP + panels.len() as f64 * (HEIGHT + GAP) + 20.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"22\" font-size=\"15\">{}</text>\n",
        escape(title)
    );
    let across = Axis::logarithmic(xs.iter().copied(), LEFT, WIDTH - RIGHT);
    for (number, panel) in panels.iter().enumerate() {
        let top = TOP + number as f64 * (HEIGHT + GAP);
        panel.draw(&across, xs, top, &mut out);
        put(&mut out, format_args!("<text x=\"{LEFT}\" y=\"{}\">{}</text>\n", top + HEIGHT + 34.0, escape(x_title)));
    }
    out.push_str("</svg>\n");
    out
}

impl Panel {
    fn draw(&self, across: &Axis, xs: &[f64], top: f64, out: &mut String) {
        let bottom = top + HEIGHT;
        let values = self.lines.iter().flat_map(|(_, values)| values.iter().copied().flatten());
        let up = Axis::logarithmic(values, bottom, top + 18.0);
        put(out, format_args!("<text x=\"{LEFT}\" y=\"{}\">{}</text>\n", top + 8.0, escape(&self.title)));
        for tick in up.ticks() {
            let y = up.place(tick);
            put(out, format_args!("<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\n", WIDTH - RIGHT));
            put(out, format_args!("<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n", LEFT - 6.0, y + 4.0, short(tick)));
        }
        for x in xs {
            let at = across.place(*x);
            put(out, format_args!("<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{bottom}\" y2=\"{}\" stroke=\"#888\"/>\n", bottom + 4.0));
            put(out, format_args!("<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n", bottom + 17.0, short(*x)));
        }
        put(
            out,
            format_args!("<polyline points=\"{LEFT},{top} {LEFT},{bottom} {},{bottom}\" fill=\"none\" stroke=\"#888\"/>\n", WIDTH - RIGHT),
        );
        for (number, (name, values)) in self.lines.iter().enumerate() {
            let colour = COLOURS[number % COLOURS.len()];
            let places: Vec<(f64, f64)> =
                xs.iter().zip(values).filter_map(|(x, value)| Some((across.place(*x), up.place((*value)?)))).collect();
            let points: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            put(out, format_args!("<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n", points.join(" ")));
            for (x, y) in places {
                put(out, format_args!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>\n"));
            }
            let right = WIDTH - RIGHT - 120.0 * (self.lines.len() - number - 1) as f64;
            put(
                out,
                format_args!("<text x=\"{right}\" y=\"{}\" text-anchor=\"end\" fill=\"{colour}\">{}</text>\n", top + 8.0, escape(name)),
            );
        }
    }
}

/// A logarithmic axis from one place to another.
struct Axis {
    least: f64,
    most: f64,
    /// Where a 0 stands, as a factor of the least other value; 1 if there is none.
    zero: f64,
    from: f64,
    to: f64,
}

impl Axis {
    fn logarithmic(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let (mut least, mut most, mut zero) = (f64::MAX, f64::MIN_POSITIVE, 1.0);
        for value in values {
            if value > 0.0 {
                (least, most) = (least.min(value), most.max(value));
            } else {
                zero = 0.3;
            }
        }
        let least = if least > most { 1.0 } else { least * zero };
        // A line that is level lies in the middle.
        let (least, most) = if most / least < 1.5 { (least / 2.0, least * 2.0) } else { (least, most) };
        Self { least, most, zero, from, to }
    }

    fn place(&self, value: f64) -> f64 {
        let value = if value > 0.0 { value } else { self.least };
        self.from + (value / self.least).ln() / (self.most / self.least).ln() * (self.to - self.from)
    }

    /// 1, 2 and 5 of each power of ten; only the powers where there are many.
    fn ticks(&self) -> Vec<f64> {
        let (first, last) = (self.least.log10().floor() as i32, self.most.log10().ceil() as i32);
        let factors: &[f64] = if last - first > 3 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let all = (first..=last).flat_map(|power| factors.iter().map(move |factor| factor * 10_f64.powi(power)));
        let shown = self.least * 0.999 / if self.zero < 1.0 { self.zero } else { 1.0 }..=self.most * 1.001;
        all.filter(|tick| shown.contains(tick)).collect()
    }
}

/// A number for an axis: `0.5`, `20`, `3k`, `1M`.
fn short(value: f64) -> String {
    let (value, unit) = match value {
        value if value >= 1e6 => (value / 1e6, "M"),
        value if value >= 1e3 => (value / 1e3, "k"),
        value => (value, ""),
    };
    let text = format!("{value:.2}");
    format!("{}{unit}", text.trim_end_matches('0').trim_end_matches('.'))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn put(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing into a string cannot fail.
    let _ = out.write_fmt(text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_logarithmic_and_a_zero_stands_at_the_left() {
        let axis = Axis::logarithmic([1.0, 10.0, 100.0].into_iter(), 0.0, 200.0);
        assert!((axis.place(10.0) - 100.0).abs() < 1e-9);
        let axis = Axis::logarithmic([0.0, 1.0, 100.0].into_iter(), 0.0, 200.0);
        assert!(axis.place(0.0).abs() < 1e-9 && axis.place(1.0) > 1.0);
        let level = Axis::logarithmic([7.0, 7.0].into_iter(), 0.0, 200.0);
        assert!((level.place(7.0) - 100.0).abs() < 1e-9);
    }

    #[test]
    fn what_was_not_measured_is_left_out_and_names_are_escaped() {
        let panel = Panel { title: "records/s".into(), lines: vec![("a < b".into(), vec![Some(10.0), None, Some(1_000.0)])] };
        let text = svg("t", "x", &[1.0, 10.0, 100.0], &[panel]);
        assert_eq!(text.matches("<circle").count(), 2);
        assert!(text.contains("a &lt; b") && !text.contains("NaN") && !text.contains("inf"), "{text}");
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.0, 0.5, 20.0, 1_500.0, 10_000_000.0].map(short), ["0", "0.5", "20", "1.5k", "10M"]);
    }
}
