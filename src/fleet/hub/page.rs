//! `ekiben fleet status --html`: the fleet as one page that needs nothing else, and runs nothing. What hosts say of
//! themselves is text in it.

use std::fmt::Write;

use crate::fleet::hub::host_state::FAILING;
use crate::fleet::hub::status::{Row, Shown, gravest_first, totals};
use crate::run::hold::moment;
use crate::text::{ago, line};

/// All but what is said of hosts.
const HEAD: &str = include_str!("page-head.html");

/// The page.
pub fn page(shown: &Shown, now: u64) -> String {
    let hosts = gravest_first(shown);
    let mut page = HEAD.to_owned();
    let _ = write!(page, "<header>\n<h1>{} host{}</h1>\n", hosts.len(), if hosts.len() == 1 { "" } else { "s" });
    let _ = write!(page, "<p class=\"faint\">as of {}</p>\n</header>\n<main>\n", escaped(&moment(now)));
    if let Some(line) = &shown.late {
        let _ = writeln!(page, "<p class=\"bad\">{}</p>", escaped(line));
    }
    if let Some(line) = &shown.rollout {
        let _ = writeln!(page, "<p class=\"{}\">{}</p>", if shown.stopped { "bad" } else { "doubt" }, escaped(line));
    }
    page.push_str("<ul class=\"totals\">\n");
    for (count, row) in totals(&hosts) {
        let _ = writeln!(page, "<li class=\"{}\">{count} {}</li>", class(row), escaped(&row.state));
    }
    page.push_str("</ul>\n<ul class=\"hosts\">\n");
    for (name, row) in hosts {
        let _ = write!(page, "<li class=\"{}\">\n<h2>{}</h2>\n<p class=\"state\">{}</p>\n", class(row), escaped(name), escaped(&row.state));
        for trouble in &row.trouble {
            let _ = writeln!(page, "<p class=\"trouble\">{}</p>", escaped(trouble));
        }
        page.push_str("<ul class=\"moments\">\n");
        for (what, when) in row.moments() {
            let when = when.map_or("never".into(), |when| ago(when, now));
            let _ = writeln!(page, "<li><span class=\"faint\">{what}</span> {when}</li>");
        }
        page.push_str("</ul>\n</li>\n");
    }
    page + "</ul>\n</main>\n</body>\n</html>\n"
}

/// How grave it is.
fn class(row: &Row) -> &'static str {
    match row.exit {
        0 => "well",
        FAILING => "bad",
        _ => "doubt",
    }
}

/// Text that is nothing but text in HTML.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for letter in line(text).chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_say_is_text() {
        assert_eq!(
            escaped("<script>alert('1')</script> & \"x\"\u{1b}"),
            "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt; &amp; &quot;x&quot;\u{fffd}"
        );
    }
}
