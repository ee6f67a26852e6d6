//! Tables for people: columns as wide as what is in them.

/// The lines of a table, without their ends.
pub fn lines<R: AsRef<[String]>>(rows: &[R]) -> Vec<String> {
    let width = |column: usize| rows.iter().map(|row| row.as_ref()[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..rows.first().map_or(0, |row| row.as_ref().len())).map(width).collect();
    let line = |row: &R| {
        let cells: Vec<_> = row.as_ref().iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}
